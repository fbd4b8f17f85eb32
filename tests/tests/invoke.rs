//! The invoke route.

fn main() {}
