//! The proxy with real servers and clients over loopback, which the operator permits here. A connection's original destination is given by the
//! test; `tests/namespaces.rs` has it from the kernel.

mod changed;
mod floods;
mod plain;
mod tunnels;
mod world;
