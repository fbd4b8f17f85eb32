//! The first line of a host client: `CONNECT <port>\n`.
//!
//! It is read byte by byte, so that what the client sends after the line stays in its socket for the connection.

use std::io;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::connection::receive_bytes;

/// Longest line, bytes: the word, a space, ten digits, the line's end.
const LINE_BYTES: usize = 19;

/// A host client that has not named its port yet.
#[derive(Debug)]
pub(super) struct Greeting {
    pub(super) stream: UnixStream,
    /// When it is sent away.
    pub(super) deadline: Instant,
    line: Vec<u8>,
}

/// How far a greeting is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// More bytes are needed.
    Waiting,
    /// The guest port that the client wants.
    Port(u32),
    /// It is no greeting, or the client is gone.
    Refused,
}

impl Greeting {
    pub(super) fn new(stream: UnixStream, deadline: Instant) -> Self {
        Self { stream, deadline, line: Vec::with_capacity(LINE_BYTES) }
    }

    /// Reads what there is of the line.
    pub(super) fn advance(&mut self) -> Progress {
        loop {
            match self.next_byte() {
                Ok(Some(b'\n')) => {
                    return parse(&self.line).map_or(Progress::Refused, Progress::Port);
                }
                Ok(Some(byte)) if self.line.len() < LINE_BYTES - 1 => self.line.push(byte),
                Ok(None) => return Progress::Waiting,
                Ok(Some(_)) | Err(_) => return Progress::Refused,
            }
        }
    }

    fn next_byte(&self) -> io::Result<Option<u8>> {
        let mut byte = [0];
        match receive_bytes(&self.stream, &mut byte)? {
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(_) => Ok(Some(byte[0])),
            None => Ok(None),
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let port = line.strip_prefix(b"CONNECT ")?;
    // `u32::from_str` would take a sign.
    if !port.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(port).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn greeting() -> (Greeting, UnixStream) {
        let (ours, client) = UnixStream::pair().unwrap();
        (Greeting::new(ours, Instant::now()), client)
    }

    #[test]
    fn a_line_may_come_in_pieces_and_what_follows_it_stays() {
        let (mut greeting, mut client) = greeting();
        assert_eq!(greeting.advance(), Progress::Waiting);
        client.write_all(b"CONN").unwrap();
        assert_eq!(greeting.advance(), Progress::Waiting);
        client.write_all(b"ECT 4294967295\nrest").unwrap();
        assert_eq!(greeting.advance(), Progress::Port(u32::MAX));
        let mut rest = [0; 4];
        greeting.stream.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"rest");
    }

    #[test]
    fn anything_else_is_refused() {
        for line in [
            "",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "connect 1\n",
            "CONNECT 4294967296\n",
        ] {
            let (mut greeting, mut client) = greeting();
            client.write_all(line.as_bytes()).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(greeting.advance(), Progress::Refused, "{line:?}");
        }
        let (mut greeting, mut client) = greeting();
        client.write_all(&[b'1'; 100]).unwrap();
        assert_eq!(greeting.advance(), Progress::Refused, "no end of line in sight");
    }
}
