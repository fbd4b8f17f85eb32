//! What is sealed opens, and nothing else does: each refusal by name. And no pair of key and nonce is used twice.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use ::bytes::Bytes;
use async_trait::async_trait;
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio_util::sync::CancellationToken;

use super::{cipher::witness, *};
use crate::{
    capture::{CaptureRequest, CodecChoice, ImageInput, Options, PageReader, capture},
    commit::{Attempt, Change, HeadState, HeadStorage, ObjectHead, Register},
    granted::PackSink,
    ids::{CommitId, Digest},
    image::ImageMap,
    layout::{Generation, Owner},
    manifest::{
        Arch, Boot, Header, Image, ImageKind, Lineage, Manifest, ManifestError, ManifestRef, Platform, StateBlob,
        Versioned,
    },
    pack::{Codec, PackEntry, test_entry},
    page::PAGE_SIZE,
    store::{ErrorKind, ObjectStore, Operation, Precondition, StoreError, directory::DirectoryStore},
};

/// The witness of nonces is one for the whole process.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn operator(n: u8) -> OperatorKey {
    OperatorKey::new(&[n; 32])
}

fn seals(n: u8) -> Seals {
    Seals::new(operator(n), Vec::new(), false)
}

fn data_key(n: u8) -> DataKey {
    DataKey::new(DataKeyId([n; 16]), &[n ^ 0x55; 32])
}

fn place(tenant: &str, id: &str, seq: u64, epoch: u64) -> String {
    Owner::sandbox(tenant, id).unwrap().generation(seq, epoch, CommitId([seq as u8; 16])).manifest()
}

/// A manifest whose one pack and whose state are encrypted under data key 1.
fn manifest() -> Manifest {
    let mut pack = test_entry("v1/t/sandbox/s/3-1-00/pack/0", &[4]);
    for frame in &mut pack.frames {
        frame.stored_len += TAG as u32;
    }
    pack.size += TAG as u32;
    pack.sealed = Some(data_key(1).id());
    let pages =
        vec![crate::image::Run { start: 0, pages: 4, at: crate::image::PageRef::Pack { pack: 0, frame: 0, index: 0 } }];
    let mut manifest = Manifest {
        arch: Arch::X86_64,
        platform: Platform::default(),
        spec: Versioned::default(),
        record: Versioned::default(),
        lineage: Some(Lineage { sandbox: "s".into(), seq: 3, epoch: 1, commit: CommitId([3; 16]), parent: None }),
        packs: vec![pack],
        images: vec![Image { kind: ImageKind::Memory, map: ImageMap::zero(9).overlay(&pages).unwrap(), base: None }],
        state: vec![StateBlob { kind: "vcpu/0".into(), version: 1, bytes: b"registers of a guest".to_vec() }],
        sealed_state: None,
        boot: Boot::default(),
    };
    manifest.seal_state(&data_key(1), [9; 32]).unwrap();
    manifest
}

fn sealed(seals: &Seals, place: &str) -> Vec<u8> {
    let wrapped = seals.wrap(&data_key(1), [7; 12]).unwrap();
    seals.seal_manifest(place, manifest().encode().unwrap(), &[wrapped]).unwrap()
}

fn named(key: &str, object: &[u8]) -> ManifestRef {
    ManifestRef { key: key.to_owned(), digest: Digest::of(object) }
}

