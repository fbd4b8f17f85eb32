//! Who may use a connection now: demand before the recorded order before the sweep.
//!
//! A reserve is open to demand alone. While a demand waits for a connection nobody else gets one; while one is under way the
//! recorded order has half of its connections, and the sweep none.

use std::{
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

use super::Urgency;

/// How many connections there are for whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) all: usize,
    /// Of all, for the recorded order and the sweep.
    pub(super) background: usize,
    /// Of those, for the sweep.
    pub(super) sweep: usize,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    used_by_background: usize,
    /// Demands under way, whether they use a connection or not.
    demands: usize,
    /// By urgency: how many wait here.
    waiting: [usize; 3],
}

impl State {
    fn admits(&self, urgency: Urgency, limits: Limits) -> bool {
        let demand_waits = self.waiting[Urgency::Demand as usize] > 0;
        if self.used >= limits.all {
            return false;
        }
        match urgency {
            Urgency::Demand => true,
            Urgency::WorkingSet => {
                let share = if self.demands > 0 { limits.background.div_ceil(2) } else { limits.background };
                !demand_waits && self.used_by_background < share
            }
            Urgency::Sweep => {
                let first = demand_waits || self.demands > 0 || self.waiting[Urgency::WorkingSet as usize] > 0;
                !first && self.used_by_background < limits.sweep
            }
        }
    }
}

/// The gate.
#[derive(Debug)]
pub(super) struct Gate {
    limits: Limits,
    state: Mutex<State>,
    changed: Notify,
}

/// One connection; given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    gate: Arc<Gate>,
    urgency: Urgency,
}

/// A demand under way.
pub(super) struct Demand(Arc<Gate>);

struct InLine<'a>(&'a Gate, Urgency);

impl Gate {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, state: Mutex::default(), changed: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain counts.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// Tells the background that a demand is under way.
    pub(super) fn demand(self: &Arc<Self>) -> Demand {
        self.state().demands += 1;
        Demand(Arc::clone(self))
    }

    pub(super) fn try_enter(self: &Arc<Self>, urgency: Urgency) -> Option<Permit> {
        let mut state = self.state();
        if !state.admits(urgency, self.limits) {
            return None;
        }
        state.used += 1;
        state.used_by_background += usize::from(urgency != Urgency::Demand);
        Some(Permit { gate: Arc::clone(self), urgency })
    }

    /// Waits for a connection.
    pub(super) async fn enter(self: &Arc<Self>, urgency: Urgency) -> Permit {
        if let Some(permit) = self.try_enter(urgency) {
            return permit;
        }
        self.state().waiting[urgency as usize] += 1;
        let _in_line = InLine(self, urgency);
        let mut changed = pin!(self.changed.notified());
        loop {
            // Listens before it looks.
            changed.as_mut().enable();
            if let Some(permit) = self.try_enter(urgency) {
                return permit;
            }
            changed.as_mut().await;
            changed.set(self.changed.notified());
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        state.used -= 1;
        state.used_by_background -= usize::from(self.urgency != Urgency::Demand);
        drop(state);
        self.gate.changed.notify_waiters();
    }
}

impl Drop for Demand {
    fn drop(&mut self) {
        self.0.state().demands -= 1;
        self.0.changed.notify_waiters();
    }
}

impl Drop for InLine<'_> {
    fn drop(&mut self) {
        self.0.state().waiting[self.1 as usize] -= 1;
        self.0.changed.notify_waiters();
    }
}
