//! Bringing claimed units in: from the base, the pack cache, the store. Decoding, checking and placing run on blocking threads, or on
//! the thread that faulted.

use std::{io, ops::Range, sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time,
};
use tokio_util::task::TaskTracker;

use crate::{
    pack::{FrameDecoder, PackError},
    page::{self, PAGE_SIZE},
};

use super::{
    Options, PageTarget, PagerError, Sources, Urgency,
    gate::Gate,
    stats::{ByUrgency, Counters, PagerStats},
    table::{Placement, Table},
    units::{Claim, Units},
};

/// Bytes of one read of the cache at most, and of what the background claims there at once: beyond it, fewer system calls gain
/// nothing, and a demand for one of the frames would wait for the others.
pub(super) const CACHE_READ: u64 = 1 << 20;

/// What all threads and tasks of a pager share.
pub(super) struct Shared {
    pub(super) table: Table,
    pub(super) units: Arc<Units>,
    pub(super) targets: Vec<Arc<dyn PageTarget>>,
    pub(super) sources: Sources,
    pub(super) options: Options,
    pub(super) gate: Arc<Gate>,
    pub(super) counters: Counters,
    pub(super) runtime: Handle,
    /// Blocking work of the background runs there.
    pub(super) background: Handle,
    /// All tasks and threads of the pager.
    pub(super) tracker: TaskTracker,
    /// Who decodes for the background; demand asks nobody.
    pub(super) workers: Arc<Semaphore>,
    pub(super) parallelism: usize,
}

/// Frames of one pack that are read or fetched together.
pub(super) struct Group {
    pack: u32,
    range: Range<u64>,
    /// In pack order.
    claims: Vec<Claim>,
}

/// A frame whose bytes are not its.
type Bad = (Claim, PackError);

/// Puts frames together whose packs are the same and between which at most `hole` bytes are, up to `limit` bytes. `claims` are of
/// frames and in order of their units.
fn groups(table: &Table, claims: Vec<Claim>, limit: u64, hole: u64) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for claim in claims {
        let Some(frame) = table.frame(claim.unit()) else { continue };
        let range = frame.range();
        let pack = table.pack_of(claim.unit());
        match groups.last_mut() {
            Some(group)
                if group.pack == pack
                    && range.start - group.range.end <= hole
                    && range.end - group.range.start <= limit =>
            {
                group.range.end = range.end;
                group.claims.push(claim);
            }
            _ => groups.push(Group { pack, range, claims: vec![claim] }),
        }
    }
    groups
}

impl Shared {
    /// Starts to bring in those of `units` (ascending) that nobody brings in yet, for a caller who waits. `here`: this thread may
    /// block and takes its part.
    pub(super) fn demand(self: &Arc<Self>, units: &[u32], here: bool) {
        let claims = units.iter().filter_map(|&unit| self.units.claim(unit)).collect();
        let (near, far) = self.split(claims);
        self.demand_far(far);
        let mut shares = self.shares(near);
        let mine = if here { shares.pop() } else { None };
        for share in shares {
            let shared = Arc::clone(self);
            drop(self.on_thread(move || shared.demand_near(share)));
        }
        if let Some(share) = mine {
            let _tracked = self.tracker.token();
            self.demand_near(share);
        }
    }

    fn demand_near(self: &Arc<Self>, claims: Vec<Claim>) {
        let missing = self.place_near(claims, Urgency::Demand);
        self.demand_far(missing);
    }

    fn demand_far(self: &Arc<Self>, claims: Vec<Claim>) {
        for group in groups(&self.table, claims, self.options.demand_bytes, self.options.hole_bytes) {
            let shared = Arc::clone(self);
            self.tracker.spawn_on(
                async move {
                    // Whoever waits is told through the claims.
                    drop(shared.bring(group, Urgency::Demand).await);
                },
                &self.runtime,
            );
        }
    }

    /// Brings in what was claimed for the background, one request after the other. `turn` is a worker's, where there is
    /// something near.
    pub(super) async fn background(
        self: Arc<Self>,
        claims: Vec<Claim>,
        urgency: Urgency,
        turn: Option<OwnedSemaphorePermit>,
    ) -> Result<(), PagerError> {
        let (near, mut far) = self.split(claims);
        if !near.is_empty() {
            let shared = Arc::clone(&self);
            let missing = self.on_thread_for(urgency, move || shared.place_near(near, urgency)).await;
            far.extend(missing.map_err(|_| self.ended())?);
            far.sort_unstable_by_key(Claim::unit);
        }
        drop(turn);
        let mut result = Ok(());
        for group in groups(&self.table, far, self.options.request_bytes, self.options.hole_bytes) {
            result = result.and(self.bring(group, urgency).await);
        }
        result
    }

    /// Whether the unit needs no store, as far as can be told without reading: a base window, or a frame that the cache may hold.
    pub(super) fn is_near(&self, unit: u32) -> bool {
        let Some(frame) = self.table.frame(unit) else { return true };
        let key = self.table.key(self.table.pack_of(unit));
        self.sources.cache.as_ref().is_some_and(|cache| cache.may_hold(key, &frame.range()))
    }

