//! Collection against everything that happens beside it: owners that capture, fail, pause, wake, fork, delete and put back, collectors that run at
//! the same time, and a crash of any of them between any two store operations. Nothing that a head names is ever missing, and in the end
//! nothing is left that no head names.
//!
//! Each actor is a future that is polled by hand: every store operation lets the others go on before it is applied and before it is answered,
//! and a crash is a future that is dropped. Time is a number.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    ops::Range,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use stasis_snapshot::{
    commit::{Attempt, Change, Current, Head, HeadState, ObjectHead, Outcome, Pacer, Register, Sent},
    gc::{
        self,
        lease::{Claims, Lease, SHORTEST},
    },
    ids::{CommitId, Digest},
    image::{ImageMap, PageRef, Run},
    layout::{Owner, Part, Place},
    manifest::{Arch, Boot, Image, ImageKind, Lineage, Manifest, ManifestRef, Platform, Versioned},
    pack::{self, Codec, FrameEntry, PackEntry},
    page::PAGE_SIZE,
    seal::Seals,
    store::{ETag, ErrorKind, ListPage, Listed, Object, ObjectStore, Operation, Precondition, RawGrant, StoreError},
};

const HOUR: i64 = 3_600_000;
const PAGES: usize = 4;

#[derive(Debug, Default)]
struct World {
    objects: Mutex<BTreeMap<String, (Bytes, u64)>>,
    /// The packs of every manifest ever written: manifests are immutable.
    manifests: Mutex<BTreeMap<String, Vec<String>>>,
    next_tag: AtomicU64,
    next_id: AtomicU64,
    now: AtomicI64,
    /// Commits between their last look at the clock and their end: they are assumed to take less than a lease lives.
    hurried: AtomicUsize,
    /// A head or the set of objects has changed since the last check.
    changed: AtomicBool,
}

