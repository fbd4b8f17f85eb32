//! The register under a simulated store: seeded, single-threaded, in virtual time.
//!
//! Two owners pause and wake one sandbox, crash and come back. Faults that the protocol must survive, and no others:
//!
//! - a request is lost before it is applied, or never sent (and says so);
//! - it is applied and the reply is lost, or is a 5xx;
//! - it gets no reply in time and is applied *later*, after any number of other operations;
//! - it is not applied and answered 409, 5xx or 403;
//! - a read fails;
//! - an owner crashes with its guest; another may take over while it is known to be down, or while a pause of it is undecided.
//!
//! The store itself is linearisable and compares tags as it should.
//!
//! The ghost state knows what no owner knows: which guests run, what has been acknowledged, what may yet land.

use std::{
    collections::HashMap,
    future::poll_fn,
    hash::{DefaultHasher, Hash, Hasher},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll, Waker},
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::*;
use crate::{
    ids::{CommitId, Digest},
    manifest::ManifestRef,
    store::{ETag, ErrorKind, Operation, StoreError},
};

const OWNERS: usize = 2;
const NAMES: [&str; OWNERS] = ["host-a", "host-b"];
/// Steps with faults, and steps in which everything must then come to an end.
const FAULTY_STEPS: u64 = 350;
const CALM_STEPS: u64 = 300;
/// How long a pause may take once there are no faults.
const PAUSE_BOUND: u64 = 150;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fate {
    Fine,
    Lost,
    NeverSent,
    ReplyLost,
    AppliedThen5xx,
    Late,
    Refused5xx,
    Refused409,
    Refused403,
}

const FAULTS: [Fate; 8] = [
    Fate::Lost,
    Fate::NeverSent,
    Fate::ReplyLost,
    Fate::AppliedThen5xx,
    Fate::Late,
    Fate::Refused5xx,
    Fate::Refused409,
    Fate::Refused403,
];

enum Request {
    Read,
    Write { body: Bytes, expected: Expected },
}

enum Reply {
    Read(Result<Option<StoredHead>, StoreError>),
    Write(WriteReply),
}

struct InFlight {
    ticket: u64,
    owner: usize,
    request: Request,
    fate: Fate,
}

/// What has become of an owner's copy of the guest.
#[derive(Clone, Debug)]
enum Guest {
    None,
    /// Runs, with this much work done.
    Runs(u64),
    /// Stopped for a pause, neither freed nor resumed.
    Stopped,
}

struct World {
    rng: SmallRng,
    faults: bool,
    now: u64,
    // The store.
    head: Option<StoredHead>,
    tags: u64,
    in_flight: Vec<InFlight>,
    late: Vec<InFlight>,
    replies: HashMap<u64, Reply>,
    tickets: u64,
    // The ghost state.
    guests: [Guest; OWNERS],
    down: [bool; OWNERS],
    /// Whose pause has ended in `Unknown` and is not settled yet, and the head it was to replace. While that is the head, the guest
    /// does not run without a commit that is yet to win, so a take-over of that head is safe.
    limbo: [Option<ETag>; OWNERS],
    /// Work saved in each manifest.
    saved: HashMap<String, u64>,
    /// The most work that a client was told is safe.
    acknowledged: u64,
    history: Vec<CommitId>,
    ids: u64,
    violations: Vec<String>,
    /// Since when each guest has been stopped.
    stopped: [u64; OWNERS],
    trace: DefaultHasher,
    counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    pauses: u64,
    ran_again: u64,
    unknown: u64,
    wakes: u64,
    fenced: u64,
    late: u64,
    crashes: u64,
}

type Shared = Arc<Mutex<World>>;

fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(seed),
            faults: true,
            now: 0,
            head: None,
            tags: 0,
            in_flight: Vec::new(),
            late: Vec::new(),
            replies: HashMap::new(),
            tickets: 0,
            guests: [Guest::None, Guest::None],
            down: [false; OWNERS],
            limbo: [None, None],
            saved: HashMap::new(),
            acknowledged: 0,
            history: Vec::new(),
            ids: 0,
            violations: Vec::new(),
            stopped: [0; OWNERS],
            trace: DefaultHasher::new(),
            counts: Counts::default(),
        }
    }

    fn id(&mut self) -> CommitId {
        self.ids += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.ids.to_be_bytes());
        CommitId(id)
    }

    fn violation(&mut self, what: &str) {
        let now = self.now;
        self.violations.push(format!("step {now}: {what}"));
    }

    fn submit(&mut self, owner: usize, request: Request) -> u64 {
        self.tickets += 1;
        let fate = match &request {
            _ if !self.faults || self.rng.random_bool(0.6) => Fate::Fine,
            Request::Read => Fate::Lost,
            Request::Write { .. } => FAULTS[self.rng.random_range(0..FAULTS.len())],
        };
        self.in_flight.push(InFlight { ticket: self.tickets, owner, request, fate });
        self.tickets
    }

    fn would_apply(&self, expected: &Expected) -> bool {
        match (expected, &self.head) {
            (Expected::Absent, None) => true,
            (Expected::Match(tag), Some(head)) => *tag == head.etag,
            _ => false,
        }
    }

    /// Applies a write as the store does; checks what must hold at this very moment.
    fn apply(&mut self, owner: usize, body: &Bytes, expected: &Expected) -> Option<ETag> {
        if !self.would_apply(expected) {
            return None;
        }
        let new = Head::decode(body).unwrap();
        let old = self.head.as_ref().map(|head| Head::decode(&head.bytes).unwrap());
        if let Err(rule) = validate(&new, old.as_ref()) {
            self.violation(&format!("{} wrote a head against a rule: {rule}", NAMES[owner]));
        }
        if new.state != HeadState::Live && matches!(self.guests[owner], Guest::Runs(_)) {
            self.violation(&format!("a pause of {} landed while its guest runs", NAMES[owner]));
        }
        let tag = ETag(format!("tag-{}", self.tags));
        self.tags += 1;
        self.history.push(new.commit);
        self.head = Some(StoredHead { bytes: body.clone(), etag: tag.clone() });
        ("apply", self.now, owner, new.seq, new.epoch).hash(&mut self.trace);
        Some(tag)
    }

    /// Lets one request in flight come to its end.
    fn deliver(&mut self, at: usize) {
        let request = self.in_flight.swap_remove(at);
        (self.now, request.ticket, request.owner, request.fate).hash(&mut self.trace);
        let error = |kind| StoreError::new(kind, Operation::Put, "head");
        let timeout = || error(ErrorKind::Unavailable).applied(true);
        let reply = match &request.request {
            Request::Read if request.fate == Fate::Fine => Reply::Read(Ok(self.head.clone())),
            Request::Read => Reply::Read(Err(error(ErrorKind::Unavailable))),
            Request::Write { body, expected } => Reply::Write(match request.fate {
                Fate::Fine => match self.apply(request.owner, body, expected) {
                    Some(tag) => WriteReply::Applied(tag),
                    None => WriteReply::NotApplied(error(ErrorKind::PreconditionFailed)),
                },
                Fate::ReplyLost | Fate::AppliedThen5xx => {
                    self.apply(request.owner, body, expected);
                    WriteReply::Unclear(timeout())
                }
                Fate::Lost | Fate::Refused5xx | Fate::Late => WriteReply::Unclear(timeout()),
                Fate::Refused409 => WriteReply::Unclear(error(ErrorKind::Conflict).applied(true)),
                Fate::NeverSent => WriteReply::NotApplied(error(ErrorKind::Unavailable)),
                Fate::Refused403 => WriteReply::NotApplied(error(ErrorKind::Forbidden)),
            }),
        };
        self.replies.insert(request.ticket, reply);
        if request.fate == Fate::Late {
            self.late.push(request);
        }
    }

    /// Lets one request land long after its author gave up on it.
    fn land_late(&mut self, at: usize) {
        let request = self.late.swap_remove(at);
        if let Request::Write { body, expected } = request.request
            && self.apply(request.owner, &body, &expected).is_some()
        {
            self.counts.late += 1;
        }
    }

    /// What must hold between any two steps.
    #[expect(clippy::needless_range_loop, reason = "the owner's number is its name")]
    fn check(&mut self) {
        let live = |guest: &Guest| matches!(guest, Guest::Runs(_));
        if self.guests.iter().filter(|guest| live(guest)).count() > 1 {
            self.violation("two live copies");
        }
        for owner in 0..OWNERS {
            if !matches!(self.guests[owner], Guest::Stopped) || self.faults {
                self.stopped[owner] = self.now;
            } else if self.now - self.stopped[owner] > PAUSE_BOUND {
                self.violation(&format!("a pause of {} does not end", NAMES[owner]));
            }
            if !live(&self.guests[owner]) {
                continue;
            }
            let landable = self
                .in_flight
                .iter()
                .filter(|request| {
                    matches!(request.fate, Fate::Fine | Fate::ReplyLost | Fate::AppliedThen5xx | Fate::Late)
                })
                .chain(&self.late)
                .any(|request| match &request.request {
                    Request::Write { body, expected } => {
                        request.owner == owner
                            && self.would_apply(expected)
                            && Head::decode(body).unwrap().state != HeadState::Live
                    }
                    Request::Read => false,
                });
            if landable {
                self.violation(&format!("the guest of {} runs with a commit that can still land", NAMES[owner]));
            }
        }
    }

    /// A client is told that this pause is safe.
    fn acknowledge(&mut self, owner: usize, attempt: &Attempt, work: u64) {
        let head = attempt.head();
        self.counts.pauses += 1;
        ("ack", self.now, owner, head.seq).hash(&mut self.trace);
        if !self.history.contains(&head.commit) {
            self.violation("an acknowledged pause was never committed");
        }
        let readable = head.manifest.as_ref().and_then(|m| self.saved.get(&m.key));
        if readable != Some(&work) {
            self.violation("an acknowledged pause cannot be read");
        }
        self.acknowledged = self.acknowledged.max(work);
    }

    /// The guest goes on from a manifest.
    fn wake(&mut self, owner: usize, head: &Head) {
        self.counts.wakes += 1;
        let work = head.manifest.as_ref().map_or(0, |manifest| self.saved[&manifest.key]);
        if work < self.acknowledged {
            let acknowledged = self.acknowledged;
            self.violation(&format!("woken with {work}, but {acknowledged} was acknowledged"));
        }
        self.guests[owner] = Guest::Runs(work);
    }
}

