//! The operators that replace ONNX Runtime's in a session. This module and those below it are the only ones that use
//! ONNX Runtime: they check shapes, and leave the arithmetic to the rest of the crate.

mod attention;
mod elementwise;
mod matmul;
mod merged_attention;
mod shared;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use ort::AsPointer;
use ort::operator::{ComputeContext, KernelContext, OperatorDomain};

use crate::error::Error;
#[cfg(target_arch = "x86_64")]
use crate::head::TopKHead;
#[cfg(target_arch = "x86_64")]
use crate::isa::Avx2Token;
use crate::isa::{Level, level, onnxruntime_has_vector_kernels};
use crate::logits::{AtomicRequest, LogitsRequest, LogitsStats};
use crate::source_mask::SourceMask;
use crate::stats::{Softcap, StatsCell};

/// The graph that a session runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GraphKind {
    /// Hidden states of whole sources: matrix multiplications of very many rows, which are limited by the processor
    /// rather than by the memory. Quantized weights meet activations of 8 bits there, where these are faster than 16.
    Encoder,
    /// Logits.
    Decoder,
}

/// The kernels of a session: state shared with the model's other sessions, and the requested results.
pub struct Kernels {
    request: Arc<AtomicRequest>,
    stats: Arc<StatsCell>,
    softcap: Softcap,
    source_mask: Arc<SourceMask>,
    reads_source: ReadsSource,
    #[cfg(target_arch = "x86_64")]
    head: Option<Arc<TopKHead>>,
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernels").field("softcap", &self.softcap).finish_non_exhaustive()
    }
}

