//! What a store really does with conditional writes, found out at start-up by trying.

use super::{ObjectStore, StoreError};

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether conditional writes behave as the commit protocol needs.
    pub conditional_writes: bool,
    /// What did not, one sentence each.
    pub reasons: Vec<String>,
}

/// Tries a double create, a stale `IfMatch` and an `IfMatch` on a missing key under `v1/probe/{nonce}`, which must be fresh.
/// Cleans up after itself. An error means the store could not be asked.
pub async fn probe(store: &dyn ObjectStore, nonce: &str) -> Result<Capabilities, StoreError> {
    let _ = (store, nonce);
    todo!()
}
