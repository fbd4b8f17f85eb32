//! Networks of sandboxes: a namespace, a tap and a veth each, with rules that say what the sandbox may reach.
//!
//! | module | what |
//! | --- | --- |
//! | [`policy`], [`range`] | what the warden is told: policies, the operator's lists, limits |
//! | `rules`, `host` | the tables of a sandbox's namespace and of the host's, as plain data |
//! | `plan` | what is done with what an earlier warden left |
//! | `namespace` | one namespace: made, opened again, removed |
//! | [`serve`] | networks as requests and answers |
//! | [`tap`] | the link whose other end is a VMM's |
//! | `report` | what passed and what was refused |
//! | `nft`, `links`, `netlink` | how the kernel is told |
//!
//! [`Networks`] is what the rest of the warden uses. It makes networks ahead, since one takes some ten milliseconds; a claimed one gets the
//! sandbox's policy before anybody gets its tap. A policy is set once: a network belongs to one life of a VM, and the next wake gets another.
//! Until it is claimed, and whenever something fails on the way, a network lets nothing pass.
//!
//! What there is stands in the kernel alone: a file below the state directory holds each namespace, and the alias of each veth says whose it
//! is. [`Networks::open`] plans from that what goes on and what goes.

mod host;
mod links;
mod namespace;
mod netlink;
mod nft;
mod plan;
pub mod policy;
pub mod range;
mod report;
mod rules;
pub mod serve;
pub mod tap;

use self::links::Links;
use self::namespace::{Made, Namespace};
use self::plan::{Found, Step};
use self::policy::{Operator, Policy};
use self::range::Range;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::namespace::{Listeners, Mounts};
pub use self::netlink::NetlinkError;
pub use self::report::{Refusal, Report, Traffic};
pub use self::rules::{Passed, Reason};

/// The guest's address, the same for every guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 2);
/// The gateway's, which is also the guest's resolver.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 1);
/// Hardware address of the guest's network device.
pub const GUEST_HARDWARE: [u8; 6] = [0x02, 0x53, 0x54, 0x41, 0x53, 0x02];
/// Hardware address of the gateway.
pub const GATEWAY_HARDWARE: [u8; 6] = [0x02, 0x53, 0x54, 0x41, 0x53, 0x01];
/// Greatest packet.
pub const MTU: u32 = 1500;
/// The tap's name in its namespace.
const TAP: &str = "tap0";
/// The veth's name in the sandbox's namespace.
const UPLINK: &str = "up0";
/// Longest name of an owner: what fits beside a link.
const MAX_OWNER: usize = 255;

/// Settings of [`Networks`].
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where `state_dir` is.
    pub mounts: Mounts,
    /// Holds the files that namespaces are bound to. On a file system that a reboot empties, as the namespaces end with it.
    pub state_dir: PathBuf,
    /// What the names of the host's ends of veths begin with: up to 7 letters.
    pub prefix: String,
    /// Addresses of the veths, two for each network.
    pub addresses: Range,
    /// Networks that are kept ready.
    pub ready: usize,
    /// The operator's lists.
    pub operator: Operator,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            mounts: Mounts::default(),
            state_dir: PathBuf::from("/run/stasis-warden/networks"),
            prefix: "stv".to_owned(),
            addresses: Range::new(Ipv4Addr::new(100, 96, 0, 0), 11),
            ready: 4,
            operator: Operator::default(),
        }
    }
}

/// Why a network cannot be made, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused something of links or rules.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// Something else on this host failed.
    #[error("cannot {action}")]
    Local {
        /// What.
        action: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A thread of ours did not end as it should.
    #[error("the thread that works on a namespace panicked")]
    Thread,
    /// All addresses are taken.
    #[error("the range {0} has no more addresses for networks")]
    Full(Range),
    /// There is none for this owner.
    #[error("{0} has no network")]
    Unknown(String),
    /// The owner has one already.
    #[error("{0} has a network already")]
    Taken(String),
    /// Nobody has said yet that networks are wanted.
    #[error("networks are not open on this host")]
    Closed,
    /// The owner's name, the policy or a setting is out of bounds.
    #[error("{0}")]
    Invalid(String),
}

