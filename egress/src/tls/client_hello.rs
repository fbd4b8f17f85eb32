//! The ClientHello (RFC 8446 §4.1.2, RFC 6066 §3) as far as it tells where a connection is to go. It is a stranger's: every length is checked,
//! and what is ambiguous is refused, since a server may read it otherwise than this.
//!
//! It may come in any number of reads and of records. [`Reader`] takes bytes as they come; nothing is taken out of them, so that they can be
//! sent on as they were.

use crate::names::{Name, NameError};

/// First byte of a handshake record, by which TLS is told from everything else.
pub const HANDSHAKE_RECORD: u8 = 22;
/// Bytes of the handshake message at most. Those with post-quantum keys and many extensions have some 2 KiB.
pub const MAX_HELLO: usize = 16 << 10;
/// Bytes of all its records at most: a record may be as short as a byte of content.
pub const MAX_BYTES: usize = 2 * MAX_HELLO;

const CLIENT_HELLO: u8 = 1;
const EXTENSION_SERVER_NAME: u16 = 0;
const EXTENSION_ALPN: u16 = 16;
const EXTENSION_ENCRYPTED_CLIENT_HELLO: u16 = 0xfe0d;
const HOST_NAME: u8 = 0;

/// What a ClientHello says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientHello {
    /// SNI; none when the extension is missing.
    pub server_name: Option<Name>,
    /// The protocols that are offered, best first.
    pub alpn: Vec<Vec<u8>>,
    /// There is an `encrypted_client_hello` extension. Whether it is GREASE cannot be told without the server's key: that is GREASE's purpose.
    pub encrypted: bool,
}

/// Why bytes are no ClientHello that is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HelloError {
    /// Not what the standard says.
    #[error("the ClientHello is malformed: {0}")]
    Malformed(&'static str),
    /// More than [`MAX_HELLO`] or [`MAX_BYTES`].
    #[error("the ClientHello is larger than {MAX_HELLO} bytes")]
    TooLarge,
    /// SNI has something else than a name.
    #[error("the server name in the ClientHello {0}")]
    ServerName(NameError),
}

const fn malformed<T>(what: &'static str) -> Result<T, HelloError> {
    Err(HelloError::Malformed(what))
}

/// Puts a ClientHello together from records.
#[derive(Debug, Default)]
pub struct Reader {
    /// Content of the records so far.
    message: Vec<u8>,
    /// Bytes of the input that were looked at: whole records.
    taken: usize,
}

impl Reader {
    /// Looks at `bytes`, all that came since the connection began. None: more must come.
    pub fn read(&mut self, bytes: &[u8]) -> Result<Option<ClientHello>, HelloError> {
        loop {
            if let Some(hello) = self.complete()? {
                return Ok(Some(hello));
            }
            let rest = bytes.get(self.taken..).unwrap_or_default();
            match rest.first() {
                None => return if bytes.len() > MAX_BYTES { Err(HelloError::TooLarge) } else { Ok(None) },
                Some(&HANDSHAKE_RECORD) => {}
                Some(_) => return malformed("a record of another type within it"),
            }
            // Seen as early as possible: what is no TLS must not be waited for.
            if rest.get(1).is_some_and(|major| *major != 3) {
                return malformed("not a record of TLS");
            }
            if bytes.len() > MAX_BYTES {
                return Err(HelloError::TooLarge);
            }
            let Some((&[_, _, _, high, low], after)) = rest.split_first_chunk::<5>() else { return Ok(None) };
            let length = usize::from(u16::from_be_bytes([high, low]));
            if length == 0 || length > 1 << 14 {
                return malformed("a record of a length that is not allowed");
            }
            let Some(content) = after.get(..length) else { return Ok(None) };
            self.message.extend_from_slice(content);
            self.taken += 5 + length;
            if self.taken > MAX_BYTES {
                return Err(HelloError::TooLarge);
            }
        }
    }

