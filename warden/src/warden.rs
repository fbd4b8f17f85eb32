//! What the warden does with each request, and what it finds out about its host when it starts.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::process::{Signal, pidfd_send_signal};

use crate::jail::cgroup::{self, CgroupError, Hierarchy};
use crate::jail::children::{Child, Children};
use crate::jail::limits::Limits;
use crate::jail::start::{self, StartError};
use crate::jail::tree::{Tree, TreeError};
use crate::jail::{Command, Network, Users, Walls};
use crate::network::serve::Service;
use crate::network::{Mounts, NetworkError};
use crate::protocol::{MAX_ARGUMENT, Program, Refusal, RefusalCode, Reply, Request, StartRequest, VERSION};
use crate::server::Serve;

/// What a program that resolves names reads.
const RESOLVER_FILES: &[&str] =
    &["/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/host.conf", "/etc/gai.conf", "/etc/services"];

/// What a warden is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The VMM's program.
    pub vmm: PathBuf,
    /// The dialler's program.
    pub dialler: PathBuf,
    /// The unpacker's program.
    pub unpacker: PathBuf,
    /// A directory of its own, in which trees are made.
    pub trees: PathBuf,
    /// The users of jailed processes.
    pub users: Users,
    /// Its control group is its own to divide.
    pub delegated: bool,
    /// Holds the files that networks' namespaces are bound to.
    pub networks: PathBuf,
}

/// A warden cannot start.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// A tree cannot be made.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// Something else.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// The warden of one host.
#[derive(Debug)]
pub struct Warden {
    vmm: Tree,
    dialler: Tree,
    unpacker: Tree,
    users: Users,
    groups: Result<Hierarchy, CgroupError>,
    children: Children,
    programs: Vec<String>,
    networks: Service,
}

impl Warden {
    /// Makes what every jail shares. Called while the process has one thread: it gets a mount namespace of its own.
    pub fn new(settings: &Settings) -> Result<Self, SetUpError> {
        let host = |what| move |source| SetUpError::Host { what, source };
        let mounts = Mounts::of_this_thread().map_err(host("find the host's mounts"))?;
        crate::jail::tree::separate_mounts().map_err(host("have mounts of its own"))?;
        let place = |name: &str| {
            let path = settings.trees.join(name);
            std::fs::create_dir_all(&path).map(|()| path).map_err(host("make the directory of a tree"))
        };
        let resolver: Vec<_> = RESOLVER_FILES.iter().map(Path::new).collect();
        let vmm = Tree::new(&settings.vmm, &place("vmm")?, true, &[])?;
        let dialler = Tree::new(&settings.dialler, &place("dialler")?, false, &resolver)?;
        let unpacker = Tree::new(&settings.unpacker, &place("unpacker")?, false, &[])?;
        let groups = Hierarchy::find(settings.delegated);
        if let Err(error) = &groups {
            tracing::warn!(error = chain(error), "memory and processor time of sandboxes are not limited");
        }
        let programs = [&settings.vmm, &settings.dialler, &settings.unpacker];
        let programs = programs.map(|path| fingerprint(path).unwrap_or_default()).to_vec();
        let children = Children::new().map_err(host("watch processes"))?;
        let networks = Service::new(mounts, &settings.networks);
        Ok(Self { vmm, dialler, unpacker, users: settings.users, groups, children, programs, networks })
    }

    /// Processes that it has started and that live.
    pub fn children(&self) -> &Children {
        &self.children
    }

    fn missing(&self) -> Vec<String> {
        self.groups.as_ref().err().map(|error| chain(error)).into_iter().collect()
    }

    fn start(&self, request: StartRequest, descriptors: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        let StartRequest { program, arguments, names, size } = request;
        let mut descriptors = descriptors.into_iter();
        let (Some(log), Some(note)) = (descriptors.next(), descriptors.next()) else {
            return Err(bad("a start comes with a log and a note"));
        };
        if descriptors.len() != names.len() {
            return Err(bad("each descriptor has a name, and each name a descriptor"));
        }
        let mut named: Vec<(String, OwnedFd)> = names.into_iter().zip(descriptors).collect();
        let (tree, network, limits) = match program {
            Program::Vmm => {
                named.extend(devices().map_err(failed("open a device"))?);
                (&self.vmm, Network::Empty, size.map_or_else(Limits::of_idle_vmm, Limits::of_vmm))
            }
            Program::Dialler => (&self.dialler, Network::Host, Limits::of_dialler()),
            Program::Unpacker => (&self.unpacker, Network::Empty, Limits::of_unpacker()),
        };
        let short = |text: &String| text.len() <= MAX_ARGUMENT;
        if !arguments.iter().all(short) || !named.iter().all(|(name, _)| short(name)) {
            return Err(bad("an argument is too long"));
        }
        let arguments = arguments.into_iter().map(CString::new).collect::<Result<_, _>>();
        let note = File::from(note);
        let written = note.try_clone().map_err(failed("keep a note"))?;
        let command = Command {
            program: tree.program().to_owned(),
            arguments: arguments.map_err(|_| bad("an argument has a NUL"))?,
            environment: Vec::new(),
            log,
            descriptors: named,
            note,
        };
        // A host without groups has been said to be one; a group that cannot be made on one that has them is a failure.
        let group = self.groups.as_ref().ok().map(|groups| groups.group(&limits)).transpose();
        let group = group.map_err(|error| Refusal::of(RefusalCode::Failed, &error))?;
        let opened = group.as_ref().map(cgroup::Group::open).transpose();
        let opened = opened.map_err(|error| Refusal::of(RefusalCode::Failed, &error))?;
        let walls = Walls { tree, users: self.users, network, limits, cgroup: opened.as_ref().map(AsFd::as_fd) };
        let process = match start::start(&command, Some(&walls)) {
            Ok(process) => process,
            Err(error) => {
                if let Some(group) = group {
                    group.remove();
                }
                return Err(refused(&error));
            }
        };
        let theirs = process.pidfd.try_clone().map_err(failed("duplicate a descriptor"))?;
        let note = process.note;
        let child = Child { note, written, pidfd: process.pidfd, group };
        self.children.add(child).map_err(failed("watch a process"))?;
        Ok((Reply::Started(note), vec![theirs]))
    }

