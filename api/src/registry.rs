//! The sandboxes of this supervisor, and the one place where their state moves.
//!
//! Each sandbox has one operation lock ([`Sandbox::lock`]): whoever changes it holds that lock from the first check to the last effect, in a
//! task of its own that no client can cancel. Its record is published on a watch channel, so that anybody may read it or wait for a change
//! without the lock. The lock of the map and the small locks inside a sandbox are never held across a wait.

use crate::costs::{Cost, Costs};
use crate::error::Error;
use crate::ids::SandboxId;
use crate::journal::{Journal, Move};
use crate::known_packs::KnownPacks;
use crate::network_activity::Activity;
use crate::record::Record;
use crate::run_ahead::Spent;
use crate::sources::{Sources, UnixMs};
use crate::states::{self, Event, State};
use crate::vmm_process::Vmm;
use stasis_snapshot::commit::Current;
use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use tokio::sync::{Notify, OwnedMutexGuard, Semaphore, watch};

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each critical section replaces or reads one value: a panic leaves the old or the new one.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Invoke connections to one guest at once. Its vsock device has 256; the rest is for the agent.
const PLACES: usize = 192;
/// How long a deleted sandbox is still answered with its reason after a restart.
const REMEMBER_DELETED_MS: i64 = 24 * 3600 * 1000;

/// The finished wakes of a sandbox: lets those who waited for one share its failure instead of trying again.
#[derive(Clone, Debug, Default)]
pub struct Wakes {
    /// How many have ended.
    pub ended: u64,
    /// Why the last one failed; `None` when it did not.
    pub failure: Option<Arc<Error>>,
}

/// One sandbox.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// Whose it is.
    pub tenant: String,
    operation: Arc<tokio::sync::Mutex<()>>,
    record: watch::Sender<Record>,
    vm: Mutex<Option<Arc<Vmm>>>,
    head: Mutex<Option<Current>>,
    wakes: Mutex<Wakes>,
    phase: Mutex<Option<&'static str>>,
    known_packs: Mutex<Option<Arc<KnownPacks>>>,
    last_request: AtomicI64,
    visits: AtomicUsize,
    places: Arc<Semaphore>,
    rounds: Arc<tokio::sync::Mutex<()>>,
    ahead: Mutex<Spent>,
    costs: Mutex<Costs>,
    network_past: Mutex<Activity>,
    egress_generation: AtomicU64,
    changes: Changes,
}

/// Counts what people who watch can see change, of all sandboxes together.
type Changes = Arc<watch::Sender<u64>>;

fn changed(changes: &watch::Sender<u64>) {
    changes.send_modify(|count| *count = count.wrapping_add(1));
}

/// The operation lock of a sandbox, held.
pub type OperationGuard = OwnedMutexGuard<()>;

impl Sandbox {
    /// One that neither registry nor journal knows: for a guest that is nobody's sandbox.
    pub fn unlisted(record: Record) -> Self {
        Self::new(record, Arc::default())
    }

    fn new(record: Record, changes: Changes) -> Self {
        Self {
            id: record.id.clone(),
            tenant: record.tenant.clone(),
            operation: Arc::default(),
            record: watch::Sender::new(record),
            vm: Mutex::default(),
            head: Mutex::default(),
            wakes: Mutex::default(),
            phase: Mutex::default(),
            known_packs: Mutex::default(),
            last_request: AtomicI64::new(0),
            visits: AtomicUsize::new(0),
            places: Arc::new(Semaphore::new(PLACES)),
            rounds: Arc::default(),
            ahead: Mutex::default(),
            costs: Mutex::default(),
            network_past: Mutex::default(),
            egress_generation: AtomicU64::new(0),
            changes,
        }
    }

    /// Where it stands now.
    pub fn record(&self) -> Record {
        self.record.borrow().clone()
    }

    /// Its state now.
    pub fn state(&self) -> State {
        self.record.borrow().state
    }

    /// Waits for the operation lock. What held before may not hold any more.
    pub async fn lock(&self) -> OperationGuard {
        self.operation.clone().lock_owned().await
    }

