//! Objects as files of a directory, `root/bucket/key`: the backend of the embedded S3 server.
//!
//! A body is written to a temporary file and renamed into place, so a reader sees one body whole. The ETag is the modification time that
//! the writer gave the file, and its length: it belongs to the body by being part of the same inode, survives restarts, costs one `fstat`,
//! and never repeats, since every body of a process gets a later nanosecond than the one before.
//!
//! Everything here blocks: callers run it where blocking is allowed. Preconditions are checked under a lock for the key's stripe; reads need
//! no lock. A key that is a prefix of another one up to a slash (`a` and `a/b`) cannot be stored.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Keys that share a lock wait for each other; more stripes wait less.
const STRIPES: usize = 256;
/// Names of files that are not yet objects begin with it, in `root`.
const TEMPORARY: &str = ".tmp.";
/// A DELETE may remove a folder just as a PUT makes it.
const RENAME_TRIES: u32 = 16;

/// Why an object cannot be had or written.
#[derive(Debug, thiserror::Error)]
pub(super) enum ObjectError {
    /// There is no such bucket.
    #[error("there is no such bucket")]
    NoBucket,
    /// There is no such object.
    #[error("there is no such object")]
    NoObject,
    /// The key cannot be the name of a file here.
    #[error("the key cannot be stored: {0}")]
    BadKey(&'static str),
    /// The object is there, or another one than the writer expected.
    #[error("the precondition does not hold")]
    Precondition,
    /// The file system said no.
    #[error("the file system refuses")]
    Io(#[from] io::Error),
}

/// What must hold for a PUT to be applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Nothing.
    Always,
    /// No object of this key.
    Absent,
    /// An object of this key.
    Present,
    /// An object with this ETag.
    Tag(String),
}

/// What is known of an object without reading it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    /// Bytes.
    pub(super) len: u64,
    /// Tag of this body, without quotes.
    pub(super) etag: String,
    /// When it was written.
    pub(super) modified: SystemTime,
}

impl Facts {
    fn of(metadata: &fs::Metadata) -> io::Result<Self> {
        let modified = metadata.modified()?;
        let nanos = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        Ok(Self { len: metadata.len(), etag: format!("{nanos:016x}{:016x}", metadata.len()), modified })
    }
}

/// The directory.
#[derive(Debug)]
pub(super) struct Objects {
    root: PathBuf,
    locks: Vec<Mutex<()>>,
    /// Numbers temporary files.
    next: AtomicU64,
    /// Modification time of the newest body, ns since 1970.
    latest: AtomicI64,
}

/// A body on its way; removed unless it is committed.
#[derive(Debug)]
pub(super) struct Upload {
    /// Where the body goes.
    pub(super) file: File,
    path: PathBuf,
}

impl Drop for Upload {
    fn drop(&mut self) {
        // Gone when it was renamed.
        if let Err(error) = fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, path = %self.path.display(), "a temporary file stays");
        }
    }
}

