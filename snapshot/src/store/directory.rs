//! A store in a directory, for one host: keys are paths under the root.
//!
//! An object appears whole or not at all: its bytes go to a temporary file beside it, are synced, and are renamed. Conditional writes
//! compare under a lock file; the tag is the BLAKE3 of the body. A success is returned after file and directory are synced. It needs
//! no more of the file system than rename, exclusive creation and `flock`, so that tmpfs and 9p will do.
//!
//! Names that begin with a dot are the store's own and no part of a listing.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;

use super::{
    ETag, ListPage, Listed, Object, ObjectStore, Precondition, RawGrant, StoreError,
    error::{ErrorKind, Operation},
    http::wrong_length,
};
use crate::ids::Digest;

const LOCK_NAME: &str = ".lock";
const LIST_PAGE: usize = 1000;
/// A conditional write holds the lock for one small read, a rename and a directory sync.
const LOCK_DEADLINE: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(2);
/// How often a directory that a deletion removes under our feet is made again.
const DIRECTORY_TRIES: u32 = 16;

static NEXT_TEMPORARY: AtomicU64 = AtomicU64::new(0);

/// A store whose objects are files under a root directory.
#[derive(Clone, Debug)]
pub struct DirectoryStore {
    root: PathBuf,
}

impl DirectoryStore {
    /// Opens the store under `root`, which must exist.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        if root.is_dir() { Ok(Self { root }) } else { Err(no_root(Operation::Get, &root)) }
    }

    /// The root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Runs `work` on the file of `key` on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: Operation,
        key: &str,
        work: impl FnOnce(&Path, &Path) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, StoreError> {
        let root = self.root.clone();
        let path = root.join(relative(operation, key)?);
        let key = key.to_owned();
        tokio::task::spawn_blocking(move || {
            work(&root, &path).map_err(|failure| {
                if root.is_dir() { failure.into_error(operation, &key) } else { no_root(operation, &root) }
            })
        })
        .await
        .unwrap_or_else(|error| Err(StoreError::new(ErrorKind::Other, operation, "thread").because(error)))
    }

    /// Waits for the lock, at most [`LOCK_DEADLINE`]. It is held until the file is dropped.
    async fn lock(&self, operation: Operation, key: &str) -> Result<File, StoreError> {
        let failed = |error| {
            if self.root.is_dir() {
                Failure::from(error).into_error(operation, key)
            } else {
                no_root(operation, &self.root)
            }
        };
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.root.join(LOCK_NAME))
            .map_err(failed)?;
        let deadline = tokio::time::Instant::now() + LOCK_DEADLINE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
                Err(TryLockError::WouldBlock) if tokio::time::Instant::now() >= deadline => {
                    return Err(StoreError::new(ErrorKind::Unavailable, operation, key)
                        .because("another process holds the store's lock"));
                }
                Err(TryLockError::WouldBlock) => tokio::time::sleep(LOCK_POLL).await,
            }
        }
    }
}

/// An operation that failed part of the way.
struct Failure {
    kind: ErrorKind,
    maybe_applied: bool,
    cause: Option<io::Error>,
}

impl Failure {
    fn of(kind: ErrorKind) -> Self {
        Self { kind, maybe_applied: false, cause: None }
    }

    /// A failure after the name was changed: the change may or may not survive a crash.
    fn after_rename(error: io::Error) -> Self {
        Self { maybe_applied: true, ..error.into() }
    }

    fn into_error(self, operation: Operation, key: &str) -> StoreError {
        let error = StoreError::new(self.kind, operation, key).applied(self.maybe_applied);
        match self.cause {
            Some(cause) => error.because(cause),
            None => error,
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self { kind: io_kind(&error), maybe_applied: false, cause: Some(error) }
    }
}

/// What an I/O error means for a store operation.
pub(crate) fn io_kind(error: &io::Error) -> ErrorKind {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::Full,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Forbidden,
        io::ErrorKind::UnexpectedEof => ErrorKind::Corrupt,
        io::ErrorKind::IsADirectory
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::InvalidInput => ErrorKind::Other,
        _ => ErrorKind::Unavailable,
    }
}

