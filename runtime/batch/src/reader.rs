//! Reads shards, one after the other, into windows of tokenized rows, on a thread of its own.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use arrow_array::RecordBatch;
use serde_json::{Map, Value};
use t5gemma_protocol::TokenizedRequest;

use crate::answer::ResultColumn;
use crate::columns::{Columns, Requests, Task};
use crate::format::Format;
use crate::json_lines::{self, Line};
use crate::records;
use crate::shards::Shard;

/// Rows of a chunk; windows consist of whole chunks.
pub const CHUNK_ROWS: usize = 128;

/// Bytes of rows from which a window gets no further chunk.
const WINDOW_BYTES: usize = 32 << 20;

/// What is carried along of a chunk's rows.
#[derive(Debug)]
pub enum Carried {
    Lines(Vec<Line>),
    Record(RecordBatch),
}

/// Rows that are answered together.
#[derive(Debug)]
pub struct Window {
    pub chunks: Vec<Carried>,
    /// The rows of all chunks.
    pub rows: Vec<Result<TokenizedRequest, String>>,
    /// How much of the shard has been read, from 0 to 1.
    pub part_read: f64,
}

/// What the reader tells, in the order of the shards.
#[derive(Debug)]
pub enum Read {
    /// A shard begins; in Parquet, with an empty record of the columns that are carried along.
    Begin {
        shard: usize,
        carried: Option<RecordBatch>,
    },
    Window {
        shard: usize,
        window: Window,
    },
    /// A shard has been read, or the reason why it cannot be.
    End {
        shard: usize,
        result: Result<(), String>,
    },
    /// There is no further shard.
    Finished,
}

/// What a reader needs to know.
pub struct Reading<'a> {
    pub shards: &'a [Shard],
    /// Set for shards whose outputs cannot be finished.
    pub abandoned: &'a [AtomicBool],
    pub columns: &'a Columns,
    pub task: Task,
    pub results: &'a [ResultColumn],
    pub window_rows: usize,
    pub tokenize: &'a (dyn Fn(Map<String, Value>) -> Result<TokenizedRequest, String> + Sync),
}

impl Reading<'_> {
    /// Reads all shards; waits for a permit before each window. Ends early if nobody grants any, or if `tell` says that
    /// nobody listens.
    pub fn run(&self, permits: &Receiver<()>, tell: &dyn Fn(Read) -> bool) {
        for (shard, source) in self.shards.iter().enumerate() {
            let result = match self.open(source) {
                Ok((mut rows, carried)) => {
                    if !tell(Read::Begin { shard, carried }) {
                        return;
                    }
                    loop {
                        if permits.recv().is_err() {
                            return;
                        }
                        if self.abandoned[shard].load(Ordering::Relaxed) {
                            break Ok(());
                        }
                        match self.window(&mut rows) {
                            Ok(window) if window.rows.is_empty() => break Ok(()),
                            Ok(window) => {
                                if !tell(Read::Window { shard, window }) {
                                    return;
                                }
                            }
                            Err(problem) => break Err(problem),
                        }
                    }
                }
                Err(problem) => {
                    if permits.recv().is_err() {
                        return;
                    }
                    Err(problem)
                }
            };
            if !tell(Read::End { shard, result }) {
                return;
            }
        }
        tell(Read::Finished);
    }

    fn open(&self, shard: &Shard) -> Result<(Rows, Option<RecordBatch>), String> {
        let format = Format::of(&shard.name)?;
        let failed = |error: io::Error| format!("cannot be read: {error}");
        let (columns, task, results) = (self.columns, self.task, self.results);
        Ok(match format {
            Format::JsonLines(compression) => {
                let reader =
                    json_lines::Reader::new(shard.source.open().map_err(failed)?, compression, columns, task, results)?;
                (Rows::JsonLines { reader: Box::new(reader), bytes: shard.bytes }, None)
            }
            Format::Parquet => {
                let reader = records::Reader::new(
                    shard.source.open_file().map_err(failed)?,
                    CHUNK_ROWS,
                    columns,
                    task,
                    results,
                )?;
                let carried = reader.schema()?;
                (Rows::Parquet(Box::new(reader)), Some(carried))
            }
        })
    }

    /// The next window; without rows at the end of the shard.
    fn window(&self, rows: &mut Rows) -> Result<Window, String> {
        let mut window = Window { chunks: Vec::new(), rows: Vec::new(), part_read: 0.0 };
        let mut bytes = 0;
        while window.rows.len() < self.window_rows && bytes < WINDOW_BYTES {
            let Some((requests, carried)) = rows.next()? else { break };
            bytes += match &carried {
                Carried::Lines(lines) => lines.iter().map(Line::bytes).sum(),
                Carried::Record(record) => record.get_array_memory_size(),
            };
            for request in requests {
                let row = request.and_then(|request| (self.tokenize)(request));
                bytes += row.as_ref().map_or(0, bytes_of);
                window.rows.push(row);
            }
            window.chunks.push(carried);
        }
        window.part_read = rows.part_read();
        Ok(window)
    }
}

/// The memory of a request, roughly.
fn bytes_of(request: &TokenizedRequest) -> usize {
    let tokens: usize = request.sources.iter().chain(&request.targets).map(Vec::len).sum();
    let pixels: usize = request.images.iter().flatten().map(|image| image.values().len()).sum();
    16 * tokens + 4 * pixels
}

/// The rows of a shard.
enum Rows {
    JsonLines { reader: Box<json_lines::Reader>, bytes: u64 },
    Parquet(Box<records::Reader>),
}

impl Rows {
    /// The next chunk; `None` at the end.
    fn next(&mut self) -> Result<Option<(Requests, Carried)>, String> {
        match self {
            Rows::JsonLines { reader, .. } => {
                let (requests, lines) = reader.next(CHUNK_ROWS)?;
                Ok((!requests.is_empty()).then_some((requests, Carried::Lines(lines))))
            }
            Rows::Parquet(reader) => Ok(reader.next()?.map(|(requests, record)| (requests, Carried::Record(record)))),
        }
    }

    fn part_read(&self) -> f64 {
        match self {
            Rows::JsonLines { reader, bytes } => reader.bytes_read() as f64 / (*bytes).max(1) as f64,
            Rows::Parquet(reader) => reader.part_read(),
        }
    }
}
