//! The fuzz targets of the devices on the checked-in corpus and a bounded number of mutations of it. `fuzz/run` runs them for as long as one likes.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first surprise")]

#[path = "../../fuzz/src/mutate.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod mutate;
#[path = "../../fuzz/src/devices.rs"]
#[expect(unreachable_pub, reason = "the fuzz crate exports it")]
mod targets;

#[test]
fn block() {
    mutate::run("block", 2000, targets::block);
}

#[test]
fn net() {
    mutate::run("net", 2000, targets::net);
}

#[test]
fn vsock() {
    mutate::run("vsock", 2000, targets::vsock);
}

#[test]
fn rng() {
    mutate::run("rng", 2000, targets::rng);
}

#[test]
fn registers() {
    mutate::run("mmio", 2000, targets::mmio);
}

#[test]
fn chains() {
    mutate::run("chains", 1000, targets::chains);
}
