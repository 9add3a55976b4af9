//! Whether `proto/onnx.rs` is what prost-build makes of `proto/onnx.proto`. With `UPDATE=1`, writes it.

use std::fs;
use std::path::Path;

const HEAD: &str = "\
// Generated from onnx.proto (ONNX 1.23, Apache-2.0, the ONNX Project Contributors) by prost-build and protox. Do not edit;
// regenerate with: UPDATE=1 cargo test -p t5gemma-exporter --test onnx_proto
";

#[test]
fn the_generated_code_is_current() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto");
    let descriptors = protox::compile(["onnx.proto"], [&folder]).expect("onnx.proto is valid");
    let out = tempfile::tempdir().expect("a temporary folder can be created");
    let mut config = prost_build::Config::new();
    config.disable_comments(["."]).out_dir(out.path());
    config.compile_fds(descriptors).expect("prost-build generates code");
    let code = fs::read_to_string(out.path().join("onnx.rs")).expect("the code of package onnx");
    let (path, code) = (folder.join("onnx.rs"), HEAD.to_string() + &code);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(&path, &code).expect("the source tree is writable");
    }
    let committed = fs::read_to_string(&path).expect("the code is committed");
    assert!(committed == code, "{} is not current; regenerate it as its first lines say", path.display());
}
