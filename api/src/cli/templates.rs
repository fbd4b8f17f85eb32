//! `stasis templates`: reads the image directory, beside a running supervisor or before the first one.

use super::args::Templates as Arguments;
use super::output::{self, Output};
use super::{ExitStatus, Failure, serve};
use crate::block_indexes;
use crate::error::chain;
use crate::journal::Journal;
use crate::template::Templates;
use serde_json::json;

pub(super) fn run(arguments: &Arguments, output: Output) -> Result<ExitStatus, Failure> {
    let images = arguments.images_dir.clone().unwrap_or_else(serve::images_dir);
    let templates = Templates::new(&images);
    // No supervisor's journal is touched: digests are kept beside the files.
    let journal = Journal::in_memory().map_err(|e| Failure::other(chain(&e)))?;
    let names = templates.names().map_err(|e| Failure::other(chain(&e)))?;
    let mut found = Vec::new();
    for name in names {
        let template = templates.find(&name, &journal).map_err(|e| Failure::other(chain(&e)))?;
        if let (Some(rootfs), Some(digest)) = (&template.rootfs, &template.rootfs_digest)
            && let Err(error) = block_indexes::leave_beside(rootfs, digest)
        {
            output::tell(&format!("{}: its blocks are indexed by the supervisor: {error}", template.name));
        }
        found.push(template);
    }
    if output.json {
        let items: Vec<_> = found
            .iter()
            .map(|t| json!({ "id": t.id(), "name": t.name, "digest": t.digest, "disk_mib": t.disk_mib }))
            .collect();
        Output::value(&json!({ "items": items }));
    } else {
        let mut rows = vec![["ID", "NAME", "DISK MIB", "KERNEL"].map(str::to_owned).to_vec()];
        rows.extend(
            found.iter().map(|t| vec![t.id(), t.name.clone(), t.disk_mib.to_string(), t.kernel.display().to_string()]),
        );
        output.table(&rows);
    }
    Ok(ExitStatus::Ok)
}
