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
//! `world` is the store and the ghost state that everything is checked against, `owner` what a supervisor does.

mod owner;
mod world;

use std::{
    hash::Hasher,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Waker},
};

use rand::Rng;

use super::Register;
use owner::{Owner, SimHead};
use world::{Counts, Fate, Guest, Shared, World, lock};

const OWNERS: usize = 2;
const NAMES: [&str; OWNERS] = ["host-a", "host-b"];
/// Steps with faults, and steps in which everything must then come to an end.
const FAULTY_STEPS: u64 = 350;
const CALM_STEPS: u64 = 300;
/// How long a pause may take once there are no faults.
const PAUSE_BOUND: u64 = 150;

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
