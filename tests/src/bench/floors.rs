//! What a figure cannot fall below on the machine that was measured, and where its time went: said of goals that are missed, from figures of the
//! same run.

use super::goals::Result;
use super::samples::figure;

/// Phases named of a figure at most.
const NAMED: usize = 5;
/// What stands behind a metric's dot and is no phase of it.
const NO_PHASE: &[&str] = &["cpu", "answered", "hot_set", "all", "alone", "first", "seen", "worst", "after_run_ahead"];

/// The least that can be.
#[derive(Clone, Debug, PartialEq)]
pub struct Floor {
    /// The figure, in its goal's unit.
    pub least: f64,
    /// How it comes about.
    pub because: String,
}

fn processors() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

fn gib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 30)
}

/// A figure of this result, or of whichever has it: what a GiB of content costs is measured once in a run.
fn anywhere(all: &[Result], result: &Result, metric: &str) -> Option<f64> {
    result.ours(metric).or_else(|| all.iter().find_map(|other| other.ours(metric)))
}

/// The metric, of sealed content where the case's is.
fn of_kind(result: &Result, metric: &str) -> String {
    format!("{metric}{}", if result.case.encrypt { ".sealed" } else { "" })
}

/// Of a pause: all processors busy with nothing but what must be done. `detail`: of which pause.
pub fn pause(all: &[Result], result: &Result, detail: &str) -> Option<Floor> {
    let per_gib = anywhere(all, result, &of_kind(result, "capture_cpu.gib"))?;
    let content = per_gib * gib(result.ours(&format!("bytes_changed{detail}"))?);
    let moving = result.ours(&format!("bare_upload{detail}.cpu"))?;
    let processors = processors();
    Some(Floor {
        least: (content + moving) / processors,
        because: format!(
            "scan, compression and digests take {} of processor time, moving the packs bare {}, on {processors} processors that store and VMM share",
            figure(content, "ms"),
            figure(moving, "ms"),
        ),
    })
}

/// Of a cold wake until the first pass over the hot set is done: all processors busy with nothing but what its pages need, or, if that is longer, the
/// guest's own time, had it found every page in place.
pub fn fill(all: &[Result], result: &Result) -> Option<Floor> {
    let content = anywhere(all, result, &of_kind(result, "fill_cpu.gib"))? * gib(result.ours("bytes_changed")?);
    let moving = result.ours("bare_download.cpu")?;
    let (waking, pass) = (result.ours("resume_cold")?, result.ours("undisturbed_pass").unwrap_or(0.0));
    let late = result.ours("first_pass_after_resume.cold")?;
    let quiet = (result.ours("resume_cold.hot_set")? - waking - late).max(0.0);
    let processors = processors();
    let (busy, idle) = ((content + moving) / processors, waking + quiet + pass);
    Some(Floor {
        least: busy.max(idle),
        because: format!(
            "checking, decoding and placing the pages in fresh memory take {} of processor time, moving the packs bare {}, on {processors} processors \
             that store, VMM and guest share; its first output comes after {}, it does other things for {} before that pass, and the pass takes {} \
             undisturbed",
            figure(content, "ms"),
            figure(moving, "ms"),
            figure(waking, "ms"),
            figure(quiet, "ms"),
            figure(pass, "ms"),
        ),
    })
}

/// Of the stop for a named snapshot: what changed is copied once.
pub fn copy(all: &[Result], result: &Result) -> Option<Floor> {
    let least = anywhere(all, result, "copy.gib")? * gib(result.ours("bytes_changed")?);
    Some(Floor { least, because: "what changed is copied by one thread, whose time this is".to_owned() })
}

/// Of a pass: an undisturbed one.
pub fn pass(result: &Result) -> Option<Floor> {
    let least = result.ours("undisturbed_pass")?;
    Some(Floor { least, because: "an undisturbed pass takes as long".to_owned() })
}

/// Of a wake: all that supervisor and VMM do meanwhile, the guest's first steps among it, shared by all processors, and a request to the store.
pub fn wake(result: &Result, metric: &str) -> Option<Floor> {
    let cpu = result.ours(&format!("{metric}.cpu"))?;
    let request = result.ours("bare_small_put")?;
    let processors = processors();
    Some(Floor {
        least: cpu / processors + request,
        because: format!(
            "supervisor, VMM and guest take {} of processor time until the answer, on {processors} processors, and the claim is one request of {}",
            figure(cpu, "ms"),
            figure(request, "ms")
        ),
    })
}

/// Of the memory of a VMM: its program's pages that are in use.
pub fn program(result: &Result) -> Option<Floor> {
    let (program, private) = (result.ours("overhead.program")?, result.ours("overhead.private")?);
    Some(Floor {
        least: program,
        because: format!(
            "so much of the program's file is in use, which the kernel has once for all VMMs; {} are this process's alone, up to 1 MiB of them, \
             after a wake from the store, buffers of connections that are closed when they were idle for 90 s",
            figure(private, "KiB")
        ),
    })
}

/// The longest phases of a figure, where they were measured.
pub fn spent(result: &Result, metric: &str) -> Option<String> {
    let mut phases: Vec<_> = result
        .rows
        .iter()
        .filter(|row| row.vmm == "stasis" && row.unit == "ms")
        .filter_map(|row| Some((row.metric.strip_prefix(metric)?.strip_prefix('.')?, row.p50)))
        .filter(|(phase, _)| !phase.contains('.') && !NO_PHASE.contains(phase))
        .collect();
    phases.sort_by(|a, b| b.1.total_cmp(&a.1));
    let named: Vec<_> =
        phases.iter().take(NAMED).map(|(phase, took)| format!("{phase} {}", figure(*took, "ms"))).collect();
    (!named.is_empty()).then(|| named.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::case::Case;
    use super::super::matrix::Part;
    use super::super::samples::Samples;
    use super::*;

    fn result(figures: &[(&str, f64)]) -> Result {
        let (mut samples, case) = (Samples::default(), Case::standard());
        for (metric, value) in figures {
            samples.add(*metric, "ms", *value);
        }
        Result { part: Part::Goals, rows: samples.rows("stasis", &case), case, elsewhere: None }
    }

    #[test]
    fn the_longest_phases_are_named_and_nothing_else() {
        let shown = result(&[("a", 9.0), ("a.cpu", 8.0), ("a.x", 1.0), ("a.y", 3.0), ("a.y.z", 7.0), ("ab.w", 7.0)]);
        assert_eq!(spent(&shown, "a").as_deref(), Some("y 3.00 ms, x 1.00 ms"));
        assert_eq!(spent(&shown, "c"), None);
    }

    #[test]
    fn what_a_gib_costs_may_be_another_cases_figure() {
        let other = result(&[("capture_cpu.gib", 1000.0)]);
        let shown = result(&[("bytes_changed", 268_435_456.0), ("bare_upload.cpu", 150.0)]);
        let floor = pause(&[other], &shown, "").unwrap();
        assert!((floor.least * processors() - 400.0).abs() < 1e-6, "{floor:?}");
        assert_eq!(pause(&[], &shown, ""), None);
    }
}
