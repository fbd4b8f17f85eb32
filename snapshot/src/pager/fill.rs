//! The background: everything in a given order, then everything else.
//!
//! The caller's task goes through the order, and for each request waits for the gate, claims what belongs together, and spawns it.
//! Nothing is claimed before it can be sent, so a demand finds at most a connection's worth of its units in other hands.

use std::{
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{sync::oneshot, task::JoinHandle, time};
use tokio_util::sync::CancellationToken;

use super::{
    Options, PagerError, Urgency,
    fetch::{CACHE_READ, Shared},
    units::Signal,
};

/// Bytes of a request of the background at least, where so many lie together.
const LEAST_REQUEST: u64 = 256 << 10;

/// Some units.
pub(super) struct UnitSet(Vec<u64>);

impl UnitSet {
    pub(super) fn new(units: u32) -> Self {
        Self(vec![0; units.div_ceil(64) as usize])
    }

    /// Whether it was not in there.
    pub(super) fn insert(&mut self, unit: u32) -> bool {
        let word = &mut self.0[unit as usize / 64];
        let before = *word;
        *word |= 1 << (unit % 64);
        *word != before
    }

    fn contains(&self, unit: u32) -> bool {
        self.0[unit as usize / 64] & 1 << (unit % 64) != 0
    }
}

/// How often and how soon to try again.
pub(super) struct Attempts {
    left: u32,
    wait: Duration,
}

impl Attempts {
    pub(super) fn new(options: &Options) -> Self {
        Self { left: options.attempts.max(1), wait: options.backoff }
    }

    /// After a failure: how long to wait before the next attempt, if there is one.
    pub(super) fn after(&mut self, error: &PagerError) -> Option<Duration> {
        self.left -= 1;
        if self.left == 0 || !error.is_retryable() {
            return None;
        }
        let wait = self.wait;
        self.wait = wait.saturating_mul(2);
        Some(wait)
    }
}

/// Lets through so many bytes a second.
struct Throttle {
    rate: Option<u64>,
    next: Instant,
}

impl Throttle {
    fn new(rate: Option<u64>) -> Self {
        Self { rate, next: Instant::now() }
    }

    fn spend(&mut self, bytes: u64) {
        if let Some(rate) = self.rate {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
            self.next = self.next.max(Instant::now()) + Duration::from_nanos(nanos as u64);
        }
    }
}

type Running = FuturesUnordered<JoinHandle<Result<(), PagerError>>>;

impl Shared {
    /// Brings in all of `order`; when it returns without an error, they are placed.
    pub(super) async fn drive(
        self: &Arc<Self>,
        order: &[u32],
        urgency: Urgency,
        cancel: &CancellationToken,
    ) -> Result<(), PagerError> {
        let work = self.drive_on(order, urgency);
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(PagerError::Cancelled),
            () = self.units.ended().cancelled() => Err(self.ended()),
            result = work => result,
        }
    }

    async fn drive_on(self: &Arc<Self>, order: &[u32], urgency: Urgency) -> Result<(), PagerError> {
        let mut left: Vec<u32> = order.iter().copied().filter(|&unit| !self.units.is_placed(unit)).collect();
        let mut attempts = Attempts::new(&self.options);
        let mut throttle = Throttle::new(self.options.sweep_bytes_per_second.filter(|_| urgency == Urgency::Sweep));
        while !left.is_empty() {
            let before = left.len();
            let mut result = self.pass(&left, urgency, &mut throttle).await;
            left.retain(|&unit| !self.units.is_placed(unit));
            if result.is_ok() {
                // What is left is in other hands.
                result = self.others(&left).await;
            }
            if let Err(error) = result {
                if left.len() < before {
                    attempts = Attempts::new(&self.options);
                }
                let wait = attempts.after(&error).ok_or(error)?;
                time::sleep(wait).await;
            }
            left.retain(|&unit| !self.units.is_placed(unit));
        }
        Ok(())
    }

    /// Goes through `order` once; answers the first failure, when everything has come to an end.
    async fn pass(
        self: &Arc<Self>,
        order: &[u32],
        urgency: Urgency,
        throttle: &mut Throttle,
    ) -> Result<(), PagerError> {
        let mut members = UnitSet::new(self.table.units());
        let mut total = 0;
        for &unit in order {
            if members.insert(unit) {
                total += self.table.cost(unit);
            }
        }
        let limit = self.request_bytes(total);
        let mut running = Running::new();
        for &unit in order {
            if !self.units.is_idle(unit) {
                continue;
            }
            time::sleep_until(throttle.next.into()).await;
            let permit = {
                let mut enter = pin!(self.gate.enter(urgency));
                loop {
                    tokio::select! {
                        biased;
                        Some(done) = running.next() => {
                            if let Err(error) = done.unwrap_or_else(|_| Err(self.ended())) {
                                return finish(running, error).await;
                            }
                        }
                        permit = &mut enter => break permit,
                    }
                }
            };
            // What only this machine's cores limit is claimed when one of them is free.
            let near = self.is_near(unit);
            let turn = if near { Arc::clone(&self.workers).acquire_owned().await.ok() } else { None };
            if !self.units.is_idle(unit) {
                continue;
            }
            let reach = self.reach(unit, if near { limit.min(CACHE_READ) } else { limit }, &members);
            let claims: Vec<_> = reach.into_iter().filter_map(|unit| self.units.claim(unit)).collect();
            if claims.is_empty() {
                continue;
            }
            throttle.spend(claims.iter().map(|claim| self.table.cost(claim.unit())).sum());
            let shared = Arc::clone(self);
            running.push(self.tracker.spawn_on(
                async move {
                    let _permit = permit;
                    shared.background(claims, urgency, turn).await
                },
                &self.runtime,
            ));
        }
        let mut result = Ok(());
        while let Some(done) = running.next().await {
            result = result.and(done.unwrap_or_else(|_| Err(self.ended())));
        }
        result
    }

    /// Waits for units that somebody else brings in.
    async fn others(&self, units: &[u32]) -> Result<(), PagerError> {
        let (signal, done) = oneshot::channel();
        let Some(_waiting) = self.units.wait_for(units, Signal::Task(signal))? else { return Ok(()) };
        // One that became idle before the wait began would never be settled.
        if units.iter().any(|&unit| self.units.is_idle(unit)) {
            return Ok(());
        }
        let deadline = self.options.deadline;
        match time::timeout(deadline, done).await {
            Ok(result) => result.unwrap_or_else(|_| Err(self.ended())),
            Err(_) => Err(PagerError::Deadline(deadline)),
        }
    }

    /// Bytes of one request, so that all connections have their part of `total`.
    fn request_bytes(&self, total: u64) -> u64 {
        let connections = self.gate.limits().background.max(1) as u64;
        let most = self.options.request_bytes.min(self.options.buffer_bytes / connections).max(1);
        (total / connections).max(LEAST_REQUEST).min(most)
    }

    /// What goes into one request with `first`: the members around it that nobody brings in, and what lies in the holes between.
    fn reach(&self, first: u32, limit: u64, members: &UnitSet) -> Vec<u32> {
        let wanted = |unit: u32| members.contains(unit) && self.units.is_idle(unit);
        let Some(frame) = self.table.frame(first) else {
            let mut bytes = 0;
            return (first..self.table.units())
                .take_while(|&unit| {
                    bytes += self.table.cost(unit);
                    unit == first || (wanted(unit) && bytes <= limit)
                })
                .collect();
        };
        let pack = self.table.units_of_pack(self.table.pack_of(first));
        let mut span = frame.range();
        let mut reach = vec![first];
        let mut hole = Vec::new();
        for unit in first + 1..pack.end {
            let Some(frame) = self.table.frame(unit) else { break };
            let range = frame.range();
            if range.end - span.start > limit || range.start - span.end > self.options.hole_bytes {
                break;
            }
            if wanted(unit) {
                reach.append(&mut hole);
                reach.push(unit);
                span.end = range.end;
            } else if self.units.is_idle(unit) {
                hole.push(unit);
            }
        }
        hole.clear();
        for unit in (pack.start..first).rev() {
            let Some(frame) = self.table.frame(unit) else { break };
            let range = frame.range();
            if span.end - range.start > limit || span.start - range.end > self.options.hole_bytes {
                break;
            }
            if wanted(unit) {
                reach.append(&mut hole);
                reach.push(unit);
                span.start = range.start;
            } else if self.units.is_idle(unit) {
                hole.push(unit);
            }
        }
        reach.sort_unstable();
        reach
    }
}

/// Lets what is under way end, and answers the error.
async fn finish(mut running: Running, error: PagerError) -> Result<(), PagerError> {
    while running.next().await.is_some() {}
    Err(error)
}
