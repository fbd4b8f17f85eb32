//! The pack cache as a VMM sees it: one sparse file per pack, in which each frame is at its own offset once it was fetched.
//!
//! There is no other record of what is there: a frame is read and its digest checked, and a hole, a torn write or garbage is a
//! miss. So a crash does no harm, and any number of processes may share a file. Size and eviction are the
//! [`CacheDir`](super::cache_dir::CacheDir)'s.

use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{SeekFrom, seek};

/// The files of some packs.
#[derive(Debug)]
pub struct PackCache {
    files: HashMap<String, File>,
    /// The disk is full or broken: only reads from then on.
    closed: AtomicBool,
}

impl PackCache {
    /// `files` by pack key, each readable and writable.
    pub fn new(files: HashMap<String, File>) -> Self {
        Self { files, closed: AtomicBool::new(false) }
    }

    /// Whether `range` of the pack may be there; `false` is certain, and costs no read.
    pub(super) fn may_hold(&self, key: &str, range: &Range<u64>) -> bool {
        let Some(file) = self.files.get(key) else { return false };
        // The position that this moves is used by nobody.
        matches!(seek(file, SeekFrom::Data(range.start)), Ok(data) if data == range.start)
            && matches!(seek(file, SeekFrom::Hole(range.start)), Ok(hole) if hole >= range.end)
    }

    /// The bytes at `range` of the pack, whatever they are.
    pub(super) fn read(&self, key: &str, range: &Range<u64>) -> Option<Vec<u8>> {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        self.files.get(key)?.read_exact_at(&mut bytes, range.start).ok()?;
        Some(bytes)
    }

    /// Keeps bytes whose digests were checked, if it can.
    pub(super) fn write(&self, key: &str, offset: u64, bytes: &[u8]) {
        let Some(file) = self.files.get(key) else { return };
        if self.closed.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = file.write_all_at(bytes, offset)
            && !self.closed.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(key, error = &error as &dyn std::error::Error, "the pack cache takes no more frames");
        }
    }
}
