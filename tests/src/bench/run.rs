//! One run of the benchmark: case after case, then tables, goals and files.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use futures::FutureExt as _;

use super::case::{Case, Guest, Peer};
use super::goals::{self, Result as Shown};
use super::matrix::Part;
use super::options::Arguments;
use super::record::{Measured, Record};
use super::samples::{Row, Samples, table};
use super::stasis::Sampled;
use super::{debian, many, markdown, network, peer, plot, process, profile, stasis};
use crate::vmm::{Error, no_pulse};

/// A case that takes longer hangs.
const CASE: Duration = Duration::from_mins(5);

/// Measures what the arguments ask for and reports it on standard output and into the files they name. A case that fails fails the run, after
/// the others were measured and reported. `network`: whether there is one to measure in, where one is wanted.
pub async fn run(arguments: &Arguments, command: &str, network: Result<(), String>) -> Result<(), Error> {
    if !arguments.report_of.is_empty() {
        let records = arguments.report_of.iter().map(|path| Record::read(path)).collect::<Result<Vec<_>, _>>()?;
        return report(arguments, &records);
    }
    let begun = Instant::now();
    let cases = arguments.cases(|name| std::env::var(name).ok())?;
    let (mut results, mut notes, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for (n, (part, case)) in cases.iter().enumerate() {
        println!("[{}/{}, {} s] {}", n + 1, cases.len(), begun.elapsed().as_secs(), case.describe());
        let lacking = match case.guest {
            // What needs no guest is measured without one.
            _ if *part == Part::Network => network::lacking(),
            Guest::Pulse => no_pulse(),
            Guest::Debian => debian::lacking(),
        };
        if let Some(why) = lacking {
            println!("  left out: {why}");
            notes.push(format!("{}: {why}", case.describe()));
            continue;
        }
        let (rows, errors) = match &network {
            Err(error) if *part == Part::Network => (Vec::new(), vec![format!("{}: {error}", case.describe())]),
            _ => measure(*part, case, &mut notes).await,
        };
        print!("{}", table(&rows));
        for line in markdown::ratio_lines(&rows) {
            println!("  {line}");
        }
        for error in &errors {
            println!("  FAILED: {error}");
        }
        failed.extend(errors);
        results.push(Shown { part: *part, case: case.clone(), rows, elsewhere: None });
    }
    let kept = arguments.markdown.is_some() || arguments.record.is_some();
    let profiles = match cases.iter().find(|(part, case)| *part == Part::Goals && case.guest == Guest::Pulse) {
        Some((_, case)) if kept => {
            let mut profiles = Vec::new();
            if let Err(error) = bounded(profile::measure(case, &mut profiles)).await {
                notes.push(format!("where the time goes: {error}"));
            }
            profiles
        }
        _ => Vec::new(),
    };
    notes.extend(failed.iter().map(|error| format!("failed: {error}")));
    let record = Record {
        command: command.to_owned(),
        date: markdown::date(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs()),
        seconds: begun.elapsed().as_secs(),
        machine: process::machine(),
        build: build(),
        peers: arguments.peers()?.iter().map(Peer::version).collect(),
        results: results.iter().map(Measured::from).collect(),
        profiles,
        notes,
    };
    if let Some(path) = &arguments.record {
        record.write(path)?;
    }
    report(arguments, &[record])?;
    if failed.is_empty() { Ok(()) } else { Err(format!("{} failed: {}", failed.len(), failed.join("; ")).into()) }
}

/// Rows of a case, and what failed of it. A failure, a hang and a panic end their own part alone, and leave what was sampled before.
async fn measure(part: Part, case: &Case, notes: &mut Vec<String>) -> (Vec<Row>, Vec<String>) {
    let (mut rows, mut errors) = (Vec::new(), Vec::new());
    let mut shown = Sampled::default();
    let ours = async {
        let samples = &mut shown.ours;
        match case.guest {
            _ if part == Part::Network => network::measure(case, samples, notes).await,
            Guest::Debian => debian::measure(case, samples).await,
            Guest::Pulse if case.sandboxes > 1 => many::measure(case, samples).await,
            Guest::Pulse => stasis::measure(case, &mut shown, notes).await,
        }
    };
    let mut failed = |who: &str, error: Error| errors.push(format!("{who}, {}: {error}", case.describe()));
    if let Err(error) = bounded(ours).await {
        failed("stasis", error);
    }
    rows.extend(shown.ours.rows("stasis", case));
    if let Some(unsealed) = shown.unsealed {
        rows.extend(unsealed.rows("stasis without seals", case));
    }
    for peer in &case.peers {
        let mut samples = Samples::default();
        let measured = async {
            match part {
                Part::Network => peer::measure_network(peer, case, &mut samples, notes).await,
                _ => peer::measure(peer, case, &mut samples).await,
            }
        };
        if let Err(error) = bounded(measured).await {
            failed(peer.word(), error);
        }
        rows.extend(samples.rows(peer.word(), case));
    }
    (rows, errors)
}

/// What comes of a measurement; it hangs when it takes longer than [`CASE`].
async fn bounded(measurement: impl Future<Output = Result<(), Error>>) -> Result<(), Error> {
    // What a panic leaves behind is samples, each of which is whole.
    match tokio::time::timeout(CASE, AssertUnwindSafe(measurement).catch_unwind()).await {
        Ok(Ok(done)) => done,
        Ok(Err(panic)) => {
            let said = panic.downcast_ref::<String>().map(String::as_str);
            Err(format!("it panicked: {}", said.or(panic.downcast_ref::<&str>().copied()).unwrap_or("?")).into())
        }
        Err(_) => Err(format!("it takes longer than {} s", CASE.as_secs()).into()),
    }
}

fn report(arguments: &Arguments, records: &[Record]) -> Result<(), Error> {
    let machine = records.first().map(|record| record.machine.clone()).unwrap_or_default();
    let results: Vec<Shown> = records.iter().flat_map(|record| record.shown(&machine)).collect();
    let rows: Vec<Row> = results.iter().flat_map(|result| result.rows.clone()).collect();
    let verdicts = goals::judge(&results);
    if !verdicts.is_empty() {
        println!("goals (design §9; p50):\n{}", goals::lines(&verdicts));
    }
    let mut notes: Vec<String> = records.iter().flat_map(|record| record.notes.clone()).collect();
    notes.dedup();
    for note in &notes {
        println!("left out: {note}");
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")?;
    }
    let mut plots = Vec::new();
    if let Some(dir) = &arguments.svg {
        plots = plot::write(&rows, dir)?.into_iter().map(|name| dir.join(name).display().to_string()).collect();
    }
    if let Some(path) = &arguments.markdown {
        let all = |of: fn(&Record) -> &String| {
            let mut all: Vec<_> = records.iter().map(|record| of(record).as_str()).collect();
            all.dedup();
            all.join("; ")
        };
        let about = markdown::About {
            machine,
            build: all(|record| &record.build),
            peers: {
                let mut all: Vec<_> = records.iter().flat_map(|record| record.peers.clone()).collect();
                all.sort();
                all.dedup();
                all.join(", ")
            },
            commands: records.iter().map(|r| (r.command.clone(), r.date.clone(), r.seconds)).collect(),
            plots,
            profiles: records.iter().flat_map(|record| record.profiles.clone()).collect(),
            notes,
        };
        std::fs::write(path, markdown::report(&results, &verdicts, &about))?;
    }
    println!("{} rows in {} s", rows.len(), records.iter().map(|record| record.seconds).sum::<u64>());
    Ok(())
}

/// Version and Cargo profile of the programs that are measured, which lie beside this one.
fn build() -> String {
    let folder = crate::host::profile().unwrap_or_default();
    format!("{}, profile {}", env!("CARGO_PKG_VERSION"), folder.file_name().unwrap_or_default().to_string_lossy())
}
