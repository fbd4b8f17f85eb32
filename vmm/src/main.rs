//! The VMM's process: one per sandbox.
fn main() {}
