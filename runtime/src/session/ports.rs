//! Comparing the inputs and outputs of an opened session with those that the configuration implies.

use ort::session::Session;
use ort::value::{Outlet, ValueType};
use t5gemma_graphs::interface::{DType, Dim, Port, Ports};

use crate::weights::element_type;

/// A port that is not as expected.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Difference {
    /// `input 2`, `output 0`, ….
    pub port: String,
    /// The port that the configuration implies.
    pub expected: String,
    /// The port of the session.
    pub found: String,
}

/// The first port of a session that is not as expected.
pub(super) fn first_difference(ports: &Ports, session: &Session) -> Option<Difference> {
    first_difference_of("input", &ports.inputs, session.inputs())
        .or_else(|| first_difference_of("output", &ports.outputs, session.outputs()))
}

fn first_difference_of(side: &str, expected: &[Port], found: &[Outlet]) -> Option<Difference> {
    (0..expected.len().max(found.len())).find_map(|index| {
        let (expected, found) = (expected.get(index), found.get(index));
        if let (Some(expected), Some(found)) = (expected, found)
            && same_port(expected, found)
        {
            return None;
        }
        let none = || "none".to_string();
        let expected = expected.map_or_else(none, |port| described(&port.name, &port.dtype, &port.shape));
        let found = found.map_or_else(none, described_outlet);
        Some(Difference { port: format!("{side} {index}"), expected, found })
    })
}

/// Whether name, element type, rank and all fixed sizes agree.
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
    let dtype = DType::ALL.into_iter().find(|&dtype| element_type(dtype) == *ty);
    match dtype {
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
        let config = Config::parse(r#"{"model_type": "t5gemma", "encoder": {}, "decoder": {}}"#);
        let config = config.expect("a minimal config");
        let expected =
            &Interface::of(&config.facts(), DType::Float32, Logits::Last, CacheLayout::Growing).encoder.inputs;
        let outlet = |name: &str, ty, dims: &[i64]| {
            let symbols = dims.iter().map(|_| "rows".to_string());
            let dimension_symbols = SymbolicDimensions::new(symbols);
            Outlet::new(name, ValueType::Tensor { ty, shape: Shape::new(dims.iter().copied()), dimension_symbols })
        };
        let ids = || outlet("input_ids", TensorElementType::Int64, &[-1, -1]);
        let mask = || outlet("attention_mask", TensorElementType::Int64, &[-1, -1]);
        assert_eq!(first_difference_of("input", expected, &[ids(), mask()]), None);

        let cases = [
            (vec![ids()], "input 1", "none"),
            (vec![mask(), ids()], "input 0", "attention_mask int64 [rows, rows]"),
            (vec![outlet("input_ids", TensorElementType::Int32, &[-1, -1])], "input 0", "input_ids int32 [rows, rows]"),
            (vec![outlet("input_ids", TensorElementType::Int64, &[-1])], "input 0", "input_ids int64 [rows]"),
            (vec![outlet("input_ids", TensorElementType::Int64, &[4, -1])], "input 0", "input_ids int64 [4, rows]"),
            (vec![ids(), mask(), ids()], "input 2", "input_ids int64 [rows, rows]"),
        ];
        for (found, port, shown) in cases {
            let difference = first_difference_of("input", expected, &found).expect(port);
            assert_eq!((difference.port.as_str(), difference.found.as_str()), (port, shown));
        }
    }
}
