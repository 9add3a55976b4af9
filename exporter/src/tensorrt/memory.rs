//! [`MemoryEstimate`]: the GPU memory that a serving plan needs at its maximum sizes, computed from shapes. The model
//! folder has it as `memory.txt`, with the formula of each row, for comparison with `nvidia-smi`.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use t5gemma_graphs::Options;
use t5gemma_graphs::config::{Config, Stack};
use t5gemma_graphs::interface::{BATCH, CacheLayout, DType, SOURCE_LENGTH};
use t5gemma_graphs::onnx::{Definition, Dim, ValueInfo};

use super::plan::ServingPlan;
use crate::error::ParseError;

/// Memory besides tensors: driver and CUDA libraries, about half of it, and fragmentation of ONNX Runtime's allocator.
const ALLOWANCE: u64 = 1_000_000_000;

/// The GPU memory that a plan takes, row by row.
#[derive(Debug)]
pub struct MemoryEstimate {
    /// The plan, and the options that decide the sizes.
    plan: String,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    name: String,
    formula: String,
    bytes: u64,
}

/// A factor of a product, with its unit.
#[derive(Clone, Copy)]
struct Factor {
    count: usize,
    unit: &'static str,
}

fn factor(count: usize, unit: &'static str) -> Factor {
    Factor { count, unit }
}

impl Row {
    fn new(name: impl Into<String>, bytes: u64) -> Row {
        Row { name: name.into(), formula: String::new(), bytes }
    }

    /// A row whose bytes are a product.
    fn product(name: impl Into<String>, factors: &[Factor]) -> Row {
        let term = |factor: &Factor| format!("{} {}", factor.count, factor.unit).trim_end().to_string();
        let formula: Vec<String> = factors.iter().map(term).collect();
        let bytes = factors.iter().fold(1_u64, |bytes, factor| bytes.saturating_mul(factor.count as u64));
        Row { name: name.into(), formula: formula.join(" x "), bytes }
    }

    /// This row plus another.
    fn plus(self, other: Row) -> Row {
        let formula = format!("{} + {}", self.formula, other.formula);
        Row { name: self.name, formula, bytes: self.bytes.saturating_add(other.bytes) }
    }
}

impl MemoryEstimate {
    /// The estimate for the graphs that these options give.
    pub(crate) fn new(plan: &ServingPlan, config: &Config, options: &Options, graphs: &[Definition]) -> MemoryEstimate {
        let is_generation = options.task.is_generation();
        let mut rows = weights(graphs);
        let input = Input::new(plan, options);
        if is_generation {
            rows.extend(generation(plan, config, options, input));
        } else {
            let output = graphs[0].value(graphs[0].outputs[0]);
            let size = |dim: &Dim| match dim.as_fixed() {
                Some(size) => factor(size, ""),
                None if *dim == Dim::symbol(BATCH) => input.sources,
                None if *dim == Dim::symbol(SOURCE_LENGTH) => input.tokens,
                None => factor(1, ""),
            };
            let bytes = factor(output.dtype.size(), "bytes");
            let factors: Vec<Factor> = output.shape.iter().map(size).chain([bytes]).collect();
            rows.push(Row::product(output.name.clone(), &factors));
        }
        rows.push(scratch("encoder", Widths::of(&config.encoder), input));
        if let Some(vision) = &config.vision {
            let patches = vision.grid() * vision.grid();
            let images = factor(plan.images().max, "images");
            let input = Input { sources: images, tokens: factor(patches, "patches"), ..input };
            let widths = Widths {
                heads: vision.num_attention_heads,
                intermediate_size: vision.intermediate_size,
                hidden_size: vision.hidden_size,
            };
            rows.push(scratch("vision", widths, input));
        }
        if !is_generation && config.classifier.as_ref().is_some_and(|classifier| classifier.is_encoder_decoder) {
            rows.push(scratch("decoder", Widths::of(&config.decoder), input));
        }
        rows.push(Row::new("CUDA and ONNX Runtime (allowance)", ALLOWANCE));
        let cache = match options.cache(config) {
            CacheLayout::Static(capacity) => format!(", cache static={capacity}"),
            _ if is_generation => ", growing cache".into(),
            _ => String::new(),
        };
        let plan = format!("{plan}\ntask {}, dtype {}{cache}", options.task.name(), options.dtype);
        MemoryEstimate { plan, rows }
    }

    /// The total in bytes.
    pub fn bytes(&self) -> u64 {
        self.rows.iter().map(|row| row.bytes).fold(0, u64::saturating_add)
    }
}

/// The factors of tensors over the largest batch of sources.
#[derive(Clone, Copy)]
struct Input {
    sources: Factor,
    /// Tokens of a source.
    tokens: Factor,
    /// Bytes of an element.
    element: Factor,
}

