//! The control interface of the proxy: a unix stream socket. Each frame has a length, a JSON message and, for some, descriptors.
//!
//! | module | what |
//! | --- | --- |
//! | [`types`] | the messages |
//! | `frame` | a message and its descriptors on a socket |
//! | [`client`] | the supervisor's half |
//! | [`server`] | the proxy's half |

pub mod client;
mod frame;
pub mod server;
pub mod types;

pub use client::{Client, ClientError};
