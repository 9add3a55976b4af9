//! Shards in Parquet. The only user of arrow and parquet.
//!
//! # Design
//! Rows are read and written in records of a fixed size, because pages and row groups begin where a record does: the
//! bytes of an output must not depend on how many rows were in flight.

use std::fs::File;
use std::sync::Arc;

use arrow_array::builder::{Float32Builder, Float64Builder, Int64Builder, ListBuilder, StringBuilder};
use arrow_array::cast::AsArray;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_schema::{DataType, Field, FieldRef, Schema, SchemaRef};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use serde_json::Value;

use crate::answer::{Answered, Cell, Kind, ResultColumn};
use crate::columns::{Columns, Requests, Task};
use crate::store::Output;

/// The most rows and bytes of a row group, which a writer holds in memory.
const GROUP_ROWS: usize = 1 << 16;
const GROUP_BYTES: usize = 32 << 20;

/// Metadata of the input that describes its columns and would be wrong of the output's.
const OF_COLUMNS: [&str; 2] = ["huggingface", "ARROW:schema"];

/// Reads a shard.
pub struct Reader {
    records: ParquetRecordBatchReader,
    /// The position and the field of each column that requests are made of.
    fields: Vec<(usize, String)>,
    /// The positions of the columns that are carried along.
    kept: Vec<usize>,
    /// With the metadata of the file, which its records do not have.
    schema: SchemaRef,
    rows_read: u64,
    rows: u64,
}

impl Reader {
    pub fn new(
        file: File,
        rows: usize,
        columns: &Columns,
        task: Task,
        results: &[ResultColumn],
    ) -> Result<Reader, String> {
        let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| problem(&error))?;
        let schema = builder.schema().clone();
        let mut kept = Vec::new();
        let mut fields = Vec::new();
        for (at, column) in schema.fields().iter().enumerate() {
            let name = column.name();
            if results.iter().any(|result| result.name == *name) || *name == columns.error {
                return Err(format!("has a column {name:?} already; give the results another name"));
            }
            if columns.keeps(name) {
                kept.push(at);
            }
            if let Some(field) = columns.field(name, task) {
                check(column)?;
                fields.push((at, field.to_string()));
            }
        }
        let is_missing = |name: &String| schema.column_with_name(name).is_none();
        let named = [&columns.id, &columns.text, &columns.target].into_iter().flatten();
        let named = named.chain(columns.kept.iter().flatten());
        if let Some(missing) = { named }.find(|name| is_missing(name)) {
            let found: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
            return Err(format!("expected a column {missing:?}, found {}", found.join(", ")));
        }
        let all = builder.metadata().file_metadata().num_rows() as u64;
        let records = builder.with_batch_size(rows).build().map_err(|error| problem(&error))?;
        Ok(Reader { records, fields, kept, schema, rows_read: 0, rows: all })
    }

    /// The part of the rows that has been read.
    pub fn part_read(&self) -> f64 {
        self.rows_read as f64 / self.rows.max(1) as f64
    }

    /// An empty record with the schema of the columns that are carried along.
    pub fn schema(&self) -> Result<RecordBatch, String> {
        self.carried(&RecordBatch::new_empty(self.schema.clone()))
    }

    fn carried(&self, record: &RecordBatch) -> Result<RecordBatch, String> {
        record.project(&self.kept).map_err(|error| error.to_string())
    }

    /// The next rows; `None` at the end.
    pub fn next(&mut self) -> Result<Option<(Requests, RecordBatch)>, String> {
        let Some(record) = self.records.next() else { return Ok(None) };
        let record = record.map_err(|error| format!("row {}: cannot be read: {error}", self.rows_read + 1))?;
        self.rows_read += record.num_rows() as u64;
        let request = |row: usize| {
            let field = |(at, name): &(usize, String)| Some((name.clone(), value(record.column(*at), row)?));
            Ok(self.fields.iter().filter_map(field).collect())
        };
        let requests = (0..record.num_rows()).map(request).collect();
        Ok(Some((requests, self.carried(&record)?)))
    }
}

/// Refuses a column of a type that no field of a request has.
fn check(column: &FieldRef) -> Result<(), String> {
    fn is_known(data_type: &DataType) -> bool {
        match data_type {
            DataType::List(field) | DataType::LargeList(field) => is_known(field.data_type()),
            DataType::Struct(fields) => fields.iter().all(|field| is_known(field.data_type())),
            DataType::Dictionary(_, values) => matches!(**values, DataType::Utf8 | DataType::LargeUtf8),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean | DataType::Null => true,
            other => other.is_integer() || matches!(other, DataType::Float32 | DataType::Float64),
        }
    }
    match is_known(column.data_type()) {
        true => Ok(()),
        false => Err(format!(
            "column {:?}: expected text, numbers or lists of them, found {}",
            column.name(),
            column.data_type()
        )),
    }
}

