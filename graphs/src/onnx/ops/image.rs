//! Operators over images.

use super::super::{Attribute, Dim, Value};

impl<'g> Value<'g> {
    /// A linear map of each patch of images `[images, channels, height, width]`: the convolution with `kernel`, `[out,
    /// channels, patch, patch]`, whose stride is its size, and `bias`, `[out]`. The result is `[images, out, grid]`.
    #[track_caller]
    pub fn conv_patches(self, kernel: Value<'g>, bias: Value<'g>, grid: [usize; 2]) -> Value<'g> {
        let (x, k) = (self.shape(), kernel.shape());
        if x.len() != 4 || k.len() != 4 || x[1] != k[1] || bias.shape() != k[..1] || self.dtype() != kernel.dtype() {
            self.graph.mistake(format!("Conv of {} by {}", Dim::list(&x), Dim::list(&k)));
        }
        let size = [&k[2], &k[3]].map(|size| size.as_fixed().expect("kernels have fixed sizes") as i64);
        let attributes = [("kernel_shape", Attribute::Ints(size.into())), ("strides", Attribute::Ints(size.into()))];
        let shape = vec![x[0].clone(), k[0].clone(), grid[0].into(), grid[1].into()];
        self.graph.node("Conv", &[self, kernel, bias], &attributes, &[(self.dtype(), shape)])[0]
    }

    /// The mean of each square of `size · size` entries of `[images, channels, height, width]`: `[images, channels,
    /// grid]`.
    #[track_caller]
    pub fn average_pool(self, size: usize, grid: [usize; 2]) -> Value<'g> {
        let x = self.shape();
        let sizes = || Attribute::Ints(vec![size as i64; 2]);
        let shape = vec![x[0].clone(), x[1].clone(), grid[0].into(), grid[1].into()];
        let attributes = [("kernel_shape", sizes()), ("strides", sizes())];
        self.graph.node("AveragePool", &[self], &attributes, &[(self.dtype(), shape)])[0]
    }

    /// `(x − mean(x)) / √(var(x) + ε) · weight + bias` over the last axis.
    #[track_caller]
    pub fn layer_norm(self, weight: Value<'g>, bias: Value<'g>, eps: f64) -> Value<'g> {
        let last = [self.dim(-1)];
        if weight.shape() != last || bias.shape() != last || self.dtype() != weight.dtype() {
            self.graph.mistake(format!("LayerNormalization of {}", Dim::list(&self.shape())));
        }
        let attributes = [("axis", Attribute::Int(-1)), ("epsilon", Attribute::float(eps))];
        let output = (self.dtype(), self.shape());
        self.graph.node("LayerNormalization", &[self, weight, bias], &attributes, &[output])[0]
    }
}