/// A network as its owner gets it.
#[derive(Debug)]
pub struct Claimed {
    /// For the VMM: a tap with virtio headers, down until [`Networks::set_up`].
    pub tap: OwnedFd,
    /// For the egress process.
    pub listeners: Listeners,
    /// The sandbox's address as the host's namespace sees it.
    pub address: Ipv4Addr,
}

/// The networks of this host. All methods may be called from any thread; what they do to one network is done one after the other.
#[derive(Debug)]
pub struct Networks {
    settings: Settings,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    links: Links,
    ready: VecDeque<(u32, Made)>,
    owned: BTreeMap<String, (u32, Namespace)>,
    /// Networks that cannot be opened any more, by their owners ([`Step::Leave`]).
    left: BTreeMap<String, u32>,
    /// Numbers that are not free: of networks that there are, or that are being made.
    used: BTreeSet<u32>,
}

impl Networks {
    /// Finds what an earlier warden left, lets what is whole go on and removes the rest, and puts the host's table in place.
    pub fn open(settings: Settings) -> Result<Self, NetworkError> {
        if settings.prefix.is_empty() || settings.prefix.len() > 7 {
            return Err(NetworkError::Invalid(format!(
                "the prefix {:?} of links has not 1 to 7 letters",
                settings.prefix
            )));
        }
        let local = |action| move |source| NetworkError::Local { action, source };
        let mut links = Links::open()?;
        let was_router = host::is_router().map_err(local("read whether this host forwards"))?;
        let table = host::table(&settings.prefix, settings.addresses, &settings.operator, was_router);
        table.replace(&mut netlink::Socket::netfilter()?)?;
        let listed = links.list()?;
        // Answers come in by any link that leads out.
        for link in listed.iter().filter(|link| link.name != "lo") {
            host::forward_from(&link.name).map_err(local("let a link forward"))?;
        }
        let mut inner = Inner {
            links,
            ready: VecDeque::new(),
            owned: BTreeMap::new(),
            left: BTreeMap::new(),
            used: BTreeSet::new(),
        };
        let (found, veths) = find(&settings, &listed)?;
        for (number, step) in plan::plan(&found) {
            let file = settings.state_dir.join(number.to_string());
            match step {
                Step::Adopt { owner } => {
                    let namespace = Namespace::open(&settings.mounts, &file)?;
                    inner.used.insert(number);
                    inner.owned.insert(owner, (number, namespace));
                }
                Step::Leave { owner } => {
                    tracing::warn!(owner, "the network goes on, and cannot be changed until its owner wakes again");
                    inner.used.insert(number);
                    inner.left.insert(owner, number);
                }
                Step::Remove => {
                    // The veth last: while it is there, the network can be found again.
                    namespace::remove(&settings.mounts, &file)?;
                    if let Some(index) = veths.get(&number) {
                        // It may have ended with its namespace meanwhile.
                        let _ = inner.links.delete(*index);
                    }
                }
            }
        }
        Ok(Self { settings, inner: Mutex::new(inner) })
    }

    /// Makes one more network ready if fewer wait than should; answers whether more are missing. For a thread that does nothing else.
    pub fn refill(&self) -> Result<bool, NetworkError> {
        if self.lock().ready.len() >= self.settings.ready {
            return Ok(false);
        }
        let made = self.make()?;
        let mut inner = self.lock();
        inner.ready.push_back(made);
        Ok(inner.ready.len() < self.settings.ready)
    }

    /// How many wait to be claimed.
    pub fn waiting(&self) -> usize {
        self.lock().ready.len()
    }

