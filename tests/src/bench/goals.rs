//! The goals: what design §9 and the issue ask for, each with the figure that was measured for it.
//!
//! A goal is a ratio of two figures of one run wherever it can be. Where it names a peer that was not run, the peer's figure of the reference
//! measurement stands in, and the line says so. Of a goal that is missed the line says what no figure here can fall below ([`floors`]) and
//! where the time went, from the same run.

use std::fmt::Write as _;

use super::case::{Case, Guest};
use super::floors::{self, Floor};
use super::matrix::Part;
use super::samples::{Row, figure};

/// What a case showed.
#[derive(Clone, Debug)]
pub struct Result {
    /// Its part of the matrix.
    pub part: Part,
    /// It.
    pub case: Case,
    /// Its rows.
    pub rows: Vec<Row>,
    /// Where it ran, if that is not where the report's first ran.
    pub elsewhere: Option<String>,
}

impl Result {
    /// Median of what `vmm` shows.
    pub(super) fn of(&self, vmm: &str, metric: &str) -> Option<f64> {
        self.rows.iter().find(|row| row.vmm == vmm && row.metric == metric).map(|row| row.p50)
    }

    /// Median of what we show.
    pub(super) fn ours(&self, metric: &str) -> Option<f64> {
        self.of("stasis", metric)
    }
}

/// A goal beside its figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What is asked for.
    pub goal: String,
    /// The most that the figure may be.
    pub limit: f64,
    /// How the limit comes about.
    pub because: String,
    /// The figure.
    pub measured: f64,
    /// Its unit.
    pub unit: &'static str,
    /// What no figure can be below on this machine, where that is known.
    pub floor: Option<Floor>,
    /// Where the time went, where that is known.
    pub spent: Option<String>,
    /// What peers took for the same in this run.
    pub peers: Vec<(&'static str, f64)>,
}

/// Peers, as rows name them and as they are shown.
const PEERS: [(&str, &str); 2] = [("firecracker", "Firecracker"), ("qemu", "QEMU")];

impl Verdict {
    /// What peers took, in a few words; empty if none ran.
    pub fn beside(&self) -> String {
        let each = self.peers.iter().map(|(who, value)| format!("{who} {}", figure(*value, self.unit)));
        each.collect::<Vec<_>>().join(", ")
    }

    /// Whether it is met.
    pub fn met(&self) -> bool {
        self.measured <= self.limit
    }

    /// What is to be said of a missed one beside its limit, if anything.
    pub fn said_if_missed(&self) -> String {
        if self.met() {
            return String::new();
        }
        let floor = self.floor.as_ref().map(|floor| {
            let times = self.measured / floor.least.max(f64::MIN_POSITIVE);
            format!(
                "; not below {} here, of which this is {times:.2} ×: {}",
                figure(floor.least, self.unit),
                floor.because
            )
        });
        let spent = self.spent.as_ref().map(|spent| format!("; of it {spent}"));
        floor.into_iter().chain(spent).collect()
    }
}

/// Medians of the reference measurement (1 GiB, 256 MiB used, 32 MiB hot, `real`), ms: for peers that were not run.
struct Reference {
    metric: &'static str,
    ms: f64,
    who: &'static str,
}

const REFERENCES: &[Reference] = &[
    Reference { metric: "first_pause", ms: 1900.0, who: "Firecracker" },
    Reference { metric: "repeat_pause", ms: 120.0, who: "Firecracker" },
    Reference { metric: "guest_stop", ms: 30.0, who: "Firecracker" },
    Reference { metric: "guest_stop.128", ms: 100.0, who: "Firecracker" },
    Reference { metric: "first_pass_after_snapshot", ms: 0.4, who: "Cloud Hypervisor" },
    Reference { metric: "resume_warm", ms: 14.5, who: "Cloud Hypervisor" },
];

/// An undisturbed pass of the reference measurement, ms.
const REFERENCE_PASS: f64 = 0.1;

struct Judge<'a> {
    result: &'a Result,
    all: &'a [Result],
    verdicts: Vec<Verdict>,
}