/// One owner's way to the head.
#[derive(Clone)]
struct SimHead {
    world: Shared,
    owner: usize,
}

impl SimHead {
    async fn ask(&self, request: Request) -> Reply {
        let ticket = lock(&self.world).submit(self.owner, request);
        poll_fn(|_| match lock(&self.world).replies.remove(&ticket) {
            Some(reply) => Poll::Ready(reply),
            None => Poll::Pending,
        })
        .await
    }
}

#[async_trait]
impl HeadStorage for SimHead {
    fn key(&self) -> &'static str {
        "head"
    }

    async fn read(&self) -> Result<Option<StoredHead>, StoreError> {
        match self.ask(Request::Read).await {
            Reply::Read(reply) => reply,
            Reply::Write(_) => unreachable!(),
        }
    }

    async fn write(&self, body: Bytes, expected: &Expected) -> WriteReply {
        let expected = expected.clone();
        match self.ask(Request::Write { body, expected }).await {
            Reply::Write(reply) => reply,
            Reply::Read(_) => unreachable!(),
        }
    }
}

/// A few waits of a few steps.
struct Steps {
    world: Shared,
    left: u32,
}

#[async_trait]
impl Pacer for Steps {
    async fn wait(&mut self) -> bool {
        if self.left == 0 {
            return false;
        }
        self.left -= 1;
        idle(&self.world, 6).await;
        true
    }
}

