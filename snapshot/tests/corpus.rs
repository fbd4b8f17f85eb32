//! The format corpus: a small snapshot of every released format version, as files, and what must come of restoring it.
//!
//! `corpus/v1` is a bucket in a directory: one sandbox of three generations, each written with another codec, with a boot pack, a memory of 96 pages
//! and a disk of 40 pages over a template of 24 blocks. Its pages are made by [`content`], so that they can be made again. `digests.json` holds the
//! BLAKE3 of both restored images.
//!
//! `corpus/v2` is the same sealed: under the operator's key of [`seals`], with packs and state encrypted.
//!
//! Files of a released version are never changed. A new version gets a new folder: raise [`NEW`], and run
//! `cargo test -p stasis-snapshot --test corpus -- --ignored`.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod support;

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use serde_json::{Value, json};
use stasis_snapshot::{
    capture::{BaseInput, BlockIndex, CaptureRequest, Captured, CodecChoice, ImageInput, Options, capture},
    commit::{Head, HeadState},
    granted::{PackSink, PackSource},
    ids::{CommitId, Digest},
    image::PageRef,
    layout::{Generation, Owner},
    manifest::{
        Arch, Base, Boot, Image, ImageKind, Lineage, Manifest, ManifestRef, Platform, StateBlob, Touch, Versioned,
    },
    pack::Codec,
    page::PAGE_SIZE,
    restore::{self, PageWriter, restore},
    seal::{DataKey, DataKeyId, DataKeys, OperatorKey, Seals},
    store::{ObjectStore, Precondition, StoreError, directory::DirectoryStore},
    verify::{verify, verify_bucket},
};
use support::{Pages, first_capture};
use tokio_util::sync::CancellationToken;

/// What the generator writes.
const NEW: &str = "v2";
const BLOCKS: u64 = 24;

fn folder(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(version)
}

/// Page contents: text that compresses, or bytes that do not.
fn content(seed: u64, noise: bool) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    if noise {
        return (0..PAGE_SIZE / 8).flat_map(|_| next().to_le_bytes()).collect();
    }
    let words = [next(), next(), next()];
    (0..PAGE_SIZE / 8).flat_map(|i| words[i * i % 3].to_le_bytes()).collect()
}

/// The template's disk.
fn template() -> Arc<Pages> {
    let blocks = Arc::new(Pages::zero(BLOCKS));
    (0..BLOCKS).for_each(|block| blocks.set(block, &content(1000 + block, block == 3)));
    blocks
}

fn owner() -> Owner {
    Owner::sandbox("corpus", "sbx-corpus").unwrap()
}

/// A store as the packs' place.
struct Bucket {
    store: DirectoryStore,
    generation: Option<Generation>,
}

/// What `v2` is sealed with.
fn seals() -> Seals {
    Seals::new(OperatorKey::new(&[7; 32]), Vec::new(), false)
}

fn data_key() -> DataKey {
    DataKey::new(DataKeyId([8; 16]), &[9; 32])
}

#[async_trait]
impl PackSink for Bucket {
    fn key(&self, n: u32) -> Option<String> {
        Some(self.generation.as_ref()?.pack(n))
    }

    async fn put(&self, n: u32, bytes: Bytes) -> Result<String, StoreError> {
        let key = self.generation.as_ref().unwrap().pack(n);
        self.store.put(&key, bytes, &Precondition::IfAbsent).await?;
        Ok(key)
    }
}

#[async_trait]
impl PackSource for Bucket {
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.store.get_range(key, range).await
    }
}

async fn restored(store: &DirectoryStore, manifest: &Manifest, keys: DataKeys) -> Vec<Digest> {
    let base = template();
    let targets: Vec<_> = manifest
        .images
        .iter()
        .map(|image| Arc::new(Pages { base: Some(base.clone()), ..Pages::zero(image.map.pages()) }))
        .collect();
    let writers: Vec<Arc<dyn PageWriter>> = targets.iter().map(|target| target.clone() as _).collect();
    let source = Arc::new(Bucket { store: store.clone(), generation: None });
    restore(manifest, &writers, (source, keys), restore::Options::default(), &CancellationToken::new()).await.unwrap();
    targets.iter().map(|target| Digest::of(&target.snapshot())).collect()
}

