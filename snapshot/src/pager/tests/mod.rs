//! The pager against what was captured, with callers at once, a bad store and damaged caches.

mod world;

use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::runtime::Runtime;

use self::world::{PATIENT, Source, Target, World, any_order, cache, empty_cache, hasty};
use super::*;
use crate::{image::PageRef, store::ErrorKind};

/// Threads and tasks that demand, prefetch, fill, give up, and look, all at once. Answers the errors they saw.
fn interleave(world: &World, pager: &Pager, targets: &[Arc<Target>], runtime: &Runtime, seed: u64) -> Vec<PagerError> {
    let errors = Mutex::new(Vec::new());
    let note = |result: Result<(), PagerError>, image: usize, pages: Range<u64>| match result {
        Ok(()) => assert!(pager.is_placed(image, pages)),
        Err(error) => errors.lock().unwrap().push(error),
    };
    thread::scope(|scope| {
        for number in 0..3u64 {
            let note = &note;
            scope.spawn(move || {
                let mut rng = SmallRng::seed_from_u64(seed ^ number << 32);
                for _ in 0..12 {
                    let (image, pages) = world.any_pages(&mut rng);
                    if number < 2 {
                        note(pager.fetch_blocking(image, pages.clone(), Urgency::Demand), image, pages);
                        continue;
                    }
                    let urgency = [Urgency::Demand, Urgency::WorkingSet, Urgency::Sweep][rng.random_range(0..3)];
                    let fetch = async {
                        // Half of them give up.
                        let limit =
                            if rng.random() { PATIENT } else { Duration::from_micros(rng.random_range(0..3000)) };
                        time::timeout(limit, pager.fetch(image, pages.clone(), urgency)).await
                    };
                    if let Ok(result) = runtime.block_on(fetch) {
                        note(result, image, pages);
                    }
                }
            });
        }
        scope.spawn(|| {
            let mut rng = SmallRng::seed_from_u64(!seed);
            for _ in 0..4 {
                let cancel = CancellationToken::new();
                let order = any_order(world, &mut rng);
                let after = Duration::from_micros(rng.random_range(0..20_000));
                runtime.block_on(async {
                    let fill = pager.fill(&order, rng.random(), &cancel);
                    let stop = async {
                        time::sleep(after).await;
                        cancel.cancel();
                    };
                    match tokio::join!(fill, stop).0 {
                        Ok(()) | Err(PagerError::Cancelled) => {}
                        Err(error) => errors.lock().unwrap().push(error),
                    }
                });
                world.check(pager, targets);
            }
        });
    });
    errors.into_inner().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn every_page_comes_once_and_right(
        seed in any::<u64>(),
        latency in prop::sample::select(vec![0u64, 300, 2000]),
        (failures, damaged) in (0usize..3, 0usize..3),
        (cached, limits) in (any::<bool>(), 0u32..3),
    ) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let runtime = Runtime::new().unwrap();
        let world = World::new(seed, 1500, 900, 3);
        let mut source = Arc::into_inner(world.source()).unwrap();
        source.latency = latency;
        source.failures = failures.into();
        // A frame must not be hit twice in a row.
        source.damaged = damaged.min(1).into();
        let source = Arc::new(source);
        let cache = cached.then(|| cache(&world, &mut rng));
        let options = match limits {
            0 => hasty(),
            1 => Options { connections: 1, demand_connections: 4, request_bytes: 1, demand_bytes: 1, hole_bytes: 0, ..hasty() },
            _ => Options { hole_bytes: 8 << 20, sweep_bytes_per_second: Some(64 << 20), ..hasty() },
        };
        // More attempts than failures: whatever happens, nothing is to fail.
        let options = Options { attempts: failures as u32 + 2, ..options };
        let (pager, targets) = world.pager(&runtime, &source, cache, options);
        let errors = interleave(&world, &pager, &targets, &runtime, seed);
        prop_assert!(errors.is_empty(), "{errors:?}");
        runtime.block_on(pager.fill(&[], true, &CancellationToken::new())).unwrap();
        world.check_all(&pager, &targets);
        prop_assert!(source.most_open.load(Ordering::SeqCst) <= usize::from(options.connections));
        pager.stop();
        runtime.block_on(async { time::timeout(PATIENT, pager.stopped()).await }).unwrap();
        prop_assert!(source.open.load(Ordering::SeqCst) == 0);
    }

    #[test]
    fn what_cannot_come_is_an_error_for_everybody(seed in any::<u64>(), rotten in any::<bool>(), cached in any::<bool>()) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let runtime = Runtime::new().unwrap();
        let world = World::new(seed, 800, 800, 3);
        let mut source = Arc::into_inner(world.source()).unwrap();
        source.latency = 500;
        let bad = if rotten { &source.rotten } else { &source.lost };
        *bad.lock().unwrap() = world.packs.keys().filter(|_| rng.random_bool(0.4)).cloned().collect();
        let source = Arc::new(source);
        let (pager, targets) = world.pager(&runtime, &source, cached.then(|| cache(&world, &mut rng)), hasty());
        for error in interleave(&world, &pager, &targets, &runtime, seed) {
            match &error {
                PagerError::Fetch { key, source: cause } => {
                    prop_assert!(!rotten && cause.kind == ErrorKind::NotFound, "{key}: {error}");
                }
                PagerError::Pack { key, source: cause, .. } => {
                    prop_assert!(rotten && *cause == PackError::Digest, "{key}: {error}");
                }
                _ => prop_assert!(false, "{error:?}"),
            }
        }
        world.check(&pager, &targets);
        if let Some(first) = pager.failure() {
            let all = world.manifest.images[0].map.pages();
            if !pager.is_placed(0, 0..all) {
                let again = pager.fetch_blocking(0, 0..all, Urgency::Demand).unwrap_err();
                prop_assert_eq!(again.to_string(), first.to_string());
            }
        }
    }
}

