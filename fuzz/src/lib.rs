//! Fuzz targets: functions over bytes that panic when a decoder breaks a promise.
//!
//! | module | what |
//! | --- | --- |
//! | [`snapshot`] | manifests, frames, heads, the collector's objects |
//! | [`wire`] | the control API of the VMM, the agent's protocol |
//! | [`alloc`] | counts what a decoder allocates |
//!
//! `fuzz/run` builds and runs them under libFuzzer. The files are also included by the tests that run the checked-in corpus and a bounded number of
//! mutations of it: `snapshot/tests/fuzz_corpus.rs` and `tests/tests/fuzz_corpus.rs`.
pub mod alloc;
pub mod snapshot;
pub mod wire;
