//! Collection: what no head needs is deleted, in two passes that lie the grace apart.
//!
//! | file | what |
//! | --- | --- |
//! | `plan` | what a pass may do: pure functions over what it read |
//! | `memory` | what a pass tells the next one, an object of the bucket |
//! | `pass` | reads, plans, acts |
//! | `lease` | how a writer says that it holds objects that no head names yet |
//!
//! # What is kept
//!
//! - The manifest that a head names and every pack that this manifest names, whatever prefix they lie under.
//! - While a head is live: everything its sandbox wrote in that epoch or a later one. A capture, a run-ahead or a failed pause may have
//!   put it there, and the owner may yet commit it.
//! - While a lease is open: everything below the prefixes it names, and the manifests it names.
//! - What a tombstone names, until the tombstone is purged. A pass purges a tombstone that an earlier one saw at least the grace ago; the
//!   register lets either the purge or an undelete win.
//! - Heads, templates, and every key whose meaning this build does not know.
//!
//! Everything else is a candidate. A candidate is deleted when an earlier pass, at least the grace ago, found it unreachable too.
//!
//! # Why nothing reachable is deleted
//!
//! What is unreachable stays so, for a commit names only what the head before it named, what its owner wrote in its own epoch (kept while the
//! head is live), or what a lease covers. The parts of a pass are not read at one moment, so roots might move from what is not read yet to
//! what was read already: within a sandbox that cannot happen (one head), and whoever makes a root of another owner's manifest (a fork, a named
//! snapshot) holds a lease that names it and lets that lease run out instead of releasing it. Leases are read last, and a pass whose reading
//! took longer than [`lease::SHORTEST`] deletes nothing.
//!
//! A manifest that cannot be read hides what it names: while a head names one, its tenant's objects are all kept and the report says so.
//!
//! # Clocks
//!
//! Writers' clocks are not asked at all: a lease is open until its object has stayed the same for twice its lifetime as seen by the collector,
//! which then breaks it by compare-and-swap, so that its writer learns of it at its next renewal. Collectors on several hosts compare
//! their clocks with each other through [`Memory`]; a difference shortens or lengthens the grace by that much, nothing else. A writer without
//! a lease must have committed within half of the grace.
//!
//! # Crash
//!
//! A pass may end between any two requests. Memory is written before the first deletion and still names what is to be deleted; what was
//! deleted is dropped from it by the next pass, which no longer finds it in the listing.

pub mod lease;
mod memory;
mod pass;
mod plan;

pub use memory::{Memory, MemoryError};
pub use pass::{GcError, Options, Report, TenantReport, run};
pub use plan::{HeadSeen, LeaseSeen, Seen, Settlement, Sweep, settle, sweep};
