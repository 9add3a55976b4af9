//! A serving plan and what follows from it for TensorRT: the optimisation profiles of every graph, the options of ONNX
//! Runtime's providers, a script that builds engines, and wrappers by which ONNX Runtime runs those. The memory that it takes
//! is in `plan/memory.rs`.

mod memory;

use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use t5gemma_graphs::Options;
use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{
    self, BATCH, BEAMS, CacheLayout, DType, ENGINES, PAST, PROFILES_FILE, PROVIDER_OPTIONS, Part, Ports, SOURCE, TARGET,
};
use t5gemma_graphs::manifest::{GraphRecord, Manifest};
use t5gemma_graphs::onnx::Definition;
use t5gemma_graphs::task::Task;

use crate::check::{LARGEST_VOLUME, WITH_FLOAT8};
use crate::proto;

pub use memory::{Bytes, Memory};

/// Name of the file with the profiles.
pub const PROFILES: &str = PROFILES_FILE;

/// Of each graph, by file, and of each of its inputs that vary: the least, usual and greatest shape.
pub type Profiles = BTreeMap<String, BTreeMap<String, [Vec<i64>; 3]>>;

/// The least, usual and greatest of a size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    least: usize,
    usual: usize,
    most: usize,
}

impl Span {
    fn one(size: usize) -> Span {
        Span { least: size, usual: size, most: size }
    }

