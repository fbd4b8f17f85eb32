//! The supervisor: owns policy. Each operation has its own file; this one starts, adopts and stops.
//!
//! | file | what |
//! | --- | --- |
//! | `create`, `pause`, `resume`, `stop`, `start`, `delete`, `execute` | one operation each |
//! | `admission` | who may have a VM |
//! | `account` | what an operation cost |
//! | `guest` | requests that need the guest; `git` is one kind of them |
//! | `capture` | from a VM to packs and a stored manifest |
//! | `settle` | the end of a pause or a stop: the head, and what may be done with the guest |
//! | `data_keys` | what captures are encrypted under |
//! | `draft` | what a VMM hands over at a capture, checked |
//! | `materialise` | from a manifest to a VM |
//! | `snapshots` | named snapshots |
//! | `image` | guests of container images |
//! | `templates` | templates from container images: made, listed, renamed, deleted |
//! | `fork` | keeps a snapshot from the collector while a sandbox is made from it |
//! | `golden` | booted templates that creates start from |
//! | `files` | the opened files that a VMM is handed |
//! | `heads` | commits to the head that several operations share |
//! | `network` | networks of sandboxes, and the egress process |
//! | `machine` | VMMs: started, booted, watched, lost |
//! | `wake_call` | what a guest is told after a restore |
//! | `restart` | what a restarted supervisor does with each sandbox: a plan, and its execution |
//! | `catalogue` | sandboxes found in the bucket |
//! | `identity` | this supervisor's name in heads |
//! | `timers` | the ends of lives |
//! | `ahead` | rounds of capture ahead of a pause |
//! | `collect` | the collector, by the clock |
//! | `pressure` | gives kept memory back when the host runs short of it |
//!
//! Who runs what: an operation runs in a task of its own, under the sandbox's operation lock; requests only wait for it. One task watches
//! each VMM process, one task watches the deadlines. All tasks are on the one runtime of the process.
//!
//! Order of effects: the journal first, then the effect. A commit of the head is journaled as an attempt before it is first sent, so that a
//! killed supervisor can settle it.

mod account;
mod admission;
mod ahead;
mod capture;
pub mod catalogue;
mod collect;
mod create;
mod data_keys;
mod delete;
mod draft;
mod execute;
mod files;
mod fork;
mod git;
pub mod golden;
mod guest;
mod heads;
mod identity;
mod image;
mod machine;
mod materialise;
pub mod network;
mod pause;
mod pressure;
mod restart;
mod resume;
mod settle;
pub mod snapshots;
mod start;
mod stop;
pub mod templates;
mod timers;
mod wake_call;

use self::golden::Goldens;
use self::network::Networking;
use self::snapshots::Reservations;
use self::templates::Builds;
use crate::block_indexes::BlockIndexes;
use crate::config::{Config, StoreConfig};
use crate::error::Error;
use crate::fair_share::FairShare;
use crate::front::{self, Front};
use crate::host::{self, Kvm};
use crate::journal::Journal;
use crate::kept_memory::KeptMemory;
use crate::launcher::Launcher;
use crate::memory_pressure;
use crate::metrics::Metrics;
use crate::rate::Rates;
use crate::registry::Registry;
use crate::sources::Sources;
use crate::states::State;
use crate::store::Store;
use crate::telemetry::Telemetry;
use crate::template::Templates;
use crate::template::uploads::Uploads;
use crate::vmm_pool::VmmPool;
use futures::StreamExt as _;
use opentelemetry::context::FutureExt as _;
use rustix::fs::{FlockOperation, flock};
use stasis_snapshot::pager::cache_dir::CacheDir;
use std::fs::{self, File};
use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

/// How long requests in flight may take when the supervisor stops, and then operations.
const DRAIN: Duration = Duration::from_secs(5);
/// Sandboxes that are paused at once when all are: they share the connections to the store.
const PAUSES: usize = 4;
/// Where run directories are, in the data directory.
const RUN: &str = "run";
/// Where packs are kept, in the data directory.
const PACKS: &str = "packs";
/// Where indexes of root file systems are kept, in the data directory.
const BLOCKS: &str = "blocks";
/// Name of the journal in the data directory.
pub const JOURNAL: &str = "journal.db";

