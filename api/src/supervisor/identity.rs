//! A supervisor's name in heads: the same for as long as its data directory exists, and another one for a copy of that directory.
//!
//! Under one name two supervisors would take each other's guests for their own of an earlier life. So the journal also says where it lies, and one
//! that finds itself on another machine, or at another path in another directory, is a copy and draws a new name. A directory that was only moved
//! keeps its inode, one that was mounted anew keeps its path.

use crate::journal::{Journal, JournalError};
use crate::sources::Sources;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Where a data directory lies.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Home {
    machine: String,
    inode: String,
    path: String,
}

impl Home {
    fn of(data_dir: &Path) -> Self {
        let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default().trim().to_owned();
        let inode = std::fs::metadata(data_dir).map(|found| found.ino().to_string()).unwrap_or_default();
        Self { machine, inode, path: data_dir.display().to_string() }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, ' ').map(str::to_owned);
        Some(Self { machine: parts.next()?, inode: parts.next()?, path: parts.next()? })
    }

    fn text(&self) -> String {
        format!("{} {} {}", self.machine, self.inode, self.path)
    }

    fn is_copy_of(&self, known: &Self) -> bool {
        self.machine != known.machine || (self.inode != known.inode && self.path != known.path)
    }
}

/// The name of the supervisor of this journal in this directory.
pub(super) fn owner(journal: &Journal, data_dir: &Path, sources: &Sources) -> Result<String, JournalError> {
    let draw = || format!("host-{}", sources.word(16));
    let here = Home::of(data_dir);
    let known = journal.meta("home", || here.text())?;
    let copied = Home::parse(&known).is_none_or(|known| here.is_copy_of(&known));
    if copied {
        let (before, name) = (journal.meta("owner", draw)?, draw());
        tracing::warn!(
            before,
            name,
            known,
            "the data directory is a copy: this supervisor takes another name, and owns none of what runs elsewhere"
        );
        journal.set_meta("owner", &name)?;
    }
    if known != here.text() {
        journal.set_meta("home", &here.text())?;
    }
    journal.meta("owner", draw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_takes_another_name() {
        let journal = Journal::in_memory().unwrap();
        let sources = Sources::system();
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = owner(&journal, one.path(), &sources).unwrap();
        assert_eq!(owner(&journal, one.path(), &sources).unwrap(), first);
        let second = owner(&journal, other.path(), &sources).unwrap();
        assert_ne!(second, first);
        assert_eq!(owner(&journal, other.path(), &sources).unwrap(), second);
        // Moved: the inode goes with it.
        let moved = one.path().join("moved");
        std::fs::rename(other.path(), &moved).unwrap();
        assert_eq!(owner(&journal, &moved, &sources).unwrap(), second);
    }

    #[test]
    fn another_machine_is_a_copy_whatever_the_path() {
        let home = Home { machine: "a".into(), inode: "1".into(), path: "/d with space".into() };
        assert_eq!(Home::parse(&home.text()), Some(home.clone()));
        assert!(Home { machine: "b".into(), ..home.clone() }.is_copy_of(&home));
        assert!(!Home { inode: "2".into(), ..home.clone() }.is_copy_of(&home));
        assert!(!Home { path: "/e".into(), ..home.clone() }.is_copy_of(&home));
        assert!(Home { path: "/e".into(), inode: "2".into(), ..home.clone() }.is_copy_of(&home));
    }
}