    /// What is near, and the rest.
    fn split(&self, claims: Vec<Claim>) -> (Vec<Claim>, Vec<Claim>) {
        claims.into_iter().partition(|claim| self.is_near(claim.unit()))
    }

    /// Places windows, and frames from the cache; answers those that it turned out not to hold, in order. Blocks.
    fn place_near(&self, claims: Vec<Claim>, urgency: Urgency) -> Vec<Claim> {
        let (frames, windows): (Vec<_>, Vec<_>) =
            claims.into_iter().partition(|claim| self.table.frame(claim.unit()).is_some());
        for window in windows {
            self.place_window(window, urgency);
        }
        let mut missing = Vec::new();
        for group in groups(&self.table, frames, CACHE_READ, 0) {
            let key = self.table.key(group.pack);
            let found = self.sources.cache.as_ref().and_then(|cache| cache.read(key, &group.range));
            let Some(bytes) = found else {
                missing.extend(group.claims);
                continue;
            };
            self.counters.count(|stats| {
                let traffic = &mut stats.cache[urgency as usize];
                traffic.requests += 1;
                traffic.bytes += bytes.len() as u64;
            });
            let bad = self.place_frames(group.claims, group.range.start, &bytes, urgency, |stats| &mut stats.cache);
            if !bad.is_empty() {
                self.counters.count(|stats| stats.bad_in_cache += bad.len() as u64);
                missing.extend(bad.into_iter().map(|(claim, _)| claim));
            }
        }
        missing
    }

    fn place_window(&self, claim: Claim, urgency: Urgency) {
        self.place(
            claim,
            |target, placement| target.place_base(placement.start.into(), placement.at.into(), placement.pages.into()),
            |stats, pages| {
                let traffic = &mut stats.base[urgency as usize];
                traffic.requests += 1;
                traffic.bytes += page::bytes(pages);
                traffic.units += 1;
            },
        );
    }

    /// Places frames whose stored bytes are in `bytes`, which begin at `offset` of their pack; answers those that do not match.
    fn place_frames(
        &self,
        claims: Vec<Claim>,
        offset: u64,
        bytes: &[u8],
        urgency: Urgency,
        of: fn(&mut PagerStats) -> &mut ByUrgency,
    ) -> Vec<Bad> {
        let mut bad = Vec::new();
        let mut decoder = FrameDecoder::default();
        for claim in claims {
            let Some(frame) = self.table.frame(claim.unit()) else { continue };
            if self.units.ended().is_cancelled() {
                break;
            }
            let start = (frame.range().start - offset) as usize;
            let stored = bytes.get(start..start + frame.entry.stored_len as usize).unwrap_or_default();
            let cipher = self.table.cipher(self.table.pack_of(claim.unit()));
            let decoded = match decoder.decode(&frame.entry, frame.number, stored, cipher) {
                Ok(decoded) => decoded,
                Err(error) => {
                    bad.push((claim, error));
                    continue;
                }
            };
            self.place(
                claim,
                |target, placement| {
                    // The table was checked: the frame has these pages.
                    let at = placement.at as usize * PAGE_SIZE;
                    let end = at + usize::from(placement.pages) * PAGE_SIZE;
                    target.place(placement.start.into(), decoded.get(at..end).unwrap_or_default())
                },
                |stats, _| of(stats)[urgency as usize].units += 1,
            );
        }
        bad
    }

    /// Hands the unit's pages to their targets, counts them, and settles the claim.
    fn place(
        &self,
        claim: Claim,
        each: impl Fn(&dyn PageTarget, &Placement) -> io::Result<()>,
        count: impl FnOnce(&mut PagerStats, u64),
    ) {
        let mut pages = 0;
        for placement in self.table.placements_of(claim.unit()) {
            let image = usize::from(placement.image);
            if let Err(source) = each(&*self.targets[image], placement) {
                return claim.broken(PagerError::Place {
                    image: self.table.image_kind(image).map_or_else(String::new, |kind| kind.to_string()),
                    first_page: placement.start.into(),
                    source: Arc::new(source),
                });
            }
            pages += u64::from(placement.pages);
        }
        self.counters.count(|stats| {
            stats.placed_pages += pages;
            count(stats, pages);
        });
        claim.placed();
    }

    /// Fetches a group from the store and places it. A frame that does not match is fetched once more, alone.
    async fn bring(self: &Arc<Self>, group: Group, urgency: Urgency) -> Result<(), PagerError> {
        let Group { pack, range, claims } = group;
        let bytes = match self.get(pack, range.clone(), urgency).await {
            Ok(bytes) => bytes,
            Err(error) => {
                for claim in claims {
                    claim.failed(&error);
                }
                return Err(error);
            }
        };
        let bad = self.place_fetched(claims, range.start, bytes.clone(), urgency).await?;
        if bad.is_empty() {
            self.keep(pack, range.start, bytes, urgency);
        }
        let mut result = Ok(());
        for (claim, _) in bad {
            result = result.and(self.bring_again(claim, pack, urgency).await);
        }
        result
    }

