//! What may be done to a service, drawn at random by proptest.

use std::time::Duration;

use http::Method;
use proptest::collection::vec;
use proptest::prelude::*;
use stasis_api::dev::{Fault, Rule};

/// A request to a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// `GET`: wakes nothing.
    Get,
    /// Pause.
    Pause,
    /// Resume.
    Resume,
    /// A request to an app in it, which wakes it.
    Invoke,
    /// Stop.
    Stop,
    /// Start.
    Start,
    /// Named snapshot.
    Snapshot,
    /// Delete.
    Delete,
    /// Undelete.
    Undelete,
}

impl Ask {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Get,
        Self::Pause,
        Self::Resume,
        Self::Invoke,
        Self::Stop,
        Self::Start,
        Self::Snapshot,
        Self::Delete,
        Self::Undelete,
    ];
}

/// How the life of a sandbox ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Not within the test.
    Long,
    /// Soon, by an auto-pause.
    Pauses,
    /// Soon, by a delete.
    Ends,
}

/// One thing that is done. Sandboxes are named by their number, modulo how many there are.
#[derive(Clone, Debug)]
pub enum Step {
    /// A sandbox is made.
    Create(Life),
    /// One is made of the snapshot that was made last.
    Restore,
    /// One request.
    Ask(usize, Ask),
    /// Several at once to one sandbox.
    Together(usize, Vec<Ask>),
    /// `kill -9` of its VMM.
    KillVmm(usize),
    /// `kill -9` of the supervisor, and its next start.
    KillSupervisor,
    /// The same, so many milliseconds after this request was sent.
    KillDuring(usize, Ask, u64),
    /// The store does this to the next requests of this kind.
    Break(Broken),
    /// It does so no more.
    Mend,
    /// Milliseconds.
    Wait(u64),
}

/// A fault of the store.
#[derive(Clone, Debug)]
pub struct Broken {
    /// PUT or GET.
    pub method: Method,
    /// Of what.
    pub path: &'static str,
    /// How.
    pub fault: Fault,
    /// How often.
    pub times: usize,
}

impl Broken {
    /// For the fault proxy.
    pub fn rule(&self) -> Rule {
        Rule { times: self.times, ..Rule::every(self.method.clone(), self.path, self.fault.clone()) }
    }

    /// It may still have effects when it is mended.
    pub fn comes_late(&self) -> bool {
        matches!(self.fault, Fault::ApplyLate(_) | Fault::Delay(_) | Fault::Hang)
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    prop_oneof![
        1 => Just(Ask::Get),
        6 => Just(Ask::Pause),
        6 => Just(Ask::Resume),
        2 => Just(Ask::Invoke),
        2 => Just(Ask::Stop),
        3 => Just(Ask::Start),
        2 => Just(Ask::Snapshot),
        1 => Just(Ask::Delete),
        1 => Just(Ask::Undelete),
    ]
}

fn broken() -> impl Strategy<Value = Broken> {
    let put =
        prop_oneof![3 => Just("/head"), 1 => Just("/manifest"), 1 => Just("/pack/")].prop_map(|p| (Method::PUT, p));
    let get = prop_oneof![2 => Just("/head"), 1 => Just("/manifest")].prop_map(|p| (Method::GET, p));
    let fault = prop_oneof![
        Just(Fault::Refuse(403)),
        Just(Fault::Refuse(503)),
        Just(Fault::Drop),
        Just(Fault::LoseReply),
        Just(Fault::ReplaceReply(500)),
        Just(Fault::Delay(Duration::from_millis(250))),
        Just(Fault::ApplyLate(Duration::from_millis(300))),
        Just(Fault::Hang),
    ];
    (prop_oneof![3 => put, 1 => get], fault, 1..=3_usize).prop_map(|((method, path), fault, times)| Broken {
        method,
        path,
        fault,
        times,
    })
}

fn life() -> impl Strategy<Value = Life> {
    prop_oneof![5 => Just(Life::Long), 2 => Just(Life::Pauses), 1 => Just(Life::Ends)]
}

/// A sequence. `together`: with several requests at once rather than one after the other.
pub fn sequence(together: bool) -> impl Strategy<Value = Vec<Step>> {
    let (one, many) = if together { (4, 8) } else { (12, 0) };
    let step = prop_oneof![
        2 => life().prop_map(Step::Create),
        1 => Just(Step::Restore),
        one => (0..3_usize, ask()).prop_map(|(n, ask)| Step::Ask(n, ask)),
        many => (0..3_usize, vec(ask(), 2..7)).prop_map(|(n, asks)| Step::Together(n, asks)),
        1 => (0..3_usize).prop_map(Step::KillVmm),
        1 => Just(Step::KillSupervisor),
        2 => (0..3_usize, ask(), 0..120_u64).prop_map(|(n, ask, ms)| Step::KillDuring(n, ask, ms)),
        3 => broken().prop_map(Step::Break),
        2 => Just(Step::Mend),
        1 => (1..1500_u64).prop_map(Step::Wait),
    ];
    vec(step, 8..24).prop_map(|mut steps| {
        steps.insert(0, Step::Create(Life::Long));
        steps
    })
}
