//! Exports for TensorRT, tested without TensorRT: `check` on our graphs and on graphs with planted faults, and the
//! files of a serving plan. `make check-rtx` tests whether NVIDIA's builder accepts the graphs; `generation.rs` tests
//! what they compute.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use t5gemma_exporter::{Checkpoint, Export, Finding, FindingKind, ServingPlan, Source, TensorRtVersion, check};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::{DType, Logits};
use t5gemma_graphs::onnx::Blocks;
use t5gemma_graphs::quantization::{Activations, Quantization};
use t5gemma_graphs::task::{Features, Pooling, Task};
use t5gemma_runtime::Model;

use crate::common::{
    FIXTURES, exported, exported_as, exported_for, exported_from, fixture, python, run, stdout, tests,
};

const PLAN: &str = "batch=1..4,source=1..32,target=32,beams=1..4";

/// A fixture as it would be served, with a growing cache or one of fixed capacity.
fn served(name: &str, dtype: DType, capacity: Option<usize>) -> PathBuf {
    let (target, logits, plan) =
        (Target::TensorRt, Logits::Candidates(8), Some(PLAN.parse::<ServingPlan>().expect("a plan")));
    let export = Export::default().target(target).dtype(dtype).capacity(capacity).logits(logits).plan(plan);
    exported_as(name, &format!("served-{dtype}-{capacity:?}"), export)
}

fn findings(path: &Path, version: &str) -> Vec<Finding> {
    let checked = check(path, version.parse::<TensorRtVersion>().expect("a version")).expect("ONNX files");
    assert!(checked.graphs.values().sum::<usize>() > 0, "{checked:?}");
    checked.findings
}

#[test]
fn every_graph_for_tensorrt_passes_the_check() {
    for name in FIXTURES {
        for dtype in [DType::BFloat16, DType::Float16, DType::Float32] {
            for capacity in [None, Some(32)] {
                assert_eq!(findings(&served(name, dtype, capacity), "tensorrt"), [], "{name} {dtype} {capacity:?}");
            }
        }
    }
    let blocks = Some(Blocks::integer(4, 16));
    let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
    for dtype in [DType::BFloat16, DType::Float16] {
        let export = Export::default().target(Target::TensorRt).dtype(dtype).quantization(quantization.clone());
        let model = exported_as("tiny-balanced", &format!("int4-{dtype}"), export);
        assert_eq!(findings(&model, "tensorrt"), [], "{dtype} and int4");
    }
    for version in ["tensorrt=10.0", "tensorrt=10.16", "tensorrt=11.1", "tensorrt=rtx"] {
        assert_eq!(findings(&served("tiny-balanced", DType::BFloat16, Some(32)), version), [], "{version}");
    }
    assert_eq!(findings(&exported("tiny-balanced"), "tensorrt=10.0"), [], "the portable graphs are standard too");
}

#[test]
fn graphs_for_onnx_runtime_do_not_pass() {
    for target in [Target::Cpu, Target::Cuda] {
        let found = findings(&exported_for("tiny-balanced", target), "tensorrt");
        let of = |operator: &str| found.iter().any(|finding| finding.operator.as_deref() == Some(operator));
        assert!(of("com.microsoft.GroupQueryAttention") && of("SimplifiedLayerNormalization"), "{target:?}");
        let capped =
            |finding: &Finding| finding.kind == FindingKind::Rule && finding.reason.contains("softcap is not 0");
        assert!(found.iter().any(capped), "{target:?}: {found:?}");
    }
}

