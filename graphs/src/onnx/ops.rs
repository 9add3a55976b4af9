//! The standard ONNX operators that model definitions use, each with its rule for dtypes and shapes.

mod activation;
mod image;
mod indexing;
mod quantized;
mod select;

use std::ops::{Add, BitAnd, Div, Mul, Neg, Sub};

use super::{Attribute, DType, Data, Dim, Graph, Value};

impl Graph {
    /// The integers `start..end`, int64 `[length]`; both bounds have one element.
    #[track_caller]
    pub fn range<'g>(&'g self, start: Value<'g>, end: Value<'g>, length: &Dim) -> Value<'g> {
        let step = self.constant(DType::Int64, &[], Data::Ints(vec![1]));
        let bounds = [start.squeeze(0), end.squeeze(0), step];
        self.node("Range", &bounds, &[], &[(DType::Int64, vec![length.clone()])])[0]
    }

    fn axes(&self, axes: &[isize]) -> Value<'_> {
        self.constant(DType::Int64, &[axes.len()], Data::Ints(axes.iter().map(|&axis| axis as i64).collect()))
    }

    fn number(&self, dtype: DType, number: f64) -> Value<'_> {
        let data = if dtype == DType::Int64 { Data::Ints(vec![number as i64]) } else { Data::Floats(vec![number]) };
        self.constant(dtype, &[], data)
    }
}

