//! Operators that choose and sum: what pooling and classification need besides the equations of the layers.

use std::ops::Not;

use super::super::graph::{Attribute, Data, Value};
use super::super::{DType, Dim};

impl<'g> Value<'g> {
    /// Where two tensors of whole numbers are equal.
    #[track_caller]
    pub fn equals(self, other: Value<'g>) -> Value<'g> {
        self.binary("Equal", other, DType::Bool)
    }

    /// The numbers where `kept` is true, 0 elsewhere.
    #[track_caller]
    pub fn where_true(self, kept: Value<'g>) -> Value<'g> {
        let shape = self.broadcast("Where", kept);
        self.one("Where", &[kept, self, self.graph.number(self.dtype(), 0.0)], self.dtype(), shape)
    }

    /// The lesser of two numbers.
    #[track_caller]
    pub fn min(self, other: Value<'g>) -> Value<'g> {
        self.binary("Min", other, self.dtype())
    }

    /// The greater of these numbers and one more.
    #[track_caller]
    pub fn at_least(self, least: f64) -> Value<'g> {
        self.binary("Max", self.graph.number(self.dtype(), least), self.dtype())
    }

    /// The sum along an axis, which stays with length 1.
    #[track_caller]
    pub fn sum(self, axis: isize) -> Value<'g> {
        self.reduced("ReduceSum", axis)
    }

    /// The greatest number along an axis, which stays with length 1.
    #[track_caller]
    pub fn greatest(self, axis: isize) -> Value<'g> {
        self.reduced("ReduceMax", axis)
    }

    /// The mean along axes, which stay with length 1.
    #[track_caller]
    pub fn mean_along(self, axes: &[isize]) -> Value<'g> {
        let mut shape = self.shape();
        axes.iter().for_each(|&axis| shape[self.axis(axis)] = Dim::fixed(1));
        self.one("ReduceMean", &[self, self.graph.axes(axes)], self.dtype(), shape)
    }

    /// The first place along the last axis where truth values are true, 0 if none is: int64, without that axis.
    #[track_caller]
    pub fn first_true(self) -> Value<'g> {
        if self.dtype() != DType::Bool {
            self.graph.mistake(format!("the first that is true of {}", self.dtype()));
        }
        let shape = self.shape();
        let attributes = [("axis", Attribute::Int(-1)), ("keepdims", Attribute::Int(0))];
        let output = (DType::Int64, shape[..shape.len() - 1].to_vec());
        self.graph.node("ArgMax", &[self.cast(DType::UInt8)], &attributes, &[output])[0]
    }

    #[track_caller]
    fn reduced(self, op: &'static str, axis: isize) -> Value<'g> {
        let (mut shape, at) = (self.shape(), self.axis(axis));
        shape[at] = Dim::fixed(1);
        self.one(op, &[self, self.graph.axes(&[at as isize])], self.dtype(), shape)
    }

    /// Of each row of `[rows, length, width]` the entry that `at` (int64 `[rows, 1]`) names: `[rows, width]`.
    #[track_caller]
    pub fn entry(self, at: Value<'g>) -> Value<'g> {
        let (shape, places) = (self.shape(), at.shape());
        if shape.len() != 3 || places != [shape[0].clone(), Dim::fixed(1)] || at.dtype() != DType::Int64 {
            let (of, by) = (Dim::list(&shape), Dim::list(&places));
            self.graph.mistake(format!("GatherND from {of} by {} {by}", at.dtype()));
        }
        let output = (self.dtype(), vec![shape[0].clone(), shape[2].clone()]);
        self.graph.node("GatherND", &[self, at], &[("batch_dims", Attribute::Int(1))], &[output])[0]
    }

    /// Rows of whole numbers moved to the right by one: each begins with `first` and loses its last entry.
    #[track_caller]
    pub fn shifted_right(self, first: i64) -> Value<'g> {
        let shape = self.shape();
        let [rows, length] = shape.as_slice() else { self.graph.mistake(format!("shift of {}", Dim::list(&shape))) };
        let number = |number: i64| self.graph.constant(DType::Int64, &[1], Data::Ints(vec![number]));
        let slice = |end: i64, kept: Dim| {
            let inputs = [self, number(0), number(end), number(1)];
            self.one("Slice", &inputs, DType::Int64, vec![rows.clone(), kept])
        };
        // A column of zeros, which has as many rows whatever the run's batch is.
        let column = slice(1, Dim::fixed(1)) * 0.0 + first as f64;
        let rest = slice(-1, Dim::symbol(&format!("{length} - 1")));
        self.graph.node("Concat", &[column, rest], &[("axis", Attribute::Int(1))], &[(DType::Int64, shape)])[0]
    }
}

impl<'g> Not for Value<'g> {
    type Output = Value<'g>;

    fn not(self) -> Value<'g> {
        self.unary("Not")
    }
}

#[cfg(test)]
mod tests {
    use crate::onnx::{DType, Dim, Graph};

    #[test]
    fn shapes_follow_from_what_is_chosen() {
        let graph = Graph::new();
        let (rows, length, width) = (Dim::symbol("rows"), Dim::symbol("length"), Dim::fixed(4));
        let states = graph.input("states", DType::Float32, &[rows.clone(), length.clone(), width.clone()]);
        let ids = graph.input("ids", DType::Int64, &[rows.clone(), length.clone()]);
        let at = ids.greatest(-1);
        assert_eq!(at.shape(), [rows.clone(), Dim::fixed(1)]);
        assert_eq!(states.entry(at).shape(), [rows.clone(), width.clone()]);
        assert_eq!(states.sum(1).shape(), [rows.clone(), Dim::fixed(1), width]);
        assert_eq!(ids.shifted_right(2).shape(), ids.shape());
        assert_eq!(states.where_true((!ids.equals(ids)).unsqueeze(&[2])).shape(), states.shape());
    }

    #[test]
    #[should_panic(expected = "GatherND from [rows, 4] by int64 [rows, 1]")]
    fn an_entry_is_of_a_row() {
        let graph = Graph::new();
        let states = graph.input("states", DType::Float32, &[Dim::symbol("rows"), Dim::fixed(4)]);
        let at = graph.input("at", DType::Int64, &[Dim::symbol("rows"), Dim::fixed(1)]);
        let _ = states.entry(at);
    }
}