#[test]
fn every_planted_fault_is_found_and_named() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let model = served("tiny-balanced", DType::BFloat16, Some(32));
    let graph = model.join("decoder_with_past_model.onnx");
    let planted: Value =
        serde_json::from_str(&python("plant_faults.py", [graph.as_path(), folder.path()])).expect("JSON");
    let planted = planted.as_array().expect("a list");
    assert!(planted.len() >= 15);
    for fault in planted {
        let (name, kind) = (fault[0].as_str().expect("a name"), fault[1].as_str().expect("a kind"));
        let found = findings(&folder.path().join(name), "tensorrt=10.3");
        let named = |finding: &&Finding| {
            finding.kind.name() == kind && fault[2].as_str().is_none_or(|node| finding.node == node)
        };
        assert!(found.iter().any(|finding| named(&finding)), "{name}: {found:?}");
        let path = folder.path().join(name);
        let output = run("t5gemma-export", ["check", "--target", "tensorrt=10.3", path.to_str().expect("UTF-8")], "");
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(String::from_utf8_lossy(&output.stdout).contains(kind), "{name}");
    }
    let huge = folder.path().join("huge.onnx");
    let file = fs::File::create(&huge).expect("a file can be made");
    file.set_len(i32::MAX as u64 + 1).expect("a file with a hole can be made");
    let found = check(&huge, TensorRtVersion::default()).expect("not read").findings;
    assert_eq!(found.iter().map(|finding| finding.kind).collect::<Vec<_>>(), [FindingKind::Size]);
}

/// The human-readable parts of a planned folder: the plan and its memory estimate.
#[test]
fn a_planned_folder_says_what_it_was_planned_for() {
    let plan = "batch=1..4..4,source=1..16..32,target=32,beams=1..4..4,prompt=1";
    let model = served("tiny-balanced", DType::BFloat16, Some(32));
    let manifest = |model: &Path| -> Value {
        serde_json::from_slice(&fs::read(model.join("manifest.json")).expect("a manifest")).expect("JSON")
    };
    assert_eq!(manifest(&model)["plan"], plan);
    let inspect = |model: &Path, rest: &[&str]| {
        stdout(run("t5gemma-export", [&["inspect", model.to_str().expect("UTF-8")], rest].concat(), ""))
    };
    assert!(inspect(&model, &[]).contains(&format!("  plan {plan}\n")));
    let shown: Value = serde_json::from_str(&inspect(&model, &["--json"])).expect("JSON");
    assert_eq!(shown["model"]["plan"], plan);
    let plain = exported_for("tiny-balanced", Target::TensorRt);
    assert!(manifest(&plain).get("plan").is_none() && !inspect(&plain, &[]).contains("plan"));

    let memory = fs::read_to_string(model.join("memory.txt")).expect("memory.txt");
    for word in
        [plan, "bfloat16", "cache static=32", "allowance", "GiB", "10^9", "second copy", "before and after the cap"]
    {
        assert!(memory.contains(word), "{word} in {memory}");
    }
    assert!(!memory.contains(" 0.000 "), "{memory}");
    // Each row equals the product in its formula.
    let unit = |name: &str| match name {
        "GB" => 1e9,
        "MB" => 1e6,
        "kB" => 1e3,
        _ => 1.0,
    };
    let mut checked = 0;
    for line in memory.lines().filter(|line| line.contains(" x ")) {
        let (told, formula) = line.split_at(58);
        let mut told = told.split_whitespace().rev();
        let (name, number) = (told.next().expect("a unit"), told.next().expect("a number"));
        let told = number.parse::<f64>().expect("a number") * unit(name);
        let product = |product: &str| -> f64 {
            let factors = product.split(" x ").map(|factor| factor.split_whitespace().next().expect("a factor"));
            factors.map(|factor| factor.parse::<f64>().expect("a number")).product()
        };
        let expected: f64 = formula.split(" + ").map(product).sum();
        assert!((told - expected).abs() <= 0.001 * unit(name), "{line}: {expected}");
        checked += 1;
    }
    assert_eq!(checked, 6, "{memory}");

    let checkpoint = fixture("tiny-balanced").join("checkpoint");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("out");
    let arguments = ["--target", "tensorrt", "--plan", "source=9,target=9", "--fits", "2GiB"];
    let paths = [checkpoint.to_str().expect("UTF-8"), out.to_str().expect("UTF-8")];
    let told = run("t5gemma-export", [&arguments[..], &paths].concat(), "");
    assert!(told.status.success());
    let told = String::from_utf8_lossy(&told.stderr);
    assert!(told.contains("beams=1,prompt=1 (batch, beams, prompt omitted, 1 by default)"), "{told}");
}

