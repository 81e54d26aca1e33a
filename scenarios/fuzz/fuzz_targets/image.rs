//! A libFuzzer target for the same runs that `tapsim fuzz` makes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| scenarios::fuzz::image_target(bytes));