#[test]
fn concurrent_wants_of_a_frame_share_one_fetch() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(1, 500, 100, 1);
    let mut source = Arc::into_inner(world.source()).unwrap();
    source.latency = 20_000;
    let source = Arc::new(source);
    let (pager, targets) = world.pager(&runtime, &source, None, hasty());
    let (page, key) = world.some_pack_page();
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| pager.fetch_blocking(0, page..page + 1, Urgency::Demand).unwrap());
        }
    });
    assert_eq!(source.requests(), 1);
    assert_eq!(source.log.lock().unwrap()[0].0, key);
    let stats = pager.stats();
    assert_eq!((stats.from_store().requests, stats.from_store().units), (1, 1));
    assert!((1..=8).contains(&stats.demands), "{}", stats.demands);
    assert!(stats.longest_demand_wait >= Duration::from_millis(10) && stats.demand_wait >= stats.longest_demand_wait);
    world.check(&pager, &targets);
}

#[test]
fn a_demand_overtakes_the_sweep_and_the_recorded_order() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(3, 6000, 100, 2);
    for urgency in [Urgency::Sweep, Urgency::WorkingSet] {
        let mut source = Arc::into_inner(world.source()).unwrap();
        source.latency = 20_000;
        let source = Arc::new(source);
        // Two connections, so that everything waits; every frame a request of its own.
        let options = Options {
            connections: 2,
            demand_connections: 1,
            request_bytes: 1,
            hole_bytes: 0,
            demand_bytes: 1,
            ..hasty()
        };
        let (pager, targets) = world.pager(&runtime, &source, None, options);
        let all = [Touch { image: 0, start: 0, pages: 6000 }];
        let order: &[Touch] = if urgency == Urgency::Sweep { &[] } else { &all };
        let cancel = CancellationToken::new();
        runtime.block_on(async {
            let fill = pager.fill(order, true, &cancel);
            let demand = async {
                while source.requests() < 4 {
                    time::sleep(Duration::from_millis(1)).await;
                }
                // The last one that the background would come to.
                let runs = world.manifest.images[0].map.runs().iter();
                let last = runs.filter_map(|run| match run.at {
                    PageRef::Pack { pack, frame, .. } if urgency == Urgency::Sweep => Some((pack, frame, run.start)),
                    PageRef::Pack { .. } => Some((0, 0, run.start)),
                    _ => None,
                });
                let page = last.max().unwrap().2;
                let Some(PageRef::Pack { pack, frame, .. }) = world.manifest.images[0].map.lookup(page) else {
                    panic!()
                };
                let entry = &world.manifest.packs[pack as usize];
                let its = (entry.key.clone(), u64::from(entry.frames[frame as usize].offset));
                let before = source.requests();
                assert!(!pager.is_placed(0, page..page + 1));
                pager.fetch(0, page..page + 1, Urgency::Demand).await.unwrap();
                let log = source.log.lock().unwrap()[before..].to_vec();
                let sent = log.iter().position(|(key, range)| (key, range.start) == (&its.0, its.1)).unwrap();
                // One may have been let in before it.
                assert!(sent <= 1, "{urgency:?}: {sent} requests were sent before the demand's");
                assert!(urgency != Urgency::Sweep || log.len() <= 2, "the sweep went on beside the demand");
                assert!(!pager.absent(0).is_empty());
                cancel.cancel();
            };
            assert!(matches!(tokio::join!(fill, demand).0, Err(PagerError::Cancelled)));
        });
        world.check(&pager, &targets);
    }
}