impl<'g> Value<'g> {
    fn one(self, op: &'static str, inputs: &[Value<'g>], dtype: DType, shape: Vec<Dim>) -> Value<'g> {
        self.graph.node(op, inputs, &[], &[(dtype, shape)])[0]
    }

    fn with(self, op: &'static str, attributes: &[(&'static str, Attribute)]) -> Value<'g> {
        self.graph.node(op, &[self], attributes, &[(self.dtype(), self.shape())])[0]
    }

    fn unary(self, op: &'static str) -> Value<'g> {
        self.with(op, &[])
    }

    /// An elementwise operator of two tensors of one dtype, broadcast against each other.
    #[track_caller]
    fn binary(self, op: &'static str, other: Value<'g>, dtype: DType) -> Value<'g> {
        if self.dtype() != other.dtype() {
            self.graph.mistake(format!("{op} of {} and {}", self.dtype(), other.dtype()));
        }
        let shape = self.broadcast(op, other);
        self.one(op, &[self, other], dtype, shape)
    }

    #[track_caller]
    fn broadcast(self, op: &str, other: Value<'g>) -> Vec<Dim> {
        let (a, b) = (self.shape(), other.shape());
        let (one, rank) = (Dim::fixed(1), a.len().max(b.len()));
        let at = |shape: &[Dim], axis: usize| match (axis + shape.len()).checked_sub(rank) {
            Some(own) => shape[own].clone(),
            None => one.clone(),
        };
        (0..rank)
            .map(|axis| match (at(&a, axis), at(&b, axis)) {
                (a, b) if a == b || b == one => a,
                (a, b) if a == one => b,
                _ => self.graph.mistake(format!("{op} of {} and {}", Dim::list(&a), Dim::list(&b))),
            })
            .collect()
    }

    #[track_caller]
    fn axis(self, axis: isize) -> usize {
        let rank = self.shape().len() as isize;
        match usize::try_from(if axis < 0 { axis + rank } else { axis }) {
            Ok(at) if at < rank as usize => at,
            _ => self.graph.mistake(format!("no axis {axis} in {}", Dim::list(&self.shape()))),
        }
    }

    /// The same tensor under another name.
    pub fn identity(self) -> Value<'g> {
        self.unary("Identity")
    }

    /// The same numbers as `to`; no operator if they are that already.
    pub fn cast(self, to: DType) -> Value<'g> {
        if self.dtype() == to {
            return self;
        }
        // TensorProto.DataType.
        let code = match to {
            DType::Float32 => 1,
            DType::UInt8 => 2,
            DType::Int8 => 3,
            DType::Int32 => 6,
            DType::Int64 => 7,
            DType::Bool => 9,
            DType::Float16 => 10,
            DType::BFloat16 => 16,
            DType::Float8E4M3FN => 17,
            DType::Int4 => 22,
        };
        self.graph.node("Cast", &[self], &[("to", Attribute::Int(code))], &[(to, self.shape())])[0]
    }

    /// `√x`.
    pub fn sqrt(self) -> Value<'g> {
        self.unary("Sqrt")
    }

    /// `tanh x`.
    pub fn tanh(self) -> Value<'g> {
        self.unary("Tanh")
    }

    /// `cos x`.
    pub fn cos(self) -> Value<'g> {
        self.unary("Cos")
    }

    /// `sin x`.
    pub fn sin(self) -> Value<'g> {
        self.unary("Sin")
    }

    /// `exp(x) / Σ exp(x)` over the last axis.
    pub fn softmax(self) -> Value<'g> {
        self.with("Softmax", &[("axis", Attribute::Int(-1))])
    }

    /// The mean over the last axis, which is kept with length 1.
    pub fn mean(self) -> Value<'g> {
        let mut shape = self.shape();
        let last = self.axis(-1);
        shape[last] = Dim::fixed(1);
        self.one("ReduceMean", &[self, self.graph.axes(&[-1])], self.dtype(), shape)
    }

    /// `self <= other`, bool.
    #[track_caller]
    pub fn less_or_equal(self, other: Value<'g>) -> Value<'g> {
        self.binary("LessOrEqual", other, DType::Bool)
    }

    /// `self > number`, bool.
    #[track_caller]
    pub fn greater_than(self, number: f64) -> Value<'g> {
        self.greater(self.graph.number(self.dtype(), number))
    }

    /// `self > other`, bool.
    #[track_caller]
    pub fn greater(self, other: Value<'g>) -> Value<'g> {
        self.binary("Greater", other, DType::Bool)
    }

    /// `yes` where this bool tensor is true and `no` where it is false, as `dtype`.
    pub fn select(self, dtype: DType, yes: f64, no: f64) -> Value<'g> {
        let (yes, no) = (self.graph.number(dtype, yes), self.graph.number(dtype, no));
        self.one("Where", &[self, yes, no], dtype, self.shape())
    }

    /// The matrix product over the last two axes; the axes before them must be equal.
    #[track_caller]
    pub fn matmul(self, other: Value<'g>) -> Value<'g> {
        let (a, b) = (self.shape(), other.shape());
        let rank = a.len();
        let fits = rank >= 2
            && rank == b.len()
            && a[..rank - 2] == b[..rank - 2]
            && a[rank - 1] == b[rank - 2]
            && self.dtype() == other.dtype();
        if !fits {
            let (of, and) = ((self.dtype(), Dim::list(&a)), (other.dtype(), Dim::list(&b)));
            self.graph.mistake(format!("MatMul of {of:?} and {and:?}"));
        }
        let shape = [&a[..rank - 1], &b[rank - 1..]].concat();
        self.one("MatMul", &[self, other], self.dtype(), shape)
    }

    /// `x · wᵀ (+ b)` of a matrix `[tokens, in]`, a weight as checkpoints store it, `[out, in]`, and a bias `[out]`.
    #[track_caller]
    pub fn gemm(self, weight: Value<'g>, bias: Option<Value<'g>>) -> Value<'g> {
        let (x, w) = (self.shape(), weight.shape());
        let bias_fits = bias.is_none_or(|bias| bias.shape() == w[..1] && bias.dtype() == self.dtype());
        if x.len() != 2 || w.len() != 2 || x[1] != w[1] || self.dtype() != weight.dtype() || !bias_fits {
            let (of, and) = ((self.dtype(), Dim::list(&x)), (weight.dtype(), Dim::list(&w)));
            self.graph.mistake(format!("Gemm of {of:?} and {and:?}"));
        }
        let inputs: Vec<Value<'g>> = [self, weight].into_iter().chain(bias).collect();
        let output = (self.dtype(), vec![x[0].clone(), w[0].clone()]);
        self.graph.node("Gemm", &inputs, &[("transB", Attribute::Int(1))], &[output])[0]
    }

    /// The rows `ids`, int64 `[…]`, of this matrix `[rows, columns]`: `[…, columns]`.
    #[track_caller]
    pub fn gather(self, ids: Value<'g>) -> Value<'g> {
        let shape = self.shape();
        if shape.len() != 2 || ids.dtype() != DType::Int64 {
            self.graph.mistake(format!("Gather from {} by {}", Dim::list(&shape), ids.dtype()));
        }
        let rows = [ids.shape(), shape[1..].to_vec()].concat();
        self.graph.node("Gather", &[self, ids], &[("axis", Attribute::Int(0))], &[(self.dtype(), rows)])[0]
    }

    /// The axes in the given order.
    #[track_caller]
    pub fn transpose(self, order: &[usize]) -> Value<'g> {
        let shape = self.shape();
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..shape.len()) {
            self.graph.mistake(format!("Transpose of {} by {order:?}", Dim::list(&shape)));
        }
        let perm = Attribute::Ints(order.iter().map(|&axis| axis as i64).collect());
        let shape = order.iter().map(|&axis| shape[axis].clone()).collect();
        self.graph.node("Transpose", &[self], &[("perm", perm)], &[(self.dtype(), shape)])[0]
    }

    /// The same numbers in other dimensions with the same product.
    ///
    /// At most one dimension is left to be inferred at run time. The others are fixed, copied from the same axis, or
    /// the [`size`](Graph::size) of a tensor that has them.
    #[track_caller]
    pub fn reshape(self, to: &[Dim]) -> Value<'g> {
        let open = self.open(to);
        let inferred = open.iter().find(|&&axis| !self.graph.has_size(&to[axis])).or(open.first()).copied();
        self.reshaped(to, inferred)
    }

    /// [`Value::reshape`] without an inferred dimension.
    #[track_caller]
    pub fn reshape_to_known(self, to: &[Dim]) -> Value<'g> {
        self.reshaped(to, None)
    }

    /// The axes of `to` that are neither fixed nor copied from the same axis of this tensor.
    fn open(self, to: &[Dim]) -> Vec<usize> {
        let from = self.shape();
        (0..to.len()).filter(|&axis| to[axis].as_fixed().is_none() && from.get(axis) != Some(&to[axis])).collect()
    }

    #[track_caller]
    fn reshaped(self, to: &[Dim], inferred: Option<usize>) -> Value<'g> {
        let from = self.shape();
        if from == to {
            return self;
        }
        let product = |shape: &[Dim]| shape.iter().fold(Dim::fixed(1), |product, dim| product.times(dim));
        if product(&from) != product(to) {
            self.graph.mistake(format!("Reshape of {} to {}", Dim::list(&from), Dim::list(to)));
        }
        let open = self.open(to);
        let vector = |numbers: Vec<i64>| self.graph.constant(DType::Int64, &[numbers.len()], Data::Ints(numbers));
        let number = |axis: usize| match to[axis].as_fixed() {
            Some(size) => size as i64,
            None if inferred == Some(axis) => -1,
            None => 0,
        };
        let shape = if open.iter().all(|&axis| inferred == Some(axis)) {
            vector((0..to.len()).map(number).collect())
        } else {
            let parts: Vec<Value<'g>> = (0..to.len())
                .map(|axis| {
                    if open.contains(&axis) && inferred != Some(axis) {
                        self.graph.size(&to[axis])
                    } else {
                        vector(vec![number(axis)])
                    }
                })
                .collect();
            Value::concat(&parts, 0)
        };
        self.one("Reshape", &[self, shape], self.dtype(), to.to_vec())
    }

    /// New axes of length 1, at these places of the result, ascending.
    pub fn unsqueeze(self, axes: &[isize]) -> Value<'g> {
        let mut shape = self.shape();
        for &axis in axes {
            shape.insert(axis as usize, Dim::fixed(1));
        }
        self.one("Unsqueeze", &[self, self.graph.axes(axes)], self.dtype(), shape)
    }

    /// Without an axis, which must have length 1.
    #[track_caller]
    pub fn squeeze(self, axis: isize) -> Value<'g> {
        let mut shape = self.shape();
        if shape.remove(self.axis(axis)) != Dim::fixed(1) {
            self.graph.mistake(format!("Squeeze of axis {axis} of {}", Dim::list(&self.shape())));
        }
        self.one("Squeeze", &[self, self.graph.axes(&[axis])], self.dtype(), shape)
    }

    /// Tensors of one dtype, concatenated along an axis.
    #[track_caller]
    pub fn concat(parts: &[Value<'g>], axis: isize) -> Value<'g> {
        let first = parts[0];
        let at = first.axis(axis);
        let mut shape = first.shape();
        for part in &parts[1..] {
            let other = part.shape();
            let fits = part.dtype() == first.dtype()
                && other.len() == shape.len()
                && (0..shape.len()).all(|i| i == at || shape[i] == other[i]);
            if !fits {
                first.graph.mistake(format!("Concat of {} and {}", Dim::list(&shape), Dim::list(&other)));
            }
            shape[at] = shape[at].plus(&other[at]);
        }
        first.graph.node("Concat", parts, &[("axis", Attribute::Int(axis as i64))], &[(first.dtype(), shape)])[0]
    }

    /// Broadcast to the dimensions `to`, which must be fixed or those of other tensors.
    #[track_caller]
    pub fn expand(self, to: &[Dim]) -> Value<'g> {
        if self.shape() == to {
            return self;
        }
        let sizes: Vec<Value<'g>> = to.iter().map(|dim| self.graph.size(dim)).collect();
        let sizes = if sizes.len() == 1 { sizes[0] } else { Value::concat(&sizes, 0) };
        self.one("Expand", &[self, sizes], self.dtype(), to.to_vec())
    }

    /// The two halves of the last axis.
    #[track_caller]
    pub fn split_halves(self) -> (Value<'g>, Value<'g>) {
        let mut shape = self.shape();
        let last = self.axis(-1);
        let Some(size) = shape[last].as_fixed().filter(|size| size % 2 == 0) else {
            self.graph.mistake(format!("halves of {}", Dim::list(&shape)));
        };
        shape[last] = Dim::fixed(size / 2);
        let sizes = self.graph.constant(DType::Int64, &[2], Data::Ints(vec![size as i64 / 2; 2]));
        let half = (self.dtype(), shape);
        let parts = self.graph.node("Split", &[self, sizes], &[("axis", Attribute::Int(-1))], &[half.clone(), half]);
        (parts[0], parts[1])
    }

    /// The last entry along an axis, which is kept with length 1.
    #[track_caller]
    pub fn last(self, axis: isize) -> Value<'g> {
        let mut shape = self.shape();
        let at = self.axis(axis);
        shape[at] = Dim::fixed(1);
        let bound = |bound: i64| self.graph.constant(DType::Int64, &[1], Data::Ints(vec![bound]));
        let inputs = [self, bound(-1), bound(i64::MAX), bound(at as i64)];
        self.one("Slice", &inputs, self.dtype(), shape)
    }
}

