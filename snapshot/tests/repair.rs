//! Verify and repair on the format corpus, damaged in every way that matters.

#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use stasis_snapshot::{
    commit::{Backoff, Head, HeadState, ObjectHead, Outcome, Register, Sent},
    ids::CommitId,
    layout::{Generation, Owner},
    repair::{Finding, NoProposal, Standing, propose, survey},
    seal::Seals,
    store::directory::DirectoryStore,
    verify::{BucketReport, verify_bucket},
};

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// A copy of the corpus, to be damaged.
struct Bucket {
    dir: tempfile::TempDir,
    store: DirectoryStore,
}

impl Bucket {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/v1"), dir.path());
        let store = DirectoryStore::open(dir.path()).unwrap();
        Self { dir, store }
    }

    fn owner() -> Owner {
        Owner::sandbox("corpus", "sbx-corpus").unwrap()
    }

    fn generation(seq: u8) -> Generation {
        Self::owner().generation(seq.into(), 1, CommitId([seq; 16]))
    }

    fn file(&self, key: &str) -> PathBuf {
        self.dir.path().join(key)
    }

    fn flip(&self, key: &str) {
        let mut bytes = fs::read(self.file(key)).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(self.file(key), bytes).unwrap();
    }

    async fn survey(&self, deep: bool) -> Finding {
        let mut found = survey(&self.store, None, deep, &Seals::none()).await.unwrap();
        assert_eq!(found.len(), 1);
        found.remove(0)
    }

    async fn verify(&self) -> BucketReport {
        verify_bucket(&self.store, Some("corpus"), &Seals::none()).await.unwrap()
    }

    async fn apply(&self, finding: &Finding) -> Head {
        let attempt = propose(finding, "repairer", CommitId([99; 16])).unwrap();
        let register = Register::new(ObjectHead::new(Arc::new(self.store.clone()), Self::owner().head()));
        let mut pacer = Backoff::within(std::time::Duration::from_secs(1));
        match register.commit(&attempt, Sent::Never, &mut pacer).await {
            Outcome::Committed { now } => now.head,
            other => panic!("{other:?}"),
        }
    }
}

fn candidate(finding: &Finding) -> Option<u64> {
    finding.candidate.as_ref().map(|candidate| candidate.seq)
}

#[tokio::test]
async fn what_is_whole_is_left_alone() {
    let bucket = Bucket::new();
    let found = bucket.survey(true).await;
    assert_eq!((found.standing, found.problems.len()), (Standing::Whole, 0));
    assert!(matches!(propose(&found, "x", CommitId([9; 16])), Err(NoProposal::Nothing)));
    let report = bucket.verify().await;
    assert!(report.checked.problems.is_empty() && report.checked.frames > 0, "{report:?}");
    // The manifests of the older generations.
    assert!(report.unreachable.contains(&Bucket::generation(1).manifest()), "{report:?}");
}

#[tokio::test]
async fn a_missing_manifest_falls_back_to_the_snapshot_before_it() {
    let bucket = Bucket::new();
    fs::remove_file(bucket.file(&Bucket::generation(3).manifest())).unwrap();
    assert_eq!(bucket.verify().await.checked.problems.len(), 1);
    let found = bucket.survey(true).await;
    assert_eq!((found.standing, candidate(&found)), (Standing::Repairable, Some(2)));
    let head = bucket.apply(&found).await;
    assert_eq!((head.state, head.seq, head.epoch, head.owner.as_str()), (HeadState::Paused, 4, 1, "corpus"));
    assert_eq!(bucket.survey(true).await.standing, Standing::Whole);
    assert!(bucket.verify().await.checked.problems.is_empty());
}

#[tokio::test]
async fn a_damaged_pack_is_seen_when_it_is_read() {
    let bucket = Bucket::new();
    bucket.flip(&Bucket::generation(2).pack(0));
    assert_eq!(bucket.survey(false).await.standing, Standing::Whole, "its size is right");
    let found = bucket.survey(true).await;
    // The third generation needs the pack as well as the second.
    assert_eq!((found.standing, candidate(&found)), (Standing::Repairable, Some(1)));
    assert!(found.problems.iter().all(|problem| problem.key == Bucket::generation(2).pack(0)), "{found:?}");
    let report = bucket.verify().await;
    assert!(!report.checked.problems.is_empty());
}

#[tokio::test]
async fn a_lost_head_is_written_anew_and_a_strange_one_is_not() {
    let bucket = Bucket::new();
    fs::write(bucket.file(&Bucket::owner().head()), br#"{"format": 2}"#).unwrap();
    let found = bucket.survey(false).await;
    assert_eq!(found.standing, Standing::HeadUnreadable);
    assert!(matches!(propose(&found, "x", CommitId([9; 16])), Err(NoProposal::Unreadable)));
    assert!(bucket.verify().await.checked.problems[0].what.contains("version 2"));

    fs::remove_file(bucket.file(&Bucket::owner().head())).unwrap();
    let found = bucket.survey(false).await;
    assert_eq!((found.standing, candidate(&found)), (Standing::HeadLost, Some(3)));
    let head = bucket.apply(&found).await;
    assert_eq!((head.seq, head.owner.as_str(), head.record["version"].as_u64()), (1, "repairer", Some(1)));
    assert_eq!(bucket.survey(true).await.standing, Standing::Whole);
}

#[tokio::test]
async fn nothing_is_proposed_where_nothing_is_whole() {
    let bucket = Bucket::new();
    for seq in 1..=3 {
        bucket.flip(&Bucket::generation(seq).manifest());
    }
    let found = bucket.survey(false).await;
    assert_eq!((found.standing, candidate(&found)), (Standing::Lost, None));
}
