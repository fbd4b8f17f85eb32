//! The report: BENCHMARKS.md, written whole by the program that measured.

use std::fmt::Write as _;

use super::goals::{Result, Verdict};
use super::profile::Profile;
use super::samples::{Row, figure};

/// What a report says besides its figures.
pub struct About {
    /// Where it was measured.
    pub machine: String,
    /// Version and Cargo profile of what was measured.
    pub build: String,
    /// Peers and their versions.
    pub peers: String,
    /// The commands that made it: each with when it ended (UTC) and how long it took, s.
    pub commands: Vec<(String, String, u64)>,
    /// Names of plots and the folder they are in, as the report links to them.
    pub plots: Vec<String>,
    /// Where the time goes.
    pub profiles: Vec<Profile>,
    /// What was left out, and why.
    pub notes: Vec<String>,
}

/// `2026-11-23 18:05 UTC` of seconds since 1970.
pub fn date(unix: u64) -> String {
    // Days to a civil date, as in Howard Hinnant's "chrono-Compatible Low-Level Date Algorithms": years begin in March.
    let (days, second) = (unix / 86400 + 719_468, unix % 86400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", second / 3600, second / 60 % 60)
}

/// Writing to a String cannot fail, so results are dropped.
pub fn report(results: &[Result], verdicts: &[Verdict], about: &About) -> String {
    let mut out = String::from("# Benchmarks\n\nMade by the benchmark itself; nothing here is typed by hand. ");
    let _ = writeln!(out, "`make bench` repeats it, `make bench ARGS=--help` shows what can be chosen.\n");
    let _ = writeln!(out, "- Machine: {}", about.machine);
    for (command, date, seconds) in &about.commands {
        let _ = writeln!(out, "- Command: `{command}`, {date}, {seconds} s");
    }
    let _ = writeln!(out, "- Version: {}", about.build);
    if !about.peers.is_empty() {
        let _ = writeln!(out, "- Peers: {}", about.peers);
    }
    out += HOW;
    if !verdicts.is_empty() {
        out += "\n## Goals\n\n| | goal | measured (p50) | at most | which is | peers in this run |\n| --- | --- | ---: | ---: | --- | --- |\n";
        for verdict in verdicts {
            let word = if verdict.met() { "met" } else { "**missed**" };
            let shown = |value| figure(value, verdict.unit);
            let (measured, limit) = (shown(verdict.measured), shown(verdict.limit));
            let (because, floor) = (&verdict.because, verdict.said_if_missed());
            let beside = verdict.beside();
            let _ = writeln!(out, "| {word} | {} | {measured} | {limit} | {because}{floor} | {beside} |", verdict.goal);
        }
    }
    profiled(&mut out, &about.profiles);
    for plot in &about.plots {
        let _ = writeln!(out, "\n![{plot}]({plot})");
    }
    for result in results {
        let _ = writeln!(out, "\n## {}\n", result.case.describe());
        if let Some(machine) = &result.elsewhere {
            let _ = writeln!(out, "On another machine: {machine}.\n");
        }
        table(&mut out, &result.rows);
        ratios(&mut out, &result.rows);
    }
    if !about.notes.is_empty() {
        out += "\n## Left out\n\n";
        for note in &about.notes {
            let _ = writeln!(out, "- {note}");
        }
    }
    out
}

/// Shares under this are summed up, per cent.
const SMALL: f64 = 1.0;

fn profiled(out: &mut String, profiles: &[Profile]) {
    if profiles.is_empty() {
        return;
    }
    *out += PROFILES;
    for profile in profiles {
        let _ = writeln!(
            out,
            "\nIn {} of {:.0} ms:\n\n| | of the processors' time |\n| --- | ---: |",
            profile.what, profile.took_ms
        );
        let (large, small): (Vec<_>, Vec<_>) = profile.shares.iter().partition(|(_, share)| *share >= SMALL);
        for (name, share) in large {
            let _ = writeln!(out, "| {name} | {share:.1} % |");
        }
        let _ = writeln!(
            out,
            "| what is below {SMALL:.0} % each | {:.1} % |",
            small.iter().map(|(_, share)| share).sum::<f64>()
        );
    }
}

const PROFILES: &str = "\n## Where the time goes\n\nBoth processors sampled by `perf` while one pause or wake of the first case runs (which slows it). \
The S3 server, the supervisor, the VMM and, in a wake, the guest share them.\n";

const HOW: &str = "\nTimes are taken from outside. A pause is from the request to its 201, a wake (`resume_…`) from the request to the first byte \
that the guest prints, its `hot_set` to the end of the first pass over the hot set, `resident` to the last absent page. A pass is what pulse \
does without a break: rewriting its hot set. `bare_upload` and `bare_download` move objects of the same number and size as the repeat \
pause stored, by as many connections, and do nothing else. `cpu` is that of supervisor and VMM during a repeat pause; `bare_upload.cpu` \
that of a bare upload with the embedded server's part, `capture_cpu.gib` that of a capture of a GiB of pulse's content beside sending it, `fill_cpu.gib` \
that of checking, decoding and placing it again. `overhead` counts what the reference measurement counts of its peers: every resident page outside \
guest memory, those of the program's file included (`overhead.program`), which the kernel has once for all VMMs. Details of a \
metric stand behind a dot: `.first` is of first pauses, phases are those of `Server-Timing`. A console is looked at every 0.1 ms.\n\n\
`network_setup` is from the claim of a network to its tap being up, `.ready` of one that was made ahead; `network_throughput` is what a Debian \
guest's one TCP connection moves to and from a server on the other side of its host. Firecracker's network is a namespace with a tap, made by \
one run of `ip`, and the request that puts its device there; the same guest's server is in that namespace, which is a shorter way than ours.\n\n\
Peers are driven as their pipeline with an object store is today: a snapshot to a local file, then zstd-1 parts of 8 MiB uploaded in \
parallel; downloaded and unpacked to a file, then loaded. Their processes are started before the clock runs, and their guests stand still \
during transfers. QEMU has no diff.\n";

fn table(out: &mut String, rows: &[Row]) {
    *out += "| vmm | metric | p50 | p90 | p99 | n |\n| --- | --- | ---: | ---: | ---: | ---: |\n";
    for row in rows {
        let shown = |value| figure(value, &row.unit);
        let (p50, p90, p99) = (shown(row.p50), shown(row.p90), shown(row.p99));
        let _ = writeln!(out, "| {} | {} | {p50} | {p90} | {p99} | {} |", row.vmm, row.metric, row.n);
    }
}

/// Ours against peers, and against the bare transfer of the same bytes.
pub fn ratio_lines(rows: &[Row]) -> Vec<String> {
    let ours = |metric: &str| rows.iter().find(|r| r.vmm == "stasis" && r.metric == metric).map(|r| r.p50);
    let mut lines = Vec::new();
    for (metric, bare) in [
        ("first_pause", "bare_upload.first"),
        ("repeat_pause", "bare_upload"),
        ("first_pause.all", "bare_upload.all"),
        ("resume_cold.hot_set", "bare_download"),
    ] {
        if let (Some(metric_ms), Some(bare_ms)) = (ours(metric), ours(bare)) {
            lines.push(format!("{metric} is {:.2} × {bare}", metric_ms / bare_ms));
        }
    }
    for row in rows.iter().filter(|row| row.vmm != "stasis" && row.unit != "count") {
        if let Some(ms) = ours(&row.metric) {
            lines.push(format!("{} is {:.3} × that of {}", row.metric, ms / row.p50, row.vmm));
        }
    }
    lines
}

fn ratios(out: &mut String, rows: &[Row]) {
    let lines = ratio_lines(rows);
    if !lines.is_empty() {
        *out += "\nRatios of medians:\n\n";
        for line in lines {
            let _ = writeln!(out, "- {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_civil() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_782_400), "2000-02-29 00:00 UTC");
        assert_eq!(date(1_795_460_700), "2026-11-23 19:05 UTC");
    }
}