/// Lets every other actor go first, if the schedule says so.
async fn pause() {
    let mut waited = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[derive(Clone, Debug)]
struct Store(Arc<World>);

#[async_trait]
impl ObjectStore for Store {
    async fn get(&self, key: &str) -> Result<Object, StoreError> {
        pause().await;
        let found = self.0.objects.lock().unwrap().get(key).cloned();
        pause().await;
        let (bytes, tag) = found.ok_or_else(|| StoreError::new(ErrorKind::NotFound, Operation::Get, key))?;
        Ok(Object { bytes, etag: ETag(tag.to_string()) })
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        Ok(self.get(key).await?.bytes.slice(range.start as usize..range.end as usize))
    }

    async fn put(&self, key: &str, bytes: Bytes, precondition: &Precondition) -> Result<ETag, StoreError> {
        pause().await;
        let tag = self.0.next_tag.fetch_add(1, Ordering::Relaxed);
        {
            let mut objects = self.0.objects.lock().unwrap();
            let now = objects.get(key).map(|(_, tag)| ETag(tag.to_string()));
            let holds = match precondition {
                Precondition::None => true,
                Precondition::IfAbsent => now.is_none(),
                Precondition::IfMatch(expected) => now.as_ref() == Some(expected),
            };
            if !holds {
                return Err(StoreError::new(ErrorKind::PreconditionFailed, Operation::Put, key));
            }
            objects.insert(key.to_owned(), (bytes, tag));
        }
        self.0.changed.store(true, Ordering::Relaxed);
        pause().await;
        Ok(ETag(tag.to_string()))
    }

    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<ListPage, StoreError> {
        pause().await;
        let page = {
            let objects = self.0.objects.lock().unwrap();
            let mut found =
                objects.iter().filter(|(key, _)| key.starts_with(prefix) && next.is_none_or(|n| key.as_str() > n));
            let objects: Vec<Listed> = found
                .by_ref()
                .take(7)
                .map(|(key, (bytes, _))| Listed { key: key.clone(), size: bytes.len() as u64 })
                .collect();
            let more = found.next().is_some();
            ListPage { next: objects.last().filter(|_| more).map(|last| last.key.clone()), objects }
        };
        pause().await;
        Ok(page)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        pause().await;
        assert!(!key.ends_with("/head"), "a head was deleted");
        self.0.objects.lock().unwrap().remove(key);
        self.0.changed.store(true, Ordering::Relaxed);
        pause().await;
        Ok(())
    }

    async fn grant_put(&self, key: &str, _: Duration) -> Result<RawGrant, StoreError> {
        Err(StoreError::new(ErrorKind::Other, Operation::Grant, key))
    }

    async fn grant_get(&self, key: &str, _: Duration) -> Result<RawGrant, StoreError> {
        Err(StoreError::new(ErrorKind::Other, Operation::Grant, key))
    }
}

struct Once;

#[async_trait]
impl Pacer for Once {
    async fn wait(&mut self) -> bool {
        false
    }
}

/// Counts a commit as hurried for as long as it lives.
struct Hurry(Arc<World>);

impl Hurry {
    fn new(world: &Arc<World>) -> Self {
        world.hurried.fetch_add(1, Ordering::Relaxed);
        Self(world.clone())
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        self.0.hurried.fetch_sub(1, Ordering::Relaxed);
    }
}

impl World {
    fn store(self: &Arc<Self>) -> Arc<dyn ObjectStore> {
        Arc::new(Store(self.clone()))
    }

    fn id(&self) -> CommitId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&(self.next_id.fetch_add(1, Ordering::Relaxed) + 1).to_be_bytes());
        CommitId(id)
    }

    fn now(&self) -> i64 {
        self.now.load(Ordering::Relaxed)
    }

    fn register(self: &Arc<Self>, owner: &Owner) -> Register<ObjectHead> {
        Register::new(ObjectHead::new(self.store(), owner.head()))
    }

    async fn commit(self: &Arc<Self>, owner: &Owner, attempt: &Attempt) -> Option<Current> {
        match self.register(owner).commit(attempt, Sent::Never, &mut Once).await {
            Outcome::Committed { now } => Some(now),
            _ => None,
        }
    }

    /// Writes a pack and answers its entry. The collector reads no packs, so that its bytes may be any.
    async fn put_pack(self: &Arc<Self>, key: String) -> PackEntry {
        self.store().put(&key, Bytes::from_static(b"pack"), &Precondition::None).await.unwrap();
        let frame = FrameEntry {
            offset: pack::HEADER_LEN as u32,
            stored_len: PAGE_SIZE as u32,
            pages: 1,
            codec: Codec::Raw,
            digest: Digest([0; 32]),
        };
        let size = frame.offset + frame.stored_len;
        PackEntry { key, size, digest: Digest([0; 32]), frames: vec![frame], sealed: None }
    }

    /// Writes a manifest whose page `i` is in `packs[i]`.
    async fn put_manifest(self: &Arc<Self>, key: String, packs: &[PackEntry], lineage: Lineage) -> ManifestRef {
        let mut listed: Vec<PackEntry> = Vec::new();
        let mut runs = Vec::new();
        for (page, entry) in packs.iter().enumerate() {
            let at = listed.iter().position(|known| known.key == entry.key).unwrap_or_else(|| {
                listed.push(entry.clone());
                listed.len() - 1
            });
            let at = PageRef::Pack { pack: at as u32, frame: 0, index: 0 };
            runs.push(Run { start: page as u64, pages: 1, at });
        }
        let map = ImageMap::zero(packs.len() as u64).overlay(&runs).unwrap();
        let manifest = Manifest {
            arch: Arch::X86_64,
            platform: Platform::default(),
            spec: Versioned::default(),
            record: Versioned::default(),
            lineage: Some(lineage),
            packs: listed,
            images: vec![Image { kind: ImageKind::Memory, map, base: None }],
            state: Vec::new(),
            sealed_state: None,
            boot: Boot::default(),
        };
        let bytes = Bytes::from(manifest.encode().unwrap());
        let named = ManifestRef { key: key.clone(), digest: Digest::of(&bytes) };
        let packs = manifest.packs.iter().map(|pack| pack.key.clone()).collect();
        self.manifests.lock().unwrap().insert(key.clone(), packs);
        self.store().put(&key, bytes, &Precondition::IfAbsent).await.unwrap();
        named
    }

    fn heads(&self) -> Vec<(String, Head)> {
        let objects = self.objects.lock().unwrap();
        let heads = objects.iter().filter(|(key, _)| key.ends_with("/head"));
        heads.map(|(key, (bytes, _))| (key.clone(), Head::decode(bytes).unwrap())).collect()
    }

    /// Everything that a head names, tombstones that can be put back included.
    fn reachable(&self) -> BTreeSet<String> {
        let manifests = self.manifests.lock().unwrap();
        let named = self.heads().into_iter().filter_map(|(_, head)| head.manifest);
        named
            .flat_map(|named| manifests[&named.key].iter().cloned().chain([named.key.clone()]).collect::<Vec<_>>())
            .collect()
    }

    fn check(&self, seed: u64) {
        if self.changed.swap(false, Ordering::Relaxed) {
            let reachable = self.reachable();
            let objects = self.objects.lock().unwrap();
            for key in &reachable {
                assert!(objects.contains_key(key), "seed {seed}: {key} is needed and gone at {} h", self.now() / HOUR);
            }
        }
    }
}

