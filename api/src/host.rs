//! What this host can run, found out at start: is there a KVM, may we use it, and is it one that runs a stock Linux kernel.

use crate::error::Error;
use crate::template::Template;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// The KVM of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kvm {
    /// Hardware virtualization.
    Hardware,
    /// A KVM on a CPU without VT-x or AMD-V: guest ring 0 is emulated, stock kernels fail in it (design §8).
    Software,
    /// `/dev/kvm` is not there.
    Missing,
    /// `/dev/kvm` may not be opened.
    Forbidden(String),
}

impl Kvm {
    /// That of this host.
    pub fn probe() -> Self {
        let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self::of(OpenOptions::new().read(true).write(true).open("/dev/kvm").map(drop), &flags)
    }

    fn of(opened: io::Result<()>, cpuinfo: &str) -> Self {
        match opened {
            Ok(()) if has_virtualization(cpuinfo) => Self::Hardware,
            Ok(()) => Self::Software,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Self::Forbidden(e.to_string()),
            // ENODEV, ENXIO: the node is there, the driver is not.
            Err(_) => Self::Missing,
        }
    }

    /// What keeps this host from running `template`, and what to do about it.
    pub fn check(&self, template: &Template) -> Result<(), Error> {
        match self {
            Self::Hardware => Ok(()),
            Self::Software if !template.needs_hardware_kvm() => Ok(()),
            Self::Software => Err(Error::Host(format!(
                "this host has /dev/kvm but its CPU has neither VT-x nor AMD-V (no vmx or svm flag): such a software KVM cannot run the \
                 stock Linux kernel of template {:?}. Use a host with hardware virtualization, or the nested host of tests/rig; the pulse \
                 template works here",
                template.name
            ))),
            Self::Missing | Self::Forbidden(_) => Err(Error::Host(self.advice().unwrap_or_default())),
        }
    }

    /// What is wrong with this host whatever the template, and what to do about it.
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::Hardware => None,
            Self::Software => Some(
                "this CPU has neither VT-x nor AMD-V: Linux templates are refused here (use tests/rig for them); the pulse template works".to_owned(),
            ),
            Self::Missing => Some(
                "there is no usable /dev/kvm: load the module (modprobe kvm_intel or kvm_amd), enable virtualization in the firmware, or \
                 pass /dev/kvm into this container"
                    .to_owned(),
            ),
            Self::Forbidden(why) => Some(format!(
                "/dev/kvm may not be opened ({why}): add this user to the group of /dev/kvm (usermod -aG kvm $USER, then log in again)"
            )),
        }
    }
}

fn has_virtualization(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm"))
}

/// Where another of our programs is: beside our own.
pub fn beside(name: &str) -> io::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.with_file_name(name);
    // A test's program lies one directory below the programs it tests.
    let above = own.parent().and_then(Path::parent).map(|dir| dir.join(name));
    Ok(if beside.exists() { beside } else { above.filter(|path| path.exists()).unwrap_or(beside) })
}

/// Where the VMM's program is: as configured, else beside our own.
pub fn vmm_program(configured: Option<&Path>) -> Result<PathBuf, Error> {
    let path = match configured {
        Some(path) => path.to_owned(),
        None => {
            beside("stasis-vmm").map_err(|source| Error::Local { action: "find our own program".to_owned(), source })?
        }
    };
    match fs::metadata(&path) {
        Ok(found) if found.is_file() => Ok(path),
        Ok(_) => Err(Error::Host(format!(
            "{} is not the program stasis-vmm; set vmm in the configuration or STASIS_VMM",
            path.display()
        ))),
        Err(e) => Err(Error::Host(format!(
            "the program stasis-vmm is not at {} ({e}): build it (cargo build -p stasis-vmm), or set vmm in the configuration or STASIS_VMM",
            path.display()
        ))),
    }
}

/// Raises the soft limit of open files to the hard one: a directory store opens a file for each pack.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Where the host says whether memory files get huge pages.
const SHMEM_HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Lets memory files that ask for huge pages have them, where nobody gets any yet. Needs root; without it the operator may do the same.
pub fn offer_huge_pages() {
    match fs::read_to_string(SHMEM_HUGE_PAGES) {
        Ok(setting) if setting.contains("[never]") => match fs::write(SHMEM_HUGE_PAGES, "advise") {
            Ok(()) => tracing::info!("{SHMEM_HUGE_PAGES} is advise now, it was never (warm.huge_pages)"),
            Err(error) => tracing::warn!(%error, "guests get no huge pages; write advise to {SHMEM_HUGE_PAGES}"),
        },
        Ok(_) => {}
        Err(error) => tracing::info!(%error, "this host has no huge pages for memory files"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::Ready;

    fn template(ready: Ready) -> Template {
        Template {
            name: "t".to_owned(),
            kernel: PathBuf::new(),
            initramfs: None,
            rootfs: None,
            disk_mib: 0,
            cmdline: String::new(),
            ready,
            min_memory_mib: 64,
            exit_counter: false,
            port: None,
            digest: String::new(),
            rootfs_digest: None,
            upload: None,
        }
    }

    #[test]
    fn each_kind_of_host_says_what_to_do() {
        let (linux, pulse) = (template(Ready::Agent), template(Ready::Serial("R".to_owned())));
        let hardware = Kvm::of(Ok(()), "flags\t: fpu svm sse\n");
        assert!(hardware.check(&linux).is_ok() && hardware.advice().is_none());
        let software = Kvm::of(Ok(()), "flags\t: fpu svm_lock sse\nmodel name: vmx\n");
        assert_eq!(software, Kvm::Software);
        assert!(software.check(&pulse).is_ok());
        assert!(software.check(&linux).unwrap_err().to_string().contains("tests/rig"));
        let missing = Kvm::of(Err(io::ErrorKind::NotFound.into()), "");
        assert!(missing.check(&pulse).unwrap_err().to_string().contains("modprobe"));
        let forbidden = Kvm::of(Err(io::ErrorKind::PermissionDenied.into()), "");
        assert!(forbidden.check(&pulse).unwrap_err().to_string().contains("usermod"));
    }
}
