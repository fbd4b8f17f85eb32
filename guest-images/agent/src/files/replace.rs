//! A file's new content comes all at once: it is written beside the file and takes its place when it is complete, so that a request that
//! breaks off, as a pause makes it do, leaves the old content. A file that has other names (hard links), or whose directory takes no new
//! file, is written in place.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

use super::{FileError, failed};

/// Of a file that was not there.
const NEW_MODE: u32 = 0o644;
const NEW_DIRECTORY_MODE: u32 = 0o755;

/// A file that is being written. Dropped before [`Replacement::finish`], it takes what it wrote away again.
#[derive(Debug)]
pub(crate) struct Replacement {
    /// Where the content goes.
    file: File,
    target: PathBuf,
    /// What takes the target's place; `None` when the target itself is written.
    beside: Option<PathBuf>,
    /// Asked for; else what the file had.
    mode: Option<u32>,
}

impl Replacement {
    /// Begins to replace, or make, the file at `path`. Missing parents are made.
    pub(crate) fn begin(path: &Path, mode: Option<u32>) -> Result<Self, FileError> {
        let existing = match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                return Err(FileError::invalid("path", format!("{} is a directory", path.display())));
            }
            Ok(found) if !found.is_file() => {
                return Err(FileError::invalid("path", format!("{} is not a regular file", path.display())));
            }
            Ok(found) => Some(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("write", path)(error)),
        };
        // The file itself, not a link to it. One that leads nowhere is written through.
        let target = match &existing {
            Some(_) => fs::canonicalize(path).map_err(failed("write", path))?,
            None => path.to_owned(),
        };
        let parent = target.parent().unwrap_or(Path::new("/"));
        if existing.is_none() {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(NEW_DIRECTORY_MODE)
                .create(parent)
                .map_err(failed("make the directory of", path))?;
        }
        let linked = existing.as_ref().is_some_and(|found| found.nlink() > 1);
        let dangling = existing.is_none() && fs::symlink_metadata(&target).is_ok();
        if !linked && !dangling {
            let beside = parent.join(format!(".stasis-{:016x}", random()));
            if let Ok(file) = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside) {
                let replacement = Self { file, target, beside: Some(beside), mode };
                if let Some(found) = &existing {
                    fchown(&replacement.file, Some(found.uid()), Some(found.gid())).map_err(failed("write", path))?;
                }
                let mode = mode.unwrap_or_else(|| existing.map_or(NEW_MODE, |found| found.mode() & 0o7777));
                replacement.file.set_permissions(Permissions::from_mode(mode)).map_err(failed("write", path))?;
                return Ok(replacement);
            }
        }
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(mode.unwrap_or(NEW_MODE))
            .open(&target)
            .map_err(failed("write", path))?;
        Ok(Self { file, target, beside: None, mode })
    }

    /// Adds content.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).map_err(failed("write", &self.target))
    }

    /// The content is complete: the file has it from now on.
    pub(crate) fn finish(mut self) -> Result<(), FileError> {
        match self.beside.take() {
            Some(beside) => fs::rename(&beside, &self.target).map_err(|error| {
                let _ = fs::remove_file(&beside);
                failed("write", &self.target)(error)
            }),
            None => match self.mode {
                Some(mode) => {
                    self.file.set_permissions(Permissions::from_mode(mode)).map_err(failed("write", &self.target))
                }
                None => Ok(()),
            },
        }
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        if let Some(beside) = &self.beside {
            let _ = fs::remove_file(beside);
        }
    }
}

/// Replaces the content of a file.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let mut replacement = Replacement::begin(path, None)?;
    replacement.write(content)?;
    replacement.finish()
}

/// For names that nobody else has.
pub(crate) fn random() -> u64 {
    let mut bytes = [0; 8];
    // Never fails for so few bytes once the pool is there, which it is long before requests come.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
    u64::from_ne_bytes(bytes)
}
