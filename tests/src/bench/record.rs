//! A run as a file (`--record`): what a report is made of. One report may be made of several of them (`--report-of`), so that the matrix can
//! be measured in parts where one command may not take so long.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stasis_api::dev::LinkShape;
use stasis_snapshot::store::s3::S3Settings;

use super::case::{Case, Guest, Store};
use super::goals::Result as Shown;
use super::matrix::Part;
use super::profile::Profile;
use super::samples::Row;
use crate::vmm::Error;

/// One command's worth.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The command.
    pub command: String,
    /// When it ended, UTC.
    pub date: String,
    /// How long it took, s.
    pub seconds: u64,
    /// Where it ran.
    pub machine: String,
    /// Version and Cargo profile of what was measured.
    pub build: String,
    /// Peers that ran, with their versions.
    pub peers: Vec<String>,
    /// What it measured.
    pub results: Vec<Measured>,
    /// Where the time went.
    pub profiles: Vec<Profile>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// A case and its rows.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    part: Part,
    debian: bool,
    memory_mib: u32,
    used_mib: u32,
    changed_mib: u32,
    mix: String,
    /// `directory`, `s3`, or `s3=` and the endpoint.
    store: String,
    link: Option<Link>,
    sandboxes: u32,
    runs: u32,
    encrypt: bool,
    rows: Vec<Row>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Link {
    round_trip_us: u64,
    bits_per_second: Option<u64>,
}

impl From<&Shown> for Measured {
    fn from(shown: &Shown) -> Self {
        let case = &shown.case;
        Self {
            part: shown.part,
            debian: case.guest == Guest::Debian,
            memory_mib: case.memory_mib,
            used_mib: case.used_mib,
            changed_mib: case.changed_mib,
            mix: case.mix.clone(),
            store: Case { link: None, ..case.clone() }.store_word(),
            link: case.link.map(|link| Link {
                round_trip_us: u64::try_from(link.round_trip.as_micros()).unwrap_or(u64::MAX),
                bits_per_second: link.bits_per_second,
            }),
            sandboxes: case.sandboxes,
            runs: case.runs,
            encrypt: case.encrypt,
            rows: shown.rows.clone(),
        }
    }
}

impl Measured {
    /// As it was shown. Keys of a bucket are not recorded: nothing can be measured by what comes back.
    fn shown(self, elsewhere: Option<&str>) -> Shown {
        let store = match self.store.strip_prefix("s3=") {
            Some(endpoint) => Store::Bucket(S3Settings {
                endpoint: endpoint.to_owned(),
                region: String::new(),
                bucket: String::new(),
                access_key: String::new(),
                secret_key: String::new(),
                path_style: true,
                request_timeout: Duration::ZERO,
                commit_timeout: Duration::ZERO,
            }),
            None if self.store == "directory" => Store::Directory,
            None => Store::Embedded,
        };
        let case = Case {
            guest: if self.debian { Guest::Debian } else { Guest::Pulse },
            memory_mib: self.memory_mib,
            used_mib: self.used_mib,
            changed_mib: self.changed_mib,
            mix: self.mix,
            store,
            link: self.link.map(|link| LinkShape {
                round_trip: Duration::from_micros(link.round_trip_us),
                bits_per_second: link.bits_per_second,
            }),
            sandboxes: self.sandboxes,
            runs: self.runs,
            encrypt: self.encrypt,
            ..Case::standard()
        };
        Shown { part: self.part, case, rows: self.rows, elsewhere: elsewhere.map(str::to_owned) }
    }
}

impl Record {
    /// Reads one.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()).into())
    }

    /// Writes it.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        Ok(std::fs::write(path, serde_json::to_string_pretty(self)? + "\n")?)
    }

    /// What it measured, in a report about `machine`.
    pub fn shown(&self, machine: &str) -> Vec<Shown> {
        let elsewhere = (self.machine != machine).then_some(self.machine.as_str());
        self.results.iter().cloned().map(|measured| measured.shown(elsewhere)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_reported_alike() {
        let case = Case { link: Some(super::super::matrix::link()), sandboxes: 20, encrypt: true, ..Case::standard() };
        let mut samples = super::super::samples::Samples::default();
        samples.time("first_pause", Duration::from_millis(3));
        let shown = Shown { part: Part::Link, rows: samples.rows("stasis", &case), case, elsewhere: None };
        let record = Record {
            command: "make bench".to_owned(),
            date: String::new(),
            seconds: 1,
            machine: "a machine".to_owned(),
            build: String::new(),
            peers: Vec::new(),
            results: vec![Measured::from(&shown)],
            profiles: Vec::new(),
            notes: Vec::new(),
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("record.json");
        record.write(&path).unwrap();
        let read = Record::read(&path).unwrap();
        assert_eq!(read.shown("another")[0].elsewhere.as_deref(), Some(record.machine.as_str()));
        let again = read.shown(&record.machine);
        assert_eq!(again[0].elsewhere, None);
        assert_eq!(again.len(), 1);
        assert_eq!(again[0].case.describe(), shown.case.describe());
        assert_eq!((again[0].part, &again[0].rows, again[0].case.link), (shown.part, &shown.rows, shown.case.link));
    }
}