#[test]
fn a_sealed_manifest_opens_for_its_place_alone() {
    let _turn = turn();
    let (mine, key) = (seals(1), place("t", "s", 3, 1));
    let object = sealed(&mine, &key);
    let (mut opened, keys) = Manifest::open(&named(&key, &object), &object, &mine).unwrap();
    assert_eq!(opened, manifest());
    assert!(opened.state.is_empty() && !opened.is_disks_only());
    let data = mine.unwrap_all(&keys).unwrap();
    opened.open_state(&data).unwrap();
    assert_eq!(opened.state_of("vcpu/0").unwrap().bytes, b"registers of a guest");
    assert!(!object.windows(9).any(|window| window == b"registers"), "the state is not readable");

    let refused = |seals: &Seals, key: &str, object: &[u8]| match Manifest::open(&named(key, object), object, seals) {
        Err(ManifestError::Seal(error)) => error,
        other => panic!("{other:?}"),
    };
    let newer = place("t", "s", 5, 2);
    assert_eq!(refused(&mine, &newer, &object), SealError::Replayed { of: key.clone() });
    for elsewhere in [place("t", "other", 3, 1), place("u", "s", 3, 1), place("t", "s", 2, 1)] {
        assert_eq!(refused(&mine, &elsewhere, &object), SealError::Swapped { of: key.clone() }, "{elsewhere}");
    }
    let lost = refused(&seals(2), &key, &object);
    assert!(matches!(&lost, SealError::KeyUnknown { key, .. } if *key == operator(1).id()), "{lost}");
    assert!(lost.to_string().contains(&operator(2).id().to_string()), "{lost}");
    assert!(refused(&Seals::none(), &key, &object).to_string().contains("no key is"));
    let plain = manifest().encode().unwrap();
    assert_eq!(refused(&mine, &key, &plain), SealError::NotSealed);
    let lenient = Seals::new(operator(1), Vec::new(), true);
    assert_eq!(lenient.open_manifest(&key, &plain).unwrap().under, None);
    // Without its envelope it has lost its keys.
    assert_eq!(refused(&lenient, &key, &plain), SealError::NoDataKey(data_key(1).id()));
    assert_eq!(Manifest::decode(&object), Ok(manifest()), "digests can be checked without a key");
    assert_eq!(manifest_sealed_under(&object), Some((operator(1).id(), vec![operator(1).id()])));
}

#[test]
fn every_flipped_bit_and_every_truncation_of_a_sealed_manifest_is_refused_by_name() {
    let _turn = turn();
    let (mine, key) = (seals(1), place("t", "s", 3, 1));
    let object = sealed(&mine, &key);
    for bit in 0..object.len() * 8 {
        let mut damaged = object.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        // As one who can write the head's digest, too.
        match Manifest::open(&named(&key, &damaged), &damaged, &mine) {
            Err(ManifestError::Seal(SealError::Tampered)) => {}
            other => panic!("bit {bit}: {other:?}"),
        }
    }
    for len in 0..object.len() {
        let short = &object[..len];
        match Manifest::open(&named(&key, short), short, &mine) {
            Err(ManifestError::Seal(SealError::Truncated { got, .. })) => assert_eq!(got, len as u64),
            other => panic!("{len} bytes: {other:?}"),
        }
    }
    // With the digests put right again, which anybody can.
    let header = Header::read(&object).unwrap();
    let inner = 64 + header.sections as usize;
    for at in [64 + 8, 64 + 20, inner + 30, inner + 200, object.len() - 1] {
        let mut forged = object.clone();
        forged[at] ^= 1;
        let seal = Digest::of(&forged[64..inner]);
        forged[24..56].copy_from_slice(&seal.0);
        let check = Digest::of(&forged[..56]);
        forged[56..64].copy_from_slice(&check.0[..8]);
        let refused = mine.open_manifest(&key, &forged).unwrap_err();
        assert!(matches!(refused, SealError::Tampered | SealError::Malformed(_)), "{at}: {refused}");
    }
}

#[test]
fn an_older_reader_names_what_it_does_not_know() {
    let _turn = turn();
    let object = sealed(&seals(1), &place("t", "s", 3, 1));
    assert_eq!(Header::read(&object).unwrap().version, 2, "which a reader of version 1 refuses by name");
    // And what is encrypted without a seal has required sections that it does not know.
    let plain = manifest().encode().unwrap();
    let kinds: Vec<(u32, u16)> = plain[64..64 + 56 * 10]
        .chunks_exact(56)
        .map(|entry| (u32::from_le_bytes(entry[..4].try_into().unwrap()), u16::from_le_bytes([entry[6], entry[7]])))
        .collect();
    assert!(kinds.contains(&(9, 1)) && kinds.contains(&(10, 1)), "{kinds:?}");
    let mut clear = manifest();
    clear.packs.clear();
    clear.images[0].map = ImageMap::zero(9);
    clear.sealed_state = None;
    assert_eq!(Header::read(&clear.encode().unwrap()).unwrap().sections, 8, "what is not encrypted is as it was");
}

