//! The file system that a jailed program sees: a directory with the program, the shared objects it is linked with and a place for `/proc`,
//! read-only, without devices.
//!
//! It is made once, when the warden starts, in a mount namespace of the warden's own, where nobody else sees it; each jailed process
//! starts with a copy of that namespace and makes the tree its root, which costs it three system calls.

use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_remount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

const PROC: &str = "proc";

/// A tree cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} for the tree of {program}", program = program.display())]
pub struct TreeError {
    /// The step.
    what: &'static str,
    /// Whose tree.
    program: PathBuf,
    /// The kernel's answer.
    #[source]
    source: io::Error,
}

/// The tree of one program.
#[derive(Debug)]
pub struct Tree {
    root: CString,
    program: CString,
    proc: Option<CString>,
}

/// Gives this process, which has one thread yet, a mount namespace of its own, from which nothing spreads to the host's.
pub fn separate_mounts() -> io::Result<()> {
    // SAFETY: a mount namespace does not concern memory or descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    // What the host mounts later still comes here; nothing goes there.
    Ok(mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)?)
}

impl Tree {
    /// Makes the tree of `program` at `at`, an empty directory. `files` are bound in as well, where they are on the host.
    pub fn new(program: &Path, at: &Path, with_proc: bool, files: &[&Path]) -> Result<Self, TreeError> {
        let failed = |what| {
            let program = program.to_owned();
            move |source: io::Error| TreeError { what, program, source }
        };
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mount("tmpfs", at, "tmpfs", flags, c"mode=755,size=1m")
            .map_err(|error| failed("mount an empty file system")(error.into()))?;
        let mut objects = shared_objects(program).map_err(failed("find the shared objects"))?;
        objects.extend(files.iter().filter(|path| path.exists()).map(|path| (*path).to_owned()));
        for object in objects {
            let inside = at.join(object.strip_prefix("/").unwrap_or(&object));
            bind(&object, &inside).map_err(failed("bind a shared object"))?;
        }
        let name = program.file_name().ok_or_else(|| failed("name the program")(io::ErrorKind::InvalidInput.into()))?;
        bind(program, &at.join(name)).map_err(failed("bind the program"))?;
        let proc = at.join(PROC);
        if with_proc {
            std::fs::create_dir(&proc).map_err(failed("make a place for /proc"))?;
        }
        mount_remount(at, flags | MountFlags::RDONLY | MountFlags::BIND, c"")
            .map_err(|error| failed("make it read-only")(error.into()))?;
        let text = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        Ok(Self {
            root: text(at).map_err(failed("name it"))?,
            program: text(&Path::new("/").join(name)).map_err(failed("name the program"))?,
            proc: if with_proc { Some(text(&proc).map_err(failed("name it"))?) } else { None },
        })
    }

    /// Where the program is in it: in its root, under its own name.
    pub fn program(&self) -> &CStr {
        &self.program
    }

    pub(super) fn root(&self) -> &CStr {
        &self.root
    }

    pub(super) fn proc(&self) -> Option<&CStr> {
        self.proc.as_deref()
    }
}

/// Binds one file read-only. Through links: it is the file that is bound.
fn bind(file: &Path, place: &Path) -> io::Result<()> {
    if let Some(directory) = place.parent() {
        std::fs::create_dir_all(directory)?;
    }
    std::fs::File::create(place)?;
    mount_bind(file, place)?;
    let flags = MountFlags::RDONLY | MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount_remount(place, flags, c"")?)
}

/// The interpreter of `program` and the shared objects that it would load, as its interpreter tells. None of a static program.
#[expect(clippy::disallowed_methods, reason = "asks the program's own loader, once, when the warden starts")]
fn shared_objects(program: &Path) -> io::Result<BTreeSet<PathBuf>> {
    let listed = Command::new(program).env_clear().env("LD_TRACE_LOADED_OBJECTS", "1").output()?;
    let text = String::from_utf8_lossy(&listed.stdout);
    Ok(text.lines().filter_map(object_in).map(Path::to_owned).collect())
}

/// The path in a line such as `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` or `/lib64/ld-linux-x86-64.so.2 (0x…)`.
fn object_in(line: &str) -> Option<&Path> {
    let line = line.trim();
    let path = line.split_once(" => ").map_or(line, |(_, path)| path);
    let (path, _) = path.rsplit_once(" (0x")?;
    path.starts_with('/').then(|| Path::new(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loader_says_where_shared_objects_are() {
        for (line, path) in [
            ("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)", Some("/lib/x86_64-linux-gnu/libc.so.6")),
            ("\t/lib64/ld-linux-x86-64.so.2 (0x00007f)", Some("/lib64/ld-linux-x86-64.so.2")),
            ("\tlinux-vdso.so.1 (0x00007ffc)", None),
            ("\tstatically linked", None),
            ("", None),
        ] {
            assert_eq!(object_in(line), path.map(Path::new), "{line}");
        }
        let own = std::env::current_exe().unwrap();
        assert!(shared_objects(&own).unwrap().iter().any(|path| path.to_string_lossy().contains("libc.so")));
    }
}
