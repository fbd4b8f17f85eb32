//! What one measurement is about.

use std::path::PathBuf;
use std::time::Duration;

use stasis_api::dev::LinkShape;
use stasis_snapshot::store::s3::S3Settings;

/// The guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// The bare-metal test guest.
    Pulse,
    /// Debian with the agent.
    Debian,
}

/// Where snapshots go.
#[derive(Clone, Debug)]
pub enum Store {
    /// A directory.
    Directory,
    /// The embedded S3 server on loopback.
    Embedded,
    /// A bucket elsewhere.
    Bucket(S3Settings),
}

/// Which wakes are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wake {
    /// From memory kept on the host.
    Hot,
    /// From packs on the local disk.
    Warm,
    /// From the store.
    Cold,
}

impl Wake {
    /// Its word in names of metrics.
    pub fn word(self) -> &'static str {
        match self {
            Self::Hot => "hot",
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// What is measured besides pauses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Measures {
    /// Wakes, each in a service of its own.
    pub wakes: Vec<Wake>,
    /// A named snapshot of the running sandbox.
    pub snapshot: bool,
    /// A pause after run-ahead has sent nearly everything.
    pub residue: bool,
}

/// Another VMM, measured on the same guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Firecracker, at this path.
    Firecracker(PathBuf),
    /// QEMU, at this path.
    Qemu(PathBuf),
}

/// One measurement.
#[derive(Clone, Debug)]
pub struct Case {
    /// Guest.
    pub guest: Guest,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Of it filled, MiB.
    pub used_mib: u32,
    /// Of that rewritten all the time: what changes between two snapshots, MiB.
    pub changed_mib: u32,
    /// Content, as pulse names it.
    pub mix: String,
    /// Store.
    pub store: Store,
    /// The link to an embedded store, imitated.
    pub link: Option<LinkShape>,
    /// Sandboxes at once.
    pub sandboxes: u32,
    /// How often.
    pub runs: u32,
    /// What.
    pub measures: Measures,
    /// Peers to measure in the same run.
    pub peers: Vec<Peer>,
    /// Snapshots are sealed; what is not sealed is measured in turn with it, as a peer.
    pub encrypt: bool,
}

impl Case {
    /// The case of the design's figures: 1 GiB with 256 MiB used and 32 MiB changing, over S3, once.
    pub fn standard() -> Self {
        Self {
            guest: Guest::Pulse,
            memory_mib: 1024,
            used_mib: 256,
            changed_mib: 32,
            mix: "real".to_owned(),
            store: Store::Embedded,
            link: None,
            sandboxes: 1,
            runs: 5,
            measures: Measures { wakes: vec![Wake::Hot, Wake::Warm, Wake::Cold], snapshot: true, residue: true },
            peers: Vec::new(),
            encrypt: false,
        }
    }

    /// The guest's word in rows: with the mix where it is another than usual.
    pub fn guest_word(&self) -> String {
        match self.guest {
            Guest::Debian => "debian".to_owned(),
            Guest::Pulse if self.mix == "real" => "pulse".to_owned(),
            Guest::Pulse => format!("pulse {}", self.mix),
        }
    }

    /// The store's word in rows: with the link where one is imitated.
    pub fn store_word(&self) -> String {
        let mut word = match &self.store {
            Store::Directory => "directory".to_owned(),
            Store::Embedded => "s3".to_owned(),
            Store::Bucket(settings) => format!("s3={}", settings.endpoint),
        };
        if let Some(link) = self.link {
            if !link.round_trip.is_zero() {
                word += &format!(" {} ms", link.round_trip.as_secs_f64() * 1000.0);
            }
            if let Some(rate) = link.bits_per_second {
                word += &format!(" {} Gb/s", rate as f64 / 1e9);
            }
        }
        word
    }

    /// The round trip that is added to every request.
    pub fn round_trip(&self) -> Duration {
        self.link.map_or(Duration::ZERO, |link| link.round_trip)
    }

    /// The command line of pulse. Between two passes 4 ms, with a beat every 0.13 ms, on a CPU that turns twice in a nanosecond.
    pub fn pulse_command_line(&self) -> String {
        format!("fill={} hot={} mix={} gap=8388608 beat=4", self.used_mib, self.changed_mib, self.mix)
    }

    /// In one line.
    pub fn describe(&self) -> String {
        format!(
            "{}, {} MiB of memory, {} used, {} changing, {}, {}, {} runs{}",
            self.guest_word(),
            self.memory_mib,
            self.used_mib,
            self.changed_mib,
            self.store_word(),
            if self.sandboxes == 1 { "1 sandbox".to_owned() } else { format!("{} sandboxes", self.sandboxes) },
            self.runs,
            if self.encrypt { ", sealed" } else { "" }
        )
    }
}
