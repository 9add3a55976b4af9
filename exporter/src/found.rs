//! What lies where a file of a checkpoint is expected, in words for messages: downloads and copies leave pointers, pages, parts
//! and dead links in its place, of which a parser can only say that they are malformed.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use t5gemma_graphs::json::{self, shown};

/// Text files beyond this are none of a checkpoint; the longest are vocabularies of some 40 MB.
const MOST_TEXT: u64 = 512 << 20;

/// How downloaders call a file that is not whole yet.
const PARTS: [&str; 7] = ["incomplete", "part", "partial", "crdownload", "download", "aria2", "tmp"];

/// Opens a file for reading.
///
/// # Errors
/// What lies there instead.
pub fn open(path: &Path) -> Result<File> {
    let place = path.display();
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => bail!("{place}: expected a file, found {}", absent(path)),
        Err(error) => return Err(error).with_context(|| format!("{place}: cannot be opened")),
        Ok(metadata) => ensure!(metadata.is_file(), "{place}: expected a file, found {}", kind(&metadata)),
    }
    File::open(path).with_context(|| format!("{place}: cannot be opened"))
}

/// Reads a text file whole.
///
/// # Errors
/// What lies there instead, or is no text.
pub fn read_text(path: &Path) -> Result<String> {
    let mut bytes = Vec::new();
    let place = path.display();
    let mut file = open(path)?;
    let length = file.metadata().with_context(|| format!("{place}: cannot be read"))?.len();
    ensure!(length <= MOST_TEXT, "{place}: expected at most {MOST_TEXT} bytes of text, found {length}");
    file.read_to_end(&mut bytes).with_context(|| format!("{place}: cannot be read"))?;
    if let Some(found) = foreign(&bytes) {
        bail!("{place}: expected a text file, found {found}");
    }
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        anyhow!("{place}: cannot be read: expected UTF-8, found other bytes from byte {at} on")
    })
}

/// Reads a file that holds a JSON object, as a text without a byte-order mark and as a value.
///
/// # Errors
/// What lies there instead, or why it is none.
pub fn read_object(path: &Path) -> Result<(String, Value)> {
    let text = read_text(path)?;
    let place = path.display();
    let value = json::parse(&text).map_err(|found| anyhow!("{place}: expected a JSON object, found {found}"))?;
    ensure!(value.is_object(), "{place}: expected a JSON object, found {}", shown(&value));
    Ok((json::without_mark(&text).to_string(), value))
}

/// Whether something lies at a path, a link to nothing included.
pub fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// What can be said of a file that is not there.
pub fn absent(path: &Path) -> String {
    if let Ok(target) = fs::read_link(path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let target = target.to_string_lossy();
        let remedy = match () {
            () if target.contains("annex/objects") => format!(" (fetch it by `git annex get {name}`)"),
            () if target.contains("blobs/") => {
                " (a download cache was moved or cleaned; download the checkpoint again)".into()
            }
            () => String::new(),
        };
        return format!("a link to {target}, where nothing is{remedy}");
    }
    match part(path) {
        Some(part) => format!("only {part}, a download that is not finished"),
        None => "nothing there".to_string(),
    }
}

/// The name of the unfinished download of a file.
pub fn part(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let parts = PARTS.iter().map(|part| format!("{name}.{part}"));
    parts.into_iter().find(|part| path.with_file_name(part).exists())
}

/// What a path leads to that is no file.
fn kind(metadata: &fs::Metadata) -> &'static str {
    if metadata.is_dir() { "a folder" } else { "something that is neither a file nor a folder" }
}

