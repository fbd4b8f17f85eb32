//! `stasis gc`: one pass of the collector.

use super::args::Gc;
use super::bucket::{self, Bucket};
use super::output::{self, Output, bytes};
use super::{ExitStatus, Failure};
use crate::error::chain;
use stasis_snapshot::gc::{self, GcError, Options};

pub(super) async fn run(arguments: Gc, output: Output) -> Result<ExitStatus, Failure> {
    let bucket = Bucket::open(&arguments.bucket)?;
    let options = Options {
        grace: arguments.grace,
        tenant: arguments.bucket.tenant,
        dry_run: arguments.dry_run,
        conditional: arguments.dry_run || bucket.conditional().await?,
        ..Options::default()
    };
    let report = gc::run(&bucket.objects, &bucket.seals, &options, &|| bucket.now_ms(), &|| bucket.commit_id())
        .await
        .map_err(|e| match &e {
        GcError::Store { source, .. } => Failure { message: chain(&e), ..bucket::store(source) },
        _ => Failure::other(chain(&e)),
    })?;
    let blocked = report.tenants.iter().any(|tenant| !tenant.blocked.is_empty());
    if output.json {
        let value = serde_json::to_value(&report).map_err(|e| Failure::other(e.to_string()))?;
        Output::value(&value);
    } else {
        let (deleted, freed) = if arguments.dry_run { ("TO DELETE", "TO FREE") } else { ("DELETED", "FREED") };
        let mut rows =
            vec![["TENANT", "SANDBOXES", "OBJECTS", "KEPT", "WAITING", deleted, freed].map(str::to_owned).to_vec()];
        for tenant in &report.tenants {
            rows.push(vec![
                tenant.tenant.clone(),
                tenant.heads.to_string(),
                tenant.objects.to_string(),
                tenant.kept.to_string(),
                tenant.candidates.to_string(),
                tenant.deleted.len().to_string(),
                bytes(tenant.deleted_bytes),
            ]);
        }
        output.table(&rows);
        for tenant in &report.tenants {
            for key in tenant.deleted.iter().filter(|_| arguments.dry_run) {
                output::line(key);
            }
            for note in &tenant.odd {
                output::tell(&format!("kept: {note}"));
            }
            for why in &tenant.blocked {
                output::complain(&format!("nothing of tenant {} is deleted: {why}", tenant.tenant));
            }
        }
    }
    Ok(if blocked { ExitStatus::Damaged } else { ExitStatus::Ok })
}