impl Kernels {
    /// Kernels for a model whose head has `vocab_size` rows, and whose logits have this soft-cap. `reads_source` tells
    /// by the name of a decoder's weight whether it is multiplied with the hidden states of the source rather than with
    /// states of the target.
    pub fn new(
        vocab_size: usize,
        softcap: Option<f64>,
        reads_source: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Kernels {
        Kernels {
            request: Arc::default(),
            stats: Arc::default(),
            softcap: Softcap::new(vocab_size, softcap),
            source_mask: Arc::default(),
            reads_source: ReadsSource(Arc::new(reads_source)),
            #[cfg(target_arch = "x86_64")]
            head: Avx2Token::new()
                .map(|token| Arc::new(TopKHead::new(token, vocab_size, softcap.map_or(1.0, |cap| cap as f32)))),
        }
    }

    /// Kernels for another session of the model.
    pub fn for_another_session(&self) -> Kernels {
        Kernels {
            request: Arc::default(),
            stats: Arc::default(),
            softcap: self.softcap,
            source_mask: Arc::default(),
            reads_source: self.reads_source.clone(),
            #[cfg(target_arch = "x86_64")]
            head: self.head.clone(),
        }
    }

    /// Requests logits from the next run; the caller must have exclusive use of the session. With a request for sparse
    /// rows, the run may return any number of logits per row, whose token ids are in the statistics.
    pub fn request_logits(&self, request: LogitsRequest) {
        let request = match request {
            // The log-sum-exp is that of logits, and sparse rows are made of the head's results: a soft-cap alone may
            // lie between them.
            LogitsRequest::TopK { log_sum_exp: true, .. } if !self.softcap.is_supported() => request.dense(),
            request => request,
        };
        self.request.set(request);
        self.stats.take();
    }

    /// Sets the attention mask of the sources, with zeros for padding, before a run that reads their hidden states; the
    /// caller must have exclusive use of the session. Nothing is computed for padding; without a mask, no token is
    /// padding.
    pub fn set_source_mask(&self, mask: &[i64]) {
        self.source_mask.set(mask);
    }

    /// Takes the statistics of the last run's logits, for the rows of all positions; `None` if no kernel here has
    /// computed them.
    pub fn take_logits_stats(&self) -> Option<LogitsStats> {
        self.stats.take()
    }

    #[cfg(target_arch = "x86_64")]
    fn head(&self) -> Option<matmul::HeadMatMul> {
        let head = self.head.clone()?;
        let (request, stats) = (self.request.clone(), self.stats.clone());
        Some(matmul::HeadMatMul::new(head, request, stats, self.softcap))
    }

    /// The operators to register with the session.
    pub fn operators(&self, kind: GraphKind) -> ort::Result<Vec<OperatorDomain>> {
        let is_quantized = Arc::new(AtomicBool::new(false));
        let shared_attention = attention::SharedAttention::default();
        let shared_matmul = shared::Shared::default();
        #[cfg(target_arch = "x86_64")]
        let shared_float_matmul = shared::Shared::default();
        let mut domains = Vec::new();
        for &(domain, names) in registered() {
            let mut operators = OperatorDomain::new(domain)?;
            for &name in names {
                operators = match name {
                    "Attention" => operators.add(attention::Attention {
                        kind,
                        is_quantized: is_quantized.clone(),
                        shared: shared_attention.clone(),
                    })?,
                    "Gelu" => operators.add(elementwise::Gelu)?,
                    "Tanh" if kind == GraphKind::Decoder => {
                        operators.add(elementwise::Tanh { softcap: self.softcap, stats: self.stats.clone() })?
                    }
                    "MatMulNBits" => operators.add(matmul::MatMulNBits {
                        kind,
                        is_quantized: is_quantized.clone(),
                        shared: shared_matmul.clone(),
                        source_mask: self.source_mask.clone(),
                        reads_source: self.reads_source.clone(),
                        #[cfg(target_arch = "x86_64")]
                        head: self.head(),
                    })?,
                    attention::WINDOW => operators.add(attention::WindowAttention {
                        is_quantized: is_quantized.clone(),
                        shared: shared_attention.clone(),
                    })?,
                    merged_attention::MERGED => operators.add(merged_attention::MergedAttention)?,
                    "GroupQueryAttention" => operators.add(attention::GroupQueryAttention)?,
                    #[cfg(target_arch = "x86_64")]
                    "TransposeMatMul" => operators.add(matmul::TransposeMatMul {
                        shared: shared_float_matmul.clone(),
                        source_mask: self.source_mask.clone(),
                        reads_source: self.reads_source.clone(),
                        head: self.head(),
                    })?,
                    _ => operators,
                };
            }
            domains.push(operators);
        }
        Ok(domains)
    }
}

/// Tells by the name of a weight whether it is multiplied with hidden states of sources.
#[derive(Clone)]
struct ReadsSource(Arc<dyn Fn(&str) -> bool + Send + Sync>);

impl ReadsSource {
    /// Whether one of the node's inputs is such a weight.
    fn is_true_of(&self, node: &KernelContext) -> ort::Result<bool> {
        Ok(input_names(node)?.iter().any(|name| (self.0)(name)))
    }
}

/// The names of a node's inputs; those of optional inputs that it does not have are empty. [`KernelContext::inputs`] also
/// reads their types, which such inputs do not have.
fn input_names(node: &KernelContext) -> ort::Result<Vec<String>> {
    let (info, api) = (node.ptr(), ort::api());
    let mut count = 0;
    // SAFETY: ONNX Runtime keeps the node for as long as the kernel is created, and writes one number.
    unsafe { ort::Error::result_from_status((api.KernelInfo_GetInputCount)(info, &mut count)) }?;
    let name = |at: usize| {
        let mut size = 0;
        // SAFETY: as above; without a buffer, only the size of the name is written.
        let status = unsafe { (api.KernelInfo_GetInputName)(info, at, std::ptr::null_mut(), &mut size) };
        // SAFETY: the status was just returned, and is passed on once.
        unsafe { ort::Error::result_from_status(status) }?;
        let mut name = vec![0_u8; size];
        // SAFETY: the buffer has the size that was just returned, the final zero included.
        let status = unsafe { (api.KernelInfo_GetInputName)(info, at, name.as_mut_ptr().cast(), &mut size) };
        // SAFETY: as above.
        unsafe { ort::Error::result_from_status(status) }?;
        name.truncate(size.saturating_sub(1));
        String::from_utf8(name).map_err(ort::Error::wrap)
    };
    (0..count).map(name).collect()
}

/// ONNX Runtime's own domain of operators.
const MICROSOFT: &str = "com.microsoft";

/// The domain of operators that graphs have as functions.
const T5GEMMA: &str = "ai.t5gemma";

/// Names of operators by domain.
type Names = &'static [(&'static str, &'static [&'static str])];