/// What begins as no file of a checkpoint does.
pub fn foreign(bytes: &[u8]) -> Option<String> {
    let head = &bytes[..bytes.len().min(1024)];
    let text = String::from_utf8_lossy(head);
    let text = text.trim_start_matches(['\u{feff}', ' ', '\n', '\r', '\t']);
    let lower = text.to_ascii_lowercase();
    let is_page = ["<!doctype html", "<html"].iter().any(|start| lower.starts_with(start));
    let found = match head {
        [] => "an empty file",
        _ if bytes.iter().all(|&byte| byte == 0) => "nothing but zero bytes (the disk was full, or the copy cut off)",
        _ if text.starts_with("version https://git-lfs") => {
            "the pointer of Git LFS to one (fetch it by `git lfs pull`)"
        }
        _ if text.starts_with("/annex/objects/") || text.starts_with("../annex/objects/") => {
            "the pointer of git-annex to one (fetch it by `git annex get`)"
        }
        _ if text.starts_with("# xet version") => "the pointer of git-xet to one (fetch it by `git xet pull`)",
        _ if is_page => return Some(page(text, &lower)),
        _ if lower.starts_with("<?xml") || lower.starts_with("<error>") => "an XML document, as servers answer errors",
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, b'}' | b'c' | 0x8a | 0x95, ..] => {
            "what PyTorch saves (load it and save it with safe_serialization=True)"
        }
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file (the checkpoint that it was made of is needed)",
        [0x1f, 0x8b, ..] => "a file packed by gzip (unpack it)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "a file packed by zstd (unpack it)",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "a text in UTF-16 (save it as UTF-8)",
        _ => return None,
    };
    Some(found.to_string())
}

/// An HTML page by its title.
fn page(text: &str, lower: &str) -> String {
    let title = lower.find("<title>").zip(lower.find("</title>")).map(|(start, end)| (start + 7, end));
    let title = title.and_then(|(start, end)| text.get(start..end)).map(|title| shown(&title.trim().into()));
    let title = title.map_or_else(String::new, |title| format!(" with the title {title}"));
    format!("an HTML page{title} (a gated model has to be downloaded with a login)")
}

/// What a file is that has no header of safetensors.
pub fn described(bytes: &[u8]) -> Option<String> {
    let is_text = |bytes: &[u8]| {
        // A character may be cut off at the end.
        let is_utf8 = std::str::from_utf8(bytes).err().is_none_or(|error| error.error_len().is_none());
        is_utf8 && bytes.iter().all(|&byte| byte >= b' ' || matches!(byte, b'\t' | b'\n' | b'\r'))
    };
    foreign(bytes).or_else(|| {
        let head = &bytes[..bytes.len().min(200)];
        let text = String::from_utf8_lossy(head);
        is_text(head).then(|| format!("a text that begins with {}", shown(&text.trim_start().into())))
    })
}

/// The path of the checkpoint that a path leads near to, which does not name one.
pub fn checkpoint_near(path: &Path) -> Option<String> {
    if path.is_file() {
        return path
            .parent()
            .map(|folder| format!("name the folder it is in, {}", Path::new(".").join(folder).display()));
    }
    let snapshots = fs::read_dir(path.join("snapshots")).ok()?;
    let mut snapshots: Vec<PathBuf> = snapshots.filter_map(|entry| Some(entry.ok()?.path())).collect();
    snapshots.sort();
    snapshots
        .first()
        .map(|first| format!("this is a download cache: name a snapshot in it, such as {}", first.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_file_of_a_checkpoint_is_told_by_its_beginning() {
        let cases: &[(&[u8], &str)] = &[
            (b"", "an empty file"),
            (&[0; 4096], "nothing but zero bytes"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\n", "git lfs pull"),
            (b"/annex/objects/SHA256E-s12--34.json\n", "git annex get"),
            (b"\n<!DOCTYPE html><title>Log in</title>", "an HTML page with the title \"Log in\""),
            (b"<HTML>", "an HTML page ("),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>", "an XML document"),
            (b"PK\x03\x04\x00", "PyTorch"),
            (b"\x80\x02}q\x00", "PyTorch"),
            (b"\xff\xfe{\0", "UTF-16"),
        ];
        for (bytes, says) in cases {
            let found = foreign(bytes).unwrap_or_default();
            assert!(found.contains(says), "{says}: {found}");
        }
        for bytes in [&b"{\"a\": 1}"[..], b"\xef\xbb\xbf{}", b"\x10\0\0\0\0\0\0\0{\"a\":", b"{{ messages }}"] {
            assert_eq!(foreign(bytes), None, "{bytes:?}");
        }
        let answer = described(b"{\"error\":\"Repository not found\"}").unwrap_or_default();
        assert!(answer.starts_with("a text that begins with \"{"), "{answer}");
        assert_eq!(described(b"\xff\xff\xff\xff\xff\xff\xff\xff{\"a\":"), None);
        assert_eq!(described(b"\x10\0\0\0\0\0\0\0{\"a\":"), None);
    }
}
