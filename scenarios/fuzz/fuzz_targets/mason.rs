//! A libFuzzer target for the language of graphs: the input is a text.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenarios::fuzz::mason_text(bytes));
