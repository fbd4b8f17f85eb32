//! One run of the benchmark: case after case, then tables, goals and files.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::case::{Case, Guest};
use super::goals::{self, Result as Shown};
use super::matrix::Part;
use super::options::Arguments;
use super::profile::Profile;
use super::samples::{Row, table};
use super::{debian, many, markdown, peer, plot, profile, stasis};
use crate::vmm::{Error, no_pulse};

/// A case that takes longer hangs.
const CASE: Duration = Duration::from_mins(10);

/// Measures what the arguments ask for and reports it on standard output and into the files they name. A case that fails fails the run, after
/// the others were measured and reported.
pub async fn run(arguments: &Arguments, command: &str) -> Result<(), Error> {
    let begun = Instant::now();
    let cases = arguments.cases(|name| std::env::var(name).ok())?;
    let (mut results, mut notes, mut failed) = (Vec::new(), Vec::new(), Vec::new());
    for (n, (part, case)) in cases.iter().enumerate() {
        println!("[{}/{}, {} s] {}", n + 1, cases.len(), begun.elapsed().as_secs(), case.describe());
        let lacking = match case.guest {
            Guest::Pulse => no_pulse(),
            Guest::Debian => debian::lacking(),
        };
        if let Some(why) = lacking {
            println!("  left out: {why}");
            notes.push(format!("{}: {why}", case.describe()));
            continue;
        }
        let (rows, errors) = measure(case, &mut notes).await;
        print!("{}", table(&rows));
        for line in markdown::ratio_lines(&rows) {
            println!("  {line}");
        }
        for error in &errors {
            println!("  FAILED: {error}");
        }
        failed.extend(errors);
        results.push(Shown { part: *part, case: case.clone(), rows });
    }
    let profiles = match cases.iter().find(|(part, case)| *part == Part::Goals && case.guest == Guest::Pulse) {
        Some((_, case)) if arguments.markdown.is_some() => profile::measure(case).await.unwrap_or_else(|error| {
            notes.push(format!("where the time goes: {error}"));
            Vec::new()
        }),
        _ => Vec::new(),
    };
    report(arguments, command, begun, &results, profiles, notes, &failed)?;
    if failed.is_empty() { Ok(()) } else { Err(format!("{} failed: {}", failed.len(), failed.join("; ")).into()) }
}

async fn measure(case: &Case, notes: &mut Vec<String>) -> (Vec<Row>, Vec<String>) {
    let (mut rows, mut errors) = (Vec::new(), Vec::new());
    let ours = async {
        match case.guest {
            Guest::Debian => debian::measure(case).await,
            Guest::Pulse if case.sandboxes > 1 => many::measure(case).await,
            Guest::Pulse => stasis::measure(case, notes).await,
        }
    };
    let mut take = |who: &str, done| match done {
        Ok(Ok(samples)) => rows.extend(super::samples::Samples::rows(&samples, who, case)),
        Ok(Err(error)) => errors.push(format!("{who}, {}: {error}", case.describe())),
        Err(_) => errors.push(format!("{who}, {}: it takes longer than {} s", case.describe(), CASE.as_secs())),
    };
    take("stasis", tokio::time::timeout(CASE, ours).await);
    for peer in &case.peers {
        take(peer.word(), tokio::time::timeout(CASE, peer::measure(peer, case)).await);
    }
    (rows, errors)
}

fn report(
    arguments: &Arguments,
    command: &str,
    begun: Instant,
    results: &[Shown],
    profiles: Vec<Profile>,
    mut notes: Vec<String>,
    failed: &[String],
) -> Result<(), Error> {
    let rows: Vec<Row> = results.iter().flat_map(|result| result.rows.clone()).collect();
    let verdicts = goals::judge(results);
    if !verdicts.is_empty() {
        println!("goals (design §9; p50):\n{}", goals::lines(&verdicts));
    }
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
        notes.extend(failed.iter().map(|error| format!("failed: {error}")));
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let seconds = begun.elapsed().as_secs();
        let about =
            markdown::About { command: command.to_owned(), date: markdown::date(now), seconds, plots, profiles, notes };
        std::fs::write(path, markdown::report(results, &verdicts, &about))?;
    }
    println!("{} rows in {} s", rows.len(), begun.elapsed().as_secs());
    Ok(())
}
