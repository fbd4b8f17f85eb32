//! Manifests come back as they were, and nothing else is accepted.

use proptest::prelude::*;

use super::*;
use crate::{image::Run, pack::test_entry};

fn state(kind: &str, bytes: &[u8]) -> StateBlob {
    StateBlob { kind: kind.to_owned(), version: 3, bytes: bytes.to_vec() }
}

/// Three packs of which the second is needed by nobody.
fn example() -> Manifest {
    let pack = |pack, frame, index| PageRef::Pack { pack, frame, index };
    let run = |start, pages, at| Run { start, pages, at };
    Manifest {
        arch: Arch::X86_64,
        platform: Platform {
            vmm_version: "0.1.0".into(),
            cpu_vendor: "AuthenticAMD".into(),
            cpu_features: vec!["sse2".into(), "avx2".into()],
            host_kernel: "6.12".into(),
        },
        spec: Versioned { version: 2, bytes: vec![1, 2, 3] },
        record: Versioned::default(),
        lineage: Some(Lineage {
            sandbox: "sb".into(),
            seq: 4,
            epoch: 2,
            commit: CommitId([9; 16]),
            parent: Some(ManifestRef { key: "m".into(), digest: Digest([8; 32]) }),
        }),
        packs: vec![test_entry("a", &[16, 2]), test_entry("b", &[1]), test_entry("c", &[64])],
        images: vec![
            Image {
                kind: ImageKind::Memory,
                map: ImageMap::zero(1000).overlay(&[run(7, 10, pack(0, 0, 2)), run(900, 64, pack(2, 0, 0))]).unwrap(),
                base: None,
            },
            Image {
                kind: ImageKind::Disk(0),
                map: ImageMap::base(500, 300).overlay(&[run(299, 2, pack(0, 1, 0))]).unwrap(),
                base: Some(Base { digest: Digest([5; 32]), blocks: 300 }),
            },
        ],
        state: vec![state("vm", &[1]), state("vcpu/0", &[2; 300])],
        sealed_state: None,
        boot: Boot { pack: Some(2), first_touch: vec![Touch { image: 0, start: 900, pages: 64 }] },
    }
}

/// Replaces section `number`'s body and puts the rest right again.
fn with_section(number: u32, version: u16, required: bool, body: &[u8]) -> Vec<u8> {
    let name = Box::leak(Box::new(format::Kind { number, name: "test", version, required }));
    let mut example = example();
    example.prune();
    let mut all = vec![
        (&format::PLATFORM, sections::put_small("", &example.platform).unwrap()),
        (&format::SPEC, sections::put_small("", &example.spec).unwrap()),
        (&format::PACKS, sections::put_packs(&example.packs)),
        (&format::IMAGES, sections::put_images(&example.images)),
        (&format::STATE, sections::put_small("", &example.state).unwrap()),
    ];
    all.retain(|(kind, _)| kind.number != number);
    all.push((name, body.to_vec()));
    format::write(Arch::X86_64, &all).unwrap()
}

#[test]
fn comes_back_without_the_packs_that_nobody_needs() {
    let mut manifest = example();
    let bytes = manifest.encode().unwrap();
    let read = Manifest::decode_checked(&bytes, Digest::of(&bytes)).unwrap();
    manifest.prune();
    assert_eq!(read, manifest);
    assert_eq!(read.packs.len(), 2);
    assert_eq!(read.boot.pack, Some(1));
    assert_eq!(read.memory().unwrap().map.lookup(901), Some(PageRef::Pack { pack: 1, frame: 0, index: 1 }));
    assert_eq!(read.disk(0).unwrap().map.pages(), 500);
    assert_eq!(read.state_of("vcpu/0").unwrap().version, 3);
    assert_eq!(read.encode().unwrap(), bytes);
}

#[test]
fn the_header_reads_without_the_body() {
    let bytes = example().encode().unwrap();
    let header = Header::read(&bytes[..HEADER_LEN]).unwrap();
    assert_eq!(header.version, FORMAT_VERSION);
    assert_eq!(header.len, bytes.len() as u64);
    assert_eq!(header.sections, 8);
}

#[test]
fn every_truncation_is_refused() {
    let bytes = example().encode().unwrap();
    for len in 0..bytes.len() {
        assert!(
            matches!(Manifest::decode(&bytes[..len]), Err(ManifestError::Truncated { got, .. }) if got == len as u64),
            "{len} bytes"
        );
    }
    let mut long = bytes;
    long.push(0);
    assert_eq!(Manifest::decode(&long), Err(ManifestError::Trailing(1)));
}

#[test]
fn every_flipped_bit_is_refused() {
    let bytes = example().encode().unwrap();
    let digest = Digest::of(&bytes);
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&damaged).is_err(), "bit {bit}");
        assert!(matches!(Manifest::decode_checked(&damaged, digest), Err(ManifestError::WholeDigest { .. })));
    }
}