#[test]
fn plans_of_models_that_do_not_generate_pass_the_check() {
    for (name, task) in [
        ("encoder", Some(Task::FeatureExtraction(Features { pooling: Pooling::Mean, ..Features::default() }))),
        ("encoder", None),
        ("sequence-encoder", None),
        ("sequence-decoder", None),
        ("token-decoder", None),
    ] {
        let checkpoint = tests().join("fixtures/tasks").join(name).join("checkpoint");
        let (target, plan) =
            (Target::TensorRt, Some("batch=1..4,source=1..32".parse::<ServingPlan>().expect("a plan")));
        let label = format!("served-{name}-{task:?}");
        let export = Export::default().task(task).target(target).dtype(DType::BFloat16).plan(plan);
        let model = exported_from(&checkpoint, &label, export);
        assert_eq!(findings(&model, "tensorrt"), [], "{label}");
        let script = fs::read_to_string(model.join("build_engines.sh")).expect("build_engines.sh");
        assert!(script.contains("--maxShapes=attention_mask:4x32,input_ids:4x32"), "{label}");
        for file in ["model_ctx.onnx", "provider_options.json", "memory.txt"] {
            assert!(model.join(file).is_file(), "{label}: {file}");
        }
        python("check_wrappers.py", [model]);
    }
}

#[test]
fn tensors_beyond_tensorrts_volume_are_found() {
    let model = served("tiny-balanced", DType::BFloat16, None);
    let mut profiles: Value =
        serde_json::from_slice(&fs::read(model.join("profiles.json")).expect("profiles")).expect("JSON");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for entry in fs::read_dir(&model).expect("a folder") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, folder.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    assert_eq!(findings(folder.path(), "tensorrt"), []);
    for input in ["input_ids", "attention_mask"] {
        profiles["encoder_model.onnx"][input][2] = json!([10_000_000, 32]);
    }
    fs::write(folder.path().join("profiles.json"), profiles.to_string()).expect("written");
    let found = findings(folder.path(), "tensorrt");
    // The largest tensor, and the number of others.
    let [finding] = &found[..] else { panic!("{found:?}") };
    assert_eq!((finding.kind, finding.graph.as_str()), (FindingKind::Volume, "encoder_model.onnx"));
    let reason = &finding.reason;
    assert!(reason.contains("40960000000 elements of shape ") && reason.contains("others exceed it too"), "{reason}");
}

#[test]
fn versions_that_nobody_knows_are_refused() {
    let model = served("tiny-balanced", DType::BFloat16, Some(32));
    let model = model.to_str().expect("UTF-8");
    for version in ["tensorrt=12.1", "tensorrt=10.99", "tensorrt=9.0"] {
        let output = run("t5gemma-export", ["check", "--target", version, model], "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{version}: {error}");
        assert!(error.contains("10.0 to 10.16, 11.0 to 11.1"), "{version}: {error}");
    }
}

