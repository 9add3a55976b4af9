//! Writes the JSON Schema of each kind of line into `runtime/protocol/schema`.

use std::{fs, io};

fn main() -> io::Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/schema");
    fs::create_dir_all(folder)?;
    for (name, schema) in t5gemma_protocol::schemas() {
        fs::write(format!("{folder}/{name}.json"), serde_json::to_string_pretty(&schema)? + "\n")?;
    }
    Ok(())
}
