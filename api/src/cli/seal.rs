//! `stasis seal`: the operator's keys, made and rotated.

use super::args::{Seal, SealVerb};
use super::bucket::{self, Bucket};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use crate::sources::Sources;
use serde_json::json;
use stasis_snapshot::ids::CommitId;
use stasis_snapshot::seal::OperatorKey;
use stasis_snapshot::seal::rotate::{Options, Random, Report, rotate};
use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use zeroize::Zeroizing;

impl Random for Sources {
    fn commit(&self) -> CommitId {
        CommitId(self.random())
    }

    fn nonce(&self) -> [u8; 12] {
        self.random()
    }
}

pub(super) async fn run(arguments: Seal, output: Output) -> Result<ExitStatus, Failure> {
    match arguments.verb {
        SealVerb::Key { out } => key(&out, output),
        SealVerb::Rotate(arguments) => {
            let bucket = Bucket::open(&arguments.bucket)?;
            if !bucket.seals.is_on() {
                return Err(Failure::new(ExitStatus::Usage, "there is no key to rotate to: seal.key_file"));
            }
            let options = Options {
                tenant: arguments.bucket.tenant,
                dry_run: arguments.dry_run,
                limit: arguments.limit.unwrap_or(usize::MAX),
                conditional: arguments.dry_run || bucket.conditional().await?,
            };
            let report = rotate(&bucket.objects, &bucket.seals, &options, &Sources::system())
                .await
                .map_err(|error| bucket::store(&error))?;
            show(&bucket, &report, arguments.dry_run, output)?;
            Ok(ExitStatus::Ok)
        }
    }
}

/// Makes a key in a file of its own.
fn key(out: &Path, output: Output) -> Result<ExitStatus, Failure> {
    let failed = |e: std::io::Error| Failure::other(format!("cannot write {}: {e}", out.display()));
    let secret = Zeroizing::new(Sources::system().random::<32>());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(out).map_err(failed)?;
    file.write_all(OperatorKey::file_text(&secret).as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    let id = OperatorKey::new(&secret).id().to_string();
    if output.json {
        Output::value(&json!({ "id": id, "file": out }));
    } else {
        output::tell("Keep a copy elsewhere: what is sealed under a key that is lost cannot be read by anybody.");
        output::line(&id);
    }
    Ok(ExitStatus::Ok)
}

fn show(bucket: &Bucket, report: &Report, dry_run: bool, output: Output) -> Result<(), Failure> {
    if output.json {
        let value = serde_json::to_value(report).map_err(|e| Failure::other(e.to_string()))?;
        Output::value(&value);
        return Ok(());
    }
    let moved = if dry_run { "to be moved" } else { "moved" };
    output::line(&format!("{} heads: {} current, {} {moved}", report.heads, report.current, report.moved.len()));
    for left in &report.left {
        output::line(&format!("left: {}: {}", left.head, left.why));
    }
    for id in bucket.seals.ids().map(|id| id.to_string()) {
        match report.needed.get(&id) {
            Some(heads) => output::line(&format!("key {id}: needed by {heads} heads")),
            None => output::line(&format!("key {id}: needed by nothing any more, of what was looked at")),
        }
    }
    for (id, heads) in report.needed.iter().filter(|(id, _)| bucket.seals.ids().all(|known| known.to_string() != **id))
    {
        let what = if id == "none" { "not sealed".to_owned() } else { format!("key {id}, which is not configured") };
        output::line(&format!("{what}: {heads} heads"));
    }
    if !dry_run {
        output::tell(
            "start each supervisor once with both keys before an old one is taken away: its journal holds data keys, too",
        );
    }
    Ok(())
}
