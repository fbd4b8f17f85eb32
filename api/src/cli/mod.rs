//! The program `stasis`: the supervisor, and a client for it.
//!
//! stdout is the answer, stderr the narration. `--json` prints the server's answer as one JSON value. Exit codes are in [`exit`]; arguments,
//! JSON output and exit codes are an interface, human text is not.

mod args;
mod bucket;
mod client;
mod commands;
mod completion;
mod copy;
mod exit;
mod files;
mod gc;
mod git;
mod keys;
mod logs;
mod network;
mod output;
mod presigned;
mod profile;
mod progress;
mod repair;
mod seal;
mod serve;
mod sessions;
mod snapshot;
mod template;
mod templates;
mod terminal;
mod top;
mod verify;

pub use exit::ExitStatus;
pub(crate) use repair::OWNER as REPAIR_OWNER;

use args::{Args, Command};
use clap::Parser as _;
use output::Output;

/// Runs the program with the process's arguments.
pub fn main() -> std::process::ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version go to stdout and are no error; clap knows which is which.
            let code = if error.use_stderr() { ExitStatus::Usage } else { ExitStatus::Ok };
            if error.print().is_err() {
                return ExitStatus::Other.into();
            }
            return code.into();
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().thread_name("stasis-worker").enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output::complain(&format!("cannot start the runtime: {error}"));
            return ExitStatus::Other.into();
        }
    };
    let status = match runtime.block_on(run(args)) {
        Ok(status) => status,
        Err(failure) => {
            output::complain(&failure.message);
            failure.status
        }
    };
    // Blocking work that nobody waits for any more must not hold the exit up.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    status.into()
}

/// Why a command failed.
#[derive(Debug)]
pub(crate) struct Failure {
    status: ExitStatus,
    message: String,
}

impl Failure {
    fn new(status: ExitStatus, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn other(message: impl Into<String>) -> Self {
        Self::new(ExitStatus::Other, message)
    }
}

async fn run(args: Args) -> Result<ExitStatus, Failure> {
    let output = Output::new(args.json);
    match args.command {
        Command::Serve(serve) => serve::serve(serve).await,
        Command::Dev(dev) => serve::dev(dev).await,
        Command::Key(key) => keys::run(&key, output),
        Command::Gc(arguments) => gc::run(arguments, output).await,
        Command::Verify(arguments) => verify::run(arguments, output).await,
        Command::Repair(arguments) => repair::run(arguments, output).await,
        Command::Seal(arguments) => seal::run(arguments, output).await,
        Command::Templates(arguments) => templates::run(&arguments, output),
        Command::Completion(arguments) => Ok(completion::run(&arguments)),
        Command::Client(client) => commands::run(client, &args.connection, output).await,
    }
}
