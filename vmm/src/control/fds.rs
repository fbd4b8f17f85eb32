//! Passing opened files to the VMM: `fds.sock`, a stream socket on which each message carries descriptors and their tokens.
//!
//! A message is `n` tokens, 8 bytes each, little-endian, with `n` descriptors as ancillary data, 1 to [`MAX_PER_MESSAGE`]. The VMM answers
//! one byte when it has them, so that a control request sent after [`send`] returns finds them there. Descriptors that no request takes are
//! closed with the VMM.

use std::collections::HashMap;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};

use super::types::FdToken;
use crate::seccomp::{self, Role};

/// Descriptors in one message; Linux takes 253 at most.
pub const MAX_PER_MESSAGE: usize = 64;
/// Descriptors that wait to be taken at most: two packs' worth of an 8 GiB machine with a 10 GiB disk.
const MAX_WAITING: usize = 8192;
const DEADLINE: Duration = Duration::from_secs(10);

/// Sends opened files to a VMM. Blocking, bounded by a deadline.
pub fn send(socket: &Path, files: &[(FdToken, BorrowedFd<'_>)]) -> std::io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(DEADLINE))?;
    stream.set_read_timeout(Some(DEADLINE))?;
    for part in files.chunks(MAX_PER_MESSAGE) {
        let tokens: Vec<u8> = part.iter().flat_map(|(token, _)| token.0.to_le_bytes()).collect();
        let fds: Vec<BorrowedFd<'_>> = part.iter().map(|(_, fd)| *fd).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PER_MESSAGE))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(std::io::Error::other("descriptors do not fit into one message"));
        }
        let sent = sendmsg(&stream, &[IoSlice::new(&tokens)], &mut ancillary, SendFlags::NOSIGNAL)?;
        if sent != tokens.len() {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        let mut taken = [0_u8];
        std::io::Read::read_exact(&mut &stream, &mut taken)?;
    }
    Ok(())
}

/// Descriptors that arrived and were not taken yet.
#[derive(Clone, Default)]
pub struct Inbox(Arc<Mutex<HashMap<u64, OwnedFd>>>);

impl Inbox {
    /// Takes the file sent under `token`.
    pub fn take(&self, token: FdToken) -> Option<File> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&token.0).map(File::from)
    }

    /// Serves `listener` on a thread of its own until the process ends.
    pub fn listen(&self, listener: UnixListener) -> std::io::Result<()> {
        let inbox = self.clone();
        std::thread::Builder::new().name("fds".to_owned()).spawn(move || {
            seccomp::enter(Role::Receiver);
            for stream in listener.incoming() {
                // One sender at a time: it is the supervisor, and its deadline bounds the wait of the next.
                if let Err(error) = stream.and_then(|s| inbox.receive(&s)) {
                    tracing::warn!(%error, "cannot receive descriptors");
                }
            }
        })?;
        Ok(())
    }

    fn receive(&self, stream: &UnixStream) -> std::io::Result<()> {
        stream.set_read_timeout(Some(DEADLINE))?;
        loop {
            let mut tokens = [0_u8; MAX_PER_MESSAGE * 8];
            let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_PER_MESSAGE))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let message =
                recvmsg(stream.as_fd(), &mut [IoSliceMut::new(&mut tokens)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
            if message.bytes == 0 {
                return Ok(());
            }
            let fds: Vec<OwnedFd> = ancillary
                .drain()
                .filter_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(fds) => Some(fds),
                    _ => None,
                })
                .flatten()
                .collect();
            if message.bytes != fds.len() * 8 {
                return Err(std::io::Error::other(format!(
                    "{} bytes of tokens came with {} descriptors",
                    message.bytes,
                    fds.len()
                )));
            }
            let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() + fds.len() > MAX_WAITING {
                return Err(std::io::Error::other("too many descriptors wait to be taken"));
            }
            for (token, fd) in tokens.as_chunks::<8>().0.iter().zip(fds) {
                waiting.insert(u64::from_le_bytes(*token), fd);
            }
            drop(waiting);
            std::io::Write::write_all(&mut &*stream, &[1])?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    #[test]
    fn files_arrive_under_their_tokens_before_send_returns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fds.sock");
        let inbox = Inbox::default();
        inbox.listen(UnixListener::bind(&path).unwrap()).unwrap();
        let files: Vec<File> = (0..150_u64)
            .map(|i| {
                let mut file = tempfile::tempfile().unwrap();
                write!(file, "{i}").unwrap();
                file
            })
            .collect();
        let named: Vec<_> = files.iter().enumerate().map(|(i, f)| (FdToken(i as u64 + 7), f.as_fd())).collect();
        send(&path, &named).unwrap();
        for i in 0..150 {
            let mut file = inbox.take(FdToken(i + 7)).unwrap();
            file.rewind().unwrap();
            let mut text = String::new();
            file.read_to_string(&mut text).unwrap();
            assert_eq!(text, i.to_string());
        }
        assert!(inbox.take(FdToken(7)).is_none(), "a token is used once");
    }

    #[test]
    fn tokens_without_descriptors_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fds.sock");
        let inbox = Inbox::default();
        inbox.listen(UnixListener::bind(&path).unwrap()).unwrap();
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.write_all(&7_u64.to_le_bytes()).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the connection is closed without the byte");
        assert!(inbox.take(FdToken(7)).is_none());
    }
}
