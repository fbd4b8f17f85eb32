//! Fuzz targets: functions over bytes that panic when a decoder breaks a promise.
//!
//! | module | what |
//! | --- | --- |
//! | [`snapshot`] | manifests, frames, heads, seals, the collector's objects |
//! | [`egress`] | what a guest says to the egress proxy |
//! | [`devices`] | virtio devices behind their registers, with rings in guest memory |
//! | [`wire`] | the control API of the VMM, the agent's protocol |
//! | [`alloc`] | counts what a decoder allocates |
//!
//! `fuzz/run` builds and runs them under libFuzzer. The files are also included by the tests that run the checked-in corpus and a bounded number of
//! mutations of it: `snapshot/tests/fuzz_corpus.rs`, `egress/tests/fuzz_corpus.rs`, `devices/tests/fuzz_corpus.rs` and `tests/tests/fuzz_corpus.rs`.
pub mod alloc;
pub mod devices;
pub mod egress;
pub mod snapshot;
pub mod wire;
