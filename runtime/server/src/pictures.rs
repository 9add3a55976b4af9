//! Images of requests: how the APIs carry them beside or in texts. The protocol decodes them; here is nothing but their
//! places.

use serde_json::{Value, json};
use t5gemma_protocol::{RequestError, abbreviated};

use crate::failure::Failure;

/// What an image has to be, where it is named.
pub const A_DATA_URI: &str = "a data URI (the server opens no files and no connections)";

/// The error of an image that is named instead of sent.
pub fn no_file(name: &str) -> RequestError {
    RequestError::form("images", A_DATA_URI, abbreviated(&name.into()))
}

/// A text without the images that stand in it as TGI's clients write them, `![](URI)`, and their URIs; `start` takes the
/// place of each.
pub fn in_markdown(text: &str, start: &str) -> (String, Vec<String>) {
    let (mut plain, mut uris) = (String::new(), Vec::new());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("![](") {
        let is_image = ["data:", "http://", "https://"].iter().any(|scheme| after.starts_with(scheme));
        plain.push_str(before);
        match after.split_once(')').filter(|_| is_image) {
            Some((uri, behind)) => {
                plain.push_str(start);
                uris.push(uri.to_string());
                rest = behind;
            }
            None => {
                plain.push_str("![](");
                rest = after;
            }
        }
    }
    plain.push_str(rest);
    (plain, uris)
}

/// The URI of a part of a message, `{"type": "image_url", "image_url": {"url": "data:…"}}`. `field` is the part.
pub fn of_part(field: &str, part: &Value) -> Result<String, Failure> {
    let url = part.pointer("/image_url/url").or_else(|| part.get("image_url").filter(|url| url.is_string()));
    match url.and_then(Value::as_str) {
        Some(uri) if uri.starts_with("data:") => Ok(uri.to_string()),
        other => {
            let found = other.map_or("none".into(), |uri| abbreviated(&uri.into()));
            Err(Failure::field(&format!("{field}.image_url.url"), A_DATA_URI, found))
        }
    }
}

/// Messages whose lists of parts are one text, as most chat templates read them; `start` stands for an image.
pub fn flattened(messages: &[Value], start: &str) -> Vec<Value> {
    let text = |part: &Value| match part["type"].as_str() {
        Some("image") => start.to_string(),
        _ => part["text"].as_str().unwrap_or_default().to_string(),
    };
    let one = |message: &Value| {
        let mut message = message.clone();
        if let Some(parts) = message.get("content").and_then(Value::as_array) {
            message["content"] = json!(parts.iter().map(text).collect::<String>());
        }
        message
    };
    messages.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_in_markdown_leave_their_places() {
        let cases: [(&str, &str, &[&str]); 6] = [
            ("a", "a", &[]),
            ("![](data:x)What is it?", "<i>What is it?", &["data:x"]),
            ("![](data:x) ![](https://a/b.png)", "<i> <i>", &["data:x", "https://a/b.png"]),
            ("see ![](file.png) and ![](data:x", "see ![](file.png) and ![](data:x", &[]),
            ("![a](data:x)", "![a](data:x)", &[]),
            ("![](![](data:x))", "![](<i>)", &["data:x"]),
        ];
        for (text, plain, uris) in cases {
            let uris = uris.iter().map(|uri| uri.to_string()).collect::<Vec<_>>();
            assert_eq!(in_markdown(text, "<i>"), (plain.to_string(), uris), "{text}");
        }
    }

    #[test]
    fn a_part_has_a_data_uri() {
        for (part, expected) in [
            (json!({"image_url": {"url": "data:x", "detail": "low"}}), Ok("data:x")),
            (json!({"image_url": "data:x"}), Ok("data:x")),
            (json!({"image_url": {"url": "https://a/b"}}), Err("found \"https://a/b\"")),
            (json!({"image_url": {"url": "/etc/passwd"}}), Err("the server opens no files and no connections")),
            (json!({"image_url": {}}), Err("p.image_url.url: expected a data URI")),
        ] {
            match (of_part("p", &part), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, expected),
                (Err(failure), Err(expected)) => assert!(failure.message.contains(expected), "{}", failure.message),
                (found, _) => panic!("{part}: {found:?}"),
            }
        }
    }

    #[test]
    fn parts_become_one_text() {
        let parts = json!([{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": "b"}]);
        let messages = [json!({"role": "user", "content": parts}), json!({"role": "user", "content": "c"})];
        let flat = flattened(&messages, "<i>");
        assert_eq!((&flat[0]["content"], &flat[1]), (&json!("a <i>b"), &messages[1]));
    }
}
