//! The store, and the ghost state: it knows what no owner knows, which guests run, what has been acknowledged, what may yet land.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash},
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    super::{Attempt, Expected, Head, HeadState, StoredHead, WriteReply, validate},
    NAMES, OWNERS, PAUSE_BOUND,
};
use crate::{
    ids::CommitId,
    store::{ETag, ErrorKind, Operation, StoreError},
};

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fate {
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

pub(super) enum Request {
    Read,
    Write { body: Bytes, expected: Expected },
}

pub(super) enum Reply {
    Read(Result<Option<StoredHead>, StoreError>),
    Write(WriteReply),
}

pub(super) struct InFlight {
    pub(super) ticket: u64,
    pub(super) owner: usize,
    pub(super) request: Request,
    pub(super) fate: Fate,
}

/// What has become of an owner's copy of the guest.
#[derive(Clone, Debug)]
pub(super) enum Guest {
    None,
    /// Runs, with this much work done.
    Runs(u64),
    /// Stopped for a pause, neither freed nor resumed.
    Stopped,
}

pub(super) struct World {
    pub(super) rng: SmallRng,
    pub(super) faults: bool,
    pub(super) now: u64,
    // The store.
    pub(super) head: Option<StoredHead>,
    pub(super) tags: u64,
    pub(super) in_flight: Vec<InFlight>,
    pub(super) late: Vec<InFlight>,
    pub(super) replies: HashMap<u64, Reply>,
    pub(super) tickets: u64,
    // The ghost state.
    pub(super) guests: [Guest; OWNERS],
    pub(super) down: [bool; OWNERS],
    /// Whose pause has ended in `Unknown` and is not settled yet, and the head it was to replace. While that is the head, the guest
    /// does not run without a commit that is yet to win, so a take-over of that head is safe.
    pub(super) limbo: [Option<ETag>; OWNERS],
    /// Work saved in each manifest.
    pub(super) saved: HashMap<String, u64>,
    /// The most work that a client was told is safe.
    pub(super) acknowledged: u64,
    pub(super) history: Vec<CommitId>,
    pub(super) ids: u64,
    pub(super) violations: Vec<String>,
    /// Since when each guest has been stopped.
    pub(super) stopped: [u64; OWNERS],
    pub(super) trace: DefaultHasher,
    pub(super) counts: Counts,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) pauses: u64,
    pub(super) ran_again: u64,
    pub(super) unknown: u64,
    pub(super) wakes: u64,
    pub(super) fenced: u64,
    pub(super) late: u64,
    pub(super) crashes: u64,
}

pub(super) type Shared = Arc<Mutex<World>>;

pub(super) fn lock(world: &Shared) -> MutexGuard<'_, World> {
    world.lock().unwrap()
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
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

    pub(super) fn id(&mut self) -> CommitId {
        self.ids += 1;
        let mut id = [0; 16];
        id[..8].copy_from_slice(&self.ids.to_be_bytes());
        CommitId(id)
    }

    fn violation(&mut self, what: &str) {
        let now = self.now;
        self.violations.push(format!("step {now}: {what}"));
    }

    pub(super) fn submit(&mut self, owner: usize, request: Request) -> u64 {
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
    pub(super) fn deliver(&mut self, at: usize) {
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
    pub(super) fn land_late(&mut self, at: usize) {
        let request = self.late.swap_remove(at);
        if let Request::Write { body, expected } = request.request
            && self.apply(request.owner, &body, &expected).is_some()
        {
            self.counts.late += 1;
        }
    }

    /// What must hold between any two steps.
    #[expect(clippy::needless_range_loop, reason = "the owner's number is its name")]
    pub(super) fn check(&mut self) {
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
    pub(super) fn acknowledge(&mut self, owner: usize, attempt: &Attempt, work: u64) {
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
    pub(super) fn wake(&mut self, owner: usize, head: &Head) {
        self.counts.wakes += 1;
        let work = head.manifest.as_ref().map_or(0, |manifest| self.saved[&manifest.key]);
        if work < self.acknowledged {
            let acknowledged = self.acknowledged;
            self.violation(&format!("woken with {work}, but {acknowledged} was acknowledged"));
        }
        self.guests[owner] = Guest::Runs(work);
    }
}
