//! What a pass may do. Pure: everything that was read goes in, everything that is to be done comes out.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use super::{
    lease::Body,
    memory::{Memory, Ms, Sighting},
};
use crate::{
    commit::{Current, HeadState},
    layout::{Part, Place},
    manifest::ManifestRef,
    store::{ETag, Listed},
};

/// One head.
#[derive(Clone, Debug)]
pub struct HeadSeen {
    /// Its key.
    pub key: String,
    /// It, or why it cannot be read.
    pub head: Result<Current, String>,
}

/// One lease.
#[derive(Clone, Debug)]
pub struct LeaseSeen {
    /// Its key.
    pub key: String,
    /// Its tag.
    pub etag: ETag,
    /// It, or why it cannot be read.
    pub body: Result<Body, String>,
}

/// Everything that a pass read of one tenant. The objects were listed before the heads were read, and the leases after them.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// All objects below the tenant's sandboxes and named snapshots.
    pub objects: Vec<Listed>,
    /// All heads.
    pub heads: Vec<HeadSeen>,
    /// All leases.
    pub leases: Vec<LeaseSeen>,
    /// The packs of every manifest that a head or a lease names, by its key; or why they cannot be known.
    pub packs: BTreeMap<String, Result<Vec<String>, String>>,
}

/// What must be settled by compare-and-swap before anything is deleted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settlement {
    /// Keys of heads whose tombstones are to be purged.
    pub purge: BTreeSet<String>,
    /// Keys of leases to be broken.
    pub break_leases: BTreeSet<String>,
    /// Keys of leases that were broken long ago.
    pub forget_leases: BTreeSet<String>,
}

/// What a pass does in the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sweep {
    /// To be deleted, in this order: manifests before the packs they name.
    pub delete: Vec<Listed>,
    /// For the next pass.
    pub memory: Memory,
    /// Why nothing is deleted; empty when nothing stands in the way.
    pub blocked: Vec<String>,
    /// What is odd, and kept.
    pub odd: Vec<String>,
    /// Objects that are reachable.
    pub kept: u64,
}

fn ms(duration: Duration) -> Ms {
    Ms::try_from(duration.as_millis()).unwrap_or(Ms::MAX)
}

fn unchanged_for(memory: &BTreeMap<String, Sighting>, key: &str, what: &str, now: Ms) -> Option<Ms> {
    memory.get(key).filter(|seen| seen.what == what).map(|seen| now.saturating_sub(seen.since))
}

/// Tombstones and leases whose time is over.
pub fn settle(seen: &Seen, memory: &Memory, now: Ms, grace: Duration) -> Settlement {
    let mut settlement = Settlement::default();
    for HeadSeen { key, head } in &seen.heads {
        let Ok(current) = head else { continue };
        let named = current.head.state == HeadState::Deleted && current.head.manifest.is_some();
        let age = unchanged_for(&memory.tombstones, key, &current.head.commit.to_string(), now);
        if named && age.is_some_and(|age| age >= ms(grace)) {
            settlement.purge.insert(key.clone());
        }
    }
    for LeaseSeen { key, etag, body } in &seen.leases {
        let (Ok(body), Some(age)) = (body, unchanged_for(&memory.leases, key, &etag.0, now)) else { continue };
        let lifetime = Ms::try_from(body.lifetime_ms).unwrap_or(Ms::MAX);
        if body.broken {
            if age >= ms(grace) {
                settlement.forget_leases.insert(key.clone());
            }
        } else if age >= lifetime.saturating_mul(2) {
            settlement.break_leases.insert(key.clone());
        }
    }
    settlement
}

/// What is reachable.
#[derive(Default)]
struct Marks<'a> {
    keys: BTreeSet<&'a str>,
    /// Prefixes below which everything from an epoch on is kept.
    pins: BTreeMap<&'a str, u64>,
}

impl<'a> Marks<'a> {
    fn root(&mut self, seen: &'a Seen, named: &'a ManifestRef, blocked: &mut BTreeSet<String>) {
        self.keys.insert(&named.key);
        match seen.packs.get(&named.key) {
            Some(Ok(packs)) => self.keys.extend(packs.iter().map(String::as_str)),
            Some(Err(why)) => drop(blocked.insert(format!("{}: {why}", named.key))),
            None => drop(blocked.insert(format!("{}: it was not read", named.key))),
        }
    }

    fn pin(&mut self, owner: &'a str, epoch: u64) {
        let from = self.pins.entry(owner).or_insert(epoch);
        *from = epoch.min(*from);
    }

    fn holds(&self, key: &str, place: &Place<'_>) -> bool {
        self.keys.contains(key)
            || match (place.part, self.pins.get(place.owner)) {
                (Part::Generation { epoch, .. }, Some(from)) => epoch >= *from,
                _ => false,
            }
    }
}