impl Judge<'_> {
    fn add(&mut self, goal: &str, metric: &str, unit: &'static str, limit: Option<f64>, because: String) {
        if let (Some(measured), Some(limit)) = (self.result.ours(metric), limit) {
            let goal = format!("{goal} [{}]", place(&self.result.case));
            let spent = floors::spent(self.result, metric);
            // A peer has no memory that was kept: what it loads on the same host is a file in the page cache.
            let theirs = if metric == "resume_hot" { "resume_warm" } else { metric };
            let of = |(word, name)| self.result.of(word, theirs).map(|value| (name, value));
            let peers = PEERS.into_iter().filter_map(of).collect();
            self.verdicts.push(Verdict { goal, limit, because, measured, unit, floor: None, spent, peers });
        }
    }

    /// Firecracker's median where it ran, else the reference.
    fn peer(&self, metric: &str, detail: &str) -> Option<(f64, String)> {
        self.firecracker(metric).or_else(|| reference(&format!("{metric}{detail}")))
    }

    /// The better of Firecracker's median, where it ran, and the reference.
    fn better(&self, metric: &str) -> Option<(f64, String)> {
        let both = self.firecracker(metric).into_iter().chain(reference(metric));
        both.min_by(|one, other| one.0.total_cmp(&other.0))
    }

    fn firecracker(&self, metric: &str) -> Option<(f64, String)> {
        let ms = self.result.of("firecracker", metric)?;
        Some((ms, format!("Firecracker's {} in this run", figure(ms, "ms"))))
    }

    fn against_peer(&mut self, goal: &str, metric: &str, detail: &str, share: f64) {
        if let Some((ms, who)) = self.peer(metric, detail) {
            self.add(goal, metric, "ms", Some(ms * share), format!("{share:.2} × {who}"));
        }
    }

    fn against_bare(&mut self, goal: &str, metric: &str, bare: &str, plus: f64, what: &str) {
        let limit = self.result.ours(bare).map(|ms| 1.3 * ms + plus);
        self.add(goal, metric, "ms", limit, format!("1.3 × {bare}{what}"));
    }

    /// Says of the goal that was added last, if it is this one, what it cannot fall below.
    fn floor(&mut self, goal: &str, floor: Option<Floor>) {
        if let (Some(verdict), Some(floor)) = (self.verdicts.last_mut().filter(|v| v.goal.starts_with(goal)), floor) {
            verdict.floor = Some(floor);
        }
    }
}

fn reference(metric: &str) -> Option<(f64, String)> {
    let found = REFERENCES.iter().find(|reference| reference.metric == metric)?;
    Some((found.ms, format!("{}'s {} of the reference measurement", found.who, figure(found.ms, "ms"))))
}

fn place(case: &Case) -> String {
    let sandboxes = if case.sandboxes == 1 { String::new() } else { format!(", {} sandboxes", case.sandboxes) };
    format!(
        "{} MiB, {} used, {} changing, {}{sandboxes}",
        case.memory_mib,
        case.used_mib,
        case.changed_mib,
        case.store_word()
    )
}

/// Each goal that the results say something about.
pub fn judge(results: &[Result]) -> Vec<Verdict> {
    let mut all = Vec::new();
    // The goals are set for pulse: what a Debian guest shows depends on what else it does.
    for result in results.iter().filter(|result| result.case.guest == Guest::Pulse) {
        let mut judge = Judge { result, all: results, verdicts: Vec::new() };
        match result.part {
            Part::Goals | Part::Case => standard(&mut judge),
            Part::Link => link(&mut judge),
            Part::Many => many(&mut judge),
            Part::Changed | Part::Memory | Part::Sealed | Part::Network => {}
        }
        all.append(&mut judge.verdicts);
    }
    all.extend(flat(results));
    all
}

