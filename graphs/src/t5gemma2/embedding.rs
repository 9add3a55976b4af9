//! How tokens and images become the vectors that the layers read.

use crate::config::{Config, Vision};
use crate::nn;
use crate::onnx::{DType, Data, Value};
use crate::options::Options;
use crate::weights::Weights;

/// Which stack tokens are embedded for.
#[derive(Clone, Copy)]
pub enum Side {
    Source,
    Target,
}

/// `Table[ids] · √hidden`, `[tokens, hidden]`; the token behind an image has a vector of its own, which is not scaled.
/// `root` is the root of the checkpoint.
pub fn embedding<'g>(ids: Value<'g>, side: Side, config: &Config, options: &Options, root: &Weights<'g>) -> Value<'g> {
    let (table, at) = match side {
        Side::Source => (&options.vocabulary.source_embedding, 0),
        Side::Target => (&options.vocabulary.embedding, 1),
    };
    let (graph, width) = (root.graph, root.stack.hidden_size);
    let x = nn::embedding(ids, &root.at(table));
    let Some(end_of_image) = config.end_of_image else { return x };
    let vector = match &options.vocabulary.end_of_image {
        Some(names) => root.at(&names[at]).tensor(&[width]),
        None => graph.constant(root.dtype(), &[width], Data::Floats(vec![0.0; width])),
    };
    let ends = ids.equal(graph.constant(DType::Int64, &[], Data::Ints(vec![end_of_image])));
    let ends = ends.reshape(&[x.dim(0)]).unsqueeze(&[1]); // [tokens, 1]
    x.where_else(!ends, vector.cast(x.dtype()))
}

/// x `[tokens, hidden]` with the tokens of images, `features` `[images, tokens_per_image, hidden]`, in the places of the
/// image tokens among `ids`, in reading order. Without images, those are ordinary tokens.
pub fn with_images<'g>(x: Value<'g>, ids: Value<'g>, features: Value<'g>, vision: &Vision) -> Value<'g> {
    let (graph, width) = (x.graph(), x.dim(1));
    let image = graph.constant(DType::Int64, &[], Data::Ints(vec![vision.image_token]));
    let is_image = ids.equal(image).reshape(&[x.dim(0)]); // [tokens]
    // TensorRT adds up floats only; they count exactly to 2²⁴.
    let place = is_image.cast(DType::Float32).cumulative_sum(0).cast(DType::Int64) - 1.0;
    let images = features.dim(0);
    let rows = features.reshape(&[images.times(&vision.tokens_per_image.into()), width.clone()]);
    // A row of zeros at the end, so that there is one to look up where there are no images.
    let none = graph.constant(x.dtype(), &[1, width.as_fixed().expect("the width is fixed")], {
        Data::Floats(vec![0.0; width.as_fixed().unwrap_or(0)])
    });
    let count = graph.size(&images) * vision.tokens_per_image as f64; // [1]
    let filled = is_image & place.less_or_equal(count - 1.0);
    let row = place.where_else(filled, count);
    let looked_up = Value::concat(&[rows.cast(x.dtype()), none], 0).gather(row); // [tokens, hidden]
    looked_up.where_else(filled.unsqueeze(&[1]), x)
}
