//! `Tanh`, which is all but the last of what makes logits: with it comes what the choice among them needs, each row's sum of
//! exponentials and the greatest of each part, while the numbers are at hand and by all threads.

use std::sync::{Arc, Mutex, PoisonError};

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use super::functions::{Tanhs, tanhs};
use super::processor::at_level;
use super::{Parts, Spread, spread};
use crate::log_softmax::LogSumExp;
use crate::logits::LogitsStats;

/// Beyond this the exponential of the least logit, taken relative to the cap, would be no number of float32's full precision.
const GREATEST_CAP: f32 = 40.0;
/// Blocks of a row that one thread takes at a time.
const BLOCKS: usize = 16;

/// What a session's `Tanh` has found of the logits of its last run.
#[derive(Debug, Default)]
pub struct Told {
    /// Logits in a row, and what they are the hyperbolic tangents times.
    logits: Option<(usize, f32)>,
    found: Mutex<Option<LogitsStats>>,
}

impl Told {
    /// Nothing yet, of a session that gives so many logits a row, with this soft-cap.
    pub fn new(tokens: usize, cap: Option<f64>) -> Told {
        let cap = cap.map(|cap| cap as f32).filter(|cap| (f32::MIN_POSITIVE..=GREATEST_CAP).contains(cap));
        Told { logits: cap.map(|cap| (tokens, cap)), found: Mutex::default() }
    }

    /// For another session.
    pub fn beside(&self) -> Told {
        Told { logits: self.logits, found: Mutex::default() }
    }

    /// Whether it can tell sums of exponentials.
    pub fn sums(&self) -> bool {
        self.logits.is_some()
    }

    /// What log-softmax subtracts from logits that rows of `width` such numbers will be made into: the greatest, and the logarithm of
    /// the sum of the exponentials relative to it.
    #[cfg(target_arch = "x86_64")]
    pub fn norms(&self, x: &[f32], width: usize, spread: Spread) -> ort::Result<Vec<LogSumExp>> {
        Ok(tanhs_of_rows(x, None, width, self.cap(), spread)?.0)
    }

    /// What these numbers of a row are to its norm.
    #[cfg(target_arch = "x86_64")]
    pub fn part(&self, x: &[f32]) -> Share {
        Share::of(x, None, self.cap())
    }

    /// The norm of a row of these parts.
    #[cfg(target_arch = "x86_64")]
    pub fn norm(&self, parts: &[Share]) -> LogSumExp {
        norm(parts, self.cap())
    }

    #[cfg(target_arch = "x86_64")]
    fn cap(&self) -> f32 {
        self.logits.map_or(1.0, |(_, cap)| cap)
    }

    /// Has it tell this.
    pub fn tell(&self, found: LogitsStats) {
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(found);
    }