#[test]
fn the_recorded_order_comes_first_and_in_order() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(4, 3000, 100, 1);
    let source = world.source();
    let options = Options { connections: 1, request_bytes: 1, hole_bytes: 0, ..hasty() };
    let (pager, targets) = world.pager(&runtime, &source, None, options);
    let mut pages: Vec<u64> = (0..3000).step_by(100).collect();
    pages.reverse();
    let order: Vec<Touch> = pages.iter().map(|&start| Touch { image: 0, start, pages: 1 }).collect();
    runtime.block_on(pager.fill(&order, false, &CancellationToken::new())).unwrap();
    let mut expected = Vec::new();
    for page in pages {
        if let Some(PageRef::Pack { pack, frame, .. }) = world.manifest.images[0].map.lookup(page) {
            let pack = &world.manifest.packs[pack as usize];
            let request = (pack.key.clone(), u64::from(pack.frames[frame as usize].offset));
            if !expected.contains(&request) {
                expected.push(request);
            }
        }
    }
    assert!(expected.len() > 5);
    let sent: Vec<_> = source.log.lock().unwrap().iter().map(|(key, range)| (key.clone(), range.start)).collect();
    assert_eq!(sent, expected);
    assert!(!pager.absent(0).is_empty());
    world.check(&pager, &targets);
}

#[test]
fn large_requests_take_whole_packs() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(5, 4000, 100, 1);
    let source = world.source();
    let options = Options { connections: 1, buffer_bytes: u64::MAX, request_bytes: u64::MAX, ..hasty() };
    let (pager, targets) = world.pager(&runtime, &source, None, options);
    runtime.block_on(pager.fill(&[], true, &CancellationToken::new())).unwrap();
    world.check_all(&pager, &targets);
    assert_eq!(source.requests(), world.packs.len());
    let stats = pager.stats();
    assert_eq!(stats.store[Urgency::Sweep as usize], stats.from_store());
    assert_eq!(
        stats.placed_pages,
        targets
            .iter()
            .flat_map(|target| &target.placed)
            .map(|placed| u64::from(placed.load(Ordering::SeqCst)))
            .sum::<u64>()
    );
}

#[test]
fn the_sweep_is_throttled() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(6, 4000, 100, 1);
    let total: usize = world.packs.values().map(Bytes::len).sum();
    assert!(total > 2 << 20);
    let options = Options { sweep_bytes_per_second: Some(total as u64 * 4), request_bytes: 64 << 10, ..hasty() };
    let (pager, _) = world.pager(&runtime, &world.source(), None, options);
    let started = Instant::now();
    runtime.block_on(pager.fill(&[], true, &CancellationToken::new())).unwrap();
    assert!(started.elapsed() > Duration::from_millis(200), "{:?}", started.elapsed());
}