/// Waits up to `most` steps.
async fn idle(world: &Shared, most: u64) {
    let until = {
        let mut world = lock(world);
        world.now + world.rng.random_range(1..=most)
    };
    poll_fn(|_| if lock(world).now >= until { Poll::Ready(()) } else { Poll::Pending }).await;
}

/// A supervisor, reduced to what it does with the head.
struct Owner {
    world: Shared,
    me: usize,
    register: Register<SimHead>,
    /// `false`: the canary, which takes a head that is still the old one for a proof.
    cancels: bool,
}

impl Owner {
    fn pacer(&self) -> Steps {
        let left = lock(&self.world).rng.random_range(0..4);
        Steps { world: self.world.clone(), left }
    }

    fn id(&self) -> CommitId {
        lock(&self.world).id()
    }

    fn set(&self, guest: Guest) {
        lock(&self.world).guests[self.me] = guest;
    }

    fn mine(&self, head: &Head) -> bool {
        head.owner == NAMES[self.me] && head.state == HeadState::Live
    }

    /// Commits until it is known what came of it; `true` if it is the head.
    async fn insist(&self, attempt: &Attempt) -> Option<Current> {
        let mut sent = Sent::Never;
        loop {
            match self.register.commit(attempt, sent, &mut self.pacer()).await {
                Outcome::Committed { now } => {
                    return Some(now).filter(|now| now.head.commit == attempt.head().commit);
                }
                Outcome::Superseded { .. } | Outcome::Fenced { .. } => return None,
                Outcome::Refused { .. } if sent == Sent::Never => return None,
                Outcome::Refused { .. } | Outcome::Unknown { .. } => {
                    sent = Sent::Maybe;
                    idle(&self.world, 10).await;
                }
            }
        }
    }

    /// From a start without a guest.
    async fn run(self) {
        loop {
            idle(&self.world, 20).await;
            let Ok(current) = self.register.read().await else {
                continue;
            };
            let Some(current) = current else {
                self.create().await;
                continue;
            };
            let may_take_over = {
                let world = lock(&self.world);
                world.down[1 - self.me] || world.limbo[1 - self.me].as_ref() == Some(&current.etag)
            };
            if current.head.state.at_rest() {
                let claim = Attempt::claim(&current, NAMES[self.me], self.id()).unwrap();
                if let Some(now) = self.insist(&claim).await {
                    lock(&self.world).wake(self.me, &now.head);
                    self.live(now).await;
                }
            } else if self.mine(&current.head) {
                self.recover(&current).await;
            } else if may_take_over {
                let take = Attempt::take_over(&current, NAMES[self.me], self.id()).unwrap();
                if let Some(now) = self.insist(&take).await {
                    lock(&self.world).wake(self.me, &now.head);
                    self.live(now).await;
                }
            }
        }
    }

    /// The sandbox does not exist yet.
    async fn create(&self) {
        let change = Change { state: HeadState::Live, manifest: None, record: serde_json::Value::Null };
        let attempt = Attempt::first("sb", NAMES[self.me], change, self.id()).unwrap();
        if let Some(now) = self.insist(&attempt).await {
            lock(&self.world).wake(self.me, &now.head);
            self.live(now).await;
        }
    }

    /// The head says that we run a guest, but it is gone: back to the last pause.
    async fn recover(&self, current: &Current) {
        let state = if current.head.manifest.is_some() { HeadState::Paused } else { HeadState::Stopped };
        let change = Change { state, manifest: None, record: serde_json::Value::Null };
        let attempt = Attempt::next(current, change, self.id()).unwrap();
        self.insist(&attempt).await;
    }