fn change(state: HeadState, manifest: Option<ManifestRef>) -> Change {
    Change { state, manifest, record: serde_json::Value::Null }
}

fn lineage(head: &Head, commit: CommitId) -> Lineage {
    Lineage {
        sandbox: head.sandbox.clone(),
        seq: head.seq + 1,
        epoch: head.epoch,
        commit,
        parent: head.manifest.clone(),
    }
}

/// The packs of the pages, as the manifest has them.
async fn packs_of(world: &Arc<World>, named: &ManifestRef) -> Vec<PackEntry> {
    let object = world.store().get(&named.key).await.unwrap();
    let manifest = Manifest::decode_checked(&object.bytes, named.digest).unwrap();
    let map = &manifest.images[0].map;
    let pack = |page| match map.lookup(page) {
        Some(PageRef::Pack { pack, .. }) => manifest.packs[pack as usize].clone(),
        other => panic!("page {page} is {other:?}"),
    };
    (0..map.pages()).map(pack).collect()
}

/// A supervisor's life with one sandbox, from a start or a restart to an end.
async fn owner_life(world: Arc<World>, id: String, name: String, mut rng: SmallRng) {
    let owner = Owner::sandbox("t", &id).unwrap();
    let register = world.register(&owner);
    let Ok(found) = register.read().await else { return };
    let mut current = match found {
        None => {
            let attempt = Attempt::first(&id, &name, change(HeadState::Live, None), world.id()).unwrap();
            let Some(now) = world.commit(&owner, &attempt).await else { return };
            now
        }
        Some(found) => found,
    };
    loop {
        let head = current.head.clone();
        let attempt = match head.state {
            HeadState::Deleted if head.manifest.is_none() => return,
            HeadState::Deleted => {
                for _ in 0..rng.random_range(0..200) {
                    pause().await;
                }
                Attempt::undelete(&current, HeadState::Paused, &name, serde_json::Value::Null, world.id()).unwrap()
            }
            HeadState::Paused | HeadState::Stopped if rng.random_ratio(1, 6) => {
                Attempt::delete(&current, world.id()).unwrap()
            }
            HeadState::Paused | HeadState::Stopped => Attempt::claim(&current, &name, world.id()).unwrap(),
            // Ours from before a crash, or somebody's who is dead.
            HeadState::Live => Attempt::take_over(&current, &name, world.id()).unwrap(),
        };
        let Some(now) = world.commit(&owner, &attempt).await else { return };
        current = now;
        if current.head.state == HeadState::Live {
            let Some(now) = live(&world, &owner, current, &mut rng).await else { return };
            current = now;
        }
        for _ in 0..rng.random_range(0..30) {
            pause().await;
        }
    }
}

