//! What this machine can run, and where the built parts are.

use std::path::{Path, PathBuf};

/// Why a Linux guest cannot run here; `None` when it can.
pub fn no_linux_guest() -> Option<String> {
    if let Some(why) = no_kvm() {
        return Some(why);
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let hardware = flags.split_whitespace().any(|f| f == "vmx" || f == "svm");
    (!hardware).then(|| "this CPU has no VT-x or AMD-V (`make test` runs it in tests/rig)".to_owned())
}

/// Why no guest at all can run here.
pub fn no_kvm() -> Option<String> {
    std::fs::File::options().read(true).write(true).open("/dev/kvm").err().map(|e| format!("/dev/kvm: {e}"))
}

/// A file that the build or the image scripts make, relative to the target folder.
pub fn built(relative: &str) -> PathBuf {
    let target = profile().and_then(|folder| Some(folder.parent()?.to_owned()));
    target.unwrap_or_else(|| PathBuf::from("target")).join(relative)
}

/// A program of this build (`stasis`, `stasis-vmm`), of the same profile as the running one.
pub fn program(name: &str) -> PathBuf {
    profile().map_or_else(|| PathBuf::from(name), |folder| folder.join(name))
}

/// `target/<profile>`: the folder of this program, or above it when this is a test in `deps`.
pub fn profile() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    let folder = exe.parent()?;
    Some(if folder.ends_with("deps") { folder.parent()? } else { folder }.to_owned())
}

/// A fresh directory for scratch: in the rig on its tmpfs, elsewhere under the system's.
pub fn scratch() -> std::io::Result<tempfile::TempDir> {
    match std::env::var_os("STASIS_SCRATCH") {
        Some(dir) => tempfile::tempdir_in(dir),
        None => tempfile::tempdir(),
    }
}

/// Why a file that a test needs is not there; `None` when it is.
pub fn missing(path: &Path, how: &str) -> Option<String> {
    (!path.exists()).then(|| format!("{} is not there ({how})", path.display()))
}
