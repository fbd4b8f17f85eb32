//! The protocol between supervisor and guest agent. The agent itself is the binary of this crate.
pub mod protocol;
