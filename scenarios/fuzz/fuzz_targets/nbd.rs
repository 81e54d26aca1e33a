//! A libFuzzer target for the NBD server: the input is what a client sends.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenarios::fuzz::nbd_stream(bytes));
