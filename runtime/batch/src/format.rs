//! A shard's format and compression, which its file name tells, and the name of the array of vectors beside an output.

/// The format of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    JsonLines(Compression),
    Parquet,
}

impl Format {
    /// How names of files end, format by format.
    pub const SUFFIXES: [&str; 4] = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"];

    /// The format that a file name says.
    pub fn of(name: &str) -> Result<Format, String> {
        let formats = [
            Format::JsonLines(Compression::None),
            Format::JsonLines(Compression::Gzip),
            Format::JsonLines(Compression::Zstd),
            Format::Parquet,
        ];
        let found = Format::SUFFIXES.into_iter().zip(formats).find(|(suffix, _)| name.ends_with(suffix));
        let expected = "expected a name that ends in .jsonl, .jsonl.gz, .jsonl.zst or .parquet";
        found.map(|(_, format)| format).ok_or_else(|| expected.to_string())
    }
}

/// How a shard is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    None,
    Gzip,
    Zstd,
}

/// The name of the array of vectors beside an output.
pub fn array_beside(output: &str) -> String {
    let suffix = Format::SUFFIXES.into_iter().find(|suffix| output.ends_with(suffix)).unwrap_or_default();
    format!("{}.npy", output.strip_suffix(suffix).unwrap_or(output))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_are_named_after_their_outputs() {
        for (output, expected) in
            [("a.jsonl", "a.npy"), ("a.b.jsonl.gz", "a.b.npy"), ("a.jsonl.zst", "a.npy"), ("a.parquet", "a.npy")]
        {
            assert_eq!(array_beside(output), expected);
        }
    }
}