#[test]
fn a_sealed_head_opens_for_its_key_alone() {
    let _turn = turn();
    let (mine, key) = (seals(1), Owner::sandbox("t", "s").unwrap().head());
    let change = Change { state: HeadState::Live, manifest: None, record: serde_json::json!({"a": "}{\"mac\":"}) };
    let attempt = Attempt::first("s", "host", change, CommitId([1; 16])).unwrap();
    let body = attempt.head().encode().unwrap();
    let object = mine.seal_head(&key, body.as_bytes());
    assert_eq!(mine.open_head(&key, &object), Ok(body.as_bytes()));
    assert!(serde_json::from_slice::<serde_json::Value>(&object).is_ok(), "it is JSON, for people too");
    assert_eq!(&crate::commit::Head::decode(&object).unwrap(), attempt.head());
    assert_eq!(head_sealed_under(&object), Some(operator(1).id()));

    let other = Owner::sandbox("u", "s").unwrap().head();
    assert_eq!(mine.open_head(&other, &object), Err(SealError::Swapped { of: key.clone() }));
    assert!(matches!(seals(2).open_head(&key, &object), Err(SealError::KeyUnknown { .. })));
    assert_eq!(mine.open_head(&key, body.as_bytes()), Err(SealError::NotSealed));
    for bit in 0..object.len() * 8 {
        let mut damaged = object.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(mine.open_head(&key, &damaged).is_err(), "bit {bit}");
    }
    for len in 0..object.len() {
        assert!(mine.open_head(&key, &object[..len]).is_err(), "{len} bytes");
    }
}

#[test]
fn keys_do_not_print_and_are_wrapped_for_one_operator() {
    let _turn = turn();
    let key = data_key(4);
    let secret = "51".repeat(32);
    assert!(!format!("{key:?} {:?} {:?}", operator(1), seals(1)).contains(&secret[..8]));
    let json = serde_json::to_string(&key).unwrap();
    assert!(json.contains(&secret), "a VMM is told");
    assert_eq!(serde_json::from_str::<DataKey>(&json).unwrap(), key);
    let wrong = serde_json::from_str::<DataKey>(&json.replace(&secret, "hush")).unwrap_err().to_string();
    assert!(!wrong.contains("hush"), "{wrong}");

    let wrapped = seals(1).wrap(&key, [3; 12]).unwrap();
    assert_eq!(seals(1).unwrap(&wrapped), Ok(key.clone()));
    let json = serde_json::to_string(&wrapped).unwrap();
    assert_eq!(serde_json::from_str::<WrappedKey>(&json).unwrap(), wrapped);
    assert!(!json.contains(&secret));
    assert!(matches!(seals(2).unwrap(&wrapped), Err(SealError::KeyUnknown { .. })));
    let other = WrappedKey { id: DataKeyId([5; 16]), ..wrapped.clone() };
    assert_eq!(seals(1).unwrap(&other), Err(SealError::Wrapped(other.id)));
    assert_eq!(Seals::new(operator(2), vec![operator(1)], false).unwrap(&wrapped), Ok(key));

    let text = OperatorKey::file_text(&[8; 32]);
    assert_eq!(OperatorKey::parse(&text).unwrap().id(), operator(8).id());
    for bad in ["", "hello", &text[1..], &text[..text.len() - 2], &text.to_uppercase()] {
        assert_eq!(OperatorKey::parse(bad).unwrap_err(), KeyFileError::Form);
    }
}

#[test]
fn sealed_bytes_open_for_their_purpose_and_place() {
    let _turn = turn();
    let sealed = seals(1).seal_bytes("policy", "v1/t/sandbox/s/", [1; 12], b"a token").unwrap();
    assert_eq!(&seals(1).open_bytes("policy", "v1/t/sandbox/s/", &sealed).unwrap()[..], b"a token");
    let old = Seals::new(operator(2), vec![operator(1)], false);
    assert_eq!(&old.open_bytes("policy", "v1/t/sandbox/s/", &sealed).unwrap()[..], b"a token");
    for (purpose, place) in [("policy", "v1/u/sandbox/s/"), ("other", "v1/t/sandbox/s/"), ("policyv", "1/t/sandbox/s/")]
    {
        assert_eq!(seals(1).open_bytes(purpose, place, &sealed), Err(SealError::Bytes));
    }
    assert!(matches!(seals(2).open_bytes("policy", "v1/t/sandbox/s/", &sealed), Err(SealError::KeyUnknown { .. })));
    for len in 0..sealed.len() {
        assert!(seals(1).open_bytes("policy", "v1/t/sandbox/s/", &sealed[..len]).is_err());
    }
    assert_eq!(Seals::none().seal_bytes("policy", "x", [0; 12], b""), None);
}

