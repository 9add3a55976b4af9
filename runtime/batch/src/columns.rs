//! The task of a job, and the columns of its shards: which ones a request is made of, and which ones results go to.

use serde_json::{Map, Value};

use crate::answer::{Kind, ResultColumn};
use crate::format;

/// The fields of requests, row by row, or what is wrong with a row.
pub(crate) type Requests = Vec<Result<Map<String, Value>, String>>;

/// What is computed for each row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A target.
    Generate,
    /// The log-probability of a given target.
    Score,
    /// A vector.
    Encode,
    /// Labels.
    Classify,
}

impl Task {
    /// Every task.
    pub const ALL: [Task; 4] = [Task::Generate, Task::Score, Task::Encode, Task::Classify];

    /// `generate`, `score`, `encode` or `classify`.
    pub fn name(self) -> &'static str {
        match self {
            Task::Generate => "generate",
            Task::Score => "score",
            Task::Encode => "encode",
            Task::Classify => "classify",
        }
    }

    /// The column of results unless the option `--result-column` names another.
    pub fn result_column(self) -> &'static str {
        match self {
            Task::Generate => "generated_text",
            Task::Score => "logprob",
            Task::Encode => "embedding",
            Task::Classify => "label",
        }
    }

    /// The fields of a request, besides `text` and `target`.
    fn request_fields(self) -> &'static [&'static str] {
        match self {
            Task::Generate => &[
                "messages",
                "input_ids",
                "attention_mask",
                "images",
                "pixel_values",
                "pan_and_scan",
                "decoder_text",
                "decoder_input_ids",
                "progress_total",
                "options",
            ],
            Task::Score => &[
                "input_ids",
                "attention_mask",
                "images",
                "pixel_values",
                "pan_and_scan",
                "target_ids",
                "decoder_text",
                "decoder_input_ids",
                "progress_total",
                "adapter",
            ],
            Task::Encode | Task::Classify => &["input_ids", "attention_mask", "images", "pixel_values", "pan_and_scan"],
        }
    }
}

/// Where vectors go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VectorFormat {
    /// Into the column of results, as lists.
    #[default]
    Column,
    /// Into a NumPy array beside the output.
    Npy,
}

impl VectorFormat {
    /// Every format.
    pub const ALL: [VectorFormat; 2] = [VectorFormat::Column, VectorFormat::Npy];

    /// `column` or `npy`.
    pub fn name(self) -> &'static str {
        match self {
            VectorFormat::Column => "column",
            VectorFormat::Npy => "npy",
        }
    }
}

/// The columns of a job's shards.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Columns {
    /// The column that identifies rows, which is carried along in any case; `id` by default, like any other column.
    pub id: Option<String>,
    /// The column with the text of each row. If it is given, the row's other sources, such as `messages`, are carried
    /// along like any other column; by default a row is a request, with `text`, `messages` or `input_ids`.
    pub text: Option<String>,
    /// The column with the target to score; `target` by default.
    pub target: Option<String>,
    /// The column of results, before which the names of further columns begin.
    pub result: Option<String>,
    /// The column of errors.
    pub error: String,
    /// The input's columns that are carried along; all by default.
    pub kept: Option<Vec<String>>,
    /// Whether all details of results have a column too.
    pub details: bool,
    /// Where vectors go.
    pub vectors: VectorFormat,
}

impl Default for Columns {
    fn default() -> Columns {
        let vectors = VectorFormat::Column;
        let error = "error".into();
        Columns { id: None, text: None, target: None, result: None, error, kept: None, details: false, vectors }
    }
}

impl Columns {
    /// The field of a request that a column holds.
    pub(crate) fn field<'c>(&self, column: &'c str, task: Task) -> Option<&'c str> {
        if self.text.as_deref().unwrap_or("text") == column {
            return Some("text");
        }
        if task == Task::Score && self.target.as_deref().unwrap_or("target") == column {
            return Some("target");
        }
        let is_other_source = ["messages", "input_ids", "attention_mask"].contains(&column);
        let is_read = task.request_fields().contains(&column) && !(self.text.is_some() && is_other_source);
        is_read.then_some(column)
    }

    /// Whether a column is carried along.
    pub(crate) fn keeps(&self, column: &str) -> bool {
        let is_id = self.id.as_deref() == Some(column);
        is_id || self.kept.as_ref().is_none_or(|kept| kept.iter().any(|name| name == column))
    }

    /// The column with the numbers of lines that are no rows.
    pub(crate) fn id(&self) -> &str {
        self.id.as_deref().unwrap_or("id")
    }

    /// The files of a shard's output besides the one of its name.
    pub fn beside(&self, output: &str) -> Option<String> {
        (self.vectors == VectorFormat::Npy).then(|| format::array_beside(output))
    }

    /// The name of the column of results.
    pub(crate) fn result(&self, task: Task) -> &str {
        self.result.as_deref().unwrap_or(task.result_column())
    }

    /// The first result column of the given kind, and those behind it.
    pub(crate) fn results(&self, task: Task, first: Kind, others: &[(&str, Kind)]) -> Vec<ResultColumn> {
        let result = self.result(task);
        let others = others.iter().map(|&(name, kind)| ResultColumn { name: format!("{result}_{name}"), kind });
        [ResultColumn { name: result.to_string(), kind: first }].into_iter().chain(others).collect()
    }

    /// What of them decides on results, for the settings of an output folder.
    pub fn to_json(&self, task: Task) -> Map<String, Value> {
        let mut fields = Map::new();
        fields.insert("id".into(), self.id.clone().into());
        fields.insert("text".into(), self.text.clone().into());
        if task == Task::Score {
            fields.insert("target".into(), self.target.clone().into());
        }
        fields.insert("result".into(), self.result(task).into());
        fields.insert("error".into(), self.error.clone().into());
        fields.insert("kept".into(), self.kept.clone().into());
        fields.insert("details".into(), self.details.into());
        if task == Task::Encode {
            fields.insert("vectors".into(), self.vectors.name().into());
        }
        fields
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_a_request_unless_its_text_is_named() {
        let whole = Columns::default();
        let named = Columns { text: Some("body".into()), ..Columns::default() };
        let cases = [
            (&whole, "text", Some("text")),
            (&whole, "messages", Some("messages")),
            (&whole, "body", None),
            (&whole, "target", None),
            (&named, "body", Some("text")),
            (&named, "text", None),
            (&named, "messages", None),
            (&named, "decoder_text", Some("decoder_text")),
        ];
        for (columns, column, expected) in cases {
            assert_eq!(columns.field(column, Task::Generate), expected, "{column}");
        }
        assert_eq!(whole.field("target", Task::Score), Some("target"));
    }
}