    fn each(self) -> [usize; 3] {
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
    batch: Span,
    /// Tokens of a source, padding included.
    source: Span,
    /// Tokens of a target at most, prompt included; of models that generate.
    target: Option<usize>,
    /// Target rows of a source.
    beams: Span,
    /// Tokens given to the first decoder step.
    prompt: Span,
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

    /// The files that go into the model folder beside those of `manifest`, by name.
    pub(crate) fn files(
        &self,
        config: &Config,
        manifest: &Manifest,
        memory: &Memory,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        let graphs: Vec<(&str, &GraphRecord)> = (manifest.parts(config).iter())
            .map(|part| Ok((part.name, manifest.graphs.get(part.name).with_context(|| format!("no {}", part.file))?)))
            .collect::<Result<_>>()?;
        let mut profiles = Profiles::new();
        for (name, record) in &graphs {
            let ports = Ports { inputs: record.ports.inputs.clone(), outputs: Vec::new() };
            profiles.insert(record.file.clone(), self.profile(name, &ports, manifest.cache)?);
        }
        let json = |value: &Value| serde_json::to_string_pretty(value).map(|text| (text + "\n").into_bytes());
        let mut files = vec![
            (PROFILES.to_string(), json(&serde_json::to_value(&profiles)?)?),
            (PROVIDER_OPTIONS.to_string(), json(&options(&graphs, &profiles, manifest))?),
            ("build_engines.sh".to_string(), script(&graphs, &profiles, manifest)?.into_bytes()),
            ("memory.txt".to_string(), (memory.to_string() + &note(manifest)).into_bytes()),
        ];
        for (name, record) in &graphs {
            let stem = stem(record);
            let (engine, graph) = (format!("{ENGINES}/{stem}.plan"), &record.file);
            files.push((format!("{stem}_ctx.onnx"), proto::wrapper(name, &engine, graph, &record.ports)));
        }
        Ok(files)
    }

    /// The sizes of a symbol of a graph's shapes.
    fn span(&self, graph: &str, symbol: &str, cache: CacheLayout) -> Option<Span> {
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

    /// The least, usual and greatest shape of each input that varies.
    fn profile(&self, graph: &str, ports: &Ports, cache: CacheLayout) -> Result<BTreeMap<String, [Vec<i64>; 3]>> {
        let varies = ports.inputs.iter().filter(|port| port.shape.iter().any(|dim| dim.as_fixed().is_none()));
        varies
            .map(|port| {
                let shape = |of: usize| {
                    let size = |symbol: &str| Some(self.span(graph, symbol, cache)?.each()[of]);
                    let sizes = port.shape.iter().map(|dim| dim.size(size).map(|size| size as i64));
                    let sizes = sizes.collect::<Option<Vec<_>>>();
                    sizes.with_context(|| format!("--plan: {graph}: {}: a size that no plan tells", port.name))
                };
                Ok((port.name.clone(), [shape(0)?, shape(1)?, shape(2)?]))
            })
            .collect()
    }
}

fn stem(record: &GraphRecord) -> &str {
    record.file.strip_suffix(".onnx").unwrap_or(&record.file)
}

/// What the greatest sizes do not tell of the GPUs that are needed.
fn note(manifest: &Manifest) -> String {
    match has_float8(manifest) {
        true => format!("\nThe engines compute in fp8, which {WITH_FLOAT8}.\n"),
        false => String::new(),
    }
}

fn has_float8(manifest: &Manifest) -> bool {
    manifest.weights.tensors.iter().any(|tensor| tensor.dtype == DType::Float8E4M3FN)
}

fn sizes(shape: &[i64]) -> String {
    shape.iter().map(i64::to_string).collect::<Vec<_>>().join("x")
}

/// The shapes of all inputs, the `of`-th of each profile, as TensorRT's tools and providers read them.
fn shapes(profile: &BTreeMap<String, [Vec<i64>; 3]>, of: usize) -> String {
    profile.iter().map(|(name, spans)| format!("{name}:{}", sizes(&spans[of]))).collect::<Vec<_>>().join(",")
}

/// Room for the builder's choices.
const WORKSPACE: u64 = 16 << 30;

/// Options of ONNX Runtime's providers, by provider and graph. Paths are relative to the model folder.
fn options(graphs: &[(&str, &GraphRecord)], profiles: &Profiles, manifest: &Manifest) -> Value {
    let (mut tensorrt, mut rtx) = (Map::new(), Map::new());
    for (name, record) in graphs {
        let profile = &profiles[&record.file];
        let stem = stem(record);
        let mut options = json!({
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": ENGINES,
            "trt_engine_cache_prefix": stem,
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": ENGINES,
            "trt_profile_min_shapes": shapes(profile, 0),
            "trt_profile_opt_shapes": shapes(profile, 1),
            "trt_profile_max_shapes": shapes(profile, 2),
            "trt_max_workspace_size": WORKSPACE.to_string(),
            "trt_builder_optimization_level": "4",
            "trt_auxiliary_streams": "0",
        });
        // What does not fit a protobuf cannot be handed to the parser inside one.
        if manifest.weights.record.bytes > 2_000_000_000 {
            options["trt_load_user_initializer"] = "1".into();
        }
        tensorrt.insert(name.to_string(), options);
        let options = json!({
            "nv_profile_min_shapes": shapes(profile, 0),
            "nv_profile_opt_shapes": shapes(profile, 1),
            "nv_profile_max_shapes": shapes(profile, 2),
            "nv_runtime_cache_path": ENGINES,
        });
        rtx.insert(name.to_string(), options);
    }
    json!({"tensorrt": tensorrt, "nv-tensorrt-rtx": rtx})
}

/// The lines of the script by which it refuses a GPU that cannot compute as the graphs say.
fn needed(manifest: &Manifest) -> String {
    if !has_float8(manifest) {
        return String::new();
    }
    format!(
        r#"case ${{gpu##*, }} in [0-7].*|8.[0-8])
    echo "build_engines.sh: the graphs compute in fp8, which {WITH_FLOAT8}" >&2
    echo "  expected: compute capability 8.9 or up" >&2
    echo "  found:    $gpu" >&2
    exit 1;;
esac
"#
    )
}

/// The script that builds engines with `trtexec`.
fn script(graphs: &[(&str, &GraphRecord)], profiles: &Profiles, manifest: &Manifest) -> Result<String> {
    let mut script = format!(
        r#"#!/usr/bin/env bash
# Builds an engine for each graph of this folder with TensorRT's trtexec, for a GPU of this machine, into {ENGINES}/.
# What is built already is left as it is. What was built of other graphs, by another TensorRT or for another GPU is refused:
# --force builds it anew.
#
#   bash build_engines.sh [--force] [--engines DIR] [option of trtexec ...]
#
# --engines DIR writes DIR/{ENGINES}/ and the wrappers of the engines into DIR instead, for a folder that cannot be written;
# `t5gemma --engines DIR` finds them there. --device=N, of trtexec, is the GPU by nvidia-smi's number; the first without it.
# ONNX Runtime, and t5gemma with it, runs engines of TensorRT 10; those of 11 are for other programs.
set -euo pipefail
here=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)

fail() {{ echo "build_engines.sh: $1" >&2; exit "${{2-1}}"; }}
force='' out=$here
while [ $# -gt 0 ]; do
    case $1 in
        --force) force=1 ;;
        --engines=*) out=${{1#*=}} ;;
        --engines) [ $# -gt 1 ] || fail "--engines: expected a folder, found none" 2; out=$2; shift ;;
        -h|--help) sed -n '2,/^set/s/^# \{{0,1\}}//p' "${{BASH_SOURCE[0]}}"; exit ;;
        *) break ;;
    esac
    shift
done
[ -n "$out" ] || fail "--engines: expected a folder, found none" 2
for tool in trtexec nvidia-smi; do
    command -v "$tool" >/dev/null || fail "$tool is not installed or not in PATH"
done

# trtexec counts the GPUs that CUDA shows it; by the bus, as nvidia-smi does.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
device=0 previous=''
for argument in "$@"; do
    case $argument in
        --force|--engines|--engines=*) fail "$argument: expected before the options of trtexec" 2 ;;
        --device=*) device=${{argument#*=}} ;;
        *) if [ "$previous" = --device ]; then device=$argument; fi ;;
    esac
    previous=$argument
done
case $device in ''|*[!0-9]*) fail "--device: expected the number of a GPU, found '$device'" 2 ;; esac
if [ -n "${{CUDA_VISIBLE_DEVICES-}}" ]; then
    IFS=, read -r -a visible <<< "$CUDA_VISIBLE_DEVICES"
    [ "$device" -lt "${{#visible[@]}}" ] ||
        fail "--device: expected a GPU of CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES, found $device"
    device=${{visible[$device]}}