    /// Gives `owner` a network of its own that follows `policy`: one that is ready, or a new one.
    pub fn claim(&self, owner: &str, policy: &Policy) -> Result<Claimed, NetworkError> {
        if owner.is_empty() || owner.len() > MAX_OWNER {
            return Err(NetworkError::Invalid(format!("{owner:?} is no name of 1 to {MAX_OWNER} octets")));
        }
        if policy.allow.len() > policy::MAX_RANGES {
            return Err(NetworkError::Invalid(format!("a policy has {} ranges at most", policy::MAX_RANGES)));
        }
        if self.lock().owned.contains_key(owner) {
            return Err(NetworkError::Taken(owner.to_owned()));
        }
        let ready = self.lock().ready.pop_front();
        let (number, mut made) = match ready {
            Some(ready) => ready,
            None => self.make()?,
        };
        let address = self.pair(number)?.0;
        let outcome = self.hand_over(owner, policy, number, &mut made);
        let mut inner = self.lock();
        match outcome {
            Ok(()) if !inner.owned.contains_key(owner) => {
                inner.owned.insert(owner.to_owned(), (number, made.namespace));
                Ok(Claimed { tap: made.tap, listeners: made.listeners, address })
            }
            outcome => {
                drop(inner);
                self.remove(number, made.namespace)?;
                outcome.and(Err(NetworkError::Taken(owner.to_owned())))
            }
        }
    }

    /// Rules, then the owner's name: a network with an owner has the owner's rules.
    fn hand_over(&self, owner: &str, policy: &Policy, number: u32, made: &mut Made) -> Result<(), NetworkError> {
        let mut host = self.lock().links.addresses()?;
        // Those of veths are reserved anyway.
        host.retain(|address| !self.settings.addresses.contains(*address));
        made.namespace.rules_of(policy, &self.settings.operator, &host)?;
        let mut inner = self.lock();
        let index = inner.links.index_of(&self.veth(number))?;
        Ok(inner.links.set_alias(index, owner)?)
    }

    /// Lets the owner's tap carry packets, or not.
    pub fn set_up(&self, owner: &str, up: bool) -> Result<(), NetworkError> {
        Ok(self.of(owner, |namespace| namespace.set_tap(up))??)
    }

    /// New sockets for the egress process, when the one that had them has ended.
    pub fn listeners(&self, owner: &str) -> Result<Listeners, NetworkError> {
        self.of(owner, |namespace| namespace.listeners())?
    }

    /// The owner's namespace, for a process that is to run in it.
    pub fn handle(&self, owner: &str) -> Result<OwnedFd, NetworkError> {
        self.of(owner, |namespace| namespace.handle().try_clone_to_owned())?
            .map_err(|source| NetworkError::Local { action: "share a namespace", source })
    }

    /// What passed and what was refused so far.
    pub fn report(&self, owner: &str) -> Result<Report, NetworkError> {
        let (counters, notes) = self.of(owner, Namespace::read)??;
        Ok(report::report(&counters, &notes))
    }

    /// Takes the owner's network away. One that it does not have is no error.
    pub fn release(&self, owner: &str) -> Result<(), NetworkError> {
        let found = self.lock().owned.remove(owner);
        if let Some((number, namespace)) = found {
            return self.remove(number, namespace);
        }
        let left = self.lock().left.remove(owner);
        left.map_or(Ok(()), |number| self.remove_veth(number))
    }

    /// Owners of networks, in order.
    pub fn owners(&self) -> Vec<String> {
        let inner = self.lock();
        let all: BTreeSet<_> = inner.owned.keys().chain(inner.left.keys()).cloned().collect();
        all.into_iter().collect()
    }

    /// Takes away all that is ready: at an orderly end.
    pub fn drain(&self) -> Result<(), NetworkError> {
        loop {
            let Some((number, made)) = self.lock().ready.pop_front() else { return Ok(()) };
            self.remove(number, made.namespace)?;
        }
    }

    /// Without the lock: the kernel takes its time to end links.
    fn remove(&self, number: u32, namespace: Namespace) -> Result<(), NetworkError> {
        namespace.remove()?;
        self.remove_veth(number)
    }

    fn remove_veth(&self, number: u32) -> Result<(), NetworkError> {
        // Now, and not when the kernel comes to it: the name and the addresses are used again.
        let mut links = Links::open()?;
        if let Ok(index) = links.index_of(&self.veth(number)) {
            // It may have ended with its namespace meanwhile.
            let _ = links.delete(index);
        }
        self.lock().used.remove(&number);
        Ok(())
    }

