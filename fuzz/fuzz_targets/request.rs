//! See `stasis_fuzz::egress::request`.
#![no_main]

#[global_allocator]
static COUNTING: stasis_fuzz::alloc::Counting = stasis_fuzz::alloc::Counting;

libfuzzer_sys::fuzz_target!(|input: &[u8]| stasis_fuzz::egress::request(input));
