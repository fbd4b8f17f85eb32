//! What this supervisor counts, for Prometheus.
//!
//! | module | what |
//! | --- | --- |
//! | `exposition` | the text format |
//! | `now` | what is asked when somebody wants to know |
//! | `counted_store` | an object store whose requests are counted |
//!
//! [`FAMILIES`] is the list of everything there is. Labels are words of ours from small sets: never an id, a tenant or a path, which would let
//! a client make as many series as it likes.

mod counted_store;
mod exposition;
pub mod now;

pub use counted_store::CountedStore;
pub use exposition::{Kind, Sample, Value, text};

use crate::timing::Timing;
use crate::wire::network::RuleActivity;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bounds of the buckets of every histogram, seconds: from what a kept wake takes to what a first pause of a large guest takes.
pub const BUCKETS: [f64; 14] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0];

/// One family of series.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What its series are.
    pub kind: Kind,
    /// For people.
    pub help: &'static str,
}

macro_rules! families {
    ($($id:ident $kind:ident $name:literal $help:literal)*) => {
        $(
            #[doc = $help]
            pub const $id: &str = $name;
        )*

        /// Every family, in the order in which they are told.
        pub const FAMILIES: &[Family] = &[$(Family { name: $name, kind: Kind::$kind, help: $help }),*];
    };
}

families! {
    SANDBOXES Gauge "stasis_sandboxes" "Sandboxes by state."
    OPERATIONS Counter "stasis_operations_total" "Operations that ended, by outcome."
    PHASE Histogram "stasis_phase_seconds" "Phases of operations that succeeded."
    BYTES Counter "stasis_operation_bytes_total" "Bytes of operations that succeeded: sent to the store and fetched from it."
    REQUESTS Counter "stasis_api_requests_total" "Requests to the API, by class of status."
    INVOKES Counter "stasis_invoke_requests_total" "Requests to apps in sandboxes, by class of status."
    INVOKE_SECONDS Histogram "stasis_invoke_seconds" "From a request to an app to the head of its answer, wakes included."
    VISITS Gauge "stasis_guest_requests" "Requests that guests work on, or that wait for a guest."
    STORE_REQUESTS Counter "stasis_store_requests_total" "Requests of the supervisor to the object store, by outcome; what may be retried is 'retryable'."
    STORE_SECONDS Histogram "stasis_store_request_seconds" "Requests of the supervisor to the object store."
    FAULTS Gauge "stasis_vmm_faults" "Faults on absent memory in the guests that run now, since their wakes."
    FAULT_SECONDS Gauge "stasis_vmm_fault_seconds" "Time that those faults waited."
    PAGED Gauge "stasis_vmm_paged_bytes" "Bytes paged into the guests that run now, since their wakes, by source."
    VMM_STORE_REQUESTS Gauge "stasis_vmm_store_requests" "Requests to the store for pages of the guests that run now, since their wakes."
    VMM_NETWORK_BYTES Gauge "stasis_vmm_network_bytes" "Bytes through the network devices of the guests that run now, since their wakes, by direction."
    VMM_NETWORK_DROPPED Gauge "stasis_vmm_network_dropped_packets" "Packets that those devices dropped, by direction."
    NETWORK_SECONDS Histogram "stasis_network_seconds" "Networks of sandboxes: claimed with a VM, and given back after it."
    NETWORK_DECISIONS Counter "stasis_network_decisions_total" "Connections, requests and DNS questions that passed, and what was refused, in networks that ended."
    NETWORK_BYTES Counter "stasis_network_bytes_total" "Bytes that rules let pass in networks that ended, by direction."
    OVERHEAD Gauge "stasis_vmm_overhead_bytes" "Resident memory of running VMMs beyond guest memory."
    KEPT Gauge "stasis_kept_memory_bytes" "Memory of paused sandboxes that is kept on this host."
    KEPT_WAKES Counter "stasis_kept_memory_wakes_total" "Wakes that found their memory on this host, or not."
    POOL Gauge "stasis_vmm_pool" "VMMs that wait for a sandbox."
    CACHE_BYTES Gauge "stasis_pack_cache_bytes" "Bytes of packs on the local disk."
    CACHE_FILES Gauge "stasis_pack_cache_files" "Packs on the local disk."
    AHEAD_ROUNDS Gauge "stasis_run_ahead_rounds" "Rounds ahead of a pause, of the sandboxes that run now, by outcome."
    AHEAD_BYTES Gauge "stasis_run_ahead_bytes" "Bytes sent ahead of a pause, of the sandboxes that run now."
    COLLECTIONS Counter "stasis_gc_passes_total" "Passes of the collector, by outcome."
    COLLECTED Counter "stasis_gc_deleted_objects_total" "Objects that the collector deleted."
    COLLECTED_BYTES Counter "stasis_gc_deleted_bytes_total" "Bytes that the collector deleted."
}

/// Name and value of each label of a series.
type Labels = Vec<(&'static str, String)>;

/// How often each bucket was met, and the sum of what was observed.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// As many as [`BUCKETS`], each for itself.
    pub buckets: [u64; BUCKETS.len()],
    /// All observations, those beyond the last bucket included.
    pub count: u64,
    /// Seconds.
    pub sum: f64,
}

