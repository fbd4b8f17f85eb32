//! The fuzz targets of the protocols on the checked-in corpus and a bounded number of mutations of it.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first surprise")]

#[path = "../../fuzz/src/alloc.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod alloc;
#[path = "../../fuzz/src/mutate.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod mutate;
#[path = "../../fuzz/src/wire.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod wire;

#[global_allocator]
static COUNTING: alloc::Counting = alloc::Counting;

#[test]
fn the_control_api() {
    mutate::run("control", 30_000, wire::control);
}

#[test]
fn the_agents_protocol() {
    mutate::run("agent", 30_000, wire::agent);
}
