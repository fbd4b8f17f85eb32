//! The VMM's draft of a manifest, which is untrusted input: decoded with every bound checked; it may name packs that a committed manifest of
//! the sandbox named before it, and others of its own sandbox alone, each of which must be in the store with the size that the draft says
//! before a head names the manifest.

use crate::error::Error;
use crate::ids::SandboxId;
use crate::known_packs::KnownPacks;
use crate::record::Record;
use crate::states::State;
use crate::store::Store;
use stasis_snapshot::layout::Generation;
use stasis_snapshot::manifest::{Lineage, Manifest};
use std::collections::{BTreeSet, HashMap};

/// Turns a draft into the manifest of this commit, with its bytes.
pub(super) fn complete(record: &Record, draft: &[u8], lineage: Lineage) -> Result<(Manifest, Vec<u8>), Error> {
    let wrong = |what: &str| Error::Draft { id: record.id.clone(), what: what.to_owned(), source: None };
    let malformed = |source| Error::Draft {
        id: record.id.clone(),
        what: "it is no manifest".to_owned(),
        source: Some(Box::new(source)),
    };
    let mut manifest = Manifest::decode(draft).map_err(malformed)?;
    if manifest.lineage.is_some() || !manifest.record.bytes.is_empty() {
        return Err(wrong("it claims a lineage or a record, which are not the VMM's to write"));
    }
    let rootfs = record.spec.rootfs_digest.as_deref();
    let foreign = |digest: String| Some(digest.as_str()) != rootfs;
    if manifest.images.iter().filter_map(|image| image.base).any(|base| foreign(base.digest.to_string())) {
        return Err(wrong("it refers to a template disk that is not the sandbox's"));
    }
    manifest.lineage = Some(lineage);
    let rest = if record.state == State::Stopping { State::Stopped } else { State::Paused };
    manifest.record = record.portable(rest).encode().map_err(|_| Error::Bug("a record that is no JSON"))?;
    let bytes = manifest.encode().map_err(malformed)?;
    // What was pruned by the encoding is not needed, and must not be asked for.
    let manifest = Manifest::decode(&bytes).map_err(malformed)?;
    Ok((manifest, bytes))
}

/// Every pack that the manifest names is `known` from a manifest that was committed, or lies below `own`, the sandbox's prefix, and is in the
/// store with its size. Returns the keys in `generation` that it does not name.
pub(super) async fn check_packs(
    store: &Store,
    id: &SandboxId,
    manifest: &Manifest,
    own: &str,
    generation: &Generation,
    known: &KnownPacks,
) -> Result<Vec<String>, Error> {
    let wrong = |what: String| Error::Draft { id: id.clone(), what, source: None };
    let mut prefixes = BTreeSet::from([generation.prefix().to_owned()]);
    let unknown = || manifest.packs.iter().filter(|pack| !known.has(pack));
    for pack in unknown() {
        match generation_prefix(own, &pack.key) {
            Some(prefix) => prefixes.insert(prefix.to_owned()),
            None => return Err(wrong(format!("it names the pack {:?}, which is not the sandbox's", pack.key))),
        };
    }
    let listed = prefixes.iter().map(|prefix| store.list_all(prefix));
    let mut stored: HashMap<_, _> = futures::future::try_join_all(listed).await?.into_iter().flatten().collect();
    for pack in unknown() {
        match stored.get(&pack.key) {
            Some(size) if *size == u64::from(pack.size) => {}
            Some(size) => {
                return Err(wrong(format!(
                    "pack {} has {size} bytes in the store, the draft says {}",
                    pack.key, pack.size
                )));
            }
            None => return Err(wrong(format!("pack {} is not in the store", pack.key))),
        }
    }
    for pack in &manifest.packs {
        stored.remove(&pack.key);
    }
    Ok(stored.into_keys().filter(|key| key.starts_with(generation.prefix())).collect())
}