impl Input {
    fn new(plan: &ServingPlan, options: &Options) -> Input {
        Input {
            sources: factor(plan.batch.max, "sources"),
            tokens: factor(plan.source.max, "tokens"),
            element: factor(options.dtype.size(), "bytes"),
        }
    }
}

/// The weights of the engines.
fn weights(graphs: &[Definition]) -> Vec<Row> {
    let mut rows = Vec::new();
    for graph in graphs {
        let engine = match graph.name.as_str() {
            "encoder" => "encoder engine",
            "decoder" => "first decoder engine",
            "decoder_with_past" => "step engine",
            "vision_encoder" => "vision engine",
            _ => "engine",
        };
        let bytes = graph.parameters.iter().map(|parameter| bytes(graph.value(parameter.value))).sum();
        rows.push(Row::new(format!("weights of the {engine}"), bytes));
    }
    let copies: Vec<u64> = graphs.iter().map(gathered_and_multiplied).filter(|&bytes| bytes > 0).collect();
    if !copies.is_empty() {
        let formula =
            format!("in {} engine(s), if TensorRT stores the head in another layout than the embedding", copies.len());
        rows.push(Row { formula, ..Row::new("tied embedding and head, second copy", copies.iter().sum()) });
    }
    rows
}

/// The caches and outputs of the graphs for generation.
fn generation(plan: &ServingPlan, config: &Config, options: &Options, input: Input) -> Vec<Row> {
    let (encoder, decoder) = (&config.encoder, &config.decoder);
    let Input { sources, tokens, element } = input;
    let capacity = match options.cache(config) {
        CacheLayout::Static(capacity) => capacity,
        _ => plan.target.unwrap_or(1),
    };
    let targets = factor(plan.batch.max.saturating_mul(plan.beams.max), "rows");
    let cache = |name: &str, items: &[Factor]| {
        let (layers, heads) = (factor(decoder.layers.len(), "layers"), factor(decoder.num_key_value_heads, "heads"));
        let size = [layers, factor(2, "(keys, values)"), heads, factor(decoder.head_dim, "head_dim"), element];
        Row::product(name, &[items, &size].concat())
    };
    let vocabulary = options.vocabulary.kept.as_ref().map_or(decoder.vocab_size, |kept| kept.len());
    let logits = [targets, factor(vocabulary, "tokens"), factor(DType::Float32.size(), "bytes")];
    let scratch = match decoder.final_logit_softcapping {
        Some(_) => [&[factor(2, "(before and after the cap)")], &logits[..]].concat(),
        None => logits.to_vec(),
    };
    vec![
        // A step reads one copy and writes another, and so does a reordering of rows.
        cache("keys and values of targets, twice", &[factor(2, ""), targets, factor(capacity, "tokens")]),
        cache("keys and values of sources", &[sources, tokens]),
        Row::product("encoder hidden states", &[sources, tokens, factor(encoder.hidden_size, "hidden_size"), element]),
        Row::product("logits", &logits),
        Row::product("scratch for the logits of a step (estimate)", &scratch),
    ]
}

/// The sizes that the scratch memory of a layer depends on.
#[derive(Clone, Copy)]
struct Widths {
    heads: usize,
    intermediate_size: usize,
    hidden_size: usize,
}

impl Widths {
    fn of(stack: &Stack) -> Widths {
        let Stack { num_attention_heads: heads, intermediate_size, hidden_size, .. } = *stack;
        Widths { heads, intermediate_size, hidden_size }
    }
}

/// The largest scratch memory of a layer over whole sources: its attention scores, twice, and its feed-forward.
fn scratch(side: &str, sizes: Widths, input: Input) -> Row {
    let Input { sources, tokens, element } = input;
    let bytes = factor(DType::Float32.size() + element.count, "bytes (float32 and the model's type)");
    let scores = [sources, factor(sizes.heads, "heads"), tokens, tokens, bytes];
    let wide = factor(
        2 * sizes.intermediate_size + 4 * sizes.hidden_size,
        "(intermediate_size twice, hidden_size four times)",
    );
    let name = format!("scratch for the {side} layers (estimate)");
    Row::product(name, &scores).plus(Row::product("", &[sources, tokens, wide, element]))
}

fn bytes(value: &ValueInfo) -> u64 {
    let numbers = value.shape.iter().filter_map(Dim::as_fixed).product();
    value.dtype.bytes(numbers).map_or(u64::MAX, |bytes| bytes as u64)
}

