//! `stasis repair`: heads whose snapshot is not whole, and what can be done. Together with `stasis recover`, which takes up what is whole, this makes
//! a lost catalogue from the bucket alone.

use super::args::Repair;
use super::bucket::{self, Bucket};
use super::output::{self, Output};
use super::{ExitStatus, Failure};
use crate::error::chain;
use serde_json::{Value, json};
use stasis_snapshot::commit::{Backoff, ObjectHead, Outcome, Register, Sent};
use stasis_snapshot::layout::{BadName, Owner};
use stasis_snapshot::repair::{Finding, Standing, propose, survey};
use std::time::Duration;

/// The owner in a head that repair writes where there was none; the first resume claims it.
pub(crate) const OWNER: &str = "stasis-repair";
const SETTLE: Duration = Duration::from_secs(40);

pub(super) async fn run(arguments: Repair, output: Output) -> Result<ExitStatus, Failure> {
    let bucket = Bucket::open(&arguments.bucket)?;
    let conditional = !arguments.apply || bucket.conditional().await?;
    let tenant = arguments.bucket.tenant.as_deref();
    let found =
        survey(bucket.objects.as_ref(), tenant, arguments.deep, &bucket.seals).await.map_err(|e| bucket::store(&e))?;
    let mut items = Vec::new();
    let mut left = 0;
    for finding in &found {
        let damaged = !matches!(finding.standing, Standing::Whole | Standing::Live | Standing::Deleted);
        let repaired = if damaged && arguments.apply { apply(&bucket, conditional, finding).await? } else { None };
        left += usize::from(damaged && repaired.as_ref().is_none_or(|outcome| outcome != "repaired"));
        let mut item = serde_json::to_value(finding).map_err(|e| Failure::other(e.to_string()))?;
        if let (Some(fields), Some(outcome)) = (item.as_object_mut(), &repaired) {
            fields.insert("outcome".to_owned(), Value::from(outcome.clone()));
        }
        items.push(item);
    }
    if output.json {
        Output::value(&json!({ "items": items }));
    } else {
        show(&items, output);
        if left > 0 && !arguments.apply {
            output::tell(
                "nothing was changed; --apply makes the heads that can be repaired name the snapshot in the last column",
            );
        }
        output::tell("`stasis recover` takes up what sleeps in the bucket and is unknown to a supervisor");
    }
    Ok(if left > 0 { ExitStatus::Damaged } else { ExitStatus::Ok })
}

fn show(items: &[Value], output: Output) {
    let mut rows = vec![["TENANT", "KIND", "ID", "STANDING", "PROBLEMS", "NEWEST WHOLE"].map(str::to_owned).to_vec()];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    for item in items {
        let problems = item["problems"].as_array().map_or(0, Vec::len);
        let kind = if item["of_sandbox"] == json!(true) { "sandbox" } else { "snapshot" };
        let standing = item.get("outcome").unwrap_or(&item["standing"]);
        rows.push(vec![
            text(&item["tenant"]),
            kind.to_owned(),
            text(&item["id"]),
            text(standing),
            problems.to_string(),
            text(&item["candidate"]["manifest"]["key"]),
        ]);
    }
    output.table(&rows);
    for problem in items.iter().flat_map(|item| item["problems"].as_array().into_iter().flatten()) {
        output::tell(&format!("{}: {}", text(&problem["key"]), text(&problem["what"])));
    }
}

/// What came of it; `None` where there is nothing to be done.
async fn apply(bucket: &Bucket, conditional: bool, finding: &Finding) -> Result<Option<String>, Failure> {
    if finding.candidate.is_none() || !matches!(finding.standing, Standing::Repairable | Standing::HeadLost) {
        return Ok(None);
    }
    if finding.sealed && !bucket.seals.is_on() {
        return Ok(Some("not repaired: it is sealed, and no key is configured (seal.key_file)".to_owned()));
    }
    let attempt = match propose(finding, OWNER, bucket.commit_id()) {
        Ok(attempt) => attempt,
        Err(error) => return Ok(Some(chain(&error))),
    };
    let place = if finding.of_sandbox {
        Owner::sandbox(&finding.tenant, &finding.id)
    } else {
        Owner::snapshot(&finding.tenant, &finding.id)
    };
    let key = place.map_err(|e: BadName| Failure::other(e.to_string()))?.head();
    let head = if conditional {
        ObjectHead::new(bucket.objects.clone(), key)
    } else {
        ObjectHead::unconditional(bucket.objects.clone(), key)
    };
    let register = Register::new(head.sealed(&bucket.seals));
    Ok(Some(match register.commit(&attempt, Sent::Never, &mut Backoff::within(SETTLE)).await {
        Outcome::Committed { .. } => "repaired".to_owned(),
        Outcome::Superseded { by } | Outcome::Fenced { by } => {
            format!("not repaired: supervisor {} has changed the head meanwhile", by.head.owner)
        }
        Outcome::Refused { cause } => format!("not repaired: {}", chain(&cause)),
        Outcome::Unknown { cause } => format!("it is not known whether it was repaired: {}", chain(&cause)),
    }))
}
