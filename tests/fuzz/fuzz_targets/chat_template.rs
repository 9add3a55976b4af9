#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| t5gemma_fuzz::chat_template(data));