    async fn bring_again(self: &Arc<Self>, claim: Claim, pack: u32, urgency: Urgency) -> Result<(), PagerError> {
        let Some(frame) = self.table.frame(claim.unit()) else { return Ok(()) };
        self.counters.count(|stats| stats.fetched_again += 1);
        let bytes = match self.get(pack, frame.range(), urgency).await {
            Ok(bytes) => bytes,
            Err(error) => {
                claim.failed(&error);
                return Err(error);
            }
        };
        let mut bad = self.place_fetched(vec![claim], frame.range().start, bytes.clone(), urgency).await?;
        let Some((claim, source)) = bad.pop() else {
            self.keep(pack, frame.range().start, bytes, urgency);
            return Ok(());
        };
        let error = PagerError::Pack { key: self.table.key(pack).to_owned(), frame: frame.number, source };
        claim.failed(&error);
        Err(error)
    }

    async fn place_fetched(
        self: &Arc<Self>,
        claims: Vec<Claim>,
        offset: u64,
        bytes: Bytes,
        urgency: Urgency,
    ) -> Result<Vec<Bad>, PagerError> {
        let place = |claims: Vec<Claim>| {
            let (shared, bytes) = (Arc::clone(self), bytes.clone());
            move || shared.place_frames(claims, offset, &bytes, urgency, |stats| &mut stats.store)
        };
        if urgency != Urgency::Demand {
            return self.as_worker(urgency, place(claims)).await;
        }
        let parts: Vec<_> = self.shares(claims).into_iter().map(|share| self.on_thread(place(share))).collect();
        let mut bad = Vec::new();
        for part in parts {
            bad.extend(part.await.map_err(|_| self.ended())?);
        }
        Ok(bad)
    }

    /// Claims for several threads at once, in order: for as many as there are cores, and at least two for each.
    fn shares(&self, mut claims: Vec<Claim>) -> Vec<Vec<Claim>> {
        let parts = claims.len().div_ceil(2).min(self.parallelism);
        let mut shares = Vec::with_capacity(parts);
        for left in (1..=parts).rev() {
            let rest = claims.split_off(claims.len().div_ceil(left));
            shares.push(std::mem::replace(&mut claims, rest));
        }
        shares
    }

    /// Gives fetched bytes to the cache, when nobody waits for this thread.
    fn keep(self: &Arc<Self>, pack: u32, offset: u64, bytes: Bytes, urgency: Urgency) {
        if self.sources.cache.is_none() {
            return;
        }
        let shared = Arc::clone(self);
        let write = move || {
            if let Some(cache) = &shared.sources.cache {
                cache.write(shared.table.key(pack), offset, &bytes);
            }
        };
        let shared = Arc::clone(self);
        self.tracker.spawn_on(async move { drop(shared.as_worker(urgency, write).await) }, &self.runtime);
    }

    /// One ranged GET. Demand waits for a connection of its own; the background has one.
    async fn get(&self, pack: u32, range: Range<u64>, urgency: Urgency) -> Result<Bytes, PagerError> {
        let key = self.table.key(pack);
        let answer = async {
            let _permit = if urgency == Urgency::Demand { Some(self.gate.enter(urgency).await) } else { None };
            let bytes = self.sources.store.get_range(key, range.clone()).await;
            let bytes = bytes.map_err(|source| PagerError::Fetch { key: key.to_owned(), source: Arc::new(source) })?;
            self.counters.count(|stats| {
                let traffic = &mut stats.store[urgency as usize];
                traffic.requests += 1;
                traffic.bytes += bytes.len() as u64;
            });
            Ok(bytes)
        };
        let deadline = self.options.deadline;
        tokio::select! {
            biased;
            () = self.units.ended().cancelled() => Err(self.ended()),
            answer = time::timeout(deadline, answer) => answer.unwrap_or(Err(PagerError::Deadline(deadline))),
        }
    }

    /// Runs `work` on a blocking thread.
    fn on_thread<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        self.tracker.spawn_blocking_on(work, &self.runtime)
    }

    /// Likewise, on one of the background's when nobody waits.
    fn on_thread_for<T: Send + 'static>(
        &self,
        urgency: Urgency,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let runtime = if urgency == Urgency::Demand { &self.runtime } else { &self.background };
        self.tracker.spawn_blocking_on(work, runtime)
    }

    /// The same for the background, when it is its turn.
    async fn as_worker<T: Send + 'static>(
        &self,
        urgency: Urgency,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PagerError> {
        let _turn = if urgency == Urgency::Demand { None } else { self.workers.acquire().await.ok() };
        self.on_thread_for(urgency, work).await.map_err(|_| self.ended())
    }

    /// Waits so long, or until the pager ends.
    pub(super) async fn pause(&self, wait: Duration) {
        drop(time::timeout(wait, self.units.ended().cancelled()).await);
    }

    /// Why nothing more will come.
    pub(super) fn ended(&self) -> PagerError {
        self.units.failure().unwrap_or(PagerError::Ended)
    }
}
