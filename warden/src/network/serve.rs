//! Networks as requests: what the supervisor may ask, and what is done with it.
//!
//! | request | answer | descriptors with the answer |
//! | --- | --- | --- |
//! | [`Request::Open`] | [`Reply::Done`] | – |
//! | [`Request::Claim`] | [`Reply::Claimed`] | tap, proxy, DNS over UDP, DNS over TCP |
//! | [`Request::SetUp`] | [`Reply::Done`] | – |
//! | [`Request::Listeners`] | [`Reply::Done`] | proxy, DNS over UDP, DNS over TCP |
//! | [`Request::Report`] | [`Reply::Report`] | – |
//! | [`Request::Release`] | [`Reply::Done`] | – |
//! | [`Request::Owners`] | [`Reply::Owners`] | – |
//!
//! One thread keeps networks ready.

use super::policy::{Operator, Policy};
use super::range::Range;
use super::report::Report;
use super::{Listeners, Mounts, NetworkError, Networks, Settings};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Networks kept ready at most.
pub const MAX_READY: u16 = 64;
/// Owners in one answer.
pub const OWNERS_AT_ONCE: usize = 500;
/// The claim that took a network comes first: its processor time is not to be spent on the next one.
const REFILL_AFTER: Duration = Duration::from_millis(100);
/// After one that could not be made.
const RETRY_AFTER: Duration = Duration::from_secs(5);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Networks are wanted, by these settings. Before anything else; again when the settings change, or the warden was restarted.
    Open {
        /// Addresses of the veths. They may change only while there is no network.
        addresses: Range,
        /// Networks kept ready, up to [`MAX_READY`].
        ready: u16,
        /// The operator's lists.
        operator: Operator,
    },
    /// A network for `owner`, which has none.
    Claim {
        /// Whose it is.
        owner: String,
        /// What it lets pass.
        policy: Policy,
    },
    /// The owner's tap carries packets, or not.
    SetUp {
        /// Whose.
        owner: String,
        /// Whether it does.
        up: bool,
    },
    /// The owner's sockets once more.
    Listeners {
        /// Whose.
        owner: String,
    },
    /// What passed and what was refused.
    Report {
        /// Whose.
        owner: String,
    },
    /// The owner's network is taken away, if it has one.
    Release {
        /// Whose.
        owner: String,
    },
    /// Who has a network: [`OWNERS_AT_ONCE`] at most, in order, those after this one.
    Owners {
        /// The last one of the answer before; empty at first.
        after: String,
    },
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// It is so.
    Done,
    /// To [`Request::Claim`].
    Claimed {
        /// The sandbox's address as the host sees it.
        address: Ipv4Addr,
    },
    /// To [`Request::Report`].
    Report(Report),
    /// To [`Request::Owners`].
    Owners(Vec<String>),
}

/// Networks of this host, once they are wanted.
#[derive(Debug)]
pub struct Service {
    mounts: Mounts,
    state_dir: PathBuf,
    open: Mutex<Option<Open>>,
}

#[derive(Debug)]
struct Open {
    networks: Arc<Networks>,
    settings: Settings,
    /// Wakes the thread that keeps networks ready; it ends when this is dropped.
    taken: SyncSender<()>,
}

impl Service {
    /// One that keeps what a restart must find below `state_dir`, among `mounts`.
    pub fn new(mounts: Mounts, state_dir: &Path) -> Self {
        Self { mounts, state_dir: state_dir.to_owned(), open: Mutex::default() }
    }

    /// Carries out a request.
    pub fn serve(&self, request: Request) -> Result<(Reply, Vec<OwnedFd>), NetworkError> {
        let done = |()| (Reply::Done, Vec::new());
        match request {
            Request::Open { addresses, ready, operator } => {
                let ready = usize::from(ready.min(MAX_READY));
                let (mounts, state_dir) = (self.mounts.clone(), self.state_dir.clone());
                self.open(Settings { mounts, state_dir, addresses, ready, operator, ..Settings::default() }).map(done)
            }
            Request::Claim { owner, policy } => {
                let (networks, taken) = {
                    let open = self.lock();
                    let open = open.as_ref().ok_or(NetworkError::Closed)?;
                    (open.networks.clone(), open.taken.clone())
                };
                let claimed = networks.claim(&owner, &policy)?;
                // Full: the thread knows already.
                let _ = taken.try_send(());
                let Listeners { proxy, dns, dns_tcp } = claimed.listeners;
                Ok((Reply::Claimed { address: claimed.address }, vec![claimed.tap, proxy, dns, dns_tcp]))
            }
            Request::SetUp { owner, up } => self.networks()?.set_up(&owner, up).map(done),
            Request::Listeners { owner } => {
                let Listeners { proxy, dns, dns_tcp } = self.networks()?.listeners(&owner)?;
                Ok((Reply::Done, vec![proxy, dns, dns_tcp]))
            }
            Request::Report { owner } => Ok((Reply::Report(self.networks()?.report(&owner)?), Vec::new())),
            Request::Release { owner } => self.networks()?.release(&owner).map(done),
            Request::Owners { after } => {
                let mut owners = self.networks()?.owners();
                owners.retain(|owner| *owner > after);
                owners.truncate(OWNERS_AT_ONCE);
                Ok((Reply::Owners(owners), Vec::new()))
            }
        }
    }

    /// The owner's namespace, for a process that is to run in it.
    pub fn handle(&self, owner: &str) -> Result<OwnedFd, NetworkError> {
        self.networks()?.handle(owner)
    }

    fn open(&self, settings: Settings) -> Result<(), NetworkError> {
        let mut open = self.lock();
        if let Some(open) = &*open {
            let (now, wanted) = (&open.settings, &settings);
            if (now.addresses, now.ready, &now.operator) == (wanted.addresses, wanted.ready, &wanted.operator) {
                return Ok(());
            }
            if open.settings.addresses != settings.addresses && !open.networks.owners().is_empty() {
                let reason = "the addresses of networks cannot change while sandboxes have networks".to_owned();
                return Err(NetworkError::Invalid(reason));
            }
            open.networks.drain()?;
        }
        // What has owners is found again: all that matters is in the kernel.
        let networks = Arc::new(Networks::open(settings.clone())?);
        let (taken, wakes) = sync_channel(1);
        let keeper = networks.clone();
        std::thread::Builder::new()
            .name("networks".to_owned())
            .spawn(move || keep_ready(&keeper, &wakes))
            .map_err(|source| NetworkError::Local { action: "start a thread", source })?;
        *open = Some(Open { networks, settings, taken });
        Ok(())
    }

    fn networks(&self) -> Result<Arc<Networks>, NetworkError> {
        self.lock().as_ref().map(|open| open.networks.clone()).ok_or(NetworkError::Closed)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn keep_ready(networks: &Networks, wakes: &Receiver<()>) {
    loop {
        let pause = loop {
            match networks.refill() {
                Ok(true) => {}
                Ok(false) => break None,
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot make a network ready");
                    break Some(RETRY_AFTER);
                }
            }
        };
        let woken = match pause {
            Some(pause) => match wakes.recv_timeout(pause) {
                Err(RecvTimeoutError::Timeout) => Ok(()),
                other => other.map_err(drop),
            },
            None => wakes.recv().map_err(drop),
        };
        // A moment in which nobody asks ends it, too: the other end is gone.
        if woken.is_err() || matches!(wakes.recv_timeout(REFILL_AFTER), Err(RecvTimeoutError::Disconnected)) {
            // Nobody will claim them.
            if let Err(error) = networks.drain() {
                tracing::warn!(error = chain(&error), "networks that were ready are left");
            }
            return;
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
