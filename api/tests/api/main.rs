//! The supervisor without a VMM: routes called in-process, the embedded S3 server, faults on the wire, recovery from the bucket.
#![expect(clippy::unwrap_used, reason = "support code of tests fails by panicking")]

mod embedded_s3;
mod recovery;
mod routes;
mod sessions;
mod support;
