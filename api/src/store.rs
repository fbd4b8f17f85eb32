//! The object store as the supervisor uses it: opened from the configuration, probed at start, heads and grants made from it.
//!
//! A store without conditional writes cannot fence. One supervisor may use it all the same: it leaves its name under [`EXCLUSIVE`], says so
//! in its health, and a second supervisor that finds another name there refuses to start.

use crate::config::{Config, StoreConfig};
use crate::error::{Error, StoreContext as _};
use crate::ids::SandboxId;
use crate::metrics::{CountedStore, Metrics};
use crate::sources::Sources;
use bytes::Bytes;
use stasis_snapshot::commit::{ObjectHead, Register};
use stasis_snapshot::grant::{Access, GrantedObject};
use stasis_snapshot::layout::Owner;
use stasis_snapshot::seal::Seals;
use stasis_snapshot::store::directory::DirectoryStore;
use stasis_snapshot::store::probe::probe;
use stasis_snapshot::store::s3::{S3Settings, S3Store};
use stasis_snapshot::store::{ErrorKind, ObjectStore, Precondition, RawGrant};
use stasis_vmm::control::types::FdToken;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Names the one supervisor that uses a store without conditional writes.
pub const EXCLUSIVE: &str = "v1/supervisor/exclusive";

/// An opened and probed store.
#[derive(Debug)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    conditional: bool,
    caveats: Vec<String>,
    next_token: AtomicU64,
    seals: Arc<Seals>,
}

/// Grants for a VMM, and the files that must be sent ahead of the request that carries them.
#[derive(Debug, Default)]
pub struct Grants {
    /// For the request.
    pub objects: Vec<GrantedObject>,
    /// For `fds.sock`.
    pub files: Vec<(FdToken, File)>,
}

impl Store {
    /// Opens the configured store and finds out what it does. `owner` is this supervisor's name.
    /// Requests are counted in `metrics`.
    pub async fn open(config: &Config, owner: &str, sources: &Sources, metrics: &Arc<Metrics>) -> Result<Self, Error> {
        if let StoreConfig::Directory { path } = &config.store {
            std::fs::create_dir_all(path).map_err(|source| Error::Local {
                action: format!("create the store directory {}", path.display()),
                source,
            })?;
        }
        let seals = config.seal.load().map_err(|error| Error::Host(error.to_string()))?;
        let counted = CountedStore::new(Self::unprobed(config)?, metrics.clone());
        let store = Self::over(Arc::new(counted), owner, sources).await?;
        Ok(Self { seals, ..store })
    }

    /// The configured objects as they are: nothing is sent, made or checked. For programs that look at a bucket beside a supervisor.
    pub fn unprobed(config: &Config) -> Result<Arc<dyn ObjectStore>, Error> {
        let objects: Arc<dyn ObjectStore> = match &config.store {
            StoreConfig::Directory { path } => Arc::new(DirectoryStore::open(path).doing("open the store")?),
            StoreConfig::S3 { endpoint, bucket, region, access_key, secret_key, path_style } => Arc::new(
                S3Store::new(S3Settings {
                    endpoint: endpoint.trim_end_matches('/').to_owned(),
                    region: region.clone(),
                    bucket: bucket.clone(),
                    access_key: access_key.clone(),
                    secret_key: secret_key.clone(),
                    path_style: *path_style,
                    request_timeout: config.deadlines.store(),
                    commit_timeout: config.deadlines.commit(),
                })
                .doing("set up the store")?,
            ),
        };
        Ok(objects)
    }

    /// The same over any object store.
    pub async fn over(objects: Arc<dyn ObjectStore>, owner: &str, sources: &Sources) -> Result<Self, Error> {
        let found = probe(objects.as_ref(), &sources.word(20))
            .await
            .doing("use the store (checked at start with a few small objects)")?;
        if !found.conditional_writes {
            claim_exclusive(objects.as_ref(), owner).await?;
        }
        let first_token = u64::from(u32::from_le_bytes(sources.random())) << 16;
        Ok(Self {
            objects,
            conditional: found.conditional_writes,
            caveats: found.reasons,
            next_token: AtomicU64::new(first_token),
            seals: Arc::new(Seals::none()),
        })
    }

