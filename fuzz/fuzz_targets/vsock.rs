//! See `stasis_fuzz::devices::vsock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| stasis_fuzz::devices::vsock(input));
