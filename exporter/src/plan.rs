//! A serving plan and what follows from it for TensorRT: the optimisation profiles of every graph, the options of ONNX
//! Runtime's providers, a script that builds engines, wrappers by which ONNX Runtime runs those, and the memory it all takes.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::str::FromStr;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use t5gemma_graphs::config::Config;
use t5gemma_graphs::interface::{
    BATCH, BEAMS, CacheLayout, DType, ENGINES, PAST, PROFILES_FILE, PROVIDER_OPTIONS, Ports, SOURCE, TARGET,
};
use t5gemma_graphs::manifest::{GraphRecord, Manifest};

use crate::check::WITH_FLOAT8;
use crate::proto;

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

/// What is going to be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Sources in a batch.
    batch: Span,
    /// Tokens of a source, padding included.
    source: Span,
    /// Tokens of a target at most, prompt included.
    target: usize,
    /// Target rows of a source.
    beams: Span,
    /// Tokens given to the first decoder step.
    prompt: Span,
}

impl FromStr for Plan {
    type Err = String;

    /// `batch=1..16,source=1..1024,target=256,beams=1..4`, also `batch=1..4..16` with what is usual in the middle.
    fn from_str(text: &str) -> Result<Plan, String> {
        let mut given = BTreeMap::new();
        for part in text.split(',') {
            let (name, sizes) = part.split_once('=').ok_or_else(|| format!("expected NAME=SIZE, found {part:?}"))?;
            let (name, known) = (name.trim(), ["batch", "source", "target", "beams", "prompt"]);
            if !known.contains(&name) {
                return Err(format!("expected one of {}, found {name:?}", known.join(", ")));
            }
            if given.insert(name, span(name, sizes.trim())?).is_some() {
                return Err(format!("{name} is given twice"));
            }
        }
        let needed = |name: &str| given.get(name).copied().ok_or_else(|| format!("expected {name}=…, found none"));
        let or_one = |name: &str| given.get(name).copied().unwrap_or(Span::one(1));
        let plan = Plan {
            batch: or_one("batch"),
            source: needed("source")?,
            target: needed("target")?.most,
            beams: or_one("beams"),
            prompt: or_one("prompt"),
        };
        if plan.target < plan.prompt.most + 1 {
            return Err(format!("target: expected more than prompt's {}, found {}", plan.prompt.most, plan.target));
        }
        Ok(plan)
    }
}

fn span(name: &str, text: &str) -> Result<Span, String> {
    let wrong =
        || format!("{name}: expected N, LEAST..MOST or LEAST..USUAL..MOST of 1 or more, ascending, found {text:?}");
    let sizes: Vec<usize> = text.split("..").map(|size| size.parse().map_err(|_| wrong())).collect::<Result<_, _>>()?;
    let span = match sizes[..] {
        [size] => Span::one(size),
        // Kernels are chosen for what is usual: batches are filled, sources and prompts seldom as long as they may be.
        [least, most] if matches!(name, "batch" | "beams") => Span { least, usual: most, most },
        [least, most] => Span { least, usual: least.max(most / 2), most },
        [least, usual, most] => Span { least, usual, most },
        _ => return Err(wrong()),
    };
    match 1 <= span.least && span.least <= span.usual && span.usual <= span.most {
        true => Ok(span),
        false => Err(wrong()),
    }
}

/// A row of the memory table.
struct Memory {
    what: &'static str,
    bytes: u64,
}

impl Plan {
    /// Refuses what the model cannot serve.
    pub(crate) fn check(&self, config: &Config, cache: CacheLayout) -> Result<()> {
        let (source, target) = (config.encoder.max_position_embeddings, config.decoder.max_position_embeddings);
        let most = self.source.most;
        ensure!(
            most <= source,
            "--plan: source: expected at most {source} (encoder.max_position_embeddings), found {most}"
        );
        let (most, limit) = match cache {
            CacheLayout::Static(capacity) => (capacity, "the capacity of the cache"),
            _ => (target, "decoder.max_position_embeddings"),
        };
        ensure!(self.target <= most, "--plan: target: expected at most {most} ({limit}), found {}", self.target);
        Ok(())
    }

