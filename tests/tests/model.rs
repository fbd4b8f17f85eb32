//! Random requests, timers, crashes and store faults, checked against a plain model: `stasis_tests::model`.
//!
//! `STASIS_MODEL_SECONDS=600` runs for longer; `STASIS_MODEL_SEED=<n>` runs the one sequence that a failure named.

use std::time::{Duration, Instant};

use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use stasis_tests::model::run::Run;
use stasis_tests::model::steps::{Step, sequence};
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, no_pulse};
use tokio::runtime::Handle;

/// How long each of the tests draws new sequences.
const SECONDS: u64 = 35;
/// Runs that a failing sequence is made smaller with.
const SHRINKS: usize = 16;

fn main() {
    Suite::default()
        .test("sandboxes_do_what_the_model_says", no_pulse(), || model(false))
        .test("requests_at_once_do_what_the_model_says", no_pulse(), || model(true))
        .main();
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// A sequence that can still be made smaller belongs to one thread, which waits for each run.
async fn model(together: bool) -> Outcome {
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || search(&runtime, together)).await?
}

fn search(runtime: &Handle, together: bool) -> Outcome {
    let attempt =
        |steps: &[Step]| -> Result<(), Error> { runtime.block_on(async { Run::start().await?.run(steps).await }) };
    let end = Instant::now() + Duration::from_secs(number("STASIS_MODEL_SECONDS").unwrap_or(SECONDS));
    let replayed = number("STASIS_MODEL_SEED");
    let mut seed = replayed.unwrap_or_else(rand::random);
    let mut sequences = 0;
    loop {
        let mut octets = [0; 32];
        octets[..8].copy_from_slice(&seed.to_le_bytes());
        let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &octets);
        let mut runner = TestRunner::new_with_rng(Config::default(), rng);
        let mut tree = sequence(together).new_tree(&mut runner).map_err(|e| e.to_string())?;
        if let Err(error) = attempt(&tree.current()) {
            let (mut least, mut why) = (tree.current(), error);
            eprintln!("STASIS_MODEL_SEED={seed} fails: {why}\n{least:#?}");
            let mut more = tree.simplify();
            for _ in 0..SHRINKS {
                if !more {
                    break;
                }
                more = match attempt(&tree.current()) {
                    Ok(()) => tree.complicate(),
                    Err(error) => {
                        (least, why) = (tree.current(), error);
                        tree.simplify()
                    }
                };
            }
            return Err(format!("STASIS_MODEL_SEED={seed}: {why}\nafter {least:#?}").into());
        }
        sequences += 1;
        seed = seed.wrapping_add(1);
        if replayed.is_some() || Instant::now() > end {
            println!("{sequences} sequences");
            return Ok(());
        }
    }
}
