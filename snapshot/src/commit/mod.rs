//! The head register: one object a sandbox, changed only by compare-and-swap, settled by content. It knows no VM.
//!
//! A commit is an [`Attempt`]: commit id, body and precondition, fixed (and journaled by the caller) before the first request and the same
//! on every retry. [`Register::commit`] sends it and settles what came of it; the answer is an [`Outcome`], a value.
//! [`Register::end_pause`] is the whole end of a pause: commit, else cancel, and what may now be done with the guest.
//!
//! # What holds
//!
//! - Every body is new: seq + 1 and a fresh commit id, so no tag ever repeats. A head is never deleted. A tombstone that names a manifest
//!   can be put back or purged, by one commit each, so that only one of the two happens; a purged one is final.
//! - A head names its commit, its parent and a bounded list of older ancestors: reading it tells whether a commit is in its past.
//! - That the head is still the old one settles nothing: the request may land later. It is sent again, unchanged; or the caller wins a
//!   *cancel commit* under the same precondition, after which it can never land.
//! - Status codes decide only two things: a success, and a refusal of the very first request that was not even looked at (401, 403, full, no bucket).
//!
//! # Crash
//!
//! After a crash, [`Register::settle`] or the same [`Register::commit`] with the journaled attempt. A lost attempt that was never sent is harmless.

mod head;
mod plan;
mod register;
mod storage;

pub use head::{Current, Head, HeadError, HeadState, MAX_ANCESTORS, Rule, validate};
pub use plan::{Attempt, Change, Expected};
pub use register::{Backoff, Cancelled, Outcome, Pacer, PauseEnd, Register, Sent, Verdict, judge};
pub use storage::{HeadStorage, ObjectHead, StoredHead, WriteReply};

#[cfg(test)]
mod sim;
