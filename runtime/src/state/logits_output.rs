//! Where the logits of a step are written: always into the same memory if they are dense, and into memory of the size
//! they turn out to have if the session's kernels may return the greatest alone.

use ort::memory::Allocator;
use ort::session::{IoBinding, Session};
use ort::value::Tensor;
use t5gemma_kernels::LogitsRequest;

use crate::device::Device;

/// The output of a session that returns logits.
pub(super) struct LogitsOutput {
    name: String,
    /// `[rows, positions, tokens]`
    shape: [usize; 3],
    /// Whether memory for dense logits is bound to it.
    is_dense: bool,
}

impl LogitsOutput {
    /// The output `name`, for steps of `tokens` tokens for each of `rows` rows.
    pub fn new(session: &Session, name: String, rows: usize, tokens: usize) -> LogitsOutput {
        let port = session.outputs().iter().find(|port| port.name() == name);
        let declared =
            port.and_then(|port| port.dtype().tensor_shape()).map(|shape| shape.to_vec()).unwrap_or_default();
        let positions = if declared.get(1) == Some(&1) { 1 } else { tokens };
        let row_length = declared.last().map_or(0, |&size| size as usize);
        LogitsOutput { name, shape: [rows, positions, row_length], is_dense: false }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Binds the output for the next run.
    pub fn bind(&mut self, binding: &mut IoBinding, request: LogitsRequest) -> ort::Result<()> {
        if matches!(request, LogitsRequest::TopK { sparse: true, .. }) {
            // Bound anew for each run: otherwise the value that the previous run returned would be the memory to write
            // into.
            self.is_dense = false;
            return binding.bind_output_to_device(self.name.as_str(), &Device::Cpu.memory()?);
        }
        if !self.is_dense {
            binding.bind_output(self.name.as_str(), &mut Tensor::<f32>::new(&Allocator::default(), self.shape)?)?;
            self.is_dense = true;
        }
        Ok(())
    }
}
