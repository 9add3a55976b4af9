//! `Gelu`, and `Tanh`, the main step of a soft-cap, which also computes the statistics of logits.

use std::sync::Arc;

use ort::operator::{ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput};
use ort::value::TensorElementType;

use super::{missing, parallel_for};
use crate::gelu::gelu;
use crate::stats::{Softcap, StatsCell};

/// GELU with tanh, see [`gelu`].
pub struct Gelu;

impl Operator for Gelu {
    type Kernel<'attr> = GeluKernel;

    fn name(&self) -> &str {
        "Gelu"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, node: &KernelContext<'attr>) -> ort::Result<GeluKernel> {
        match node.get::<String>("approximate").as_deref() {
            Some("tanh") => Ok(GeluKernel),
            other => {
                let found = other.unwrap_or("none");
                Err(ort::Error::new(format!("Gelu: approximate: expected tanh, found {found}")))
            }
        }
    }
}

/// The kernel of a node.
pub struct GeluKernel;

impl Kernel for GeluKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let x = context.input(0)?.ok_or_else(|| missing("Gelu", "X"))?;
        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let mut output = context.output(0, shape.to_vec())?.ok_or_else(|| missing("Gelu", "Y"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;
        gelu(x, y, &|count, task| parallel_for(context, count, task))?;
        Ok(())
    }
}

/// `tanh(x)`, with statistics of the logits that it will become.
pub struct Tanh {
    pub softcap: Softcap,
    pub stats: Arc<StatsCell>,
}

impl Operator for Tanh {
    type Kernel<'attr> = TanhKernel;

    fn name(&self) -> &str {
        "Tanh"
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel<'attr>(&self, _: &KernelContext<'attr>) -> ort::Result<TanhKernel> {
        Ok(TanhKernel { softcap: self.softcap, stats: self.stats.clone() })
    }
}

/// The kernel of a node.
pub struct TanhKernel {
    softcap: Softcap,
    stats: Arc<StatsCell>,
}

impl Kernel for TanhKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let x = context.input(0)?.ok_or_else(|| missing("Tanh", "input"))?;
        let (shape, x) = x.try_extract_tensor::<f32>()?;
        let last_axis = shape.last().map_or(1, |&last| last as usize);
        let mut output = context.output(0, shape.to_vec())?.ok_or_else(|| missing("Tanh", "output"))?;
        let (_, y) = output.try_extract_tensor_mut::<f32>()?;
        if let Some(stats) = self.softcap.tanh(x, y, last_axis, &|count, task| parallel_for(context, count, task))? {
            self.stats.set(stats);
        }
        Ok(())
    }
}