/// Everything that operations share.
#[derive(Debug)]
pub struct Core {
    /// Configuration.
    pub config: Config,
    /// Journal.
    pub journal: Arc<Journal>,
    /// Clock and entropy.
    pub sources: Sources,
    /// Object store.
    pub store: Store,
    /// Templates.
    pub templates: Templates,
    /// Templates that are being made.
    pub builds: Builds,
    /// Sandboxes.
    pub registry: Registry,
    /// This supervisor's name in heads: the same for as long as its data directory exists.
    pub owner: String,
    /// This host's KVM.
    pub kvm: Kvm,
    /// Memory of paused sandboxes.
    pub kept: KeptMemory,
    /// VMMs started ahead.
    pub pool: VmmPool,
    /// Connections to the store.
    pub shares: Arc<FairShare>,
    /// Packs on the local disk; `None` when none are kept.
    pub pack_cache: Option<CacheDir>,
    /// What is known of the blocks of root file systems.
    pub block_indexes: BlockIndexes,
    /// Booted templates.
    pub goldens: Goldens,
    /// Counters.
    pub metrics: Arc<Metrics>,
    /// Traces.
    pub telemetry: Telemetry,
    /// Names of snapshots that are being made.
    pub snapshot_names: Reservations,
    /// Requests a minute.
    pub rates: Rates,
    /// Networks of sandboxes.
    pub network: Networking,
    /// Cancelled when the supervisor ends: answers without an end of their own end then.
    pub ending: CancellationToken,
    vmm_program: PathBuf,
    /// Starts VMMs.
    pub launcher: Arc<Launcher>,
    /// Held from counting sandboxes to adding one, so that two requests cannot both take the last place.
    admission: Mutex<()>,
    /// Held from reading a head to taking the sandbox up: of two that find the same one, the later might put it back to where it was.
    adoption: tokio::sync::Mutex<()>,
}

/// A running supervisor. Dropping it leaves its tasks running; [`Supervisor::shutdown`] ends them.
#[derive(Debug)]
pub struct Supervisor {
    core: Arc<Core>,
    addr: SocketAddr,
    stop: CancellationToken,
    server: Option<JoinHandle<()>>,
    pool: JoinHandle<()>,
    background: Vec<JoinHandle<()>>,
    /// Refuses a second supervisor on the same data directory.
    _lock: File,
}

impl Supervisor {
    /// Checks the host, opens journal and store, adopts or settles every sandbox that the journal knows, and serves.
    pub async fn start(config: Config) -> Result<Self, Error> {
        Self::start_with(config, Sources::system()).await
    }

