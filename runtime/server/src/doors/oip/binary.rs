//! Requests and answers of the protocol as JSON, with tensors in JSON or as bytes behind it.

use serde_json::{Map, Value, json};

use super::VERSION;
use super::infer::Request;
use super::tensor::{Data, Tensor, other_type};
use crate::failure::{Failure, Reason};
use crate::fields::Fields;

/// The form of each output.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Whether outputs are bytes, unless they say otherwise.
    all: bool,
    /// Outputs that say.
    outputs: Map<String, Value>,
}

/// Reads a request: its JSON, and the bytes of its tensors in order.
pub fn read(json: &[u8], mut raw: &[u8]) -> Result<(Request, Wanted), Failure> {
    let mut fields = Fields::parse(json)?;
    let id = fields.text("id")?.unwrap_or_default();
    let mut parameters = fields.object("parameters")?.map(Fields::into_rest).unwrap_or_default();
    let mut wanted = Wanted { all: parameters.remove("binary_data_output") == Some(true.into()), ..Wanted::default() };
    let mut inputs = Vec::new();
    for given in list(&mut fields, "inputs")? {
        let mut given = object("inputs", given)?;
        let name = given.text("name")?.unwrap_or_default();
        let datatype = given.text("datatype")?.unwrap_or_default();
        let shape = given.take("shape").and_then(|shape| shape.as_array()?.iter().map(Value::as_i64).collect());
        let shape =
            shape.ok_or_else(|| Failure::field(&format!("inputs.{name}.shape"), "a list of integers", "none"))?;
        let size = match given.object("parameters")? {
            Some(mut parameters) => parameters.count("binary_data_size")?,
            None => None,
        };
        let data = match (size, given.take("data")) {
            (Some(size), None) => {
                let split = usize::try_from(size).ok().and_then(|size| raw.split_at_checked(size));
                let (bytes, rest) = split.ok_or_else(|| {
                    Failure::field(&format!("inputs.{name}"), format_args!("{size} bytes"), raw.len())
                })?;
                raw = rest;
                Data::from_bytes(&name, &datatype, bytes)?
            }
            (None, Some(data)) => elements(&name, &datatype, &data)?,
            (Some(_), Some(_)) => return Err(Failure::field(&format!("inputs.{name}"), "data or bytes", "both")),
            (None, None) => return Err(Failure::field(&format!("inputs.{name}"), "data or bytes", "neither")),
        };
        inputs.push(Tensor { name, shape, data }.checked()?);
    }
    if !raw.is_empty() {
        let message = format!("the body has {} bytes more than its tensors", raw.len());
        return Err(Failure::new(Reason::Invalid, message));
    }
    let mut outputs = Vec::new();
    for given in list(&mut fields, "outputs")? {
        let mut given = object("outputs", given)?;
        let name = given.text("name")?.unwrap_or_default();
        if let Some(mut parameters) = given.object("parameters")?
            && let Some(is_binary) = parameters.flag("binary_data")?
        {
            wanted.outputs.insert(name.clone(), is_binary.into());
        }
        outputs.push(name);
    }
    Ok((Request { id, parameters, inputs, outputs }, wanted))
}

fn list(fields: &mut Fields, name: &str) -> Result<Vec<Value>, Failure> {
    match fields.take(name) {
        None => Ok(Vec::new()),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(fields.refused(name, "a list of tensors", &other)),
    }
}

fn object(name: &str, value: Value) -> Result<Fields, Failure> {
    match value {
        Value::Object(fields) => Ok(Fields::of(fields)),
        other => Err(Failure::field(name, "objects", t5gemma_protocol::abbreviated(&other))),
    }
}

/// Elements in JSON: a flat list, or lists in lists.
fn elements(name: &str, datatype: &str, data: &Value) -> Result<Data, Failure> {
    let mut flat = Vec::new();
    let mut open = vec![data];
    while let Some(value) = open.pop() {
        match value {
            Value::Array(list) => open.extend(list.iter().rev()),
            element => flat.push(element),
        }
    }
    let expected = match datatype {
        "BYTES" => "strings",
        "INT64" | "INT32" => "integers",
        "FP32" => "numbers",
        other => return Err(other_type(name, other)),
    };
    let refused = || Failure::field(&format!("inputs.{name}.data"), expected, t5gemma_protocol::abbreviated(data));
    match datatype {
        "BYTES" => {
            let texts = flat.iter().map(|text| Some(text.as_str()?.as_bytes().to_vec()));
            Ok(Data::Bytes(texts.collect::<Option<_>>().ok_or_else(refused)?))
        }
        "FP32" => {
            let numbers = flat.iter().map(|number| Some(number.as_f64()? as f32));
            Ok(Data::Floats(numbers.collect::<Option<_>>().ok_or_else(refused)?))
        }
        _ => {
            let numbers = flat.iter().map(|number| number.as_i64());
            Ok(Data::Integers(numbers.collect::<Option<_>>().ok_or_else(refused)?))
        }
    }
}

