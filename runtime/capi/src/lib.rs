//! The C library, `libt5gemma`. `include/t5gemma.h` documents it; the files here follow its order. A function converts
//! its arguments, calls the runtime, and converts the result.
//!
//! # Design
//! Arguments arrive as the types of `input.rs` (`Text`, `Array`, `Record`, `Out`) or as a `Handle`, whose methods check
//! them. The other `unsafe` code reads the array that a callback returns, and registers handlers for fork. The caller
//! guarantees that memory is as large as the header says. Handles are ids into a table, so that freed handles and
//! handles of another type are recognized.

// The header is the documentation, with C's naming conventions.
#![allow(missing_docs, non_camel_case_types)]

mod boundary;
mod error;
mod handle;
mod input;

mod onnxruntime;

mod call;
mod cancellation;
mod gate;
mod model;
mod options;
mod result;
mod sources;

mod engine;
mod reports;
mod request;

mod encoder;
mod tokenizer;

use std::ffi::c_char;

/// The ABI version, which `build.rs` reads from the header.
const ABI: &str = env!("T5G_ABI");

#[unsafe(no_mangle)]
pub extern "C" fn t5g_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_abi_version() -> u32 {
    ABI.parse().unwrap_or(0)
}

#[unsafe(no_mangle)]
pub extern "C" fn t5g_live_handles() -> usize {
    handle::live()
}