fn standard(judge: &mut Judge<'_>) {
    let case = &judge.result.case;
    if case.sandboxes > 1 {
        return many(judge);
    }
    if case.link.is_some() {
        return link(judge);
    }
    let usual = case.memory_mib == 1024 && case.used_mib == 256 && case.mix == "real";
    let changed = case.changed_mib;
    if usual && changed == 32 {
        judge.against_peer("first pause to durable", "first_pause", "", 1.0 / 3.0);
        judge.against_peer("repeat pause to durable", "repeat_pause", "", 2.0 / 3.0);
        judge.against_peer("guest stop for a named snapshot", "guest_stop", "", 0.5);
        judge.floor("guest stop", floors::copy(judge.all, judge.result));
        // The pulse of the reference measurement does less in a pass.
        let more = judge.result.ours("undisturbed_pass").map_or(0.0, |ms| (ms - REFERENCE_PASS).max(0.0));
        judge.add(
            "first pass after a snapshot",
            "first_pass_after_snapshot",
            "ms",
            Some(0.8 + more),
            format!(
                "2 × Cloud Hypervisor's 0.40 ms of the reference measurement + {} by which this pulse's undisturbed pass is longer",
                figure(more, "ms")
            ),
        );
        judge.floor("first pass after a snapshot", floors::pass(judge.result));
        if let Some((ms, who)) = judge.better("resume_warm") {
            let half = format!("0.50 × {who}");
            judge.add("hot wake to first output", "resume_hot", "ms", Some(ms / 2.0), half);
            judge.floor("hot wake", floors::wake(judge.result, "resume_hot"));
            judge.add("warm wake to first output", "resume_warm", "ms", Some(ms), who);
            judge.floor("warm wake", floors::wake(judge.result, "resume_warm"));
        }
        judge.add("first pass after a hot wake", "first_pass_after_resume", "ms", Some(5.0), "5 ms".to_owned());
        judge.floor("first pass after a hot wake", floors::pass(judge.result));
    } else if usual && changed == 128 {
        judge.against_peer("guest stop for a named snapshot", "guest_stop", ".128", 0.5);
        judge.floor("guest stop", floors::copy(judge.all, judge.result));
    }
    judge.against_bare("first pause to durable", "first_pause", "bare_upload.first", 0.0, "");
    judge.floor("first pause", floors::pause(judge.all, judge.result, ".first"));
    let small = judge.result.ours("bare_small_put").unwrap_or(0.0);
    let each = figure(small, "ms");
    let two = format!(" + 2 small PUTs of {each}");
    judge.against_bare("repeat pause to durable", "repeat_pause", "bare_upload", 2.0 * small, &two);
    judge.floor("repeat pause", floors::pause(judge.all, judge.result, ""));
    judge.add(
        "repeat pause after run-ahead",
        "repeat_pause.after_run_ahead",
        "ms",
        Some(15.0 + 3.0 * small),
        format!("15 ms + 3 small PUTs of {each}"),
    );
    let changed = judge.result.ours("bytes_changed");
    judge.add("bytes sent by a repeat pause", "bytes_sent", "bytes", changed, "the bytes that changed".to_owned());
    judge.add(
        "cold wake to first output",
        "resume_cold",
        "ms",
        Some(20.0 + 3.0 * small),
        format!("20 ms + 3 requests of {each}"),
    );
    judge.floor("cold wake to first", floors::wake(judge.result, "resume_cold"));
    judge.against_bare("cold wake to hot set resident", "resume_cold.hot_set", "bare_download", 0.0, "");
    judge.floor("cold wake to hot set", floors::fill(judge.all, judge.result));
    for (kind, metric) in [("zero", "scan.zero_gib"), ("unchanged", "scan.unchanged_gib")] {
        let goal = format!("CPU time of the scan for a GiB of {kind} pages");
        judge.add(&goal, metric, "ms", Some(200.0), "5 GiB/s of a core".to_owned());
    }
    judge.add("VMM memory beyond guest memory", "overhead", "KiB", Some(6144.0), "6 MiB".to_owned());
    judge.floor("VMM memory", floors::program(judge.result));
}

