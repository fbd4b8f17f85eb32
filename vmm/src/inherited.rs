//! What a VMM gets from whoever starts it: opened descriptors under the names of [`names`], told by `--fd NAME=NUMBER`. The process uses
//! no path of the host: everything else that it works on arrives later over one of these.
//!
//! The process owns them from [`Inherited::take`] on, which is called once, before there are other threads. A machine shares what
//! [`HostFiles`] holds.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, PoisonError};

/// Names of inherited descriptors. A VMM refuses to start with one that it does not know: whoever starts it is of another version.
pub mod names {
    /// The listening control socket.
    pub const CONTROL: &str = "control";
    /// The listening socket on which opened files arrive.
    pub const FILES: &str = "files";
    /// The listening host end of the guest's vsock. Left out, a machine has no vsock device.
    pub const VSOCK: &str = "vsock";
    /// What the guest writes to its serial port.
    pub const CONSOLE: &str = "console";
    /// What it wrote before that, when the console log was full.
    pub const OLDER_CONSOLE: &str = "older-console";
    /// Where the exit note goes.
    pub const EXIT_NOTE: &str = "exit-note";
    /// `/dev/kvm`.
    pub const KVM: &str = "kvm";
    /// `/dev/userfaultfd`. Left out, the system call is used.
    pub const USERFAULTFD: &str = "userfaultfd";
    /// The dialler, which hands out connections to the store. Left out, the VMM connects by itself.
    pub const DIALLER: &str = "dialler";

    pub(super) const ALL: &[&str] =
        &[CONTROL, FILES, VSOCK, CONSOLE, OLDER_CONSOLE, EXIT_NOTE, KVM, USERFAULTFD, DIALLER];
}

/// `NAME=NUMBER`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    name: String,
    number: RawFd,
}

impl std::str::FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, number) = text.split_once('=').ok_or("is not NAME=NUMBER")?;
        if !names::ALL.contains(&name) {
            return Err(format!("{name:?} is no name of a descriptor"));
        }
        let number: RawFd = number.parse().map_err(|_| format!("{number:?} is no descriptor"))?;
        if number <= 2 {
            return Err("descriptors 0, 1 and 2 are the standard ones".to_owned());
        }
        Ok(Self { name: name.to_owned(), number })
    }
}

/// The inherited descriptors, by purpose.
#[derive(Debug)]
pub struct Inherited {
    /// Control socket.
    pub control: UnixListener,
    /// Socket for opened files.
    pub files: UnixListener,
    /// Where the exit note goes.
    pub exit_note: File,
    /// The dialler.
    pub dialler: Option<OwnedFd>,
    /// What a machine uses.
    pub host: HostFiles,
}

/// Opened files of the host that a machine works with.
#[derive(Debug)]
pub struct HostFiles {
    /// `/dev/kvm`.
    pub(crate) kvm: File,
    /// `/dev/userfaultfd`.
    pub(crate) userfaultfd: Option<File>,
    /// `/proc/self/pagemap`.
    pub(crate) pagemap: Option<File>,
    /// `/proc/self/status`.
    pub(crate) status: Option<File>,
    /// The console log and the one before it.
    pub(crate) console: [File; 2],
    /// The vsock's listener, until a machine takes it.
    vsock: Mutex<Option<UnixListener>>,
}

impl Inherited {
    /// Takes what was named over. What the process has of its own in `/proc` is opened here, too, while it may still open anything.
    ///
    /// # Safety
    ///
    /// Each number is a descriptor that the process was started with and that nothing else in it owns; called once.
    pub unsafe fn take(named: Vec<Named>) -> io::Result<Self> {
        let mut found = BTreeMap::new();
        for Named { name, number } in named {
            rustix::io::fcntl_getfd(
                // SAFETY: only asks whether it is open.
                unsafe { std::os::fd::BorrowedFd::borrow_raw(number) },
            )
            .map_err(|error| io::Error::other(format!("descriptor {number} for {name}: {error}")))?;
            // SAFETY: open, and ours by this function's contract.
            let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
            rustix::io::fcntl_setfd(&descriptor, rustix::io::FdFlags::CLOEXEC)?;
            found.insert(name, descriptor);
        }
        let mut take = |name: &str| found.remove(name);
        let needed = |name: &str, descriptor: Option<OwnedFd>| {
            descriptor.ok_or_else(|| io::Error::other(format!("no descriptor was given for {name}")))
        };
        let control = needed(names::CONTROL, take(names::CONTROL))?.into();
        let files = needed(names::FILES, take(names::FILES))?.into();
        let exit_note = needed(names::EXIT_NOTE, take(names::EXIT_NOTE))?.into();
        let console = [names::CONSOLE, names::OLDER_CONSOLE];
        let [log, older] = console.map(|name| needed(name, take(name)).map(File::from));
        let host = HostFiles {
            kvm: needed(names::KVM, take(names::KVM))?.into(),
            userfaultfd: take(names::USERFAULTFD).map(Into::into),
            pagemap: own("pagemap"),
            status: own("status"),
            console: [log?, older?],
            vsock: Mutex::new(take(names::VSOCK).map(Into::into)),
        };
        Ok(Self { control, files, exit_note, dialler: take(names::DIALLER), host })
    }
}

/// A file about this process; none where there is no `/proc`.
fn own(name: &str) -> Option<File> {
    File::open(format!("/proc/self/{name}"))
        .inspect_err(|error| tracing::info!(%error, name, "the kernel does not tell of this process"))
        .ok()
}

impl HostFiles {
    /// For tests that drive a machine's parts in their own process.
    #[cfg(test)]
    pub(crate) fn of_this_host() -> io::Result<Self> {
        let scratch = || File::options().read(true).write(true).open("/dev/null");
        Ok(Self {
            kvm: File::options().read(true).write(true).open("/dev/kvm")?,
            userfaultfd: File::options().read(true).write(true).open("/dev/userfaultfd").ok(),
            pagemap: own("pagemap"),
            status: own("status"),
            console: [scratch()?, scratch()?],
            vsock: Mutex::default(),
        })
    }

    /// The listener for the vsock device of the one machine that this process has.
    pub(crate) fn take_vsock(&self) -> io::Result<UnixListener> {
        let taken = self.vsock.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.ok_or_else(|| io::Error::other("no socket was given for it, or it is taken"))
    }

    /// A descriptor of our own for the same open file.
    pub(crate) fn duplicate(file: &File) -> io::Result<OwnedFd> {
        file.as_fd().try_clone_to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_a_known_name_and_a_number() {
        assert_eq!("kvm=7".parse(), Ok(Named { name: "kvm".to_owned(), number: 7 }));
        for wrong in ["kvm", "kvm=", "kvm=x", "kvm=2", "disk=7", "=7", "kvm=-1"] {
            assert!(wrong.parse::<Named>().is_err(), "{wrong}");
        }
    }
}
