//! [`ServingPlan`]: the request sizes to be served, and checks that the model and TensorRT can serve them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use t5gemma_graphs::Options;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{
    self, BATCH, BEAMS, CacheLayout, GraphSpec, IMAGES, PAST_LENGTH, SOURCE_LENGTH, STEP_LENGTH,
};
use t5gemma_graphs::onnx::Definition;
use t5gemma_graphs::task::Task;

use super::limits::MAX_VOLUME;
use crate::error::ParseError;
use crate::settings::{Setting, SettingError};

/// The minimum, optimum and maximum of a size, as in TensorRT's optimization profiles. Kernels are selected for the
/// optimum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SizeRange {
    pub min: usize,
    pub opt: usize,
    pub max: usize,
}

impl SizeRange {
    fn fixed(size: usize) -> SizeRange {
        SizeRange { min: size, opt: size, max: size }
    }

    pub fn min_opt_max(self) -> [usize; 3] {
        [self.min, self.opt, self.max]
    }

    /// Reads the range of the size `name`.
    fn parse(name: &str, text: &str) -> Result<SizeRange, ParseError> {
        let is_target = name == "target";
        let expected = if is_target { "the maximum, N" } else { "N, MIN..MAX or MIN..OPT..MAX, ascending" };
        let invalid =
            || ParseError::new(format!("{name}: expected {expected}, from 1 to {}, found {text:?}", i32::MAX));
        let sizes: Result<Vec<usize>, _> = text.split("..").map(str::parse).collect();
        let range = match sizes.map_err(|_| invalid())?[..] {
            [size] => SizeRange::fixed(size),
            // Every target starts short.
            _ if is_target => return Err(invalid()),
            // Batches are usually filled; sources and prompts are seldom as long as they may be.
            [min, max] if matches!(name, "batch" | "beams") => SizeRange { min, opt: max, max },
            [min, max] => SizeRange { min, opt: min.max(max / 2), max },
            [min, opt, max] => SizeRange { min, opt, max },
            _ => return Err(invalid()),
        };
        let is_ascending = 1 <= range.min && range.min <= range.opt && range.opt <= range.max;
        if is_ascending && i32::try_from(range.max).is_ok() { Ok(range) } else { Err(invalid()) }
    }
}

impl fmt::Display for SizeRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SizeRange { min, opt, max } = self;
        if min == max { write!(f, "{max}") } else { write!(f, "{min}..{opt}..{max}") }
    }
}

/// The request sizes to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServingPlan {
    /// Sources in a batch.
    pub(super) batch: SizeRange,
    /// Tokens of a source with its padding.
    pub(super) source: SizeRange,
    /// Images in a batch; only for models that read images, with 1 if they are omitted.
    images: Option<SizeRange>,
    /// Maximum tokens of a target with its prompt; only for models that generate.
    pub(super) target: Option<usize>,
    /// Target rows of a source.
    pub(super) beams: SizeRange,
    /// Tokens given to the first decoder step.
    pub(super) prompt: SizeRange,
    /// The sizes that were omitted and are 1.
    omitted: Vec<&'static str>,
}

/// The names of the sizes in a plan; the last three are those of a decoder.
const NAMES: [&str; 6] = ["batch", "source", "images", "target", "beams", "prompt"];

impl ServingPlan {
    /// Whether one source of any length up to the longest needs no padding.
    pub(crate) fn begins_at_one(&self) -> bool {
        self.batch.min == 1 && self.source.min == 1 && self.prompt.min == 1 && self.beams.min == 1
    }
}

impl FromStr for ServingPlan {
    type Err = ParseError;

    /// Reads a plan such as `batch=1..16,source=1..1024,target=256,beams=1..4`.
    fn from_str(text: &str) -> Result<ServingPlan, ParseError> {
        let mut given = BTreeMap::new();
        for part in text.split(',') {
            let (name, sizes) =
                part.split_once('=').ok_or_else(|| ParseError::expected("NAME=SIZE", format!("{part:?}")))?;
            let name = name.trim();
            if !NAMES.contains(&name) {
                return Err(ParseError::expected(format!("one of {}", NAMES.join(", ")), format!("{name:?}")));
            }
            if given.insert(name, SizeRange::parse(name, sizes.trim())?).is_some() {
                return Err(ParseError::new(format!("{name} is given twice")));
            }
        }
        let or_one = |name: &str| given.get(name).copied().unwrap_or(SizeRange::fixed(1));
        let source = given.get("source").copied();
        let plan = ServingPlan {
            batch: or_one("batch"),
            source: source.ok_or_else(|| ParseError::expected("source=SIZE", "none"))?,
            images: given.get("images").copied(),
            target: given.get("target").map(|target| target.max),
            beams: or_one("beams"),
            prompt: or_one("prompt"),
            omitted: ["batch", "beams", "prompt"].into_iter().filter(|name| !given.contains_key(name)).collect(),
        };
        match plan.target.filter(|&target| target <= plan.prompt.max) {
            Some(target) => {
                let prompt = plan.prompt.max;
                Err(ParseError::new(format!(
                    "target: expected more than the {prompt} tokens of a prompt, found {target}"
                )))
            }
            None => Ok(plan),
        }
    }
}