fn read_head(folder: &Path) -> Head {
    Head::decode(&std::fs::read(folder.join(owner().head())).unwrap()).unwrap()
}

#[tokio::test]
async fn version_1_restores_to_what_it_was() {
    restores_to_what_it_was("v1", &Seals::none()).await;
}

#[tokio::test]
async fn version_2_restores_to_what_it_was() {
    restores_to_what_it_was("v2", &seals()).await;
    let folder = folder("v2");
    let store = DirectoryStore::open(&folder).unwrap();
    let named = read_head(&folder).manifest.unwrap();
    let object = store.get(&named.key).await.unwrap();
    for other in [Seals::new(OperatorKey::new(&[1; 32]), Vec::new(), true), Seals::none()] {
        let refused = Manifest::open(&named, &object.bytes, &other).unwrap_err().to_string();
        assert!(refused.contains(&seals().current().unwrap().to_string()), "{refused}");
    }
    let bucket = verify_bucket(&store, None, &Seals::none()).await.unwrap();
    assert!(bucket.checked.problems.is_empty(), "{bucket:?}");
    assert_eq!((bucket.checked.seals_not_checked, bucket.checked.frames), (2, 0));
    // Nothing of memory, disk or state is readable: each word of a page's content stands in it many times, whatever the codec.
    let words: Vec<[u8; 8]> =
        [111, 212, 313, 523, 1024, 1527].map(|seed| content(seed, false)[..8].try_into().unwrap()).into();
    for pack in Manifest::decode(&object.bytes).unwrap().packs {
        let bytes = store.get(&pack.key).await.unwrap().bytes;
        assert!(!bytes.windows(8).any(|window| words.iter().any(|word| window == word)), "{}", pack.key);
    }
    assert!(!object.bytes.windows(8).any(|window| window == [7; 8]));
}

async fn restores_to_what_it_was(version: &str, seals: &Seals) {
    let folder = folder(version);
    let store = DirectoryStore::open(&folder).unwrap();
    let head = read_head(&folder);
    assert_eq!((head.state, head.seq, head.epoch), (HeadState::Paused, 3, 1));
    let named = head.manifest.unwrap();
    let object = store.get(&named.key).await.unwrap();
    let (mut manifest, keys) = Manifest::open(&named, &object.bytes, seals).unwrap();
    let keys = seals.unwrap_all(&keys).unwrap();
    manifest.open_state(&keys).unwrap();

    let digests: Value = serde_json::from_slice(&std::fs::read(folder.join("digests.json")).unwrap()).unwrap();
    let expected: Vec<Digest> = serde_json::from_value(json!([digests["memory"], digests["disk"]])).unwrap();
    assert_eq!(restored(&store, &manifest, keys).await, expected);
    assert!(verify(&store, &named, seals).await.unwrap().problems.is_empty());
    let bucket = verify_bucket(&store, None, seals).await.unwrap();
    assert_eq!((bucket.heads, bucket.checked.problems.len()), (1, 0), "{bucket:?}");
    assert_eq!((bucket.checked.seals_not_checked, bucket.checked.frames_not_opened), (0, 0));

    // What the corpus is there for is in it.
    let codecs: Vec<Codec> =
        manifest.packs.iter().flat_map(|pack| pack.frames.iter().map(|frame| frame.codec)).collect();
    for codec in [Codec::Raw, Codec::Lz4, Codec::Zstd] {
        assert!(codecs.contains(&codec), "{codec:?}");
    }
    let has = |image: &Image, wanted: fn(PageRef) -> bool| image.map.runs().iter().any(|run| wanted(run.at));
    let (memory, disk) = (manifest.memory().unwrap(), manifest.disk(0).unwrap());
    for image in [memory, disk] {
        assert!(has(image, |at| at == PageRef::Zero) && has(image, |at| matches!(at, PageRef::Pack { .. })));
        assert!(has(image, |at| matches!(at, PageRef::Base { .. })));
    }
    assert_eq!(manifest.state_of("vcpu/0").unwrap().bytes, [7; 40]);
    assert_eq!(manifest.platform.cpu_vendor, "AuthenticAMD");
    assert_eq!(manifest.lineage.unwrap().seq, 3);
    assert!(manifest.boot.pack.is_some() && !manifest.boot.first_touch.is_empty());
    assert_eq!((manifest.record.version, manifest.spec.version), (1, 1));
}