impl<'g> Add for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn add(self, other: Value<'g>) -> Value<'g> {
        self.binary("Add", other, self.dtype())
    }
}

impl<'g> Add<f64> for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn add(self, other: f64) -> Value<'g> {
        self + self.graph.number(self.dtype(), other)
    }
}

impl<'g> Sub<f64> for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn sub(self, other: f64) -> Value<'g> {
        self.binary("Sub", self.graph.number(self.dtype(), other), self.dtype())
    }
}

impl<'g> Sub for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn sub(self, other: Value<'g>) -> Value<'g> {
        self.binary("Sub", other, self.dtype())
    }
}

impl<'g> Mul for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn mul(self, other: Value<'g>) -> Value<'g> {
        self.binary("Mul", other, self.dtype())
    }
}

impl<'g> Mul<f64> for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn mul(self, other: f64) -> Value<'g> {
        self * self.graph.number(self.dtype(), other)
    }
}

impl<'g> Div for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn div(self, other: Value<'g>) -> Value<'g> {
        self.binary("Div", other, self.dtype())
    }
}

impl<'g> Neg for Value<'g> {
    type Output = Value<'g>;

    fn neg(self) -> Value<'g> {
        self.unary("Neg")
    }
}

impl<'g> BitAnd for Value<'g> {
    type Output = Value<'g>;