    fn make(&self) -> Result<(u32, Made), NetworkError> {
        let number = {
            let mut inner = self.lock();
            let number = (0..self.capacity()).find(|number| !inner.used.contains(number));
            let number = number.ok_or(NetworkError::Full(self.settings.addresses))?;
            inner.used.insert(number);
            number
        };
        let file = self.file(number);
        let made = self.pair(number).and_then(|pair| {
            let mut links = Links::open()?;
            Namespace::make(&self.settings.mounts, &file, &self.veth(number), pair, &mut links, &self.settings.operator)
        });
        match made {
            Ok(made) => Ok((number, made)),
            Err(error) => {
                if let Err(left) = namespace::remove(&self.settings.mounts, &file) {
                    tracing::warn!(number, error = %left, "half a network is left");
                } else {
                    self.lock().used.remove(&number);
                }
                Err(error)
            }
        }
    }

    fn of<T>(&self, owner: &str, work: impl FnOnce(&mut Namespace) -> T) -> Result<T, NetworkError> {
        let mut inner = self.lock();
        let (_, namespace) = inner.owned.get_mut(owner).ok_or_else(|| NetworkError::Unknown(owner.to_owned()))?;
        Ok(work(namespace))
    }

    fn capacity(&self) -> u32 {
        1_u32.checked_shl(31_u32.saturating_sub(u32::from(self.settings.addresses.prefix()))).unwrap_or(u32::MAX)
    }

    /// The sandbox's and the host's address of a network.
    fn pair(&self, number: u32) -> Result<(Ipv4Addr, Ipv4Addr), NetworkError> {
        let host = u32::from(self.settings.addresses.first()).checked_add(number * 2);
        let host = host.filter(|_| number < self.capacity()).ok_or(NetworkError::Full(self.settings.addresses))?;
        Ok((Ipv4Addr::from(host | 1), Ipv4Addr::from(host)))
    }

    fn veth(&self, number: u32) -> String {
        format!("{}{number}", self.settings.prefix)
    }

    fn file(&self, number: u32) -> PathBuf {
        self.settings.state_dir.join(number.to_string())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// By the numbers of networks: what there is of each.
type AllFound = BTreeMap<u32, Found>;
/// By the numbers of networks: the numbers of their veths' links.
type Veths = BTreeMap<u32, u32>;

fn find(settings: &Settings, links: &[links::Link]) -> Result<(AllFound, Veths), NetworkError> {
    let mut found = AllFound::new();
    let files = settings.mounts.run(|| {
        let local = |source| NetworkError::Local { action: "look into the state directory", source };
        std::fs::create_dir_all(&settings.state_dir).map_err(local)?;
        let entries = std::fs::read_dir(&settings.state_dir).map_err(local)?.flatten();
        let held = |entry: std::fs::DirEntry| {
            Some((entry.file_name().to_str()?.parse().ok()?, namespace::is_held(&entry.path())))
        };
        Ok(entries.filter_map(held).collect::<Vec<_>>())
    })?;
    for (number, held) in files {
        let network = found.entry(number).or_default();
        (network.file, network.namespace) = (true, held);
    }
    let mut veths = Veths::new();
    for link in links {
        let number = link.name.strip_prefix(&settings.prefix).and_then(|number| number.parse().ok());
        if let Some(number) = number {
            let network = found.entry(number).or_default();
            (network.veth, network.owner) = (true, link.alias.clone());
            veths.insert(number, link.index);
        }
    }
    Ok((found, veths))
}

/// Takes away everything of these settings: networks of owners too, and the host's table. For who uninstalls.
pub fn remove_all(state_dir: &Path, prefix: &str) -> Result<(), NetworkError> {
    let settings = Settings { state_dir: state_dir.to_owned(), prefix: prefix.to_owned(), ..Settings::default() };
    let mut links = Links::open()?;
    let listed = links.list()?;
    let (found, veths) = find(&settings, &listed)?;
    for number in found.keys() {
        namespace::remove(&settings.mounts, &state_dir.join(number.to_string()))?;
    }
    for index in veths.values() {
        let _ = links.delete(*index);
    }
    Ok(nft::delete(host::TABLE, &mut netlink::Socket::netfilter()?)?)
}
