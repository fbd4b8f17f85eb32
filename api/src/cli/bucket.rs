//! The bucket itself, for verbs that work without a supervisor.

use super::args::Bucket as Arguments;
use super::profile;
use super::{ExitStatus, Failure};
use crate::config::{Config, Setting, from_environment};
use crate::error::chain;
use crate::journal::Journal;
use crate::sources::Sources;
use crate::store::Store;
use crate::supervisor::JOURNAL;
use stasis_snapshot::ids::CommitId;
use stasis_snapshot::layout::Place;
use stasis_snapshot::seal::Seals;
use stasis_snapshot::store::probe::probe;
use stasis_snapshot::store::{ErrorKind, ObjectStore, StoreError};
use std::sync::Arc;

/// Where the S3 server of `stasis dev` listens unless told otherwise.
const DEV_ENDPOINT: &str = "http://127.0.0.1:7879";
const DEV_BUCKET: &str = "stasis";

/// An opened bucket.
pub(super) struct Bucket {
    pub(super) objects: Arc<dyn ObjectStore>,
    /// The operator's keys, as far as this configuration names them.
    pub(super) seals: Arc<Seals>,
    sources: Sources,
}

impl Bucket {
    /// Opens it. Sends nothing yet.
    pub(super) fn open(arguments: &Arguments) -> Result<Self, Failure> {
        let mut settings = from_environment(|name| std::env::var(name).ok());
        let configured = arguments.config.is_some() || settings.iter().any(|setting| setting.field == "store.kind");
        if !configured {
            settings.extend(of_dev()?);
        }
        // What only a supervisor needs and the environment of an operator may lack.
        for (field, text) in [("listen", "127.0.0.1:0"), ("data_dir", "/nonexistent"), ("images_dir", "/nonexistent")] {
            if arguments.config.is_none() && !settings.iter().any(|setting| setting.field == field) {
                settings.push(Setting { field, origin: "stasis".to_owned(), text: text.to_owned() });
            }
        }
        let config = Config::load(arguments.config.as_deref(), &settings)
            .map_err(|e| Failure::new(ExitStatus::Usage, chain(&e)))?;
        let objects = Store::unprobed(&config).map_err(|e| Failure::other(e.chain()))?;
        let seals = config.seal.load().map_err(|e| Failure::new(ExitStatus::Usage, chain(&e)))?;
        Ok(Self { objects, seals, sources: Sources::system() })
    }

    /// Whether its conditional writes work. Writes and removes a small object.
    pub(super) async fn conditional(&self) -> Result<bool, Failure> {
        let found = probe(self.objects.as_ref(), &self.sources.word(20)).await.map_err(|e| store(&e))?;
        Ok(found.conditional_writes)
    }

    /// A fresh commit id.
    pub(super) fn commit_id(&self) -> CommitId {
        CommitId(self.sources.random())
    }

    /// Wall time, ms.
    pub(super) fn now_ms(&self) -> i64 {
        self.sources.now_ms()
    }

    /// The prefix of the sandbox with this id, of whichever tenant where none is given.
    pub(super) async fn prefix_of(&self, id: &str, tenant: Option<&str>) -> Result<String, Failure> {
        let unknown = || Failure::new(ExitStatus::NotFound, format!("there is no sandbox {id:?} in the bucket"));
        if let Some(tenant) = tenant {
            let owner = stasis_snapshot::layout::Owner::sandbox(tenant, id).map_err(|_| unknown())?;
            return Ok(owner.prefix().to_owned());
        }
        let mut next: Option<String> = None;
        loop {
            let page = self.objects.list("v1/", next.as_deref()).await.map_err(|e| store(&e))?;
            let found = page.objects.iter().filter_map(|object| Place::of(&object.key));
            if let Some(place) = found.into_iter().find(|place| place.of_sandbox && place.id == id) {
                return Ok(place.owner.to_owned());
            }
            next = Some(page.next.ok_or_else(unknown)?);
        }
    }
}

/// The store failed.
pub(super) fn store(error: &StoreError) -> Failure {
    let status = match error.kind {
        ErrorKind::Unavailable | ErrorKind::Conflict => ExitStatus::Unavailable,
        _ => ExitStatus::Other,
    };
    Failure::new(status, chain(error))
}

/// The bucket of the `stasis dev` of this user.
fn of_dev() -> Result<Vec<Setting>, Failure> {
    let none = || {
        Failure::new(
            ExitStatus::Usage,
            "which bucket? Give the supervisor's configuration with --config, or its variables STASIS_STORE_…",
        )
    };
    let named = std::env::var_os("STASIS_DATA_DIR").map(std::path::PathBuf::from);
    let journal = named.or_else(profile::data_dir).ok_or_else(none)?.join(JOURNAL);
    if !journal.is_file() {
        return Err(none());
    }
    let journal = Journal::open(&journal).map_err(|e| Failure::other(chain(&e)))?;
    let key = |name: &str| journal.meta(name, String::new).map_err(|e| Failure::other(chain(&e)));
    let endpoint = std::env::var("STASIS_STORE_ENDPOINT").unwrap_or_else(|_| DEV_ENDPOINT.to_owned());
    let found = [
        ("store.kind", "s3".to_owned()),
        ("store.endpoint", endpoint),
        ("store.bucket", DEV_BUCKET.to_owned()),
        ("store.access_key", key("dev-access-key")?),
        ("store.secret_key", key("dev-secret-key")?),
    ];
    Ok(found.into_iter().map(|(field, text)| Setting { field, origin: "stasis dev".to_owned(), text }).collect())
}