/// Captures, of which some fail and leave their packs to the next, until one of them is a pause; or a delete.
async fn live(world: &Arc<World>, owner: &Owner, mut current: Current, rng: &mut SmallRng) -> Option<Current> {
    let mut packs = match &current.head.manifest {
        Some(named) => packs_of(world, named).await,
        None => Vec::new(),
    };
    loop {
        let commit = world.id();
        let generation = owner.generation(current.head.seq + 1, current.head.epoch, commit);
        let mut n = 0;
        for page in 0..PAGES {
            if packs.len() <= page || rng.random_ratio(1, 3) {
                let entry = world.put_pack(generation.pack(n)).await;
                n += 1;
                match packs.get_mut(page) {
                    Some(known) => *known = entry,
                    None => packs.push(entry),
                }
            }
        }
        for _ in 0..rng.random_range(0..20) {
            pause().await;
        }
        let attempt = match rng.random_range(0..8) {
            // A run-ahead, or a pause that failed before the head was sent: what was sent is kept for the next.
            0..3 => continue,
            3 => Attempt::delete(&current, commit).unwrap(),
            4 => {
                let named = world.put_manifest(generation.manifest(), &packs, lineage(&current.head, commit)).await;
                let lost = Attempt::next(&current, change(HeadState::Paused, Some(named)), commit).unwrap();
                lost.cancel(Some(&current), world.id()).unwrap()
            }
            state => {
                let state = if state == 5 { HeadState::Live } else { HeadState::Paused };
                let named = world.put_manifest(generation.manifest(), &packs, lineage(&current.head, commit)).await;
                Attempt::next(&current, change(state, Some(named)), commit).unwrap()
            }
        };
        current = world.commit(owner, &attempt).await?;
        if current.head.state != HeadState::Live {
            return Some(current);
        }
    }
}

/// Makes new roots (sandboxes, named snapshots) of what the heads of others name, and deletes some of them.
async fn forks(world: Arc<World>, mut rng: SmallRng) {
    loop {
        for _ in 0..rng.random_range(0..60) {
            pause().await;
        }
        let from = Owner::sandbox("t", &format!("sb-{}", rng.random_range(0..3))).unwrap();
        let Ok(Some(source)) = world.register(&from).read().await else { continue };
        let Some(named) = source.head.manifest else { continue };
        let commit = world.id();
        let claims = Claims { owners: Vec::new(), manifests: vec![named.clone()] };
        let name = format!("fork-{commit}");
        let acquired = Lease::acquire(world.store(), true, ("t", &name), "a fork", claims, SHORTEST, world.now()).await;
        let lease = acquired.unwrap();
        let still =
            world.register(&from).read().await.unwrap().is_some_and(|now| now.head.manifest.as_ref() == Some(&named));
        if !still {
            lease.release().await.unwrap();
            continue;
        }
        let packs = packs_of(&world, &named).await;
        let id = commit.to_string();
        let of_sandbox = rng.random();
        let owner = if of_sandbox { Owner::sandbox("t", &id) } else { Owner::snapshot("t", &id) }.unwrap();
        // A sandbox has a head before anything else; a named snapshot gets one when it is whole.
        let mut before = None;
        if of_sandbox {
            let attempt = Attempt::first(&id, "forker", change(HeadState::Live, None), world.id()).unwrap();
            before = world.commit(&owner, &attempt).await;
        }
        let seq = 1 + u64::from(before.is_some());
        let lineage = Lineage { sandbox: id.clone(), seq, epoch: 1, commit, parent: Some(named) };
        let key = owner.generation(seq, 1, commit).manifest();
        let change = change(HeadState::Paused, Some(world.put_manifest(key, &packs, lineage).await));
        let attempt = match &before {
            Some(current) => Attempt::next(current, change, commit),
            None => Attempt::first(&id, "forker", change, commit),
        };
        let committed = {
            let _hurry = Hurry::new(&world);
            if !lease.is_valid(world.now()) {
                continue;
            }
            world.commit(&owner, &attempt.unwrap()).await
        };
        // The lease runs out by itself.
        let Some(current) = committed else { continue };
        if rng.random() {
            let attempt = Attempt::delete(&current, world.id()).unwrap();
            world.commit(&owner, &attempt).await;
        }
    }
}

async fn collect(world: &Arc<World>) -> gc::Report {
    let (clock, ids) = (world.clone(), world.clone());
    gc::run(&world.store(), &Arc::new(Seals::none()), &gc::Options::default(), &move || clock.now(), &move || ids.id())
        .await
        .unwrap()
}