/// Writes the corpus of the present format version anew.
#[tokio::test]
#[ignore = "writes into the source tree; only for a new format version"]
async fn make() {
    let seals = seals();
    let wrapped = seals.wrap(&data_key(), [10; 12]).unwrap();
    let folder = folder(NEW);
    assert!(!folder.join("v1").exists(), "{} is there already: a released version is never changed", folder.display());
    std::fs::create_dir_all(&folder).unwrap();
    let store = DirectoryStore::open(&folder).unwrap();
    let base = template();
    let index = Arc::new(BlockIndex::build(&*base, BLOCKS).unwrap());
    let input =
        |same_offset| BaseInput { reader: base.clone(), blocks: BLOCKS, same_offset, index: Some(index.clone()) };
    let images = [Arc::new(Pages::zero(96)), Arc::new(Pages::zero(40))];
    for block in 0..BLOCKS {
        images[1].set(block, &base.page(block));
    }
    images[0].set(50, &base.page(5));
    let mut parent: Option<(Captured, ManifestRef)> = None;
    let mut head = None;
    for (seq, codec) in [(1, Codec::Lz4), (2, Codec::Zstd), (3, Codec::Raw)] {
        // Each generation writes over a part of what the one before wrote.
        let memory = (seq - 1) * 12..(seq - 1) * 12 + 20;
        let disk = 20 + seq * 3..26 + seq * 3;
        for page in memory.clone() {
            images[0].set(page, &content(seq * 100 + page, seq == 3 && page % 8 == 0));
        }
        for page in disk.clone() {
            images[1].set(page, &content(seq * 500 + page, false));
        }
        images[0].set(memory.start + 1, &[0; PAGE_SIZE]);
        let mut inputs = vec![
            first_capture(ImageKind::Memory, &images[0], Some(input(false))),
            first_capture(ImageKind::Disk(0), &images[1], Some(input(true))),
        ];
        if let Some((parent, _)) = &parent {
            for ((input, map), dirty) in inputs.iter_mut().zip(&parent.maps).zip([memory, disk]) {
                let ImageInput { parent, look_at, .. } = input;
                parent.clone_from(map);
                *look_at = vec![dirty];
            }
        }
        let commit = CommitId([seq as u8; 16]);
        let generation = owner().generation(seq, 1, commit);
        let captured = capture(CaptureRequest {
            images: inputs,
            parent_packs: parent.as_ref().map_or(Vec::new(), |(parent, _)| parent.packs.clone()),
            threads: None,
            sink: Arc::new(Bucket { store: store.clone(), generation: Some(generation.clone()) }),
            options: Options { codec: CodecChoice::Fixed(codec), boot_pages: 6, ..Options::default() },
            cancel: CancellationToken::new(),
            progress: None,
            connections: None,
            seal: Some(data_key()),
        })
        .await
        .unwrap();
        let named = parent.as_ref().map(|(_, named)| named.clone());
        let lineage = Lineage { sandbox: "sbx-corpus".into(), seq, epoch: 1, commit, parent: named };
        let mut manifest = manifest(&captured, lineage);
        manifest.seal_state(&data_key(), [seq as u8; 32]).unwrap();
        let key = generation.manifest();
        let bytes = seals.seal_manifest(&key, manifest.encode().unwrap(), std::slice::from_ref(&wrapped)).unwrap();
        let named = ManifestRef { key, digest: Digest::of(&bytes) };
        store.put(&named.key, bytes.into(), &Precondition::IfAbsent).await.unwrap();
        parent = Some((captured, named.clone()));
        head = Some(Head {
            format: 1,
            sandbox: "sbx-corpus".into(),
            state: HeadState::Paused,
            epoch: 1,
            owner: "corpus".into(),
            seq,
            commit,
            parent: (seq > 1).then(|| CommitId([seq as u8 - 1; 16])),
            ancestors: (1..seq.saturating_sub(1)).rev().map(|n| CommitId([n as u8; 16])).collect(),
            manifest: Some(named),
            record: json!({"version": 1, "body": {"note": "not a record of a supervisor"}}),
        });
    }
    let head = head.unwrap();
    let sealed = seals.seal_head(&owner().head(), head.encode().unwrap().as_bytes());
    store.put(&owner().head(), sealed.into(), &Precondition::IfAbsent).await.unwrap();
    let digests = images.map(|image| Digest::of(&image.snapshot()));
    let named = head.manifest.unwrap();
    let object = store.get(&named.key).await.unwrap();
    let (manifest, keys) = Manifest::open(&named, &object.bytes, &seals).unwrap();
    assert_eq!(restored(&store, &manifest, seals.unwrap_all(&keys).unwrap()).await, digests);
    let text = serde_json::to_string_pretty(&json!({"memory": digests[0], "disk": digests[1]})).unwrap();
    std::fs::write(folder.join("digests.json"), text + "\n").unwrap();
    let _ = std::fs::remove_file(folder.join(".lock"));
    seed_the_fuzzers(&folder, &named);
}

