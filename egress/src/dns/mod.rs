//! The resolver: questions of guests on sockets of their own (`server`), what is answered to them (`question`), and the asking of the
//! host's name servers (`upstream`, `resolver`), which the proxy does for its own connections, too.

pub mod question;
pub(crate) mod resolver;
pub(crate) mod server;
mod upstream;
