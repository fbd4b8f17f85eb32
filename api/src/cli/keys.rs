//! `stasis key`: works on the journal, beside a running supervisor; whoever may open that file owns the host.

use super::args::{Key, KeyVerb};
use super::output::{self, Output};
use super::{ExitStatus, Failure, profile};
use crate::journal::keys::is_tenant;
use crate::journal::{Journal, JournalError};
use crate::sources::{Sources, rfc3339};
use crate::supervisor::JOURNAL;
use serde_json::json;

pub(super) fn run(key: &Key, output: Output) -> Result<ExitStatus, Failure> {
    let sources = Sources::system();
    let failed = |e: JournalError| Failure::other(crate::error::chain(&e));
    let dir = key
        .data_dir
        .clone()
        .or_else(profile::data_dir)
        .ok_or_else(|| Failure::new(ExitStatus::Usage, "no data directory: give --data-dir"))?;
    std::fs::create_dir_all(&dir).map_err(|e| Failure::other(format!("cannot create {}: {e}", dir.display())))?;
    let journal = Journal::open(&dir.join(JOURNAL)).map_err(failed)?;
    match &key.verb {
        KeyVerb::Create { tenant, label } => {
            if !is_tenant(tenant) {
                return Err(Failure::new(ExitStatus::Usage, "a tenant has 1 to 40 characters of a-z, 0-9 and '-'"));
            }
            let (made, secret) = journal.create_key(tenant, label, &sources).map_err(failed)?;
            if output.json {
                Output::value(&json!({ "id": made.id, "tenant": made.tenant, "label": made.label, "key": secret }));
            } else {
                output::tell("This is the only time the key is shown.");
                output::line(&secret);
            }
        }
        KeyVerb::List => {
            let keys = journal.keys().map_err(failed)?;
            if output.json {
                Output::value(&json!({ "items": keys }));
            } else {
                let mut rows = vec![["ID", "TENANT", "LABEL", "CREATED", "REVOKED"].map(str::to_owned).to_vec()];
                rows.extend(keys.into_iter().map(|k| {
                    vec![k.id, k.tenant, k.label, rfc3339(k.created_at), k.revoked_at.map(rfc3339).unwrap_or_default()]
                }));
                output.table(&rows);
            }
        }
        KeyVerb::Revoke { id } => {
            if !journal.revoke_key(id, sources.now_ms()).map_err(failed)? {
                return Err(Failure::new(ExitStatus::NotFound, format!("there is no key {id:?}")));
            }
            output::tell(&format!("key {id} is refused from now on"));
        }
    }
    Ok(ExitStatus::Ok)
}
