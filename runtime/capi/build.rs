//! What the linker is told of the shared library: its name with the ABI's major number, and that it stays loaded.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=include/t5gemma.h");
    let header = std::fs::read_to_string("include/t5gemma.h").expect("the header is in the package");
    let number = |name: &str| {
        let line = header.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        line.and_then(|number| number.parse::<u32>().ok()).expect("the header has the ABI's numbers")
    };
    let (major, minor) = (number("T5G_ABI_MAJOR"), number("T5G_ABI_MINOR"));
    println!("cargo::rustc-env=T5G_ABI={}", major * 65536 + minor);
    match std::env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("macos") => {
            println!("cargo::rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libt5gemma.{major}.dylib");
        }
        Ok("linux") => {
            println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libt5gemma.so.{major}");
            // ONNX Runtime's threads and environment call into this library for as long as the process lives.
            println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
        }
        _ => {}
    }
}
