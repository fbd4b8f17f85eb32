//! What `stasis dev` and tests need beside a supervisor: an S3 server of our own, and a proxy that injects faults and a link's limits on the wire.

mod fault_proxy;
pub mod layout;
mod link;
mod objects;
mod s3;

pub use fault_proxy::{Fault, FaultProxy, Rule, Seen};
pub use link::LinkShape;
pub use s3::{EmbeddedError, EmbeddedS3, Exchange};
