#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| t5gemma_fuzz::onnx(data));
