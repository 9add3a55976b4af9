//! A serving plan: the range of request sizes that will be served, as `--plan` gives it, and the check whether model and
//! TensorRT can serve them.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Result, ensure};
use t5gemma_graphs::Options;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{self, BATCH, BEAMS, CacheLayout, PAST, Part, SOURCE, TARGET};
use t5gemma_graphs::onnx::Definition;
use t5gemma_graphs::task::Task;

use super::limits::LARGEST_VOLUME;

/// The least, usual and greatest of a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub least: usize,
    pub usual: usize,
    pub most: usize,
}

impl Span {
    fn one(size: usize) -> Span {
        Span { least: size, usual: size, most: size }
    }

    pub fn each(self) -> [usize; 3] {
        [self.least, self.usual, self.most]
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Span { least, usual, most } = self;
        if least == most { write!(f, "{most}") } else { write!(f, "{least}..{usual}..{most}") }
    }
}

/// What is going to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Sources in a batch.
    pub(super) batch: Span,
    /// Tokens of a source, padding included.
    pub(super) source: Span,
    /// Tokens of a target at most, prompt included; of models that generate.
    pub(super) target: Option<usize>,
    /// Target rows of a source.
    pub(super) beams: Span,
    /// Tokens given to the first decoder step.
    pub(super) prompt: Span,
    /// The names that were left out and are 1.
    left_out: Vec<&'static str>,
}

/// The names in a plan; the last three are a decoder's.
const NAMES: [&str; 5] = ["batch", "source", "target", "beams", "prompt"];

impl FromStr for Plan {
    type Err = String;

    /// `batch=1..16,source=1..1024,target=256,beams=1..4`, also `batch=1..4..16` with what is usual in the middle.
    fn from_str(text: &str) -> Result<Plan, String> {
        let mut given = BTreeMap::new();
        for part in text.split(',') {
            let (name, sizes) = part.split_once('=').ok_or_else(|| format!("expected NAME=SIZE, found {part:?}"))?;
            let name = name.trim();
            if !NAMES.contains(&name) {
                return Err(format!("expected one of {}, found {name:?}", NAMES.join(", ")));
            }
            if given.insert(name, span(name, sizes.trim())?).is_some() {
                return Err(format!("{name} is given twice"));
            }
        }
        let or_one = |name: &str| given.get(name).copied().unwrap_or(Span::one(1));
        let plan = Plan {
            batch: or_one("batch"),
            source: given.get("source").copied().ok_or("expected source=…, found none")?,
            target: given.get("target").map(|target| target.most),
            beams: or_one("beams"),
            prompt: or_one("prompt"),
            left_out: ["batch", "beams", "prompt"].into_iter().filter(|name| !given.contains_key(name)).collect(),
        };
        match plan.target.filter(|&target| target < plan.prompt.most + 1) {
            Some(target) => Err(format!("target: expected more than prompt's {}, found {target}", plan.prompt.most)),
            None => Ok(plan),
        }
    }
}

/// As [`Plan::from_str`] reads it, with what was left out.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Plan { batch, source, target, beams, prompt, .. } = self;
        write!(f, "batch={batch},source={source}")?;
        match target {
            Some(target) => write!(f, ",target={target},beams={beams},prompt={prompt}"),
            None => Ok(()),
        }
    }
}

fn span(name: &str, text: &str) -> Result<Span, String> {
    let expected = match name {
        "target" => "the greatest size, N",
        _ => "N, LEAST..MOST or LEAST..USUAL..MOST, ascending",
    };
    let wrong = || format!("{name}: expected {expected}, from 1 to {}, found {text:?}", i32::MAX);
    let sizes: Vec<usize> = text.split("..").map(|size| size.parse().map_err(|_| wrong())).collect::<Result<_, _>>()?;
    let span = match sizes[..] {
        [size] => Span::one(size),
        // Targets begin short, whatever they become.
        _ if name == "target" => return Err(wrong()),
        // Kernels are chosen for what is usual: batches are filled, sources and prompts seldom as long as they may be.
        [least, most] if matches!(name, "batch" | "beams") => Span { least, usual: most, most },
        [least, most] => Span { least, usual: least.max(most / 2), most },
        [least, usual, most] => Span { least, usual, most },
        _ => return Err(wrong()),
    };
    let is_ascending = 1 <= span.least && span.least <= span.usual && span.usual <= span.most;
    match is_ascending && i32::try_from(span.most).is_ok() {
        true => Ok(span),
        false => Err(wrong()),
    }
}

