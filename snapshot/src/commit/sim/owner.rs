//! An owner: a supervisor reduced to what it does with the head, over the same register as the real one.

use std::{future::poll_fn, task::Poll};

use async_trait::async_trait;
use bytes::Bytes;
use rand::Rng;

use super::{
    super::{
        Attempt, Change, Current, Expected, Head, HeadState, HeadStorage, Outcome, Pacer, PauseEnd, Register, Sent,
        StoredHead, WriteReply,
    },
    NAMES,
    world::{Guest, Reply, Request, Shared, lock},
};
use crate::{
    ids::{CommitId, Digest},
    manifest::ManifestRef,
    store::StoreError,
};

/// One owner's way to the head.
#[derive(Clone)]
pub(super) struct SimHead {
    pub(super) world: Shared,
    pub(super) owner: usize,
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
pub(super) struct Owner {
    pub(super) world: Shared,
    pub(super) me: usize,
    pub(super) register: Register<SimHead>,
    /// `false`: the canary, which takes a head that is still the old one for a proof.
    pub(super) cancels: bool,
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
    pub(super) async fn run(self) {
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