    fn complete(&self) -> Result<Option<ClientHello>, HelloError> {
        if self.message.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return malformed("another handshake message comes first");
        }
        let Some((&[_, a, b, c], body)) = self.message.split_first_chunk::<4>() else { return Ok(None) };
        let length = u32::from_be_bytes([0, a, b, c]) as usize;
        if length > MAX_HELLO {
            return Err(HelloError::TooLarge);
        }
        match body.len().checked_sub(length) {
            None => Ok(None),
            Some(0) => parse(body).map(Some),
            // Nothing may follow it before the server has spoken; early data comes in records of another type.
            Some(_) => malformed("another message in its last record"),
        }
    }
}

/// What is left of a message.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], HelloError> {
        let Some((taken, rest)) = self.0.split_at_checked(length) else { return malformed(what) };
        self.0 = rest;
        Ok(taken)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, HelloError> {
        Ok(self.take(1, what)?.first().copied().unwrap_or_default())
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, HelloError> {
        Ok(self.take(2, what)?.iter().fold(0, |value, byte| value << 8 | u16::from(*byte)))
    }

    /// A vector with a length of one byte.
    fn short(&mut self, what: &'static str) -> Result<Fields<'a>, HelloError> {
        let length = self.u8(what)?;
        Ok(Fields(self.take(usize::from(length), what)?))
    }

    /// A vector with a length of two bytes.
    fn long(&mut self, what: &'static str) -> Result<Fields<'a>, HelloError> {
        let length = self.u16(what)?;
        Ok(Fields(self.take(usize::from(length), what)?))
    }

    fn end(&self, what: &'static str) -> Result<(), HelloError> {
        if self.0.is_empty() { Ok(()) } else { malformed(what) }
    }
}

fn parse(body: &[u8]) -> Result<ClientHello, HelloError> {
    let mut fields = Fields(body);
    if fields.u16("no version")? >> 8 != 3 {
        return malformed("a version that is none of TLS");
    }
    fields.take(32, "no random value")?;
    if fields.short("no session id")?.0.len() > 32 {
        return malformed("a session id of more than 32 bytes");
    }
    let suites = fields.long("no cipher suites")?.0.len();
    if suites < 2 || suites % 2 != 0 {
        return malformed("a list of cipher suites of an odd length, or none");
    }
    if fields.short("no compression methods")?.0.is_empty() {
        return malformed("no compression methods");
    }
    let mut hello = ClientHello { server_name: None, alpn: Vec::new(), encrypted: false };
    // Before TLS 1.2 there need be no extensions.
    if fields.0.is_empty() {
        return Ok(hello);
    }
    let mut extensions = fields.long("no extensions")?;
    fields.end("something after the extensions")?;
    let mut seen = Vec::new();
    while !extensions.0.is_empty() {
        let kind = extensions.u16("half an extension")?;
        let content = extensions.long("half an extension")?;
        // A server could read the other one.
        if seen.contains(&kind) {
            return malformed("an extension twice");
        }
        seen.push(kind);
        match kind {
            EXTENSION_SERVER_NAME => hello.server_name = Some(server_name(content)?),
            EXTENSION_ALPN => hello.alpn = alpn(content)?,
            EXTENSION_ENCRYPTED_CLIENT_HELLO => hello.encrypted = true,
            // GREASE (RFC 8701) and everything else says nothing of the destination.
            _ => {}
        }
    }
    Ok(hello)
}

fn server_name(mut content: Fields<'_>) -> Result<Name, HelloError> {
    let mut list = content.long("half a server name")?;
    content.end("something after the server names")?;
    if list.u8("an empty list of server names")? != HOST_NAME {
        return malformed("a server name of a kind that does not exist");
    }
    let name = list.long("half a server name")?;
    // RFC 6066: no more than one name of a kind, and there is one kind.
    list.end("several server names")?;
    // RFC 6066 forbids the trailing dot; servers that take it read the same name.
    Name::parse(name.0).map_err(HelloError::ServerName)
}

fn alpn(mut content: Fields<'_>) -> Result<Vec<Vec<u8>>, HelloError> {
    let mut list = content.long("half a list of protocols")?;
    content.end("something after the protocols")?;
    let mut protocols = Vec::new();
    while !list.0.is_empty() {
        let protocol = list.short("half a protocol")?.0;
        if protocol.is_empty() {
            return malformed("a protocol without a name");
        }
        protocols.push(protocol.to_vec());
    }
    Ok(protocols)
}

#[cfg(test)]
#[path = "client_hello_tests.rs"]
mod tests;