    /// The same with another clock and entropy.
    pub async fn start_with(mut config: Config, sources: Sources) -> Result<Self, Error> {
        let local = |action: String| move |source| Error::Local { action, source };
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.data_dir)
            .map_err(local(format!("create the data directory {}", config.data_dir.display())))?;
        config.data_dir = fs::canonicalize(&config.data_dir).map_err(local("find the data directory".to_owned()))?;
        let lock = take_lock(&config)?;
        host::raise_file_limit();
        if config.warm.huge_pages {
            host::offer_huge_pages();
        }
        let kvm = Kvm::probe();
        if let Some(advice) = kvm.advice() {
            tracing::warn!("{advice}");
        }
        let vmm_program = host::vmm_program(config.vmm.as_deref())?;
        let journal = Arc::new(Journal::open(&config.data_dir.join(JOURNAL))?);
        let owner = identity::owner(&journal, &config.data_dir, &sources)?;
        let metrics = Arc::new(Metrics::default());
        let telemetry = Telemetry::start(&config.telemetry, &owner)?;
        let store = Store::open(&config, &owner, &sources, &metrics).await?;
        for caveat in store.caveats() {
            tracing::warn!("the store: {caveat}");
        }
        let uploads = Uploads::new(&config.data_dir);
        uploads.sweep().map_err(local(format!("look through {}", uploads.root().display())))?;
        let templates = Templates::new(&config.images_dir).with_uploads(uploads.root());
        match templates.names() {
            Ok(names) if names.is_empty() => {
                tracing::warn!("there are no templates in {}; build the images first", templates.dir().display());
            }
            Ok(names) => tracing::info!(?names, "templates"),
            Err(error) => tracing::warn!(error = crate::error::chain(&error), "templates"),
        }
        let registry = Registry::load(journal.clone(), sources.clone())?;
        // Bound before the adoption, so that a taken port changes nothing; served after it.
        let listener =
            TcpListener::bind(config.listen).await.map_err(local(format!("listen on {} (listen)", config.listen)))?;
        let tls = front::tls::of(&config.tls)?;
        let addr = listener.local_addr().map_err(local("find the port".to_owned()))?;
        let (settings, program) = (config.clone(), vmm_program.clone());
        let launcher = tokio::task::spawn_blocking(move || Launcher::new(&settings, &program));
        let launcher =
            Arc::new(launcher.await.map_err(|e| local("find a warden".to_owned())(std::io::Error::other(e)))??);
        let network = Networking::open(&config, &launcher).await?;
        let pool = VmmPool::new(
            launcher.clone(),
            &config.data_dir.join(RUN),
            config.warm.vmm_pool,
            config.deadlines.control(),
        );
        let stop = CancellationToken::new();
        let core = Arc::new(Core {
            kept: KeptMemory::new(config.warm.keep_memory_bytes(memory_pressure::host_bytes())),
            pool,
            shares: FairShare::new(config.limits.host_connections, config.limits.connections),
            pack_cache: open_pack_cache(&config),
            block_indexes: BlockIndexes::new(config.data_dir.join(BLOCKS)),
            goldens: Goldens::default(),
            builds: Builds::new(uploads, config.templates.builds),
            metrics,
            telemetry,
            snapshot_names: Reservations::default(),
            rates: Rates::new(config.limits.requests_per_minute, config.limits.host_requests_per_minute),
            config,
            journal,
            sources,
            store,
            templates,
            registry,
            owner,
            kvm,
            ending: stop.clone(),
            vmm_program,
            launcher,
            network,
            admission: Mutex::new(()),
            adoption: tokio::sync::Mutex::default(),
        });
        let front = Front::new(core.clone(), tls)?;
        restart::run(&core).await?;
        core.settle_networks().await?;
        let (pooled, pool_stop) = (core.clone(), stop.clone());
        let pool = tokio::spawn(async move { pooled.pool.run(pool_stop).await });
        let background = vec![
            tokio::spawn(timers::run(core.clone(), stop.clone())),
            tokio::spawn(pressure::run(core.clone(), stop.clone())),
            tokio::spawn(ahead::run(core.clone(), stop.clone())),
            tokio::spawn(collect::run(core.clone(), stop.clone())),
            tokio::spawn(network::run(core.clone(), stop.clone())),
        ];
        let server = tokio::spawn(front::serve(listener, front, stop.clone()));
        tracing::info!(%addr, owner = core.owner, "stasis serves");
        Ok(Self { core, addr, stop, server: Some(server), pool, background, _lock: lock })
    }

    /// Where the API is.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What operations share.
    pub fn core(&self) -> &Arc<Core> {
        &self.core
    }

    /// Stops serving and pauses every sandbox that runs. What cannot be paused goes on, as at a [`Supervisor::shutdown`]; how many do is
    /// answered.
    pub async fn pause_all(&mut self) -> usize {
        // First, so that no request wakes one again.
        self.end_serving().await;
        let core = &self.core;
        let running = core.registry.all().into_iter().filter(|sandbox| sandbox.state() == State::Running);
        let pauses = futures::stream::iter(running).map(|sandbox| async move {
            let outcome = operations::pause(core, &sandbox).await;
            if let Err(error) = &outcome {
                tracing::warn!(id = %sandbox.id, error = error.chain(), "it is not paused and goes on");
            }
            outcome.is_err()
        });
        pauses.buffer_unordered(PAUSES).filter(|left| std::future::ready(*left)).count().await
    }

    async fn end_serving(&mut self) {
        self.stop.cancel();
        if let Some(server) = self.server.take()
            && tokio::time::timeout(DRAIN, server).await.is_err()
        {
            tracing::warn!("requests in flight were cut off");
        }
    }

    /// Stops serving. Sandboxes keep running; the next supervisor on this data directory adopts them. Operations under way get a moment to
    /// end; those that need longer are finished or rolled back by the next supervisor.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        self.background.iter().for_each(JoinHandle::abort);
        if tokio::time::timeout(DRAIN, &mut self.pool).await.is_err() {
            tracing::warn!("VMMs started ahead are left to the next start");
        }
        self.core.kept.shrink_to(0);
        self.end_serving().await;
        let idle = async {
            for sandbox in self.core.registry.all() {
                drop(sandbox.lock().await);
            }
        };
        if tokio::time::timeout(DRAIN, idle).await.is_err() {
            tracing::warn!("operations under way are left to the next start");
        }
        if tokio::time::timeout(DRAIN, self.core.launcher.cleared()).await.is_err() {
            tracing::warn!("run directories of VMMs that were killed are left to the next start");
        }
        let core = self.core.clone();
        // Its result is what it logs.
        let _ = tokio::task::spawn_blocking(move || core.telemetry.end()).await;
    }
}

