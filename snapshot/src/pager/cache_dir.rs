//! The directory of the pack cache: a sparse file per pack, shared by all sandboxes of a host and bounded by the bytes that the files
//! really have. The supervisor's; a VMM gets opened files.
//!
//! A file's name is the BLAKE3 of the pack's key, so no name from outside ever becomes a path. Eviction unlinks: a process that
//! has the file open goes on with it. What is in a file is checked by whoever reads it, so nothing here needs to be durable, and
//! two directories' worth of supervisors may share one.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use rustix::fs::OFlags;

use crate::ids::Digest;

/// Files opened between two looks at the sizes.
const OPENS_BETWEEN_TRIMS: u32 = 64;
/// Unit of `st_blocks`, bytes.
const STAT_BLOCK: u64 = 512;

/// The directory.
#[derive(Debug)]
pub struct CacheDir {
    root: PathBuf,
    budget_bytes: u64,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    /// By name; when it was last opened, in opens.
    last_opened: HashMap<Digest, u64>,
    opens: u64,
    since_trim: u32,
}

/// What the directory holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Files.
    pub files: u64,
    /// Bytes allocated to them.
    pub bytes: u64,
}

/// A size that was looked up, and how to order it.
struct Sized {
    name: Digest,
    last_opened: u64,
    bytes: u64,
}

fn name_of(key: &str) -> Digest {
    Digest::of(key.as_bytes())
}

impl CacheDir {
    /// Takes up the directory `root`, which is made if it does not exist, with what earlier processes left in it: least recently
    /// written is evicted first. `budget_bytes` bounds the allocated bytes.
    pub fn open_root(root: impl Into<PathBuf>, budget_bytes: u64) -> io::Result<Self> {
        let root = root.into();
        fs::create_dir_all(&root)?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&root)? {
            let entry = entry?;
            // Whatever else is there is not ours.
            let Some(name) = entry.file_name().to_str().and_then(|name| name.parse::<Digest>().ok()) else { continue };
            let metadata = match entry.metadata() {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            if metadata.is_file() {
                found.push((metadata.mtime(), metadata.mtime_nsec(), name));
            }
        }
        found.sort_unstable();
        let mut entries = Entries::default();
        for (_, _, name) in found {
            entries.touch(name);
        }
        let dir = Self { root, budget_bytes, entries: Mutex::new(entries) };
        dir.trim()?;
        Ok(dir)
    }

    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The file of the pack with this key, made if it does not exist; for reading and writing. Evicts nothing: that takes a look at every
    /// file, and who opens is in a hurry. See [`CacheDir::trim_if_due`].
    pub fn open(&self, key: &str) -> io::Result<File> {
        self.open_with(key, true)
    }

    /// The same, if there is one.
    pub fn open_existing(&self, key: &str) -> io::Result<Option<File>> {
        match self.open_with(key, false) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn open_with(&self, key: &str, make: bool) -> io::Result<File> {
        let name = name_of(key);
        let mut entries = self.entries();
        let path = self.path(name);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(make).truncate(false).mode(0o600);
        options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a cache file is no regular file"));
        }
        entries.touch(name);
        entries.since_trim += 1;
        Ok(file)
    }

    /// [`CacheDir::trim`], if many files were opened since the last time.
    pub fn trim_if_due(&self) -> io::Result<()> {
        let mut entries = self.entries();
        if entries.since_trim >= OPENS_BETWEEN_TRIMS {
            self.trim_locked(&mut entries)?;
        }
        Ok(())
    }

    /// Evicts the least recently opened files until the allocated bytes are within the budget. Files grow after they were opened,
    /// so this is to be called now and then. Answers what is left.
    pub fn trim(&self) -> io::Result<Usage> {
        self.trim_locked(&mut self.entries())
    }

    /// What the directory holds now.
    pub fn usage(&self) -> io::Result<Usage> {
        Ok(sum(&self.sizes(&mut self.entries())?))
    }

