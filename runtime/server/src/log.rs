//! The log: one line on stderr for each request and event, as text or as JSON. No text of a request is ever in it.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

static JSON: AtomicBool = AtomicBool::new(false);

/// Whether lines are JSON objects; `t5gemma: …` otherwise.
pub fn as_json(json: bool) {
    JSON.store(json, Ordering::Relaxed);
}

/// Writes an event.
pub fn note(message: &str) {
    if JSON.load(Ordering::Relaxed) {
        event(json!({"message": message}));
    } else {
        line(&format!("t5gemma: {message}"));
    }
}

/// Writes the fields of a finished request, if lines are JSON.
pub(crate) fn request(fields: Value) {
    if JSON.load(Ordering::Relaxed) {
        event(fields);
    }
}

fn event(fields: Value) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut all = Map::from_iter([("time".to_string(), json!(now.as_millis() as f64 / 1e3))]);
    if let Value::Object(fields) = fields {
        all.extend(fields);
    }
    line(&Value::Object(all).to_string());
}

fn line(text: &str) {
    // In one piece, so that lines of several threads are not mixed; nobody may read them.
    let _ = std::io::stderr().write_all(format!("{text}\n").as_bytes());
}