/// The part of a pack's key up to and with its generation; `None` when it is not below `own`.
fn generation_prefix<'a>(own: &str, key: &'a str) -> Option<&'a str> {
    let slash = key.strip_prefix(own)?.find('/')?;
    key.get(..=own.len() + slash)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::tests_support::sample;
    use crate::sources::Sources;
    use crate::store::place;
    use bytes::Bytes;
    use stasis_snapshot::ids::{CommitId, Digest};
    use stasis_snapshot::image::ImageMap;
    use stasis_snapshot::layout::Owner;
    use stasis_snapshot::manifest::{Arch, Base, Boot, Image, ImageKind, Platform, Versioned};
    use stasis_snapshot::pack::PackEntry;
    use stasis_snapshot::store::directory::DirectoryStore;
    use stasis_snapshot::store::{ObjectStore, Precondition};
    use std::sync::Arc;

    fn draft() -> Manifest {
        Manifest {
            arch: Arch::X86_64,
            platform: Platform::default(),
            spec: Versioned { version: 1, bytes: vec![1] },
            record: Versioned::default(),
            lineage: None,
            packs: Vec::new(),
            images: vec![Image { kind: ImageKind::Memory, map: ImageMap::zero(16), base: None }],
            state: Vec::new(),
            sealed_state: None,
            boot: Boot::default(),
        }
    }

    fn lineage() -> Lineage {
        Lineage { sandbox: "sbx-a".to_owned(), seq: 2, epoch: 1, commit: CommitId([7; 16]), parent: None }
    }

    fn owner() -> Owner {
        place("dev", &SandboxId::parse("sbx-a").unwrap()).unwrap()
    }

    #[test]
    fn a_draft_gets_record_and_lineage() {
        let record = sample("sbx-a");
        let (manifest, bytes) = complete(&record, &draft().encode().unwrap(), lineage()).unwrap();
        assert_eq!(manifest.lineage, Some(lineage()));
        assert_eq!(crate::record::Portable::decode(&manifest.record).unwrap(), record.portable(State::Paused));
        assert_eq!(Manifest::decode(&bytes).unwrap(), manifest);
    }

    #[test]
    fn a_draft_that_oversteps_is_refused() {
        let record = sample("sbx-a");
        let refused = |draft: &[u8]| match complete(&record, draft, lineage()) {
            Err(error @ Error::Draft { .. }) => error.chain(),
            other => panic!("{other:?}"),
        };
        assert!(refused(b"garbage").contains("no manifest"));
        let mut claims = draft();
        claims.lineage = Some(lineage());
        assert!(refused(&claims.encode().unwrap()).contains("lineage"));
        let mut foreign = draft();
        foreign.images[0].base = Some(Base { digest: Digest::of(b"other"), blocks: 4 });
        assert!(refused(&foreign.encode().unwrap()).contains("template disk"));
    }

    #[test]
    fn a_generation_is_a_folder_of_the_sandbox() {
        let own = owner();
        let prefix = own.prefix();
        let key = |rest: &str| format!("{prefix}{rest}");
        assert_eq!(generation_prefix(prefix, &key("1-1-aa/pack/0")), Some(key("1-1-aa/").as_str()));
        for foreign in ["v1/dev/sandbox/sbx-b/1-1-aa/pack/0".to_owned(), key("head"), key("")] {
            assert_eq!(generation_prefix(prefix, &foreign), None, "{foreign}");
        }
    }

    #[tokio::test]
    async fn packs_must_be_there_and_of_their_size() {
        let dir = tempfile::tempdir().unwrap();
        let objects: Arc<dyn ObjectStore> = Arc::new(DirectoryStore::open(dir.path()).unwrap());
        let (own, id) = (owner(), SandboxId::parse("sbx-a").unwrap());
        let generation = own.generation(2, 1, CommitId([7; 16]));
        for (n, body) in [(0, "four"), (1, "")] {
            objects.put(&generation.pack(n), Bytes::from(body), &Precondition::None).await.unwrap();
        }
        let store = Store::over(objects, "me", &Sources::system()).await.unwrap();
        let naming = |key: &str, size: u32| {
            let pack =
                PackEntry { key: key.to_owned(), size, digest: Digest::of(b""), frames: Vec::new(), sealed: None };
            Manifest { packs: vec![pack], ..draft() }
        };
        // Of a template, in an earlier manifest.
        let known = KnownPacks::of(&naming("v1/template/aa/pack/0", 9), Vec::new());
        let check = async |key: &str, size: u32| {
            let manifest = naming(key, size);
            check_packs(&store, &id, &manifest, own.prefix(), &generation, &known).await.map_err(|e| e.chain())
        };
        assert_eq!(check(&generation.pack(0), 4).await.unwrap(), [generation.pack(1)], "what was granted and not used");
        assert!(check(&generation.pack(0), 5).await.unwrap_err().contains("4 bytes"));
        assert!(check(&generation.pack(2), 4).await.unwrap_err().contains("not in the store"));
        assert!(check("v1/dev/sandbox/sbx-b/2-1-07/pack/0", 4).await.unwrap_err().contains("not the sandbox's"));
        assert!(check("v1/template/aa/pack/0", 9).await.is_ok(), "what was committed before is not asked for");
        assert!(check("v1/template/aa/pack/0", 8).await.is_err(), "unless it is another one");
    }
}
