//! What a store really does with conditional writes, found out at start-up by trying.

use bytes::Bytes;

use super::{
    ObjectStore, Precondition, StoreError,
    error::{ErrorKind, Operation},
};

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Whether conditional writes behave as the commit protocol needs.
    pub conditional_writes: bool,
    /// What did not, one sentence each.
    pub reasons: Vec<String>,
}

/// Tries a double create, a stale `IfMatch` and an `IfMatch` on a missing key under `v1/probe/{nonce}`, which must be fresh and a plain name.
/// Cleans up after itself. An error means the store could not be asked, or does not even keep an object.
pub async fn probe(store: &dyn ObjectStore, nonce: &str) -> Result<Capabilities, StoreError> {
    let key = format!("v1/probe/{nonce}");
    let found = try_all(store, &key).await;
    let cleaned = store.delete(&key).await;
    let reasons = found?;
    cleaned?;
    Ok(Capabilities { conditional_writes: reasons.is_empty(), reasons })
}

async fn try_all(store: &dyn ObjectStore, key: &str) -> Result<Vec<String>, StoreError> {
    let body = |text: &'static str| Bytes::from_static(text.as_bytes());
    let mut reasons = Vec::new();

    // On a missing key first: the key is fresh. A refusal of the header itself says that the store does not know it.
    let missing = Precondition::IfMatch(super::ETag("\"0123456789abcdef0123456789abcdef\"".into()));
    match store.put(key, body("missing"), &missing).await {
        Ok(_) => reasons.push("if-match creates an object that does not exist".to_owned()),
        Err(error) if refused(&error) => {}
        Err(error) => return Err(error),
    }
    store.delete(key).await?;

    let first = store.put(key, body("first"), &Precondition::IfAbsent).await;
    let first = match first {
        Ok(etag) => etag,
        Err(error) if error.kind == ErrorKind::Other => {
            reasons.push(format!("if-none-match is refused: {error}"));
            return Ok(reasons);
        }
        Err(error) => return Err(error),
    };
    match store.put(key, body("double"), &Precondition::IfAbsent).await {
        Ok(_) => reasons.push("if-none-match overwrites an object that exists".to_owned()),
        Err(error) if refused(&error) => {}
        Err(error) => return Err(error),
    }
    if !reasons.is_empty() {
        return Ok(reasons);
    }

    let right = Precondition::IfMatch(first);
    if let Err(error) = store.put(key, body("second"), &right).await {
        if !refused(&error) {
            return Err(error);
        }
        reasons.push("if-match refuses the tag that the store itself has given".to_owned());
        return Ok(reasons);
    }
    match store.put(key, body("stale"), &right).await {
        Ok(_) => reasons.push("if-match accepts a tag that is no longer current".to_owned()),
        Err(error) if refused(&error) => {
            let kept = store.get(key).await?;
            if kept.bytes != body("second") {
                return Err(StoreError::new(ErrorKind::Corrupt, Operation::Get, key)
                    .because("the store does not return what was written last"));
            }
        }
        Err(error) => return Err(error),
    }
    Ok(reasons)
}

/// Whether the store looked at the precondition and found that it does not hold.
fn refused(error: &StoreError) -> bool {
    matches!(error.kind, ErrorKind::PreconditionFailed | ErrorKind::NotFound | ErrorKind::Conflict)
}
