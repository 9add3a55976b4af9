//! The JSON Schema (draft 2020-12) of each kind of line. It is generated from the types and committed in `schema/` for
//! users who do not build this crate; `cargo run -p t5gemma-protocol --example schema` regenerates it.

use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde_json::Value;

use crate::request::{EncodeRequest, GenerateRequest, ScoreRequest};
use crate::result::{ClassifyResponse, GenerateResponse, ScoreResponse};

/// The name of each kind of line and its schema. `encode-request` is also what `t5gemma classify` reads.
pub fn schemas() -> Vec<(&'static str, Schema)> {
    vec![
        ("generate-request", schema::<GenerateRequest>()),
        ("generate-response", schema::<GenerateResponse>()),
        ("score-request", schema::<ScoreRequest>()),
        ("score-response", schema::<ScoreResponse>()),
        ("encode-request", schema::<EncodeRequest>()),
        ("classify-response", schema::<ClassifyResponse>()),
    ]
}

fn schema<T: JsonSchema>() -> Schema {
    let settings = SchemaSettings::draft2020_12().with_transform(RecursiveTransform(join_lines));
    SchemaGenerator::new(settings).into_root_schema_for::<T>()
}

/// Joins the lines of a description, which are those of the source code.
fn join_lines(schema: &mut Schema) {
    if let Some(Value::String(description)) = schema.get_mut("description") {
        *description = description.replace("\n\n", "\0").replace('\n', " ").replace('\0', "\n\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_schema_is_current() {
        for (name, schema) in schemas() {
            let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/").to_string() + name + ".json";
            let committed = std::fs::read_to_string(&path).unwrap_or_default();
            let current = serde_json::to_string_pretty(&schema).expect("a schema is JSON") + "\n";
            assert!(committed == current, "{path}: run `cargo run -p t5gemma-protocol --example schema`");
        }
    }
}