#[test]
fn a_frame_opens_in_its_place_alone() {
    let _turn = turn();
    let cipher = PackCipher::new(&data_key(1), "a/pack/0");
    let info = FrameInfo { number: 3, pages: 2, codec: Codec::Lz4 };
    let mut frame = [&b"compressed"[..], &[0; TAG]].concat();
    cipher.seal(info, &mut frame);
    assert_eq!(cipher.open(info, &frame).as_deref(), Some(&b"compressed"[..]));
    for other in
        [FrameInfo { number: 2, ..info }, FrameInfo { pages: 3, ..info }, FrameInfo { codec: Codec::Raw, ..info }]
    {
        assert_eq!(cipher.open(other, &frame), None);
    }
    assert_eq!(PackCipher::new(&data_key(1), "a/pack/1").open(info, &frame), None);
    assert_eq!(PackCipher::new(&data_key(2), "a/pack/0").open(info, &frame), None);
    for bit in 0..frame.len() * 8 {
        let mut damaged = frame.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(cipher.open(info, &damaged), None);
    }
    for len in 0..frame.len() {
        assert_eq!(cipher.open(info, &frame[..len]), None);
    }
}

/// A guest's memory that stands still.
struct Still(Vec<u8>);

impl PageReader for Still {
    fn read(&self, first_page: u64, into: &mut [u8]) -> std::io::Result<()> {
        let at = first_page as usize * PAGE_SIZE;
        into.copy_from_slice(&self.0[at..at + into.len()]);
        Ok(())
    }
}

/// Packs under granted names; some PUTs are made twice, as by a retry, and some fail.
struct Granted {
    generation: Generation,
    stored: Mutex<HashMap<String, Bytes>>,
    fails: Option<u32>,
}

#[async_trait]
impl PackSink for Granted {
    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        let key = self.generation.pack(n);
        if self.fails == Some(n) {
            return Err(StoreError::new(ErrorKind::Forbidden, Operation::Put, key));
        }
        for _ in 0..2 {
            let before = self.stored.lock().unwrap().insert(key.clone(), bytes.clone());
            assert!(before.is_none_or(|before| before == bytes), "what is sent again is the same bytes");
        }
        Ok(key)
    }

    fn key(&self, n: u32) -> Option<String> {
        Some(self.generation.pack(n))
    }
}

async fn capture_once(rng: &mut SmallRng, key: &DataKey, generation: Generation) -> Result<Vec<PackEntry>, ()> {
    let pages = rng.random_range(1..300u64);
    let mut memory = vec![0; pages as usize * PAGE_SIZE];
    rng.fill(&mut memory[..]);
    let fails = (rng.random_range(0..4) == 0).then_some(0);
    let sink = Arc::new(Granted { generation, stored: Mutex::default(), fails });
    let request = CaptureRequest {
        images: vec![ImageInput {
            kind: ImageKind::Memory,
            parent: ImageMap::zero(pages),
            look_at: vec![0..pages],
            reader: Arc::new(Still(memory)),
            base: None,
            digests: None,
            rewrite: Vec::new(),
        }],
        parent_packs: Vec::new(),
        threads: None,
        sink,
        options: Options {
            codec: CodecChoice::Fixed(Codec::Lz4),
            boot_pages: rng.random_range(0..40),
            ..Options::default()
        },
        cancel: CancellationToken::new(),
        progress: None,
        connections: None,
        seal: Some(key.clone()),
    };
    capture(request).await.map(|captured| captured.packs).map_err(drop)
}