    /// The files that go into the model folder beside those of `manifest`, by name.
    pub(crate) fn files(&self, config: &Config, manifest: &Manifest) -> Result<Vec<(String, Vec<u8>)>> {
        let graphs: Vec<(&str, &GraphRecord)> = ["encoder", "decoder", "decoder_with_past"]
            .into_iter()
            .map(|name| Ok((name, manifest.graphs.get(name).with_context(|| format!("no graph {name}"))?)))
            .collect::<Result<_>>()?;
        let mut profiles = Profiles::new();
        for (name, record) in &graphs {
            let ports = Ports { inputs: record.ports.inputs.clone(), outputs: Vec::new() };
            profiles.insert(record.file.clone(), self.profile(name, &ports, manifest.cache)?);
        }
        let json = |value: &Value| serde_json::to_string_pretty(value).map(|text| (text + "\n").into_bytes());
        let memory = self.memory(config, manifest);
        let mut files = vec![
            (PROFILES.to_string(), json(&serde_json::to_value(&profiles)?)?),
            (PROVIDER_OPTIONS.to_string(), json(&options(&graphs, &profiles, manifest))?),
            ("build_engines.sh".to_string(), script(&graphs, &profiles, manifest)?.into_bytes()),
            ("memory.txt".to_string(), (table(&memory) + &note(manifest)).into_bytes()),
        ];
        for (name, record) in &graphs {
            let stem = stem(record);
            let (engine, graph) = (format!("{ENGINES}/{stem}.plan"), &record.file);
            files.push((format!("{stem}_ctx.onnx"), proto::wrapper(name, &engine, graph, &record.ports)));
        }
        Ok(files)
    }

    /// The least, usual and greatest shape of each input that varies.
    fn profile(&self, graph: &str, ports: &Ports, cache: CacheLayout) -> Result<BTreeMap<String, [Vec<i64>; 3]>> {
        let is_step = graph == "decoder_with_past";
        // Whatever is asked for, rows leave a batch as they finish, and beams begin as one.
        let down_to_one = |span: Span| if is_step { Span { least: 1, ..span } } else { span };
        let first = Span { least: 1, ..self.beams };
        let new = match (is_step, cache) {
            (false, _) => self.prompt,
            (true, CacheLayout::Static(_)) => Span { least: 1, usual: 1, most: self.prompt.most },
            (true, _) => Span::one(1),
        };
        let most = self.target - 1;
        let size = |symbol: &str, of: usize| {
            let span = match symbol {
                BATCH => down_to_one(self.batch),
                BEAMS => first,
                SOURCE => self.source,
                TARGET => new,
                PAST => Span { least: 1, usual: most.div_ceil(2), most },
                _ => return None,
            };
            Some(span.each()[of])
        };
        let varies = ports.inputs.iter().filter(|port| port.shape.iter().any(|dim| dim.as_fixed().is_none()));
        varies
            .map(|port| {
                let shape = |of: usize| {
                    let sizes =
                        port.shape.iter().map(|dim| dim.size(|symbol| size(symbol, of)).map(|size| size as i64));
                    let sizes = sizes.collect::<Option<Vec<_>>>();
                    sizes.with_context(|| format!("--plan: {graph}: {}: a size that no plan tells", port.name))
                };
                Ok((port.name.clone(), [shape(0)?, shape(1)?, shape(2)?]))
            })
            .collect()
    }

    /// What the greatest batch takes, as far as it follows from shapes.
    fn memory(&self, config: &Config, manifest: &Manifest) -> Vec<Memory> {
        let (encoder, decoder, number) = (&config.encoder, &config.decoder, manifest.dtype.size());
        let (batch, source) = (self.batch.most, self.source.most);
        let rows = batch * self.beams.most;
        let bytes = |numbers: usize, size: usize| (numbers * size) as u64;
        let of = |graph: &str| -> u64 {
            let named = &manifest.graphs[graph].weights;
            let tensors = manifest.weights.tensors.iter().filter(|tensor| named.contains(&tensor.name));
            tensors.map(|tensor| tensor.bytes).sum()
        };
        let token = decoder.num_key_value_heads * decoder.head_dim * 2 * decoder.layers.len();
        let capacity = match manifest.cache {
            CacheLayout::Static(capacity) => capacity,
            _ => self.target,
        };
        // A step reads one and writes another, and so does a change of rows.
        let own = 2 * bytes(rows * capacity * token, number);
        let scores = batch * encoder.num_attention_heads * source * source;
        let wide = batch * source * (2 * encoder.intermediate_size + 4 * encoder.hidden_size);
        vec![
            Memory { what: "weights of the encoder's engine", bytes: of("encoder") },
            Memory { what: "weights of the first decoder engine", bytes: of("decoder") },
            Memory { what: "weights of the step's engine", bytes: of("decoder_with_past") },
            Memory { what: "keys and values of targets, twice", bytes: own },
            Memory { what: "keys and values of sources", bytes: bytes(batch * source * token, number) },
            Memory { what: "hidden states", bytes: bytes(batch * source * encoder.hidden_size, number) },
            Memory {
                what: "logits",
                bytes: bytes(rows * manifest.kept_tokens.unwrap_or(decoder.vocab_size), DType::Float32.size()),
            },
            Memory {
                what: "scratch of an encoder layer (estimate)",
                bytes: bytes(scores, DType::Float32.size() + number) + bytes(wide, number),
            },
        ]
    }
}

