#![no_main]

// Panics of libraries that become errors are no fault; the fuzzer's own hook would end at them.
libfuzzer_sys::fuzz_target!(init: t5gemma_runtime::silence_caught_panics(), |data: &[u8]| t5gemma_fuzz::options(data));