fn no_root(operation: Operation, root: &Path) -> StoreError {
    StoreError::new(ErrorKind::NoSuchBucket, operation, root.display().to_string())
        .because("the store's root directory does not exist")
}

/// The path of `key` below the root. Only names that stay where they are put.
fn relative(operation: Operation, key: &str) -> Result<&Path, StoreError> {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-_.=+@,".contains(&c);
    let good = |part: &str| (1..=200).contains(&part.len()) && !part.starts_with('.') && part.bytes().all(allowed);
    if key.split('/').all(good) {
        Ok(Path::new(key))
    } else {
        Err(StoreError::new(ErrorKind::Other, operation, key).because("the key is no path of plain names"))
    }
}

fn tag(bytes: &[u8]) -> ETag {
    ETag(Digest::of(bytes).to_string())
}

/// Makes a directory's entries durable. Some file systems cannot sync a directory and say so; nothing more can be done there.
fn sync_directory(path: &Path) -> io::Result<()> {
    match File::open(path)?.sync_all() {
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        other => other,
    }
}

/// Creates the directories above `path` that are missing below `root`, durably.
fn make_directories(root: &Path, path: &Path) -> io::Result<()> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    if parent == root || parent.is_dir() {
        return Ok(());
    }
    make_directories(root, parent)?;
    match fs::create_dir(parent) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => parent.parent().map_or(Ok(()), sync_directory),
    }
}

