//! Where the logits of a step go: always into the same memory where they are of all tokens, and into as much as there are where the
//! session's kernels may list some of them.

use ort::memory::Allocator;
use ort::session::{IoBinding, Session};
use ort::value::Tensor;
use t5gemma_kernels::LogitsRequest;

use crate::device::Device;

/// The output of a session that returns logits.
pub(super) struct LogitsPort {
    name: String,
    /// `[rows, positions, tokens]`
    shape: [usize; 3],
    /// Whether memory for all of them is bound to it.
    has_memory: bool,
}

impl LogitsPort {
    /// That of this name, for so many rows of so many new tokens.
    pub fn new(session: &Session, name: String, rows: usize, tokens: usize) -> LogitsPort {
        let port = session.outputs().iter().find(|port| port.name() == name);
        let declared =
            port.and_then(|port| port.dtype().tensor_shape()).map(|shape| shape.to_vec()).unwrap_or_default();
        let positions = if declared.get(1) == Some(&1) { 1 } else { tokens };
        let of_position = declared.last().map_or(0, |&size| size as usize);
        LogitsPort { name, shape: [rows, positions, of_position], has_memory: false }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Binds it for the next run.
    pub fn bind(&mut self, binding: &mut IoBinding, wanted: LogitsRequest) -> ort::Result<()> {
        if matches!(wanted, LogitsRequest::TopK { sparse: true, .. }) {
            // Anew for each run: what the one before returned would be taken for the memory to use.
            self.has_memory = false;
            return binding.bind_output_to_device(self.name.as_str(), &Device::Cpu.memory()?);
        }
        if !self.has_memory {
            binding.bind_output(self.name.as_str(), &mut Tensor::<f32>::new(&Allocator::default(), self.shape)?)?;
            self.has_memory = true;
        }
        Ok(())
    }
}
