//! Starting: what is found in the bucket, what is refused.

use crate::support::{Place, start_error, write_head};
use stasis_api::config::StoreConfig;
use stasis_api::sources::Sources;
use stasis_api::states::State;
use stasis_api::store::{EXCLUSIVE, Store};
use stasis_api::supervisor::catalogue;
use stasis_snapshot::commit::HeadState;
use stasis_snapshot::store::directory::DirectoryStore;
use stasis_snapshot::store::{ETag, ListPage, Object, ObjectStore, Precondition, RawGrant, StoreError};
use std::sync::Arc;

#[tokio::test]
async fn an_empty_journal_is_filled_from_the_bucket() {
    let place = Place::new();
    let store = place.path("store");
    for (id, state) in [("sbx-a1", HeadState::Paused), ("sbx-b1", HeadState::Live), ("sbx-c1", HeadState::Deleted)] {
        write_head(&store, id, "host-other", state).await;
    }
    std::fs::create_dir_all(store.join("v1/dev/sandbox/sbx-d1")).unwrap();
    std::fs::write(store.join("v1/dev/sandbox/sbx-d1/head"), "not a head").unwrap();
    let served = place.start().await;
    let core = served.supervisor.core();
    let known = core.registry.all();
    assert_eq!(known.len(), 1);
    assert_eq!((known[0].id.as_str(), known[0].state()), ("sbx-a1", State::Paused));

    // What somebody else holds is only reported, until we are told that they are dead.
    let again = catalogue::recover(core, Some("dev"), false).await.unwrap();
    let outcome =
        |found: &[catalogue::Found], id: &str| found.iter().find(|f| f.id.as_str() == id).map(|f| f.outcome).unwrap();
    assert_eq!(outcome(&again, "sbx-a1"), "known");
    assert_eq!(outcome(&again, "sbx-b1"), "live");
    assert_eq!(outcome(&again, "sbx-c1"), "deleted");
    assert_eq!(outcome(&again, "sbx-d1"), "unreadable");
    assert!(catalogue::recover(core, Some("other"), false).await.unwrap().is_empty());
    let taken = catalogue::recover(core, Some("dev"), true).await.unwrap();
    assert_eq!(outcome(&taken, "sbx-b1"), "recovered");
    let taken = core.registry.find("dev", "sbx-b1").unwrap();
    assert_eq!(taken.state(), State::Paused);
    let head = taken.head().unwrap().head;
    assert_eq!((head.state, head.owner.as_str(), head.epoch), (HeadState::Paused, core.owner.as_str(), 3));
}

#[tokio::test]
async fn a_restart_finds_what_the_journal_knows() {
    let place = Place::new();
    write_head(&place.path("store"), "sbx-a1", "host-other", HeadState::Paused).await;
    let first = place.start().await;
    let (owner, key) = (first.supervisor.core().owner.clone(), first.key.clone());
    let before = first.supervisor.core().registry.find("dev", "sbx-a1").unwrap().record();
    first.supervisor.shutdown().await;
    let second = place.start().await;
    assert_eq!(second.supervisor.core().owner, owner);
    assert_eq!(second.supervisor.core().registry.find("dev", "sbx-a1").unwrap().record(), before);
    assert_eq!(second.supervisor.core().journal.tenant_of_key(&key).unwrap().as_deref(), Some("dev"));
}

#[tokio::test]
async fn a_second_supervisor_on_one_data_directory_is_refused() {
    let place = Place::new();
    let _first = place.start().await;
    let error = start_error(place.config()).await.to_string();
    assert!(error.contains("another supervisor") && error.contains("data"), "{error}");
}

#[tokio::test]
async fn what_keeps_it_from_starting_is_named() {
    let place = Place::new();
    let mut config = place.config();
    config.vmm = Some(place.path("nothing"));
    assert!(start_error(config).await.to_string().contains("STASIS_VMM"));
    let mut config = place.config();
    config.store = StoreConfig::S3 {
        endpoint: "http://127.0.0.1:9".to_owned(),
        bucket: "b".to_owned(),
        region: "r".to_owned(),
        access_key: "a".to_owned(),
        secret_key: "s".to_owned(),
        path_style: true,
    };
    let error = start_error(config).await;
    assert_eq!(error.status().as_u16(), 503, "{}", error.chain());
}

/// A store that ignores preconditions, as some S3 servers do.
#[derive(Debug)]
struct Careless(DirectoryStore);

#[async_trait::async_trait]
impl ObjectStore for Careless {
    async fn get(&self, key: &str) -> Result<Object, StoreError> {
        self.0.get(key).await
    }
    async fn get_range(&self, key: &str, range: std::ops::Range<u64>) -> Result<bytes::Bytes, StoreError> {
        self.0.get_range(key, range).await
    }
    async fn put(&self, key: &str, bytes: bytes::Bytes, _: &Precondition) -> Result<ETag, StoreError> {
        self.0.put(key, bytes, &Precondition::None).await
    }
    async fn list(&self, prefix: &str, next: Option<&str>) -> Result<ListPage, StoreError> {
        self.0.list(prefix, next).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.0.delete(key).await
    }
    async fn grant_put(&self, key: &str, ttl: std::time::Duration) -> Result<RawGrant, StoreError> {
        self.0.grant_put(key, ttl).await
    }
    async fn grant_get(&self, key: &str, ttl: std::time::Duration) -> Result<RawGrant, StoreError> {
        self.0.grant_get(key, ttl).await
    }
}

#[tokio::test]
async fn a_store_without_conditional_writes_serves_one_supervisor_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let open = async |owner: &str| {
        let objects = Arc::new(Careless(DirectoryStore::open(dir.path()).unwrap()));
        Store::over(objects, owner, &Sources::system()).await
    };
    let first = open("host-1").await.unwrap();
    assert!(!first.is_shared() && !first.caveats().is_empty());
    assert!(open("host-1").await.is_ok(), "the same one comes back after a restart");
    let error = open("host-2").await.unwrap_err().to_string();
    assert!(error.contains("host-1") && error.contains(EXCLUSIVE), "{error}");
}
