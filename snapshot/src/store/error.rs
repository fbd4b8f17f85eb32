//! Store errors: what was tried on which object, what came of it, and what the caller may conclude.

use std::{error::Error, fmt};

/// What was tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Operation {
    Get,
    Put,
    List,
    Delete,
    Grant,
}

/// What came of it. Each kind is an instruction to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// The object does not exist. Under `IfMatch`: it did once, or the key is wrong.
    NotFound,
    /// The precondition did not hold (412).
    PreconditionFailed,
    /// A competing write is in flight (409): settle, then try again.
    Conflict,
    /// The credentials are not accepted (401).
    Unauthorized,
    /// The credentials are accepted but may not do this (403).
    Forbidden,
    /// No answer in time, no connection, or a 5xx: try again.
    Unavailable,
    /// No space left (507, `ENOSPC`, quota).
    Full,
    /// The bucket or the root directory does not exist.
    NoSuchBucket,
    /// What was read is not what was written: shorter, or another digest.
    Corrupt,
    /// Anything else: the request itself is at fault.
    Other,
}

/// A failed operation on one object.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {key:?}: {kind}")]
pub struct StoreError {
    /// What came of it.
    pub kind: ErrorKind,
    /// What was tried.
    pub operation: Operation,
    /// On which key (or prefix).
    pub key: String,
    /// Whether the request may have been applied, or may yet be, although it failed. Always `false` for reads.
    pub maybe_applied: bool,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

impl StoreError {
    /// An error without a cause, whose request was surely not applied.
    pub fn new(kind: ErrorKind, operation: Operation, key: impl Into<String>) -> Self {
        Self { kind, operation, key: key.into(), maybe_applied: false, source: None }
    }

    /// The same error with its cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same error, saying whether the request may have been applied.
    #[must_use]
    pub fn applied(mut self, maybe: bool) -> Self {
        self.maybe_applied = maybe;
        self
    }

    /// Whether the same request may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self.kind {
            ErrorKind::Unavailable | ErrorKind::Conflict => true,
            ErrorKind::NotFound
            | ErrorKind::PreconditionFailed
            | ErrorKind::Unauthorized
            | ErrorKind::Forbidden
            | ErrorKind::Full
            | ErrorKind::NoSuchBucket
            | ErrorKind::Corrupt
            | ErrorKind::Other => false,
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Get => "get",
            Self::Put => "put",
            Self::List => "list",
            Self::Delete => "delete",
            Self::Grant => "grant access to",
        })
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotFound => "no such object",
            Self::PreconditionFailed => "the precondition does not hold",
            Self::Conflict => "a competing write is in flight",
            Self::Unauthorized => "the store does not accept the credentials (401)",
            Self::Forbidden => "the store forbids it (403)",
            Self::Unavailable => "the store is unavailable",
            Self::Full => "the store is full",
            Self::NoSuchBucket => "the bucket does not exist",
            Self::Corrupt => "the object is damaged",
            Self::Other => "the store refused the request",
        })
    }
}
