//! One message on a unix stream socket: four bytes of length (little-endian), then JSON. Descriptors are ancillary data of the length, so that
//! they belong to exactly one message: the kernel never merges bytes with descriptors and bytes before them into one read.
//!
//! Frames carry secrets: buffers are cleared when they are dropped.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use zeroize::Zeroizing;

use super::types::{Message, PROTOCOL};

/// Bytes of JSON at most: a policy with twenty transforms of many headers, or a report, with room.
pub(crate) const MAX_FRAME: usize = 4 << 20;
/// Descriptors with one message at most.
pub(crate) const MAX_DESCRIPTORS: usize = 4;

/// A frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FrameError {
    /// The other side has gone, or never was.
    #[error("cannot {doing}")]
    Io {
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    /// Longer than [`MAX_FRAME`].
    #[error("a message of {0} bytes, at most {MAX_FRAME} are taken")]
    Length(usize),
    /// More than [`MAX_DESCRIPTORS`], or some got lost on the way.
    #[error("more descriptors than the {MAX_DESCRIPTORS} that a message may bring")]
    Descriptors,
    /// Not JSON of that type. Why is not said in the other side's words, which may be secrets.
    #[error("cannot read the message: {0:?} at line {1}, column {2}")]
    Json(serde_json::error::Category, usize, usize),
    /// Another protocol.
    #[error("the message is of protocol {0}, this side speaks {PROTOCOL}")]
    Protocol(u32),
}

impl FrameError {
    /// The other side does not take what it is sent.
    pub(crate) fn late() -> Self {
        Self::Io { doing: "send a message", source: io::ErrorKind::TimedOut.into() }
    }

    fn json(error: &serde_json::Error) -> Self {
        Self::Json(error.classify(), error.line(), error.column())
    }
}