#[test]
fn the_cache_is_filled_and_is_enough_afterwards() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(7, 1500, 500, 2);
    let (cache, files) = empty_cache(&world);
    let (pager, _) = world.pager(&runtime, &world.source(), Some(cache), hasty());
    runtime.block_on(pager.fill(&[], true, &CancellationToken::new())).unwrap();
    pager.stop();
    runtime.block_on(pager.stopped());

    let reopen = || PackCache::new(files.iter().map(|(key, file)| (key.clone(), file.try_clone().unwrap())).collect());
    let dead = Arc::new(Source::default());
    dead.lost.lock().unwrap().extend(world.packs.keys().cloned());
    let (pager, targets) = world.pager(&runtime, &dead, Some(reopen()), hasty());
    pager.fetch_blocking(0, 0..700, Urgency::Demand).unwrap();
    runtime.block_on(pager.fill(&[], true, &CancellationToken::new())).unwrap();
    world.check_all(&pager, &targets);
    assert_eq!(dead.requests(), 0);
    assert!(pager.stats().cache[Urgency::Demand as usize].units > 0);

    // Damage is repaired from the store.
    let (page, key) = world.some_pack_page();
    let Some(PageRef::Pack { pack, frame, .. }) = world.manifest.images[0].map.lookup(page) else { panic!() };
    let at = u64::from(world.manifest.packs[pack as usize].frames[frame as usize].offset);
    files[&key].write_all_at(b"garbage", at).unwrap();
    let source = world.source();
    let (pager, targets) = world.pager(&runtime, &source, Some(reopen()), hasty());
    pager.fetch_blocking(0, page..page + 1, Urgency::Demand).unwrap();
    assert_eq!((source.requests(), pager.stats().bad_in_cache), (1, 1));
    world.check(&pager, &targets);
    pager.stop();
    runtime.block_on(pager.stopped());
    let (pager, _) = world.pager(&runtime, &dead, Some(reopen()), hasty());
    pager.fetch_blocking(0, page..page + 1, Urgency::Demand).unwrap();
}

#[test]
fn damage_of_the_store_is_asked_about_once_more_and_then_named() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(8, 500, 100, 1);
    let (page, key) = world.some_pack_page();
    let source = world.source();
    source.rotten.lock().unwrap().insert(key.clone());
    let (pager, targets) = world.pager(&runtime, &source, None, hasty());
    // In the background it is an error of that call.
    let touch = [Touch { image: 0, start: page, pages: 1 }];
    let error = runtime.block_on(pager.fill(&touch, false, &CancellationToken::new())).unwrap_err();
    assert!(matches!(&error, PagerError::Pack { key: named, .. } if *named == key), "{error:?}");
    assert!(pager.failure().is_none());
    assert_eq!(source.requests(), 2);
    // A demand ends the pager.
    let error = pager.fetch_blocking(0, page..page + 1, Urgency::Demand).unwrap_err();
    assert!(matches!(&error, PagerError::Pack { key: named, source: PackError::Digest, .. } if *named == key));
    assert!(pager.failure().is_some());
    assert_eq!(pager.stats().fetched_again, 2);
    world.check(&pager, &targets);
}

#[test]
fn no_wait_is_for_ever() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(9, 500, 100, 1);
    let (page, _) = world.some_pack_page();
    let options = Options { deadline: Duration::from_millis(50), ..hasty() };
    let source = Arc::new(Source { silent: true, ..Source::default() });
    let (pager, _) = world.pager(&runtime, &source, None, options);
    let fill = runtime.block_on(pager.fill(&[], true, &CancellationToken::new()));
    assert!(matches!(fill, Err(PagerError::Deadline(_))), "{fill:?}");
    let error = pager.fetch_blocking(0, page..page + 1, Urgency::Demand).unwrap_err();
    assert!(matches!(error, PagerError::Deadline(_)), "{error:?}");

    let (pager, _) = world.pager(&runtime, &source, None, hasty());
    thread::scope(|scope| {
        let blocked = scope.spawn(|| pager.fetch_blocking(0, page..page + 1, Urgency::Demand));
        let filled = scope.spawn(|| runtime.block_on(pager.fill(&[], true, &CancellationToken::new())));
        while source.open.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        pager.stop();
        assert!(matches!(blocked.join().unwrap(), Err(PagerError::Stopped)));
        assert!(matches!(filled.join().unwrap(), Err(PagerError::Stopped)));
    });
    runtime.block_on(async { time::timeout(PATIENT, pager.stopped()).await }).unwrap();
    let late = runtime.block_on(pager.fetch(0, page..page + 1, Urgency::Demand));
    assert!(matches!(late, Err(PagerError::Stopped)));
}

