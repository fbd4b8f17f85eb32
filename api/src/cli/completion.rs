//! `stasis completion`: what a shell needs to complete our command line.

use super::args::Args;
use super::{ExitStatus, output};
use clap::CommandFactory as _;
use clap_complete::Shell;

/// `stasis completion bash|zsh|fish`.
#[derive(Debug, clap::Args)]
pub(super) struct Completion {
    /// The shell. For bash: stasis completion bash > /etc/bash_completion.d/stasis
    shell: Shell,
}

pub(super) fn run(completion: &Completion) -> ExitStatus {
    let mut script = Vec::new();
    clap_complete::generate(completion.shell, &mut Args::command(), "stasis", &mut script);
    output::raw(&script, false);
    ExitStatus::Ok
}
