//! Which units are placed, who brings one in, and who waits for it.
//!
//! A unit is idle, claimed, or placed. Whoever claims an idle one brings it in and settles the claim; a failed claim makes it idle
//! again. The states are atomics, so that looking costs nothing; waits are behind one lock, which is held for moments.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::PagerError;

const IDLE: u8 = 0;
const CLAIMED: u8 = 1;
const PLACED: u8 = 2;

/// How a wait learns its end.
pub(super) enum Signal {
    Task(oneshot::Sender<Result<(), PagerError>>),
    Thread(mpsc::SyncSender<Result<(), PagerError>>),
}

impl Signal {
    fn send(self, result: Result<(), PagerError>) {
        // Nobody listens any more: nobody needs to know.
        match self {
            Self::Task(sender) => drop(sender.send(result)),
            Self::Thread(sender) => drop(sender.try_send(result)),
        }
    }
}

struct Wait {
    left: usize,
    signal: Signal,
}

#[derive(Default)]
struct Waits {
    next: u64,
    open: HashMap<u64, Wait>,
    /// May name waits that are over.
    by_unit: HashMap<u32, Vec<u64>>,
    /// Set once, for good.
    failed: Option<PagerError>,
}

/// The state of every unit.
pub(super) struct Units {
    states: Box<[AtomicU8]>,
    waits: Mutex<Waits>,
    /// Cancelled when the pager has failed or was stopped.
    ended: CancellationToken,
}

/// The right and the duty to bring in one unit. Dropped without being settled, it fails.
pub(super) struct Claim {
    units: Arc<Units>,
    unit: u32,
    settled: bool,
}

/// A wait that was begun; dropped, it is over.
pub(super) struct Waiting {
    units: Arc<Units>,
    id: u64,
}

impl Units {
    pub(super) fn new(count: u32) -> Self {
        Self {
            states: (0..count).map(|_| AtomicU8::new(IDLE)).collect(),
            waits: Mutex::default(),
            ended: CancellationToken::new(),
        }
    }

    fn waits(&self) -> MutexGuard<'_, Waits> {
        // Each change is whole before anything that may panic.
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_placed(&self, unit: u32) -> bool {
        // Pairs with the release in `Claim::placed`: who sees it sees the bytes.
        self.states[unit as usize].load(Ordering::Acquire) == PLACED
    }

    pub(super) fn is_idle(&self, unit: u32) -> bool {
        self.states[unit as usize].load(Ordering::Relaxed) == IDLE
    }

    pub(super) fn claim(self: &Arc<Self>, unit: u32) -> Option<Claim> {
        let state = &self.states[unit as usize];
        state.compare_exchange(IDLE, CLAIMED, Ordering::AcqRel, Ordering::Relaxed).ok()?;
        Some(Claim { units: Arc::clone(self), unit, settled: false })
    }

    /// Waits for those of `units` that are not placed yet; `None` when all are, and the signal is then not used.
    pub(super) fn wait_for(self: &Arc<Self>, units: &[u32], signal: Signal) -> Result<Option<Waiting>, PagerError> {
        let mut waits = self.waits();
        if let Some(error) = &waits.failed {
            return Err(error.clone());
        }
        let id = waits.next;
        let mut left = 0;
        for &unit in units {
            // A unit is placed before its waits are looked up under this lock: none is missed.
            if !self.is_placed(unit) {
                waits.by_unit.entry(unit).or_default().push(id);
                left += 1;
            }
        }
        if left == 0 {
            return Ok(None);
        }
        waits.next += 1;
        waits.open.insert(id, Wait { left, signal });
        Ok(Some(Waiting { units: Arc::clone(self), id }))
    }

    fn settle(&self, unit: u32, result: Result<(), &PagerError>) {
        let mut waits = self.waits();
        for id in waits.by_unit.remove(&unit).unwrap_or_default() {
            let Some(wait) = waits.open.get_mut(&id) else { continue };
            wait.left -= 1;
            if (result.is_err() || wait.left == 0)
                && let Some(wait) = waits.open.remove(&id)
            {
                wait.signal.send(result.map_err(Clone::clone));
            }
        }
    }

    /// Ends the pager: every wait, now and later, gets the first error that was given.
    pub(super) fn fail(&self, error: PagerError) {
        let mut waits = self.waits();
        if waits.failed.is_some() {
            return;
        }
        for (_, wait) in waits.open.drain() {
            wait.signal.send(Err(error.clone()));
        }
        waits.by_unit.clear();
        waits.failed = Some(error);
        drop(waits);
        self.ended.cancel();
    }

    pub(super) fn failure(&self) -> Option<PagerError> {
        self.waits().failed.clone()
    }

    pub(super) fn ended(&self) -> &CancellationToken {
        &self.ended
    }
}

impl Claim {
    pub(super) fn unit(&self) -> u32 {
        self.unit
    }

    /// All pages of the unit are in place.
    pub(super) fn placed(mut self) {
        self.settled = true;
        self.units.states[self.unit as usize].store(PLACED, Ordering::Release);
        self.units.settle(self.unit, Ok(()));
    }

    /// The unit could not be brought in; no page of it was placed.
    pub(super) fn failed(mut self, error: &PagerError) {
        self.give_up(error);
    }

    /// The unit was placed in part: nobody may try again.
    pub(super) fn broken(mut self, error: PagerError) {
        self.settled = true;
        self.units.fail(error);
    }

    fn give_up(&mut self, error: &PagerError) {
        self.settled = true;
        self.units.states[self.unit as usize].store(IDLE, Ordering::Release);
        self.units.settle(self.unit, Err(error));
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.settled {
            // Its task or thread ended early: the pager was stopped, the runtime ends, or a target panicked, perhaps half-way.
            // Only the first failure counts.
            self.units.fail(PagerError::Ended);
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.units.waits().open.remove(&self.id);
    }
}