fn link(judge: &mut Judge<'_>) {
    let Some(shape) = judge.result.case.link else { return };
    let trip = shape.round_trip.as_secs_f64() * 1000.0;
    if let (Some(rate), Some(sent)) = (shape.bits_per_second, judge.result.ours("bytes_sent.first")) {
        let wire = sent * 8.0 / rate as f64 * 1000.0;
        judge.add(
            "first pause over the link",
            "first_pause",
            "ms",
            Some(1.3 * wire + 2.0 * trip),
            format!("1.3 × {} on the wire + 2 round trips", figure(wire, "ms")),
        );
        let because =
            format!("{} on the wire, and three requests one after the other: pack, manifest, head", figure(wire, "ms"));
        judge.floor("first pause", Some(Floor { least: 3.0f64.mul_add(trip, wire), because }));
    }
    judge.add(
        "cold wake over the link to first output",
        "resume_cold",
        "ms",
        Some(3.0 * trip + 20.0),
        "3 round trips + 20 ms".to_owned(),
    );
    judge.floor("cold wake", floors::wake(judge.result, "resume_cold"));
}

fn many(judge: &mut Judge<'_>) {
    let wire = judge
        .result
        .case
        .link
        .and_then(|link| link.bits_per_second)
        .and_then(|rate| judge.result.ours("bytes_sent.all").map(|sent| sent * 8.0 / rate as f64 * 1000.0));
    // Without a link it is the CPUs: what one sandbox alone gets through them is the bottleneck's rate.
    let (limit, because) = match (wire, judge.result.ours("first_pause.all_at_the_rate_of_one")) {
        (Some(wire), _) => (Some(1.3 * wire), format!("1.3 × {} on the wire", figure(wire, "ms"))),
        (None, rate) => (rate.map(|ms| 1.3 * ms), "1.3 × all bytes at the rate of one sandbox alone".to_owned()),
    };
    judge.add("all sandboxes durable", "first_pause.all", "ms", limit, because);
    if wire.is_none() {
        judge.floor("all sandboxes", floors::pause(judge.all, judge.result, ".all"));
    }
    let limit = Some(2.0);
    judge.add("slowest to median", "first_pause.slowest_to_median", "ratio", limit, "2 × the median".to_owned());
}

/// What must not grow with memory: for each changed set the largest memory is held against the smallest.
fn flat(results: &[Result]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let plain = |result: &&Result| {
        matches!(result.part, Part::Changed | Part::Memory) && result.case.link.is_none() && result.case.sandboxes == 1
    };
    let mut groups: Vec<u32> = results.iter().filter(plain).map(|result| result.case.changed_mib).collect();
    groups.sort_unstable();
    groups.dedup();
    for changed in groups {
        let mut group: Vec<_> = results.iter().filter(plain).filter(|r| r.case.changed_mib == changed).collect();
        group.sort_by_key(|result| result.case.memory_mib);
        let (Some(small), Some(large)) = (group.first(), group.last()) else { continue };
        for (metric, slack) in [("repeat_pause", 10.0), ("guest_stop", 5.0), ("resume_cold", 10.0)] {
            if let (Some(base), Some(measured)) = (small.ours(metric), large.ours(metric))
                && small.case.memory_mib != large.case.memory_mib
            {
                verdicts.push(Verdict {
                    goal: format!(
                        "{metric} at {} MiB of memory as at {} MiB [{changed} MiB changing]",
                        large.case.memory_mib, small.case.memory_mib
                    ),
                    limit: 1.25 * base + slack,
                    because: format!(
                        "flat: 1.25 × {} + {slack} ms of noise; this is {:.2} × with {} × the memory",
                        figure(base, "ms"),
                        measured / base,
                        large.case.memory_mib / small.case.memory_mib.max(1)
                    ),
                    measured,
                    unit: "ms",
                    floor: None,
                    spent: floors::spent(large, metric),
                    peers: Vec::new(),
                });
            }
        }
    }
    verdicts
}

