//! What the greatest sizes of a serving plan take of a GPU's memory: a table from shapes alone, written into the model folder
//! with the formula of each row, so that it can be held against what `nvidia-smi` says.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use t5gemma_graphs::Options;
use t5gemma_graphs::config::{Config, Stack};
use t5gemma_graphs::interface::{BATCH, CacheLayout, DType, SOURCE};
use t5gemma_graphs::onnx::{Definition, Dim, ValueInfo};

use super::Plan;

/// What the driver, CUDA's libraries and the allocator of ONNX Runtime take beside tensors: the first two about half of it.
const ALLOWANCE: u64 = 1_000_000_000;

/// The memory that a plan takes, row by row.
#[derive(Debug)]
pub struct Memory {
    /// The plan, and what of the export decides the sizes.
    of: String,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    what: String,
    formula: String,
    bytes: u64,
}

/// A number of a product, with what it counts.
type Factor = (usize, &'static str);

impl Row {
    fn of(what: impl Into<String>, bytes: u64) -> Row {
        Row { what: what.into(), formula: String::new(), bytes }
    }

    /// Bytes that are a product.
    fn product(what: impl Into<String>, factors: &[Factor]) -> Row {
        let formula: Vec<String> =
            factors.iter().map(|(count, unit)| format!("{count} {unit}").trim_end().to_string()).collect();
        let bytes = factors.iter().fold(1_u64, |bytes, &(count, _)| bytes.saturating_mul(count as u64));
        Row { what: what.into(), formula: formula.join(" x "), bytes }
    }

    /// With what another row takes.
    fn and(self, other: Row) -> Row {
        let formula = format!("{} + {}", self.formula, other.formula);
        Row { what: self.what, formula, bytes: self.bytes.saturating_add(other.bytes) }
    }
}

impl Memory {
    /// The table of the graphs that these options give.
    pub(crate) fn of(plan: &Plan, config: &Config, options: &Options, graphs: &[Definition]) -> Memory {
        let (encoder, decoder) = (&config.encoder, &config.decoder);
        let number = (options.dtype.size(), "bytes");
        let (sources, source) = ((plan.batch.most, "sources"), (plan.source.most, "tokens"));
        let mut rows = Vec::new();
        let is_generation = options.task.is_generation();
        for (at, graph) in graphs.iter().enumerate() {
            let engine = ["encoder's engine", "first decoder engine", "step's engine"][at];
            let engine = if is_generation { engine } else { "engine" };
            let bytes = graph.parameters.iter().map(|parameter| bytes(graph.value(parameter.value))).sum();
            rows.push(Row::of(format!("weights of the {engine}"), bytes));
        }
        let again: Vec<u64> = graphs.iter().map(read_in_two_ways).filter(|&bytes| bytes > 0).collect();
        if !again.is_empty() {
            let formula = format!("in {} of the engines, each of which may lay it out anew for the head", again.len());
            rows.push(Row { formula, ..Row::of("table of both embedding and head, again", again.iter().sum()) });
        }
        if is_generation {
            let capacity = match options.cache(config) {
                CacheLayout::Static(capacity) => capacity,
                _ => plan.target.unwrap_or(1),
            };
            let targets = (plan.batch.most.saturating_mul(plan.beams.most), "rows");
            let [layers, heads, wide] =
                [(decoder.layers.len(), "layers"), (decoder.num_key_value_heads, "heads"), (decoder.head_dim, "wide")];
            let kept = |what: &str, items: &[Factor]| {
                Row::product(what, &[items, &[layers, (2, "(keys, values)"), heads, wide, number]].concat())
            };
            // A step reads one and writes another, and so does a change of rows.
            rows.push(kept("keys and values of targets, twice", &[(2, ""), targets, (capacity, "tokens")]));
            rows.push(kept("keys and values of sources", &[sources, source]));
            rows.push(Row::product("hidden states", &[sources, source, (encoder.hidden_size, "wide"), number]));
            let tokens = options.vocabulary.kept.as_ref().map_or(decoder.vocab_size, |kept| kept.len());
            let logits = [targets, (tokens, "tokens"), (DType::Float32.size(), "bytes")];
            rows.push(Row::product("logits", &logits));
            let scratch = match decoder.final_logit_softcapping {
                Some(_) => [&[(2, "(before and after the cap)")], &logits[..]].concat(),
                None => logits.to_vec(),
            };
            rows.push(Row::product("scratch of the step's logits (estimate)", &scratch));
        } else {
            let output = graphs[0].value(graphs[0].outputs[0]);
            let size = |dim: &Dim| match dim.as_fixed() {
                Some(size) => (size, ""),
                None if *dim == Dim::symbol(BATCH) => sources,
                None if *dim == Dim::symbol(SOURCE) => source,
                None => (1, ""),
            };
            let factors: Vec<Factor> = output.shape.iter().map(size).chain([(output.dtype.size(), "bytes")]).collect();
            rows.push(Row::product(output.name.clone(), &factors));
        }
        rows.push(scratch("encoder", encoder, [sources, source], number));
        if !is_generation && config.classifier.as_ref().is_some_and(|classifier| classifier.is_encoder_decoder) {
            rows.push(scratch("decoder", decoder, [sources, source], number));
        }
        rows.push(Row::of("CUDA and ONNX Runtime themselves (allowance)", ALLOWANCE));
        let cache = match options.cache(config) {
            CacheLayout::Static(capacity) => format!(", cache static={capacity}"),
            _ if is_generation => ", growing cache".into(),
            _ => String::new(),
        };
        Memory { of: format!("{plan}\ntask {}, dtype {}{cache}", options.task.name(), options.dtype), rows }
    }

    /// All rows together.
    pub fn bytes(&self) -> u64 {
        self.rows.iter().map(|row| row.bytes).fold(0, u64::saturating_add)
    }
}

/// What a layer that is computed for whole sources needs at a time: its attention's scores, twice, and its feed-forward.
fn scratch(side: &str, sizes: &Stack, [sources, source]: [Factor; 2], number: Factor) -> Row {
    let scores = [sources, (sizes.num_attention_heads, "heads"), source, source];
    let wide = (2 * sizes.intermediate_size + 4 * sizes.hidden_size, "wide");
    let scores = [&scores[..], &[(DType::Float32.size() + number.0, "bytes")]].concat();
    let what = format!("scratch of the {side}'s layers (estimate)");
    Row::product(what, &scores).and(Row::product("", &[sources, source, wide, number]))
}

fn bytes(value: &ValueInfo) -> u64 {
    let numbers = value.shape.iter().filter_map(Dim::as_fixed).product();
    value.dtype.bytes(numbers).map_or(u64::MAX, |bytes| bytes as u64)
}

/// The bytes of the weights that a graph both looks up rows of and multiplies with.
fn read_in_two_ways(graph: &Definition) -> u64 {
    // By weight, whether it is looked up, and whether it is read otherwise.
    let mut read: BTreeMap<usize, [bool; 2]> = BTreeMap::new();
    for node in &graph.nodes {
        for (place, &input) in node.inputs.iter().enumerate() {
            let Some(id) = input.filter(|id| graph.parameters.iter().any(|parameter| parameter.value == *id)) else {
                continue;
            };
            let is_looked_up = node.operator().1 == "Gather" && place == 0;
            read.entry(id).or_default()[usize::from(!is_looked_up)] = true;
        }
    }
    read.iter().filter(|(_, ways)| **ways == [true, true]).map(|(&id, _)| bytes(graph.value(id))).sum()
}

/// `18.282 GB`, with a unit in which there are digits before the point.
fn shown(bytes: u64) -> String {
    let units = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "kB")];
    match units.into_iter().find(|&(unit, _)| bytes >= unit) {
        Some((unit, name)) => format!("{:.3} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B "),
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Memory of a GPU at the greatest sizes of the plan\n{}\n", self.of)?;
        for Row { what, formula, bytes } in &self.rows {
            writeln!(f, "{}", format!("{what:<46} {:>11}   {formula}", shown(*bytes)).trim_end())?;
        }
        let all = self.bytes();
        let mib = all.div_ceil(1 << 20);
        let gib = all as f64 / (1_u64 << 30) as f64;
        writeln!(f, "{:<46} {:>11}   {gib:.3} GiB, {mib} MiB as nvidia-smi counts", "in all", shown(all))?;
        f.write_str(
            "\nGB, MB and kB are 10^9, 10^6 and 10^3 bytes; GiB and MiB 2^30 and 2^20. From shapes, not measured. Building an\n\
             engine takes about twice its weights, one engine at a time, and up to 16 GiB of workspace where there is so much.\n",
        )
    }
}

