//! The privileged helper: everything in Stasis that needs root, and nothing else. The supervisor asks for it over a unix socket and gets
//! descriptors back, so that it can run as a user of its own; a VMM gets descriptors only.
//!
//! | module | what |
//! | --- | --- |
//! | [`protocol`], [`message`] | what is asked and answered; a message with its descriptors |
//! | [`client`], [`server`] | the two ends of the socket |
//! | [`dialler`] | connections to the store for processes without a network: a process of its own, bin `stasis-dialler` |
//! | [`jail`] | a process with walls around it |
//! | [`network`] | networks of sandboxes: namespaces, taps, veths, the rules of what they may reach |
//! | [`warden`] | what is done with a request |
//!
//! This crate knows no sandboxes' records, no store, no API: it is told a name, a size and rules.

pub mod client;
pub mod dialler;
pub mod jail;
pub mod message;
pub mod network;
pub mod protocol;
pub mod server;
pub mod warden;
