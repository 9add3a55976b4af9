//! Operators that move entries by their places, and those that find the places of the greatest.

use super::super::graph::{Attribute, Data, Value};
use super::super::{DType, Dim};

impl<'g> Value<'g> {
    /// The tensor with the entries of `updates` put along `axis` where `places` (int64, of their shape) says.
    #[track_caller]
    pub fn scattered(self, places: Value<'g>, updates: Value<'g>, axis: isize) -> Value<'g> {
        let (shape, new) = (self.shape(), updates.shape());
        let at = self.axis(axis);
        let fits = places.dtype() == DType::Int64
            && places.shape() == new
            && updates.dtype() == self.dtype()
            && shape.len() == new.len()
            && (0..shape.len()).all(|i| i == at || shape[i] == new[i]);
        if !fits {
            let (into, of) = (Dim::list(&shape), Dim::list(&new));
            self.graph.mistake(format!("ScatterElements into {into} of {of} at {}", Dim::list(&places.shape())));
        }
        let axis = [("axis", Attribute::Int(at as i64))];
        self.graph.node("ScatterElements", &[self, places, updates], &axis, &[(self.dtype(), shape)])[0]
    }

    /// The entries along an axis that `places` (int64 `[n]`) name.
    #[track_caller]
    pub fn taken(self, places: Value<'g>, axis: isize) -> Value<'g> {
        let (mut shape, at) = (self.shape(), self.axis(axis));
        let [count] = &places.shape()[..] else { self.graph.mistake(format!("at {}", Dim::list(&places.shape()))) };
        shape[at] = count.clone();
        let axis = [("axis", Attribute::Int(at as i64))];
        self.graph.node("Gather", &[self, places], &axis, &[(self.dtype(), shape)])[0]
    }

    /// The `count` greatest entries of the last axis, greatest first, and their places there (int64).
    #[track_caller]
    pub fn top(self, count: usize) -> [Value<'g>; 2] {
        let mut shape = self.shape();
        let last = self.axis(-1);
        shape[last] = Dim::fixed(count);
        let k = self.graph.constant(DType::Int64, &[1], Data::Ints(vec![count as i64]));
        let outputs = [(self.dtype(), shape.clone()), (DType::Int64, shape)];
        let top = self.graph.node("TopK", &[self, k], &[("axis", Attribute::Int(-1))], &outputs);
        [top[0], top[1]]
    }

    /// `log Σ exp(x)` over the last axis, which stays with length 1.
    #[track_caller]
    pub fn log_sum_exp(self) -> Value<'g> {
        let greatest = self.greatest(-1);
        (self - greatest).unary("Exp").sum(-1).unary("Log") + greatest
    }
}

#[cfg(test)]
mod tests {
    use crate::onnx::{DType, Dim, Graph};

    #[test]
    fn shapes_follow_from_what_is_moved() {
        let graph = Graph::new();
        let [rows, new] = ["rows", "new"].map(Dim::symbol);
        let past = graph.input("past", DType::Float32, &[rows.clone(), Dim::fixed(8), Dim::fixed(4)]);
        let update = graph.input("update", DType::Float32, &[rows.clone(), new.clone(), Dim::fixed(4)]);
        let places = graph.input("places", DType::Int64, &[rows.clone(), new.clone(), Dim::fixed(4)]);
        assert_eq!(past.scattered(places, update, 1).shape(), past.shape());
        let parents = graph.input("parents", DType::Int64, std::slice::from_ref(&new));
        assert_eq!(past.taken(parents, 0).shape(), [new, Dim::fixed(8), Dim::fixed(4)]);
        let [scores, ids] = past.top(2);
        assert_eq!((scores.shape(), ids.dtype()), (vec![rows.clone(), Dim::fixed(8), Dim::fixed(2)], DType::Int64));
        assert_eq!(past.log_sum_exp().shape(), [rows, Dim::fixed(8), Dim::fixed(1)]);
    }

    #[test]
    #[should_panic(expected = "ScatterElements into [rows, 8] of [rows, 3] at [rows, 2]")]
    fn every_entry_has_a_place() {
        let graph = Graph::new();
        let of = |name: &str, dtype, size| graph.input(name, dtype, &[Dim::symbol("rows"), Dim::fixed(size)]);
        let (past, places, update) =
            (of("past", DType::Float32, 8), of("places", DType::Int64, 2), of("update", DType::Float32, 3));
        let _ = past.scattered(places, update, 1);
    }
}