    /// Removes the pack's file, if there is one.
    pub fn remove(&self, key: &str) -> io::Result<()> {
        let name = name_of(key);
        let mut entries = self.entries();
        self.unlink(name)?;
        entries.last_opened.remove(&name);
        Ok(())
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Whatever a panic left behind, the next look at the sizes finds what is really there.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, name: Digest) -> PathBuf {
        self.root.join(name.to_string())
    }

    fn unlink(&self, name: Digest) -> io::Result<()> {
        match fs::remove_file(self.path(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The files that are still there. Somebody may have removed some.
    fn sizes(&self, entries: &mut Entries) -> io::Result<Vec<Sized>> {
        let mut sizes = Vec::with_capacity(entries.last_opened.len());
        let mut gone = Vec::new();
        for (&name, &last_opened) in &entries.last_opened {
            match fs::symlink_metadata(self.path(name)) {
                Ok(metadata) => sizes.push(Sized { name, last_opened, bytes: metadata.blocks() * STAT_BLOCK }),
                Err(error) if error.kind() == io::ErrorKind::NotFound => gone.push(name),
                Err(error) => return Err(error),
            }
        }
        for name in gone {
            entries.last_opened.remove(&name);
        }
        Ok(sizes)
    }

    fn trim_locked(&self, entries: &mut Entries) -> io::Result<Usage> {
        entries.since_trim = 0;
        let mut sizes = self.sizes(entries)?;
        let mut left = sum(&sizes);
        sizes.sort_unstable_by_key(|size| size.last_opened);
        for size in sizes {
            if left.bytes <= self.budget_bytes {
                break;
            }
            self.unlink(size.name)?;
            entries.last_opened.remove(&size.name);
            left.files -= 1;
            left.bytes -= size.bytes;
        }
        Ok(left)
    }
}

impl Entries {
    fn touch(&mut self, name: Digest) {
        self.opens += 1;
        self.last_opened.insert(name, self.opens);
    }
}

fn sum(sizes: &[Sized]) -> Usage {
    Usage { files: sizes.len() as u64, bytes: sizes.iter().map(|size| size.bytes).sum() }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::fs::FileExt,
        thread,
        time::{Duration, SystemTime},
    };

    use super::*;

    const MIB: u64 = 1 << 20;

    fn fill(file: &File, bytes: u64) {
        file.write_all_at(&vec![7; bytes as usize], 0).unwrap();
        // Room is allocated when the bytes leave the page cache, on some file systems.
        file.sync_data().unwrap();
    }

    fn names(dir: &CacheDir) -> usize {
        fs::read_dir(dir.root()).unwrap().count()
    }

    #[test]
    fn the_least_recently_opened_goes_first() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::open_root(root.path(), 3 * MIB).unwrap();
        for key in ["a", "b", "c"] {
            fill(&dir.open(key).unwrap(), MIB);
        }
        assert_eq!(dir.trim().unwrap(), Usage { files: 3, bytes: 3 * MIB });
        let kept = dir.open("a").unwrap();
        let evicted = dir.open("b").unwrap();
        dir.open("a").unwrap();
        fill(&dir.open("d").unwrap(), 2 * MIB);
        // c, then b.
        assert_eq!(dir.trim().unwrap(), Usage { files: 2, bytes: 3 * MIB });
        assert_eq!(kept.metadata().unwrap().nlink(), 1);
        assert_eq!(evicted.metadata().unwrap().nlink(), 0);
        let mut byte = [0];
        evicted.read_exact_at(&mut byte, MIB - 1).unwrap();
        assert_eq!(byte, [7], "who has it open goes on");
        assert_eq!(dir.open("b").unwrap().metadata().unwrap().len(), 0, "a new one");
        dir.remove("a").unwrap();
        dir.remove("a").unwrap();
        dir.remove("never").unwrap();
        assert_eq!(dir.usage().unwrap().files, 2);
        assert_eq!(names(&dir), 2);
    }

    #[test]
    fn holes_cost_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::open_root(root.path(), MIB).unwrap();
        let file = dir.open("sparse").unwrap();
        file.write_all_at(&[1; 4096], 100 * MIB).unwrap();
        file.sync_data().unwrap();
        assert!(dir.trim().unwrap().bytes < MIB);
        assert_eq!(names(&dir), 1);
    }