/// As [`ServingPlan::from_str`] reads it, with the sizes that were omitted.
impl fmt::Display for ServingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ServingPlan { batch, source, images, target, beams, prompt, .. } = self;
        write!(f, "batch={batch},source={source}")?;
        if let Some(images) = images {
            write!(f, ",images={images}")?;
        }
        match target {
            Some(target) => write!(f, ",target={target},beams={beams},prompt={prompt}"),
            None => Ok(()),
        }
    }
}

impl ServingPlan {
    /// The names of the sizes that were omitted and are 1.
    pub fn omitted(&self) -> Vec<&'static str> {
        let is_of_task = |name: &&&str| self.target.is_some() || **name == "batch";
        self.omitted.iter().filter(is_of_task).copied().collect()
    }

    /// Images in a batch.
    pub(super) fn images(&self) -> SizeRange {
        self.images.unwrap_or(SizeRange::fixed(1))
    }

    /// The minimum and maximum length of a source with its padding.
    pub(crate) fn source_lengths(&self) -> (usize, usize) {
        (self.source.min, self.source.max)
    }

    /// Refuses sizes that the model cannot serve, and tensors above TensorRT's limit.
    pub(crate) fn check(&self, config: &Config, options: &Options, graphs: &[Definition]) -> Result<(), SettingError> {
        let invalid = |expected: String, found: String| SettingError::invalid(Setting::Plan, expected, found);
        let (longest, max) = (config.encoder.max_position_embeddings, self.source.max);
        if max > longest {
            let expected = format!("at most {longest} (encoder.max_position_embeddings)");
            return Err(invalid(expected, max.to_string()).of("source"));
        }
        if self.images.is_some() && config.vision.is_none() {
            return Err(invalid("only sizes of text for a model that reads no images".into(), "images".into()));
        }
        let (task, cache) = (options.task.name(), options.cache(config));
        match (&options.task, self.target) {
            (Task::Text2TextGeneration, None) => {
                return Err(invalid(format!("target=N for the task {task}"), "none".into()));
            }
            (Task::Text2TextGeneration, Some(target)) => check_target(target, config, cache)?,
            (_, found) => {
                let is_given = |name: &&&str| !self.omitted.contains(name);
                let of_decoder = NAMES[4..].iter().find(is_given).copied();
                if let Some(name) = found.map(|_| "target").or(of_decoder) {
                    return Err(invalid(format!("only batch and source for the task {task}"), name.into()));
                }
            }
        }
        let parts = interface::graphs(&config.facts(), options.dtype, options.decoder_outputs(), cache, &options.task);
        parts.iter().zip(graphs).try_for_each(|(part, graph)| self.check_volumes(part, graph, cache))
    }

    /// Refuses sizes with which a tensor would exceed TensorRT's limit.
    fn check_volumes(&self, part: &GraphSpec, graph: &Definition, cache: CacheLayout) -> Result<(), SettingError> {
        let max = |symbol: &str| {
            symbol.split(" + ").map(|term| Some(self.range(part.name, term, cache)?.max)).sum::<Option<usize>>()
        };
        for value in &graph.values {
            let Some(shape) = value.shape.iter().map(|dim| dim.size(max)).collect::<Option<Vec<usize>>>() else {
                continue;
            };
            let volume = shape.iter().fold(1_u128, |volume, &size| volume.saturating_mul(size as u128));
            if volume > MAX_VOLUME {
                let expected = format!("at most {MAX_VOLUME} elements at the maximum sizes (TensorRT's limit)");
                let error = SettingError::invalid(Setting::Plan, expected, format!("{volume} of shape {shape:?}"));
                return Err(error.of(format!("{}: {}", part.file, value.name)));
            }
        }
        Ok(())
    }

    /// The range of a symbolic dimension of a graph.
    pub(super) fn range(&self, graph: &str, symbol: &str, cache: CacheLayout) -> Option<SizeRange> {
        let is_step = graph == "decoder_with_past";
        Some(match symbol {
            // Down to 1 whatever the plan says: rows leave a batch when they finish, and beam search starts with one
            // beam.
            BATCH if is_step => SizeRange { min: 1, ..self.batch },
            BATCH => self.batch,
            BEAMS => SizeRange { min: 1, ..self.beams },
            SOURCE_LENGTH => self.source,
            IMAGES => self.images(),
            STEP_LENGTH => match (is_step, cache) {
                (false, _) => self.prompt,
                (true, CacheLayout::Static(_)) => SizeRange { min: 1, opt: 1, max: self.prompt.max },
                (true, _) => SizeRange::fixed(1),
            },
            PAST_LENGTH => {
                let max = self.target? - 1;
                SizeRange { min: 1, opt: max.div_ceil(2), max }
            }
            _ => return None,
        })
    }
}

