//! Which bytes of a file a read asks for.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use stasis_agent::protocol::files::Read;

use super::{FileError, failed};

/// Of a file that does not say how long it is, as those of /proc: read whole, since they have neither ends nor offsets to rely on.
const UNSIZED_LIMIT: u64 = 16 << 20;
const BLOCK: usize = 64 << 10;

/// What a read answers.
#[derive(Debug)]
pub(crate) enum Part {
    /// Bytes `from` to `to` of a file.
    OfFile { file: File, from: u64, to: u64 },
    /// These.
    Bytes(Vec<u8>),
}

/// Opens a regular file. Others are refused before they are opened: that alone may have effects, or never end.
pub(crate) fn open(path: &Path) -> Result<(File, Metadata), FileError> {
    let regular = |found: &Metadata| {
        if found.is_dir() {
            Err(FileError::invalid("path", format!("{} is a directory, not a file", path.display())))
        } else if found.is_file() {
            Ok(())
        } else {
            Err(FileError::invalid("path", format!("{} is not a regular file", path.display())))
        }
    };
    regular(&fs::metadata(path).map_err(failed("read", path))?)?;
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(failed("read", path))?;
    let found = file.metadata().map_err(failed("read", path))?;
    regular(&found)?;
    Ok((file, found))
}

/// A whole file.
pub(crate) fn whole(path: &Path) -> Result<Part, FileError> {
    part(path, &Read { path: String::new(), offset: None, limit: None, head: None, tail: None })
}

/// What `request` asks for of the file at `path`.
pub(crate) fn part(path: &Path, request: &Read) -> Result<Part, FileError> {
    if request.head.is_some() && request.tail.is_some() {
        return Err(FileError::invalid("tail", "excludes head"));
    }
    let (mut file, found) = open(path)?;
    if found.len() == 0 {
        let mut bytes = Vec::new();
        std::io::Read::by_ref(&mut file)
            .take(UNSIZED_LIMIT + 1)
            .read_to_end(&mut bytes)
            .map_err(failed("read", path))?;
        if bytes.len() as u64 > UNSIZED_LIMIT {
            return Err(FileError::TooLarge(format!(
                "{} does not say how long it is, and is longer than {UNSIZED_LIMIT} bytes",
                path.display()
            )));
        }
        let (from, to) = range(&bytes, bytes.len() as u64, request).map_err(failed("read", path))?;
        let range = usize::try_from(from).unwrap_or_default()..usize::try_from(to).unwrap_or_default();
        return Ok(Part::Bytes(bytes.get(range).unwrap_or_default().to_vec()));
    }
    let (from, to) = range(&file, found.len(), request).map_err(failed("read", path))?;
    Ok(Part::OfFile { file, from, to })
}

/// Something with bytes at offsets.
trait At {
    /// Fills as much of `buffer` as there is.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize>;
}

impl At for File {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        FileExt::read_at(self, buffer, offset)
    }
}

impl At for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        let len = buffer.len().min(self.len() - from);
        buffer[..len].copy_from_slice(&self[from..from + len]);
        Ok(len)
    }
}

/// From which byte to which. The lines of `head` and `tail` are those of the part that `offset` and `limit` say.
fn range(file: &impl At, size: u64, request: &Read) -> std::io::Result<(u64, u64)> {
    let from = request.offset.unwrap_or(0).min(size);
    let to = request.limit.map_or(size, |limit| from.saturating_add(limit).min(size));
    match (request.head, request.tail) {
        (Some(lines), _) => Ok((from, end_of_lines(file, from, to, lines)?)),
        (_, Some(lines)) => Ok((start_of_lines(file, from, to, lines)?, to)),
        _ => Ok((from, to)),
    }
}

/// Where the first `lines` lines end.
fn end_of_lines(file: &impl At, from: u64, to: u64, lines: u32) -> std::io::Result<u64> {
    let (mut at, mut left, mut block) = (from, lines, vec![0; BLOCK]);
    while left > 0 && at < to {
        let want = BLOCK.min(usize::try_from(to - at).unwrap_or(BLOCK));
        let len = file.read_at(&mut block[..want], at)?;
        if len == 0 {
            return Ok(at);
        }
        for end in memchr::memchr_iter(b'\n', &block[..len]) {
            left -= 1;
            if left == 0 {
                return Ok(at + end as u64 + 1);
            }
        }
        at += len as u64;
    }
    Ok(at)
}

/// Where the last `lines` lines start. A line end as the very last byte starts no line.
fn start_of_lines(file: &impl At, from: u64, to: u64, lines: u32) -> std::io::Result<u64> {
    if lines == 0 {
        return Ok(to);
    }
    let (mut end, mut left, mut block) = (to, lines, vec![0; BLOCK]);
    while end > from {
        let len = BLOCK.min(usize::try_from(end - from).unwrap_or(BLOCK));
        let start = end - len as u64;
        let mut filled = 0;
        while filled < len {
            match file.read_at(&mut block[filled..len], start + filled as u64)? {
                0 => break,
                more => filled += more,
            }
        }
        for line_end in memchr::memrchr_iter(b'\n', &block[..filled]) {
            let next = start + line_end as u64 + 1;
            if next == to {
                continue;
            }
            left -= 1;
            if left == 0 {
                return Ok(next);
            }
        }
        end = start;
    }
    Ok(from)
}