impl Objects {
    /// Opens `root`; removes what a kill left half written.
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        for entry in fs::read_dir(root)? {
            let entry = entry?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self {
            root: root.to_owned(),
            locks: (0..STRIPES).map(|_| Mutex::new(())).collect(),
            next: AtomicU64::new(0),
            latest: AtomicI64::new(0),
        })
    }

    /// Makes a bucket; `false` when it was there.
    pub(super) fn make_bucket(&self, bucket: &str) -> Result<bool, ObjectError> {
        match fs::create_dir(self.root.join(plain(bucket)?)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The bucket's folder.
    pub(super) fn bucket(&self, bucket: &str) -> Result<PathBuf, ObjectError> {
        let path = self.root.join(plain(bucket)?);
        if path.is_dir() { Ok(path) } else { Err(ObjectError::NoBucket) }
    }

    /// Names of all buckets, sorted.
    pub(super) fn buckets(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.extend(entry.file_name().into_string());
            }
        }
        names.sort();
        Ok(names)
    }

    /// A body and its facts, which are of that very body even when it is replaced meanwhile.
    pub(super) fn read(&self, bucket: &str, key: &str) -> Result<(File, Facts), ObjectError> {
        let file = File::open(self.path(bucket, key)?).map_err(|e| self.absent(bucket, e))?;
        let metadata = file.metadata()?;
        if metadata.is_file() { Ok((file, Facts::of(&metadata)?)) } else { Err(ObjectError::NoObject) }
    }

    /// The facts alone.
    pub(super) fn facts(&self, bucket: &str, key: &str) -> Result<Facts, ObjectError> {
        let metadata = fs::metadata(self.path(bucket, key)?).map_err(|e| self.absent(bucket, e))?;
        if metadata.is_file() { Ok(Facts::of(&metadata)?) } else { Err(ObjectError::NoObject) }
    }

    /// A place for a new body.
    pub(super) fn begin(&self) -> io::Result<Upload> {
        let path = self.root.join(format!("{TEMPORARY}{}", self.next.fetch_add(1, Ordering::Relaxed)));
        let file = File::options().write(true).create_new(true).open(&path)?;
        Ok(Upload { file, path })
    }

    /// Makes the body the object of this key if the condition holds, and answers its ETag. Atomic among the requests to this process.
    #[expect(clippy::needless_pass_by_value, reason = "an upload is used up")]
    pub(super) fn commit(
        &self,
        upload: Upload,
        bucket: &str,
        key: &str,
        condition: &Condition,
    ) -> Result<String, ObjectError> {
        let path = self.path(bucket, key)?;
        let _alone = self.lock(bucket, key);
        if *condition != Condition::Always {
            let now = match self.facts(bucket, key) {
                Ok(facts) => Some(facts.etag),
                Err(ObjectError::NoObject) => None,
                Err(error) => return Err(error),
            };
            match (condition, now) {
                (Condition::Absent, Some(_)) => return Err(ObjectError::Precondition),
                (Condition::Present | Condition::Tag(_), None) => return Err(ObjectError::NoObject),
                (Condition::Tag(wanted), Some(tag)) if *wanted != tag => return Err(ObjectError::Precondition),
                _ => {}
            }
        }
        upload.file.set_modified(self.later())?;
        let etag = Facts::of(&upload.file.metadata()?)?.etag;
        let mut tries = 0;
        loop {
            match fs::rename(&upload.path, &path) {
                Ok(()) => return Ok(etag),
                Err(error) if error.kind() == io::ErrorKind::NotFound && tries < RENAME_TRIES => {
                    tries += 1;
                    self.bucket(bucket)?;
                    if let Some(folder) = path.parent() {
                        fs::create_dir_all(folder)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::IsADirectory => {
                    return Err(ObjectError::BadKey("other keys continue it after a slash"));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Deletes an object, and the folders that it leaves empty. One that is not there is deleted already.
    pub(super) fn delete(&self, bucket: &str, key: &str) -> Result<(), ObjectError> {
        let path = self.path(bucket, key)?;
        let root = self.bucket(bucket)?;
        let _alone = self.lock(bucket, key);
        if let Err(error) = fs::remove_file(&path) {
            return match self.absent(bucket, error) {
                ObjectError::NoObject => Ok(()),
                error => Err(error),
            };
        }
        let mut folder = path.parent();
        while let Some(empty) = folder.filter(|f| *f != root)
            && fs::remove_dir(empty).is_ok()
        {
            folder = empty.parent();
        }
        Ok(())
    }

    /// All objects whose keys begin with `prefix` and come after `after`, sorted by key.
    pub(super) fn list(&self, bucket: &str, prefix: &str, after: &str) -> Result<Vec<(String, Facts)>, ObjectError> {
        let root = self.bucket(bucket)?;
        // Only the last part of a prefix can be half a name.
        let folder = prefix.rfind('/').map_or("", |at| &prefix[..at]);
        let mut found = Vec::new();
        let mut folders = vec![if folder.is_empty() { root.clone() } else { self.path(bucket, folder)? }];
        while let Some(folder) = folders.pop() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            for entry in entries {
                let entry = entry?;
                let path = entry.path();
                let Some(key) = path.strip_prefix(&root).ok().and_then(Path::to_str) else { continue };
                if entry.file_type()?.is_dir() {
                    let below = format!("{key}/");
                    if below.starts_with(prefix) || prefix.starts_with(&below) {
                        folders.push(path);
                    }
                } else if key.starts_with(prefix)
                    && key > after
                    // Deleted since the folder was read, else.
                    && let Ok(metadata) = entry.metadata()
                {
                    found.push((key.to_owned(), Facts::of(&metadata)?));
                }
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    fn path(&self, bucket: &str, key: &str) -> Result<PathBuf, ObjectError> {
        if key.is_empty() || key.ends_with('/') {
            return Err(ObjectError::BadKey("it names no file"));
        }
        for part in key.split('/') {
            plain(part)?;
        }
        Ok(self.root.join(plain(bucket)?).join(key))
    }

    fn absent(&self, bucket: &str, error: io::Error) -> ObjectError {
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
                self.bucket(bucket).err().unwrap_or(ObjectError::NoObject)
            }
            _ => error.into(),
        }
    }

    fn lock(&self, bucket: &str, key: &str) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        (bucket, key).hash(&mut hasher);
        // The remainder is below STRIPES, the length of `locks`.
        self.locks[(hasher.finish() % STRIPES as u64) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now, but later than every time answered before.
    fn later(&self) -> SystemTime {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
        let before = self
            .latest
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |latest| Some(now.max(latest.saturating_add(1))))
            .unwrap_or(now);
        UNIX_EPOCH + Duration::from_nanos(u64::try_from(now.max(before.saturating_add(1))).unwrap_or(0))
    }
}

/// One part of a path, which leads nowhere else.
fn plain(part: &str) -> Result<&str, ObjectError> {
    let mut components = Path::new(part).components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) if name == part && !part.starts_with(TEMPORARY) => {
            if part.len() > 255 {
                Err(ObjectError::BadKey("a part of it is longer than 255 octets"))
            } else if part.contains('\0') {
                Err(ObjectError::BadKey("it contains a NUL"))
            } else {
                Ok(part)
            }
        }
        _ => Err(ObjectError::BadKey("a part of it is empty, `.` or `..`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn objects() -> (tempfile::TempDir, Objects) {
        let dir = tempfile::tempdir().unwrap();
        let objects = Objects::open(dir.path()).unwrap();
        assert!(objects.make_bucket("b").unwrap());
        (dir, objects)
    }

    fn put(objects: &Objects, key: &str, body: &[u8], condition: &Condition) -> Result<String, ObjectError> {
        let mut upload = objects.begin().unwrap();
        upload.file.write_all(body).unwrap();
        objects.commit(upload, "b", key, condition)
    }

    #[test]
    fn an_etag_belongs_to_its_body_never_repeats_and_survives_a_restart() {
        let (dir, objects) = objects();
        let mut tags = std::collections::HashSet::new();
        for _ in 0..500 {
            let tag = put(&objects, "k", b"same", &Condition::Always).unwrap();
            assert_eq!(objects.facts("b", "k").unwrap().etag, tag);
            assert!(tags.insert(tag));
        }
        let (_, read) = objects.read("b", "k").unwrap();
        let again = Objects::open(dir.path()).unwrap();
        assert_eq!(again.facts("b", "k").unwrap(), read);
        assert!(tags.insert(put(&again, "k", b"same", &Condition::Tag(read.etag)).unwrap()));
    }

    #[test]
    fn conditions_hold_or_the_object_stays() {
        let (dir, objects) = objects();
        let missing = |r: Result<String, ObjectError>| assert!(matches!(r, Err(ObjectError::NoObject)), "{r:?}");
        let refused = |r: Result<String, ObjectError>| assert!(matches!(r, Err(ObjectError::Precondition)), "{r:?}");
        missing(put(&objects, "k", b"x", &Condition::Present));
        missing(put(&objects, "k", b"x", &Condition::Tag("1".to_owned())));
        let first = put(&objects, "k", b"1", &Condition::Absent).unwrap();
        refused(put(&objects, "k", b"2", &Condition::Absent));
        let second = put(&objects, "k", b"2", &Condition::Tag(first.clone())).unwrap();
        refused(put(&objects, "k", b"3", &Condition::Tag(first)));
        assert_eq!(objects.facts("b", "k").unwrap().etag, second);
        put(&objects, "k", b"3", &Condition::Present).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn keys_lead_nowhere_else() {
        let (_dir, objects) = objects();
        for key in ["", "/", "a//b", "../x", "a/../b", ".", "a/", "x\0y", &"n".repeat(256)] {
            assert!(matches!(put(&objects, key, b"", &Condition::Always), Err(ObjectError::BadKey(_))), "{key:?}");
        }
        assert!(matches!(objects.facts("..", "b"), Err(ObjectError::BadKey(_))));
        assert!(matches!(objects.facts("none", "k"), Err(ObjectError::NoBucket)));
        put(&objects, "a/b", b"", &Condition::Always).unwrap();
        assert!(matches!(put(&objects, "a", b"", &Condition::Always), Err(ObjectError::BadKey(_))));
        assert!(matches!(objects.read("b", "a"), Err(ObjectError::NoObject)), "a folder is no object");
    }

    #[test]
    fn listing_is_sorted_and_deleting_leaves_no_folder() {
        let (dir, objects) = objects();
        for key in ["a/b/2", "a/b/10", "a-c", "a/bc", "z"] {
            put(&objects, key, b"x", &Condition::Always).unwrap();
        }
        let keys = |prefix: &str, after: &str| {
            objects.list("b", prefix, after).unwrap().into_iter().map(|(key, _)| key).collect::<Vec<_>>()
        };
        assert_eq!(keys("", ""), ["a-c", "a/b/10", "a/b/2", "a/bc", "z"]);
        assert_eq!(keys("a/b", ""), ["a/b/10", "a/b/2", "a/bc"]);
        assert_eq!(keys("a/b/", "a/b/10"), ["a/b/2"]);
        assert_eq!(keys("none/at/all", ""), [] as [&str; 0]);
        for key in ["a/b/2", "a/b/10", "a/b/2"] {
            objects.delete("b", key).unwrap();
        }
        assert_eq!(keys("", ""), ["a-c", "a/bc", "z"]);
        assert!(!dir.path().join("b/a/b").exists());
    }
}
