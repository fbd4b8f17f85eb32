//! Mutations of a corpus for the bounded runs: seeded, so that a failure can be run again.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::path::Path;
use std::time::{Duration, Instant};

const WORTH_TRYING: [u8; 12] = [0, 1, 2, 3, 4, 0x1f, 0x20, 0x7f, 0x80, 0x81, 0xfe, 0xff];

/// Every file below the corpus of this target.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// Runs the target on the corpus, then on `mutations` of it, or on as many as `STASIS_FUZZ_SECONDS` allows where that is set.
pub fn run(name: &str, mutations: u64, target: fn(&[u8])) {
    let seconds = std::env::var("STASIS_FUZZ_SECONDS").ok().map(|text| text.parse().expect("STASIS_FUZZ_SECONDS"));
    let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let corpus = corpus(name);
    assert!(!corpus.is_empty(), "no corpus for {name}");
    corpus.iter().for_each(|input| target(input));
    let mut seeds = 0..until.map_or(mutations, |_| u64::MAX);
    while let Some(seed) = seeds.next().filter(|_| until.is_none_or(|until| Instant::now() < until)) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut input = corpus[rng.random_range(0..corpus.len())].clone();
        for _ in 0..rng.random_range(1..6) {
            mutate(&mut input, &corpus, &mut rng);
        }
        let ran = std::panic::catch_unwind(|| target(&input));
        assert!(ran.is_ok(), "{name}: mutation {seed} of {} bytes", input.len());
    }
    println!("{name}: {} mutations", seeds.start);
}

fn mutate(input: &mut Vec<u8>, corpus: &[Vec<u8>], rng: &mut SmallRng) {
    let at = rng.random_range(0..=input.len());
    match rng.random_range(0..6) {
        0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
        1 if at < input.len() => input[at] = WORTH_TRYING[rng.random_range(0..WORTH_TRYING.len())],
        2 => input.insert(at, WORTH_TRYING[rng.random_range(0..WORTH_TRYING.len())]),
        3 => drop(input.drain(at..(at + rng.random_range(0..9)).min(input.len()))),
        4 => {
            let other = &corpus[rng.random_range(0..corpus.len())];
            let from = rng.random_range(0..=other.len());
            let until = (from + rng.random_range(0..64)).min(other.len());
            input.splice(at..at, other[from..until].iter().copied());
        }
        _ => {
            let until = (at + rng.random_range(1..32)).min(input.len());
            let copied = input[at..until].to_vec();
            input.splice(at..at, copied);
        }
    }
}
