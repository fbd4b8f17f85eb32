//! The run directory of a VMM: what it inherits is made here, under the names by which the supervisor finds it again.

use stasis_vmm::control::{CONSOLE_LOG, CONTROL_SOCKET, EXIT_NOTE, FDS_SOCKET, OLDER_CONSOLE_LOG, VSOCK_SOCKET};
use stasis_vmm::inherited::names;
use stasis_warden::jail::start::{ProcessNote, file_of};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// The VMM's own messages.
pub const LOG: &str = "vmm.log";
/// Which process works for this directory.
pub const PROCESS_NOTE: &str = "process.json";

/// What was made.
pub(super) struct Made {
    pub(super) log: OwnedFd,
    pub(super) note: File,
    pub(super) named: Vec<(&'static str, OwnedFd)>,
}

/// Makes `run_dir`, over what may be there.
pub(super) fn make(run_dir: &Path) -> io::Result<Made> {
    match fs::remove_dir_all(run_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::DirBuilder::new().mode(0o700).recursive(true).create(run_dir)?;
    let listen = |name| UnixListener::bind(run_dir.join(name)).map(OwnedFd::from);
    let file = |name| {
        let opened = File::options().read(true).write(true).create_new(true).open(run_dir.join(name));
        opened.map(OwnedFd::from)
    };
    // The note comes first: a directory without one has no process.
    let note = file(PROCESS_NOTE)?.into();
    Ok(Made {
        log: File::options().append(true).create_new(true).open(run_dir.join(LOG))?.into(),
        note,
        named: vec![
            (names::CONTROL, listen(CONTROL_SOCKET)?),
            (names::FILES, listen(FDS_SOCKET)?),
            (names::VSOCK, listen(VSOCK_SOCKET)?),
            (names::CONSOLE, file(CONSOLE_LOG)?),
            (names::OLDER_CONSOLE, file(OLDER_CONSOLE_LOG)?),
            (names::EXIT_NOTE, file(EXIT_NOTE)?),
        ],
    })
}

/// Which process works for `run_dir`; none when none was started, or when this is a copy of the directory that one works for.
pub fn note_in(run_dir: &Path) -> Option<ProcessNote> {
    let mut file = File::open(run_dir.join(PROCESS_NOTE)).ok()?;
    let mut text = Vec::new();
    file.read_to_end(&mut text).ok()?;
    let note: ProcessNote = serde_json::from_slice(&text).ok()?;
    (note.file == Some(file_of(&file).ok()?)).then_some(note)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copied_run_directory_has_no_process() {
        let dir = tempfile::tempdir().unwrap();
        let [own, copy, moved] = ["own", "copy", "moved"].map(|name| dir.path().join(name));
        let made = make(&own).unwrap();
        let note = ProcessNote { pid: 7, started_ticks: 9, file: Some(file_of(&made.note).unwrap()), end: None };
        fs::write(own.join(PROCESS_NOTE), serde_json::to_vec(&note).unwrap()).unwrap();
        assert_eq!(note_in(&own), Some(note));
        fs::create_dir(&copy).unwrap();
        fs::copy(own.join(PROCESS_NOTE), copy.join(PROCESS_NOTE)).unwrap();
        assert_eq!(note_in(&copy), None);
        fs::rename(&own, &moved).unwrap();
        assert_eq!(note_in(&moved), Some(note));
    }
}