#[test]
fn a_page_that_cannot_be_placed_ends_the_pager() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(11, 500, 100, 1);
    let (page, _) = world.some_pack_page();
    let mut targets = world.targets();
    let full = Target { bad_page: Some(page), ..Arc::into_inner(targets.remove(0)).unwrap() };
    let targets: Vec<Arc<dyn PageTarget>> = vec![Arc::new(full), targets.remove(0)];
    let sources = Sources { store: world.source(), cache: None, keys: DataKeys::default() };
    let pager = Pager::new(&world.manifest, targets, sources, hasty(), runtime.handle().clone()).unwrap();
    let error = runtime.block_on(pager.fill(&[], true, &CancellationToken::new())).unwrap_err();
    assert!(matches!(&error, PagerError::Place { image, .. } if image == "memory"), "{error:?}");
    assert!(matches!(pager.fetch_blocking(0, page..page + 1, Urgency::Demand), Err(PagerError::Place { .. })));
}

#[test]
fn a_target_that_panics_leaves_nobody_waiting() {
    struct Panics;
    impl PageTarget for Panics {
        fn place(&self, _: u64, _: &[u8]) -> io::Result<()> {
            panic!("by intent")
        }
        fn place_base(&self, _: u64, _: u64, _: u64) -> io::Result<()> {
            panic!("by intent")
        }
    }
    let runtime = Runtime::new().unwrap();
    let world = World::new(12, 500, 100, 1);
    let (page, _) = world.some_pack_page();
    let targets: Vec<Arc<dyn PageTarget>> = vec![Arc::new(Panics), Arc::new(Panics)];
    let sources = Sources { store: world.source(), cache: None, keys: DataKeys::default() };
    let pager = Pager::new(&world.manifest, targets, sources, hasty(), runtime.handle().clone()).unwrap();
    let error = pager.fetch_blocking(0, page..page + 1, Urgency::Demand).unwrap_err();
    assert!(matches!(error, PagerError::Ended), "{error:?}");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let runtime = Runtime::new().unwrap();
    let world = World::new(13, 300, 100, 1);
    let source = world.source();
    let (pager, targets) = world.pager(&runtime, &source, None, hasty());
    for (image, pages) in [(0, 0..301), (2, 0..1), (0, 400..401), (0, u64::MAX..u64::MAX)] {
        let error = pager.fetch_blocking(image, pages.clone(), Urgency::Demand).unwrap_err();
        assert!(matches!(error, PagerError::NoSuchPages { .. }), "{error:?}");
        assert!(!pager.is_placed(image, pages));
    }
    let beyond = [Touch { image: 0, start: 299, pages: u64::MAX }];
    assert!(matches!(
        runtime.block_on(pager.fill(&beyond, true, &CancellationToken::new())),
        Err(PagerError::NoSuchPages { .. })
    ));
    assert_eq!(pager.absent(9), []);
    assert!(pager.failure().is_none());

    let sources = Sources { store: source, cache: None, keys: DataKeys::default() };
    let new = |manifest: &Manifest, targets: &[Arc<Target>]| {
        let targets = targets.iter().map(|target| target.clone() as Arc<dyn PageTarget>).collect();
        Pager::new(manifest, targets, sources.clone(), hasty(), runtime.handle().clone()).err().unwrap()
    };
    assert!(matches!(new(&world.manifest, &targets[..1]), PagerError::Targets { targets: 1, images: 2 }));
    let mut dangling = world.manifest.clone();
    dangling.packs.pop();
    assert!(matches!(new(&dangling, &targets), PagerError::Manifest(_)));
    let mut short = world.manifest.clone();
    short.packs[0].frames.iter_mut().for_each(|frame| frame.pages = 0);
    assert!(matches!(new(&short, &targets), PagerError::Manifest(_)));
}

#[test]
fn demand_is_admitted_first() {
    let gate = Arc::new(Gate::new(Limits { all: 3, background: 2, sweep: 1 }));
    let sweep = gate.try_enter(Urgency::Sweep).unwrap();
    assert!(gate.try_enter(Urgency::Sweep).is_none());
    let first = gate.try_enter(Urgency::WorkingSet).unwrap();
    assert!(gate.try_enter(Urgency::WorkingSet).is_none());
    let demand = gate.try_enter(Urgency::Demand).unwrap();
    assert!(gate.try_enter(Urgency::Demand).is_none());
    drop((sweep, first, demand));
    let under_way = gate.demand();
    assert!(gate.try_enter(Urgency::Sweep).is_none());
    let one = gate.try_enter(Urgency::WorkingSet).unwrap();
    assert!(gate.try_enter(Urgency::WorkingSet).is_none(), "half of the background's");
    drop((one, under_way));
    assert!(gate.try_enter(Urgency::Sweep).is_some());
}
