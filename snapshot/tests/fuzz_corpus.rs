//! The fuzz targets of this crate on the checked-in corpus and a bounded number of mutations of it. `fuzz/run` runs them for as long as one likes.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first surprise")]

#[path = "../../fuzz/src/alloc.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod alloc;
#[path = "../../fuzz/src/mutate.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod mutate;
#[path = "../../fuzz/src/snapshot.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod targets;

#[global_allocator]
static COUNTING: alloc::Counting = alloc::Counting;

#[test]
fn manifests() {
    mutate::run("manifest", 30_000, targets::manifest);
}

#[test]
fn frames() {
    mutate::run("frame", 20_000, targets::frame);
}

#[test]
fn seals() {
    mutate::run("seal", 10_000, targets::seal);
}

#[test]
fn heads() {
    mutate::run("head", 30_000, targets::head);
}
