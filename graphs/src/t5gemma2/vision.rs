//! The part that reads images: a SigLIP tower (arXiv 2303.15343) over patches, and a projector that pools its output to a
//! few tokens of the encoder's width.

use super::root;
use crate::config::{Config, Vision};
use crate::interface;
use crate::lower::Attention;
use crate::nn::{Linear, linear};
use crate::onnx::{DType, Definition, Dim, Graph, Value};
use crate::options::Options;
use crate::weights::Weights;

/// The graph from pixels, float32 `[images, 3, image_size, image_size]`, to the features of images, `[images,
/// tokens_per_image, hidden]`.
pub fn vision_encoder(config: &Config, vision: &Vision, options: &Options) -> Definition {
    let graph = Graph::new();
    let ports = interface::vision_encoder(&config.facts(), options.dtype);
    let [pixels] = interface::inputs(&graph, &ports);
    let root = root(&graph, &config.encoder, options).at("model.encoder");
    let patches = tower(pixels, vision, &root.at("vision_tower"));
    let features = projector(patches, vision, &root.at("multi_modal_projector"));
    interface::outputs(&graph, &ports, [features].into_iter());
    graph.finish("vision_encoder")
}

/// x = patches + positions, then the layers: `[images, patches, hidden]`.
fn tower<'g>(pixels: Value<'g>, vision: &Vision, w: &Weights<'g>) -> Value<'g> {
    let (images, width, grid) = (pixels.dim(0), vision.hidden_size, vision.grid());
    let patches = grid * grid;
    let embeddings = w.at("embeddings");
    let _scope = embeddings.scope();
    let patch = embeddings.at("patch_embedding");
    let kernel = patch.at("weight").tensor(&[width, 3, vision.patch_size, vision.patch_size]);
    let bias = patch.at("bias").tensor(&[width]);
    let x = pixels.cast(w.dtype()).conv_patches(kernel, bias, [grid, grid]); // [images, hidden, grid, grid]
    let x = x.reshape(&[images.clone(), width.into(), patches.into()]).transpose(&[0, 2, 1]);
    let positions = embeddings.at("position_embedding.weight").tensor(&[patches, width]);
    let mut x = (x + positions).reshape(&[images.times(&patches.into()), width.into()]).cast(w.residual_dtype());
    drop(_scope);
    for layer in 0..vision.num_hidden_layers {
        x = self::layer(x, [&images, &patches.into()], vision, &w.at(&format!("encoder.layers.{layer}")));
    }
    let x = layer_norm(x, vision, &w.at("post_layernorm"));
    x.reshape(&[images, patches.into(), width.into()])
}

/// h = x + attention(norm(x))
/// y = h + mlp(norm(h)), x `[images·patches, hidden]`
fn layer<'g>(x: Value<'g>, shape: [&Dim; 2], vision: &Vision, w: &Weights<'g>) -> Value<'g> {
    let attended = attention(layer_norm(x, vision, &w.at("layer_norm1")), shape, vision, &w.at("self_attn"));
    let h = x + attended.cast(x.dtype());
    h + mlp(layer_norm(h, vision, &w.at("layer_norm2")), vision, &w.at("mlp")).cast(x.dtype())
}

/// `out(softmax(q·kᵀ / √head_dim) · v)`: every patch sees all of its image.
fn attention<'g>(x: Value<'g>, [images, patches]: [&Dim; 2], vision: &Vision, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (width, heads) = (vision.hidden_size, vision.num_attention_heads);
    let head_dim = width / heads;
    let square = Linear { input: width, output: width, bias: true };
    let [query, key, value] = ["q_proj", "k_proj", "v_proj"].map(|name| {
        linear(x, square, &w.at(name)).reshape(&[images.clone(), patches.clone(), heads.into(), head_dim.into()])
    });
    let [key, value] = [key, value].map(|x| x.transpose(&[0, 2, 1, 3]));
    let all = w.graph.range(w.graph.size(&0.into()), w.graph.size(patches), patches).greater_than(-1.0);
    let visible = all.unsqueeze(&[0, 1, 2, 3]); // [1, 1, 1, 1, patches]
    let scale = (head_dim as f64).powf(-0.5);
    let read = w.lowering.attention(Attention { query, key, value, visible, scale, cap: None });
    linear(read.reshape(&[images.times(patches), width.into()]), square, &w.at("out_proj"))
}

/// `fc2(gelu(fc1(x)))`
fn mlp<'g>(x: Value<'g>, vision: &Vision, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (width, wide) = (vision.hidden_size, vision.intermediate_size);
    let inner = linear(x, Linear { input: width, output: wide, bias: true }, &w.at("fc1")).gelu_tanh();
    linear(inner, Linear { input: wide, output: width, bias: true }, &w.at("fc2"))
}

/// `(x − mean(x)) / √(var(x) + ε) · w + b`, computed and returned in float32.
fn layer_norm<'g>(x: Value<'g>, vision: &Vision, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let [weight, bias] = ["weight", "bias"].map(|name| w.at(name).float32(&[vision.hidden_size]));
    x.cast(DType::Float32).layer_norm(weight, bias, vision.layer_norm_eps)
}

/// `norm(pool(x)) · M`: the mean of each square of patches, with the RMSNorm of the text stacks.
fn projector<'g>(patches: Value<'g>, vision: &Vision, w: &Weights<'g>) -> Value<'g> {
    let _scope = w.scope();
    let (images, width, grid, side) = (patches.dim(0), vision.hidden_size, vision.grid(), vision.tokens_per_side());
    let x = patches.transpose(&[0, 2, 1]).reshape(&[images.clone(), width.into(), grid.into(), grid.into()]);
    let pooled = x.average_pool(grid / side, [side, side]); // [images, hidden, side, side]
    let tokens = side * side;
    let x = pooled.reshape(&[images.clone(), width.into(), tokens.into()]).transpose(&[0, 2, 1]);
    let x = x.reshape(&[images.times(&tokens.into()), width.into()]);
    let factor = w.at("mm_soft_emb_norm.weight").one_plus(width);
    let normed = w.lowering.rms_norm(x.cast(DType::Float32), factor, vision.layer_norm_eps).cast(w.dtype());
    let matrix = w.at("mm_input_projection_weight").tensor(&[width, w.stack.hidden_size]);
    normed.matmul(matrix).reshape(&[images, tokens.into(), w.stack.hidden_size.into()])
}