#[test]
fn profiles_that_do_not_cover_the_inputs_are_found() {
    let model = served("tiny-balanced", DType::BFloat16, Some(32));
    let whole: Value = serde_json::from_slice(&fs::read(model.join("profiles.json")).expect("profiles")).expect("JSON");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for entry in fs::read_dir(&model).expect("a folder") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, folder.path().join(path.file_name().expect("a name"))).expect("copied");
    }
    let (graph, input) = ("encoder_model.onnx", "input_ids");
    type Plant = fn(&mut Value);
    let faults: [(&str, &str, Plant); 5] = [
        ("left out", "profile", |profile| *profile = Value::Null),
        ("from nothing on", "empty", |profile| profile[0][1] = json!(0)),
        ("descending", "profile", |profile| profile[1][0] = json!(99)),
        ("of other axes", "profile", |profile| profile[2] = json!([1])),
        ("of a fixed size", "profile", |profile| profile[0] = json!([1, 1, 1])),
    ];
    for (name, kind, plant) in faults {
        let mut profiles = whole.clone();
        plant(&mut profiles[graph][input]);
        if profiles[graph][input].is_null() {
            profiles[graph].as_object_mut().expect("an object").remove(input);
        }
        fs::write(folder.path().join("profiles.json"), profiles.to_string()).expect("written");
        let found = findings(folder.path(), "tensorrt");
        assert!(
            found.iter().any(|f| f.kind.name() == kind && f.node == input && f.graph == graph),
            "{name}: {found:?}"
        );
    }
    let mut profiles = whole.clone();
    profiles[graph]["input_idz"] = profiles[graph][input].clone();
    fs::write(folder.path().join("profiles.json"), profiles.to_string()).expect("written");
    assert!(
        findings(folder.path(), "tensorrt").iter().any(|f| f.node == "input_idz" && f.kind == FindingKind::Profile)
    );
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let checkpoint = fixture("tiny-balanced").join("checkpoint");
    let checkpoint = checkpoint.to_str().expect("UTF-8");
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("out");
    let out = out.to_str().expect("UTF-8");
    for (arguments, code, word) in [
        (&["--target", "tensorrt", "--plan", "source=1..9999,target=9"][..], 2, "encoder.max_position_embeddings"),
        (&["--target", "tensorrt", "--plan", "source=9,target=9999"], 2, "decoder.max_position_embeddings"),
        (
            &["--target", "tensorrt", "--cache", "static=16", "--plan", "source=9,target=17"],
            2,
            "--cache static=16 requires --plan target=16 (got target=17)",
        ),
        (
            &["--target", "tensorrt", "--cache", "static=16", "--plan", "source=9,target=9"],
            2,
            "--cache static=16 requires --plan target=16",
        ),
        (
            &["--target", "tensorrt", "--plan", "batch=100000000,source=9,target=9"],
            2,
            "expected at most 2147483647 elements at the maximum sizes (TensorRT's limit), found ",
        ),
        (
            &["--target", "tensorrt", "--plan", "batch=2147483647,source=32,target=9,beams=2147483647"],
            2,
            "expected at most 2147483647 elements at the maximum sizes (TensorRT's limit), found ",
        ),
        (&["--target", "tensorrt", "--plan", "source=9,target=9", "--fits", "1MB"], 2, "in nvidia-smi"),
        (&["--target", "tensorrt", "--plan", "source=9,target=9", "--fits", "24"], 2, "such as 24GB"),
        (&["--target", "tensorrt", "--fits", "24GB"], 2, "--plan"),
        (&["--task", "feature-extraction", "--plan", "source=9"], 2, "--plan requires --target tensorrt"),
        (
            &["--target", "tensorrt", "--task", "feature-extraction", "--plan", "source=9,target=9"],
            2,
            "expected only batch and source for the task feature-extraction, found target",
        ),
        (
            &["--target", "tensorrt", "--task", "feature-extraction", "--plan", "source=9,prompt=1"],
            2,
            "expected only batch and source for the task feature-extraction, found prompt",
        ),
        (&["--target", "cuda", "--plan", "source=9,target=9"], 2, "--plan requires --target tensorrt"),
        (&["--target", "cuda", "--cache", "static=16"], 2, "--cache static=N requires --target tensorrt"),
        (&["--target", "tensorrt", "--cache", "static=99999"], 2, "--cache static=N: expected 1 to "),
        (&["--target", "tensorrt", "--candidates", "0"], 2, "--candidates: expected 1 to"),
        (
            &["--target", "tensorrt", "--quantize", "int8"],
            2,
            "--quantize int8 with target tensorrt requires --calibrate",
        ),
        (
            &["--target", "tensorrt", "--quantize", "int4", "--asymmetric"],
            2,
            "--asymmetric requires --target cpu or cuda",
        ),
        (&["--target", "tensorrt", "--quantize", "int4", "--block-size", "128"], 2, "--block-size: expected a divisor"),
        (&["--target", "tensorrt", "--cache", "16"], 2, "expected static=N"),
        (&["--target", "tensorrt", "--plan", "source=9"], 2, "expected target=N for the task text2text-generation"),
        (&["--target", "tensorrt", "--plan", "source=9,target=1..9"], 2, "target: expected the maximum"),
    ] {
        let output = run("t5gemma-export", [arguments, &[checkpoint, out]].concat(), "");
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {error}");
        assert!(error.contains(word), "{arguments:?}: {error}");
        assert!(!Path::new(out).exists());
    }
}

