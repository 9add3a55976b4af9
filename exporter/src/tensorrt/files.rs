//! The files of a serving plan: the optimization profiles of every graph, options for ONNX Runtime's providers, a
//! script that builds engines, the wrappers through which ONNX Runtime runs them, and the memory estimate as text.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use t5gemma_graphs::interface::{CacheLayout, DType, ENGINES, PROVIDER_OPTIONS, Port};
use t5gemma_graphs::manifest::{GraphRecord, Manifest};

use super::limits::FLOAT8_GPUS;
use super::memory::MemoryEstimate;
use super::plan::ServingPlan;
use super::profiles::{PROFILES, Profile, Profiles};
use crate::proto;

/// The template of the script that builds engines.
const BUILD_ENGINES: &str = include_str!("../../tensorrt/build_engines.sh");
/// Maximum scratch memory of the builder in bytes.
const WORKSPACE: u64 = 16 << 30;

/// The files that a plan adds to the model folder, by name.
pub fn files(plan: &ServingPlan, manifest: &Manifest, memory: &MemoryEstimate) -> Vec<(String, Vec<u8>)> {
    let graphs: Vec<(&str, &GraphRecord)> = (manifest.graph_specs().iter())
        .map(|part| (part.name, manifest.graphs.get(part.name).expect("the manifest has all graphs of its task")))
        .collect();
    let profiles: Profiles = (graphs.iter())
        .map(|(name, record)| (record.file.clone(), profile(plan, name, &record.ports.inputs, manifest.cache)))
        .collect();
    let json = |value: &Value| (serde_json::to_string_pretty(value).expect("values are JSON") + "\n").into_bytes();
    let mut files = vec![
        (PROFILES.to_string(), json(&json!(profiles))),
        (PROVIDER_OPTIONS.to_string(), json(&provider_options(&graphs, &profiles, manifest))),
        ("build_engines.sh".to_string(), script(&graphs, &profiles, manifest).into_bytes()),
        ("memory.txt".to_string(), (memory.to_string() + &gpu_note(manifest)).into_bytes()),
    ];
    for (name, record) in &graphs {
        let stem = stem(record);
        let (engine, graph) = (format!("{ENGINES}/{stem}.plan"), &record.file);
        files.push((format!("{stem}_ctx.onnx"), proto::wrapper(name, &engine, graph, &record.ports)));
    }
    files
}

/// The profiles of the inputs with a dynamic shape.
fn profile(plan: &ServingPlan, graph: &str, inputs: &[Port], cache: CacheLayout) -> BTreeMap<String, Profile> {
    let dynamic = inputs.iter().filter(|port| port.shape.iter().any(|dim| dim.as_fixed().is_none()));
    dynamic
        .map(|port| {
            let shape = |of: usize| {
                let size = |symbol: &str| Some(plan.range(graph, symbol, cache)?.min_opt_max()[of]);
                let sizes = port.shape.iter().map(|dim| dim.size(size).map(|size| size as i64));
                sizes.collect::<Option<Vec<_>>>().expect("a plan has a range for every symbol of an input")
            };
            (port.name.clone(), [shape(0), shape(1), shape(2)])
        })
        .collect()
}

/// The name of a graph's file without `.onnx`.
fn stem(record: &GraphRecord) -> &str {
    record.file.strip_suffix(".onnx").unwrap_or(&record.file)
}

/// A note on the GPUs that the engines require.
fn gpu_note(manifest: &Manifest) -> String {
    if !has_float8(manifest) {
        return String::new();
    }
    format!("\nThe engines compute in fp8, which requires {FLOAT8_GPUS}.\n")
}

fn has_float8(manifest: &Manifest) -> bool {
    manifest.weights.tensors.iter().any(|tensor| tensor.dtype == DType::Float8E4M3FN)
}

/// The shapes of all inputs as TensorRT's tools and providers read them, `input_ids:4x32,...`: the minimum, optimum or
/// maximum of each profile, as `of` is 0, 1 or 2.
fn shapes(profile: &BTreeMap<String, Profile>, of: usize) -> String {
    let sizes = |shape: &[i64]| shape.iter().map(i64::to_string).collect::<Vec<_>>().join("x");
    profile.iter().map(|(name, shapes)| format!("{name}:{}", sizes(&shapes[of]))).collect::<Vec<_>>().join(",")
}

/// Options of ONNX Runtime's providers, by provider and graph. Paths are relative to the model folder.
fn provider_options(graphs: &[(&str, &GraphRecord)], profiles: &Profiles, manifest: &Manifest) -> Value {
    let (mut tensorrt, mut rtx) = (Map::new(), Map::new());
    for (name, record) in graphs {
        let profile = &profiles[&record.file];
        let mut options = json!({
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": ENGINES,
            "trt_engine_cache_prefix": stem(record),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": ENGINES,
            "trt_profile_min_shapes": shapes(profile, 0),
            "trt_profile_opt_shapes": shapes(profile, 1),
            "trt_profile_max_shapes": shapes(profile, 2),
            "trt_max_workspace_size": WORKSPACE.to_string(),
            "trt_builder_optimization_level": "4",
            "trt_auxiliary_streams": "0",
        });
        // Weights above the limit of protobuf, 2 GiB, cannot be passed to the parser inside the model.
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

/// The script that builds engines with `trtexec`.
fn script(graphs: &[(&str, &GraphRecord)], profiles: &Profiles, manifest: &Manifest) -> String {
    let build = |record: &GraphRecord| {
        let profile = &profiles[&record.file];
        let options = [
            format!("--minShapes={}", shapes(profile, 0)),
            format!("--optShapes={}", shapes(profile, 1)),
            format!("--maxShapes={}", shapes(profile, 2)),
            "--builderOptimizationLevel=4".to_string(),
            format!("--memPoolSize=workspace:{} ${{typed[@]+\"${{typed[@]}}\"}} \"$@\"", WORKSPACE >> 20),
        ];
        format!("build {} {} \\\n    {}\n", stem(record), record.record.sha256, options.join(" \\\n    "))
    };
    let builds: String = graphs.iter().map(|(_, record)| build(record)).collect();
    BUILD_ENGINES
        .replace("@ENGINES@", ENGINES)
        .replace("@WEIGHTS@", &manifest.weights.record.sha256)
        .replace("@USES_FP8@", if has_float8(manifest) { "true" } else { "false" })
        .replace("@FP8_GPUS@", FLOAT8_GPUS)
        .replace("@BUILDS@", &builds)
}
