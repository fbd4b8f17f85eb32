//! `stasis verify`: every digest of a snapshot, or of the bucket.

use super::args::Verify;
use super::bucket::{self, Bucket};
use super::output::{self, Output, bytes};
use super::{ExitStatus, Failure};
use crate::error::chain;
use serde_json::Value;
use stasis_snapshot::commit::Head;
use stasis_snapshot::store::ErrorKind;
use stasis_snapshot::verify::{BucketReport, Report, verify, verify_bucket};

pub(super) async fn run(arguments: Verify, output: Output) -> Result<ExitStatus, Failure> {
    let bucket = Bucket::open(&arguments.bucket)?;
    let tenant = arguments.bucket.tenant.as_deref();
    let (report, value) = match &arguments.id {
        None => {
            let found =
                verify_bucket(bucket.objects.as_ref(), tenant, &bucket.seals).await.map_err(|e| bucket::store(&e))?;
            let value = serde_json::to_value(&found);
            if !output.json {
                bucket_lines(&found);
            }
            (found.checked, value)
        }
        Some(id) => {
            let report = one(&bucket, id, tenant).await?;
            let value = serde_json::to_value(&report);
            (report, value)
        }
    };
    let value: Value = value.map_err(|e| Failure::other(e.to_string()))?;
    if output.json {
        Output::value(&value);
    } else {
        for problem in &report.problems {
            output::line(&format!("{}: {}", problem.key, problem.what));
        }
        let verdict = if report.problems.is_empty() { "sound" } else { "NOT SOUND" };
        output::line(&format!(
            "{verdict}: {} packs, {} frames, {} read, {} problems",
            report.packs,
            report.frames,
            bytes(report.bytes),
            report.problems.len()
        ));
        if report.seals_not_checked + report.frames_not_opened > 0 {
            output::line(&format!(
                "not checked, for want of the operator's key: {} seals, and what {} encrypted frames hold",
                report.seals_not_checked, report.frames_not_opened
            ));
        }
    }
    Ok(if report.problems.is_empty() { ExitStatus::Ok } else { ExitStatus::Damaged })
}

fn bucket_lines(found: &BucketReport) {
    output::line(&format!("{} heads, {} manifests", found.heads, found.manifests));
    if !found.unreachable.is_empty() {
        output::line(&format!(
            "{} objects ({}) that no head names; `stasis gc` deletes what nobody is about to use",
            found.unreachable.len(),
            bytes(found.unreachable_bytes)
        ));
    }
}

async fn one(bucket: &Bucket, id: &str, tenant: Option<&str>) -> Result<Report, Failure> {
    let key = format!("{}head", bucket.prefix_of(id, tenant).await?);
    let object = bucket.objects.get(&key).await.map_err(|e| match e.kind {
        ErrorKind::NotFound => Failure::new(ExitStatus::NotFound, format!("sandbox {id} has no head: {key}")),
        _ => bucket::store(&e),
    })?;
    let damaged = |why: String| Failure::new(ExitStatus::Damaged, format!("{key}: {why}"));
    if bucket.seals.is_on() {
        bucket.seals.open_head(&key, &object.bytes).map_err(|e| damaged(chain(&e)))?;
    }
    let head = Head::decode(&object.bytes).map_err(|e| damaged(chain(&e)))?;
    match head.manifest {
        Some(named) => verify(bucket.objects.as_ref(), &named, &bucket.seals).await.map_err(|e| bucket::store(&e)),
        None => Err(Failure::new(ExitStatus::WrongState, format!("sandbox {id} has no snapshot: it was never paused"))),
    }
}