impl Plan {
    /// The names that were left out, and are 1.
    pub fn left_out(&self) -> Vec<&'static str> {
        let is_of_task = |name: &&&str| self.target.is_some() || **name == "batch";
        self.left_out.iter().filter(is_of_task).copied().collect()
    }

    /// Refuses what the model cannot serve, and tensors larger than TensorRT's.
    pub(crate) fn check(&self, config: &Config, options: &Options, graphs: &[Definition]) -> Result<()> {
        let (source, most) = (config.encoder.max_position_embeddings, self.source.most);
        ensure!(
            most <= source,
            "--plan: source: expected at most {source} (encoder.max_position_embeddings), found {most}"
        );
        let task = options.task.name();
        match (&options.task, self.target) {
            (Task::Text2TextGeneration, None) => {
                anyhow::bail!("--plan: expected target=… for the task {task}, found none")
            }
            (Task::Text2TextGeneration, Some(target)) => self.check_target(target, config, options.cache(config))?,
            (_, found) => {
                let left_out = |name: &&&str| !self.left_out.contains(name);
                let of_decoder = NAMES[3..].iter().find(left_out).copied();
                if let Some(name) = found.map(|_| "target").or(of_decoder) {
                    anyhow::bail!("--plan: expected batch and source only for the task {task}, found {name}");
                }
            }
        }
        let cache = options.cache(config);
        let parts = interface::parts(config, options.dtype, options.returned(), cache, &options.task);
        parts.iter().zip(graphs).try_for_each(|(part, graph)| self.check_volumes(part, graph, cache))
    }

    fn check_target(&self, target: usize, config: &Config, cache: CacheLayout) -> Result<()> {
        let longest = config.decoder.max_position_embeddings;
        match cache {
            CacheLayout::Static(capacity) => ensure!(
                target == capacity,
                "--cache static={capacity} requires --plan target={capacity}, as a step computes all of its cache (got \
                 target={target})"
            ),
            _ => ensure!(
                target <= longest,
                "--plan: target: expected at most {longest} (decoder.max_position_embeddings), found {target}"
            ),
        }
        Ok(())
    }

    /// Refuses sizes that would make a tensor larger than TensorRT's.
    fn check_volumes(&self, part: &Part, graph: &Definition, cache: CacheLayout) -> Result<()> {
        let most = |symbol: &str| {
            symbol.split(" + ").map(|term| Some(self.span(part.name, term, cache)?.most)).sum::<Option<usize>>()
        };
        for value in &graph.values {
            let Some(shape) = value.shape.iter().map(|dim| dim.size(most)).collect::<Option<Vec<usize>>>() else {
                continue;
            };
            let volume = shape.iter().fold(1_u128, |volume, &size| volume.saturating_mul(size as u128));
            ensure!(
                volume <= LARGEST_VOLUME,
                "--plan: {}: {} would be {shape:?} at the greatest sizes, {volume} elements; TensorRT's tensors have at \
                 most {LARGEST_VOLUME}",
                part.file,
                value.name
            );
        }
        Ok(())
    }

    /// The sizes of a symbol of a graph's shapes.
    pub(super) fn span(&self, graph: &str, symbol: &str, cache: CacheLayout) -> Option<Span> {
        let is_step = graph == "decoder_with_past";
        Some(match symbol {
            // Whatever is asked for, rows leave a batch as they finish, and beams begin as one.
            BATCH if is_step => Span { least: 1, ..self.batch },
            BATCH => self.batch,
            BEAMS => Span { least: 1, ..self.beams },
            SOURCE => self.source,
            TARGET => match (is_step, cache) {
                (false, _) => self.prompt,
                (true, CacheLayout::Static(_)) => Span { least: 1, usual: 1, most: self.prompt.most },
                (true, _) => Span::one(1),
            },
            PAST => {
                let most = self.target? - 1;
                Span { least: 1, usual: most.div_ceil(2), most }
            }
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_are_read() {
        let plan: Plan = "batch=1..16,source=1..1024,target=256,beams=1..4".parse().expect("the plan of the README");
        assert_eq!(plan.batch, Span { least: 1, usual: 16, most: 16 });
        assert_eq!(plan.source, Span { least: 1, usual: 512, most: 1024 });
        assert_eq!((plan.target, plan.prompt), (Some(256), Span::one(1)));
        let plan: Plan = "source=8..64..128, target=9, prompt=1..8".parse().expect("a plan without a batch");
        assert_eq!((plan.batch, plan.beams), (Span::one(1), Span::one(1)));
        assert_eq!(plan.source, Span { least: 8, usual: 64, most: 128 });
    }

    #[test]
    fn plans_are_shown_whole_and_read_again() {
        for (text, shown, left_out) in [
            (
                "batch=1..16,source=1..1024,target=256,beams=1..4",
                "batch=1..16..16,source=1..512..1024,target=256,beams=1..4..4,prompt=1",
                &["prompt"][..],
            ),
            ("source=9,target=9", "batch=1,source=9,target=9,beams=1,prompt=1", &["batch", "beams", "prompt"]),
            ("source=4,batch=2", "batch=2,source=4", &[]),
            ("source=4", "batch=1,source=4", &["batch"]),
        ] {
            let plan: Plan = text.parse().expect(text);
            assert_eq!((plan.to_string().as_str(), &plan.left_out()[..]), (shown, left_out), "{text}");
            let again: Plan = shown.parse().expect(shown);
            assert_eq!(again.to_string(), shown);
        }
    }

    #[test]
    fn what_is_no_plan_is_refused() {
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
            ("source=4,target=0", "target: expected the greatest size"),
            ("source=4,target=1..8", "target: expected the greatest size"),
            ("source=4,target=1", "more than prompt's 1"),
            ("source=4,target=8,beams=0..4", "beams: expected"),
            ("source=4,target=8,prompt=1..8", "more than prompt's 8"),
        ] {
            let error = text.parse::<Plan>().expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
