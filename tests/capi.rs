//! The C library as its users see it: installed into a prefix by `make install`, found by pkg-config, CMake and pip,
//! and driven by the programs in `capi/` and `examples/`, plain, under valgrind, and with gcc's sanitizers.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use itertools::Itertools as _;
use serde_json::Value;
use t5gemma_exporter::{Alignment, Export};
use t5gemma_graphs::Target;
use tempfile::TempDir;

use crate::common::{
    cases, demo, demo_as, exported_for, exported_from, fixtures_and_targets, from_make, program, stdout, tests,
};
use crate::generation::{check_case, inputs, lists};

const STRICT: [&str; 6] = ["-Wall", "-Wextra", "-pedantic", "-Wshadow", "-Werror", "-g"];
/// Warning flags that also apply to headers found by -I, as with pkg-config.
const STRICTER: [&str; 4] = ["-Wold-style-cast", "-Wconversion", "-Wsign-conversion", "-Wdouble-promotion"];
const SANITIZED: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"];

/// The installation that the tests build against.
pub struct Installed {
    folder: TempDir,
}

/// An installation of the library, once for all tests.
pub fn installed() -> &'static Installed {
    static INSTALLED: OnceLock<Installed> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let folder = TempDir::new().expect("a temporary folder can be made");
        let prefix = folder.path().join("prefix");
        done(make(["install", &format!("PREFIX={}", prefix.display())]));
        Installed { folder }
    })
}

impl Installed {
    pub fn prefix(&self) -> PathBuf {
        self.folder.path().join("prefix")
    }

    /// A program of `capi/` or `examples/`, compiled as its users would.
    pub fn program(&self, source: &str, label: &str, flags: &[&str]) -> PathBuf {
        let source = tests().join(source);
        let is_c = source.extension() == Some(OsStr::new("c"));
        let out = self.folder.path().join(format!("{}-{label}", source.file_name().unwrap_or_default().display()));
        let mut compiler = Command::new(if is_c { "cc" } else { "c++" });
        compiler.arg(if is_c { "-std=c11" } else { "-std=c++17" }).args(STRICT).args(flags);
        compiler.arg("-I").arg(tests().join("capi")).arg(source).arg("-o").arg(&out);
        let found = stdout(self.pkg_config(["--cflags", "--libs", "t5gemma"]).output().expect("pkg-config runs"));
        compiler.args(found.split_whitespace()).args(["-lm", "-pthread"]);
        compiler.arg(format!("-Wl,-rpath,{}", self.prefix().join("lib").display()));
        done(compiler);
        out
    }

