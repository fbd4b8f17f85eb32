//! How many sandboxes may have a VM at once: of one tenant, and on this host. Pure; `supervisor::admission` counts and holds the door.
//!
//! Sandboxes that are `paused` or `stopped` have no VM and count for nothing: a tenant may have as many of them as its bucket holds.

use crate::sources::UnixMs;
use http::StatusCode;

/// A refused client is told to come back in this many seconds at the earliest and at the latest.
const RETRY_S: (i64, i64) = (1, 60);
/// The same when nothing says when a place will be free.
const RETRY_UNKNOWN_S: u32 = 10;

/// What a place is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A new sandbox from a template.
    Create,
    /// A new sandbox from a named snapshot.
    Restore,
    /// A stopped sandbox.
    Start,
    /// A paused sandbox.
    Wake,
}

/// Sandboxes that have a VM or are about to, and places for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Taken.
    pub taken: usize,
    /// In all.
    pub limit: usize,
    /// The first end of a life among those that take them.
    pub next_end: Option<UnixMs>,
}

/// Whose limit is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The tenant's.
    Tenant,
    /// The host's.
    Host,
}

/// There is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.message())]
pub struct NoPlace {
    /// Whose limit.
    pub scope: Scope,
    /// How many there may be.
    pub limit: usize,
    /// What the place was for.
    pub purpose: Purpose,
    /// When to ask again, seconds.
    pub retry_after_s: u32,
}

impl NoPlace {
    fn message(&self) -> String {
        let limit = self.limit;
        match self.scope {
            Scope::Tenant => format!("the limit of {limit} sandboxes is reached: delete, pause or stop one first"),
            Scope::Host => format!("this host runs {limit} sandboxes and takes no more now: try again later"),
        }
    }

    /// The contract answers a create beyond the tenant's limit as a conflict, and a restore or a start as too many requests. A wake is answered
    /// like a start. A full host is no matter of the request at all.
    pub fn status(&self) -> StatusCode {
        match (self.scope, self.purpose) {
            (Scope::Tenant, Purpose::Create) => StatusCode::CONFLICT,
            (Scope::Tenant, Purpose::Restore | Purpose::Start | Purpose::Wake) => StatusCode::TOO_MANY_REQUESTS,
            (Scope::Host, _) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// Whether there is a place: the tenant's own limit speaks first, since it can do something about it.
pub fn admit(purpose: Purpose, tenant: Places, host: Places, now: UnixMs) -> Result<(), NoPlace> {
    for (scope, places) in [(Scope::Tenant, tenant), (Scope::Host, host)] {
        if places.taken >= places.limit {
            let retry_after_s = retry_after(places.next_end, now);
            return Err(NoPlace { scope, limit: places.limit, purpose, retry_after_s });
        }
    }
    Ok(())
}

fn retry_after(next_end: Option<UnixMs>, now: UnixMs) -> u32 {
    let wait = next_end.map(|end| ((end - now + 999) / 1000).clamp(RETRY_S.0, RETRY_S.1));
    wait.and_then(|seconds| u32::try_from(seconds).ok()).unwrap_or(RETRY_UNKNOWN_S)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Places = Places { taken: 0, limit: 1, next_end: None };
    const FULL: Places = Places { taken: 1, limit: 1, next_end: Some(12_500) };

    #[test]
    fn the_last_place_is_given_and_no_more() {
        for (taken, given) in [(0, true), (1, true), (2, false), (3, false)] {
            assert_eq!(admit(Purpose::Create, Places { taken, limit: 2, next_end: None }, ROOM, 0).is_ok(), given);
        }
    }

    #[test]
    fn each_refusal_has_its_status() {
        for (purpose, status) in
            [(Purpose::Create, 409), (Purpose::Restore, 429), (Purpose::Start, 429), (Purpose::Wake, 429)]
        {
            let refused = admit(purpose, FULL, FULL, 0).unwrap_err();
            assert_eq!((refused.scope, refused.status().as_u16()), (Scope::Tenant, status), "{purpose:?}");
            assert_eq!(admit(purpose, ROOM, FULL, 0).unwrap_err().status().as_u16(), 503, "{purpose:?}");
        }
    }

    #[test]
    fn a_refused_client_comes_back_when_a_life_ends() {
        let retry = |now| admit(Purpose::Wake, FULL, ROOM, now).unwrap_err().retry_after_s;
        assert_eq!((retry(0), retry(12_400), retry(99_999), retry(-1_000_000)), (13, 1, 1, 60));
        let unknown = Places { next_end: None, ..FULL };
        assert_eq!(admit(Purpose::Wake, unknown, ROOM, 0).unwrap_err().retry_after_s, RETRY_UNKNOWN_S);
    }
}