/// The bytes of the weights that a graph both gathers rows of and multiplies with.
fn gathered_and_multiplied(graph: &Definition) -> u64 {
    #[derive(Default)]
    struct Uses {
        gathered: bool,
        otherwise: bool,
    }
    let mut uses: BTreeMap<usize, Uses> = BTreeMap::new();
    for node in &graph.nodes {
        for (place, &input) in node.inputs.iter().enumerate() {
            let Some(id) = input.filter(|id| graph.parameters.iter().any(|parameter| parameter.value == *id)) else {
                continue;
            };
            let uses = uses.entry(id).or_default();
            if node.operator().1 == "Gather" && place == 0 {
                uses.gathered = true;
            } else {
                uses.otherwise = true;
            }
        }
    }
    let both = uses.iter().filter(|(_, uses)| uses.gathered && uses.otherwise);
    both.map(|(&id, _)| bytes(graph.value(id))).sum()
}

/// Bytes in the largest unit that leaves a digit before the point, such as `18.282 GB`.
fn with_unit(bytes: u64) -> String {
    let units = [(1_000_000_000, "GB"), (1_000_000, "MB"), (1000, "kB")];
    match units.into_iter().find(|&(unit, _)| bytes >= unit) {
        Some((unit, name)) => format!("{:.3} {name}", bytes as f64 / unit as f64),
        None => format!("{bytes} B "),
    }
}

impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Estimated GPU memory at the maximum sizes of the plan\n{}\n", self.plan)?;
        for Row { name, formula, bytes } in &self.rows {
            writeln!(f, "{}", format!("{name:<46} {:>11}   {formula}", with_unit(*bytes)).trim_end())?;
        }
        let total = self.bytes();
        let mib = total.div_ceil(1 << 20);
        let gib = total as f64 / (1_u64 << 30) as f64;
        writeln!(f, "{:<46} {:>11}   {gib:.3} GiB, {mib} MiB in nvidia-smi", "total", with_unit(total))?;
        f.write_str(
            "\nEstimated from shapes, not measured. GB, MB and kB are 10^9, 10^6 and 10^3 bytes, GiB and MiB 2^30 and 2^20.\n\
             Building an engine takes about twice the memory of its weights, and up to 16 GiB of workspace if available.\n",
        )
    }
}

/// A number of bytes, written as `24GB` (10^9 bytes each) or `24GiB` (2^30), also in `MB` and `MiB`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize(pub u64);

impl FromStr for MemorySize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<MemorySize, ParseError> {
        let invalid = || ParseError::expected("a size such as 24GB, 22.5GiB, 8000MB or 8192MiB", format!("{text:?}"));
        let units = [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("GB", 1_000_000_000), ("MB", 1_000_000)];
        let given = units.into_iter().find_map(|(name, unit)| Some((text.strip_suffix(name)?.trim(), unit)));
        let (number, unit) = given.ok_or_else(invalid)?;
        let bytes = number.parse::<f64>().map_err(|_| invalid())? * unit as f64;
        let is_valid = bytes.is_finite() && bytes >= 1.0 && bytes < u64::MAX as f64;
        if is_valid { Ok(MemorySize(bytes as u64)) } else { Err(invalid()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_leave_a_digit_before_the_point() {
        for (bytes, expected) in [
            (0, "0 B "),
            (999, "999 B "),
            (1_000, "1.000 kB"),
            (65_536, "65.536 kB"),
            (999_999_999, "1000.000 MB"),
            (18_282_000_000, "18.282 GB"),
        ] {
            assert_eq!(with_unit(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn sizes_are_parsed_with_their_units() {
        for (text, bytes) in [
            ("24GB", 24_000_000_000),
            ("24 GiB", 24 << 30),
            ("0.5GB", 500_000_000),
            ("1MiB", 1 << 20),
            ("8MB", 8_000_000),
        ] {
            assert_eq!(text.parse(), Ok(MemorySize(bytes)), "{text}");
        }
        for text in ["", "24", "GB", "-1GB", "0GB", "nanGB", "infGiB", "24gb", "24TB", "1e99GB"] {
            assert!(
                text.parse::<MemorySize>().is_err_and(|error| error.to_string().contains("such as 24GB")),
                "{text}"
            );
        }
    }

    #[test]
    fn rows_are_the_products_of_their_formulas() {
        let row = Row::product("x", &[factor(2, ""), factor(16, "rows"), factor(4, "bytes")]);
        assert_eq!((row.formula.as_str(), row.bytes), ("2 x 16 rows x 4 bytes", 128));
        let both = row.plus(Row::product("", &[factor(3, "bytes")]));
        assert_eq!((both.formula.as_str(), both.bytes), ("2 x 16 rows x 4 bytes + 3 bytes", 131));
        assert_eq!(Row::product("x", &[factor(usize::MAX, ""), factor(usize::MAX, "")]).bytes, u64::MAX);
    }
}