fn stem(record: &GraphRecord) -> &str {
    record.file.strip_suffix(".onnx").unwrap_or(&record.file)
}

fn table(memory: &[Memory]) -> String {
    let mut text = String::new();
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    for Memory { what, bytes } in memory {
        let _ = writeln!(text, "{what:<42} {:>9.3} GB", gigabytes(*bytes));
    }
    let _ = writeln!(text, "{:<42} {:>9.3} GB", "in all", gigabytes(memory.iter().map(|row| row.bytes).sum()));
    text + "\nFrom shapes, at the greatest sizes of the plan; engines may hold a table that is both embedding and head twice,\nand building one takes about twice its weights.\n"
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
# Builds an engine for each graph of this folder with TensorRT's trtexec, for the GPU of this machine, into {ENGINES}/.
# What is built already is left as it is. What was built of other graphs, by another TensorRT or for another GPU is refused:
# `--force` builds it anew.
#
#   bash build_engines.sh [--force] [option of trtexec ...]
set -euo pipefail
cd "$(dirname "${{BASH_SOURCE[0]}}")"

force=
if [ "${{1-}}" = --force ]; then force=1; shift; fi
for tool in trtexec nvidia-smi; do
    command -v "$tool" >/dev/null || {{ echo "build_engines.sh: $tool is not installed or not in PATH" >&2; exit 1; }}
done
gpu=$(nvidia-smi --query-gpu=name,compute_cap --format=csv,noheader | head -n 1)
{needed}version=$(trtexec --help 2>&1 | sed -n 's/.*TensorRT[.v ]*\([0-9][0-9.]*\).*/\1/p' | head -n 1)
mkdir -p {ENGINES}

build() {{
    local stem=$1 hash=$2 plan={ENGINES}/$1.plan; shift 2
    local stamp="graph $hash, weights {weights}, TensorRT ${{version:-unknown}}, $gpu"
    if [ -e "$plan" ] && [ -z "$force" ]; then
        if [ "$(cat "$plan.stamp" 2>/dev/null)" = "$stamp" ]; then echo "$plan is built"; return; fi
        echo "build_engines.sh: $plan was built for something else:" >&2
        echo "  expected: $stamp" >&2
        echo "  found:    $(cat "$plan.stamp" 2>/dev/null || echo nothing said)" >&2
        echo "  remove it, or build it anew with --force" >&2
        exit 1
    fi
    echo "building $plan"
    trtexec --onnx="$stem.onnx" --saveEngine="$plan.part" --timingCacheFile={ENGINES}/timing.cache "$@"
    mv "$plan.part" "$plan"
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
        assert_eq!((plan.target, plan.prompt), (256, Span::one(1)));
        let plan: Plan = "source=8..64..128, target=9, prompt=1..8".parse().expect("a plan without a batch");
        assert_eq!((plan.batch, plan.beams), (Span::one(1), Span::one(1)));
        assert_eq!(plan.source, Span { least: 8, usual: 64, most: 128 });
    }

    #[test]
    fn what_is_no_plan_is_refused() {
        for (text, word) in [
            ("", "expected NAME=SIZE"),
            ("batch=1", "source"),
            ("source=4,target=8,width=2", "\"width\""),
            ("source=4,source=5,target=8", "twice"),
            ("source=0..4,target=8", "source: expected"),
            ("source=4..2,target=8", "source: expected"),
            ("source=1..2..3..4,target=8", "source: expected"),
            ("source=a,target=8", "source: expected"),
            ("source=4,target=8,prompt=1..8", "more than prompt's 8"),
        ] {
            let error = text.parse::<Plan>().expect_err(text);
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