/// What to delete and what to remember. `purged` and `broken` are what of [`Settlement`] was done; a tombstone or lease of it that is not
/// among them may have changed since it was read, and `seen` holds it as it is now.
pub fn sweep(
    seen: &Seen,
    (purged, broken): (&BTreeSet<String>, &BTreeSet<String>),
    memory: &Memory,
    now: Ms,
    grace: Duration,
) -> Sweep {
    let mut result = Sweep::default();
    let mut blocked = BTreeSet::new();
    // What is needed for good; and that together with what is needed for now. Candidates are what is not needed for good, deletions what is
    // not needed for now either: so the grace of what a tombstone or a lease keeps runs while it does.
    let (mut lasting, mut all) = (Marks::default(), Marks::default());
    let mut owners = BTreeSet::new();
    for HeadSeen { key, head } in &seen.heads {
        owners.insert(key.as_str());
        let current = match head {
            Ok(current) => current,
            Err(why) => {
                blocked.insert(format!("{key}: {why}"));
                continue;
            }
        };
        let head = &current.head;
        let Some(place) = Place::of(key) else { continue };
        match (head.state, &head.manifest) {
            (HeadState::Deleted, None) => {}
            (HeadState::Deleted, Some(_)) if purged.contains(key) => {}
            (HeadState::Deleted, Some(named)) => {
                all.root(seen, named, &mut blocked);
                remember(memory, |m| &m.tombstones, &mut result.memory.tombstones, key, &head.commit.to_string(), now);
            }
            (HeadState::Live | HeadState::Paused | HeadState::Stopped, named) => {
                if let Some(named) = named {
                    all.root(seen, named, &mut blocked);
                    lasting.root(seen, named, &mut blocked);
                }
                if head.state == HeadState::Live {
                    all.pin(place.owner, head.epoch);
                }
            }
        }
    }
    for LeaseSeen { key, etag, body } in &seen.leases {
        match body {
            // A lease of a later format keeps what we cannot know.
            Err(why) => drop(blocked.insert(format!("{key}: {why}"))),
            Ok(_) if broken.contains(key) => {}
            Ok(body) => {
                remember(memory, |m| &m.leases, &mut result.memory.leases, key, &etag.0, now);
                if !body.broken {
                    body.claims.manifests.iter().for_each(|named| all.root(seen, named, &mut blocked));
                    body.claims.owners.iter().for_each(|owner| all.pin(owner, 0));
                }
            }
        }
    }
    let headless: BTreeSet<&str> = seen
        .objects
        .iter()
        .filter_map(|object| Place::of(&object.key))
        .filter(|place| {
            place.of_sandbox
                && matches!(place.part, Part::Generation { manifest: true, .. })
                && !owners.contains(format!("{}head", place.owner).as_str())
        })
        .map(|place| place.owner)
        .collect();
    result
        .odd
        .extend(headless.iter().map(|owner| format!("{owner}: it has manifests and no head; see `stasis repair`")));
    for object in &seen.objects {
        let key = object.key.as_str();
        let Some(place) = Place::of(key) else { continue };
        // A head is never deleted; what we do not know is not ours to delete; a sandbox without a head has lost it.
        let sweepable = matches!(place.part, Part::Generation { .. }) && !headless.contains(place.owner);
        if place.part == Part::Other {
            result.odd.push(format!("{key}: this build does not know what it is"));
        }
        if !sweepable || lasting.holds(key, &place) {
            result.kept += 1;
            continue;
        }
        let since = memory.candidates.get(key).copied().unwrap_or(now);
        result.memory.candidates.insert(key.to_owned(), since);
        if all.holds(key, &place) {
            result.kept += 1;
        } else if now.saturating_sub(since) >= ms(grace) && memory.candidates.contains_key(key) {
            result.delete.push(object.clone());
        }
    }
    result.delete.sort_by_key(|object| {
        !matches!(Place::of(&object.key).map(|place| place.part), Some(Part::Generation { manifest: true, .. }))
    });
    result.blocked = blocked.into_iter().collect();
    if !result.blocked.is_empty() {
        result.delete.clear();
    }
    result
}

fn remember(
    memory: &Memory,
    before: impl Fn(&Memory) -> &BTreeMap<String, Sighting>,
    after: &mut BTreeMap<String, Sighting>,
    key: &str,
    what: &str,
    now: Ms,
) {
    let kept = before(memory).get(key).filter(|seen| seen.what == what).cloned();
    after.insert(key.to_owned(), kept.unwrap_or_else(|| Sighting { what: what.to_owned(), since: now }));
}