/// Bytes as they are written: `24GB` (10^9 each) or `24GiB` (2^30), also with `MB` and `MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Bytes, String> {
        let expected = || format!("expected a size such as 24GB, 22.5GiB, 8000MB or 8192MiB, found {text:?}");
        let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000)];
        let given = units.into_iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim(), unit)));
        let (number, unit) = given.ok_or_else(expected)?;
        let bytes = number.parse::<f64>().map_err(|_| expected())? * unit as f64;
        match bytes.is_finite() && bytes >= 1.0 && bytes < u64::MAX as f64 {
            true => Ok(Bytes(bytes as u64)),
            false => Err(expected()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_in_units_that_have_digits() {
        for (bytes, expected) in [
            (0, "0 B "),
            (999, "999 B "),
            (1_000, "1.000 kB"),
            (65_536, "65.536 kB"),
            (999_999_999, "1000.000 MB"),
            (18_282_000_000, "18.282 GB"),
        ] {
            assert_eq!(shown(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("24GB", 24_000_000_000),
            ("24 GiB", 24 << 30),
            ("0.5GB", 500_000_000),
            ("1MiB", 1 << 20),
            ("8MB", 8_000_000),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "24", "GB", "-1GB", "0GB", "nanGB", "infGiB", "24gb", "24TB", "1e99GB"] {
            assert!(text.parse::<Bytes>().is_err_and(|error| error.contains("such as 24GB")), "{text}");
        }
    }

    #[test]
    fn rows_are_the_products_that_their_formulas_say() {
        let row = Row::product("x", &[(2, ""), (16, "rows"), (4, "bytes")]);
        assert_eq!((row.formula.as_str(), row.bytes), ("2 x 16 rows x 4 bytes", 128));
        let both = row.and(Row::product("", &[(3, "bytes")]));
        assert_eq!((both.formula.as_str(), both.bytes), ("2 x 16 rows x 4 bytes + 3 bytes", 131));
        assert_eq!(Row::product("x", &[(usize::MAX, ""), (usize::MAX, "")]).bytes, u64::MAX);
    }
}
