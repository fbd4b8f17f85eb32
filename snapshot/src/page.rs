//! The page: the unit in which images are tracked, referenced and compared.

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// Whether every byte is zero. Stops at the first 128 bytes that are not.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<128>();
    blocks.iter().all(|block| block.iter().fold(0, |seen, byte| seen | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}

/// `pages` in bytes.
pub const fn bytes(pages: u64) -> u64 {
    pages * PAGE_SIZE as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_bit_anywhere_is_found() {
        for len in [0, 1, 127, 128, 129, PAGE_SIZE] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 0x80;
                assert!(!is_zero(&bytes), "byte {at} of {len}");
                bytes[at] = 0;
            }
        }
    }
}
