//! The messages of the Open Inference Protocol's gRPC service and of gRPC's health service, with the numbers of their
//! `.proto` files. Written by hand, so that no compiler of those is needed.

use std::collections::HashMap;

use prost::{Enumeration, Message, Oneof};

/// A request without fields.
#[derive(Clone, PartialEq, Message)]
pub struct Empty {}

/// `ServerLiveResponse`, `ServerReadyResponse` and `ModelReadyResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct IsSo {
    /// Whether it is so.
    #[prost(bool, tag = "1")]
    pub is_so: bool,
}

/// `ModelReadyRequest` and `ModelMetadataRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct ModelRequest {
    /// The model.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its version, if the client cares.
    #[prost(string, tag = "2")]
    pub version: String,
}

/// `ServerMetadataResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct ServerMetadata {
    /// The server's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its version.
    #[prost(string, tag = "2")]
    pub version: String,
    /// What it does beyond the protocol.
    #[prost(string, repeated, tag = "3")]
    pub extensions: Vec<String>,
}

/// `ModelMetadataResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct ModelMetadata {
    /// The model's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its versions.
    #[prost(string, repeated, tag = "2")]
    pub versions: Vec<String>,
    /// What runs it.
    #[prost(string, tag = "3")]
    pub platform: String,
    /// Its inputs.
    #[prost(message, repeated, tag = "4")]
    pub inputs: Vec<TensorMetadata>,
    /// Its outputs.
    #[prost(message, repeated, tag = "5")]
    pub outputs: Vec<TensorMetadata>,
}

/// An input or output of a model.
#[derive(Clone, PartialEq, Message)]
pub struct TensorMetadata {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its type.
    #[prost(string, tag = "2")]
    pub datatype: String,
    /// Its shape, with -1 for any size.
    #[prost(int64, repeated, tag = "3")]
    pub shape: Vec<i64>,
}

/// `InferParameter`.
#[derive(Clone, PartialEq, Message)]
pub struct Parameter {
    /// Its value.
    #[prost(oneof = "Choice", tags = "1, 2, 3, 4, 5")]
    pub choice: Option<Choice>,
}

/// The value of a parameter.
#[derive(Clone, PartialEq, Oneof)]
pub enum Choice {
    /// True or false.
    #[prost(bool, tag = "1")]
    Bool(bool),
    /// An integer.
    #[prost(int64, tag = "2")]
    Integer(i64),
    /// A text.
    #[prost(string, tag = "3")]
    Text(String),
    /// A number.
    #[prost(double, tag = "4")]
    Number(f64),
    /// An integer of at least 0.
    #[prost(uint64, tag = "5")]
    Count(u64),
}

/// `InferTensorContents`, as far as tensors here have such elements.
#[derive(Clone, PartialEq, Message)]
pub struct Contents {
    /// Of `INT32`.
    #[prost(int32, repeated, tag = "2")]
    pub ints: Vec<i32>,
    /// Of `INT64`.
    #[prost(int64, repeated, tag = "3")]
    pub int64s: Vec<i64>,
    /// Of `FP32`.
    #[prost(float, repeated, tag = "6")]
    pub floats: Vec<f32>,
    /// Of `BYTES`.
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub bytes: Vec<Vec<u8>>,
}

/// `InferInputTensor` and `InferOutputTensor`.
#[derive(Clone, PartialEq, Message)]
pub struct TensorMessage {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its type.
    #[prost(string, tag = "2")]
    pub datatype: String,
    /// Its shape.
    #[prost(int64, repeated, tag = "3")]
    pub shape: Vec<i64>,
    /// Its elements, unless they are raw.
    #[prost(message, optional, tag = "5")]
    pub contents: Option<Contents>,
}

/// `InferRequestedOutputTensor`.
#[derive(Clone, PartialEq, Message)]
pub struct RequestedOutput {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// `ModelInferRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct InferRequest {
    /// The model.
    #[prost(string, tag = "1")]
    pub model_name: String,
    /// Its version, if the client cares.
    #[prost(string, tag = "2")]
    pub model_version: String,
    /// Returned with the answer.
    #[prost(string, tag = "3")]
    pub id: String,
    /// Generation options.
    #[prost(map = "string, message", tag = "4")]
    pub parameters: HashMap<String, Parameter>,
    /// The inputs.
    #[prost(message, repeated, tag = "5")]
    pub inputs: Vec<TensorMessage>,
    /// The wanted outputs.
    #[prost(message, repeated, tag = "6")]
    pub outputs: Vec<RequestedOutput>,
    /// The inputs' elements, if they are raw.
    #[prost(bytes = "vec", repeated, tag = "7")]
    pub raw_input_contents: Vec<Vec<u8>>,
}

/// `ModelInferResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct InferResponse {
    /// The model.
    #[prost(string, tag = "1")]
    pub model_name: String,
    /// Its version.
    #[prost(string, tag = "2")]
    pub model_version: String,
    /// The request's id.
    #[prost(string, tag = "3")]
    pub id: String,
    /// Facts about the answer.
    #[prost(map = "string, message", tag = "4")]
    pub parameters: HashMap<String, Parameter>,
    /// The outputs.
    #[prost(message, repeated, tag = "5")]
    pub outputs: Vec<TensorMessage>,
    /// Their elements.
    #[prost(bytes = "vec", repeated, tag = "6")]
    pub raw_output_contents: Vec<Vec<u8>>,
}

/// `ModelStreamInferResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct StreamResponse {
    /// Why the request failed; empty if it did not.
    #[prost(string, tag = "1")]
    pub error_message: String,
    /// A part of the answer.
    #[prost(message, optional, tag = "2")]
    pub infer_response: Option<InferResponse>,
}

/// `RepositoryIndexResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct Index {
    /// The models.
    #[prost(message, repeated, tag = "1")]
    pub models: Vec<IndexEntry>,
}

/// A model of the repository.
#[derive(Clone, PartialEq, Message)]
pub struct IndexEntry {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its version.
    #[prost(string, tag = "2")]
    pub version: String,
    /// `READY`, `LOADING` or `UNAVAILABLE`.
    #[prost(string, tag = "3")]
    pub state: String,
}

/// `RepositoryModelLoadRequest` and `RepositoryModelUnloadRequest`: of Triton the model is the second field, of KServe the
/// first.
#[derive(Clone, PartialEq, Message)]
pub struct LoadRequest {
    /// Triton's repository, or KServe's model.
    #[prost(string, tag = "1")]
    pub first: String,
    /// Triton's model.
    #[prost(string, tag = "2")]
    pub second: String,
}

/// `HealthCheckRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct HealthRequest {
    /// The service; empty for the server.
    #[prost(string, tag = "1")]
    pub service: String,
}

/// `HealthCheckResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct HealthResponse {
    /// Its health.
    #[prost(enumeration = "Health", tag = "1")]
    pub status: i32,
}

/// `ServingStatus`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
#[repr(i32)]
pub enum Health {
    /// Not known yet.
    Unknown = 0,
    /// It takes requests.
    Serving = 1,
    /// It does not.
    NotServing = 2,
    /// There is no such service.
    ServiceUnknown = 3,
}
