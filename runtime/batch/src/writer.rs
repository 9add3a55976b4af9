//! Writes the output of a shard, with what its record says of it.

use arrow_array::RecordBatch;
use serde_json::{Map, Value, json};

use crate::answer::{Answered, ResultColumn};
use crate::columns::Columns;
use crate::error::BatchError;
use crate::format::Format;
use crate::json_lines;
use crate::npy::Vectors;
use crate::reader::Carried;
use crate::records;
use crate::settings::Settings;
use crate::store::{Output, Store};

/// The output of a shard in progress.
pub struct Writer {
    name: String,
    out: Out,
    /// What is written beside it.
    vectors: Option<Vectors>,
    pub totals: Totals,
}

/// What has been written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub rows: u64,
    pub errors: u64,
    pub source_tokens: u64,
    pub target_tokens: u64,
}

enum Out {
    JsonLines(Box<json_lines::Writer>),
    Parquet(Box<records::Writer>),
}

impl Writer {
    /// Begins the output `name`; `carried` is an empty record of the columns that are carried along, in Parquet, and
    /// `vectors` the width of those beside it.
    pub fn new(
        store: &Store,
        name: &str,
        carried: Option<&RecordBatch>,
        columns: &Columns,
        results: &[ResultColumn],
        vectors: Option<usize>,
    ) -> Result<Writer, BatchError> {
        let failed = |problem: &dyn std::fmt::Display| cannot(store, name, problem);
        let vectors = vectors.map(|width| Vectors::new(store, name, width)).transpose()?;
        let output = store.create(name)?;
        let out = match (Format::of(name), carried) {
            (Ok(Format::JsonLines(compression)), _) => {
                let writer = json_lines::Writer::new(output, compression, columns, results);
                Out::JsonLines(Box::new(writer.map_err(|error| failed(&error))?))
            }
            (Ok(Format::Parquet), Some(carried)) => {
                let writer = records::Writer::new(output, carried, columns, results);
                Out::Parquet(Box::new(writer.map_err(|error| failed(&error))?))
            }
            _ => unreachable!("the reader has opened a shard of this name"),
        };
        Ok(Writer { name: name.to_string(), out, vectors, totals: Totals::default() })
    }

    /// Writes the rows of the chunks with their answers.
    pub fn write(&mut self, store: &Store, chunks: Vec<Carried>, answers: &[Answered]) -> Result<(), BatchError> {
        let mut rest = answers;
        for carried in chunks {
            let count = match &carried {
                Carried::Lines(lines) => lines.len(),
                Carried::Record(record) => record.num_rows(),
            };
            let (own, others) = rest.split_at(count);
            rest = others;
            match (&mut self.out, carried) {
                (Out::JsonLines(out), Carried::Lines(lines)) => {
                    out.write(lines, own).map_err(|error| cannot(store, &self.name, &error))?;
                }
                (Out::Parquet(out), Carried::Record(record)) => {
                    out.write(&record, own).map_err(|error| cannot(store, &self.name, &error))?;
                }
                _ => unreachable!("a shard and its output have the same format"),
            }
        }
        if let Some(vectors) = &mut self.vectors {
            vectors.write(answers).map_err(|error| cannot(store, &self.name, &error))?;
        }
        for answer in answers {
            self.totals.rows += 1;
            match answer {
                Ok(answer) => {
                    self.totals.source_tokens += answer.source_tokens as u64;
                    self.totals.target_tokens += answer.target_tokens as u64;
                }
                Err(_) => self.totals.errors += 1,
            }
        }
        Ok(())
    }

    /// Tells other processes that the output is still being written.
    pub fn renew(&mut self) {
        match &mut self.out {
            Out::JsonLines(out) => out.output().renew(),
            Out::Parquet(out) => out.output().renew(),
        }
    }

    /// Publishes the output after its record. Returns whether it is new: another process may have been faster.
    pub fn finish(self, store: &Store, settings: &Settings) -> Result<bool, BatchError> {
        let failed = |problem: &dyn std::fmt::Display| cannot(store, &self.name, problem);
        let mut output: Output = match self.out {
            Out::JsonLines(out) => out.finish().map_err(|error| failed(&error))?,
            Out::Parquet(out) => out.finish().map_err(|error| failed(&error))?,
        };
        output.sync().map_err(|error| failed(&error))?;
        let Totals { rows, errors, source_tokens, target_tokens } = self.totals;
        let vectors = self.vectors.map(|vectors| vectors.finish(store)).transpose()?;
        let mut record = json!({
            "output": self.name,
            "rows": rows,
            "errors": errors,
            "source_tokens": source_tokens,
            "target_tokens": target_tokens,
            "bytes": output.bytes(),
            "sha256": output.sha256(),
            "version": env!("CARGO_PKG_VERSION"),
            "settings": settings.0,
        });
        if let Some((_, of_vectors)) = &vectors {
            record["vectors"] = of_vectors.clone();
        }
        store.put_record(&format!("{}.json", self.name), format!("{record}\n").as_bytes())?;
        // The output says that the shard is complete, so it comes last.
        if let Some((vectors, _)) = vectors {
            vectors.publish().map_err(|error| failed(&error))?;
        }
        output.publish().map_err(|error| failed(&error))
    }
}

impl Totals {
    /// Adds those of another shard.
    pub fn add(&mut self, other: Totals) {
        self.rows += other.rows;
        self.errors += other.errors;
        self.source_tokens += other.source_tokens;
        self.target_tokens += other.target_tokens;
    }

    pub fn to_json(self) -> Map<String, Value> {
        let fields = [
            ("rows", self.rows),
            ("errors", self.errors),
            ("source_tokens", self.source_tokens),
            ("target_tokens", self.target_tokens),
        ];
        fields.into_iter().map(|(name, count)| (name.to_string(), count.into())).collect()
    }
}

fn cannot(store: &Store, name: &str, problem: &dyn std::fmt::Display) -> BatchError {
    BatchError::file(format!("{store}/{name}"), format!("cannot be written: {problem}"))
}
