//! What an HTTP answer, or the lack of one, means for a store operation. Shared by the S3 store and granted URLs.

use super::error::{ErrorKind, Operation, StoreError};

/// An answer that is no success.
#[derive(Debug, thiserror::Error)]
#[error("HTTP {status}{}", .code.as_ref().map(|code| format!(" {code}")).unwrap_or_default())]
pub(crate) struct Refusal {
    status: u16,
    code: Option<String>,
}

/// The error for an answer with `status` and a body that may hold an S3 error document.
pub(crate) fn refused(operation: Operation, key: &str, status: u16, body: &[u8]) -> StoreError {
    let code = error_code(body);
    let kind = match (status, code.as_deref()) {
        (_, Some("NoSuchBucket")) => ErrorKind::NoSuchBucket,
        (_, Some("RequestTimeout" | "SlowDown")) => ErrorKind::Unavailable,
        (507, _) | (_, Some("InsufficientStorage" | "XMinioStorageFull" | "QuotaExceeded")) => ErrorKind::Full,
        (401, _) => ErrorKind::Unauthorized,
        (403, _) => ErrorKind::Forbidden,
        (404, _) => ErrorKind::NotFound,
        (409, _) => ErrorKind::Conflict,
        (412, _) => ErrorKind::PreconditionFailed,
        (416, _) => ErrorKind::Corrupt,
        (408 | 429 | 500.., _) => ErrorKind::Unavailable,
        _ => ErrorKind::Other,
    };
    // A 409 says that a write is in flight, not whose; a 5xx may come from behind the point where the write was applied.
    let maybe = matches!(kind, ErrorKind::Conflict | ErrorKind::Unavailable);
    StoreError::new(kind, operation, key).applied(maybe && writes(operation)).because(Refusal { status, code })
}

/// How far a request came that got no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Without a connection nothing was sent.
    Connecting,
    /// Some of it may have arrived.
    Sent,
}

/// The error for a request that got no answer.
pub(crate) fn unanswered(
    operation: Operation,
    key: &str,
    phase: Phase,
    error: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> StoreError {
    StoreError::new(ErrorKind::Unavailable, operation, key)
        .applied(phase == Phase::Sent && writes(operation))
        .because(error)
}

/// The same for a request of rust-s3's client.
pub(crate) fn unanswered_by_bucket(operation: Operation, key: &str, error: reqwest::Error) -> StoreError {
    if error.is_builder() {
        return StoreError::new(ErrorKind::Other, operation, key).because(error.without_url());
    }
    let phase = if error.is_connect() { Phase::Connecting } else { Phase::Sent };
    // A signed URL is a credential: it must not get into a log.
    unanswered(operation, key, phase, error.without_url())
}

/// The error for an answer that is shorter or longer than what was asked for.
pub(crate) fn wrong_length(key: &str, got: u64, expected: u64) -> StoreError {
    StoreError::new(ErrorKind::Corrupt, Operation::Get, key).because(format!("{got} bytes, expected {expected}"))
}

fn writes(operation: Operation) -> bool {
    matches!(operation, Operation::Put | Operation::Delete)
}

/// The `Code` of an S3 error document.
fn error_code(body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?;
    let (_, rest) = text.split_once("<Code>")?;
    let (code, _) = rest.split_once("</Code>")?;
    let plain = (1..=64).contains(&code.len()) && code.bytes().all(|c| c.is_ascii_alphanumeric());
    plain.then(|| code.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_kinds() {
        use ErrorKind as K;
        let document = |code: &str| format!("<Error><Code>{code}</Code></Error>");
        for (status, code, kind, applied) in [
            (401, "", K::Unauthorized, false),
            (403, "AccessDenied", K::Forbidden, false),
            (404, "NoSuchKey", K::NotFound, false),
            (404, "NoSuchBucket", K::NoSuchBucket, false),
            (409, "ConditionalRequestConflict", K::Conflict, true),
            (412, "PreconditionFailed", K::PreconditionFailed, false),
            (400, "RequestTimeout", K::Unavailable, true),
            (400, "", K::Other, false),
            (429, "", K::Unavailable, true),
            (500, "InternalError", K::Unavailable, true),
            (503, "SlowDown", K::Unavailable, true),
            (507, "", K::Full, false),
            (301, "", K::Other, false),
        ] {
            let error = refused(Operation::Put, "k", status, document(code).as_bytes());
            assert_eq!((error.kind, error.maybe_applied), (kind, applied), "{status} {code}");
            let read = refused(Operation::Get, "k", status, document(code).as_bytes());
            assert!(!read.maybe_applied);
        }
    }

    #[test]
    fn messages_name_operation_key_and_cause() {
        let error = refused(Operation::Put, "a/b", 503, b"<Code>SlowDown</Code>");
        assert_eq!(error.to_string(), "put \"a/b\": the store is unavailable");
        assert_eq!(error.source.unwrap().to_string(), "HTTP 503 SlowDown");
    }
}
