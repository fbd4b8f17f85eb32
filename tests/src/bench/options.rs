//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use stasis_api::dev::LinkShape;
use stasis_snapshot::store::s3::S3Settings;

use super::case::{Case, Guest, Peer, Store};
use super::matrix::{self, Part};

/// Measures pauses and wakes of sandboxes. Without options that describe a case, the whole matrix is run.
#[derive(Debug, Parser)]
#[command(name = "stasis-bench")]
pub struct Arguments {
    /// `pulse` (default), or `debian` where the CPU has VT-x or AMD-V.
    #[arg(long)]
    pub guest: Option<String>,
    /// Guest memory, MiB.
    #[arg(long)]
    pub memory_mib: Option<u32>,
    /// Filled of it, MiB.
    #[arg(long)]
    pub used_mib: Option<u32>,
    /// Rewritten of that all the time, MiB.
    #[arg(long)]
    pub changed_mib: Option<u32>,
    /// Content: `real` (default), `rand`, `comp`, `zero` or `dup`.
    #[arg(long)]
    pub mix: Option<String>,
    /// `directory`, `s3` (default; embedded), or `s3=URL/BUCKET` with the keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.
    #[arg(long)]
    pub store: Option<String>,
    /// Round-trip time added to every request to the embedded S3 server, ms.
    #[arg(long)]
    pub rtt_ms: Option<f64>,
    /// Bandwidth of the link to the embedded S3 server, Gb/s.
    #[arg(long)]
    pub gbps: Option<f64>,
    /// Sandboxes paused at once.
    #[arg(long)]
    pub sandboxes: Option<u32>,
    /// Runs of each case.
    #[arg(long)]
    pub runs: Option<u32>,
    /// Seal snapshots (MACs, AES-256-GCM), and measure the same without seals in turn with it.
    #[arg(long)]
    pub encrypt: bool,
    /// `firecracker=PATH`, `qemu` or `qemu=PATH`; may be given several times.
    #[arg(long)]
    pub peer: Vec<String>,
    /// Only these parts of the matrix.
    #[arg(long, value_enum)]
    pub only: Vec<Part>,
    /// Rows as JSON go here.
    #[arg(long)]
    pub json: Option<PathBuf>,
    /// Plots go into this folder.
    #[arg(long)]
    pub svg: Option<PathBuf>,
    /// The report as Markdown goes here.
    #[arg(long)]
    pub markdown: Option<PathBuf>,
    /// The whole run goes here, for a later --report-of.
    #[arg(long)]
    pub record: Option<PathBuf>,
    /// Measures nothing: reports recorded runs as one. May be given several times.
    #[arg(long)]
    pub report_of: Vec<PathBuf>,
}

const MIXES: &[&str] = &["real", "rand", "comp", "zero", "dup"];

impl Arguments {
    /// The peers that are asked for.
    pub fn peers(&self) -> Result<Vec<Peer>, String> {
        self.peer.iter().map(|text| peer(text)).collect()
    }

    /// The cases that are asked for, each with its part of the matrix.
    pub fn cases(&self, environment: impl Fn(&str) -> Option<String>) -> Result<Vec<(Part, Case)>, String> {
        let peers = self.peers()?;
        if self.runs == Some(0) {
            return Err("--runs must be at least 1".to_owned());
        }
        if !self.describes_a_case() {
            let mut cases = matrix::cases(&peers);
            cases.retain(|(part, _)| self.only.is_empty() || self.only.contains(part));
            if let Some(runs) = self.runs {
                cases.iter_mut().for_each(|(_, case)| case.runs = runs);
            }
            return Ok(cases);
        }
        let standard = Case::standard();
        let case = Case {
            guest: match self.guest.as_deref() {
                None | Some("pulse") => Guest::Pulse,
                Some("debian") => Guest::Debian,
                Some(other) => return Err(format!("--guest {other}: pulse or debian")),
            },
            memory_mib: self.memory_mib.unwrap_or(standard.memory_mib),
            used_mib: self.used_mib.unwrap_or(standard.used_mib),
            changed_mib: self.changed_mib.unwrap_or(standard.changed_mib),
            mix: self.mix.clone().unwrap_or(standard.mix),
            store: store(self.store.as_deref().unwrap_or("s3"), environment)?,
            link: self.link()?,
            sandboxes: self.sandboxes.unwrap_or(1).max(1),
            runs: self.runs.unwrap_or(standard.runs),
            peers,
            encrypt: self.encrypt,
            ..Case::standard()
        };
        check(&case)?;
        Ok(vec![(Part::Case, case)])
    }

    /// Networks are among what is asked for.
    pub fn measures_networks(&self) -> bool {
        let only = self.only.is_empty() || self.only.contains(&Part::Network);
        self.report_of.is_empty() && !self.describes_a_case() && only
    }

    fn describes_a_case(&self) -> bool {
        let numbers = [self.memory_mib, self.used_mib, self.changed_mib, self.sandboxes];
        let words = [&self.guest, &self.mix, &self.store];
        numbers.iter().any(Option::is_some)
            || words.iter().any(|word| word.is_some())
            || self.encrypt
            || self.rtt_ms.is_some()
            || self.gbps.is_some()
    }