    /// The operation lock if nobody has it.
    pub fn try_lock(&self) -> Option<OperationGuard> {
        self.operation.clone().try_lock_owned().ok()
    }

    /// Its VM, while there is one.
    pub fn vm(&self) -> Option<Arc<Vmm>> {
        locked(&self.vm).clone()
    }

    /// Attaches a VM, or takes it away.
    pub fn set_vm(&self, vm: Option<Arc<Vmm>>) {
        *locked(&self.vm) = vm;
    }

    /// The head as last read or written; `None` when it must be read first.
    pub fn head(&self) -> Option<Current> {
        locked(&self.head).clone()
    }

    /// Remembers the head, or that it must be read.
    pub fn set_head(&self, head: Option<Current>) {
        *locked(&self.head) = head;
    }

    /// The wakes that have ended.
    pub fn wakes(&self) -> Wakes {
        locked(&self.wakes).clone()
    }

    /// Counts an ended wake.
    pub fn wake_ended(&self, failure: Option<Arc<Error>>) {
        let mut wakes = locked(&self.wakes);
        wakes.ended += 1;
        wakes.failure = failure;
    }

    /// The packs of the manifest that it was last committed or restored as; `None` when that must be read first.
    pub fn known_packs(&self) -> Option<Arc<KnownPacks>> {
        locked(&self.known_packs).clone()
    }

    /// Remembers them.
    pub fn set_known_packs(&self, known: Option<Arc<KnownPacks>>) {
        *locked(&self.known_packs) = known;
    }

    /// A request has reached its guest.
    pub fn touched(&self, at: UnixMs) {
        self.last_request.fetch_max(at, Ordering::Relaxed);
    }

    /// When the last request reached its guest; 0 when none did.
    pub fn last_request(&self) -> UnixMs {
        self.last_request.load(Ordering::Relaxed)
    }

    /// A request begins for its guest, or waits for it; it ends when the visit is dropped.
    pub fn visit(self: &Arc<Self>, sources: &Sources) -> Visit {
        self.visits.fetch_add(1, Ordering::SeqCst);
        self.touched(sources.now_ms());
        Visit { sandbox: self.clone(), sources: sources.clone() }
    }

    /// Requests that its guest works on, or that wait for it.
    pub fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }

    /// The connections to apps in its guest that may still be made.
    pub fn places(&self) -> Arc<Semaphore> {
        self.places.clone()
    }

    /// The right to run a round ahead of a pause, if nobody has it.
    pub fn try_round(&self) -> Option<OwnedMutexGuard<()>> {
        self.rounds.clone().try_lock_owned().ok()
    }

    /// The same, once nobody else has it.
    pub async fn next_round(&self) -> OwnedMutexGuard<()> {
        self.rounds.clone().lock_owned().await
    }

    /// What rounds ahead of a pause have done, to be read or changed.
    pub fn ahead<T>(&self, with: impl FnOnce(&mut Spent) -> T) -> T {
        with(&mut locked(&self.ahead))
    }

    /// What the networks of its VMs that are gone did, to be read or changed.
    pub fn network_past<T>(&self, with: impl FnOnce(&mut Activity) -> T) -> T {
        with(&mut locked(&self.network_past))
    }

    /// The generation under which the egress process knows it.
    pub fn egress_generation(&self) -> u64 {
        self.egress_generation.load(Ordering::Relaxed)
    }

    /// Remembers it.
    pub fn set_egress_generation(&self, generation: u64) {
        self.egress_generation.store(generation, Ordering::Relaxed);
    }

    /// What its operation is doing, for people who watch.
    pub fn phase(&self) -> Option<&'static str> {
        *locked(&self.phase)
    }

    /// Says what its operation is doing.
    pub fn set_phase(&self, phase: Option<&'static str>) {
        *locked(&self.phase) = phase;
        changed(&self.changes);
    }

    /// Remembers what an operation cost.
    pub fn note_cost(&self, cost: Cost) {
        locked(&self.costs).add(cost);
        changed(&self.changes);
    }

    /// What its last operations cost, oldest first.
    pub fn costs(&self) -> Vec<Arc<Cost>> {
        locked(&self.costs).iter().cloned().collect()
    }
}

