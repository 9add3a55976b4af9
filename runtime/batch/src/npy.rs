//! Vectors of a shard as a NumPy array beside its output: float32 of the shape [rows, width], of which row n belongs to row
//! n of the output. A row with an error has NaNs.
//!
//! # Design
//! The header of an array tells how many rows follow, so rows wait in a file without a name until the shard ends.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};

use serde_json::{Value, json};

use crate::answer::{Answered, Cell};
use crate::error::BatchError;
use crate::format;
use crate::store::{Output, Store};

/// The vectors of a shard in progress.
#[derive(Debug)]
pub struct Vectors {
    name: String,
    waiting: BufWriter<File>,
    rows: u64,
    width: usize,
}

impl Vectors {
    /// Begins the array beside `output`, of vectors of `width` numbers.
    pub fn new(store: &Store, output: &str, width: usize) -> Result<Vectors, BatchError> {
        let name = format::array_beside(output);
        let file = store.scratch().map_err(|error| BatchError::file(format!("{store}/{name}"), error))?;
        Ok(Vectors { name, waiting: BufWriter::with_capacity(1 << 18, file), rows: 0, width })
    }

    pub fn write(&mut self, answers: &[Answered]) -> io::Result<()> {
        let missing = vec![f32::NAN; self.width];
        for answer in answers {
            let vector = match answer {
                Ok(answer) => match &answer.cells[..] {
                    [Cell::Vector(vector)] => vector,
                    cells => unreachable!("a vector is the only result of its row, found {cells:?}"),
                },
                Err(_) => &missing,
            };
            for number in vector {
                self.waiting.write_all(&number.to_le_bytes())?;
            }
        }
        self.rows += answers.len() as u64;
        Ok(())
    }

    /// The complete array, and what the record says of it.
    pub fn finish(self, store: &Store) -> Result<(Output, Value), BatchError> {
        let failed = |error: io::Error| {
            BatchError::file(format!("{store}/{}", self.name), format!("cannot be written: {error}"))
        };
        let mut output = store.create(&self.name)?;
        let copy = || {
            let mut file = self.waiting.into_inner().map_err(io::IntoInnerError::into_error)?;
            file.rewind()?;
            output.write_all(&header(self.rows, self.width))?;
            io::copy(&mut file, &mut output)?;
            output.sync()
        };
        copy().map_err(failed)?;
        let record = json!({
            "output": self.name,
            "shape": [self.rows, self.width],
            "bytes": output.bytes(),
            "sha256": output.sha256(),
        });
        Ok((output, record))
    }
}

/// The header of version 1.0 of the format, with the padding that makes the data begin at a multiple of 64.
fn header(rows: u64, width: usize) -> Vec<u8> {
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {width}), }}");
    let begin = b"\x93NUMPY\x01\x00";
    let length = (begin.len() + 2 + text.len() + 1).next_multiple_of(64) - begin.len() - 2;
    text += &" ".repeat(length - text.len() - 1);
    text.push('\n');
    let length = u16::try_from(length).expect("two numbers are short");
    [&begin[..], &length.to_le_bytes(), text.as_bytes()].concat()
}