    #[test]
    fn a_new_start_finds_the_files_and_only_them() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::open_root(root.path(), 10 * MIB).unwrap();
        for (key, age) in [("new", 1), ("old", 2)] {
            let file = dir.open(key).unwrap();
            fill(&file, MIB);
            file.set_modified(SystemTime::now() - Duration::from_hours(age)).unwrap();
        }
        fs::write(root.path().join("notes"), vec![1; 3 * MIB as usize]).unwrap();
        fs::create_dir(root.path().join(name_of("directory").to_string())).unwrap();
        drop(dir);
        let dir = CacheDir::open_root(root.path(), MIB + MIB / 2).unwrap();
        assert_eq!(dir.usage().unwrap(), Usage { files: 1, bytes: MIB });
        assert_eq!(dir.open("new").unwrap().metadata().unwrap().len(), MIB);
        assert_eq!(dir.open("old").unwrap().metadata().unwrap().len(), 0);
        assert!(root.path().join("notes").exists());
        // Somebody else's clean-up.
        fs::remove_file(dir.path(name_of("new"))).unwrap();
        assert_eq!(dir.trim().unwrap().bytes, 0);
    }

    #[test]
    fn no_name_leads_elsewhere() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::open_root(root.path().join("cache"), MIB).unwrap();
        let outside = root.path().join("outside");
        fs::write(&outside, "untouched").unwrap();
        for key in ["../outside", "/etc/passwd", "", "a\0b", &"x".repeat(5000)] {
            let file = dir.open(key).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 0);
        }
        assert_eq!(names(&dir), 5);
        std::os::unix::fs::symlink(&outside, dir.path(name_of("link"))).unwrap();
        assert!(dir.open("link").is_err());
        assert!(dir.open("link").is_err());
        dir.remove("link").unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
    }

    #[test]
    fn what_is_not_there_is_made_only_when_asked_for_and_many_opens_lead_to_a_trim() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::open_root(root.path(), MIB).unwrap();
        assert!(dir.open_existing("a").unwrap().is_none());
        fill(&dir.open("a").unwrap(), MIB);
        fill(&dir.open("b").unwrap(), MIB);
        dir.trim_if_due().unwrap();
        assert_eq!(dir.usage().unwrap().files, 2);
        for _ in 0..OPENS_BETWEEN_TRIMS {
            assert!(dir.open_existing("b").unwrap().is_some());
        }
        dir.trim_if_due().unwrap();
        assert!(dir.open_existing("a").unwrap().is_none());
        assert!(dir.open_existing("b").unwrap().is_some());
    }

    #[test]
    fn threads_may_open_remove_and_trim_at_once() {
        let root = tempfile::tempdir().unwrap();
        let dir = CacheDir::open_root(root.path(), 256 << 10).unwrap();
        thread::scope(|scope| {
            for thread in 0..4u64 {
                let dir = &dir;
                scope.spawn(move || {
                    for step in 0..150u64 {
                        let key = format!("pack/{}", (step * 7 + thread) % 20);
                        match step % 5 {
                            4 => dir.remove(&key).unwrap(),
                            _ => dir.open(&key).unwrap().write_all_at(&vec![1; 64 << 10], 0).unwrap(),
                        }
                        if step % 50 == 49 {
                            dir.trim().unwrap();
                        }
                    }
                });
            }
        });
        assert!(dir.trim().unwrap().bytes <= 256 << 10);
        assert_eq!(dir.usage().unwrap().files, names(&dir) as u64);
    }
}
