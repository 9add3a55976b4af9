//! Operators that compare, select and reduce: what masks, pooling and classification need.

use std::ops::Not;

use super::super::{Attribute, DType, Data, Dim, Value};

impl<'g> Value<'g> {
    /// Whether integers are equal, bool.
    #[track_caller]
    pub fn equal(self, other: Value<'g>) -> Value<'g> {
        self.binary("Equal", other, DType::Bool)
    }

    /// The numbers where `kept` (bool) is true, 0 where it is false.
    #[track_caller]
    pub fn zero_unless(self, kept: Value<'g>) -> Value<'g> {
        self.where_else(kept, self.graph.number(self.dtype(), 0.0))
    }

    /// The numbers where `kept` (bool) is true, those of `other` where it is false. `other` must not make the shape
    /// larger.
    #[track_caller]
    pub fn where_else(self, kept: Value<'g>, other: Value<'g>) -> Value<'g> {
        let shape = self.broadcast("Where", kept);
        self.one("Where", &[kept, self, other], self.dtype(), shape)
    }

    /// The elementwise minimum.
    #[track_caller]
    pub fn min(self, other: Value<'g>) -> Value<'g> {
        self.binary("Min", other, self.dtype())
    }

    /// The numbers, but at least `least`.
    #[track_caller]
    pub fn clamp_min(self, least: f64) -> Value<'g> {
        self.binary("Max", self.graph.number(self.dtype(), least), self.dtype())
    }

    /// The sum along an axis, which is kept with length 1.
    #[track_caller]
    pub fn reduce_sum(self, axis: isize) -> Value<'g> {
        self.reduced("ReduceSum", axis)
    }

    /// The maximum along an axis, which is kept with length 1.
    #[track_caller]
    pub fn reduce_max(self, axis: isize) -> Value<'g> {
        self.reduced("ReduceMax", axis)
    }

    /// The mean along axes, which are kept with length 1.
    #[track_caller]
    pub fn reduce_mean(self, axes: &[isize]) -> Value<'g> {
        let mut shape = self.shape();
        axes.iter().for_each(|&axis| shape[self.axis(axis)] = Dim::fixed(1));
        self.one("ReduceMean", &[self, self.graph.axes(axes)], self.dtype(), shape)
    }

    /// The first index along the last axis at which a bool tensor is true, 0 if there is none: int64, without that
    /// axis.
    #[track_caller]
    pub fn first_true(self) -> Value<'g> {
        if self.dtype() != DType::Bool {
            self.graph.mistake(format!("the first index that is true in {}", self.dtype()));
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

    /// Entry `index` (int64 `[rows, 1]`) of each row of `[rows, length, width]`: `[rows, width]`.
    #[track_caller]
    pub fn gather_entry(self, index: Value<'g>) -> Value<'g> {
        let (shape, indices) = (self.shape(), index.shape());
        if shape.len() != 3 || indices != [shape[0].clone(), Dim::fixed(1)] || index.dtype() != DType::Int64 {
            let (of, by) = (Dim::list(&shape), Dim::list(&indices));
            self.graph.mistake(format!("GatherND from {of} by {} {by}", index.dtype()));
        }
        let output = (self.dtype(), vec![shape[0].clone(), shape[2].clone()]);
        self.graph.node("GatherND", &[self, index], &[("batch_dims", Attribute::Int(1))], &[output])[0]
    }

    /// Integers `[rows, length]` shifted right by one: each row begins with `first` and loses its last entry.
    #[track_caller]
    pub fn shifted_right(self, first: i64) -> Value<'g> {
        let shape = self.shape();
        let [rows, length] = shape.as_slice() else { self.graph.mistake(format!("shift of {}", Dim::list(&shape))) };
        let number = |number: i64| self.graph.constant(DType::Int64, &[1], Data::Ints(vec![number]));
        let slice = |end: i64, kept: Dim| {
            let inputs = [self, number(0), number(end), number(1)];
            self.one("Slice", &inputs, DType::Int64, vec![rows.clone(), kept])
        };
        // From the first column, since the number of rows is known at run time only.
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
    fn shapes_follow_from_what_is_selected() {
        let graph = Graph::new();
        let (rows, length, width) = (Dim::symbol("rows"), Dim::symbol("length"), Dim::fixed(4));
        let states = graph.input("states", DType::Float32, &[rows.clone(), length.clone(), width.clone()]);
        let ids = graph.input("ids", DType::Int64, &[rows.clone(), length.clone()]);
        let at = ids.reduce_max(-1);
        assert_eq!(at.shape(), [rows.clone(), Dim::fixed(1)]);
        assert_eq!(states.gather_entry(at).shape(), [rows.clone(), width.clone()]);
        assert_eq!(states.reduce_sum(1).shape(), [rows.clone(), Dim::fixed(1), width]);
        assert_eq!(ids.shifted_right(2).shape(), ids.shape());
        assert_eq!(states.zero_unless((!ids.equal(ids)).unsqueeze(&[2])).shape(), states.shape());
    }

    #[test]
    #[should_panic(expected = "GatherND from [rows, 4] by int64 [rows, 1]")]
    fn every_row_has_an_index() {
        let graph = Graph::new();
        let states = graph.input("states", DType::Float32, &[Dim::symbol("rows"), Dim::fixed(4)]);
        let at = graph.input("at", DType::Int64, &[Dim::symbol("rows"), Dim::fixed(1)]);
        let _ = states.gather_entry(at);
    }
}