/// A shell script of this name.
#[cfg(unix)]
fn tool(folder: &Path, name: &str, text: &str) {
    use std::os::unix::fs::PermissionsExt;

    let path = folder.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("written");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("made executable");
}

/// Runs the script with a fake `trtexec` that only prints its arguments.
#[cfg(unix)]
#[test]
fn the_script_builds_once_and_refuses_what_is_stale() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let (model, tools) = (folder.path().join("model"), folder.path().join("tools"));
    fs::create_dir_all(&tools).expect("a folder");
    fs::create_dir_all(&model).expect("a folder");
    let script = model.join("build_engines.sh");
    fs::copy(served("tiny-balanced", DType::BFloat16, Some(32)).join("build_engines.sh"), &script).expect("copied");
    let tool = |name: &str, text: &str| tool(&tools, name, text);
    let trtexec = |version: &str| {
        let engine = r#"for a in "$@"; do case $a in --saveEngine=*) echo engine > "${a#--saveEngine=}"; esac; done"#;
        tool("trtexec", &format!("echo '&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] '\"$@\"\n{engine}"));
    };
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").expect("a PATH"));
    let bash = |arguments: &[&str]| {
        let output = Command::new("bash").arg(&script).args(arguments).env("PATH", &path).output().expect("bash runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    };
    let missing = Command::new("bash").arg(&script).env("PATH", "/usr/bin:/bin").output().expect("bash runs");
    assert!(!missing.status.success());
    assert!(String::from_utf8_lossy(&missing.stderr).contains("trtexec is not installed"));

    tool("nvidia-smi", "echo 'NVIDIA H100 80GB HBM3, 9.0'");
    trtexec("101600");
    let (code, out, error) = bash(&["--verbose"]);
    assert_eq!(code, Some(0), "{out}{error}");
    for word in ["--stronglyTyped", "--verbose", "--minShapes=", "past_key_values.0.decoder.key:16x", "x32x"] {
        assert!(out.contains(word), "{word} in {out}");
    }
    for stem in ["encoder_model", "decoder_model", "decoder_with_past_model"] {
        assert!(model.join(format!("engines/{stem}.plan")).is_file(), "{stem}");
    }
    let (code, out, _) = bash(&[]);
    assert_eq!((code, out.matches("is up to date").count(), out.matches("RUNNING").count()), (Some(0), 3, 0), "{out}");
    trtexec("110100");
    let (code, _, error) = bash(&[]);
    assert!(code == Some(1) && error.contains("TensorRT 110100") && error.contains("TensorRT 101600"), "{error}");
    let (code, out, _) = bash(&["--force"]);
    assert!(code == Some(0) && !out.contains("--stronglyTyped"), "{out}");
    tool("nvidia-smi", "echo 'NVIDIA L4, 8.9'");
    let (code, _, error) = bash(&[]);
    assert!(code == Some(1) && error.contains("NVIDIA L4") && error.contains("H100"), "{error}");
}

/// A planned model's script and wrappers in a folder, with a fake `trtexec` and `nvidia-smi`, and the script's output.
#[cfg(unix)]
struct Build {
    folder: tempfile::TempDir,
}

#[cfg(unix)]
impl Build {
    fn new() -> Build {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let build = Build { folder };
        for name in ["model", "tools"] {
            fs::create_dir_all(build.path(name)).expect("a folder");
        }
        let served = served("tiny-balanced", DType::BFloat16, Some(32));
        for name in
            ["build_engines.sh", "encoder_model_ctx.onnx", "decoder_model_ctx.onnx", "decoder_with_past_model_ctx.onnx"]
        {
            fs::copy(served.join(name), build.path("model").join(name)).expect("copied");
        }
        // Two GPUs, the second of which is printed late.
        build.tool(
            "nvidia-smi",
            "case \"$1$2\" in\n\
             -i0) echo 'NVIDIA H100 80GB HBM3, 9.0';;\n\
             -i1) echo 'NVIDIA L4, 8.9';;\n\
             -i*) echo 'No devices were found'; exit 6;;\n\
             *) echo 'NVIDIA H100 80GB HBM3, 9.0'; sleep 0.1; echo 'NVIDIA L4, 8.9';;\n\
             esac",
        );
        build.trtexec("101600", "echo engine > \"$engine\"");
        build
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tool(&self, name: &str, text: &str) {
        tool(&self.path("tools"), name, text);
    }

    /// Its help is longer than a pipe buffer, and its exit status is then not 0.
    fn trtexec(&self, version: &str, build: &str) {
        self.tool(
            "trtexec",
            &format!(
                "echo '&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] '\"$@\"\n\
                 if [ \"$1\" = --help ]; then seq 1 20000; exit 1; fi\n\
                 for a in \"$@\"; do case $a in --saveEngine=*) engine=${{a#--saveEngine=}}; esac; done\n{build}"
            ),
        );
    }

    /// Exit status, stdout and stderr.
    fn run(&self, arguments: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
        let path = format!("{}:{}", self.path("tools").display(), std::env::var("PATH").expect("a PATH"));
        let mut bash = Command::new("bash");
        bash.arg(self.path("model/build_engines.sh")).args(arguments).env("PATH", path).current_dir(self.folder.path());
        let output = bash.envs(variables.iter().copied()).output().expect("bash runs");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(folder)) else { return Vec::new() };
        let names = entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    }
}

#[cfg(unix)]
#[test]
fn engines_are_stamped_with_the_gpu_they_are_for() {
    for (arguments, variables, gpu) in [
        (&[][..], &[][..], "NVIDIA H100"),
        (&["--device=0"], &[], "NVIDIA H100"),
        (&["--device=1"], &[], "NVIDIA L4"),
        (&["--verbose", "--device", "1"], &[], "NVIDIA L4"),
        (&[], &[("CUDA_VISIBLE_DEVICES", "1")], "NVIDIA L4"),
        (&["--device=1"], &[("CUDA_VISIBLE_DEVICES", "1,0")], "NVIDIA H100"),
    ] {
        let build = Build::new();
        let (code, out, error) = build.run(arguments, variables);
        assert_eq!(code, Some(0), "{arguments:?} {variables:?}: {out}{error}");
        let stamp = fs::read_to_string(build.path("model/engines/encoder_model.plan.stamp")).expect("a stamp");
        assert!(stamp.contains(gpu) && stamp.contains("TensorRT 101600"), "{arguments:?} {variables:?}: {stamp}");
    }
    for (arguments, variables, code, word) in [
        (&["--device=7"][..], &[][..], 1, "nvidia-smi finds no GPU 7"),
        (&["--device=x"], &[], 2, "--device: expected the index of a GPU, found 'x'"),
        (&["--device=2"], &[("CUDA_VISIBLE_DEVICES", "1,0")], 1, "expected a GPU of CUDA_VISIBLE_DEVICES=1,0, found 2"),
        (&["--verbose", "--force"], &[], 2, "--force must come before the options of trtexec"),
        (&["--engines"], &[], 2, "--engines: expected a folder"),
    ] {
        let build = Build::new();
        let (found, _, error) = build.run(arguments, variables);
        assert!(found == Some(code) && error.contains(word), "{arguments:?} {variables:?}: {found:?} {error}");
        assert_eq!(build.names("model/engines"), [""; 0], "{arguments:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_build_that_fails_leaves_nothing_half_built() {
    for (name, text, code) in [
        ("it fails", "echo half > \"$engine\"; exit 3", 3),
        ("it writes nothing", "exit 0", 1),
        ("it is killed", "echo half > \"$engine\"; kill -TERM $PPID; sleep 0.1", 143),
    ] {
        let build = Build::new();
        build.trtexec("101600", text);
        let (found, _, error) = build.run(&[], &[]);
        assert_eq!(found, Some(code), "{name}: {error}");
        assert_eq!(build.names("model/engines"), [""; 0], "{name}");
    }
}

#[cfg(unix)]
#[test]
fn engines_can_lie_in_a_folder_of_their_own() {
    let build = Build::new();
    let before = build.names("model");
    let (code, out, error) = build.run(&["--engines", "of model", "--verbose"], &[]);
    assert_eq!(code, Some(0), "{out}{error}");
    assert_eq!(build.names("model"), before, "nothing is written into the model");
    let wrappers = ["decoder_model_ctx.onnx", "decoder_with_past_model_ctx.onnx", "encoder_model_ctx.onnx"];
    assert_eq!(build.names("of model"), [&wrappers[..], &["engines"]].concat());
    assert!(build.path("of model/engines/decoder_with_past_model.plan").is_file());
    let (code, out, _) = build.run(&["--engines=of model"], &[]);
    assert_eq!((code, out.matches("is up to date").count()), (Some(0), 3), "{out}");

    // The runtime looks there, and reports the problem before ONNX Runtime could.
    let model = served("tiny-balanced", DType::BFloat16, Some(32));
    let (model, engines) = (model.to_str().expect("UTF-8"), build.path("of model"));
    let engines = engines.to_str().expect("UTF-8");
    let states = build.path("states.npy");
    let opened = || {
        let arguments = ["encode", model, "--provider", "tensorrt", "--engines", engines, "-o"];
        let rest = [states.to_str().expect("UTF-8"), "text"];
        String::from_utf8_lossy(&run("t5gemma", [&arguments[..], &rest].concat(), "").stderr).into_owned()
    };
    assert!(opened().contains("the provider tensorrt cannot be used"), "{}", opened());
    let wrapper = build.path("of model/encoder_model_ctx.onnx");
    fs::write(&wrapper, "another").expect("written");
    assert!(opened().contains("a copy of the model's encoder_model_ctx.onnx"), "{}", opened());
    fs::copy(build.path("model/encoder_model_ctx.onnx"), &wrapper).expect("copied");
    build.trtexec("110100", "echo engine > \"$engine\"");
    let (code, _, error) = build.run(&["--force", "--engines", "of model"], &[]);
    assert!(code == Some(0) && error.contains("ONNX Runtime and t5gemma require TensorRT 10 (got 110100)"), "{error}");
    assert!(opened().contains("expected an engine of TensorRT 10"), "{}", opened());
    fs::write(build.path("of model/engines/encoder_model.plan.stamp"), "graph of another").expect("written");
    assert!(opened().contains("stamp: expected an engine of graph "), "{}", opened());
    let output = run("t5gemma", ["generate", model, "--engines", engines, "text"], "");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.code() == Some(2)
            && error.contains("--engines")
            && error.contains("requires the provider tensorrt or nv-tensorrt-rtx (got cpu)"),
        "{error}"
    );
}

/// With arbitrary ranges, since nothing runs.
#[cfg(unix)]
#[test]
fn a_plan_in_fp8_tells_the_gpus_that_have_none() {
    let observed = exported_as("tiny-balanced", "observed", Export::default().activations(Activations::Observed));
    let manifest: Value =
        serde_json::from_slice(&fs::read(observed.join("manifest.json")).expect("a manifest")).expect("JSON");
    let names = manifest["observed"].as_object().expect("an object").values();
    let names = names.flat_map(|names| names.as_array().expect("a list")).filter_map(Value::as_str);
    let ranges = Activations::Ranges(names.map(|name| (name.to_string(), 8.0)).collect());
    let blocks = Some(Blocks::float8());
    let quantization = Quantization { encoder: blocks, decoder: blocks, head: blocks, ..Quantization::default() };
    let (target, plan) = (Target::TensorRt, Some(PLAN.parse::<ServingPlan>().expect("a plan")));
    let export = Export::default().target(target).plan(plan).quantization(quantization).activations(ranges);
    let memory = |model: &Path| fs::read_to_string(model.join("memory.txt")).expect("memory.txt");
    let plain = served("tiny-balanced", DType::BFloat16, None);
    assert!(!memory(&plain).contains("fp8"));
    for dtype in [DType::BFloat16, DType::Float16, DType::Float32] {
        for capacity in [None, Some(32)] {
            let export = export.clone().dtype(dtype).capacity(capacity);
            let model = exported_as("tiny-balanced", &format!("served-fp8-{dtype}-{capacity:?}"), export);
            assert!(memory(&model).contains("fp8"));
            assert_eq!(findings(&model, "tensorrt"), [], "{dtype} {capacity:?}");
        }
    }
    let model = exported_as("tiny-balanced", &format!("served-fp8-{}-None", DType::BFloat16), export);
    let shown = stdout(run("t5gemma-export", ["inspect", model.to_str().expect("UTF-8")], ""));
    assert!(shown.contains("float8e4m3fn") && shown.contains("QuantizeLinear"), "{shown}");
    let checked = stdout(run("t5gemma-export", ["check", model.to_str().expect("UTF-8")], ""));
    assert!(checked.contains("encoder_model.onnx: computes in fp8"), "{checked}");

    let tools = tempfile::tempdir().expect("a temporary folder can be made");
    tool(tools.path(), "trtexec", "[ \"$*\" = --help ] || exit 3");
    let refused = |gpu: &str, model: &Path| {
        tool(tools.path(), "nvidia-smi", &format!("echo '{gpu}'"));
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let script = folder.path().join("build_engines.sh");
        fs::copy(model.join("build_engines.sh"), &script).expect("copied");
        let path = format!("{}:{}", tools.path().display(), std::env::var("PATH").expect("a PATH"));
        let output = Command::new("bash").arg(&script).env("PATH", &path).output().expect("bash runs");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let refused = error.contains("compute in fp8") && error.contains(gpu);
        // If not rejected earlier, the script gets as far as a failing trtexec.
        assert_eq!(output.status.code(), Some(if refused { 1 } else { 3 }), "{gpu}: {error}");
        assert_eq!(folder.path().join("engines").exists(), !refused, "{gpu}");
        refused
    };
    for (gpu, expected) in [
        ("NVIDIA A100-SXM4-80GB, 8.0", true),
        ("NVIDIA A10, 8.6", true),
        ("Orin, 8.7", true),
        ("Tesla T4, 7.5", true),
        ("NVIDIA L4, 8.9", false),
        ("NVIDIA H100 80GB HBM3, 9.0", false),
        ("NVIDIA B200, 10.0", false),
        ("NVIDIA GeForce RTX 5090, 12.0", false),
    ] {
        assert_eq!(refused(gpu, &model), expected, "{gpu}");
        assert!(!refused(gpu, &plain), "{gpu}");
    }
}

#[test]
fn wrappers_have_the_ports_of_their_graphs() {
    let model = served("tiny-balanced", DType::BFloat16, Some(32));
    stdout(run("t5gemma-export", ["check", model.to_str().expect("UTF-8"), "--json"], ""));
    python("check_wrappers.py", [model]);
}

#[test]
fn engines_that_another_provider_has_cached_do_not_concern_the_cpu() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let out = folder.path().join("model");
    let checkpoint = fixture("tiny-balanced").join("checkpoint");
    let export = Export::default().target(Target::TensorRt).dtype(DType::Float32);
    let source = Source::Checkpoint(Checkpoint::open(&checkpoint).expect("opens"));
    export.run(&source, &out).expect("exports");
    fs::create_dir(out.join("engines")).expect("a new folder");
    fs::write(out.join("engines/cache.stamp"), "provider tensorrt, of other graphs\n").expect("written");
    Model::open(&out).expect("the CPU reads no engines");
}
