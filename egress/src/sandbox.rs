//! One sandbox: its policy of the moment, its sockets, its limits and counters.
//!
//! A policy and all that was let through under it are an [`Era`]. Every connection is a task of an era; when the era ends, so do they. A new
//! policy begins an era and ends the one before, and is in force when the last task of the old one has gone: nothing outlives what allowed it.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::authority::{AuthorityError, Issuing};
use crate::config::Settings;
use crate::control::types::{Authority, Policy, Sockets, Via};
use crate::counters::{Counters, Refused};
use crate::dns;
use crate::dns::resolver::{Resolver, Servers};
use crate::proxy;
use crate::proxy::upstream::Roots;
use crate::rate::Bucket;
use crate::rules::{Rule, Rules, RulesError};

/// For the tasks of an ended era to be gone. They end at their next step; one that does not would have to be stuck in a system call.
const END_WAIT: Duration = Duration::from_secs(5);

/// A sandbox could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetUpError {
    /// Its policy.
    #[error("the policy makes no sense")]
    Policy(#[from] RulesError),
    /// Its authority.
    #[error("the authority makes no sense")]
    Authority(#[from] AuthorityError),
    /// Transforms, and nothing to end TLS with.
    #[error("a policy with transforms needs an authority")]
    NoAuthority,
    /// A socket.
    #[error("cannot use the {which} socket")]
    Socket {
        /// Which.
        which: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Connections of an ended policy that are still there.
    #[error("connections of the policy before did not end")]
    StillThere,
}

/// What all sandboxes of the process share.
pub(crate) struct Shared {
    pub(crate) settings: Settings,
    pub(crate) servers: Servers,
    pub(crate) roots: Roots,
}

/// A policy in force.
pub(crate) struct Era {
    pub(crate) rules: Rules,
    pub(crate) authority: Option<Issuing>,
    ended: CancellationToken,
    tasks: TaskTracker,
}

impl Era {
    fn new(policy: &Policy, authority: Option<&Authority>, counters: &Counters) -> Result<Arc<Self>, SetUpError> {
        let rules = Rules::new(policy, counters)?;
        if rules.has_transforms() && authority.is_none() {
            return Err(SetUpError::NoAuthority);
        }
        let authority = authority.map(Issuing::new).transpose()?;
        Ok(Arc::new(Self { rules, authority, ended: CancellationToken::new(), tasks: TaskTracker::new() }))
    }

    /// Runs `task` until it or the era ends.
    pub(crate) fn spawn(self: &Arc<Self>, task: impl Future<Output = ()> + Send + 'static) {
        let ended = self.ended.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                biased;
                () = ended.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// Ends every task and waits until they are gone.
    async fn end(&self) -> Result<(), SetUpError> {
        self.ended.cancel();
        self.tasks.close();
        tokio::time::timeout(END_WAIT, self.tasks.wait()).await.map_err(|_| SetUpError::StillThere)
    }
}

/// Bytes that wait for slow readers.
#[derive(Debug, Default)]
pub(crate) struct Buffered(std::sync::atomic::AtomicUsize);

impl Buffered {
    /// Counts `bytes` for as long as the answer lives; none when there would be more than `most`.
    pub(crate) fn hold(self: &Arc<Self>, bytes: usize, most: usize) -> Option<Held> {
        use std::sync::atomic::Ordering::Relaxed;
        let before = self.0.fetch_add(bytes, Relaxed);
        let held = Held { of: Arc::clone(self), bytes };
        (before + bytes <= most).then_some(held)
    }
}

/// See [`Buffered::hold`].
pub(crate) struct Held {
    of: Arc<Buffered>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.of.0.fetch_sub(self.bytes, std::sync::atomic::Ordering::Relaxed);
    }
}

/// A sandbox that the process serves.
pub(crate) struct Sandbox {
    pub(crate) shared: Arc<Shared>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) resolver: Resolver,
    pub(crate) buffered: Arc<Buffered>,
    pub(crate) new_connections: Mutex<Bucket>,
    era: RwLock<Arc<Era>>,
    /// Ends what reads the sockets, which closes them.
    sockets: CancellationToken,
    listeners: TaskTracker,
}

impl Sandbox {
    /// Sets one up that serves nothing yet.
    pub(crate) fn new(
        shared: &Arc<Shared>,
        counters: Arc<Counters>,
        policy: &Policy,
        authority: Option<&Authority>,
    ) -> Result<Arc<Self>, SetUpError> {
        let era = Era::new(policy, authority, &counters)?;
        Ok(Arc::new(Self {
            resolver: Resolver::new(&shared.settings, Arc::clone(&shared.servers)),
            new_connections: Mutex::new(Bucket::new(shared.settings.limits.new_connections, Instant::now())),
            buffered: Arc::default(),
            shared: Arc::clone(shared),
            counters,
            era: RwLock::new(era),
            sockets: CancellationToken::new(),
            listeners: TaskTracker::new(),
        }))
    }

    /// Begins to serve its sockets.
    pub(crate) fn serve(self: &Arc<Self>, sockets: Sockets) -> Result<(), SetUpError> {
        let failed = |which| move |source| SetUpError::Socket { which, source };
        let tcp = |which, socket: std::net::TcpListener| {
            socket.set_nonblocking(true).and_then(|()| TcpListener::from_std(socket)).map_err(failed(which))
        };
        let proxy = sockets.proxy.map(|s| tcp("proxy", s)).transpose()?;
        let dns_tcp = sockets.dns_tcp.map(|s| tcp("DNS over TCP", s)).transpose()?;
        let udp = |s: std::net::UdpSocket| s.set_nonblocking(true).and_then(|()| UdpSocket::from_std(s));
        let dns_udp = sockets.dns_udp.map(udp).transpose().map_err(failed("DNS over UDP"))?;
        if let Some(listener) = proxy {
            self.listen(proxy::accept::run(Arc::clone(self), listener));
        }
        if let Some(listener) = dns_tcp {
            self.listen(dns::server::run_tcp(Arc::clone(self), listener));
        }
        if let Some(socket) = dns_udp {
            self.listen(dns::server::run_udp(Arc::clone(self), socket));
        }
        Ok(())
    }

    fn listen(&self, task: impl Future<Output = ()> + Send + 'static) {
        let ended = self.sockets.clone();
        self.listeners.spawn(async move {
            tokio::select! {
                biased;
                () = ended.cancelled() => {}
                () = task => {}
            }
        });
    }

    /// The policy in force.
    pub(crate) fn era(&self) -> Arc<Era> {
        Arc::clone(&self.era.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another policy in force. When this returns, nothing goes on that began under the one before.
    pub(crate) async fn replace(&self, policy: &Policy, authority: Option<&Authority>) -> Result<(), SetUpError> {
        let next = Era::new(policy, authority, &self.counters)?;
        let before = std::mem::replace(&mut *self.era.write().unwrap_or_else(PoisonError::into_inner), next);
        before.end().await
    }

    /// Closes its sockets and ends its connections.
    pub(crate) async fn end(&self) -> Result<(), SetUpError> {
        self.sockets.cancel();
        self.listeners.close();
        let closed = tokio::time::timeout(END_WAIT, self.listeners.wait()).await;
        let ended = self.era().end().await;
        closed.map_err(|_| SetUpError::StillThere).and(ended)
    }

    /// Counts and keeps a refusal.
    pub(crate) fn refuse(&self, rule: &Rule, via: Via, refused: &Refused, port: Option<u16>) {
        tracing::debug!(rule = &*rule.label, ?via, kind = ?refused.kind, name = refused.name, reason = refused.reason, "refused");
        self.counters.refuse(&rule.tally, via, refused, port, SystemTime::now());
    }
}
