//! The proxy: a guest's TCP connections to ports 80 and 443, which the network redirects to a socket of ours.
//!
//! | module | what |
//! | --- | --- |
//! | `accept` | the listening socket, and its bounds |
//! | `connection` | one connection: its first bytes, what is decided of them, what becomes of it |
//! | [`opening`] | what the first bytes are |
//! | `tunnel` | bytes passed on as they are |
//! | `terminate` | TLS ended here, for the domains of transforms |
//! | `requests` | HTTP passed on request by request: plain, and after `terminate` |
//! | [`target`] | what a request is for |
//! | `headers` | what is taken out of and put into a request |
//! | `upstream` | connections to servers |
//! | `meter` | bytes counted, and silence noticed |
//! | `refusal` | what a client is told when it may not |

pub(crate) mod accept;
mod connection;
mod headers;
mod meter;
pub mod opening;
mod refusal;
mod requests;
pub mod target;
mod terminate;
mod tunnel;
pub(crate) mod upstream;

#[cfg(test)]
mod tests;
