//! Prometheus' text format, version 0.0.4.

use super::{BUCKETS, FAMILIES, Histogram};
use std::fmt::Write as _;

/// What the series of a family are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Stands where it stands.
    Gauge,
    /// Observations by buckets.
    Histogram,
}

/// The value of a series.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Of a counter or a gauge.
    Number(f64),
    /// Of a histogram.
    Histogram(Histogram),
}

/// One series.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Name of its family.
    pub family: &'static str,
    /// Its labels.
    pub labels: Vec<(&'static str, String)>,
    /// Its value.
    pub value: Value,
}

/// The samples, family by family in the order of [`FAMILIES`].
pub fn text(samples: &[Sample]) -> String {
    let mut out = String::new();
    for family in FAMILIES {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "# HELP {} {}\n# TYPE {} {kind}", family.name, family.help, family.name);
        for sample in samples.iter().filter(|sample| sample.family == family.name) {
            let labels = labels(&sample.labels);
            match &sample.value {
                Value::Number(number) => {
                    let _ = writeln!(out, "{}{} {number}", family.name, braced(&labels));
                }
                Value::Histogram(histogram) => tell(&mut out, family.name, &labels, histogram),
            }
        }
    }
    out
}

/// Buckets are cumulative in the text.
fn tell(out: &mut String, name: &str, labels: &str, histogram: &Histogram) {
    let comma = if labels.is_empty() { "" } else { "," };
    let mut so_far = 0;
    for (bound, met) in BUCKETS.iter().zip(histogram.buckets) {
        so_far += met;
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {so_far}");
    }
    let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {}", histogram.count);
    let _ = writeln!(
        out,
        "{name}_sum{} {}\n{name}_count{} {}",
        braced(labels),
        histogram.sum,
        braced(labels),
        histogram.count
    );
}

fn braced(labels: &str) -> String {
    if labels.is_empty() { String::new() } else { format!("{{{labels}}}") }
}

fn labels(of: &[(&'static str, String)]) -> String {
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    of.iter().map(|(name, value)| format!("{name}=\"{}\"", escaped(value))).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_without_labels_have_no_braces_and_values_are_escaped() {
        let number = |labels, number| Sample { family: super::super::POOL, labels, value: Value::Number(number) };
        let text = text(&[number(vec![], 2.0), number(vec![("a", "x\"\\\ny".to_owned())], 0.5)]);
        assert!(
            text.contains(
                "# TYPE stasis_vmm_pool gauge\nstasis_vmm_pool 2\nstasis_vmm_pool{a=\"x\\\"\\\\\\ny\"} 0.5\n"
            ),
            "{text}"
        );
    }
}