fi
gpus=$(nvidia-smi -i "$device" --query-gpu=name,compute_cap --format=csv,noheader) ||
    fail "nvidia-smi does not know the GPU $device: $gpus"
# Read whole before the first line is taken: what writes into a pipe that is closed early fails.
gpu=$(sed -n 1p <<< "$gpus")
[ -n "$gpu" ] || fail "nvidia-smi says nothing of the GPU $device"
{needed}told=$(trtexec --help 2>&1) || true
version=$(sed -n 's/.*TensorRT[.v ]*\([0-9][0-9.]*\).*/\1/p' <<< "$told" | sed -n 1p)
case $version in
    1[1-9]*) echo "build_engines.sh: engines of TensorRT $version cannot be run by ONNX Runtime and t5gemma, which need 10" >&2 ;;
esac
mkdir -p "$out/{ENGINES}" || fail "$out/{ENGINES} cannot be made; name another folder with --engines DIR"
[ -w "$out/{ENGINES}" ] || fail "$out/{ENGINES} cannot be written; name another folder with --engines DIR"
cd "$out"

part=''
trap '[ -z "$part" ] || rm -f "$part"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

build() {{
    local stem=$1 hash=$2 plan={ENGINES}/$1.plan; shift 2
    local stamp="graph $hash, weights {weights}, TensorRT ${{version:-unknown}}, $gpu"
    if [ "$out" != "$here" ] && ! cmp -s "$here/${{stem}}_ctx.onnx" "${{stem}}_ctx.onnx"; then
        cp "$here/${{stem}}_ctx.onnx" "${{stem}}_ctx.onnx"
    fi
    if [ -e "$plan" ] && [ -z "$force" ]; then
        if [ "$(cat "$plan.stamp" 2>/dev/null)" = "$stamp" ]; then echo "$plan is built"; return; fi
        echo "build_engines.sh: $plan was built for something else:" >&2
        echo "  expected: $stamp" >&2
        echo "  found:    $(cat "$plan.stamp" 2>/dev/null || echo nothing said)" >&2
        echo "  remove it, or build it anew with --force" >&2
        exit 1
    fi
    echo "building $plan"
    part=$plan.part
    trtexec --onnx="$here/$stem.onnx" --saveEngine="$part" --timingCacheFile={ENGINES}/timing.cache "$@"
    [ -s "$part" ] || fail "trtexec has written no engine for $stem.onnx"
    rm -f "$plan.stamp"
    mv "$part" "$plan"
    part=''
    printf '%s\n' "$stamp" > "$plan.stamp"
}}

# The types are in the graphs; TensorRT 10 has to be told, later ones know no other way.
typed=(--stronglyTyped)
case $version in 1[1-9]*) typed=();; esac

"#,
        weights = manifest.weights.record.sha256,
        needed = needed(manifest),
    );
    for (_, record) in graphs {
        let profile = &profiles[&record.file];
        writeln!(
            script,
            "build {} {} \\\n    --minShapes={} \\\n    --optShapes={} \\\n    --maxShapes={} \\\n    --builderOptimizationLevel=4 \\\n    --memPoolSize=workspace:{} ${{typed[@]+\"${{typed[@]}}\"}} \"$@\"",
            stem(record),
            record.record.sha256,
            shapes(profile, 0),
            shapes(profile, 1),
            shapes(profile, 2),
            WORKSPACE >> 20
        )?;
    }
    Ok(script)
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
