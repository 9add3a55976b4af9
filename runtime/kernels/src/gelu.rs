//! `Gelu`, with tanh: half of what ONNX Runtime's own takes, which shows in encoders. The other small operators of a layer wait
//! for memory, in any kernel.

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use super::functions::gelus;
use super::processor::at_level;
use super::{Parts, spread};

/// Numbers that one thread takes at a time.
const SHARE: usize = 16 << 10;

at_level! {
    fn gelus_of(x: &[f32], y: &mut [f32]) = gelus
}

/// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³)))` of float32.
pub(super) struct Gelu;

impl Operator for Gelu {
    type Kernel<'attr> = OfAll;

    fn name(&self) -> &str {
        "Gelu"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<OfAll> {
        match node.get::<String>("approximate").as_deref() {
            Some("tanh") => Ok(OfAll),
            other => {
                let found = other.unwrap_or("none");
                Err(ort::Error::new(format!("Gelu: approximate: expected tanh, found {found}")))
            }
        }
    }
}

/// The kernel of one node.
pub(super) struct OfAll;

impl Kernel for OfAll {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let missing = || ort::Error::new("Gelu: an input or output is missing");
        let x = context.input(0)?.ok_or_else(missing)?;
        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let mut output = context.output(0, shape.to_vec())?.ok_or_else(missing)?;
        let y = Parts::new(output.try_extract_tensor_mut::<f32>()?.1);
        spread(context, x.len().div_ceil(SHARE), &|part| {
            let place = part * SHARE..x.len().min((part + 1) * SHARE);
            // SAFETY: every part is taken by one call only.
            gelus_of(&x[place.clone()], unsafe { y.of(place) });
        })
    }
}
