//! Passes the ABI version of the header to the code.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=include/t5gemma.h");
    let header = std::fs::read_to_string("include/t5gemma.h").expect("the header is in the package");
    let number = |name: &str| {
        let line = header.lines().find_map(|line| line.strip_prefix(&format!("#define {name} ")));
        line.and_then(|number| number.parse::<u32>().ok()).expect("the header has the ABI's numbers")
    };
    println!("cargo::rustc-env=T5G_ABI={}", number("T5G_ABI_MAJOR") * 65536 + number("T5G_ABI_MINOR"));
}