impl Histogram {
    fn observe(&mut self, seconds: f64) {
        if let Some(bucket) = BUCKETS.iter().position(|bound| seconds <= *bound) {
            self.buckets[bucket] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }
}

/// Counters and histograms. Each method is short and takes one lock.
#[derive(Debug, Default)]
pub struct Metrics {
    series: Mutex<Series>,
}

#[derive(Debug, Default)]
struct Series {
    counters: BTreeMap<(&'static str, Labels), u64>,
    histograms: BTreeMap<(&'static str, Labels), Histogram>,
}

fn owned(labels: &[(&'static str, &str)]) -> Labels {
    labels.iter().map(|(name, value)| (*name, (*value).to_owned())).collect()
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Series> {
        // Each critical section changes one number.
        self.series.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to a counter.
    pub fn count(&self, family: &'static str, labels: &[(&'static str, &str)], by: u64) {
        *self.lock().counters.entry((family, owned(labels))).or_default() += by;
    }

    /// Adds an observation to a histogram.
    pub fn observe(&self, family: &'static str, labels: &[(&'static str, &str)], took: Duration) {
        self.lock().histograms.entry((family, owned(labels))).or_default().observe(took.as_secs_f64());
    }

    /// An operation has ended, well or not, at this cost.
    pub fn operation(&self, operation: &'static str, ok: bool, timing: &Timing) {
        let outcome = if ok { "ok" } else { "error" };
        self.count(OPERATIONS, &[("operation", operation), ("outcome", outcome)], 1);
        if ok {
            for (phase, took) in timing.phases() {
                self.observe(PHASE, &[("operation", operation), ("phase", phase)], *took);
            }
            for (kind, bytes) in timing.byte_counts() {
                self.count(BYTES, &[("operation", operation), ("kind", kind)], *bytes);
            }
        }
    }

    /// A network has ended, after it let so much pass.
    pub fn network(&self, total: &RuleActivity) {
        for (outcome, times) in [("allowed", total.allowed), ("refused", total.refused)] {
            self.count(NETWORK_DECISIONS, &[("outcome", outcome)], times);
        }
        for (direction, bytes) in [("out", total.bytes_out), ("in", total.bytes_in)] {
            self.count(NETWORK_BYTES, &[("direction", direction)], bytes);
        }
    }

    /// An answer with this status.
    pub fn answered(&self, family: &'static str, status: u16) {
        let class = match status {
            100..200 => "1xx",
            200..300 => "2xx",
            300..400 => "3xx",
            400..500 => "4xx",
            _ => "5xx",
        };
        self.count(family, &[("status", class)], 1);
    }

    /// Everything so far.
    pub fn samples(&self) -> Vec<Sample> {
        let series = self.lock();
        let counters = series.counters.iter().map(|((family, labels), value)| Sample {
            family,
            labels: labels.clone(),
            #[expect(clippy::cast_precision_loss, reason = "the format's numbers are doubles")]
            value: Value::Number(*value as f64),
        });
        let histograms = series.histograms.iter().map(|((family, labels), histogram)| Sample {
            family,
            labels: labels.clone(),
            value: Value::Histogram(histogram.clone()),
        });
        counters.chain(histograms).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_is_counted_with_its_phases_and_bytes() {
        let metrics = Metrics::default();
        let mut timing = Timing::default();
        timing.phase("stop", Duration::from_millis(3));
        timing.bytes("sent", 70);
        metrics.operation("pause", true, &timing);
        metrics.operation("pause", true, &timing);
        metrics.operation("pause", false, &timing);
        metrics.answered(REQUESTS, 404);
        metrics.network(&RuleActivity { allowed: 3, refused: 1, bytes_out: 5, ..RuleActivity::default() });
        let text = text(&metrics.samples());
        for line in [
            "stasis_operations_total{operation=\"pause\",outcome=\"ok\"} 2",
            "stasis_operations_total{operation=\"pause\",outcome=\"error\"} 1",
            "stasis_operation_bytes_total{operation=\"pause\",kind=\"sent\"} 140",
            "stasis_network_decisions_total{outcome=\"allowed\"} 3",
            "stasis_network_decisions_total{outcome=\"refused\"} 1",
            "stasis_network_bytes_total{direction=\"out\"} 5",
            "stasis_phase_seconds_bucket{operation=\"pause\",phase=\"stop\",le=\"0.002\"} 0",
            "stasis_phase_seconds_bucket{operation=\"pause\",phase=\"stop\",le=\"0.005\"} 2",
            "stasis_phase_seconds_bucket{operation=\"pause\",phase=\"stop\",le=\"+Inf\"} 2",
            "stasis_phase_seconds_count{operation=\"pause\",phase=\"stop\"} 2",
            "stasis_api_requests_total{status=\"4xx\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn families_have_different_names() {
        let names: std::collections::BTreeSet<_> = FAMILIES.iter().map(|family| family.name).collect();
        assert_eq!(names.len(), FAMILIES.len());
        assert!(BUCKETS.is_sorted());
    }
}
