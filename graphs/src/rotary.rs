//! Rotary positions (RoFormer, arXiv 2104.09864) in the half-split form, with angles in float32.

use crate::config::Rope;
use crate::lower::Rotation;
use crate::onnx::{DType, Data, Value};
use crate::weights::Weights;

/// x rotated by the angles of its tokens' positions, `[length]` or `[rows, length]`: x and the result `[rows, length,
/// heads, head_dim]`.
pub fn rotary<'g>(x: Value<'g>, positions: Value<'g>, rope: Rope, w: &Weights<'g>) -> Value<'g> {
    let first = positions.shape().len() as isize;
    let angles = angles(positions, &[first, first + 1], rope, w); // [(rows,) length, 1, head_dim / 2]
    w.lowering.rotary(x, Rotation { cos: angles.cos().cast(x.dtype()), sin: angles.sin().cast(x.dtype()) })
}

/// The angles `position · f_j`, float32: positions `[…]` get the new axes `axes`, the last of length `head_dim / 2` and
/// the others of length 1.
pub fn angles<'g>(positions: Value<'g>, axes: &[isize], rope: Rope, w: &Weights<'g>) -> Value<'g> {
    let mut shape = vec![1; axes.len()];
    shape.push(w.stack.head_dim / 2);
    let frequencies = Data::Floats(frequencies(rope, w).map(f64::from).collect());
    let frequencies = w.graph.constant(DType::Float32, &shape, frequencies);
    positions.cast(DType::Float32).unsqueeze(axes) * frequencies
}

/// Cosines and sines of the angles of all positions, float32 `[max_position_embeddings, head_dim / 2]` each.
pub fn tables<'g>(rope: Rope, w: &Weights<'g>) -> Rotation<'g> {
    let shape = [w.stack.max_position_embeddings, w.stack.head_dim / 2];
    let table = |name, function: fn(f32) -> f32| {
        w.graph.table(name, &shape, || {
            let row = |position: usize| frequencies(rope, w).map(move |f| f64::from(function(position as f32 * f)));
            (0..shape[0]).flat_map(row).collect()
        })
    };
    Rotation { cos: table("rotary_cos", f32::cos), sin: table("rotary_sin", f32::sin) }
}

/// The frequencies `f_j = θ^(−2j/head_dim) / factor`: powers and quotients in float32, as transformers computes them.
fn frequencies(rope: Rope, w: &Weights<'_>) -> impl Iterator<Item = f32> {
    let (theta, factor, head_dim) = (rope.theta as f32, rope.factor as f32, w.stack.head_dim);
    (0..head_dim / 2).map(move |j| 1.0 / theta.powf((2 * j) as f32 / head_dim as f32) / factor)
}