/// The pack cache, where one is wanted and can be used.
fn open_pack_cache(config: &Config) -> Option<CacheDir> {
    let budget = config.warm.pack_cache_bytes(&config.data_dir);
    // A directory store is as near as a cache of it would be.
    if budget == 0 || matches!(config.store, StoreConfig::Directory { .. }) {
        return None;
    }
    let dir = config.data_dir.join(PACKS);
    match CacheDir::open_root(&dir, budget) {
        Ok(cache) => Some(cache),
        Err(error) => {
            tracing::warn!(%error, dir = %dir.display(), "no packs are kept on the local disk");
            None
        }
    }
}

fn take_lock(config: &Config) -> Result<File, Error> {
    let path = config.data_dir.join("lock");
    let local = |source| Error::Local { action: format!("open {}", path.display()), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(local)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Host(format!(
            "another supervisor uses the data directory {}; stop it or choose another data_dir",
            config.data_dir.display()
        ))),
        Err(e) => Err(local(e.into())),
    }
}

/// Starts a task in the request's span, so that its log has the request's id, and in its trace.
fn spawn_within<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    tokio::spawn(work.in_current_span().with_current_context())
}

/// Runs an operation in a task of its own, so that a client that hangs up does not cancel it half-way.
async fn detached<T: Send + 'static>(
    operation: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    match spawn_within(operation).await {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::error!(%error, "an operation did not end");
            Err(Error::Bug("an operation did not end"))
        }
    }
}

/// Runs what blocks (hashing a template, opening files) where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => {
            tracing::error!(%error, "a blocking task did not end");
            Err(Error::Bug("a blocking task did not end"))
        }
    }
}

/// What the API may ask for.
pub mod operations {
    pub use super::create::create;
    pub use super::delete::{delete, undelete};
    pub use super::execute::{Executed, execute};
    pub use super::git::{GitDone, git};
    pub use super::guest::{Guest, reach};
    pub use super::pause::pause;
    pub use super::resume::{ensure_running, resume};
    pub use super::snapshots::{create as create_snapshot, delete as delete_snapshot, restore as restore_snapshot};
    pub use super::start::start;
    pub use super::stop::stop;
    pub use super::templates::{
        delete as delete_template, get as get_template, list as list_templates, rename as rename_template,
        upload as upload_template,
    };
}