    #[track_caller]
    fn bitand(self, other: Value<'g>) -> Value<'g> {
        self.binary("And", other, DType::Bool)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::{Attribute, Constant, Definition};

    fn dims(shape: &[&str]) -> Vec<Dim> {
        shape.iter().map(|dim| dim.parse().map_or_else(|_| Dim::symbol(dim), Dim::fixed)).collect()
    }

    fn operators(graph: Graph) -> Vec<&'static str> {
        graph.finish("test").nodes.iter().map(|node| node.op).collect()
    }

    /// The constant that is the second input of the only node called `op`.
    fn second_input<'d>(graph: &'d Definition, op: &str) -> Option<&'d Constant> {
        let node = graph.nodes.iter().find(|node| node.op == op).expect("the operator was written");
        graph.constants.iter().find(|constant| Some(constant.value) == node.inputs[1])
    }

    #[test]
    fn equal_operators_are_written_once() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float32, &dims(&["n", "4"]));
        let once = (x * x).mean() + 1.0;
        let again = (x * x).mean() + 1.0;
        graph.output("y", (once + again).sqrt());
        assert_eq!(operators(graph), ["Mul", "ReduceMean", "Add", "Add", "Sqrt"]);
    }

    #[test]
    fn operators_without_an_output_are_left_out() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float32, &dims(&["n"]));
        let _unused = x.cos();
        graph.output("y", x.sin());
        assert_eq!(operators(graph), ["Sin"]);
    }

    #[test]
    fn an_output_that_is_also_an_input_is_copied() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float32, &dims(&["n"]));
        graph.output("y", x);
        let graph = graph.finish("test");
        assert_eq!(graph.nodes[0].op, "Identity");
        assert_eq!(
            (graph.value(graph.inputs[0]).name.as_str(), graph.value(graph.outputs[0]).name.as_str()),
            ("x", "y")
        );
    }

    #[test]
    fn reshapes_copy_infer_and_look_up() {
        struct Case {
            name: &'static str,
            from: &'static [&'static str],
            to: &'static [&'static str],
            written: Option<&'static [i64]>,
        }
        let cases = [
            Case { name: "copied and fixed", from: &["n", "8"], to: &["n", "2", "4"], written: Some(&[0, 2, 4]) },
            Case { name: "one inferred", from: &["4", "n"], to: &["n", "4"], written: Some(&[-1, 4]) },
            Case { name: "one looked up", from: &["n", "m", "4"], to: &["m", "n", "4"], written: None },
        ];
        for case in cases {
            let graph = Graph::new();
            let x = graph.input("x", DType::Float32, &dims(case.from));
            graph.output("y", x.reshape(&dims(case.to)));
            let graph = graph.finish("test");
            assert_eq!(graph.value(graph.outputs[0]).shape, dims(case.to), "{}", case.name);
            let written = second_input(&graph, "Reshape").map(|constant| constant.data.clone());
            assert_eq!(written, case.written.map(|shape| Data::Ints(shape.to_vec())), "{}", case.name);
        }
    }

    #[test]
    fn operands_are_broadcast_from_the_right() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float32, &dims(&["b", "1", "4"]));
        let y = graph.input("y", DType::Float32, &dims(&["s", "1"]));
        assert_eq!((x + y).shape(), dims(&["b", "s", "4"]));
    }

    #[test]
    fn a_cast_to_the_same_type_is_not_written() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float16, &dims(&["n"]));
        graph.output("y", x.cast(DType::Float16).cast(DType::Float32));
        let graph = graph.finish("test");
        assert_eq!(graph.nodes.len(), 1);
        assert_eq!(graph.nodes[0].attributes, [("to", Attribute::Int(1))]);
    }

    #[test]
    #[should_panic(expected = "Add of float32 and float16, in scope \"model/layer\"")]
    fn types_do_not_mix() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float32, &dims(&["n"]));
        let y = graph.input("y", DType::Float16, &dims(&["n"]));
        let _scope = graph.scope("model.layer");
        let _ = x + y;
    }

    #[test]
    #[should_panic(expected = "Gemm of (Float32, \"[n, 4]\") and (Float32, \"[3, 5]\")")]
    fn a_weight_must_fit_what_it_is_multiplied_with() {
        let graph = Graph::new();
        let x = graph.input("x", DType::Float32, &dims(&["n", "4"]));
        let w = graph.input("w", DType::Float32, &dims(&["3", "5"]));
        let _ = x.gemm(w, None);
    }

    #[test]
    #[should_panic(expected = "Reshape of [n, 4] to [n, 5]")]
    fn a_reshape_keeps_the_number_of_elements() {
        let graph = Graph::new();
        let _ = graph.input("x", DType::Float32, &dims(&["n", "4"])).reshape(&dims(&["n", "5"]));
    }
}