    /// While our guest lives.
    async fn live(&self, mut current: Current) {
        loop {
            idle(&self.world, 20).await;
            let (attempt, work) = {
                let mut world = lock(&self.world);
                let Guest::Runs(work) = world.guests[self.me] else { unreachable!() };
                // The guest did something since.
                let work = work + 1;
                world.guests[self.me] = Guest::Stopped;
                let commit = world.id();
                let key = format!("manifest-{commit}");
                world.saved.insert(key.clone(), work);
                let change = Change {
                    state: HeadState::Paused,
                    manifest: Some(ManifestRef { key, digest: Digest([0; 32]) }),
                    record: serde_json::Value::Null,
                };
                (Attempt::next(&current, change, commit).unwrap(), work)
            };
            match self.end_pause(&attempt, &current).await {
                PauseEnd::Paused { .. } => {
                    self.set(Guest::None);
                    lock(&self.world).acknowledge(self.me, &attempt, work);
                    return;
                }
                PauseEnd::RunAgain { now, .. } => {
                    current = now.unwrap_or(current);
                    let mut world = lock(&self.world);
                    world.counts.ran_again += 1;
                    world.guests[self.me] = Guest::Runs(work);
                }
                PauseEnd::Fenced { .. } => {
                    self.set(Guest::None);
                    lock(&self.world).counts.fenced += 1;
                    return;
                }
                PauseEnd::Unknown { .. } => unreachable!(),
            }
        }
    }

    /// Until it is known how the pause ended. The guest stays stopped meanwhile.
    async fn end_pause(&self, attempt: &Attempt, current: &Current) -> PauseEnd {
        let mut sent = Sent::Never;
        if !self.cancels {
            return match self.register.commit(attempt, sent, &mut self.pacer()).await {
                Outcome::Committed { now } => PauseEnd::Paused { now },
                Outcome::Superseded { by } | Outcome::Fenced { by } => PauseEnd::Fenced { by },
                Outcome::Refused { cause } | Outcome::Unknown { cause } => PauseEnd::RunAgain { now: None, cause },
            };
        }
        let cancel = attempt.cancel(Some(current), self.id()).unwrap();
        loop {
            let (mut first, mut second) = (self.pacer(), self.pacer());
            let end = self.register.end_pause(attempt, &cancel, sent, &mut first, &mut second);
            match end.await {
                PauseEnd::Unknown { .. } => {
                    {
                        let mut world = lock(&self.world);
                        world.counts.unknown += 1;
                        world.limbo[self.me] = Some(current.etag.clone());
                    }
                    sent = Sent::Maybe;
                    idle(&self.world, 40).await;
                }
                end => {
                    lock(&self.world).limbo[self.me] = None;
                    return end;
                }
            }
        }
    }
}

struct Report {
    violations: Vec<String>,
    trace: u64,
    counts: Counts,
    /// Pauses that were acknowledged after the faults had stopped.
    paused_in_calm: u64,
}