/// The operators that are registered on this machine: those that are faster than ONNX Runtime's.
///
/// Measured with size s-s: against vector kernels, portable quantized multiplications take 5 to 15 times as long, and
/// the other operators up to twice. Against portable ones (emulated, without AVX), quantized multiplications take 0.3
/// to 0.8 times as long and attention 0.6, while `Gelu` takes longer; there is no portable multiplication in float32.
fn registered() -> Names {
    if level() > Level::Generic {
        VECTOR_OPERATORS
    } else if onnxruntime_has_vector_kernels() {
        &[(T5GEMMA, &[merged_attention::MERGED, attention::WINDOW])]
    } else {
        PORTABLE_OPERATORS
    }
}

/// The operators with vector kernels.
const VECTOR_OPERATORS: Names = &[
    ("", &["Attention", "Gelu", "Tanh"]),
    (MICROSOFT, &["MatMulNBits", "GroupQueryAttention", "TransposeMatMul"]),
    (T5GEMMA, &[merged_attention::MERGED, attention::WINDOW]),
];
/// The operators whose portable kernels are faster than ONNX Runtime's portable ones.
const PORTABLE_OPERATORS: Names =
    &[("", &["Attention"]), (MICROSOFT, &["MatMulNBits"]), (T5GEMMA, &[merged_attention::MERGED, attention::WINDOW])];

fn is_registered(name: &str) -> bool {
    registered().iter().any(|(_, names)| names.contains(&name))
}

/// Whether attention computes nothing for pairs of tokens from different sources, so that sources may share a row.
pub fn attention_skips_other_sources() -> bool {
    is_registered("Attention")
}

/// Whether quantized multiplications read the weights in place from the file. ONNX Runtime's are fast only with a copy
/// in another layout.
pub fn reads_packed_weights_in_place() -> bool {
    is_registered("MatMulNBits")
}

impl From<Error> for ort::Error {
    fn from(error: Error) -> ort::Error {
        ort::Error::new(error.to_string())
    }
}

/// Runs tasks on the session's threads, each of which takes the next task when it has done one: a task that is assigned
/// beforehand waits for the thread that the system holds up.
fn parallel_for(context: &ComputeContext, count: usize, task: &(dyn Fn(usize) + Send + Sync)) -> Result<(), Error> {
    match count {
        0 => Ok(()),
        1 => {
            task(0);
            Ok(())
        }
        // As many batches as tasks: ONNX Runtime's threads take batches as they come.
        _ => context
            .par_for(count, count, task)
            .map_err(|error: ort::Error| Error::ThreadPool { message: error.to_string() }),
    }
}

/// A non-negative integer attribute of a node.
fn usize_attribute(node: &KernelContext, operator: &str, name: &str) -> ort::Result<Option<usize>> {
    match node.get::<i64>(name) {
        None => Ok(None),
        Some(value) => usize::try_from(value).map(Some).map_err(|_| {
            ort::Error::new(format!("{operator}: {name}: expected a non-negative integer, found {value}"))
        }),
    }
}

/// A non-negative integer attribute that a node must have.
fn required_usize_attribute(node: &KernelContext, operator: &str, name: &str) -> ort::Result<usize> {
    let value = usize_attribute(node, operator, name)?;
    value.ok_or_else(|| ort::Error::new(format!("{operator}: attribute {name} is missing")))
}

/// The error for an input or output that is not there.
fn missing(operator: &str, port: &str) -> ort::Error {
    ort::Error::new(format!("{operator}: {port} is missing"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa::supported;
    use crate::isa::testing::at_each_level;

    #[test]
    fn no_operator_is_registered_that_is_slower_than_the_one_it_replaces() {
        at_each_level(Level::Generic, |level| {
            let names: Vec<&str> = registered().iter().flat_map(|(_, names)| names.iter().copied()).collect();
            let expected: &[&str] = match level {
                Level::Generic if onnxruntime_has_vector_kernels() => &["MergedAttention", "WindowAttention"],
                Level::Generic => &["Attention", "MatMulNBits", "MergedAttention", "WindowAttention"],
                _ => &[
                    "Attention",
                    "Gelu",
                    "Tanh",
                    "MatMulNBits",
                    "GroupQueryAttention",
                    "TransposeMatMul",
                    "MergedAttention",
                    "WindowAttention",
                ],
            };
            assert_eq!(names, expected, "{level:?}");
        });
        // ONNX Runtime uses a processor's AVX2 whatever level the kernels here are held to.
        assert!(supported() < Level::Avx2 || onnxruntime_has_vector_kernels());
    }
}
