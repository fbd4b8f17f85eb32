//! The cases that are run when none is asked for: the goals of design §9, and what the issue wants shown of growth, links and crowds.

use std::time::Duration;

use stasis_api::dev::LinkShape;

use super::case::{Case, Guest, Measures, Peer, Wake};

/// A part of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
pub enum Part {
    /// The case that the command line describes.
    #[value(skip)]
    Case,
    /// The goals of design §9, at 1 GiB with 256 MiB used.
    Goals,
    /// Repeat pauses grow with what changed, not with memory.
    Changed,
    /// Cold wakes do not grow with memory.
    Memory,
    /// A link of 30 ms and 1 Gb/s.
    Link,
    /// Twenty sandboxes at once.
    Many,
    /// What seals cost: with them and without, in turn.
    Sealed,
    /// Networks of sandboxes.
    Network,
}

/// Changed sets of [`Part::Changed`], MiB.
const CHANGED: [u32; 3] = [4, 32, 128];
/// Memory sizes of [`Part::Changed`] and [`Part::Memory`], MiB.
const MEMORY: [u32; 3] = [1024, 4096, 6144];

/// The link of [`Part::Link`].
pub fn link() -> LinkShape {
    LinkShape { round_trip: Duration::from_millis(30), bits_per_second: Some(1_000_000_000) }
}

/// All of it, in order; peers belong to the goals, and to networks.
pub fn cases(peers: &[Peer]) -> Vec<(Part, Case)> {
    let mut all = vec![(Part::Goals, Case { peers: peers.to_vec(), ..Case::standard() })];
    // For the stop of a named snapshot at another size of the changed set and of memory.
    let stop = Measures { wakes: vec![Wake::Cold], snapshot: true, residue: false };
    let large = Case { changed_mib: 128, runs: 3, measures: stop.clone(), peers: peers.to_vec(), ..Case::standard() };
    all.push((Part::Goals, large));
    for memory_mib in MEMORY {
        for changed_mib in CHANGED {
            // The cold wake of the middle one is that of Part::Memory.
            let part = if changed_mib == CHANGED[1] { Part::Memory } else { Part::Changed };
            all.push((part, Case { memory_mib, changed_mib, runs: 3, measures: stop.clone(), ..Case::standard() }));
        }
    }
    let cold = Measures { wakes: vec![Wake::Cold], snapshot: false, residue: false };
    all.push((Part::Link, Case { link: Some(link()), runs: 3, measures: cold.clone(), ..Case::standard() }));
    let many = Case {
        memory_mib: 256,
        used_mib: 64,
        changed_mib: 4,
        sandboxes: 20,
        runs: 2,
        measures: cold.clone(),
        ..Case::standard()
    };
    all.push((Part::Many, Case { link: Some(LinkShape { round_trip: Duration::ZERO, ..link() }), ..many.clone() }));
    all.push((Part::Many, many));
    all.push((Part::Sealed, Case { encrypt: true, runs: 3, measures: cold.clone(), ..Case::standard() }));
    let nothing = Measures { wakes: Vec::new(), snapshot: false, residue: false };
    let small = Case { memory_mib: 512, used_mib: 0, changed_mib: 0, runs: 3, measures: nothing, ..Case::standard() };
    all.push((Part::Network, Case { guest: Guest::Debian, peers: peers.to_vec(), ..small }));
    all
}
