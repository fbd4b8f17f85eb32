//! One sandbox's network namespace: made, opened again, given its rules, taken away.
//!
//! ```text
//!   sandbox's namespace                                            host's namespace
//!   tap0  100.64.0.1/30, 02:53:54:41:53:01  ── rules, NAT ──  up0  odd address of a /31  ═══ veth ═══  even address
//!     └ descriptor: the VMM's
//! ```
//!
//! Every guest is 100.64.0.2 with the same hardware address behind the same gateway, so that a snapshot that wakes elsewhere, or many times,
//! finds its network as it was. The pair of addresses towards the host is the namespace's own.
//!
//! The namespace is held by a file that it is bound to, as `ip netns` does: it outlives the warden, and a restarted warden opens it again.
//! The tap is not persistent: it ends with the last descriptor of it, which is the VMM's.
//!
//! Only a thread can enter a namespace, and a thread that did is never used for anything else: see [`Mounts::run`].

use super::links::Links;
use super::netlink::{NetlinkError, Socket};
use super::nft;
use super::policy::{Operator, Policy};
use super::rules::{self, PROXY_PORT, RESOLVER_PORT};
use super::tap;
use super::{GATEWAY, GATEWAY_HARDWARE, GUEST, GUEST_HARDWARE, MTU, NetworkError, TAP, UPLINK};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::net::sockopt::{set_ip_freebind, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Connections that wait for the proxy or the resolver to take them.
const BACKLOG: i32 = 128;

/// The listening sockets of a namespace, for the egress process.
#[derive(Debug)]
pub struct Listeners {
    /// TCP 80 and 443 of a policy with a proxy; `SO_ORIGINAL_DST` says where a connection was to go.
    pub proxy: OwnedFd,
    /// DNS over UDP.
    pub dns: OwnedFd,
    /// DNS over TCP.
    pub dns_tcp: OwnedFd,
}

/// An open namespace.
#[derive(Debug)]
pub(super) struct Namespace {
    mounts: Mounts,
    file: PathBuf,
    handle: OwnedFd,
    links: Links,
    rules: Socket,
}

/// What a new namespace comes with.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) namespace: Namespace,
    pub(super) tap: OwnedFd,
    pub(super) listeners: Listeners,
}

/// The mount namespace in which namespaces are bound to files. That of the host: what is bound in one of the warden's own would be gone with
/// the warden.
#[derive(Clone, Debug, Default)]
pub struct Mounts(Option<Arc<OwnedFd>>);

impl Mounts {
    /// Those that the calling thread has now, wherever it goes later.
    pub fn of_this_thread() -> io::Result<Self> {
        Ok(Self(Some(Arc::new(File::open("/proc/thread-self/ns/mnt")?.into()))))
    }

    /// Runs `work` among them, on a thread of its own, which may enter namespaces: it ends with it.
    pub(super) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> Result<T, NetworkError> + Send,
    ) -> Result<T, NetworkError> {
        let work = || {
            if let Self(Some(mounts)) = self {
                // SAFETY: only root and working directory cease to be shared with the other threads.
                call("leave the other threads' directory", unsafe { unshare_unsafe(UnshareFlags::FS) })?;
                let kind = Some(LinkNameSpaceType::Mount);
                call("enter a mount namespace", move_into_link_name_space(mounts.as_fd(), kind))?;
            }
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("namespace".to_owned());
            let running = thread.spawn_scoped(scope, work).map_err(at("start a thread"))?;
            running.join().unwrap_or(Err(NetworkError::Thread))
        })
    }
}

fn at(action: &'static str) -> impl Fn(io::Error) -> NetworkError {
    move |source| NetworkError::Local { action, source }
}

fn call<T>(action: &'static str, outcome: rustix::io::Result<T>) -> Result<T, NetworkError> {
    outcome.map_err(|source| NetworkError::Local { action, source: source.into() })
}

impl Namespace {
    /// Makes one, bound to `file`, that reaches `host` on the other side of a veth called `veth`. Its policy is to let nothing pass.
    pub(super) fn make(
        mounts: &Mounts,
        file: &Path,
        veth: &str,
        (own, host): (Ipv4Addr, Ipv4Addr),
        here: &mut Links,
        operator: &Operator,
    ) -> Result<Made, NetworkError> {
        let (mut namespace, tap) = mounts.run(|| {
            File::create(file).map_err(at("make a namespace's file"))?;
            // SAFETY: only the network namespace is unshared: descriptors stay shared between threads.
            call("make a network namespace", unsafe { unshare_unsafe(UnshareFlags::NEWNET) })?;
            // Held first: whatever fails from here on is found by its file and taken away.
            call("bind a namespace to its file", mount_bind("/proc/thread-self/ns/net", file))?;
            let mut namespace = Self {
                mounts: mounts.clone(),
                file: file.to_owned(),
                handle: open_namespace(file)?,
                links: Links::open()?,
                rules: Socket::netfilter()?,
            };
            // IPv6 off before there is a link that could get an address by itself.
            for link in ["all", "default"] {
                set(&format!("ipv6/conf/{link}/disable_ipv6"), "1")?;
            }
            set("ipv4/ip_forward", "1")?;
            // Refused connections are told so, however many: how many there may be is limited by the rules.
            set("ipv4/icmp_ratelimit", "0")?;
            let tap = call("make a tap", tap::open(TAP))?;
            let index = namespace.links.index_of(TAP)?;
            namespace.links.set_address(index, GATEWAY_HARDWARE)?;
            namespace.links.set_mtu(index, MTU)?;
            namespace.links.add_address(index, GATEWAY, 30)?;
            namespace.rules_of(&Policy::DENY, operator, &[])?;
            // Of conntrack, which the rules have loaded: a segment out of its window is the guest's affair, not a reason to end a connection.
            set("netfilter/nf_conntrack_tcp_be_liberal", "1")?;
            Ok((namespace, tap))
        })?;
        here.add_veth(veth, UPLINK, namespace.handle(), MTU)?;
        let outer = here.index_of(veth)?;
        here.add_address(outer, host, 31)?;
        set(&format!("ipv6/conf/{veth}/disable_ipv6"), "1")?;
        super::host::forward_from(veth).map_err(at("let a veth forward"))?;
        here.set_up(outer, true)?;
        let index = namespace.links.index_of(UPLINK)?;
        namespace.links.add_address(index, own, 31)?;
        namespace.links.set_up(index, true)?;
        namespace.links.add_default_route(index, host)?;
        let listeners = namespace.listeners()?;
        Ok(Made { namespace, tap, listeners })
    }

