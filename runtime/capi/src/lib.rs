//! The C door: `libt5gemma`. `include/t5gemma.h` is its document, in whose order the files stand; a function here converts,
//! calls the runtime, and converts back.
//!
//! # Design
//! What the caller hands over is taken as a type of `input.rs` (`Text`, `Array`, `Record`, `Out`) or as a `Handle`, and
//! their methods check it: the only `unsafe` besides is where a callback gives an array and where a fork is waited for. The promise that memory is as long as
//! the header says is the caller's, made by calling. Handles are numbers into a table, so that those that were freed, or are of
//! another kind, are known for what they are.

// The header documents what is exported, and C has no naming conventions of Rust's.
#![allow(missing_docs, non_camel_case_types)]

mod boundary;
mod error;
mod handle;
mod input;

mod onnxruntime;

mod call;
mod model;
mod options;
mod result;
mod sources;

mod engine;

mod encoder;
mod tokenizer;

use std::ffi::c_char;

/// What `build.rs` has read in the header.
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
