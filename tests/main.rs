//! Everything that needs files, sessions or programs. `common.rs` has what the tests share: fixtures, exported models,
//! programs.

mod common;

mod adapt;
mod adapters;
mod alignment;
mod bench;
mod book;
mod capi;
mod chat;
mod conditioners;
mod constraints;
mod devices;
mod engine;
mod engine_sinks;
mod export;
mod front_door;
mod fuzz;
mod generation;
mod hub;
mod image_requests;
mod images;
mod imports;
mod model_card;
mod parity;
mod plans;
mod processors;
mod programs;
mod protocol;
mod providers;
mod python;
mod random;
mod run_time_adapters;
mod sampling;
mod shortlist;
mod speculation;
mod tasks;
mod tensorrt;
mod tokenizer;
mod versions;
mod vocabulary;
mod voice;

mod broken;
mod calibration;
