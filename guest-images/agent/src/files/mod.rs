//! Files of the guest, for `/v1/files`. Everything here blocks and runs on a thread that may; `server::files` puts it there, and moves the
//! contents of files, which are streamed.
//!
//! - `path`: from a request's text to a path
//! - `list`: one entry, directories, trees
//! - `walk`: what is below a directory, within bounds
//! - `find`: by name and by content
//! - `part`: which bytes of a file a read asks for
//! - `replace`: a file's new content, all at once
//! - `edit`: find and replace, with a diff
//! - `change`: make, delete, move, copy, permissions

pub(crate) mod change;
pub(crate) mod edit;
pub(crate) mod find;
pub(crate) mod list;
pub(crate) mod part;
pub(crate) mod path;
pub(crate) mod replace;
mod walk;

use std::io;
use std::path::Path;

/// Why an operation was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// A path leads nowhere.
    #[error("{0} does not exist")]
    NotFound(String),
    /// Something is there already.
    #[error("{0} exists already")]
    Exists(String),
    /// The request cannot be carried out as it is. `message`: the end of a sentence that starts with the field.
    #[error("{field} {message}")]
    Invalid { field: String, message: String },
    /// The guest's kernel forbids it.
    #[error("cannot {operation} {path}")]
    Denied {
        operation: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
    /// More than is handled at once.
    #[error("{0}")]
    TooLarge(String),
    /// The guest's disk is full.
    #[error("cannot {operation} {path}: the disk is full")]
    Full { operation: &'static str, path: String },
    /// Anything else.
    #[error("cannot {operation} {path}")]
    Failed {
        operation: &'static str,
        path: String,
        #[source]
        source: io::Error,
    },
}

impl FileError {
    pub(crate) fn invalid(field: &str, message: impl Into<String>) -> Self {
        Self::Invalid { field: field.to_owned(), message: message.into() }
    }
}

/// What an I/O error says about a path.
pub(crate) fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    use io::ErrorKind as Kind;
    let path = path.display().to_string();
    move |source| match source.kind() {
        Kind::NotFound => FileError::NotFound(path),
        Kind::AlreadyExists => FileError::Exists(path),
        Kind::PermissionDenied | Kind::ReadOnlyFilesystem | Kind::ResourceBusy => {
            FileError::Denied { operation, path, source }
        }
        Kind::StorageFull | Kind::QuotaExceeded => FileError::Full { operation, path },
        Kind::FileTooLarge => FileError::TooLarge(format!("cannot {operation} {path}: too large for its file system")),
        Kind::IsADirectory => FileError::invalid("path", format!("{path} is a directory")),
        Kind::NotADirectory => FileError::invalid("path", format!("{path}: a part of it is not a directory")),
        Kind::DirectoryNotEmpty => FileError::invalid("path", format!("{path} is a directory that is not empty")),
        Kind::InvalidFilename => FileError::invalid("path", format!("{path:.100}… is too long")),
        _ if source.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => {
            FileError::invalid("path", format!("{path} leads through too many symbolic links"))
        }
        _ => FileError::Failed { operation, path, source },
    }
}

/// Permission bits from octal text: `755`, `0644`.
pub(crate) fn mode(field: &str, text: &str) -> Result<u32, FileError> {
    let digits = (1..=5).contains(&text.len()) && text.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    u32::from_str_radix(text, 8)
        .ok()
        .filter(|mode| digits && *mode <= 0o7777)
        .ok_or_else(|| FileError::invalid(field, format!("{text:?} is no octal mode such as 755")))
}

#[cfg(test)]
mod tests;