/// What the fuzz targets `manifest` and `seal` begin with; `frame` has the frames of version 1, which are what is in those of version 2.
fn seed_the_fuzzers(folder: &Path, named: &ManifestRef) {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    let bytes = std::fs::read(folder.join(&named.key)).unwrap();
    std::fs::create_dir_all(fuzz.join("seal")).unwrap();
    for name in ["manifest", "seal"] {
        std::fs::write(fuzz.join(name).join(NEW), &bytes).unwrap();
    }
    let head = std::fs::read(folder.join(owner().head())).unwrap();
    for name in ["head", "seal"] {
        std::fs::write(fuzz.join(name).join(format!("{NEW}-head")), &head).unwrap();
    }
}

fn manifest(captured: &Captured, lineage: Lineage) -> Manifest {
    let kinds = [ImageKind::Memory, ImageKind::Disk(0)];
    let base = Some(Base { digest: Digest::of(&template().snapshot()), blocks: BLOCKS });
    let blob = |kind: &str, bytes: Vec<u8>| StateBlob { kind: kind.into(), version: 2, bytes };
    Manifest {
        arch: Arch::X86_64,
        platform: Platform {
            vmm_version: "0.1.0".into(),
            cpu_vendor: "AuthenticAMD".into(),
            cpu_features: vec!["sse4_2".into(), "avx2".into()],
            host_kernel: "6.12.0-corpus".into(),
        },
        spec: Versioned { version: 1, bytes: b"a machine's shape".to_vec() },
        record: Versioned { version: 1, bytes: br#"{"note":"not a record of a supervisor"}"#.to_vec() },
        lineage: Some(lineage),
        packs: captured.packs.clone(),
        images: captured.maps.iter().zip(kinds).map(|(map, kind)| Image { kind, map: map.clone(), base }).collect(),
        state: vec![blob("vm", vec![1, 2, 3]), blob("vcpu/0", vec![7; 40]), blob("blk/0", Vec::new())],
        sealed_state: None,
        boot: Boot {
            pack: captured.boot_pack,
            first_touch: vec![Touch { image: 0, start: 24, pages: 6 }, Touch { image: 1, start: 29, pages: 2 }],
        },
    }
}