#[expect(clippy::needless_range_loop, reason = "the owner's number is its name")]
fn simulate(seed: u64, cancels: bool) -> Report {
    let world: Shared = Arc::new(Mutex::new(World::new(seed)));
    let start = |me: usize| -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let storage = SimHead { world: world.clone(), owner: me };
        Box::pin(Owner { world: world.clone(), me, register: Register::new(storage), cancels }.run())
    };
    let mut owners: [_; OWNERS] = std::array::from_fn(|me| Some(start(me)));
    let mut context = Context::from_waker(Waker::noop());
    let mut pauses_before_calm = 0;
    for step in 0..FAULTY_STEPS + CALM_STEPS {
        {
            let mut world = lock(&world);
            world.now = step;
            if step == FAULTY_STEPS {
                world.faults = false;
                pauses_before_calm = world.counts.pauses;
                for request in &mut world.in_flight {
                    request.fate = Fate::Fine;
                }
            }
            if !world.in_flight.is_empty() && world.rng.random_bool(0.7) {
                let most = world.in_flight.len();
                let at = world.rng.random_range(0..most);
                world.deliver(at);
                world.check();
            }
            if !world.late.is_empty() && world.rng.random_bool(0.06) {
                let most = world.late.len();
                let at = world.rng.random_range(0..most);
                world.land_late(at);
                world.check();
            }
        }
        for me in 0..OWNERS {
            let crash = {
                let mut world = lock(&world);
                world.faults && owners[me].is_some() && world.rng.random_bool(0.002)
            };
            let back = owners[me].is_none() && {
                let mut world = lock(&world);
                !world.faults || world.rng.random_bool(0.02)
            };
            if crash {
                owners[me] = None;
                let mut world = lock(&world);
                world.guests[me] = Guest::None;
                world.down[me] = true;
                world.limbo[me] = None;
                world.counts.crashes += 1;
                // Requests that were sent stay sent; nobody waits for the answer.
                let (gone, kept) =
                    std::mem::take(&mut world.in_flight).into_iter().partition(|request| request.owner == me);
                world.in_flight = kept;
                world.late.extend::<Vec<_>>(gone);
            } else if back {
                lock(&world).down[me] = false;
                owners[me] = Some(start(me));
            }
            if let Some(owner) = &mut owners[me] {
                assert!(owner.as_mut().poll(&mut context).is_pending());
                lock(&world).check();
            }
        }
    }
    let world = lock(&world);
    Report {
        violations: world.violations.clone(),
        trace: world.trace.finish(),
        counts: world.counts,
        paused_in_calm: world.counts.pauses - pauses_before_calm,
    }
}

/// Runs the seeds on all cores.
fn sweep<T: Send>(seeds: std::ops::Range<u64>, run: impl Fn(u64) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|n| {
                let (run, seeds) = (&run, seeds.clone());
                scope.spawn(move || seeds.filter(|seed| seed % threads == n).map(run).collect::<Vec<_>>())
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    })
}

#[test]
fn holds_over_ten_thousand_seeds() {
    let reports = sweep(0..10_000, |seed| (seed, simulate(seed, true)));
    let mut total = Counts::default();
    for (seed, report) in &reports {
        assert!(report.violations.is_empty(), "seed {seed}: {:?}", report.violations);
        let calm = report.paused_in_calm;
        assert!(calm >= 2, "seed {seed}: {calm} pauses after the faults stopped");
        let add = |sum: &mut u64, n| *sum += n;
        add(&mut total.pauses, report.counts.pauses);
        add(&mut total.ran_again, report.counts.ran_again);
        add(&mut total.unknown, report.counts.unknown);
        add(&mut total.wakes, report.counts.wakes);
        add(&mut total.fenced, report.counts.fenced);
        add(&mut total.late, report.counts.late);
        add(&mut total.crashes, report.counts.crashes);
    }
    println!("{total:?}");
    // Each of the paths was taken often enough to mean something.
    for (name, count) in [
        ("pauses", total.pauses),
        ("ran again", total.ran_again),
        ("unknown", total.unknown),
        ("wakes", total.wakes),
        ("fenced", total.fenced),
        ("late", total.late),
        ("crashes", total.crashes),
    ] {
        assert!(count > 100, "{name}: only {count}");
    }
}

/// The canary: without the cancel commit the same run must fail.
#[test]
fn without_the_cancel_commit_it_fails() {
    let reports = sweep(0..500, |seed| simulate(seed, false));
    let of = |what: &str| reports.iter().filter(|report| report.violations.iter().any(|v| v.contains(what))).count();
    assert!(of("runs with a commit that can still land") > 10);
    assert!(of("landed while its guest runs") > 10);
    assert!(of("two live copies") > 0);
}

#[test]
fn the_same_seed_runs_the_same() {
    for seed in 0..50 {
        let (a, b) = (simulate(seed, true), simulate(seed, true));
        assert_eq!((a.trace, a.counts), (b.trace, b.counts), "seed {seed}");
        assert_ne!(a.trace, simulate(seed + 1000, true).trace);
    }
}
