//! Positional bytes for the sections that are too large for a general encoding: LEB128 varints in their shortest form, fixed arrays,
//! counted lists. The reader takes untrusted input: no count is believed beyond what the remaining bytes could hold.

use crate::ids::Digest;

/// Bytes that do not read as what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum WireError {
    #[error("ends too early")]
    End,
    #[error("holds a number that is not in its shortest form or too large")]
    Number,
    #[error("claims more entries than its bytes can hold")]
    Count,
    #[error("holds text that is not UTF-8")]
    Text,
    #[error("holds an unknown tag {0}")]
    Tag(u64),
    #[error("has {0} bytes too many")]
    Trailing(usize),
}

pub(super) fn put_varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

pub(super) fn put_bytes(into: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(into, bytes.len() as u64);
    into.extend_from_slice(bytes);
}

/// Reads from the front.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) fn byte(&mut self) -> Result<u8, WireError> {
        let (&byte, rest) = self.rest.split_first().ok_or(WireError::End)?;
        self.rest = rest;
        Ok(byte)
    }

    pub(super) fn varint(&mut self) -> Result<u64, WireError> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let part = u64::from(byte & 0x7f);
            if part << shift >> shift != part || (byte == 0 && shift > 0) {
                return Err(WireError::Number);
            }
            value |= part << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(WireError::Number)
    }

    pub(super) fn varint32(&mut self) -> Result<u32, WireError> {
        u32::try_from(self.varint()?).map_err(|_| WireError::Number)
    }

    /// A count of entries that take at least `min` bytes each.
    pub(super) fn count(&mut self, min: usize) -> Result<usize, WireError> {
        let count = usize::try_from(self.varint()?).map_err(|_| WireError::Count)?;
        if count > self.rest.len() / min {
            return Err(WireError::Count);
        }
        Ok(count)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, WireError> {
        let len = self.count(1)?;
        let (text, rest) = self.rest.split_at_checked(len).ok_or(WireError::End)?;
        self.rest = rest;
        std::str::from_utf8(text).map_err(|_| WireError::Text)
    }

    pub(super) fn digest(&mut self) -> Result<Digest, WireError> {
        let (&digest, rest) = self.rest.split_first_chunk().ok_or(WireError::End)?;
        self.rest = rest;
        Ok(Digest(digest))
    }

    pub(super) fn id(&mut self) -> Result<[u8; 16], WireError> {
        let (&id, rest) = self.rest.split_first_chunk().ok_or(WireError::End)?;
        self.rest = rest;
        Ok(id)
    }

    pub(super) fn end(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            left => Err(WireError::Trailing(left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_come_back_and_have_one_form() {
        for value in [0, 1, 127, 128, 300, u64::from(u32::MAX), u64::MAX - 1, u64::MAX] {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            let mut reader = Reader::new(&bytes);
            assert_eq!(reader.varint(), Ok(value));
            assert_eq!(reader.end(), Ok(()));
            assert_eq!(Reader::new(&bytes[..bytes.len() - 1]).varint(), Err(WireError::End));
        }
        for bad in [&[0x80, 0][..], &[0xff; 10], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]] {
            assert_eq!(Reader::new(bad).varint(), Err(WireError::Number));
        }
    }
}
