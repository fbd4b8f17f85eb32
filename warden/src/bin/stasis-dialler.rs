//! `stasis-dialler`: the dialler as a process.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use clap::Parser;

/// Hands out connections to the places it was started with, over a listening socket that it inherits.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// HOST:PORT that may be asked for.
    #[arg(long)]
    place: Vec<String>,
    /// The listening socket, as `listener=NUMBER`.
    #[arg(long, value_parser = listener)]
    fd: RawFd,
}

fn listener(text: &str) -> Result<RawFd, String> {
    let number = text.strip_prefix("listener=").and_then(|number| number.parse().ok());
    number.filter(|number| *number > 2).ok_or_else(|| "is not listener=NUMBER".to_owned())
}

fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let arguments = Arguments::parse();
    // SAFETY: whoever starts a dialler gives it this one, and nothing else here has touched it.
    let listener = unsafe { OwnedFd::from_raw_fd(arguments.fd) };
    match stasis_warden::dialler::run(&listener, arguments.place) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "ends");
            ExitCode::FAILURE
        }
    }
}
