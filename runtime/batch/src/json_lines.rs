//! Shards of JSON lines, plain or compressed. What is carried along is the text of the line itself: results are
//! appended to its object, so that nothing is rewritten.

use std::borrow::Cow;
use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use t5gemma_protocol::{LONGEST_LINE, describe_invalid_utf8, next_line, parse_object};

use crate::answer::{Answered, ResultColumn};
use crate::columns::{Columns, Requests, Task};
use crate::format::Compression;
use crate::store::Output;

/// A row's own object.
#[derive(Clone, Debug)]
pub struct Line {
    /// Its text without the closing brace.
    open: String,
}

impl Line {
    /// Its length.
    pub fn bytes(&self) -> usize {
        self.open.len()
    }
}

/// Reads a shard.
pub struct Reader {
    lines: Box<dyn BufRead + Send>,
    read: Arc<AtomicU64>,
    /// The number of the next line, from 0.
    number: usize,
    columns: Columns,
    task: Task,
    /// Names that the row must not have, because results go there.
    taken: Vec<String>,
}

impl Reader {
    pub fn new(
        input: Box<dyn Read + Send>,
        compression: Compression,
        columns: &Columns,
        task: Task,
        results: &[ResultColumn],
    ) -> Result<Reader, String> {
        let read = Arc::new(AtomicU64::new(0));
        let counted = Counted { input, read: read.clone() };
        let lines: Box<dyn BufRead + Send> = match compression {
            Compression::None => Box::new(BufReader::with_capacity(1 << 18, counted)),
            Compression::Gzip => Box::new(BufReader::with_capacity(1 << 18, MultiGzDecoder::new(counted))),
            Compression::Zstd => {
                let decoder = zstd::stream::read::Decoder::new(counted).map_err(|error| error.to_string())?;
                Box::new(BufReader::with_capacity(1 << 18, decoder))
            }
        };
        let taken = results.iter().map(|column| column.name.clone()).chain([columns.error.clone()]).collect();
        Ok(Reader { lines, read, number: 0, columns: columns.clone(), task, taken })
    }

    /// The bytes of the input that have been read.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The next rows, at most `most`: the fields of their requests, and what is carried along. Empty at the end.
    pub fn next(&mut self, most: usize) -> Result<(Requests, Vec<Line>), String> {
        let (mut requests, mut carried) = (Vec::new(), Vec::new());
        while requests.len() < most {
            let number = self.number;
            let line = next_line(&mut self.lines, number == 0);
            let line = line.map_err(|error| format!("line {}: cannot be read: {error}", number + 1))?;
            let Some(line) = line else { break };
            self.number += 1;
            if line.trim_ascii().is_empty() {
                continue;
            }
            match object(&line) {
                Ok((text, fields)) => {
                    if let Some(name) = self.taken.iter().find(|&name| fields.contains_key(name)) {
                        return Err(format!(
                            "line {}: has a field {name:?} already; give the results another name",
                            number + 1
                        ));
                    }
                    carried.push(self.line(text));
                    requests.push(Ok(self.request(fields)));
                }
                Err(problem) => {
                    let id = Value::from(self.columns.id());
                    carried.push(Line { open: format!("{{{id}:{number}") });
                    requests.push(Err(problem));
                }
            }
        }
        Ok((requests, carried))
    }

    fn request(&self, fields: Map<String, Value>) -> Map<String, Value> {
        let of_request = |(name, value): (String, Value)| {
            let field = self.columns.field(&name, self.task)?;
            Some((field.to_string(), value))
        };
        fields.into_iter().filter_map(of_request).collect()
    }

    fn line(&self, object: &str) -> Line {
        if self.columns.kept.is_none() {
            let open = object.trim().strip_suffix('}').expect("an object ends with a brace");
            return Line { open: open.trim_end().to_string() };
        }
        let fields: Fields = serde_json::from_str(object).expect("the object has been parsed");
        let mut open = "{".to_string();
        for (name, value) in fields.0.iter().filter(|(name, _)| self.columns.keeps(name)) {
            let comma = if open.len() > 1 { "," } else { "" };
            open += &format!("{comma}{}:{}", Value::from(name.as_ref()), value.get());
        }
        Line { open }
    }
}

fn object(line: &[u8]) -> Result<(&str, Map<String, Value>), String> {
    if line.len() > LONGEST_LINE {
        return Err(format!("expected a line of at most {} MiB, found a longer one", LONGEST_LINE >> 20));
    }
    let text = str::from_utf8(line).map_err(|error| describe_invalid_utf8(line, &error))?;
    let fields = parse_object(text).map_err(|error| error.to_string())?;
    Ok((text, fields))
}

/// The fields of an object with the text of their values.
struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Fields<'de>, D::Error> {
        struct OfFields;
        impl<'de> Visitor<'de> for OfFields {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Vec::new();
                while let Some((name, value)) = object.next_entry::<String, &RawValue>()? {
                    fields.push((Cow::Owned(name), value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(OfFields)
    }
}

/// Writes a shard.
pub struct Writer {
    out: Encoder,
    /// The names of result columns as JSON.
    names: Vec<String>,
    error: String,
}

enum Encoder {
    Plain(Output),
    Gzip(GzEncoder<Output>),
    Zstd(zstd::stream::write::Encoder<'static, Output>),
}

impl Writer {
    pub fn new(
        output: Output,
        compression: Compression,
        columns: &Columns,
        results: &[ResultColumn],
    ) -> io::Result<Writer> {
        let out = match compression {
            Compression::None => Encoder::Plain(output),
            // Without a time, so that the bytes are always the same.
            Compression::Gzip => Encoder::Gzip(GzEncoder::new(output, flate2::Compression::default())),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(output, zstd::DEFAULT_COMPRESSION_LEVEL)?;
                encoder.include_checksum(true)?;
                Encoder::Zstd(encoder)
            }
        };
        let quoted = |name: &str| Value::from(name).to_string();
        let names = results.iter().map(|column| quoted(&column.name)).collect();
        Ok(Writer { out, names, error: quoted(&columns.error) })
    }

    /// The file.
    pub fn output(&mut self) -> &mut Output {
        match &mut self.out {
            Encoder::Plain(output) => output,
            Encoder::Gzip(encoder) => encoder.get_mut(),
            Encoder::Zstd(encoder) => encoder.get_mut(),
        }
    }

    pub fn write(&mut self, rows: Vec<Line>, answers: &[Answered]) -> io::Result<()> {
        for (Line { open: mut text }, answer) in rows.into_iter().zip(answers) {
            let mut field = |name: &str, value: String| {
                let comma = if text.len() > 1 { "," } else { "" };
                text += &format!("{comma}{name}:{value}");
            };
            match answer {
                Ok(answer) => {
                    for (name, cell) in self.names.iter().zip(&answer.cells) {
                        field(name, serde_json::to_string(cell)?);
                    }
                }
                Err(problem) => field(&self.error, Value::from(problem.as_str()).to_string()),
            }
            text += "}\n";
            match &mut self.out {
                Encoder::Plain(out) => out.write_all(text.as_bytes())?,
                Encoder::Gzip(out) => out.write_all(text.as_bytes())?,
                Encoder::Zstd(out) => out.write_all(text.as_bytes())?,
            }
        }
        Ok(())
    }

    pub fn finish(self) -> io::Result<Output> {
        match self.out {
            Encoder::Plain(output) => Ok(output),
            Encoder::Gzip(encoder) => encoder.finish(),
            Encoder::Zstd(encoder) => encoder.finish(),
        }
    }
}

/// An input whose bytes are counted as they are read.
struct Counted {
    input: Box<dyn Read + Send>,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.input.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