/// A request that counts as activity of a sandbox until it is dropped.
#[derive(Debug)]
pub struct Visit {
    sandbox: Arc<Sandbox>,
    sources: Sources,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.sandbox.touched(self.sources.now_ms());
        self.sandbox.visits.fetch_sub(1, Ordering::SeqCst);
    }
}

/// All sandboxes.
#[derive(Debug)]
pub struct Registry {
    journal: Arc<Journal>,
    sources: Sources,
    sandboxes: RwLock<HashMap<SandboxId, Arc<Sandbox>>>,
    deadlines_changed: Notify,
    changes: Changes,
}

impl std::fmt::Debug for Sources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sources")
    }
}

impl Registry {
    /// With what the journal knows, but for sandboxes that have been gone for longer than [`REMEMBER_DELETED_MS`].
    pub fn load(journal: Arc<Journal>, sources: Sources) -> Result<Self, Error> {
        let forgotten = sources.now_ms() - REMEMBER_DELETED_MS;
        let mut records = journal.records()?;
        records.retain(|r| r.state != State::Deleted || r.state_changed_at > forgotten);
        let changes = Changes::default();
        let sandbox = |record| Arc::new(Sandbox::new(record, changes.clone()));
        let sandboxes = records.into_iter().map(|r| (r.id.clone(), sandbox(r))).collect();
        Ok(Self { journal, sources, sandboxes: RwLock::new(sandboxes), deadlines_changed: Notify::new(), changes })
    }

    /// One of `tenant`'s. Another tenant's is as unknown as one that does not exist.
    pub fn find(&self, tenant: &str, id: &str) -> Result<Arc<Sandbox>, Error> {
        SandboxId::parse(id)
            .and_then(|id| self.get(&id))
            .filter(|sandbox| sandbox.tenant == tenant)
            .ok_or_else(|| Error::NotFound(id.to_owned()))
    }

