//! Providers that are not there: each is an error that names what is missing and what has it, and nothing is computed by the
//! CPU instead. What works with a GPU is `make gpu-check`.

use t5gemma_exporter::{Export, ServingPlan};
use t5gemma_graphs::Target;
use t5gemma_graphs::interface::DType;

use crate::common::{demo, exported_as, exported_for, run, stdout};

/// Exit status and stderr of `t5gemma generate` with a provider that this ONNX Runtime, made for CPUs, does not have.
fn refused(arguments: &[&str]) -> (Option<i32>, String) {
    let model = demo();
    let model = model.to_str().expect("temporary paths are UTF-8");
    let output = run("t5gemma", [&["generate", model], arguments].concat(), "May 3rd.\n");
    assert!(output.stdout.is_empty(), "{arguments:?}: nothing is answered");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_provider_that_is_not_there_is_an_error_with_its_package() {
    for (provider, package) in [
        ("cuda", "onnxruntime-gpu"),
        ("tensorrt", "onnxruntime-gpu"),
        ("nv-tensorrt-rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    ] {
        let (code, error) = refused(&["--provider", provider]);
        assert_eq!(code, Some(1), "{provider}: {error}");
        assert!(error.contains(provider) && error.contains(package), "{provider}: {error}");
        assert!(error.lines().count() <= 2, "{provider}: {error}");
    }
}

/// Whatever part of a model is opened first, and by whichever provider it is computed.
#[test]
fn errors_name_the_provider_that_was_asked_for() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let file = folder.path().join("states.npy");
    let file = file.to_str().expect("temporary paths are UTF-8");
    let plan = Some("source=1..32,target=32".parse::<ServingPlan>().expect("a plan"));
    let planned = Export::default().target(Target::TensorRt).plan(plan);
    for model in [
        exported_for("tiny-balanced", Target::Cuda),
        exported_for("tiny-balanced", Target::TensorRt),
        exported_as("tiny-balanced", "providers-planned", planned),
    ] {
        let is_planned = model.join("profiles.json").exists();
        let model = model.to_str().expect("temporary paths are UTF-8");
        for provider in ["cuda", "tensorrt", "nv-tensorrt-rtx"] {
            for (command, rest) in [
                ("generate", &["text"][..]),
                ("score", &[]),
                ("encode", &["-o", file, "text"]),
                ("bench", &[]),
                ("build-engines", &[]),
            ] {
                if command == "build-engines" && (provider == "cuda" || !is_planned) {
                    continue;
                }
                let output = run("t5gemma", [&[command, model, "--provider", provider], rest].concat(), "");
                let error = String::from_utf8_lossy(&output.stderr);
                let expected = format!("the provider {provider} cannot be used");
                assert!(error.contains(&expected), "{command} {model} with {provider}: {error}");
                assert_eq!(error.contains("TensorRT 10"), provider == "tensorrt", "{command} with {provider}: {error}");
            }
        }
    }
}

#[test]
fn what_means_nothing_to_a_provider_is_refused() {
    for (arguments, code, word) in [
        (&["--device", "1"][..], 2, "--device 1 requires a provider with devices and options"),
        (&["--provider-option", "device_id=0"], 2, "--provider-option device_id=0 requires a provider"),
        (&["--provider", "cuda", "--provider-option", "nothing"], 2, "expected NAME=VALUE"),
        (&["--provider", "rocm"], 2, "nv-tensorrt-rtx"),
        (
            &["--provider", "nv-tensorrt-rtx", "--provider-option", "library=/nowhere.so"],
            1,
            "/nowhere.so does not exist",
        ),
        (
            &["--provider", "cuda", "--provider-option", "enable_cuda_graph=1"],
            2,
            "--provider-option enable_cuda_graph=1 requires a cache in place",
        ),
        (
            &["--provider", "tensorrt", "--provider-option", "trt_cuda_graph_enable=1"],
            2,
            "--provider-option trt_cuda_graph_enable=1 requires the provider cuda",
        ),
    ] {
        let (found, error) = refused(arguments);
        assert_eq!(found, Some(code), "{arguments:?}: {error}");
        assert!(error.contains(word), "{arguments:?}: {error}");
    }
}

#[test]
fn cuda_graphs_are_for_steps_that_can_be_captured() {
    let whole = exported_for("tiny-balanced", Target::Cuda);
    let standard = exported_for("tiny-balanced", Target::Portable);
    for (command, model, word) in [
        ("generate", &whole, "enable_cuda_graph=1 requires float16 or bfloat16"),
        ("generate", &standard, "enable_cuda_graph=1 requires a cache in place"),
        ("encode", &whole, "enable_cuda_graph=1 requires generation"),
    ] {
        let model = model.to_str().expect("temporary paths are UTF-8");
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut arguments = vec![command, model, "--provider", "cuda", "--provider-option", "enable_cuda_graph=1"];
        let file = folder.path().join("states.safetensors");
        if command == "encode" {
            arguments.extend(["-o", file.to_str().expect("temporary paths are UTF-8")]);
        }
        let output = run("t5gemma", arguments, "5 6 7\n");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && error.contains(word), "{command} {model}: {error}");
    }
}

#[test]
fn doctor_tries_every_provider() {
    let report = stdout(run("t5gemma", ["doctor"], ""));
    assert!(report.contains("--provider cpu: ready"), "{report}");
    for (provider, package) in
        [("cuda", "onnxruntime-gpu"), ("tensorrt", "onnxruntime-gpu"), ("nv-tensorrt-rtx", "nv-tensorrt-rtx-cu13")]
    {
        let from = report.find(&format!("--provider {provider}: ")).unwrap_or_else(|| panic!("{provider}: {report}"));
        let told: Vec<&str> = report[from..].lines().take(1).collect();
        assert!(told.iter().any(|line| line.contains(package)), "{provider}: {report}");
        assert_eq!(
            told.iter().any(|line| line.contains("TensorRT 10")),
            provider == "tensorrt",
            "{provider}: {report}"
        );
    }
}

#[test]
fn engines_are_built_of_a_plan_and_by_who_builds_them() {
    let export = Export::default().target(Target::TensorRt).dtype(DType::BFloat16);
    let model = exported_as("tiny-balanced", "tensorrt-unplanned", export);
    let model = model.to_str().expect("temporary paths are UTF-8");
    for (provider, word) in [("cpu", "tensorrt or nv-tensorrt-rtx"), ("tensorrt", "serving plan")] {
        let output = run("t5gemma", ["build-engines", model, "--provider", provider], "");
        assert_eq!(output.status.code(), Some(1), "{provider}");
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(error.contains(word), "{provider}: {error}");
    }
}
