//! Reads manifests of every supported format version. Version 1 had no family, facts or tensor roles: its readers
//! derived them from `config.json` and from tensor names, and so does [`Manifest::read`], once.

use serde_json::{Map, Value, json};

use crate::config::{Config, ConfigError};
use crate::manifest::{FORMAT, FORMAT_VERSION, Manifest, ManifestError, OLDEST_FORMAT_VERSION};
use crate::tensors::Role;

impl Manifest {
    /// Reads a `manifest.json`. `config` reads the `config.json` beside it, which only version 1 needs.
    ///
    /// # Errors
    /// See [`ManifestError`].
    pub fn read<E>(
        mut document: Value,
        config: impl FnOnce() -> Result<Config, E>,
    ) -> Result<Manifest, ManifestError<E>> {
        let wrong = |field: &str, expected: String, found: &Value| {
            Err(ManifestError::Field(ConfigError { field: field.into(), expected, found: found.to_string() }))
        };
        // Format and version come first: the fields of other versions need not be those read below.
        let field = |name: &str| document.get(name).unwrap_or(&Value::Null);
        if field("format") != FORMAT {
            return wrong("format", format!("{FORMAT:?}"), field("format"));
        }
        let versions = OLDEST_FORMAT_VERSION..=FORMAT_VERSION;
        match field("format_version").as_u64().and_then(|version| u32::try_from(version).ok()) {
            Some(version) if versions.contains(&version) => {
                if let (1, Some(fields)) = (version, document.as_object_mut()) {
                    let config = config().map_err(ManifestError::Config)?;
                    from_version_1(fields, &config);
                }
            }
            _ => {
                let expected = format!("{OLDEST_FORMAT_VERSION} to {FORMAT_VERSION}");
                return wrong("format_version", expected, field("format_version"));
            }
        }
        let manifest: Manifest = serde_json::from_value(document).map_err(ManifestError::Malformed)?;
        manifest
            .facts
            .check()
            .map_err(|error| ManifestError::Field(ConfigError { field: format!("facts.{}", error.field), ..error }))?;
        Ok(manifest)
    }
}

/// Adds what version 2 has beyond version 1: the family, the facts, and the role of each tensor, derived from its name.
fn from_version_1(manifest: &mut Map<String, Value>, config: &Config) {
    manifest.insert("format_version".into(), FORMAT_VERSION.into());
    manifest.insert("family".into(), json!(config.family));
    manifest.insert("facts".into(), json!(config.facts()));
    // Only models that generate have several graphs.
    let is_generation = manifest.get("graphs").is_some_and(|graphs| graphs.get("decoder").is_some());
    let tensors = manifest.get_mut("weights").and_then(|weights| weights.get_mut("tensors"));
    let Some(Value::Array(tensors)) = tensors else { return };
    let name = |tensor: &Value| tensor.get("name").and_then(Value::as_str).unwrap_or_default().to_string();
    let role = |tensor: &Value| (config.family.tensors().role)(&name(tensor));
    let has_head = tensors.iter().any(|tensor| role(tensor) == Some(Role::Head));
    for tensor in tensors {
        let role = match role(tensor) {
            // A tied table is the head, see `Role::Head`.
            Some(Role::DecoderEmbedding) if is_generation && !has_head => Some(Role::Head),
            role => role,
        };
        if let (Some(role), Value::Object(fields)) = (role, tensor) {
            fields.insert("role".into(), json!(role));
        }
    }
}
