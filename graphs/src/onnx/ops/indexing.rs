//! Operators that gather and scatter by indices, and those that find the indices of the greatest.

use super::super::{Attribute, DType, Data, Dim, Value};

impl<'g> Value<'g> {
    /// With `updates` written along `axis` at `indices` (int64, of their shape).
    #[track_caller]
    pub fn scatter_elements(self, indices: Value<'g>, updates: Value<'g>, axis: isize) -> Value<'g> {
        let (shape, new) = (self.shape(), updates.shape());
        let at = self.axis(axis);
        let fits = indices.dtype() == DType::Int64
            && indices.shape() == new
            && updates.dtype() == self.dtype()
            && shape.len() == new.len()
            && (0..shape.len()).all(|i| i == at || shape[i] == new[i]);
        if !fits {
            let (into, of) = (Dim::list(&shape), Dim::list(&new));
            self.graph.mistake(format!("ScatterElements into {into} of {of} at {}", Dim::list(&indices.shape())));
        }
        let axis = [("axis", Attribute::Int(at as i64))];
        self.graph.node("ScatterElements", &[self, indices, updates], &axis, &[(self.dtype(), shape)])[0]
    }

    /// The lesser of each entry and of the `updates` that `indices` (int64, of their shape) give it along `axis`.
    #[track_caller]
    pub fn scatter_min(self, indices: Value<'g>, updates: Value<'g>, axis: isize) -> Value<'g> {
        let at = self.axis(axis);
        if indices.shape() != updates.shape() || updates.dtype() != self.dtype() {
            let (of, by) = (Dim::list(&updates.shape()), Dim::list(&indices.shape()));
            self.graph.mistake(format!("ScatterElements of {of} at {by}"));
        }
        let attributes = [("axis", Attribute::Int(at as i64)), ("reduction", Attribute::Text("min"))];
        let output = (self.dtype(), self.shape());
        self.graph.node("ScatterElements", &[self, indices, updates], &attributes, &[output])[0]
    }

    /// For each of the `indices` (int64), the entry at it along `axis`, in the same place of the other axes.
    #[track_caller]
    pub fn gather_elements(self, indices: Value<'g>, axis: isize) -> Value<'g> {
        let attributes = [("axis", Attribute::Int(self.axis(axis) as i64))];
        let output = (self.dtype(), indices.shape());
        self.graph.node("GatherElements", &[self, indices], &attributes, &[output])[0]
    }

    /// The entries `indices` (int64 `[n]`) along an axis, whose length becomes `n`.
    #[track_caller]
    pub fn gather_along(self, indices: Value<'g>, axis: isize) -> Value<'g> {
        let (mut shape, at) = (self.shape(), self.axis(axis));
        let [count] = &indices.shape()[..] else {
            self.graph.mistake(format!("Gather by indices {}", Dim::list(&indices.shape())))
        };
        shape[at] = count.clone();
        let axis = [("axis", Attribute::Int(at as i64))];
        self.graph.node("Gather", &[self, indices], &axis, &[(self.dtype(), shape)])[0]
    }

    /// The sums of the entries up to each along an axis.
    #[track_caller]
    pub fn cumulative_sum(self, axis: isize) -> Value<'g> {
        let at = self.graph.constant(DType::Int64, &[], Data::Ints(vec![self.axis(axis) as i64]));
        self.one("CumSum", &[self, at], self.dtype(), self.shape())
    }

    /// The entries from `start` up to `end` (int64 `[1]` each) along an axis, whose length becomes `length`.
    #[track_caller]
    pub fn slice(self, [start, end]: [Value<'g>; 2], length: &Dim, axis: isize) -> Value<'g> {
        let (mut shape, at) = (self.shape(), self.axis(axis));
        shape[at] = length.clone();
        let axes = self.graph.constant(DType::Int64, &[1], Data::Ints(vec![at as i64]));
        self.one("Slice", &[self, start, end, axes], self.dtype(), shape)
    }

    /// The `count` greatest entries of the last axis, greatest first, and their indices (int64).
    #[track_caller]
    pub fn top_k(self, count: usize) -> [Value<'g>; 2] {
        let mut shape = self.shape();
        let last = self.axis(-1);
        shape[last] = Dim::fixed(count);
        let k = self.graph.constant(DType::Int64, &[1], Data::Ints(vec![count as i64]));
        let outputs = [(self.dtype(), shape.clone()), (DType::Int64, shape)];
        let top = self.graph.node("TopK", &[self, k], &[("axis", Attribute::Int(-1))], &outputs);
        [top[0], top[1]]
    }

    /// `log Σ exp(x)` over the last axis, which is kept with length 1.
    #[track_caller]
    pub fn log_sum_exp(self) -> Value<'g> {
        let greatest = self.reduce_max(-1);
        (self - greatest).exp().reduce_sum(-1).unary("Log") + greatest
    }
}

#[cfg(test)]
mod tests {
    use crate::onnx::{DType, Dim, Graph};

    #[test]
    fn shapes_follow_from_the_indices() {
        let graph = Graph::new();
        let [rows, new] = ["rows", "new"].map(Dim::symbol);
        let past = graph.input("past", DType::Float32, &[rows.clone(), Dim::fixed(8), Dim::fixed(4)]);
        let update = graph.input("update", DType::Float32, &[rows.clone(), new.clone(), Dim::fixed(4)]);
        let places = graph.input("places", DType::Int64, &[rows.clone(), new.clone(), Dim::fixed(4)]);
        assert_eq!(past.scatter_elements(places, update, 1).shape(), past.shape());
        let parents = graph.input("parents", DType::Int64, std::slice::from_ref(&new));
        assert_eq!(past.gather_along(parents, 0).shape(), [new, Dim::fixed(8), Dim::fixed(4)]);
        let [scores, ids] = past.top_k(2);
        assert_eq!((scores.shape(), ids.dtype()), (vec![rows.clone(), Dim::fixed(8), Dim::fixed(2)], DType::Int64));
        assert_eq!(past.log_sum_exp().shape(), [rows, Dim::fixed(8), Dim::fixed(1)]);
    }

    #[test]
    #[should_panic(expected = "ScatterElements into [rows, 8] of [rows, 3] at [rows, 2]")]
    fn every_update_has_an_index() {
        let graph = Graph::new();
        let of = |name: &str, dtype, size| graph.input(name, dtype, &[Dim::symbol("rows"), Dim::fixed(size)]);
        let (past, places, update) =
            (of("past", DType::Float32, 8), of("places", DType::Int64, 2), of("update", DType::Float32, 3));
        let _ = past.scatter_elements(places, update, 1);
    }
}