/// Sandboxes that are captured, fail, are captured again and rotated, and whose keys and secrets are sealed: all pairs that were used.
async fn history(seed: u64, reuse_a_name: bool) -> Vec<([u8; 32], [u8; 12])> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let random = |rng: &mut SmallRng| -> [u8; 32] { rng.random() };
    let operators: Vec<Seals> =
        (0..2).map(|_| Seals::new(OperatorKey::new(&random(&mut rng)), Vec::new(), false)).collect();
    let sandboxes: Vec<DataKey> = (0..3).map(|_| DataKey::new(DataKeyId(rng.random()), &random(&mut rng))).collect();
    witness::begin();
    let mut last = None;
    for seq in 1..12u64 {
        let n = rng.random_range(0..sandboxes.len());
        let owner = Owner::sandbox("t", &format!("s{n}")).unwrap();
        let generation = owner.generation(seq, 1, CommitId(rng.random()));
        let _ = capture_once(&mut rng, &sandboxes[n], generation.clone()).await;
        last = Some((n, generation));
        sandboxes[n].seal_state(random(&mut rng), vec![1; 100]);
        let operator = &operators[rng.random_range(0..operators.len())];
        operator.wrap(&sandboxes[n], rng.random()).unwrap();
        operator.seal_bytes("p", "x", rng.random(), b"secret").unwrap();
    }
    if let (true, Some((n, generation))) = (reuse_a_name, last) {
        // Twice more, since one of them may be made to fail before it seals anything.
        for _ in 0..2 {
            let _ = capture_once(&mut rng, &sandboxes[n], generation.clone()).await;
        }
    }
    witness::end()
}

fn repeated(pairs: &[([u8; 32], [u8; 12])]) -> usize {
    pairs.len() - pairs.iter().collect::<HashSet<_>>().len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    #[test]
    fn no_nonce_is_used_twice_under_a_key(seed in any::<u64>()) {
        let _turn = turn();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let pairs = runtime.block_on(history(seed, false));
        prop_assert!(pairs.len() > 40, "{} pairs", pairs.len());
        prop_assert_eq!(repeated(&pairs), 0);
        // The canary: a name that is granted twice is found.
        let pairs = runtime.block_on(history(seed, true));
        prop_assert!(repeated(&pairs) > 0);
    }

    /// Whatever the bytes are: no panic, and what opens was sealed.
    #[test]
    fn hostile_envelopes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), at in any::<prop::sample::Index>()) {
        let _turn = turn();
        let key = place("t", "s", 3, 1);
        let object = sealed(&seals(1), &key);
        let mut spliced = object.clone();
        let at = at.index(object.len());
        spliced.splice(at..(at + bytes.len()).min(object.len()), bytes.iter().copied());
        for input in [&bytes, &spliced] {
            let opened = seals(1).open_manifest(&key, input);
            prop_assert!(opened.is_err() || *input == object);
            let _ = Manifest::decode(input);
            let _ = manifest_sealed_under(input);
            prop_assert!(seals(1).open_head(&key, input).is_err());
            prop_assert!(seals(1).open_bytes("p", "x", input).is_err());
        }
    }
}

struct Draws(Mutex<SmallRng>);

impl rotate::Random for Draws {
    fn commit(&self) -> CommitId {
        CommitId(self.0.lock().unwrap().random())
    }

    fn nonce(&self) -> [u8; 12] {
        self.0.lock().unwrap().random()
    }
}

/// A head in this state, with a manifest, sealed with these keys.
async fn stored(objects: &Arc<dyn ObjectStore>, seals: &Arc<Seals>, owner: &Owner, id: &str, state: HeadState) {
    let commit = CommitId([2; 16]);
    let key = owner.generation(2, 1, commit).manifest();
    let object = sealed(seals, &key);
    let named = named(&key, &object);
    objects.put(&key, object.into(), &Precondition::IfAbsent).await.unwrap();
    let register = Register::new(ObjectHead::new(objects.clone(), owner.head()).sealed(seals));
    let record = serde_json::json!({"version": 1, "body": {}});
    let change = |state, manifest| Change { state, manifest, record: record.clone() };
    let mut attempts = vec![Attempt::first(id, "host", change(HeadState::Live, None), CommitId([1; 16])).unwrap()];
    let now = commit_of(&register, &attempts[0]).await;
    let rest = if state == HeadState::Deleted { HeadState::Paused } else { state };
    attempts.push(Attempt::next(&now, change(rest, Some(named)), commit).unwrap());
    let now = commit_of(&register, &attempts[1]).await;
    if state == HeadState::Deleted {
        commit_of(&register, &Attempt::delete(&now, CommitId([3; 16])).unwrap()).await;
    }
}

