//! Digests of template files, and where they are kept: beside the file, and in the journal where that place is read-only.
//!
//! A root file system is too large to read at every start, and where its holes cannot be told from data (9p) reading it takes minutes. So a
//! digest is kept under the file's size and modification time: a file that was changed is read again.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::sparse_file::each_block;

/// What a digest belongs to besides a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Bytes.
    pub(crate) len: u64,
    /// Modification time, ns since the epoch.
    pub(crate) mtime_ns: i64,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        Ok(Self { len: found.len(), mtime_ns: found.mtime() * 1_000_000_000 + found.mtime_nsec() })
    }
}

/// `<file>.digest`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    stamp: Stamp,
    digest: String,
}

fn note_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".digest");
    name.into()
}

/// The digest noted beside the file, if it is of the file as it is now.
pub(crate) fn beside(path: &Path, stamp: Stamp) -> Option<String> {
    let note: Note = serde_json::from_slice(&fs::read(note_path(path)).ok()?).ok()?;
    (note.stamp == stamp).then_some(note.digest)
}

/// Notes the digest beside the file, where that can be written.
pub(crate) fn leave_beside(path: &Path, stamp: Stamp, digest: &str) {
    let note = Note { stamp, digest: digest.to_owned() };
    let temporary = note_path(path).with_extension("digest.new");
    let left = serde_json::to_vec(&note)
        .map_err(io::Error::from)
        .and_then(|json| fs::write(&temporary, json))
        .and_then(|()| fs::rename(&temporary, note_path(path)));
    if let Err(error) = left {
        tracing::debug!(%error, path = %path.display(), "the digest is kept in the journal alone");
    }
}

/// BLAKE3 over the number and content of every 64 KiB block that is not all zero, then the length; hex. Says the same of a sparse and of a
/// full copy, and skips holes without reading them: a root file system of 10 GiB has a few hundred MiB of content.
pub(crate) fn content_digest(file: &fs::File, len: u64) -> io::Result<String> {
    const BLOCK: usize = 64 << 10;
    let mut hasher = blake3::Hasher::new();
    each_block(file, len, BLOCK, |at, bytes| {
        if bytes.iter().any(|byte| *byte != 0) {
            hasher.update(&(at / BLOCK as u64).to_le_bytes()).update(bytes);
        }
    })?;
    Ok(hasher.update(&len.to_le_bytes()).finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_is_of_content_whatever_the_holes() {
        use std::os::unix::fs::FileExt as _;
        let digest = |file: &fs::File| content_digest(file, file.metadata().unwrap().len()).unwrap();
        let (sparse, full) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        sparse.set_len(1 << 20).unwrap();
        full.write_all_at(&vec![0; 1 << 20], 0).unwrap();
        assert_eq!(digest(&sparse), digest(&full));
        for file in [&sparse, &full] {
            file.write_all_at(b"x", 700_001).unwrap();
        }
        assert_eq!(digest(&sparse), digest(&full));
        full.write_all_at(b"x", 700_000).unwrap();
        assert_ne!(digest(&sparse), digest(&full));
        let longer = tempfile::tempfile().unwrap();
        longer.set_len(2 << 20).unwrap();
        longer.write_all_at(b"x", 700_001).unwrap();
        assert_ne!(digest(&sparse), digest(&longer));
    }

    #[test]
    fn a_note_counts_only_for_the_file_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rootfs.ext4");
        fs::write(&path, "one").unwrap();
        let stamp = Stamp::of(&path).unwrap();
        assert_eq!(beside(&path, stamp), None);
        leave_beside(&path, stamp, "abc");
        assert_eq!(beside(&path, stamp).as_deref(), Some("abc"));
        assert_eq!(beside(&path, Stamp { len: 4, ..stamp }), None);
        assert_eq!(beside(&path, Stamp { mtime_ns: stamp.mtime_ns + 1, ..stamp }), None);
    }
}
