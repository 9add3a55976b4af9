//! Comparing the inputs and outputs of an opened session with those that the configuration implies.

use ort::value::{Outlet, ValueType};
use t5gemma_graphs::interface::{DType, Dim, Port};

use crate::weights::element_type;

/// The first port that is not as expected: its place, what was expected there, what is there.
pub(super) fn first_difference(side: &str, expected: &[Port], found: &[Outlet]) -> Option<(String, String, String)> {
    (0..expected.len().max(found.len())).find_map(|index| {
        let (expected, found) = (expected.get(index), found.get(index));
        if let (Some(expected), Some(found)) = (expected, found)
            && same_port(expected, found)
        {
            return None;
        }
        let none = || "none".to_string();
        let expected = expected.map_or_else(none, |port| described(&port.name, &port.dtype, &port.shape));
        Some((format!("{side} {index}"), expected, found.map_or_else(none, described_outlet)))
    })
}

/// Whether name, element type, rank and the sizes known in advance agree.
fn same_port(expected: &Port, found: &Outlet) -> bool {
    let ValueType::Tensor { ty, shape, .. } = found.dtype() else { return false };
    let same_dim = |(expected, &found): (&Dim, &i64)| match expected.as_fixed() {
        Some(size) => found == size as i64,
        None => found < 0,
    };
    found.name() == expected.name
        && *ty == element_type(expected.dtype)
        && shape.len() == expected.shape.len()
        && expected.shape.iter().zip(shape.iter()).all(same_dim)
}

fn described_outlet(outlet: &Outlet) -> String {
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
        return format!("{} of {}", outlet.name(), outlet.dtype());
    };
    let dims: Vec<String> = shape
        .iter()
        .zip(dimension_symbols.iter())
        .map(|(&dim, symbol)| match dim {
            ..0 if symbol.is_empty() => "?".into(),
            ..0 => symbol.clone(),
            _ => dim.to_string(),
        })
        .collect();
    let known = DType::ALL.into_iter().find(|&dtype| element_type(dtype) == *ty);
    match known {
        Some(dtype) => described(outlet.name(), &dtype, &dims),
        None => described(outlet.name(), ty, &dims),
    }
}

fn described(name: &str, dtype: &impl std::fmt::Display, shape: &[impl std::fmt::Display]) -> String {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    format!("{name} {dtype} [{}]", dims.join(", "))
}

#[cfg(test)]
mod tests {
    use ort::value::{Shape, SymbolicDimensions, TensorElementType};
    use t5gemma_graphs::config::Config;
    use t5gemma_graphs::interface::{CacheLayout, Interface, Logits};

    use super::*;

    #[test]
    fn the_first_differing_port_is_described() {
        let config =
            Config::parse(r#"{"model_type": "t5gemma", "encoder": {}, "decoder": {}}"#).expect("a minimal config");
        let expected = &Interface::of(&config, DType::Float32, Logits::Last, CacheLayout::Growing).encoder.inputs;
        let outlet = |name: &str, ty, dims: &[i64]| {
            let symbols = dims.iter().map(|_| "rows".to_string());
            let dimension_symbols = SymbolicDimensions::new(symbols);
            Outlet::new(name, ValueType::Tensor { ty, shape: Shape::new(dims.iter().copied()), dimension_symbols })
        };
        let ids = || outlet("input_ids", TensorElementType::Int64, &[-1, -1]);
        let mask = || outlet("attention_mask", TensorElementType::Int64, &[-1, -1]);
        assert_eq!(first_difference("input", expected, &[ids(), mask()]), None);

        let cases = [
            (vec![ids()], "input 1", "none"),
            (vec![mask(), ids()], "input 0", "attention_mask int64 [rows, rows]"),
            (vec![outlet("input_ids", TensorElementType::Int32, &[-1, -1])], "input 0", "input_ids int32 [rows, rows]"),
            (vec![outlet("input_ids", TensorElementType::Int64, &[-1])], "input 0", "input_ids int64 [rows]"),
            (vec![outlet("input_ids", TensorElementType::Int64, &[4, -1])], "input 0", "input_ids int64 [4, rows]"),
            (vec![ids(), mask(), ids()], "input 2", "input_ids int64 [rows, rows]"),
        ];
        for (found, port, shown) in cases {
            let (at, _, found) = first_difference("input", expected, &found).expect(port);
            assert_eq!((at.as_str(), found.as_str()), (port, shown));
        }
    }
}