    /// The objects.
    pub fn objects(&self) -> &dyn ObjectStore {
        self.objects.as_ref()
    }

    /// The same, to be kept.
    pub fn shared_objects(&self) -> Arc<dyn ObjectStore> {
        self.objects.clone()
    }

    /// The operator's keys.
    pub fn seals(&self) -> &Arc<Seals> {
        &self.seals
    }

    /// Conditional writes work, so that several supervisors may share the store.
    pub fn is_shared(&self) -> bool {
        self.conditional
    }

    /// What the store does not do, for health.
    pub fn caveats(&self) -> &[String] {
        &self.caveats
    }

    /// The head register of a sandbox.
    pub fn head_of(&self, owner: &Owner) -> Register<ObjectHead> {
        let key = owner.head();
        let head = if self.conditional {
            ObjectHead::new(self.objects.clone(), key)
        } else {
            ObjectHead::unconditional(self.objects.clone(), key)
        };
        Register::new(head.sealed(&self.seals))
    }

    /// A token that no request to any VMM has used.
    pub fn token(&self) -> FdToken {
        FdToken(self.next_token.fetch_add(1, Ordering::Relaxed))
    }

    /// Leave to write each of `keys` once.
    pub async fn grant_puts(&self, keys: Vec<String>, ttl: Duration) -> Result<Grants, Error> {
        let mut grants = Grants::default();
        for key in keys {
            let raw = self.objects.grant_put(&key, ttl).await.doing("grant the VMM a pack to write")?;
            self.add(&mut grants, key, raw);
        }
        Ok(grants)
    }

    /// Leave to read each of `keys`.
    pub async fn grant_gets(&self, keys: Vec<String>, ttl: Duration) -> Result<Grants, Error> {
        let mut grants = Grants::default();
        for key in keys {
            let raw = self.objects.grant_get(&key, ttl).await.doing("grant the VMM a pack to read")?;
            self.add(&mut grants, key, raw);
        }
        Ok(grants)
    }

    fn add(&self, grants: &mut Grants, key: String, raw: RawGrant) {
        let access = match raw {
            RawGrant::Url(url) => Access::Url(url),
            RawGrant::File(file) => {
                let token = self.token();
                grants.files.push((token, file));
                Access::Fd(token.0)
            }
        };
        grants.objects.push(GrantedObject { key, access, cache: None });
    }

    /// Every object below `prefix` with its size.
    pub async fn list_all(&self, prefix: &str) -> Result<Vec<(String, u64)>, Error> {
        let mut all = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let page = self.objects.list(prefix, next.as_deref()).await.doing("list objects")?;
            all.extend(page.objects.into_iter().map(|o| (o.key, o.size)));
            match page.next {
                Some(more) => next = Some(more),
                None => return Ok(all),
            }
        }
    }
}

/// Where the objects of a sandbox are.
pub fn place(tenant: &str, id: &SandboxId) -> Result<Owner, Error> {
    Ok(Owner::sandbox(tenant, id.as_str())?)
}

async fn claim_exclusive(objects: &dyn ObjectStore, owner: &str) -> Result<(), Error> {
    match objects.get(EXCLUSIVE).await {
        Ok(found) if found.bytes == owner.as_bytes() => Ok(()),
        Ok(found) => Err(Error::Host(format!(
            "the store has no conditional writes, so only one supervisor may use it, and supervisor {} does. If that one is gone for \
             good, delete the object {EXCLUSIVE}",
            String::from_utf8_lossy(&found.bytes)
        ))),
        Err(e) if e.kind == ErrorKind::NotFound => objects
            .put(EXCLUSIVE, Bytes::copy_from_slice(owner.as_bytes()), &Precondition::None)
            .await
            .doing("claim the store")
            .map(drop),
        Err(source) => Err(Error::Store { action: "see who uses the store", source }),
    }
}
