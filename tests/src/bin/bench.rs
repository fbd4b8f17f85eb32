//! `stasis-bench`: see [`stasis_tests::bench`].

use std::process::ExitCode;

use clap::Parser as _;
use stasis_tests::bench::network;
use stasis_tests::bench::options::Arguments;
use stasis_tests::bench::run::run;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let words: Vec<String> = std::env::args().skip(1).collect();
    let command =
        if words.is_empty() { "make bench".to_owned() } else { format!("make bench ARGS=\"{}\"", words.join(" ")) };
    let network = if arguments.measures_networks() && network::lacking().is_none() {
        network::lay_out().map_err(|error| format!("cannot make a network to measure in: {error}"))
    } else {
        Ok(())
    };
    let done = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run(&arguments, &command, network)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stasis-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
