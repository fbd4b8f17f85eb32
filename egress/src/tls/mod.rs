//! What the proxy reads and writes of TLS without being a party to it: the ClientHello, and the alert that refuses a connection.

pub mod client_hello;

/// Why a connection is refused, in TLS's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alert {
    /// A policy forbids it.
    AccessDenied = 49,
    /// Nobody is called that.
    UnrecognizedName = 112,
    /// The ClientHello is none.
    DecodeError = 50,
    /// An extension that must be there is not.
    MissingExtension = 109,
    /// The proxy cannot go on.
    InternalError = 80,
}

impl Alert {
    /// The record that says so, before any key is agreed on: fatal.
    pub const fn record(self) -> [u8; 7] {
        [21, 3, 3, 0, 2, 2, self as u8]
    }
}
