//! What a client's first bytes are. Pure: more bytes are read until this knows.

use crate::tls::client_hello::{ClientHello, HANDSHAKE_RECORD, HelloError, Reader};

/// How HTTP/2 begins (RFC 9113 §3.4). Its first line looks like a request of HTTP/1.
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// How a connection begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opening {
    /// With a whole ClientHello.
    Tls(ClientHello),
    /// With what may be a request of HTTP/1.
    Http1,
    /// HTTP/2 without TLS.
    CleartextHttp2,
    /// With a ClientHello that is not taken.
    BadTls(HelloError),
    /// With something else.
    Other,
}

/// Looks at first bytes.
#[derive(Debug, Default)]
pub struct Openings {
    hello: Reader,
}

impl Openings {
    /// Looks at `bytes`, all that came since the connection began. None: more must come.
    pub fn read(&mut self, bytes: &[u8]) -> Option<Opening> {
        match bytes.first()? {
            &HANDSHAKE_RECORD => match self.hello.read(bytes) {
                Ok(hello) => hello.map(Opening::Tls),
                Err(error) => Some(Opening::BadTls(error)),
            },
            // Methods are tokens; an empty line before a request is allowed (RFC 9112 §2.2).
            first if first.is_ascii_alphabetic() || matches!(first, b'\r' | b'\n') => {
                let compared = bytes.len().min(HTTP2_PREFACE.len());
                let same = bytes.get(..compared) == HTTP2_PREFACE.get(..compared);
                match (same, compared == HTTP2_PREFACE.len()) {
                    (true, true) => Some(Opening::CleartextHttp2),
                    (true, false) => None,
                    (false, _) => Some(Opening::Http1),
                }
            }
            _ => Some(Opening::Other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Option<Opening> {
        Openings::default().read(bytes)
    }

    #[test]
    fn the_first_bytes_tell() {
        assert_eq!(read(b""), None);
        assert_eq!(read(b"G"), Some(Opening::Http1));
        assert_eq!(read(b"\r\nGET / HTTP/1.1"), Some(Opening::Http1));
        assert_eq!(read(b"P"), None);
        assert_eq!(read(b"PR"), None);
        for method in ["POST /", "PROPFIND / ", "PRI * HTTP/1.1"] {
            assert_eq!(read(method.as_bytes()), Some(Opening::Http1), "{method}");
        }
        assert_eq!(read(&HTTP2_PREFACE[..23]), None);
        assert_eq!(read(HTTP2_PREFACE), Some(Opening::CleartextHttp2));
        assert_eq!(read(&[22, 3]), None);
        assert!(matches!(read(&[22, 9]), Some(Opening::BadTls(_))));
        assert_eq!(read(&[0x80, 0x2e, 1]), Some(Opening::Other), "SSL 2");
        assert_eq!(read(b" GET"), Some(Opening::Other));
    }
}
