//! Checks optimization profiles, and with them the number of elements of every tensor.

use std::collections::{BTreeMap, HashMap};

use super::{Checker, FindingKind};
use crate::proto::read::Graph;
use crate::tensorrt::limits::MAX_VOLUME;
use crate::tensorrt::profiles::Profile;

impl Checker<'_> {
    /// Checks that no tensor has more elements than TensorRT allows, at the maximum sizes of the profiles.
    pub(super) fn check_volumes(&mut self, profiles: Option<&BTreeMap<String, Profile>>) {
        let graph = &self.model.graph;
        let maxima = maximum_sizes(graph, profiles.unwrap_or(&BTreeMap::new()));
        let mut too_large: Vec<(&String, Vec<u128>)> = Vec::new();
        for (name, tensor) in &graph.initializers {
            let shape = tensor.shape.iter().map(|&size| u128::try_from(size).ok()).collect::<Option<Vec<_>>>();
            too_large.extend(shape.map(|shape| (name, shape)));
        }
        for value in graph.inputs.iter().chain(&graph.value_info).chain(&graph.outputs) {
            let Some(shape) = &value.shape else { continue };
            let sizes = shape.iter().zip(&value.symbols).map(|(size, symbol)| match size {
                Some(size) => u128::try_from(*size).ok(),
                None => size_of(symbol, &maxima),
            });
            too_large.extend(sizes.collect::<Option<Vec<_>>>().map(|shape| (&value.name, shape)));
        }
        let volume = |shape: &[u128]| shape.iter().fold(1_u128, |volume, &size| volume.saturating_mul(size));
        too_large.retain(|(_, shape)| volume(shape) > MAX_VOLUME);
        if let Some((name, shape)) = too_large.iter().max_by_key(|(_, shape)| volume(shape)) {
            let (volume, others) = (volume(shape), too_large.len() - 1);
            let others = if others > 0 { format!("; {others} others exceed it too") } else { String::new() };
            let reason = format!("{volume} elements of shape {shape:?}, above the limit of {MAX_VOLUME}{others}");
            self.report_tensor(name, FindingKind::Volume, reason);
        }
    }

    /// Checks that every input with a dynamic shape has a valid profile, and no other has one.
    pub(super) fn check_profiles(&mut self, profiles: Option<&BTreeMap<String, Profile>>) {
        let empty = BTreeMap::new();
        let profiles = profiles.unwrap_or(&empty);
        for input in &self.model.graph.inputs {
            let Some(shape) = &input.shape else { continue };
            let Some(profile) = profiles.get(&input.name) else {
                if shape.contains(&None) {
                    let reason = "dynamic input without a profile: the engine would be rebuilt for each new size";
                    self.report_tensor(&input.name, FindingKind::Profile, reason);
                }
                continue;
            };
            let [min, opt, max] = profile;
            if profile.iter().any(|sizes| sizes.len() != shape.len()) {
                let reason = format!("profile {profile:?} for an input with {} dimensions", shape.len());
                self.report_tensor(&input.name, FindingKind::Profile, reason);
                continue;
            }
            for (axis, fixed) in shape.iter().enumerate() {
                let (min, opt, max) = (min[axis], opt[axis], max[axis]);
                if min < 1 {
                    self.report_tensor(&input.name, FindingKind::Empty, format!("axis {axis} has the minimum {min}"));
                } else if !(min <= opt && opt <= max) {
                    let reason = format!("axis {axis}: {min}, {opt}, {max} are not ascending");
                    self.report_tensor(&input.name, FindingKind::Profile, reason);
                }
                if let Some(fixed) = fixed.filter(|&fixed| (min, opt, max) != (fixed, fixed, fixed)) {
                    let reason = format!("axis {axis} is {fixed}, but its profile is {min}, {opt}, {max}");
                    self.report_tensor(&input.name, FindingKind::Profile, reason);
                }
            }
        }
        for name in profiles.keys() {
            if !self.model.graph.inputs.iter().any(|input| input.name == *name) {
                self.report_tensor(name, FindingKind::Profile, "profile for a tensor that is not an input");
            }
        }
    }
}

/// The maximum sizes of the symbols in the shapes of a graph's inputs.
fn maximum_sizes(graph: &Graph, profiles: &BTreeMap<String, Profile>) -> HashMap<String, u128> {
    let mut known: HashMap<String, u128> = HashMap::new();
    let mut products = Vec::new();
    for input in &graph.inputs {
        let Some([.., max]) = profiles.get(&input.name) else { continue };
        for (symbol, &max) in input.symbols.iter().zip(max).filter(|(symbol, _)| !symbol.is_empty()) {
            let max = u128::try_from(max).unwrap_or(0);
            if symbol.contains(" * ") {
                products.push((symbol, max));
            } else {
                known.insert(symbol.clone(), max);
            }
        }
    }
    // A product with one unknown factor gives that factor.
    for (product, max) in products {
        let unknown: Vec<&str> = product.split(" * ").filter(|factor| size_of(factor, &known).is_none()).collect();
        if let [factor] = unknown[..] {
            let others = product.split(" * ").filter_map(|factor| size_of(factor, &known)).product::<u128>().max(1);
            known.insert(factor.to_string(), max.div_ceil(others));
        }
    }
    known
}

/// The size of a dimension by its name, a sum or product of symbols as the exporter writes it.
fn size_of(symbol: &str, known: &HashMap<String, u128>) -> Option<u128> {
    if let Some(size) = known.get(symbol).copied().or_else(|| symbol.parse().ok()) {
        return Some(size);
    }
    for (operator, apply) in [(" + ", u128::saturating_add as fn(u128, u128) -> u128), (" * ", u128::saturating_mul)] {
        if let Some((first, rest)) = symbol.split_once(operator) {
            return Some(apply(size_of(first, known)?, size_of(rest, known)?));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_from_the_names_of_dimensions() {
        let known = HashMap::from([("batch".to_string(), 16), ("source".to_string(), 1024), ("past".to_string(), 7)]);
        for (symbol, expected) in [
            ("8", Some(8)),
            ("source", Some(1024)),
            ("2 * batch * source", Some(32768)),
            ("past + 1", Some(8)),
            ("batch * past + batch * 1", Some(128)),
            ("batch * beams", None),
            ("", None),
        ] {
            assert_eq!(size_of(symbol, &known), expected, "{symbol}");
        }
        let input = |name: &str, symbols: [&str; 2]| crate::proto::read::Value {
            name: name.into(),
            dtype: 7,
            shape: Some(vec![None; 2]),
            symbols: symbols.map(String::from).to_vec(),
        };
        let inputs = vec![input("ids", ["batch * beams", "new"]), input("mask", ["batch", "source"])];
        let profile = |max: [i64; 2]| [vec![1, 1], vec![1, 1], max.to_vec()];
        let profiles = BTreeMap::from([("ids".to_string(), profile([64, 1])), ("mask".to_string(), profile([16, 9]))]);
        let found = maximum_sizes(&Graph { inputs, ..Graph::default() }, &profiles);
        for (symbol, expected) in [("batch", 16), ("beams", 4), ("source", 9), ("new", 1)] {
            assert_eq!(found.get(symbol), Some(&expected), "{symbol}");
        }
    }
}
