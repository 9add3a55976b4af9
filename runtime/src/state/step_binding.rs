//! Shared by the caches in host memory: binding the cached decoder step once, with the self-attention tensors as both
//! past and present, and copying the tails of rows that continue other rows.

use ort::memory::Allocator;
use ort::session::{IoBinding, NoSelectedOutputs, RunOptions, Session};
use ort::value::{Tensor, TensorValueTypeMarker, Value};
use t5gemma_kernels::LogitsRequest;

use super::logits_output::LogitsOutput;
use super::{DecoderOutputs, cross_attentions_output};
use crate::adapter::RowAdapters;

/// The cached decoder step, bound to memory that stays the same from run to run.
pub(super) struct StepBinding {
    binding: IoBinding,
    /// `[rows, tokens]`
    ids: Tensor<i64>,
    /// `[rows, tokens]`
    positions: Tensor<i64>,
    logits: LogitsOutput,
    /// The name of the output with cross-attention probabilities, if the graph has one.
    cross_attentions: Option<String>,
}

impl StepBinding {
    /// Binds steps of `tokens` tokens for each row of `targets`. `sources` and `targets` hold keys and values in turn,
    /// layer by layer; the graph reads `targets` and writes the new tokens into them. `adapters` are those of the rows, for
    /// a graph that takes adapters.
    pub fn new<M: TensorValueTypeMarker, S: TensorValueTypeMarker>(
        session: &Session,
        mask: &Value<M>,
        sources: &[Value<S>],
        targets: &mut [Tensor<f32>],
        adapters: Option<&RowAdapters>,
        tokens: usize,
    ) -> ort::Result<StepBinding> {
        let allocator = Allocator::default();
        let rows = targets.first().map_or(0, |target| target.shape()[0] as usize);
        let mut binding = session.create_binding()?;
        let mut inputs = session.inputs().iter().map(|port| port.name().to_string());
        let mut outputs = session.outputs().iter().map(|port| port.name().to_string());
        let next = |side: &str, names: &mut dyn Iterator<Item = String>| {
            names.next().ok_or_else(|| ort::Error::new(format!("too few {side}s")))
        };
        let ids = Tensor::<i64>::new(&allocator, [rows, tokens])?;
        let positions = Tensor::<i64>::new(&allocator, [rows, tokens])?;
        binding.bind_input(next("input", &mut inputs)?, mask)?;
        binding.bind_input(next("input", &mut inputs)?, &ids)?;
        binding.bind_input(next("input", &mut inputs)?, &positions)?;
        let logits = LogitsOutput::new(session, next("output", &mut outputs)?, rows, tokens);
        let cross_attentions = cross_attentions_output(session);
        if let Some(name) = &cross_attentions {
            let source = mask.shape()[1] as usize;
            binding.bind_output(name, &mut Tensor::<f32>::new(&allocator, [rows, tokens, source])?)?;
        }
        for (targets, sources) in targets.chunks_exact_mut(2).zip(sources.chunks_exact(2)) {
            for target in targets {
                binding.bind_input(next("input", &mut inputs)?, target)?;
                binding.bind_output(next("output", &mut outputs)?, target)?;
            }
            for source in sources {
                binding.bind_input(next("input", &mut inputs)?, source)?;
            }
        }
        for value in adapters.into_iter().flat_map(RowAdapters::of_step) {
            binding.bind_input(next("input", &mut inputs)?, value)?;
        }
        Ok(StepBinding { binding, ids, positions, logits, cross_attentions })
    }

    /// The number of tokens of a step, for each row.
    pub fn tokens(&self) -> usize {
        self.ids.shape()[1] as usize
    }

