//! Buffers of packs: megabytes that are filled once. On 4 KiB pages the kernel takes as long to map them as a worker takes to compress what
//! goes into them, so they ask for huge pages, and one is kept for the next pack.

use bytes::Bytes;

use crate::page::PAGE_SIZE;

/// The buffers of one capture's packs.
#[derive(Debug)]
pub(super) struct Buffers {
    size: usize,
    spare: Option<Vec<u8>>,
}

impl Buffers {
    /// Buffers of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        Self { size: size as usize, spare: None }
    }

    /// An empty buffer.
    pub(super) fn take(&mut self) -> Vec<u8> {
        self.spare.take().unwrap_or_else(|| {
            let buffer = Vec::with_capacity(self.size);
            prefer_huge_pages(&buffer);
            buffer
        })
    }

    /// The buffer of a pack that nobody else holds any more serves again, if none waits already and it was not cut short.
    pub(super) fn give_back(&mut self, pack: Bytes) {
        if self.spare.is_none()
            && let Ok(bytes) = pack.try_into_mut()
            && bytes.capacity() >= self.size
        {
            let mut buffer = Vec::from(bytes);
            buffer.clear();
            self.spare = Some(buffer);
        }
    }
}

/// Asks for huge pages in what the buffer may come to hold. Where the kernel has none, nothing changes.
fn prefer_huge_pages(buffer: &Vec<u8>) {
    let start = (buffer.as_ptr() as usize).next_multiple_of(PAGE_SIZE);
    let end = (buffer.as_ptr() as usize + buffer.capacity()) / PAGE_SIZE * PAGE_SIZE;
    if start < end {
        // SAFETY: whole pages within our own allocation; the advice changes neither their content nor how they may be used.
        let advised = unsafe { rustix::mm::madvise(start as *mut _, end - start, rustix::mm::Advice::LinuxHugepage) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages for packs");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_buffer_waits_and_none_that_is_still_held() {
        let mut buffers = Buffers::new(1 << 20);
        let mut first = buffers.take();
        let place = first.as_ptr();
        first.resize(1 << 20, 7);
        let (pack, other) = (Bytes::from(first), Bytes::from(buffers.take()));
        let held = pack.clone();
        buffers.give_back(pack);
        assert!(buffers.spare.is_none());
        buffers.give_back(held);
        buffers.give_back(other);
        let again = buffers.take();
        assert_eq!((again.as_ptr(), again.len(), again.capacity()), (place, 0, 1 << 20));
        buffers.give_back(Bytes::from(vec![1; 4096]));
        assert!(buffers.spare.is_none());
    }
}
