//! Results of rows as cells of typed columns, which both formats write.

use serde::{Serialize, Serializer};
use serde_json::Value;

/// The type of a result column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A string.
    Text,
    /// A list of strings.
    Texts,
    /// A list of int64.
    Integers,
    /// A float64.
    Float,
    /// A list of float64.
    Floats,
    /// A list of float32.
    Vector,
    /// Any JSON; in Parquet its text.
    Json,
}

/// A column of results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResultColumn {
    pub name: String,
    pub kind: Kind,
}

/// A value of a result column.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    Text(String),
    Texts(Vec<String>),
    Integers(Vec<i64>),
    Float(f64),
    Floats(Vec<f64>),
    Vector(Vec<f32>),
    Json(Value),
}

impl Serialize for Cell {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Cell::Text(text) => text.serialize(serializer),
            Cell::Texts(texts) => texts.serialize(serializer),
            Cell::Integers(integers) => integers.serialize(serializer),
            Cell::Float(float) => float.serialize(serializer),
            Cell::Floats(floats) => floats.serialize(serializer),
            // The shortest decimals that are read as the same float32.
            Cell::Vector(floats) => floats.serialize(serializer),
            Cell::Json(value) => value.serialize(serializer),
        }
    }
}

/// The result of a row.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// One for each result column.
    pub cells: Vec<Cell>,
    /// Without padding.
    pub source_tokens: usize,
    pub target_tokens: usize,
}

/// The result of a row, or why it has none.
pub type Answered = Result<Answer, String>;