    /// Runs the step for `tokens` at `positions`, row after row.
    pub fn run(
        &mut self,
        session: &mut Session,
        tokens: &[i64],
        positions: impl Iterator<Item = i64>,
        request: LogitsRequest,
        options: &RunOptions<NoSelectedOutputs>,
    ) -> ort::Result<DecoderOutputs> {
        self.ids.extract_tensor_mut().1.copy_from_slice(tokens);
        let bound = self.positions.extract_tensor_mut().1.iter_mut();
        bound.zip(positions).for_each(|(bound, position)| *bound = position);
        self.logits.bind(&mut self.binding, request)?;
        let mut outputs = session.run_binding_with_options(&self.binding, options)?;
        let logits = outputs.remove(self.logits.name()).ok_or_else(|| ort::Error::new("no logits"))?;
        let cross_attentions = self.cross_attentions.as_ref().and_then(|name| outputs.remove(name.as_str()));
        Ok(DecoderOutputs { logits, cross_attentions })
    }
}

/// The part of a row that differs from the row it continues: the tokens from `common` up to `length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TailCopy {
    pub row: usize,
    pub parent: usize,
    /// Leading tokens that the two rows have in common.
    pub common: usize,
    /// Tokens of the parent.
    pub length: usize,
}

/// Copies tails within each of `targets`, `[rows, kv_heads, capacity, head_dim]`. `scratch` is kept for its allocation.
pub(super) fn copy_tails(targets: &mut [Tensor<f32>], copies: &[TailCopy], scratch: &mut Vec<f32>) {
    if copies.is_empty() {
        return;
    }
    for target in targets {
        let (shape, data) = target.extract_tensor_mut();
        let [heads, capacity, dim] = [1, 2, 3].map(|axis| shape[axis] as usize);
        let tail = |copy: &TailCopy, row: usize, head: usize| {
            let first = (row * heads + head) * capacity;
            (first + copy.common) * dim..(first + copy.length) * dim
        };
        // Everything is read before anything is written: rows may change places.
        scratch.clear();
        for copy in copies {
            (0..heads).for_each(|head| scratch.extend_from_slice(&data[tail(copy, copy.parent, head)]));
        }
        let mut read = scratch.as_slice();
        for copy in copies {
            for head in 0..heads {
                let (part, rest) = read.split_at((copy.length - copy.common) * dim);
                data[tail(copy, copy.row, head)].copy_from_slice(part);
                read = rest;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two heads of one number a token: the number says row, head and token.
    fn target(rows: usize, capacity: usize) -> Tensor<f32> {
        let number = |at: usize| {
            let (row, head, token) = (at / (2 * capacity), at / capacity % 2, at % capacity);
            (100 * row + 10 * head + token) as f32
        };
        let data: Vec<f32> = (0..rows * 2 * capacity).map(number).collect();
        Tensor::from_array(([rows, 2, capacity, 1], data)).expect("a tensor")
    }

    #[test]
    fn rows_take_the_tails_of_their_parents() {
        // row, parent, common, length
        type Copy = (usize, usize, usize, usize);
        // name, copies, for each row and token the row that it comes from
        type Case = (&'static str, &'static [Copy], [[usize; 4]; 3]);
        let cases: [Case; 4] = [
            ("nothing", &[], [[0; 4], [1; 4], [2; 4]]),
            ("one row", &[(1, 0, 0, 3)], [[0; 4], [0, 0, 0, 1], [2; 4]]),
            ("a common beginning", &[(2, 0, 2, 3)], [[0; 4], [1; 4], [2, 2, 0, 2]]),
            (
                "rows that change places",
                &[(0, 1, 1, 3), (1, 0, 1, 3), (2, 1, 0, 4)],
                [[0, 1, 1, 0], [1, 0, 0, 1], [1; 4]],
            ),
        ];
        for (name, copies, expected) in cases {
            let copies = copies.iter().map(|&(row, parent, common, length)| TailCopy { row, parent, common, length });
            let mut targets = [target(3, 4)];
            copy_tails(&mut targets, &copies.collect::<Vec<_>>(), &mut vec![5.0]);
            let (_, found) = targets[0].extract_tensor();
            for (row, from) in expected.iter().enumerate() {
                for (head, token) in (0..2).flat_map(|head| (0..4).map(move |token| (head, token))) {
                    let expected = (100 * from[token] + 10 * head + token) as f32;
                    assert_eq!(found[(row * 2 + head) * 4 + token], expected, "{name}: row {row}, token {token}");
                }
            }
        }
    }
}