    fn link(&self) -> Result<Option<LinkShape>, String> {
        let positive = |name: &str, value: Option<f64>| match value {
            Some(value) if !(value > 0.0 && value < 1e6) => Err(format!("--{name} must be above 0")),
            other => Ok(other),
        };
        let (rtt, rate) = (positive("rtt-ms", self.rtt_ms)?, positive("gbps", self.gbps)?);
        Ok((rtt.is_some() || rate.is_some()).then(|| LinkShape {
            round_trip: Duration::from_secs_f64(rtt.unwrap_or(0.0) / 1000.0),
            bits_per_second: rate.map(|gbps| (gbps * 1e9) as u64),
        }))
    }
}

fn check(case: &Case) -> Result<(), String> {
    if !MIXES.contains(&case.mix.as_str()) {
        return Err(format!("--mix {}: one of {}", case.mix, MIXES.join(", ")));
    }
    if case.changed_mib > case.used_mib || case.used_mib + 8 > case.memory_mib.min(3072) {
        return Err(format!(
            "{} MiB changing must be within {} MiB used, and these 8 MiB below {} MiB of memory and 3 GiB",
            case.changed_mib, case.used_mib, case.memory_mib
        ));
    }
    if case.link.is_some() && !matches!(case.store, Store::Embedded) {
        return Err("--rtt-ms and --gbps shape the way to the embedded S3 server only: --store s3".to_owned());
    }
    Ok(())
}

fn peer(text: &str) -> Result<Peer, String> {
    match text.split_once('=') {
        Some(("firecracker", path)) if !path.is_empty() => Ok(Peer::Firecracker(path.into())),
        Some(("qemu", path)) if !path.is_empty() => Ok(Peer::Qemu(path.into())),
        None if text == "qemu" => Ok(Peer::Qemu("qemu-system-x86_64".into())),
        _ => Err(format!("--peer {text}: firecracker=PATH, qemu or qemu=PATH")),
    }
}

fn store(text: &str, environment: impl Fn(&str) -> Option<String>) -> Result<Store, String> {
    let url = match text.split_once('=') {
        None if text == "directory" => return Ok(Store::Directory),
        None if text == "s3" => return Ok(Store::Embedded),
        Some(("s3", url)) => url.trim_end_matches('/'),
        _ => return Err(format!("--store {text}: directory, s3 or s3=URL/BUCKET")),
    };
    let (endpoint, bucket) = url
        .rsplit_once('/')
        .filter(|(endpoint, _)| endpoint.starts_with("http://") || endpoint.starts_with("https://"))
        .filter(|(endpoint, _)| !endpoint.ends_with('/'))
        .ok_or_else(|| format!("--store {text}: the URL is http(s)://HOST/BUCKET"))?;
    let need = |name: &str| environment(name).ok_or_else(|| format!("--store {text} needs {name}"));
    Ok(Store::Bucket(S3Settings {
        endpoint: endpoint.to_owned(),
        region: environment("AWS_REGION").unwrap_or_else(|| "us-east-1".to_owned()),
        bucket: bucket.to_owned(),
        access_key: need("AWS_ACCESS_KEY_ID")?,
        secret_key: need("AWS_SECRET_ACCESS_KEY")?,
        path_style: true,
        request_timeout: Duration::from_mins(1),
        commit_timeout: Duration::from_mins(1),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases(line: &str) -> Result<Vec<(Part, Case)>, String> {
        let arguments = Arguments::try_parse_from(line.split_whitespace()).map_err(|e| e.to_string())?;
        arguments.cases(|name| name.starts_with("AWS_").then(|| "x".to_owned()))
    }

    #[test]
    fn the_command_of_the_issue_is_one_case() {
        let line = "bench --guest pulse --memory-mib 1024 --used-mib 256 --changed-mib 32 --store s3 --runs 5 \
                    --peer firecracker=/x/fc --json out.json";
        let found = cases(line).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].1.describe(), Case::standard().describe());
        assert_eq!(found[0].1.peers, [Peer::Firecracker("/x/fc".into())]);
    }

    #[test]
    fn without_a_case_the_matrix_is_run() {
        let all = cases("bench").unwrap();
        assert!(all.len() > 5);
        let changed = cases("bench --only changed --runs 2 --peer qemu").unwrap();
        let network = cases("bench --only network").unwrap();
        assert!(network.len() == 1 && network[0].0 == Part::Network);
        assert!(changed.len() < all.len() && changed.iter().all(|(part, c)| *part == Part::Changed && c.runs == 2));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for (line, why) in [
            ("bench --changed-mib 300", "within 256"),
            ("bench --memory-mib 128", "MiB of memory"),
            ("bench --mix x", "one of"),
            ("bench --store ftp", "s3=URL"),
            ("bench --store s3=nowhere", "http(s)"),
            ("bench --store directory --rtt-ms 3", "embedded"),
            ("bench --rtt-ms=-3", "rtt-ms"),
            ("bench --peer xen", "firecracker=PATH"),
            ("bench --guest dos", "debian"),
            ("bench --runs 0", "at least 1"),
        ] {
            let error = cases(line).unwrap_err();
            assert!(error.contains(why), "{line}: {error}");
        }
        let found = cases("bench --store s3=https://s3.example/b --gbps 1");
        assert!(found.is_err());
        let found = cases("bench --store s3=https://s3.example/b/").unwrap();
        assert_eq!(found[0].1.store_word(), "s3=https://s3.example");
    }
}