    /// The process that a descriptor is of, if it is one that a warden has started: whoever asks may not reach any other.
    fn ours(&self, descriptors: Vec<OwnedFd>) -> Result<(OwnedFd, i32), Refusal> {
        let [pidfd] =
            <[OwnedFd; 1]>::try_from(descriptors).map_err(|_| bad("it takes the descriptor of one process"))?;
        let gone = || Refusal { code: RefusalCode::NotFound, message: "that process is gone".to_owned() };
        let pid = pid_of(&pidfd).ok_or_else(gone)?;
        let uid = user_of(pid).ok_or_else(gone)?;
        // The id belongs to this process for as long as its descriptor says so.
        if pid_of(&pidfd) != Some(pid) {
            return Err(gone());
        }
        if uid == self.users.of(pid) { Ok((pidfd, pid)) } else { Err(bad("that process is not one of the warden's")) }
    }
}

impl Serve for Warden {
    fn serve(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>), Refusal> {
        match request {
            Request::Hello { version: VERSION } => {
                let pid = std::process::id();
                let reply =
                    Reply::Hello { version: VERSION, pid, missing: self.missing(), programs: self.programs.clone() };
                Ok((reply, Vec::new()))
            }
            Request::Hello { version } => Err(Refusal {
                code: RefusalCode::BadRequest,
                message: format!("this warden speaks version {VERSION}, not {version}: start it anew"),
            }),
            Request::Start(request) => self.start(request, descriptors),
            Request::Kill => {
                let (pidfd, _) = self.ours(descriptors)?;
                pidfd_send_signal(&pidfd, Signal::KILL).map_err(|error| failed("kill a process")(error.into()))?;
                Ok((Reply::Done, Vec::new()))
            }
            Request::Resize { size } => {
                let (_, pid) = self.ours(descriptors)?;
                if let Ok(groups) = &self.groups {
                    let group = groups.group_of(pid).ok_or_else(|| Refusal {
                        code: RefusalCode::NotFound,
                        message: "that process has no control group".to_owned(),
                    })?;
                    group.limit(&Limits::of_vmm(size)).map_err(|error| Refusal::of(RefusalCode::Failed, &error))?;
                }
                Ok((Reply::Done, Vec::new()))
            }
            Request::Network(request) => match self.networks.serve(request) {
                Ok((reply, descriptors)) => Ok((Reply::Network(reply), descriptors)),
                Err(error) => {
                    let code = match error {
                        NetworkError::Unknown(_) => RefusalCode::NotFound,
                        NetworkError::Invalid(_) | NetworkError::Closed | NetworkError::Taken(_) => {
                            RefusalCode::BadRequest
                        }
                        NetworkError::Netlink(_)
                        | NetworkError::Local { .. }
                        | NetworkError::Thread
                        | NetworkError::Full(_) => RefusalCode::Failed,
                    };
                    Err(Refusal::of(code, &error))
                }
            },
            // Those that live go on without it: nothing of theirs depends on it.
            Request::Retire => {
                tracing::info!("another one takes over");
                std::process::exit(0)
            }
        }
    }
}

/// Devices of the host that a VMM works with.
pub fn devices() -> io::Result<Vec<(String, OwnedFd)>> {
    let open = |path| File::options().read(true).write(true).open(path);
    let kvm = open("/dev/kvm").map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "this host has no KVM (load kvm_intel or kvm_amd, or run inside tests/rig)",
            io::ErrorKind::PermissionDenied => "no permission (add this user to the group that owns it, usually kvm)",
            _ => "it does not open",
        };
        io::Error::new(error.kind(), format!("/dev/kvm: {advice}: {error}"))
    })?;
    let mut devices = vec![("kvm".to_owned(), kvm.into())];
    // Without it a VMM uses the system call, which its user may not have; then memory arrives before the guest runs.
    if let Ok(faults) = open("/dev/userfaultfd") {
        devices.push(("userfaultfd".to_owned(), faults.into()));
    }
    Ok(devices)
}

/// Tells one build of a program from another.
pub fn fingerprint(program: &Path) -> io::Result<String> {
    use std::os::unix::fs::MetadataExt;
    let found = std::fs::metadata(program)?;
    Ok(format!("{}:{}:{}:{}.{}", found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
}

/// The process id of a descriptor; none when the process has been reaped.
fn pid_of(pidfd: &OwnedFd) -> Option<i32> {
    use std::os::fd::AsRawFd;
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    (pid > 0).then_some(pid)
}

/// The real user of a process.
fn user_of(pid: i32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_whitespace().next()?.parse().ok()
}

fn bad(message: &str) -> Refusal {
    Refusal { code: RefusalCode::BadRequest, message: message.to_owned() }
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Refusal {
    move |source| Refusal { code: RefusalCode::Failed, message: format!("cannot {what}: {source}") }
}

fn refused(error: &StartError) -> Refusal {
    Refusal::of(RefusalCode::Failed, error)
}

fn chain(error: &dyn std::error::Error) -> String {
    Refusal::of(RefusalCode::Failed, error).message
}
