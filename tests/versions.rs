//! Model folders of earlier versions of the format, committed as the exporter of their time wrote them.

use std::fs;

use serde_json::Value;
use t5gemma_exporter::{Export, inspect, reseal};
use t5gemma_graphs::Target;
use t5gemma_runtime::Model;

use crate::common::{exported_as, tests};
use crate::generation::check_cases;

const VERSION_1: &str = "fixtures/version-1/tiny-untied";

#[test]
fn a_folder_of_version_1_gives_the_reference_tokens() {
    check_cases("tiny-untied", "version 1", &tests().join(VERSION_1));
}

#[test]
fn version_1_is_read_as_what_is_written_today() {
    let old = Model::open(tests().join(VERSION_1)).expect("opens");
    let today = Export::default().target(Target::Cpu);
    let new = Model::open(exported_as("tiny-untied", "version-today", today)).expect("opens");
    assert_eq!((old.manifest().family, old.facts()), (new.manifest().family, new.facts()));
    let roles = |model: &Model| {
        let tensors = model.manifest().weights.tensors.iter();
        tensors.map(|tensor| (tensor.name.clone(), tensor.role)).collect::<Vec<_>>()
    };
    assert_eq!(roles(&old), roles(&new));
    assert_eq!(old.manifest().format_version, new.manifest().format_version);
}

#[test]
fn version_1_is_inspected_and_resealed_as_the_version_of_today() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for file in fs::read_dir(tests().join(VERSION_1)).expect("a folder") {
        let file = file.expect("an entry");
        fs::copy(file.path(), folder.path().join(file.file_name())).expect("copied");
    }
    assert_eq!(inspect(folder.path()).expect("a model").parameters, 36816);
    let version = || {
        let text = fs::read_to_string(folder.path().join("manifest.json")).expect("a text");
        serde_json::from_str::<Value>(&text).expect("JSON")["format_version"].clone()
    };
    assert_eq!(reseal(folder.path()).expect("is as it was exported"), Vec::<String>::new());
    assert_eq!(version(), 1, "nothing was changed");
    fs::write(folder.path().join("tokenizer_config.json"), "{}").expect("written");
    assert_eq!(reseal(folder.path()).expect("reseals").len(), 1, "a file was added");
    assert_eq!(version(), 2);
    Model::open(folder.path()).expect("opens");
}
