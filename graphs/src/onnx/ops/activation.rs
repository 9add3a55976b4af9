//! Activation functions.

use super::super::{Attribute, Value};

impl<'g> Value<'g> {
    /// `½x(1 + tanh(√(2/π)(x + 0.044715x³)))`.
    pub fn gelu_tanh(self) -> Value<'g> {
        self.with("Gelu", &[("approximate", Attribute::Text("tanh"))])
    }

    /// `½x(1 + erf(x/√2))`, in single operators: on CPUs, `Gelu` is replaced by a kernel for the other form.
    pub fn gelu(self) -> Value<'g> {
        let erf = (self * std::f64::consts::FRAC_1_SQRT_2).unary("Erf");
        self * 0.5 * (erf + 1.0)
    }

    /// `exp(x)`.
    pub fn exp(self) -> Value<'g> {
        self.unary("Exp")
    }

    /// `x / (1 + exp(−x))`.
    pub fn silu(self) -> Value<'g> {
        self * self.unary("Sigmoid")
    }
}