/// The verdicts as lines.
pub fn lines(verdicts: &[Verdict]) -> String {
    let mut out = String::new();
    for verdict in verdicts {
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "  {}  {}: {} (goal: at most {}, {}{}{}{})",
            if verdict.met() { "met   " } else { "MISSED" },
            verdict.goal,
            figure(verdict.measured, verdict.unit),
            figure(verdict.limit, verdict.unit),
            verdict.because,
            verdict.said_if_missed(),
            if verdict.peers.is_empty() { "" } else { "; in this run " },
            verdict.beside()
        );
    }
    out
}

#[cfg(test)]
#[expect(clippy::float_cmp, reason = "computed in the same way on both sides")]
mod tests {
    use super::super::samples::Samples;
    use super::*;

    fn result(part: Part, case: Case, figures: &[(&str, f64)]) -> Result {
        let mut samples = Samples::default();
        for (metric, value) in figures {
            samples.add(*metric, "ms", *value);
        }
        Result { part, rows: samples.rows("stasis", &case), case, elsewhere: None }
    }

    #[test]
    fn goals_are_ratios_and_missing_figures_are_no_verdicts() {
        let found =
            judge(&[result(Part::Goals, Case::standard(), &[("first_pause", 600.0), ("bare_upload.first", 400.0)])]);
        let limits: Vec<_> = found.iter().map(|v| (v.limit.round(), v.met())).collect();
        assert_eq!(limits, [(633.0, true), (520.0, false)], "{found:?}");
    }

    #[test]
    fn what_cannot_be_had_is_said_of_a_missed_pause() {
        let figures = [
            ("first_pause", 600.0),
            ("bare_upload.first", 100.0),
            ("bare_upload.first.cpu", 150.0),
            ("bytes_changed.first", 268_435_456.0),
            ("capture_cpu.gib", 1000.0),
        ];
        let found = judge(&[result(Part::Goals, Case::standard(), &figures)]);
        let said: Vec<_> = found.iter().map(Verdict::said_if_missed).collect();
        assert_eq!(said[0], "", "{found:?}");
        assert!(said[1].contains("250 ms of processor time") && said[1].contains("bare 150 ms"), "{said:?}");
    }

    #[test]
    fn a_peer_that_ran_replaces_the_reference() {
        let mut ran = result(Part::Goals, Case::standard(), &[("repeat_pause", 50.0), ("resume_hot", 5.0)]);
        let mut theirs = Samples::default();
        theirs.add("repeat_pause", "ms", 60.0);
        theirs.add("resume_warm", "ms", 9.0);
        ran.rows.extend(theirs.rows("firecracker", &ran.case));
        let found = judge(&[ran]);
        assert_eq!((found[0].limit, found[0].met()), (40.0, false));
        assert!(found[0].because.contains("in this run"));
        // Beside a wake from kept memory stands the peer's from its file.
        let beside: Vec<_> = found.iter().map(Verdict::beside).collect();
        assert_eq!(beside, ["Firecracker 60.0 ms", "Firecracker 9.00 ms"]);
        // And the better of it and the reference is the one to beat.
        assert_eq!(found[1].limit, 4.5);
    }

    #[test]
    fn a_link_bounds_by_bytes_and_round_trips() {
        let case = Case { link: Some(super::super::matrix::link()), ..Case::standard() };
        let found = judge(&[result(
            Part::Link,
            case,
            &[("first_pause", 1100.0), ("bytes_sent.first", 1e8), ("resume_cold", 110.1)],
        )]);
        assert_eq!(found[0].limit, 1.3 * 800.0 + 60.0);
        assert_eq!((found[1].limit, found[1].met()), (110.0, false));
    }

    #[test]
    fn growth_with_memory_is_a_miss() {
        let at =
            |memory_mib, ms| result(Part::Changed, Case { memory_mib, ..Case::standard() }, &[("repeat_pause", ms)]);
        assert!(judge(&[at(1024, 60.0), at(6144, 80.0)])[0].met());
        assert!(!judge(&[at(6144, 200.0), at(1024, 60.0)])[0].met());
        assert!(judge(&[at(1024, 60.0)]).is_empty());
    }
}
