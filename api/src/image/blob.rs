//! Bytes of an image on this host, and their digests.

use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

/// A part of a file.
#[derive(Clone, Debug)]
pub(super) struct Blob {
    file: Arc<File>,
    offset: u64,
    len: u64,
}

impl Blob {
    /// `len` octets of `file` from `offset` on.
    pub(super) fn part(file: Arc<File>, offset: u64, len: u64) -> Self {
        Self { file, offset, len }
    }

    /// The whole file.
    pub(super) fn whole(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), offset: 0, len })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// From its beginning.
    pub(super) fn reader(&self) -> BlobReader {
        BlobReader { blob: self.clone(), at: 0 }
    }

    /// `sha256:…` of all of it. `seen` is told of octets as they are read, and may end it.
    pub(super) fn digest(&self, seen: impl Fn(usize) -> io::Result<()>) -> io::Result<String> {
        let (mut reader, mut hasher, mut piece) = (self.reader(), Sha256::new(), vec![0; 256 << 10]);
        loop {
            let len = reader.read(&mut piece)?;
            if len == 0 {
                return Ok(named(hasher));
            }
            hasher.update(&piece[..len]);
            seen(len)?;
        }
    }

    /// All of it, at most `limit` octets.
    pub(super) fn read(&self, limit: u64) -> io::Result<Vec<u8>> {
        if self.len > limit {
            return Err(io::Error::other(format!("it has {} bytes, at most {limit} are taken", self.len)));
        }
        let mut bytes = Vec::new();
        self.reader().read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

#[derive(Debug)]
pub(super) struct BlobReader {
    blob: Blob,
    at: u64,
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.blob.len - self.at).unwrap_or(usize::MAX).min(buf.len());
        let n = self.blob.file.read_at(&mut buf[..left], self.blob.offset + self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

fn named(hasher: Sha256) -> String {
    use std::fmt::Write as _;
    let mut text = "sha256:".to_owned();
    for byte in hasher.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// `sha256:…` of `bytes`.
pub(super) fn digest_of(bytes: &[u8]) -> String {
    named(Sha256::new_with_prefix(bytes))
}

/// The hex digits of a `sha256:…`: the only digests that are known here, and safe as a name.
pub(super) fn sha256_hex(digest: &str) -> Option<&str> {
    let hex = digest.strip_prefix("sha256:")?;
    let digits = hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    (hex.len() == 64 && digits).then_some(hex)
}
