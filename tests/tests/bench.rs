//! The benchmark itself, with sizes that take seconds: it measures, and its rows have the shape that is promised.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use stasis_tests::bench::samples::METRICS;
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};

/// The keys of a row, and whether each holds a number.
const KEYS: &[(&str, bool)] = &[
    ("vmm", false),
    ("guest", false),
    ("memory_mib", true),
    ("used_mib", true),
    ("changed_mib", true),
    ("store", false),
    ("sandboxes", true),
    ("metric", false),
    ("unit", false),
    ("p50", true),
    ("p90", true),
    ("p99", true),
    ("n", true),
];

fn main() {
    Suite::default()
        .test("a_small_case_reports_rows_a_report_and_plots", no_pulse(), small_case)
        .test("many_sandboxes_over_a_link_are_all_durable", no_pulse(), many)
        .main();
}

#[expect(clippy::disallowed_methods, reason = "a program run as an operator runs it")]
fn bench(dir: &Path, arguments: &str) -> Result<Vec<Value>, Error> {
    let json = dir.join("rows.json");
    let done = Command::new(env!("CARGO_BIN_EXE_stasis-bench"))
        .args(arguments.split_whitespace())
        .arg("--json")
        .arg(&json)
        .arg("--markdown")
        .arg(dir.join("report.md"))
        .arg("--svg")
        .arg(dir)
        .output()?;
    let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        return Err(format!("{}: {said}", done.status).into());
    }
    let rows: Value = serde_json::from_slice(&std::fs::read(json)?)?;
    let rows = rows.as_array().cloned().unwrap_or_default();
    for row in &rows {
        let fields = row.as_object().ok_or("a row is an object")?;
        assert_eq!(fields.len(), KEYS.len(), "{row}");
        for (key, number) in KEYS {
            assert_eq!(fields[*key].is_number(), *number, "{key} of {row}");
        }
        assert!(row["p50"].as_f64() <= row["p90"].as_f64() && row["p90"].as_f64() <= row["p99"].as_f64(), "{row}");
        assert!(said.contains(row["metric"].as_str().unwrap_or("none")), "{said}");
    }
    Ok(rows)
}

fn p50(rows: &[Value], metric: &str) -> Result<f64, Error> {
    let row = rows.iter().find(|row| row["metric"] == metric).ok_or_else(|| format!("no {metric}"))?;
    row["p50"].as_f64().ok_or_else(|| format!("{metric} has no p50").into())
}

async fn small_case() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().to_owned();
    let arguments = "--guest pulse --memory-mib 64 --used-mib 16 --changed-mib 2 --store s3 --runs 1";
    let rows = tokio::task::spawn_blocking(move || bench(&path, arguments)).await??;
    // Those of named snapshots are there as soon as the service has them.
    let later = ["guest_stop", "first_pass_after_snapshot"];
    for metric in METRICS.iter().filter(|metric| !later.contains(metric)) {
        assert!(p50(&rows, metric)? >= 0.0, "{metric}");
    }
    // 2 MiB of `real` content change in their first bytes and compress; a first pause sends more.
    let (changed, sent) = (p50(&rows, "bytes_changed")?, p50(&rows, "bytes_sent")?);
    assert!(sent > 4096.0 && changed <= 2.0 * 1024.0 * 1024.0, "{sent} of {changed}");
    assert!(p50(&rows, "bytes_sent.first")? > sent);
    assert!(p50(&rows, "repeat_pause")? > p50(&rows, "bare_small_put")?, "a pause is more than one PUT");
    let report = std::fs::read_to_string(dir.path().join("report.md"))?;
    assert!(report.contains(arguments) && report.contains("| stasis | repeat_pause |"), "{report}");
    for plot in ["pause.svg", "resume.svg", "phases.svg"] {
        assert!(std::fs::read_to_string(dir.path().join(plot))?.ends_with("</svg>\n"), "{plot}");
    }
    Ok(())
}

async fn many() -> Outcome {
    let dir = tempfile::tempdir()?;
    let path = dir.path().to_owned();
    let arguments = "--memory-mib 32 --used-mib 8 --changed-mib 1 --sandboxes 3 --rtt-ms 5 --gbps 1 --runs 1";
    let rows = tokio::task::spawn_blocking(move || bench(&path, arguments)).await??;
    let first = rows.iter().find(|row| row["metric"] == "first_pause").ok_or("no first_pause")?;
    assert_eq!((&first["n"], &first["sandboxes"], &first["store"]), (&3.into(), &3.into(), &"s3 5 ms 1 Gb/s".into()));
    assert!(p50(&rows, "first_pause")? > 15.0, "packs, manifest and head are at least three round trips");
    Ok(())
}
