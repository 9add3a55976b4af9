//! When a request samples: clients of most APIs say so by a temperature.

use serde_json::{Map, Value};

/// A temperature, or anything else that only means something to sampling, asks for sampling; so does more than one choice
/// without beams. A temperature of 0 asks for the most likely tokens.
pub fn samples(options: &mut Map<String, Value>) {
    if options.get("temperature").and_then(Value::as_f64) == Some(0.0) {
        options.remove("temperature");
        options.insert("do_sample".into(), false.into());
    }
    if options.contains_key("do_sample") {
        return;
    }
    let asks = |name: &str, off: f64| options.get(name).and_then(Value::as_f64).is_some_and(|value| value != off);
    let has_temperature = options.contains_key("temperature");
    let narrows = asks("top_p", 1.0) || asks("top_k", 0.0) || asks("min_p", 0.0) || asks("typical_p", 1.0);
    let has_beams = asks("num_beams", 1.0) || options.contains_key("return_alternatives");
    let several = asks("num_return_sequences", 1.0) && !has_beams;
    if has_temperature || narrows || several {
        options.insert("do_sample".into(), true.into());
    }
}
