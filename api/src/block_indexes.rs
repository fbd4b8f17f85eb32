//! Indexes of the blocks of root file systems by content, and where they are kept: beside the file (`stasis templates` leaves them there), and in
//! the data directory where that place has none. A VMM that is handed one does not send memory that equals a block: the guest's page cache.
//!
//! A root file system is read once for its index, in the background; until then captures send what they would send without.

use crate::sparse_file::each_block;
use stasis_snapshot::capture::{BlockIndex, BlockIndexBuilder};
use stasis_snapshot::ids::Digest;
use stasis_snapshot::page::PAGE_SIZE;
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes read at once; a multiple of the block size.
const STEP: usize = 256 << 10;

/// Those in the data directory.
#[derive(Debug)]
pub struct BlockIndexes {
    dir: PathBuf,
    /// Digests of root file systems that are being read, or could not be.
    begun: Arc<Mutex<HashSet<Digest>>>,
}

/// `<file>.blocks`.
fn beside(rootfs: &Path) -> PathBuf {
    let mut name = rootfs.as_os_str().to_owned();
    name.push(".blocks");
    name.into()
}

impl BlockIndexes {
    /// Those in `dir`, which is made when the first one is.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, begun: Arc::default() }
    }

    /// The index of the root file system with this digest. `None` when there is none yet: it is then made in the background, once.
    pub fn open(&self, rootfs: &Path, digest: &str) -> Option<File> {
        let digest: Digest = digest.parse().ok()?;
        let own = self.dir.join(digest.to_string());
        if let Some(found) = [&beside(rootfs), &own].into_iter().find_map(|path| opened(path, digest)) {
            return Some(found);
        }
        if self.begun.lock().unwrap_or_else(PoisonError::into_inner).insert(digest) {
            let (rootfs, dir) = (rootfs.to_owned(), self.dir.clone());
            tokio::task::spawn_blocking(move || {
                if let Err(error) = fs::create_dir_all(&dir).and_then(|()| make(&rootfs, digest, &own)) {
                    tracing::warn!(%error, rootfs = %rootfs.display(), "the blocks of a root file system are not indexed");
                }
            });
        }
        None
    }
}

/// Makes the index beside the root file system with this digest, unless it is there. Blocks.
pub fn leave_beside(rootfs: &Path, digest: &str) -> io::Result<()> {
    let digest = digest.parse().map_err(io::Error::other)?;
    let path = beside(rootfs);
    if opened(&path, digest).is_some() { Ok(()) } else { make(rootfs, digest, &path) }
}

/// The file, if it is an index of this root file system.
fn opened(path: &Path, digest: Digest) -> Option<File> {
    let file = File::open(path).ok()?;
    let mut header = [0; BlockIndex::HEADER_BYTES];
    file.read_exact_at(&mut header, 0).ok()?;
    BlockIndex::is_of(&header, digest).then_some(file)
}

/// Reads `rootfs`, without its holes, and puts the index into its place when it is whole.
fn make(rootfs: &Path, digest: Digest, path: &Path) -> io::Result<()> {
    let file = File::open(rootfs)?;
    let len = file.metadata()?.len();
    let mut builder = BlockIndexBuilder::default();
    let mut padded = Vec::new();
    each_block(&file, len, STEP, |at, bytes| {
        if bytes.len() % PAGE_SIZE == 0 {
            builder.add(at / PAGE_SIZE as u64, bytes);
        } else {
            // The last block of a file that ends within it is padded with zeros.
            padded.extend_from_slice(bytes);
            padded.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
            builder.add(at / PAGE_SIZE as u64, &padded);
        }
    })?;
    let dir = path.parent().ok_or_else(|| io::Error::other("no directory"))?;
    // As readable as the root file system itself.
    let mode = fs::Permissions::from_mode(0o644);
    let mut whole = tempfile::Builder::new().permissions(mode).tempfile_in(dir)?;
    whole.write_all(&builder.finish().encode(digest))?;
    whole.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_index_is_made_once_and_found_beside_or_in_the_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let rootfs = dir.path().join("rootfs.ext4");
        let file = File::create(&rootfs).unwrap();
        file.set_len((1 << 20) + 100).unwrap();
        file.write_all_at(&[7; 4096], 700 << 10).unwrap();
        let digest = Digest::of(b"rootfs");
        let indexes = BlockIndexes::new(dir.path().join("blocks"));
        assert!(indexes.open(&rootfs, &digest.to_string()).is_none());
        let made = dir.path().join("blocks").join(digest.to_string());
        for _ in 0..2000 {
            if made.exists() {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert!(indexes.open(&rootfs, &digest.to_string()).is_some());
        assert!(BlockIndex::decode(&fs::read(&made).unwrap(), digest).is_some());
        fs::remove_file(&made).unwrap();
        assert!(indexes.open(&rootfs, &digest.to_string()).is_none(), "it is not made twice");
        leave_beside(&rootfs, &digest.to_string()).unwrap();
        assert!(indexes.open(&rootfs, &digest.to_string()).is_some());
        assert!(indexes.open(&rootfs, &Digest::of(b"another").to_string()).is_none());
        assert!(leave_beside(&dir.path().join("gone"), &digest.to_string()).is_err());
    }
}
