//! Samples, their percentiles, and the rows that a run reports.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

use super::case::Case;

/// The names that are fixed; others are details of them, `name.detail`.
pub const METRICS: &[&str] = &[
    "first_pause",
    "repeat_pause",
    "guest_stop",
    "resume_hot",
    "resume_warm",
    "resume_cold",
    "first_pass_after_snapshot",
    "first_pass_after_resume",
    "resident",
    "bytes_changed",
    "bytes_sent",
    "requests",
    "overhead",
    "cpu",
    "bare_upload",
    "bare_download",
];

/// One line of the result: a metric's percentiles over its samples.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Who was measured.
    pub vmm: String,
    /// On which guest.
    pub guest: String,
    /// Guest memory, MiB.
    pub memory_mib: u32,
    /// Used of it, MiB.
    pub used_mib: u32,
    /// Changing of it, MiB.
    pub changed_mib: u32,
    /// Store.
    pub store: String,
    /// Sandboxes at once.
    pub sandboxes: u32,
    /// Metric.
    pub metric: String,
    /// Its unit.
    pub unit: String,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Samples.
    pub n: usize,
}

/// Samples by metric, in the order in which the metrics came first.
#[derive(Clone, Debug, Default)]
pub struct Samples {
    order: Vec<String>,
    values: BTreeMap<String, (&'static str, Vec<f64>)>,
}

impl Samples {
    /// Adds one.
    pub fn add(&mut self, metric: impl Into<String>, unit: &'static str, value: f64) {
        let metric = metric.into();
        if !self.values.contains_key(&metric) {
            self.order.push(metric.clone());
        }
        self.values.entry(metric).or_insert((unit, Vec::new())).1.push(value);
    }

    /// Adds a time, in ms.
    pub fn time(&mut self, metric: impl Into<String>, took: Duration) {
        self.add(metric, "ms", took.as_secs_f64() * 1000.0);
    }

    /// Adds a count of bytes.
    pub fn bytes(&mut self, metric: impl Into<String>, bytes: u64) {
        self.add(metric, "bytes", bytes as f64);
    }

    /// Median of a metric.
    pub fn median(&self, metric: &str) -> Option<f64> {
        let mut values = self.values.get(metric)?.1.clone();
        percentile(&mut values, 50)
    }

    /// The rows of these samples: fixed names in their order, then the details.
    pub fn rows(&self, vmm: &str, case: &Case) -> Vec<Row> {
        let rank = |name: &String| METRICS.iter().position(|m| m == name).unwrap_or(METRICS.len());
        let mut names = self.order.clone();
        names.sort_by_key(rank);
        let row = |metric: String| {
            let (unit, values) = self.values.get(&metric)?;
            let mut sorted = values.clone();
            Some(Row {
                vmm: vmm.to_owned(),
                guest: case.guest_word(),
                memory_mib: case.memory_mib,
                used_mib: case.used_mib,
                changed_mib: case.changed_mib,
                store: case.store_word(),
                sandboxes: case.sandboxes,
                unit: (*unit).to_owned(),
                p50: percentile(&mut sorted, 50)?,
                p90: percentile(&mut sorted, 90)?,
                p99: percentile(&mut sorted, 99)?,
                n: values.len(),
                metric,
            })
        };
        names.into_iter().filter_map(row).collect()
    }
}

/// By nearest rank; sorts. `None` without values.
pub fn percentile(values: &mut [f64], percent: usize) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let rank = (values.len() * percent).div_ceil(100).max(1);
    values.get(rank - 1).copied()
}

/// A figure with as many digits as it is worth, bytes as MiB.
pub fn figure(value: f64, unit: &str) -> String {
    match unit {
        "bytes" if value >= 1024.0 * 1024.0 => format!("{:.1} MiB", value / 1024.0 / 1024.0),
        "bytes" => format!("{:.1} KiB", value / 1024.0),
        "count" => format!("{value:.0}"),
        "s" => format!("{value:.2} s"),
        _ if value.abs() >= 100.0 => format!("{value:.0} {unit}"),
        _ if value.abs() >= 10.0 => format!("{value:.1} {unit}"),
        _ => format!("{value:.2} {unit}"),
    }
}

/// Rows of one case as a table for a terminal.
pub fn table(rows: &[Row]) -> String {
    let header = ["vmm", "metric", "p50", "p90", "p99", "n"].map(str::to_owned);
    let mut cells = vec![header];
    cells.extend(rows.iter().map(|row| {
        let shown = |value| figure(value, &row.unit);
        [row.vmm.clone(), row.metric.clone(), shown(row.p50), shown(row.p90), shown(row.p99), row.n.to_string()]
    }));
    let width = |column: usize| cells.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 6] = std::array::from_fn(width);
    let mut out = String::new();
    for line in &cells {
        for (column, cell) in line.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
            let text = if column < 2 { format!("{cell}{pad}") } else { format!("{pad}{cell}") };
            out += &format!("  {text}");
        }
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        assert_eq!(percentile(&mut [], 50), None);
        assert_eq!(percentile(&mut [7.0], 99), Some(7.0));
        let mut values = [5.0, 1.0, 4.0, 2.0, 3.0];
        assert_eq!([50, 90, 99].map(|p| percentile(&mut values, p)), [Some(3.0), Some(5.0), Some(5.0)]);
        let mut hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!([50, 90, 99].map(|p| percentile(&mut hundred, p)), [Some(50.0), Some(90.0), Some(99.0)]);
    }

    #[test]
    fn fixed_names_come_first_and_details_after() {
        let mut samples = Samples::default();
        for metric in ["zeta.detail", "cpu", "first_pause"] {
            samples.add(metric, "ms", 1.0);
        }
        let names: Vec<_> = samples.rows("stasis", &Case::standard()).into_iter().map(|row| row.metric).collect();
        assert_eq!(names, ["first_pause", "cpu", "zeta.detail"]);
    }
}