    /// Opens the one that `file` holds.
    pub(super) fn open(mounts: &Mounts, file: &Path) -> Result<Self, NetworkError> {
        mounts.run(|| {
            let handle = open_namespace(file)?;
            enter(handle.as_fd())?;
            let (links, rules) = (Links::open()?, Socket::netfilter()?);
            Ok(Self { mounts: mounts.clone(), file: file.to_owned(), handle, links, rules })
        })
    }

    /// Puts the rules of `policy` in the place of those before, in one step. `host` are the host's own addresses.
    pub(super) fn rules_of(
        &mut self,
        policy: &Policy,
        operator: &Operator,
        host: &[Ipv4Addr],
    ) -> Result<(), NetlinkError> {
        rules::table(policy, operator, host).replace(&mut self.rules)
    }

    /// Lets the tap carry packets, or not. What waits in it when it goes down is gone.
    pub(super) fn set_tap(&mut self, up: bool) -> Result<(), NetlinkError> {
        let index = self.links.index_of(TAP)?;
        self.links.set_up(index, up)?;
        if up {
            // Going down forgets neighbours, this one too.
            self.links.add_neighbour(index, GUEST, GUEST_HARDWARE)?;
        }
        Ok(())
    }

    /// Sockets that listen on the gateway's address: new ones, which take the place of those before when they are closed.
    pub(super) fn listeners(&self) -> Result<Listeners, NetworkError> {
        Mounts::default().run(|| {
            enter(self.handle.as_fd())?;
            let open = |kind, port| -> rustix::io::Result<OwnedFd> {
                let fd = socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
                set_socket_reuseaddr(&fd, true)?;
                // The tap may be down, and its address with it.
                set_ip_freebind(&fd, true)?;
                bind(&fd, &SocketAddrV4::new(GATEWAY, port))?;
                if kind == SocketType::STREAM {
                    listen(&fd, BACKLOG)?;
                }
                Ok(fd)
            };
            Ok(Listeners {
                proxy: call("listen for the proxy", open(SocketType::STREAM, PROXY_PORT))?,
                dns: call("listen for the resolver", open(SocketType::DGRAM, RESOLVER_PORT))?,
                dns_tcp: call("listen for the resolver", open(SocketType::STREAM, RESOLVER_PORT))?,
            })
        })
    }

    /// The namespace, for who runs a VMM in it.
    pub(super) fn handle(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// Counters and refusals as they stand.
    pub(super) fn read(&mut self) -> Result<(Vec<nft::Counted>, Vec<nft::Note>), NetlinkError> {
        let counters = nft::counters(rules::TABLE, &mut self.rules)?;
        Ok((counters, nft::notes(rules::TABLE, rules::REFUSED, &mut self.rules)?))
    }

    /// Takes it away. The kernel ends its links a moment after the last of its processes and descriptors.
    pub(super) fn remove(self) -> Result<(), NetworkError> {
        remove(&self.mounts, &self.file)
    }
}

/// Takes away what `file` holds, and the file.
pub(super) fn remove(mounts: &Mounts, file: &Path) -> Result<(), NetworkError> {
    mounts.run(|| {
        match unmount(file, UnmountFlags::DETACH) {
            // It holds no namespace, or is not there.
            Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
            Err(error) => return Err(at("let go of a namespace")(error.into())),
        }
        match std::fs::remove_file(file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at("remove a namespace's file")(error)),
            _ => Ok(()),
        }
    })
}

/// Whether `file` holds a namespace. Among its mounts.
pub(super) fn is_held(file: &Path) -> bool {
    /// `NSFS_MAGIC`
    const NAMESPACES: i64 = 0x6e73_6673;
    rustix::fs::statfs(file).is_ok_and(|found| found.f_type == NAMESPACES)
}

fn open_namespace(file: &Path) -> Result<OwnedFd, NetworkError> {
    call("open a namespace", rustix::fs::openat(CWD, file, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()))
}

fn enter(namespace: BorrowedFd<'_>) -> Result<(), NetworkError> {
    call("enter a namespace", move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network)))
}

/// A setting of the calling thread's namespace.
fn set(name: &str, value: &str) -> Result<(), NetworkError> {
    let path = Path::new("/proc/sys/net").join(name);
    match std::fs::write(&path, value) {
        // A kernel without IPv6 has none to turn off.
        Err(error) if error.kind() == io::ErrorKind::NotFound && name.starts_with("ipv6") => Ok(()),
        outcome => outcome.map_err(at("change a setting of a namespace")),
    }
}