#[test]
fn what_this_build_does_not_know_is_named() {
    let mut bytes = example().encode().unwrap();
    bytes[8] = 9;
    let check = Digest::of(&bytes[..56]).0;
    bytes[56..64].copy_from_slice(&check[..8]);
    assert_eq!(Manifest::decode(&bytes).unwrap_err().to_string(), "manifest is format version 9; this build reads 1");
    assert_eq!(Manifest::decode(&with_section(77, 1, true, b"?")), Err(ManifestError::UnknownSection(77)));
    assert!(Manifest::decode(&with_section(77, 1, false, b"?")).is_ok());
    assert_eq!(
        Manifest::decode(&with_section(7, 2, true, b"")).unwrap_err().to_string(),
        "section state is version 2; this build reads 1"
    );
    let mut damaged = example().encode().unwrap();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    assert_eq!(Manifest::decode(&damaged).unwrap_err().to_string(), "digest of section boot does not match");
    assert_eq!(Manifest::decode(b"hello"), Err(ManifestError::Magic));
}

#[test]
fn a_missing_or_doubled_section_is_named() {
    let only_platform =
        format::write(Arch::X86_64, &[(&format::PLATFORM, sections::put_small("", &Platform::default()).unwrap())])
            .unwrap();
    assert_eq!(Manifest::decode(&only_platform), Err(ManifestError::MissingSection("spec")));
    let twice = format::write(Arch::X86_64, &[(&format::SPEC, vec![]), (&format::SPEC, vec![])]).unwrap();
    assert_eq!(Manifest::decode(&twice), Err(ManifestError::Table("a section appears twice")));
}

#[test]
fn nonsense_is_not_written() {
    type Spoil = fn(&mut Manifest);
    let cases: [(&str, Spoil); 8] = [
        ("missing pack", |m| {
            m.packs.truncate(2);
            m.boot.pack = None;
        }),
        ("base too short", |m| {
            m.images[1].base.as_mut().unwrap().blocks = 298;
        }),
        ("same key twice", |m| m.packs[1].key = "a".into()),
        ("gap between frames", |m| m.packs[0].frames[1].offset += 1),
        ("wrong size", |m| m.packs[0].size += 1),
        ("disk order", |m| m.images[1].kind = ImageKind::Disk(1)),
        ("state twice", |m| m.state[1].kind = "vm".into()),
        ("touch beyond", |m| m.boot.first_touch[0].start = 937),
    ];
    for (name, spoil) in cases {
        let mut manifest = example();
        spoil(&mut manifest);
        assert!(manifest.encode().is_err(), "{name}");
    }
}

proptest! {
    /// Sections with right digests around wrong bytes: an attacker's manifest. No panic, and what is accepted encodes again.
    #[test]
    fn hostile_sections_never_panic(
        number in prop::sample::select(vec![1u32, 2, 5, 6, 7]),
        body in prop::collection::vec(prop::sample::select(vec![0u8, 1, 2, 3, 4, 0x20, 0x7f, 0x80, 0xff]), 0..120),
    ) {
        if let Ok(manifest) = Manifest::decode(&with_section(number, 1, true, &body)) {
            prop_assert!(manifest.encode().is_ok());
        }
    }

    /// The same, near to valid ones.
    #[test]
    fn changed_sections_never_panic(
        which in 0usize..2, at in any::<prop::sample::Index>(), value in any::<u8>(),
    ) {
        let mut example = example();
        example.prune();
        let mut body = [sections::put_packs(&example.packs), sections::put_images(&example.images)][which].clone();
        let at = at.index(body.len());
        body[at] = value;
        if let Ok(manifest) = Manifest::decode(&with_section(5 + which as u32, 1, true, &body)) {
            prop_assert!(manifest.check().is_ok());
        }
    }

    #[test]
    fn random_maps_come_back(
        runs in prop::collection::vec((0u64..1000, 1u64..40, 0u32..3), 0..40),
    ) {
        let mut manifest = example();
        let newer: Vec<Run> = runs.into_iter().map(|(start, pages, kind)| {
            let pages = pages.min(1000 - start);
            match kind {
                0 => Run { start, pages, at: PageRef::Zero },
                1 => Run { start, pages: pages.min(16), at: PageRef::Pack { pack: 0, frame: 0, index: 0 } },
                _ => Run { start, pages, at: PageRef::Pack { pack: 2, frame: 0, index: 3 } },
            }
        }).collect();
        manifest.images[0].map = manifest.images[0].map.overlay(&newer).unwrap();
        let read = Manifest::decode(&manifest.encode().unwrap()).unwrap();
        manifest.prune();
        prop_assert_eq!(read, manifest);
    }
}

#[test]
fn counts_are_not_believed() {
    // 2^60 packs in a section of ten bytes.
    let mut body = Vec::new();
    wire::put_varint(&mut body, 1 << 60);
    let refused = Manifest::decode(&with_section(5, 1, true, &body));
    assert!(
        matches!(&refused, Err(ManifestError::Malformed { section: "packs", what }) if what.contains("more entries")),
        "{refused:?}"
    );
}