/// Sends `body` with `descriptors`.
pub(crate) async fn send<T: Serialize>(
    stream: &mut UnixStream,
    body: T,
    descriptors: &[BorrowedFd<'_>],
) -> Result<(), FrameError> {
    let io = |source| FrameError::Io { doing: "send a message", source };
    let json = serde_json::to_vec(&Message { protocol: PROTOCOL, body }).map_err(|e| FrameError::json(&e))?;
    let json = Zeroizing::new(json);
    let length = u32::try_from(json.len()).ok().filter(|_| json.len() <= MAX_FRAME);
    let length = length.ok_or(FrameError::Length(json.len()))?.to_le_bytes();
    let sent = stream.async_io(Interest::WRITABLE, || send_head(stream.as_fd(), &length, descriptors)).await;
    let sent = sent.map_err(io)?;
    stream.write_all(length.get(sent..).unwrap_or_default()).await.map_err(io)?;
    stream.write_all(&json).await.map_err(io)
}

fn send_head(stream: BorrowedFd<'_>, head: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("more descriptors than fit into one message"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(head)], &mut ancillary, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// The next message and its descriptors; none when the other side has closed between two.
pub(crate) async fn receive<T: DeserializeOwned>(
    stream: &mut UnixStream,
) -> Result<Option<(T, Vec<OwnedFd>)>, FrameError> {
    let io = |source| FrameError::Io { doing: "receive a message", source };
    let mut head = [0_u8; 4];
    let mut descriptors = Vec::new();
    let got = {
        let (head, descriptors) = (&mut head, &mut descriptors);
        stream.async_io(Interest::READABLE, || receive_head(stream.as_fd(), head, descriptors)).await.map_err(io)?
    };
    let Some(got) = got else { return Err(FrameError::Descriptors) };
    if got == 0 {
        return Ok(None);
    }
    stream.read_exact(head.get_mut(got..).unwrap_or_default()).await.map_err(io)?;
    let length = u32::from_le_bytes(head) as usize;
    if length > MAX_FRAME {
        return Err(FrameError::Length(length));
    }
    // Grown by what really comes, so that a length alone takes no memory.
    let mut json = Zeroizing::new(Vec::with_capacity(length.min(64 << 10)));
    (&mut *stream).take(length as u64).read_to_end(&mut json).await.map_err(io)?;
    if json.len() != length {
        return Err(io(io::ErrorKind::UnexpectedEof.into()));
    }
    let version: Version = serde_json::from_slice(&json).map_err(|e| FrameError::json(&e))?;
    if version.protocol != PROTOCOL {
        return Err(FrameError::Protocol(version.protocol));
    }
    let message: Message<T> = serde_json::from_slice(&json).map_err(|e| FrameError::json(&e))?;
    Ok(Some((message.body, descriptors)))
}

/// What every protocol's messages have.
#[derive(serde::Deserialize)]
struct Version {
    protocol: u32,
}

/// Bytes that came, with their descriptors; none when there were too many of those.
fn receive_head(stream: BorrowedFd<'_>, head: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<Option<usize>> {
    // One more than is taken, to see that there were too many.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = recvmsg(stream, &mut [IoSliceMut::new(head)], &mut ancillary, flags)?;
    descriptors.extend(
        ancillary
            .drain()
            .filter_map(|m| if let RecvAncillaryMessage::ScmRights(fds) = m { Some(fds) } else { None })
            .flatten(),
    );
    let lost = message.flags.contains(rustix::net::ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS;
    Ok((!lost).then_some(message.bytes))
}

#[cfg(test)]
mod tests {
    use super::super::types::{Answer, Request};
    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[tokio::test]
    async fn descriptors_arrive_with_their_own_message() {
        let (mut here, mut there) = pair();
        let file = tempfile::tempfile().unwrap();
        let sender = tokio::spawn(async move {
            send(&mut here, Request::Status, &[]).await.unwrap();
            send(&mut here, Request::Status, &[file.as_fd(), file.as_fd()]).await.unwrap();
            // Longer than what a socket holds.
            send(&mut here, Request::Sandbox { key: "k".repeat(3 << 20) }, &[]).await.unwrap();
        });
        let mut counts = Vec::new();
        while let Some((_, descriptors)) = receive::<Request>(&mut there).await.unwrap() {
            counts.push(descriptors.len());
        }
        sender.await.unwrap();
        assert_eq!(counts, [0, 2, 0]);
    }

    #[tokio::test]
    async fn what_is_no_message_is_refused() {
        let answer_of = |bytes: Vec<u8>| async move {
            let (mut here, mut there) = pair();
            here.write_all(&bytes).await.unwrap();
            drop(here);
            receive::<Answer>(&mut there).await
        };
        let framed = |json: &str| [&u32::try_from(json.len()).unwrap().to_le_bytes()[..], json.as_bytes()].concat();
        assert!(answer_of(Vec::new()).await.unwrap().is_none());
        assert!(matches!(answer_of(u32::MAX.to_le_bytes().to_vec()).await, Err(FrameError::Length(_))));
        assert!(matches!(answer_of(vec![9, 0]).await, Err(FrameError::Io { .. })));
        assert!(matches!(answer_of(vec![9, 0, 0, 0, b'{']).await, Err(FrameError::Io { .. })));
        let other = framed(r#"{"protocol":2,"body":"Never heard of"}"#);
        assert!(matches!(answer_of(other).await, Err(FrameError::Protocol(2))));
        let wrong = answer_of(framed(r#"{"protocol":1,"body":"s3cret"}"#)).await.unwrap_err();
        assert!(matches!(wrong, FrameError::Json(..)) && !format!("{wrong} {wrong:?}").contains("s3cret"));
    }

    #[tokio::test]
    async fn too_many_descriptors_are_refused() {
        let (here, mut there) = pair();
        let file = tempfile::tempfile().unwrap();
        let many = [file.as_fd(); MAX_DESCRIPTORS + 3];
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 3))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(here.as_fd(), &[IoSlice::new(&[1, 0, 0, 0])], &mut ancillary, SendFlags::empty()).unwrap();
        assert!(matches!(receive::<Request>(&mut there).await, Err(FrameError::Descriptors)));
    }
}