/// Writes an answer: its JSON, and the bytes of the outputs that are wanted so.
pub fn write(model: &str, id: &str, outputs: &[Tensor], wanted: &Wanted) -> (Value, Vec<u8>) {
    let mut raw = Vec::new();
    let mut one = |tensor: &Tensor| {
        let mut output = json!({"name": tensor.name, "datatype": tensor.data.datatype(), "shape": tensor.shape});
        if wanted.outputs.get(&tensor.name).and_then(Value::as_bool).unwrap_or(wanted.all) {
            let bytes = tensor.data.to_bytes();
            output["parameters"] = json!({"binary_data_size": bytes.len()});
            raw.extend(bytes);
        } else {
            output["data"] = match &tensor.data {
                Data::Bytes(texts) => texts.iter().map(|text| String::from_utf8_lossy(text).into_owned()).collect(),
                Data::Integers(numbers) => json!(numbers),
                Data::Floats(numbers) => json!(numbers),
            };
        }
        output
    };
    let outputs: Vec<Value> = outputs.iter().map(&mut one).collect();
    let mut answer = json!({"model_name": model, "model_version": VERSION, "outputs": outputs});
    if !id.is_empty() {
        answer["id"] = id.into();
    }
    (answer, raw)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_has_tensors_in_json_or_behind_it() {
        let raw = Data::Bytes(vec![b"a b".to_vec()]).to_bytes();
        let json = json!({
            "id": "7",
            "parameters": {"num_beams": 2, "binary_data_output": true},
            "inputs": [
                {"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": raw.len()}},
                {"name": "input_ids", "datatype": "INT64", "shape": [1, 2], "data": [[1, 2]]},
            ],
            "outputs": [{"name": "text_output", "parameters": {"binary_data": false}}, {"name": "output_ids"}],
        });
        let (request, wanted) = read(json.to_string().as_bytes(), &raw).expect("a request");
        assert_eq!(Value::from(request.parameters), json!({"num_beams": 2}));
        assert_eq!(request.inputs[0].data, Data::Bytes(vec![b"a b".to_vec()]));
        assert_eq!(request.inputs[1].data, Data::Integers(vec![1, 2]));
        let outputs = [
            Tensor { name: "text_output".into(), shape: vec![1], data: Data::Bytes(vec![b"x".to_vec()]) },
            Tensor { name: "output_ids".into(), shape: vec![1, 1], data: Data::Integers(vec![5]) },
        ];
        let (json, raw) = write("m", &request.id, &outputs, &wanted);
        assert_eq!(json["outputs"][0]["data"], json!(["x"]));
        assert_eq!(json["outputs"][1]["parameters"]["binary_data_size"], json!(8));
        assert_eq!((json["id"].as_str(), raw), (Some("7"), 5i64.to_le_bytes().to_vec()));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let input = |change: Value| {
            let mut input = json!({"name": "a", "datatype": "BYTES", "shape": [1], "data": ["x"]});
            for (name, value) in change.as_object().expect("an object") {
                input[name] = value.clone();
            }
            json!({"inputs": [input]}).to_string()
        };
        let cases = [
            (input(json!({})), b"x".as_slice(), "1 bytes more"),
            (input(json!({"shape": [2]})), b"", "as many elements"),
            (input(json!({"shape": "x"})), b"", "a list of integers"),
            (input(json!({"datatype": "FP16"})), b"", "BYTES, INT64, INT32 or FP32"),
            (input(json!({"datatype": "FP32"})), b"", "expected numbers"),
            (input(json!({"data": [1]})), b"", "expected strings"),
            (input(json!({"data": null})), b"", "neither"),
            (input(json!({"parameters": {"binary_data_size": 5}})), b"", "both"),
            (input(json!({"data": null, "parameters": {"binary_data_size": 5}})), b"x", "expected 5 bytes, found 1"),
            (json!({"inputs": 1}).to_string(), b"", "a list of tensors"),
            (json!({"inputs": [1]}).to_string(), b"", "expected objects"),
        ];
        for (json, raw, expected) in cases {
            let found = read(json.as_bytes(), raw).expect_err(expected).message;
            assert!(found.contains(expected), "{found}: {expected}");
        }
    }

    proptest! {
        #[test]
        fn no_body_panics(body: Vec<u8>, at: usize) {
            let at = at % (body.len() + 1);
            let _ = read(&body[..at], &body[at..]);
        }
    }
}