    fn pkg_config<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = Command::new("pkg-config");
        command.env("PKG_CONFIG_PATH", self.prefix().join("lib/pkgconfig")).args(arguments);
        command
    }

    /// The folder that the wheel is installed into.
    pub fn site(&self) -> PathBuf {
        static WHEEL: OnceLock<()> = OnceLock::new();
        let (wheels, site) = (self.folder.path().join("wheels"), self.folder.path().join("site"));
        WHEEL.get_or_init(|| {
            let stage = format!("STAGE={}", self.folder.path().join("stage").display());
            done(make(["wheel", &stage, &format!("WHEELS={}", wheels.display())]));
            let wheel = std::fs::read_dir(&wheels).expect("made").next().expect("a wheel").expect("readable").path();
            let mut pip = Command::new(std::env::var_os("PYTHON").unwrap_or("python3".into()));
            pip.args(["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]).arg(&site).arg(wheel);
            done(pip);
        });
        site
    }

    /// Python with the wheel installed, beside the packages of `.venv`.
    pub fn python(&self) -> Command {
        let mut python = Command::new(from_make("T5GEMMA_PYTHON"));
        python.env("PYTHONPATH", self.site());
        python
    }
}

fn make<const N: usize>(arguments: [&str; N]) -> Command {
    let mut make = Command::new("make");
    make.arg("--silent").arg("-C").arg(tests().join("..")).args(arguments).env("CARGO", env!("CARGO"));
    // What `cargo test` has built is used.
    make.args(["PROFILE=dev", "LIBRARY_PACKAGES=--workspace"]);
    // What a make above has told its children is not for this one.
    make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL").env_remove("MFLAGS");
    make
}

/// Runs a command that has to succeed, and returns what it prints.
fn done(mut command: Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a program that has to print "well".
fn well(program: &Path, arguments: &[&Path]) {
    let mut command = Command::new(program);
    command.args(arguments);
    assert_eq!(done(command).lines().last().map(|line| &line[..4]), Some("well"), "{}", program.display());
}

fn classifier() -> PathBuf {
    exported_from(&tests().join("fixtures/tasks/sequence-decoder/checkpoint"), "capi-classifier", Export::default())
}

/// The demo model with an in-place cache, with which an engine's rows share every step.
fn demo_for_cpu() -> PathBuf {
    exported_from(
        &tests().join("demo/checkpoint"),
        "demo-capi-cpu",
        Export::default().target(Target::Cpu).alignment(Alignment::AllLayers),
    )
}

/// The demo model exported with alignment.
fn demo_with_alignment() -> PathBuf {
    demo_as("alignment", Export::default().alignment(Alignment::AllLayers))
}

#[test]
fn the_abi_is_the_one_that_is_committed() {
    let mut python = Command::new(from_make("T5GEMMA_PYTHON"));
    let root = tests().join("../runtime/capi");
    python.arg(tests().join("scripts/capi_abi.py")).arg(root.join("include/t5gemma.h"));
    python.arg(installed().prefix().join("lib/libt5gemma.so")).arg(root.join("src"));
    let (found, committed) = (done(python), std::fs::read_to_string(root.join("abi.txt")).expect("abi.txt is there"));
    let differing = found.lines().zip_eq(committed.lines()).find(|(found, committed)| found != committed);
    assert!(
        found == committed,
        "abi.txt is of another header; first difference: {differing:?}. After an addition raise T5G_ABI_MINOR, after any \
         other change T5G_ABI_MAJOR, and write the listing anew"
    );
}

#[test]
fn the_headers_stand_alone() {
    let include = tests().join("../runtime/capi/include");
    let check = |compiler: &str, flags: &[&str], header: &str| {
        let mut command = Command::new(compiler);
        command.args(flags).args(STRICT).args(["-fsyntax-only", "-include", header, "/dev/null", "-I"]);
        command.arg(&include);
        done(command);
    };
    // The compiler that is there, and clang where it is too.
    let is_there = |compiler: &&str| Command::new(compiler).arg("--version").output().is_ok();
    for compiler in ["cc", "clang"].iter().filter(|compiler| **compiler == "cc" || is_there(compiler)) {
        check(compiler, &["-x", "c", "-std=c11", "-Wconversion", "-Wdouble-promotion"], "t5gemma.h");
    }
    for compiler in ["c++", "clang++"].iter().filter(|compiler| **compiler == "c++" || is_there(compiler)) {
        for standard in ["-std=c++17", "-std=c++20"] {
            for header in ["t5gemma.h", "t5gemma.hpp"] {
                check(compiler, &[["-x", "c++", standard].as_slice(), &STRICTER].concat(), header);
            }
            for mode in [["-DT5GEMMA_EXPECTED"].as_slice(), &["-DT5GEMMA_EXPECTED", "-fno-exceptions"]] {
                check(compiler, &[&["-x", "c++", standard], mode, &STRICTER].concat(), "t5gemma.hpp");
            }
        }
    }
}

#[test]
fn files_of_both_modes_can_be_linked_together() {
    let (installed, demo) = (installed(), demo());
    for (label, flags) in [("O0", ["-O0"].as_slice()), ("O2", &["-O2"]), ("lto", &["-O2", "-flto"])] {
        let object = |mode: &str, define: &[&str]| {
            let out = installed.folder.path().join(format!("modes-{label}-{mode}.o"));
            let mut compiler = Command::new("c++");
            compiler.arg("-std=c++17").args(STRICT).args(flags).args(define).arg("-c").arg("-o").arg(&out);
            compiler.arg("-I").arg(tests().join("../runtime/capi/include")).arg(tests().join("capi/modes.cpp"));
            done(compiler);
            out
        };
        let objects = [object("throwing", &[]), object("returning", &["-DT5GEMMA_EXPECTED"])];
        // In either order: of what is defined twice, the linker takes the first.
        for (order, objects) in [("first", [&objects[0], &objects[1]]), ("last", [&objects[1], &objects[0]])] {
            let out = installed.folder.path().join(format!("modes-{label}-{order}"));
            let mut linker = Command::new("c++");
            linker.args(STRICT).args(flags).args(objects).arg("-o").arg(&out).arg("-L");
            linker.arg(installed.prefix().join("lib")).args(["-lt5gemma", "-pthread"]);
            linker.arg(format!("-Wl,-rpath,{}", installed.prefix().join("lib").display()));
            done(linker);
            well(&out, &[&demo]);
        }
    }
}

#[test]
fn the_headers_first_program_is_the_example() {
    let header =
        std::fs::read_to_string(tests().join("../runtime/capi/include/t5gemma.h")).expect("the header is there");
    let lines = header.lines().skip_while(|line| !line.contains("#include")).take_while(|line| *line != " * LINKING");
    let program: String = lines
        .map_while(|line| line.strip_prefix(" *").filter(|rest| rest.is_empty() || rest.starts_with("     ")))
        .map(|line| format!("{}\n", line.strip_prefix("     ").unwrap_or("")))
        .collect();
    let example = std::fs::read_to_string(tests().join("../examples/c/generate.c")).expect("the example is there");
    assert_eq!(program.trim(), example.trim());
}

#[test]
fn every_function_is_used_well_and_badly_from_c_and_cpp() {
    let scratch = TempDir::new().expect("a temporary folder can be made");
    let (installed, demo, classifier) = (installed(), demo_for_cpu(), classifier());
    let arguments: [&Path; 3] = [&demo, &classifier, scratch.path()];
    well(&installed.program("capi/surface.c", "plain", &[]), &arguments);
    well(&installed.program("capi/surface.c", "sanitized", &SANITIZED), &arguments);
    let cpp = [SANITIZED.as_slice(), &STRICTER].concat();
    let expected = [cpp.as_slice(), &["-DT5GEMMA_EXPECTED"]].concat();
    well(&installed.program("capi/surface.cpp", "sanitized", &cpp), &arguments[..1]);
    well(&installed.program("capi/surface.cpp", "expected", &expected), &arguments[..1]);
    let bare = [expected.as_slice(), &["-fno-exceptions"]].concat();
    well(&installed.program("capi/surface.cpp", "bare", &bare), &arguments[..1]);
}

/// An exception of on_done has no caller to propagate to: the program terminates and says why.
#[test]
fn an_exception_of_on_done_is_named_when_the_program_ends() {
    let mut program = Command::new(installed().program("capi/throws.cpp", "plain", &[]));
    let output = program.arg(demo()).output().expect("the program runs");
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && told.contains("mine of on_done"), "{}: {told}", output.status);
}

#[cfg(unix)]
#[test]
fn a_process_that_is_forked_is_told_what_it_lacks() {
    let demo = demo_for_cpu();
    well(&installed().program("capi/fork.c", "plain", &[]), &[&demo]);
}

#[cfg(target_os = "linux")]
#[test]
fn valgrind_finds_nothing() {
    let scratch = TempDir::new().expect("a temporary folder can be made");
    let program = installed().program("capi/surface.c", "valgrind", &[]);
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9", "--leak-check=full"]);
    valgrind.args(["--errors-for-leak-kinds=definite", "--show-leak-kinds=definite"]);
    valgrind.arg(format!("--suppressions={}", installed().prefix().join("share/t5gemma/valgrind.supp").display()));
    valgrind.arg(program).arg(demo_with_alignment()).arg(classifier()).arg(scratch.path());
    assert!(done(valgrind).ends_with("well\n"));
}

#[test]
fn eight_threads_get_what_one_gets() {
    let demo = demo();
    well(&installed().program("capi/stress.c", "sanitized", &SANITIZED), &[&demo]);
    well(&installed().program("capi/stress.c", "plain", &["-O2"]), &[&demo_for_cpu()]);
}

#[test]
fn random_calls_break_nothing() {
    let program = installed().program("capi/fuzz.c", "sanitized", &SANITIZED);
    let mut fuzz = Command::new(program);
    fuzz.arg(demo()).arg("30");
    let corpus = std::fs::read_dir(tests().join("capi/corpus")).expect("the corpus is there");
    let mut corpus: Vec<PathBuf> = corpus.map(|entry| entry.expect("readable").path()).collect();
    corpus.sort();
    assert!(!corpus.is_empty());
    fuzz.args(corpus).env("FUZZ_LAST", installed().folder.path().join("last"));
    assert!(done(fuzz).starts_with("well"));
}

#[cfg(target_os = "linux")]
#[test]
fn loading_again_and_again_leaks_nothing() {
    let mut program = Command::new(installed().program("capi/reload.c", "plain", &[]));
    program.arg(installed().prefix().join("lib/libt5gemma.so")).arg(demo());
    assert!(done(program).starts_with("well"));
}

#[test]
fn every_case_gives_the_reference_tokens_through_c_cpp_and_python() {
    let installed = installed();
    let (c, cpp) =
        (installed.program("capi/golden.c", "plain", &[]), installed.program("capi/golden.cpp", "plain", &[]));
    for (name, target) in fixtures_and_targets() {
        let (cases, inputs) = (cases(name), inputs(name));
        let cases = cases["cases"].as_array().expect("cases is a list");
        let flat = |value: &Value| {
            let rows = value.as_array().expect("a list of rows").iter();
            let numbers =
                rows.flat_map(|row| row.as_array().expect("a row is a list")).map(|number| number.to_string());
            numbers.collect::<Vec<_>>().join(" ")
        };
        let line = |case: &Value| {
            let (ids, mask) = &inputs[case["input"].as_str().expect("a case names its input")];
            let (rows, length) = ids.dim();
            let prompt = &case["decoder_input_ids"];
            let width = prompt[0].as_array().map_or(0, Vec::len);
            let prompt = if width > 0 { flat(prompt) } else { String::new() };
            let (ids, mask) = (flat(&lists(ids)), flat(&lists(mask)));
            format!("{rows} {length} {ids} {mask} {width} {prompt} {}\n", case["options"])
        };
        let input: String = cases.iter().map(line).collect();
        let file = installed.folder.path().join("cases");
        std::fs::write(&file, input).expect("written");
        let mut python = installed.python();
        python.arg(tests().join("scripts/capi_golden.py"));
        for (door, mut command) in [("C", Command::new(&c)), ("C++", Command::new(&cpp)), ("Python", python)] {
            command.arg(exported_for(name, target));
            command.stdin(std::fs::File::open(&file).expect("just written"));
            let output = stdout(command.output().expect("the program runs"));
            assert_eq!(output.lines().count(), cases.len(), "{door}: {name}");
            for (case, line) in cases.iter().zip_eq(output.lines()) {
                let result: Value = serde_json::from_str(line).expect("a JSON line");
                let rows = result["sequences"].as_array().expect("rows").iter();
                let found: Vec<(Value, Option<f64>)> = rows
                    .flat_map(|row| row.as_array().expect("a row is a list"))
                    .map(|sequence| (sequence["tokens"].clone(), sequence["score"].as_f64()))
                    .collect();
                check_case(&format!("{door}: {name} for {} {}", target.name(), case["id"]), case, &found);
            }
        }
    }
}

#[test]
fn python_users_have_what_the_package_promises() {
    let scripts = ["", "_forms", "_asyncio", "_shards", "_process"].map(|part| format!("capi_python{part}.py"));
    for script in scripts {
        let mut python = installed().python();
        python.arg(tests().join("scripts").join(&script)).arg(demo_with_alignment()).arg(classifier());
        assert_eq!(done(python), "well\n", "{script}");
    }
}

#[test]
fn every_graph_reads_the_weights_where_they_are_given_to_it() {
    let models = [Target::Portable, Target::Cpu, Target::Cuda].map(|target| exported_for("tiny-balanced", target));
    let mut python = installed().python();
    python.arg(tests().join("scripts/weights_once.py")).args(&models);
    for (model, line) in models.iter().zip_eq(done(python).lines()) {
        let found: Value = serde_json::from_str(line).expect("JSON");
        let manifest = std::fs::read(model.join("manifest.json")).expect("a manifest");
        let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
        let graphs = manifest["graphs"].as_object().expect("graphs").values();
        let sorted = |names: Vec<&Value>| {
            let mut names: Vec<String> = names.iter().map(|name| name.as_str().expect("a name").to_string()).collect();
            names.sort();
            names
        };
        let given = sorted(graphs.flat_map(|graph| graph["weights"].as_array().expect("names")).collect());
        assert!(given.len() > 100, "{}", model.display());
        assert_eq!(sorted(found["used"].as_array().expect("names").iter().collect()), given, "{}", model.display());
        assert_eq!(found["refused"], serde_json::json!([]), "{}", model.display());
    }
}

#[test]
fn the_examples_build_and_run() {
    let installed = installed();
    let work = TempDir::new().expect("a temporary folder can be made");
    let examples = tests().join("../examples");

    let mut build = Command::new("make");
    build.arg("--silent").arg("-C").arg(work.path()).arg("-f").arg(examples.join("c/Makefile"));
    build.arg(format!("VPATH={}", examples.join("c").display())).arg("generate");
    build.env("PKG_CONFIG_PATH", installed.prefix().join("lib/pkgconfig"));
    done(build);
    let mut generate = Command::new(work.path().join("generate"));
    let answers = done({
        generate.arg(demo());
        generate
    });
    let expected = "doctor smith paid three dollars and fifty cents on may third twenty nineteen\n\
                    the meeting starts at nine oh five a m on elm street\n";
    assert_eq!(answers, expected);

    let cmake = || {
        let mut cmake = Command::new(from_make("T5GEMMA_PYTHON"));
        cmake.args(["-m", "cmake"]);
        cmake
    };
    let mut configure = cmake();
    configure.arg("-S").arg(examples.join("cpp")).arg("-B").arg(work.path().join("cpp"));
    configure.arg("-D").arg(format!("CMAKE_PREFIX_PATH={}", installed.prefix().display()));
    done(configure);
    let mut build = cmake();
    build.arg("--build").arg(work.path().join("cpp"));
    done(build);
    let lines = std::fs::read(tests().join("scripts/demo.txt")).expect("the lines are there");
    let file = work.path().join("lines");
    std::fs::write(&file, lines.repeat(5)).expect("written");
    let run = |model: &Path| {
        let mut batch = Command::new(work.path().join("cpp/batch"));
        batch.arg(model).arg("3").stdin(std::fs::File::open(&file).expect("just written"));
        batch.output().expect("the program runs")
    };
    let answers = stdout(run(&demo()));
    assert_eq!((answers.lines().count(), answers.lines().nth(19)), (20, expected.lines().last()));
    let wrong = run(Path::new("no/such/model"));
    let message = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(
        wrong.status.code() == Some(1) && message.starts_with("no/such/model/manifest.json: no such file"),
        "{message}"
    );
}

#[test]
fn cmake_finds_versions_that_are_as_good_and_no_others() {
    let work = TempDir::new().expect("a temporary folder can be made");
    let template = tests().join("../runtime/capi/package/t5gemmaConfigVersion.cmake.in");
    let template = std::fs::read_to_string(template).expect("the template is there");
    let script = |version: &str| {
        let (file, use_it) = (work.path().join("version.cmake"), work.path().join("use.cmake"));
        std::fs::write(&file, template.replace("@VERSION@", version)).expect("written");
        std::fs::write(&use_it, format!("include({})\nmessage(\"${{PACKAGE_VERSION_COMPATIBLE}}\")", file.display()))
            .expect("written");
        use_it
    };
    let parts = |name: &str, version: &str| {
        let mut parts = version.split('.').chain(std::iter::repeat("0"));
        let [major, minor] = [parts.next(), parts.next()].map(Option::unwrap_or_default);
        [format!("-D{name}={version}"), format!("-D{name}_MAJOR={major}"), format!("-D{name}_MINOR={minor}")]
    };
    let is_found = |installed: &str, wanted: &str| {
        let mut cmake = Command::new(from_make("T5GEMMA_PYTHON"));
        cmake.args(["-m", "cmake"]);
        match wanted.split_once("...") {
            None => cmake.args(parts("PACKAGE_FIND_VERSION", wanted)),
            Some((least, most)) => {
                let end = if most.starts_with('<') { "EXCLUDE" } else { "INCLUDE" };
                let most = most.trim_start_matches('<');
                cmake.args(parts("PACKAGE_FIND_VERSION", least)).arg(format!("-DPACKAGE_FIND_VERSION_RANGE={wanted}"));
                cmake
                    .arg(format!("-DPACKAGE_FIND_VERSION_MIN={least}"))
                    .arg("-DPACKAGE_FIND_VERSION_RANGE_MIN=INCLUDE");
                cmake.arg(format!("-DPACKAGE_FIND_VERSION_MAX={most}"));
                cmake.arg(format!("-DPACKAGE_FIND_VERSION_RANGE_MAX={end}"))
            }
        };
        let output = cmake.arg("-P").arg(script(installed)).output().expect("cmake runs");
        String::from_utf8_lossy(&output.stderr).trim() == "TRUE"
    };
    for (installed, wanted, expected) in [
        ("0.1.0", "0.1", true),
        ("0.1.5", "0.1.2", true),
        ("0.1.0", "0.1.2", false),
        ("0.2.0", "0.1", false),
        ("0.1.0", "0.2", false),
        ("1.0.0", "0.1", false),
        ("1.4.0", "1.2", true),
        ("1.4.0", "1.5", false),
        ("2.0.0", "1.2", false),
        ("10.0.0", "1.0", false),
        ("0.3.0", "0.1...<0.4", true),
        ("0.4.0", "0.1...<0.4", false),
        ("0.4.0", "0.1...0.4", true),
    ] {
        assert_eq!(is_found(installed, wanted), expected, "{installed} for {wanted}");
    }
}

#[test]
fn an_installation_can_be_moved_and_packed() {
    let (work, installed) = (TempDir::new().expect("a temporary folder can be made"), installed());
    let moved = work.path().join("elsewhere");
    let mut copy = Command::new("cp");
    copy.arg("-a").arg(installed.prefix()).arg(&moved);
    done(copy);
    let mut found = Command::new("pkg-config");
    found.env("PKG_CONFIG_PATH", moved.join("lib/pkgconfig")).args(["--cflags", "t5gemma"]);
    assert!(done(found).contains("elsewhere"));

    let (stage, dist) = (work.path().join("stage"), work.path().join("dist"));
    done(make(["dist", "PROFILE=dev", &format!("STAGE={}", stage.display()), &format!("DIST={}", dist.display())]));
    let packed =
        std::fs::read_dir(work.path().join("dist")).expect("made").map(|entry| entry.expect("readable").path());
    let packed: Vec<PathBuf> = packed.filter(|path| path.extension() == Some(OsStr::new("gz"))).collect();
    let mut unpack = Command::new("tar");
    unpack.arg("-C").arg(work.path()).arg("-xzf").arg(&packed[0]);
    done(unpack);
    let name = packed[0].file_name().unwrap_or_default().display().to_string();
    let folder = work.path().join(name.trim_end_matches(".tar.gz"));
    let mut check = Command::new("sha256sum");
    check.current_dir(&folder).args(["--check", "--quiet", "--strict", "SHA256SUMS"]);
    done(check);
    for file in [
        "lib/libt5gemma.a",
        "lib/libt5gemma.so",
        "lib/libonnxruntime.so",
        "include/t5gemma.h",
        "share/doc/t5gemma/LICENSE",
        "share/doc/t5gemma/THIRD-PARTY",
        "share/t5gemma/valgrind.supp",
    ] {
        assert!(folder.join(file).exists(), "{file}");
    }
}

#[test]
fn adapters_are_loaded_from_c_cpp_and_python() {
    let (installed, folder) = (installed(), TempDir::new().expect("a temporary folder can be made"));
    let fixture = tests().join("fixtures/lora");
    let (model, adapter) = (folder.path().join("model"), fixture.join("adapters/plain"));
    let mut export = program("t5gemma-export");
    export.arg(fixture.join("checkpoint")).arg(&model).args(["--target", "cpu", "--lora-inputs", "4"]);
    done(export);
    let cases = std::fs::read(fixture.join("cases.json")).expect("the fixture is there");
    let cases: Value = serde_json::from_slice(&cases).expect("JSON");
    let tokens = cases["adapters"]["plain"]["generate"][0]["tokens"].as_array().expect("rows").iter();
    let expected: Vec<&Value> = tokens.flat_map(|row| row.as_array().expect("a row")).collect();
    let golden = std::fs::read(fixture.join("golden.safetensors")).expect("the fixture is there");
    let golden = safetensors::SafeTensors::deserialize(&golden).expect("a safetensors file");
    let numbers = ["in.input_ids", "in.attention_mask"].into_iter().flat_map(|name| {
        let data = golden.tensor(name).expect("it is there").data().to_vec();
        let numbers: Vec<i64> = data.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
        numbers
    });
    let numbers = numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" ");
    let input = folder.path().join("input");
    std::fs::write(&input, format!("3 11 {numbers}\n")).expect("written");
    let (c, cpp) = (
        installed.program("capi/adapters.c", "sanitized", &SANITIZED),
        installed.program("capi/adapters.cpp", "sanitized", &SANITIZED),
    );
    let mut python = installed.python();
    python.arg(tests().join("scripts/capi_adapters.py"));
    for (door, mut command) in [("C", Command::new(c)), ("C++", Command::new(cpp)), ("Python", python)] {
        command.arg(&model).arg(&adapter).stdin(std::fs::File::open(&input).expect("just written"));
        let found = stdout(command.output().expect("the program runs"));
        assert_eq!(found.lines().count(), 4, "{door}: {found}");
        for line in found.lines() {
            let found: Vec<Value> = line.split_whitespace().map(|token| token.parse().expect("a token")).collect();
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{door}");
        }
    }
}