    /// One of anybody's.
    pub fn get(&self, id: &SandboxId) -> Option<Arc<Sandbox>> {
        self.sandboxes.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All of them, in no order.
    pub fn all(&self) -> Vec<Arc<Sandbox>> {
        self.sandboxes.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Adds one that is about to be made.
    pub fn add(&self, record: Record) -> Result<Arc<Sandbox>, Error> {
        let by = Move { before: None, event: Event::Create, at: self.sources.now_ms(), note: None };
        self.journal.store_move(&record, &by)?;
        let sandbox = Arc::new(Sandbox::new(record, self.changes.clone()));
        self.sandboxes.write().unwrap_or_else(PoisonError::into_inner).insert(sandbox.id.clone(), sandbox.clone());
        changed(&self.changes);
        Ok(sandbox)
    }

    /// Takes up one that rests in the bucket: unknown here, or known as deleted. There is one [`Sandbox`] of an id for ever, and so one lock.
    pub fn adopt(&self, record: Record, note: &str) -> Result<Arc<Sandbox>, Error> {
        let event = if record.state == State::Stopped { Event::FoundStopped } else { Event::FoundPaused };
        let mut all = self.sandboxes.write().unwrap_or_else(PoisonError::into_inner);
        let known = all.get(&record.id).cloned();
        let before = known.as_ref().map(|known| known.state());
        if states::next(before, event) != Some(record.state) || before.is_some_and(|state| state != State::Deleted) {
            let state = before.unwrap_or(record.state);
            return Err(Error::State { id: record.id, state, verb: "take up" });
        }
        self.journal.store_move(&record, &Move { before, event, at: self.sources.now_ms(), note: Some(note) })?;
        if let Some(known) = known {
            self.publish(&known, record);
            return Ok(known);
        }
        let sandbox = Arc::new(Sandbox::new(record, self.changes.clone()));
        all.insert(sandbox.id.clone(), sandbox.clone());
        changed(&self.changes);
        Ok(sandbox)
    }

    /// Moves a sandbox because somebody asks for it: journaled first, and refused when the table forbids it or the journal fails.
    pub fn begin(&self, sandbox: &Sandbox, event: Event, verb: &'static str) -> Result<Record, Error> {
        let record = sandbox.record();
        let Some(next) = self.moved(&record, event, |_| {}) else {
            return Err(Error::State { id: sandbox.id.clone(), state: record.state, verb });
        };
        let by = Move { before: Some(record.state), event, at: next.state_changed_at, note: None };
        self.journal.store_move(&next, &by)?;
        Ok(self.publish(sandbox, next))
    }

    /// Moves a sandbox because of what has happened. A fact stands even when the journal cannot take it; the failure is logged, and a restart
    /// finds the facts again.
    pub fn record(
        &self,
        sandbox: &Sandbox,
        event: Event,
        note: Option<&str>,
        change: impl FnOnce(&mut Record),
    ) -> Result<Record, Error> {
        let record = sandbox.record();
        let Some(next) = self.moved(&record, event, change) else {
            tracing::error!(id = %sandbox.id, state = %record.state, ?event, "a move that the state table forbids");
            return Err(Error::Bug("a move that the state table forbids"));
        };
        let by = Move { before: Some(record.state), event, at: next.state_changed_at, note };
        tracing::info!(id = %sandbox.id, before = %record.state, ?event, after = %next.state, note, "state");
        if let Err(error) = self.journal.store_move(&next, &by) {
            tracing::error!(id = %sandbox.id, error = crate::error::chain(&error), "a transition could not be journaled");
        }
        Ok(self.publish(sandbox, next))
    }

    /// Changes a record without a move.
    pub fn amend(&self, sandbox: &Sandbox, change: impl FnOnce(&mut Record)) -> Result<Record, Error> {
        let mut next = sandbox.record();
        change(&mut next);
        self.journal.store_record(&next)?;
        Ok(self.publish(sandbox, next))
    }

    fn moved(&self, record: &Record, event: Event, change: impl FnOnce(&mut Record)) -> Option<Record> {
        let now = self.sources.now_ms();
        let mut next = record.clone();
        next.state = states::next(Some(record.state), event)?;
        next.state_changed_at = now;
        match next.state {
            // A life starts with each wake and each boot, or a woken sandbox would be overdue at once. A pause or a snapshot that did not
            // end it neither shortens nor prolongs it.
            State::Running if event == Event::Ready || next.deadline.is_none() => {
                next.launched_at = Some(now);
                next.deadline = Some(now + i64::from(record.spec.timeout_s) * 1000);
            }
            State::Running | State::Snapshotting | State::Stopping => {}
            State::Starting | State::Paused | State::Unpausing | State::Stopped | State::Deleting | State::Deleted => {
                next.deadline = None;
            }
        }
        change(&mut next);
        Some(next)
    }

    fn publish(&self, sandbox: &Sandbox, record: Record) -> Record {
        sandbox.record.send_replace(record.clone());
        self.deadlines_changed.notify_one();
        changed(&self.changes);
        record
    }

    /// Sees each change of a state, a phase or a cost of any sandbox.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Waits until some deadline may have changed.
    pub async fn deadline_change(&self) {
        self.deadlines_changed.notified().await;
    }

    /// Sandboxes that have a VM or are about to.
    pub fn with_vm(&self) -> Vec<Arc<Sandbox>> {
        let mut all = self.all();
        all.retain(|s| !matches!(s.state(), State::Paused | State::Stopped | State::Deleted));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;

    fn registry() -> Registry {
        Registry::load(Arc::new(Journal::in_memory().unwrap()), Sources::system()).unwrap()
    }

    #[test]
    fn a_sandbox_is_found_by_its_tenant_alone() {
        let registry = registry();
        registry.add(sample("sbx-a")).unwrap();
        assert!(registry.find("dev", "sbx-a").is_ok());
        for (tenant, id) in [("other", "sbx-a"), ("dev", "sbx-b"), ("dev", "../sbx-a"), ("dev", "")] {
            assert!(matches!(registry.find(tenant, id), Err(Error::NotFound(_))), "{tenant} {id}");
        }
    }

    #[test]
    fn a_life_starts_with_a_wake_and_outlives_what_does_not_end_it() {
        let registry = registry();
        let sandbox = registry.add(sample("sbx-a")).unwrap();
        let running = registry.record(&sandbox, Event::Ready, None, |_| {}).unwrap();
        assert_eq!(running.deadline.unwrap() - running.launched_at.unwrap(), 300_000);
        for (begun, ended) in
            [(Event::Pause, Event::Failed), (Event::Stop, Event::Failed), (Event::Snapshot, Event::Captured)]
        {
            assert_eq!(registry.begin(&sandbox, begun, "end").unwrap().deadline, running.deadline);
            let again = registry.record(&sandbox, ended, None, |_| {}).unwrap();
            assert_eq!((again.launched_at, again.deadline), (running.launched_at, running.deadline), "the same life");
        }
        registry.amend(&sandbox, |record| record.deadline = Some(1)).unwrap();
        registry.begin(&sandbox, Event::Pause, "pause").unwrap();
        assert_eq!(registry.record(&sandbox, Event::Committed, None, |_| {}).unwrap().deadline, None);
        registry.begin(&sandbox, Event::Resume, "resume").unwrap();
        let woken = registry.record(&sandbox, Event::Ready, None, |_| {}).unwrap();
        assert!(woken.deadline.unwrap() >= running.deadline.unwrap(), "a new one");
    }

    #[test]
    fn a_refused_move_changes_nothing() {
        let registry = registry();
        let sandbox = registry.add(sample("sbx-a")).unwrap();
        let before = sandbox.record();
        let error = registry.begin(&sandbox, Event::Pause, "pause").unwrap_err();
        assert!(matches!(error, Error::State { state: State::Starting, verb: "pause", .. }));
        assert!(error.to_string().contains("starting"));
        assert_eq!(sandbox.record(), before);
        assert_eq!(registry.journal.transitions(&sandbox.id).unwrap().len(), 1);
    }

    #[test]
    fn what_was_journaled_is_loaded() {
        let journal = Arc::new(Journal::in_memory().unwrap());
        let first = Registry::load(journal.clone(), Sources::system()).unwrap();
        let sandbox = first.add(sample("sbx-a")).unwrap();
        first.record(&sandbox, Event::Ready, None, |_| {}).unwrap();
        let second = Registry::load(journal, Sources::system()).unwrap();
        assert_eq!(second.get(&sandbox.id).unwrap().record(), sandbox.record());
    }

    #[test]
    fn what_is_put_back_is_the_same_sandbox_and_what_is_there_stays_as_it_is() {
        let registry = registry();
        let sandbox = registry.add(sample("sbx-a")).unwrap();
        let at = |state| Record { state, ..sample("sbx-a") };
        assert!(matches!(registry.adopt(at(State::Paused), "x"), Err(Error::State { state: State::Starting, .. })));
        registry.record(&sandbox, Event::Failed, None, |_| {}).unwrap();
        let back = registry.adopt(at(State::Paused), "x").unwrap();
        assert!(Arc::ptr_eq(&sandbox, &back) && sandbox.state() == State::Paused);
        assert!(matches!(registry.adopt(at(State::Stopped), "x"), Err(Error::State { state: State::Paused, .. })));
        assert!(registry.adopt(Record { state: State::Running, ..sample("sbx-b") }, "x").is_err());
        assert_eq!(
            registry.adopt(Record { state: State::Stopped, ..sample("sbx-b") }, "x").unwrap().state(),
            State::Stopped
        );
    }

    #[test]
    fn what_was_deleted_long_ago_is_not_loaded() {
        let journal = Arc::new(Journal::in_memory().unwrap());
        let now = Sources::system().now_ms();
        for (id, at) in [("sbx-old", now - REMEMBER_DELETED_MS - 1), ("sbx-new", now - 1000)] {
            let mut record = sample(id);
            (record.state, record.state_changed_at) = (State::Deleted, at);
            journal.store_move(&record, &Move { before: None, event: Event::Gone, at, note: None }).unwrap();
        }
        let ids = Registry::load(journal, Sources::system()).unwrap().all();
        assert_eq!(ids.iter().map(|s| s.id.as_str()).collect::<Vec<_>>(), ["sbx-new"]);
    }
}
