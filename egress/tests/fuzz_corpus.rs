//! The fuzz targets of this crate on the checked-in corpus and a bounded number of mutations of it. `fuzz/run` runs them for as long as one likes.

#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test ends at the first surprise")]

#[path = "../../fuzz/src/alloc.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod alloc;
#[path = "../../fuzz/src/egress.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod egress;
#[path = "../../fuzz/src/mutate.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod mutate;

#[global_allocator]
static COUNTING: alloc::Counting = alloc::Counting;

#[test]
fn first_bytes() {
    mutate::run("opening", 30_000, egress::opening);
}

#[test]
fn requests() {
    mutate::run("request", 5_000, egress::request);
}

#[test]
fn questions() {
    mutate::run("question", 30_000, egress::question);
}