async fn commit_of(register: &Register<ObjectHead>, attempt: &Attempt) -> crate::commit::Current {
    let mut pacer = crate::commit::Backoff::within(std::time::Duration::from_secs(5));
    match register.commit(attempt, crate::commit::Sent::Never, &mut pacer).await {
        crate::commit::Outcome::Committed { now } => now,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_rotation_moves_what_sleeps_and_says_what_still_needs_the_old_key() {
    let _turn = turn();
    tokio::runtime::Runtime::new().unwrap().block_on(rotation());
}

async fn rotation() {
    let dir = tempfile::tempdir().unwrap();
    let objects: Arc<dyn ObjectStore> = Arc::new(DirectoryStore::open(dir.path()).unwrap());
    let old = Arc::new(seals(1));
    let sandbox = |id: &str| Owner::sandbox("t", id).unwrap();
    for (id, state) in
        [("a", HeadState::Paused), ("b", HeadState::Stopped), ("c", HeadState::Live), ("d", HeadState::Deleted)]
    {
        stored(&objects, &old, &sandbox(id), id, state).await;
    }
    let snapshot = Owner::snapshot("t", "snap").unwrap();
    stored(&objects, &old, &snapshot, "snap", HeadState::Paused).await;

    let both = Arc::new(Seals::new(operator(2), vec![operator(1)], false));
    let draws = Draws(Mutex::new(SmallRng::seed_from_u64(1)));
    let options = rotate::Options { tenant: None, dry_run: true, limit: usize::MAX, conditional: true };
    let (one, two) = (operator(1).id().to_string(), operator(2).id().to_string());
    let pass = async |options: rotate::Options| rotate::rotate(&objects, &both, &options, &draws).await.unwrap();
    let dry = pass(options.clone()).await;
    assert_eq!((dry.heads, dry.current, dry.moved.len(), dry.left.len()), (5, 0, 3, 2), "{dry:?}");
    assert_eq!(dry.needed[&one], 5);
    // Bounded, and gone on with.
    let first = pass(rotate::Options { dry_run: false, limit: 1, ..options.clone() }).await;
    assert_eq!((first.moved.len(), first.needed[&one], first.needed[&two]), (1, 4, 1), "{first:?}");
    let rest = pass(rotate::Options { dry_run: false, ..options.clone() }).await;
    assert_eq!((rest.current, rest.moved.len(), rest.left.len()), (1, 2, 2), "{rest:?}");
    assert_eq!((rest.needed[&one], rest.needed[&two]), (2, 3));
    assert!(rest.left.iter().any(|left| left.why.contains("runs it")));
    assert!(rest.left.iter().any(|left| left.why.contains("deleted")));
    let again = pass(rotate::Options { dry_run: false, ..options.clone() }).await;
    assert_eq!((again.current, again.moved.len()), (3, 0));

    // Without the old key: what was moved opens, the rest says which key it wants.
    let new = Arc::new(seals(2));
    for (owner, state) in
        [(sandbox("a"), HeadState::Paused), (sandbox("b"), HeadState::Stopped), (snapshot, HeadState::Paused)]
    {
        let register = Register::new(ObjectHead::new(objects.clone(), owner.head()).sealed(&new));
        let head = register.read().await.unwrap().unwrap().head;
        assert_eq!((head.state, head.seq, head.epoch), (state, 3, 1));
        let named = head.manifest.unwrap();
        let object = objects.get(&named.key).await.unwrap();
        let (mut moved, keys) = Manifest::open(&named, &object.bytes, &new).unwrap();
        moved.open_state(&new.unwrap_all(&keys).unwrap()).unwrap();
        assert_eq!(moved.state_of("vcpu/0").unwrap().bytes, b"registers of a guest");
        assert_eq!(moved.lineage.unwrap().seq, 3);
    }
    let live = ObjectHead::new(objects.clone(), sandbox("c").head()).sealed(&new).read().await.unwrap_err();
    let cause = std::error::Error::source(&live).unwrap().to_string();
    assert!(cause.contains(&one) && cause.contains("not configured"), "{cause}");
}