/// A value as JSON; `None` for a null.
fn value(column: &dyn Array, row: usize) -> Option<Value> {
    if column.is_null(row) {
        return None;
    }
    let list = |items: ArrayRef| (0..items.len()).map(|at| value(&items, at).unwrap_or(Value::Null)).collect();
    Some(match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().value(row).into(),
        DataType::LargeUtf8 => column.as_string::<i64>().value(row).into(),
        DataType::Utf8View => column.as_string_view().value(row).into(),
        DataType::Boolean => column.as_boolean().value(row).into(),
        DataType::Int8 => column.as_primitive::<Int8Type>().value(row).into(),
        DataType::Int16 => column.as_primitive::<Int16Type>().value(row).into(),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(row).into(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).into(),
        DataType::UInt8 => column.as_primitive::<UInt8Type>().value(row).into(),
        DataType::UInt16 => column.as_primitive::<UInt16Type>().value(row).into(),
        DataType::UInt32 => column.as_primitive::<UInt32Type>().value(row).into(),
        DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row).into(),
        DataType::Float32 => f64::from(column.as_primitive::<Float32Type>().value(row)).into(),
        DataType::Float64 => column.as_primitive::<Float64Type>().value(row).into(),
        DataType::List(_) => Value::Array(list(column.as_list::<i32>().value(row))),
        DataType::LargeList(_) => Value::Array(list(column.as_list::<i64>().value(row))),
        DataType::Dictionary(..) => {
            let dictionary = column.as_any_dictionary();
            let key = *dictionary.normalized_keys().get(row)?;
            return value(dictionary.values(), key);
        }
        DataType::Struct(fields) => {
            let own = column.as_struct();
            let pairs = fields.iter().zip(own.columns());
            let pair = |(field, column): (&FieldRef, &ArrayRef)| Some((field.name().clone(), value(column, row)?));
            Value::Object(pairs.filter_map(pair).collect())
        }
        _ => return None,
    })
}

/// Writes a shard.
pub struct Writer {
    out: ArrowWriter<Output>,
    schema: SchemaRef,
    results: Vec<ResultColumn>,
}

impl Writer {
    /// Begins a file with the columns of `carried`, an empty record, and of the results.
    pub fn new(
        output: Output,
        carried: &RecordBatch,
        columns: &Columns,
        results: &[ResultColumn],
    ) -> Result<Writer, ParquetError> {
        let input = carried.schema();
        let of_results = results.iter().map(|column| Arc::new(Field::new(&column.name, data_type(column.kind), true)));
        let error = Arc::new(Field::new(&columns.error, DataType::Utf8, true));
        let fields: Vec<FieldRef> = input.fields().iter().cloned().chain(of_results).chain([error]).collect();
        let mut metadata = input.metadata().clone();
        metadata.retain(|name, _| !OF_COLUMNS.contains(&name.as_str()));
        let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(GROUP_ROWS))
            .set_max_row_group_bytes(Some(GROUP_BYTES))
            .set_created_by(concat!("t5gemma-batch version ", env!("CARGO_PKG_VERSION")).into())
            .build();
        let out = ArrowWriter::try_new(output, schema.clone(), Some(properties))?;
        Ok(Writer { out, schema, results: results.to_vec() })
    }

    /// The file.
    pub fn output(&mut self) -> &mut Output {
        self.out.inner_mut()
    }

    pub fn write(&mut self, carried: &RecordBatch, answers: &[Answered]) -> Result<(), ParquetError> {
        let mut columns = carried.columns().to_vec();
        for (at, ResultColumn { kind, .. }) in self.results.iter().enumerate() {
            columns
                .push(array(*kind, answers.iter().map(|answer| answer.as_ref().ok().map(|answer| &answer.cells[at]))));
        }
        let mut errors = StringBuilder::new();
        answers.iter().for_each(|answer| errors.append_option(answer.as_ref().err()));
        columns.push(Arc::new(errors.finish()));
        let options = RecordBatchOptions::new().with_row_count(Some(answers.len()));
        let record = RecordBatch::try_new_with_options(self.schema.clone(), columns, &options)?;
        self.out.write(&record)
    }

    pub fn finish(self) -> Result<Output, ParquetError> {
        self.out.into_inner()
    }
}

fn data_type(kind: Kind) -> DataType {
    let list = |item: DataType| DataType::List(Arc::new(Field::new_list_field(item, true)));
    match kind {
        Kind::Text | Kind::Json => DataType::Utf8,
        Kind::Float => DataType::Float64,
        Kind::Texts => list(DataType::Utf8),
        Kind::Integers => list(DataType::Int64),
        Kind::Floats => list(DataType::Float64),
        Kind::Vector => list(DataType::Float32),
    }
}

/// The array of a column's cells; null for rows without a result.
fn array<'c>(kind: Kind, cells: impl Iterator<Item = Option<&'c Cell>>) -> ArrayRef {
    macro_rules! list {
        ($items:expr, $cell:path, $append:ident) => {{
            let mut builder = ListBuilder::new($items);
            for cell in cells {
                match cell {
                    Some($cell(items)) => {
                        items.iter().for_each(|item| builder.values().$append(item.to_owned()));
                        builder.append(true);
                    }
                    _ => builder.append(false),
                }
            }
            Arc::new(builder.finish())
        }};
    }
    match kind {
        Kind::Text | Kind::Json => {
            let mut builder = StringBuilder::new();
            for cell in cells {
                match cell {
                    Some(Cell::Text(text)) => builder.append_value(text),
                    Some(Cell::Json(value)) => builder.append_value(value.to_string()),
                    _ => builder.append_null(),
                }
            }
            Arc::new(builder.finish())
        }
        Kind::Float => {
            let mut builder = Float64Builder::new();
            for cell in cells {
                match cell {
                    Some(Cell::Float(float)) => builder.append_value(*float),
                    _ => builder.append_null(),
                }
            }
            Arc::new(builder.finish())
        }
        Kind::Texts => list!(StringBuilder::new(), Cell::Texts, append_value),
        Kind::Integers => list!(Int64Builder::new(), Cell::Integers, append_value),
        Kind::Floats => list!(Float64Builder::new(), Cell::Floats, append_value),
        Kind::Vector => list!(Float32Builder::new(), Cell::Vector, append_value),
    }
}

/// What is wrong with a file.
fn problem(error: &ParquetError) -> String {
    format!("expected Parquet: {}", error.to_string().trim_start_matches("Parquet error: "))
}