/// Creates a new file in the directory of `path` under a name from `name`, which is asked again while its answer is taken.
fn create(root: &Path, path: &Path, mut name: impl FnMut() -> Option<PathBuf>) -> io::Result<(PathBuf, File)> {
    let mut tries = 0;
    let mut target = name();
    while let Some(at) = target.take() {
        make_directories(root, path)?;
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(&at);
        match opened {
            Ok(file) => return Ok((at, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => target = name(),
            // A deletion removed the empty directory between the two calls.
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < DIRECTORY_TRIES => {
                tries += 1;
                target = Some(at);
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

/// A file that is removed unless it was renamed.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn beside(root: &Path, path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(root);
        let (path, file) = create(root, path, || {
            let n = NEXT_TEMPORARY.fetch_add(1, Ordering::Relaxed);
            Some(directory.join(format!(".tmp-{}-{n}", std::process::id())))
        })?;
        Ok(Self { path, file })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing under this name.
        let _ = fs::remove_file(&self.path);
    }
}

fn walk(directory: &Path, key: &str, prefix: &str, found: &mut Vec<Listed>) -> io::Result<()> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        let key = format!("{key}{name}");
        // Gone since the directory was read: deleted, and so no part of the listing.
        let metadata = match entry.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        };
        if metadata.is_dir() {
            let inside = format!("{key}/");
            if inside.starts_with(prefix) || prefix.starts_with(&inside) {
                walk(&entry.path(), &inside, prefix, found)?;
            }
        } else if key.starts_with(prefix) {
            found.push(Listed { key, size: metadata.len() });
        }
    }
    Ok(())
}

#[async_trait]
impl ObjectStore for DirectoryStore {
    async fn get(&self, key: &str) -> Result<Object, StoreError> {
        self.blocking(Operation::Get, key, |_, path| {
            let bytes = Bytes::from(fs::read(path)?);
            Ok(Object { etag: tag(&bytes), bytes })
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let name = key.to_owned();
        self.blocking(Operation::Get, key, move |_, path| {
            let file = File::open(path)?;
            // Before the buffer is allocated: a range may come from a manifest.
            let len = file.metadata()?.len();
            if range.end > len {
                let expected = range.end.saturating_sub(range.start);
                let got = len.saturating_sub(range.start);
                return Ok(Err(wrong_length(&name, got, expected)));
            }
            let mut bytes = vec![0; (range.end.saturating_sub(range.start)) as usize];
            file.read_exact_at(&mut bytes, range.start)?;
            Ok(Ok(Bytes::from(bytes)))
        })
        .await?
    }

    async fn put(&self, key: &str, bytes: Bytes, precondition: &Precondition) -> Result<ETag, StoreError> {
        let etag = tag(&bytes);
        let temporary = self
            .blocking(Operation::Put, key, move |root, path| {
                let mut temporary = Temporary::beside(root, path)?;
                temporary.file.write_all(&bytes)?;
                temporary.file.sync_all()?;
                Ok(temporary)
            })
            .await?;
        let precondition = precondition.clone();
        let lock = self.lock(Operation::Put, key).await?;
        self.blocking(Operation::Put, key, move |_, path| {
            // The lock lives in this closure: a caller that goes away does not release it half-way.
            let _lock = lock;
            match precondition {
                Precondition::None => {}
                Precondition::IfAbsent => {
                    if path.try_exists()? {
                        return Err(Failure::of(ErrorKind::PreconditionFailed));
                    }
                }
                Precondition::IfMatch(expected) => {
                    if tag(&fs::read(path)?) != expected {
                        return Err(Failure::of(ErrorKind::PreconditionFailed));
                    }
                }
            }
            fs::rename(&temporary.path, path)?;
            path.parent().map_or(Ok(()), sync_directory).map_err(Failure::after_rename)
        })
        .await?;
        Ok(etag)
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<ListPage, StoreError> {
        let root = self.root.clone();
        let prefix = prefix.to_owned();
        let next = next.map(str::to_owned);
        let listed = tokio::task::spawn_blocking(move || {
            if !root.is_dir() {
                return Err(no_root(Operation::List, &root));
            }
            let mut objects = Vec::new();
            walk(&root, "", &prefix, &mut objects)
                .map_err(|error| Failure::from(error).into_error(Operation::List, &prefix))?;
            objects.retain(|object| next.as_ref().is_none_or(|next| object.key > *next));
            objects.sort_by(|a, b| a.key.cmp(&b.key));
            let more = objects.len() > LIST_PAGE;
            objects.truncate(LIST_PAGE);
            Ok(ListPage { next: objects.last().filter(|_| more).map(|object| object.key.clone()), objects })
        });
        listed
            .await
            .unwrap_or_else(|error| Err(StoreError::new(ErrorKind::Other, Operation::List, "thread").because(error)))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let lock = self.lock(Operation::Delete, key).await?;
        self.blocking(Operation::Delete, key, move |root, path| {
            let _lock = lock;
            match fs::remove_file(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                other => other?,
            }
            // Directories that are empty now go too; the first that is not ends it.
            let mut kept = path.parent();
            while let Some(directory) = kept.filter(|directory| *directory != root)
                && fs::remove_dir(directory).is_ok()
            {
                kept = directory.parent();
            }
            kept.map_or(Ok(()), sync_directory).map_err(Failure::after_rename)
        })
        .await
    }

    async fn grant_put(&self, key: &str, _ttl: Duration) -> Result<RawGrant, StoreError> {
        self.blocking(Operation::Grant, key, |root, path| {
            let mut name = Some(path.to_owned());
            let (_, file) = create(root, path, || name.take()).map_err(|error| {
                if error.kind() == io::ErrorKind::AlreadyExists {
                    Failure::of(ErrorKind::PreconditionFailed)
                } else {
                    error.into()
                }
            })?;
            // The bearer syncs the file; only we can sync its name.
            path.parent().map_or(Ok(()), sync_directory)?;
            Ok(RawGrant::File(file))
        })
        .await
    }

    async fn grant_get(&self, key: &str, _ttl: Duration) -> Result<RawGrant, StoreError> {
        self.blocking(Operation::Grant, key, |_, path| Ok(RawGrant::File(File::open(path)?))).await
    }
}