fn check_target(target: usize, config: &Config, cache: CacheLayout) -> Result<(), SettingError> {
    let longest = config.decoder.max_position_embeddings;
    match cache {
        // A step computes attention over the whole cache, used or not.
        CacheLayout::Static(capacity) if target != capacity => Err(SettingError::Requires {
            setting: Setting::Capacity,
            value: capacity.to_string(),
            other: Setting::Plan,
            needed: format!("target={capacity}"),
            found: format!("target={target}"),
        }),
        CacheLayout::Static(_) => Ok(()),
        _ if target > longest => {
            let expected = format!("at most {longest} (decoder.max_position_embeddings)");
            Err(SettingError::invalid(Setting::Plan, expected, target).of("target"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read() {
        let plan: ServingPlan =
            "batch=1..16,source=1..1024,target=256,beams=1..4".parse().expect("a plan of four sizes");
        assert_eq!(plan.batch, SizeRange { min: 1, opt: 16, max: 16 });
        assert_eq!(plan.source, SizeRange { min: 1, opt: 512, max: 1024 });
        assert_eq!((plan.target, plan.prompt), (Some(256), SizeRange::fixed(1)));
        let plan: ServingPlan = "source=8..64..128, target=9, prompt=1..8".parse().expect("a plan without a batch");
        assert_eq!((plan.batch, plan.beams), (SizeRange::fixed(1), SizeRange::fixed(1)));
        assert_eq!(plan.source, SizeRange { min: 8, opt: 64, max: 128 });
    }

    #[test]
    fn a_displayed_plan_parses_to_itself() {
        for (text, shown, omitted) in [
            (
                "batch=1..16,source=1..1024,target=256,beams=1..4",
                "batch=1..16..16,source=1..512..1024,target=256,beams=1..4..4,prompt=1",
                &["prompt"][..],
            ),
            ("source=9,target=9", "batch=1,source=9,target=9,beams=1,prompt=1", &["batch", "beams", "prompt"]),
            ("source=4,batch=2", "batch=2,source=4", &[]),
            ("source=4", "batch=1,source=4", &["batch"]),
        ] {
            let plan: ServingPlan = text.parse().expect(text);
            assert_eq!((plan.to_string().as_str(), &plan.omitted()[..]), (shown, omitted), "{text}");
            let again: ServingPlan = shown.parse().expect(shown);
            assert_eq!(again.to_string(), shown);
        }
    }

    #[test]
    fn malformed_plans_are_refused() {
        for (text, word) in [
            ("", "expected NAME=SIZE"),
            ("batch=1", "source"),
            ("source=4,target=8,", "expected NAME=SIZE"),
            ("source=4,,target=8", "expected NAME=SIZE"),
            ("source=4,target=8,width=2", "\"width\""),
            ("source=4,Batch=2,target=8", "\"Batch\""),
            ("source=4,source=5,target=8", "twice"),
            ("source=0..4,target=8", "source: expected"),
            ("source=4..2,target=8", "source: expected"),
            ("source=1..2..3..4,target=8", "source: expected"),
            ("source=1..9..4,target=8", "source: expected"),
            ("source=4..,target=8", "source: expected"),
            ("source=a,target=8", "source: expected"),
            ("source=-1,target=8", "source: expected"),
            ("source=1.5,target=8", "source: expected"),
            ("source=2147483648,target=8", "from 1 to 2147483647"),
            ("batch=99999999999999999999,source=4,target=8", "batch: expected"),
            ("source=4,target=0", "target: expected the maximum"),
            ("source=4,target=1..8", "target: expected the maximum"),
            ("source=4,target=1", "more than the 1 tokens"),
            ("source=4,target=8,beams=0..4", "beams: expected"),
            ("source=4,target=8,prompt=1..8", "more than the 8 tokens"),
        ] {
            let error = text.parse::<ServingPlan>().expect_err(text).to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