async fn collector(world: Arc<World>, mut rng: SmallRng) {
    loop {
        let (clock, ids) = (world.clone(), world.clone());
        // Two collectors may write their memory at the same time: one of them is refused, and begins anew.
        let seals = Arc::new(Seals::none());
        let _ = gc::run(&world.store(), &seals, &gc::Options::default(), &move || clock.now(), &move || ids.id()).await;
        for _ in 0..rng.random_range(0..400) {
            pause().await;
        }
    }
}

type Actor = Pin<Box<dyn Future<Output = ()>>>;

fn actor(world: &Arc<World>, n: usize, life: u64, seed: u64) -> Actor {
    let rng = SmallRng::seed_from_u64(seed.wrapping_mul(1000).wrapping_add(n as u64).wrapping_add(life << 32));
    match n {
        0..3 => Box::pin(owner_life(world.clone(), format!("sb-{n}"), format!("host-{n}"), rng)),
        // A second host for the first sandbox.
        3 => Box::pin(owner_life(world.clone(), "sb-0".into(), "host-b".into(), rng)),
        4 => Box::pin(forks(world.clone(), rng)),
        _ => Box::pin(collector(world.clone(), rng)),
    }
}

fn finish<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    loop {
        if let Poll::Ready(done) = future.as_mut().poll(&mut context) {
            return done;
        }
    }
}

/// What a run came across: a schedule in which nothing happens shows nothing.
#[derive(Debug, Default)]
struct Met {
    deleted: u64,
    purged: u64,
    put_back: u64,
    forks: u64,
}

fn simulate(seed: u64, met: &mut Met) {
    const ACTORS: usize = 7;
    let world = Arc::new(World::default());
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut lives = 0;
    let mut actors: Vec<Actor> = (0..ACTORS).map(|n| actor(&world, n, 0, seed)).collect();
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..6000 {
        let n = rng.random_range(0..ACTORS);
        let objects = world.objects.lock().unwrap().len();
        let ended = actors[n].as_mut().poll(&mut context).is_ready();
        met.deleted += u64::from(world.objects.lock().unwrap().len() < objects);
        if ended || rng.random_ratio(1, 400) {
            lives += 1;
            actors[n] = actor(&world, n, lives, seed);
        }
        world.check(seed);
        let jump = world.hurried.load(Ordering::Relaxed) == 0 && rng.random_ratio(1, 60);
        let step = if jump { rng.random_range(0..30 * HOUR) } else { rng.random_range(0..200) };
        world.now.fetch_add(step, Ordering::Relaxed);
    }
    drop(actors);
    // Everybody is gone but the collector.
    for _ in 0..6 {
        world.now.fetch_add(80 * HOUR, Ordering::Relaxed);
        let report = finish(collect(&world));
        for tenant in &report.tenants {
            assert!(
                tenant.blocked.is_empty() && tenant.odd.is_empty(),
                "seed {seed}: {:?} {:?}",
                tenant.blocked,
                tenant.odd
            );
        }
        world.check(seed);
    }
    let reachable = world.reachable();
    let heads: BTreeMap<String, Head> = world.heads().into_iter().collect();
    for key in world.objects.lock().unwrap().keys() {
        let Some(place) = Place::of(key) else {
            assert!(!key.contains("/lease/"), "seed {seed}: {key} is left");
            continue;
        };
        let live = |epoch| {
            heads.get(&format!("{}head", place.owner)).is_some_and(|h| h.state == HeadState::Live && epoch >= h.epoch)
        };
        let needed = match place.part {
            Part::Head => true,
            Part::Generation { epoch, .. } => reachable.contains(key) || live(epoch),
            Part::Other => false,
        };
        assert!(needed, "seed {seed}: {key} is left");
    }
    for head in heads.values() {
        met.purged += u64::from(head.state == HeadState::Deleted && head.manifest.is_none() && head.seq > 2);
        met.forks += u64::from(head.owner == "forker");
        met.put_back += u64::from(head.state != HeadState::Deleted && head.epoch > 2);
    }
}

#[test]
fn nothing_needed_is_deleted_and_nothing_else_stays() {
    let mut met = Met::default();
    for seed in 0..100 {
        simulate(seed, &mut met);
    }
    assert!(met.deleted > 200 && met.purged > 200 && met.put_back > 40 && met.forks > 400, "{met:?}");
}
