//! Opens and reads the files of a checkpoint. Interrupted downloads and copies leave pointers, web pages, partial files
//! and broken links behind; errors here name them, where a parser could only report malformed input.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;
use t5gemma_graphs::json::{self, shown};

use crate::error::{Error, Result};

/// Maximum size of a text file; the longest in real checkpoints are vocabularies of some 40 MB.
const MAX_TEXT: u64 = 512 << 20;

/// Suffixes that downloaders give to unfinished files.
const PARTIAL: [&str; 7] = ["incomplete", "part", "partial", "crdownload", "download", "aria2", "tmp"];

/// Opens a file for reading.
///
/// # Errors
/// What is there instead.
pub fn open(path: &Path) -> Result<File> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(Error::invalid(path.display(), "a file", describe_missing(path)));
        }
        Err(error) => return Err(Error::io(path, "cannot be opened")(error)),
        Ok(metadata) if !metadata.is_file() => {
            let found = if metadata.is_dir() { "a folder" } else { "a device, pipe or socket" };
            return Err(Error::invalid(path.display(), "a file", found));
        }
        Ok(_) => {}
    }
    File::open(path).map_err(Error::io(path, "cannot be opened"))
}

/// Reads a text file.
///
/// # Errors
/// What is there instead, or why it is not text.
pub fn read_text(path: &Path) -> Result<String> {
    let mut file = open(path)?;
    let length = file.metadata().map_err(Error::io(path, "cannot be read"))?.len();
    let invalid = |expected: String, found: String| Err(Error::invalid(path.display(), expected, found));
    if length > MAX_TEXT {
        return invalid(format!("at most {MAX_TEXT} bytes of text"), length.to_string());
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(Error::io(path, "cannot be read"))?;
    if let Some(found) = identify(&bytes) {
        return invalid("a text file".into(), found);
    }
    String::from_utf8(bytes).or_else(|error| {
        let at = error.utf8_error().valid_up_to();
        invalid("UTF-8 text".into(), format!("invalid UTF-8 at byte {at}"))
    })
}

/// Reads a file that holds a JSON object, as a text without a byte-order mark and as a value.
///
/// # Errors
/// What is there instead, or why it is not a JSON object.
pub fn read_json_object(path: &Path) -> Result<(String, Value)> {
    let text = read_text(path)?;
    let invalid = |found: String| Error::invalid(path.display(), "a JSON object", found);
    let value = json::parse(&text).map_err(|found| invalid(found.to_string()))?;
    if !value.is_object() {
        return Err(invalid(shown(&value)));
    }
    Ok((json::without_mark(&text).to_string(), value))
}

/// Whether there is anything at a path, broken links included.
pub fn entry_exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Describes what is there in place of a missing file: a broken link, an unfinished download, or nothing.
pub fn describe_missing(path: &Path) -> String {
    if let Ok(target) = fs::read_link(path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let target = target.to_string_lossy();
        let remedy = if target.contains("annex/objects") {
            format!(" (run `git annex get {name}`)")
        } else if target.contains("blobs/") {
            " (the download cache was moved or cleaned; download the checkpoint again)".to_string()
        } else {
            String::new()
        };
        return format!("a broken link to {target}{remedy}");
    }
    match partial_download(path) {
        Some(partial) => format!("only {partial}, an unfinished download"),
        None => "nothing".to_string(),
    }
}

/// The name of the unfinished download of a file, if there is one.
pub fn partial_download(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let names = PARTIAL.iter().map(|suffix| format!("{name}.{suffix}"));
    names.into_iter().find(|name| path.with_file_name(name).exists())
}

/// Identifies, by its first bytes, a file that cannot be one of a checkpoint.
pub fn identify(bytes: &[u8]) -> Option<String> {
    let head = &bytes[..bytes.len().min(1024)];
    let text = String::from_utf8_lossy(head);
    let text = text.trim_start_matches(['\u{feff}', ' ', '\n', '\r', '\t']);
    let lower = text.to_ascii_lowercase();
    let is_page = ["<!doctype html", "<html"].iter().any(|start| lower.starts_with(start));
    let found = match head {
        [] => "an empty file",
        _ if bytes.iter().all(|&byte| byte == 0) => "only zero bytes (a full disk or an interrupted copy)",
        _ if text.starts_with("version https://git-lfs") => "a Git LFS pointer (run `git lfs pull`)",
        _ if text.starts_with("/annex/objects/") || text.starts_with("../annex/objects/") => {
            "a git-annex pointer (run `git annex get`)"
        }
        _ if text.starts_with("# xet version") => "a git-xet pointer (run `git xet pull`)",
        _ if is_page => return Some(describe_page(text, &lower)),
        _ if lower.starts_with("<?xml") || lower.starts_with("<error>") => {
            "an XML document (probably a server's error response)"
        }
        [b'P', b'K', 3, 4, ..] | [0x80, 2..=5, b'}' | b'c' | 0x8a | 0x95, ..] => {
            "a PyTorch file (load it and save it with safe_serialization=True)"
        }
        [b'G', b'G', b'U', b'F', ..] => "a GGUF file (export the original checkpoint instead)",
        [0x1f, 0x8b, ..] => "a gzip file (decompress it)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "a zstd file (decompress it)",
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => "UTF-16 text (save it as UTF-8)",
        _ => return None,
    };
    Some(found.to_string())
}

/// Describes an HTML page by its title.
fn describe_page(text: &str, lower: &str) -> String {
    let title = lower.find("<title>").zip(lower.find("</title>")).map(|(start, end)| (start + 7, end));
    let title = title.and_then(|(start, end)| text.get(start..end)).map(|title| shown(&title.trim().into()));
    let title = title.map_or_else(String::new, |title| format!(" with the title {title}"));
    format!("an HTML page{title} (log in to download a gated model)")
}

/// Identifies a file without a safetensors header, if only as text.
pub fn identify_or_quote(bytes: &[u8]) -> Option<String> {
    let is_text = |bytes: &[u8]| {
        // The end may be in the middle of a character.
        let is_utf8 = std::str::from_utf8(bytes).err().is_none_or(|error| error.error_len().is_none());
        is_utf8 && bytes.iter().all(|&byte| byte >= b' ' || matches!(byte, b'\t' | b'\n' | b'\r'))
    };
    identify(bytes).or_else(|| {
        let head = &bytes[..bytes.len().min(200)];
        let text = String::from_utf8_lossy(head);
        is_text(head).then(|| format!("text that begins with {}", shown(&text.trim_start().into())))
    })
}

/// A hint at the checkpoint folder that the user probably meant.
pub fn nearby_checkpoint(path: &Path) -> Option<String> {
    if path.is_file() {
        return path.parent().map(|folder| format!("pass its folder, {}", Path::new(".").join(folder).display()));
    }
    let snapshots = fs::read_dir(path.join("snapshots")).ok()?;
    let mut snapshots: Vec<PathBuf> = snapshots.filter_map(|entry| Some(entry.ok()?.path())).collect();
    snapshots.sort();
    snapshots
        .first()
        .map(|first| format!("this is a download cache; pass one of its snapshots, such as {}", first.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_files_are_identified_by_their_first_bytes() {
        let cases: &[(&[u8], &str)] = &[
            (b"", "an empty file"),
            (&[0; 4096], "only zero bytes"),
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
            let found = identify(bytes).unwrap_or_default();
            assert!(found.contains(says), "{says}: {found}");
        }
        for bytes in [&b"{\"a\": 1}"[..], b"\xef\xbb\xbf{}", b"\x10\0\0\0\0\0\0\0{\"a\":", b"{{ messages }}"] {
            assert_eq!(identify(bytes), None, "{bytes:?}");
        }
        let answer = identify_or_quote(b"{\"error\":\"Repository not found\"}").unwrap_or_default();
        assert!(answer.starts_with("text that begins with \"{"), "{answer}");
        assert_eq!(identify_or_quote(b"\xff\xff\xff\xff\xff\xff\xff\xff{\"a\":"), None);
        assert_eq!(identify_or_quote(b"\x10\0\0\0\0\0\0\0{\"a\":"), None);
    }
}
