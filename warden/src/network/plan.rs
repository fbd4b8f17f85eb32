//! What is done with the networks that are found when the warden starts: a pure function, so that each leftover of a crash has a test.
//!
//! A network is three things: a namespace, held by a file under the state directory; a veth in the host's namespace with the owner's name
//! beside it; and a tap, which lives as long as its VMM. A crash can leave any of the first two, with an owner or without.

use std::collections::{BTreeMap, BTreeSet};

/// What there is of one network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// There is a file for its namespace, which may or may not still hold one.
    pub(super) file: bool,
    /// The file holds a namespace.
    pub(super) namespace: bool,
    /// The veth is there.
    pub(super) veth: bool,
    /// Whose it is, as is written beside the veth. A network of the pool is nobody's.
    pub(super) owner: Option<String>,
}

/// What to do with one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// It is whole and somebody's: it goes on under us.
    Adopt {
        /// Whose.
        owner: String,
    },
    /// A VM may still use it, but its namespace cannot be opened any more: the mounts that held it went with the warden's service. It stays as
    /// it is until its owner gives it back.
    Leave {
        /// Whose.
        owner: String,
    },
    /// It goes: half of it is missing, or it is nobody's, since a tap of the pool ended with the process that held it.
    Remove,
}

/// What to do with all of them. Of two networks of one owner, the first is kept: the second was being made.
pub(super) fn plan(found: &BTreeMap<u32, Found>) -> BTreeMap<u32, Step> {
    let mut owners = BTreeSet::new();
    let step = |found: &Found| match &found.owner {
        Some(owner) if found.namespace && found.veth && owners.insert(owner.clone()) => {
            Step::Adopt { owner: owner.clone() }
        }
        Some(owner) if found.veth && !found.namespace && owners.insert(owner.clone()) => {
            Step::Leave { owner: owner.clone() }
        }
        _ => Step::Remove,
    };
    let steps: Vec<_> = found.values().map(step).collect();
    found.keys().copied().zip(steps).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(file: bool, namespace: bool, veth: bool, owner: Option<&str>) -> Found {
        Found { file, namespace, veth, owner: owner.map(str::to_owned) }
    }

    #[test]
    fn whole_networks_with_an_owner_go_on_and_all_else_goes() {
        let adopt = |owner: &str| Step::Adopt { owner: owner.to_owned() };
        for (what, step) in [
            (found(true, true, true, Some("sbx-a")), adopt("sbx-a")),
            // The pool's: its tap died with the warden.
            (found(true, true, true, None), Step::Remove),
            // Killed between the namespace and the veth.
            (found(true, true, false, None), Step::Remove),
            // Killed before the namespace was bound to its file, or after it was taken off.
            (found(true, false, false, None), Step::Remove),
            // The namespace is not held any more, but something keeps the veth: a VM.
            (found(false, false, true, Some("sbx-a")), Step::Leave { owner: "sbx-a".to_owned() }),
            (found(true, false, true, Some("sbx-a")), Step::Leave { owner: "sbx-a".to_owned() }),
            (found(true, false, true, None), Step::Remove),
        ] {
            assert_eq!(plan(&BTreeMap::from([(7, what.clone())])), BTreeMap::from([(7, step)]), "{what:?}");
        }
    }

    #[test]
    fn an_owner_has_one_network() {
        let whole = found(true, true, true, Some("sbx-a"));
        let steps = plan(&BTreeMap::from([(1, whole.clone()), (2, whole)]));
        assert_eq!(steps[&2], Step::Remove);
        assert_eq!(steps[&1], Step::Adopt { owner: "sbx-a".to_owned() });
    }
}