    /// What was found, which is forgotten thereby.
    pub fn take(&self) -> Option<LogitsStats> {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// What a part of a row's logits is to its norm.
#[derive(Clone, Copy, Default)]
pub(super) struct Share {
    greatest: f32,
    /// Of the exponentials, relative to the cap, which no logit exceeds.
    sum: f64,
}

impl Share {
    /// Of `cap` times the hyperbolic tangents of `x`, which are written `to` a place if there is one.
    fn of(x: &[f32], to: Option<&mut [f32]>, cap: f32) -> Share {
        let Tanhs { greatest, sum } = of_block(x, to, cap);
        Share { greatest: greatest * cap, sum: sum.into() }
    }
}

/// The greatest logit of a row, and the logarithm of the sum of all exponentials relative to it.
fn norm(parts: &[Share], cap: f32) -> LogSumExp {
    let max = parts.iter().map(|part| part.greatest).fold(f32::NEG_INFINITY, f32::max);
    let sum = parts.iter().map(|part| part.sum).sum::<f64>();
    LogSumExp { max, log_sum: (sum.ln() + f64::from(cap) - f64::from(max)) as f32 }
}

/// `tanh(x)` of float32.
pub(super) struct Tanh {
    pub told: Arc<Told>,
}

impl Operator for Tanh {
    type Kernel<'attr> = OfAll;

    fn name(&self) -> &str {
        "Tanh"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<OfAll> {
        Ok(OfAll { told: self.told.clone() })
    }
}

/// The kernel of one node.
pub(super) struct OfAll {
    told: Arc<Told>,
}

impl Kernel for OfAll {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let missing = |what: &str| ort::Error::new(format!("Tanh: {what} is missing"));
        let x = context.input(0)?.ok_or_else(|| missing("the input"))?;
        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let last = shape.last().map_or(1, |&last| last as usize);
        let mut output = context.output(0, shape.to_vec())?.ok_or_else(|| missing("the output"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;
        if x.is_empty() {
            return Ok(());
        }
        let logits = self.told.logits.filter(|&(tokens, _)| tokens == last);
        let (width, cap) = logits.unwrap_or((x.len(), 1.0));
        let (norms, maxima) = tanhs_of_rows(x, Some(y), width, cap, &|parts, work| spread(context, parts, work))?;
        if logits.is_some() {
            self.told.tell(LogitsStats::new(norms, maxima));
        }
        Ok(())
    }
}

/// The hyperbolic tangents `y` of rows `x [rows, width]`, if these are wanted, and what there is to say of `cap` times them: see
/// [`LogitsStats::new`].
fn tanhs_of_rows(
    x: &[f32],
    y: Option<&mut [f32]>,
    width: usize,
    cap: f32,
    spread: Spread,
) -> ort::Result<(Vec<LogSumExp>, Vec<f32>)> {
    let (rows, blocks) = (x.len() / width, width.div_ceil(LogitsStats::BLOCK));
    let parts = blocks.div_ceil(BLOCKS);
    let mut shares = vec![Share::default(); rows * blocks];
    let of_shares = Parts::new(&mut shares);
    let of_y = y.map(Parts::new);
    spread(rows * parts, &|part| {
        let (row, first) = (part / parts, part % parts * BLOCKS);
        for block in first..blocks.min(first + BLOCKS) {
            let (start, at) = (row * width, row * blocks + block);
            let range = start + block * LogitsStats::BLOCK..start + width.min((block + 1) * LogitsStats::BLOCK);
            // SAFETY: every block is written by one call only.
            unsafe {
                let to = of_y.as_ref().map(|y| y.of(range.clone()));
                of_shares.of(at..at + 1)[0] = Share::of(&x[range], to, cap);
            }
        }
    })?;
    let norms = shares.chunks_exact(blocks).map(|shares| norm(shares, cap)).collect();
    Ok((norms, shares.iter().map(|share| share.greatest).collect()))
}

at_level! {
    fn of_block(x: &[f32], to: Option<&mut [f32]>, cap: f32) -> Tanhs = tanhs
}

#[cfg(test)]
mod tests {
    use super::super::alone;
    use super::*;

    #[test]
    fn rows_are_summed_up_as_by_definition() {
        let (rows, cap) = (3, 30.0_f32);
        for width in [1, 37, 1024, 20_000] {
            let x: Vec<f32> = (0..rows * width).map(|at| ((at * 7919) % 2003) as f32 / 700.0 - 1.5).collect();
            let mut y = vec![f32::NAN; x.len()];
            let found = |y| match tanhs_of_rows(&x, y, width, cap, &alone) {
                Ok((norms, maxima)) => LogitsStats::new(norms, maxima),
                Err(error) => panic!("{width}: {error}"),
            };
            let (alone, found) = (found(None), found(Some(&mut y)));
            assert_eq!(alone, found, "{width}");
            for (x, &y) in x.iter().zip(&y) {
                assert!((f64::from(*x).tanh() - f64::from(y)).abs() < 3e-7, "{x}: {y}");
            }
            let logits: Vec<f32> = y.iter().map(|y| y * cap).collect();
            assert_eq!(found, LogitsStats::of(&logits, width).near(&found), "{width}");
        }
    }

    #[test]
    fn what_is_no_number_reaches_the_sum() {
        let mut x = vec![0.5; 3000];
        x[2500] = f32::NAN;
        let mut y = x.clone();
        let Ok((norms, maxima)) = tanhs_of_rows(&x, Some(&mut y), 1500, 30.0, &alone) else { panic!("not computed") };
        let found = LogitsStats::new(norms, maxima);
        assert!(found.view().rows(0, 1).all_finite() && !found.view().rows(1, 1).all_finite());
        assert!(y[2500].is_nan() && y[2499] == y[0]);
    }
}
