//! One command: how it is started, what is kept of its output, and when it counts as ended.
//!
//! A command gets a session of its own, hence a process group that a time-out kills as a whole. It has ended when its own process has:
//! what it left in the background runs on, and keeps a reader for the pipes it inherited, since a write to a pipe without one would kill it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Signal, WaitStatus, kill_process_group, setsid};
use stasis_agent::protocol::{ExecReply, ExecRequest};
use tokio::net::unix::pipe;
use tokio::time::{sleep, timeout};

use crate::reaper::{Process, Reaper};

/// What a command finds in its environment unless the request says otherwise.
const ENVIRONMENT: [(&str, &str); 6] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("USER", "root"),
    ("LOGNAME", "root"),
    ("SHELL", "/bin/sh"),
    ("LANG", "C.UTF-8"),
];
const DIRECTORY: &str = "/root";

/// Bytes kept of one stream at most, whatever the request asks for: the guest may have little memory.
const OUTPUT_LIMIT: usize = 64 << 20;
/// Bytes read at once.
const READ_SIZE: usize = 64 << 10;
/// What the pipe may still hold when the process has ended; more comes from the background and is not waited for.
const DRAIN_LIMIT: usize = 1 << 20;
/// How long a killed process may take to die; one that hangs in the kernel is answered for without its status.
const KILL_GRACE: Duration = Duration::from_secs(5);

const EXIT_TIMED_OUT: i32 = 124;

/// Why a command was not started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error("cannot run in directory {path:?}")]
    Directory {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("environment variable name {name:?} is empty or contains '=' or a zero byte")]
    VariableName { name: String },
    #[error("cannot start /bin/sh")]
    Start(#[source] io::Error),
}

/// Runs a command until its own process has ended or the time is up.
pub(crate) async fn run(reaper: &Reaper, request: ExecRequest) -> Result<ExecReply, ExecError> {
    let limit = request.output_limit.min(OUTPUT_LIMIT);
    let mut process = reaper.spawn(&mut command(&request)?).map_err(ExecError::Start)?;
    let mut stdout = Stream::new(process.child.stdout.take().map(OwnedFd::from), limit).map_err(ExecError::Start)?;
    let mut stderr = Stream::new(process.child.stderr.take().map(OwnedFd::from), limit).map_err(ExecError::Start)?;

    let (status, timed_out) =
        follow(&mut process, &mut stdout, &mut stderr, Duration::from_millis(request.timeout_ms)).await;
    let (stdout, stdout_dropped) = stdout.finish();
    let (stderr, stderr_dropped) = stderr.finish();
    Ok(ExecReply {
        exit_code: if timed_out { EXIT_TIMED_OUT } else { status.map_or(-1, exit_code) },
        stdout: STANDARD.encode(stdout),
        stderr: STANDARD.encode(stderr),
        stdout_dropped,
        stderr_dropped,
        timed_out,
    })
}

fn command(request: &ExecRequest) -> Result<Command, ExecError> {
    let directory = request.cwd.as_deref().unwrap_or(DIRECTORY);
    // Looked at here because the error of a spawn does not tell a missing directory from a missing shell.
    let found = std::fs::metadata(directory)
        .and_then(|found| if found.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) });
    found.map_err(|source| ExecError::Directory { path: directory.to_owned(), source })?;
    if let Some(name) = request.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(ExecError::VariableName { name: name.clone() });
    }

    #[expect(clippy::disallowed_methods, reason = "running commands is what the agent is for")]
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(&request.command).current_dir(directory);
    command.env_clear().envs(ENVIRONMENT).env("PWD", directory).envs(&request.env);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setsid is one system call and allocates nothing.
    unsafe {
        command.pre_exec(|| setsid().map(drop).map_err(io::Error::from));
    }
    Ok(command)
}

/// Reads both streams until the process has ended, and kills its group when the time is up. `None`: it did not die of that.
async fn follow(
    process: &mut Process,
    stdout: &mut Stream,
    stderr: &mut Stream,
    limit: Duration,
) -> (Option<WaitStatus>, bool) {
    let deadline = sleep(limit);
    tokio::pin!(deadline);
    loop {
        tokio::select! {
            // First the status, then the deadline: a process that has ended is never signalled, its id may be another's by then.
            biased;
            status = &mut process.exited => return (status.ok(), false),
            () = &mut deadline => {
                // It may have ended this moment, its status not collected yet: then there is nobody to kill.
                let _ = kill_process_group(process.pid, Signal::KILL);
                let status = timeout(KILL_GRACE, &mut process.exited).await;
                return (status.ok().and_then(Result::ok), true);
            }
            () = stdout.read(), if stdout.open => {}
            () = stderr.read(), if stderr.open => {}
        }
    }
}

fn exit_code(status: WaitStatus) -> i32 {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(-1)
}

/// One output pipe and what is kept of it.
struct Stream {
    pipe: pipe::Receiver,
    buffer: Vec<u8>,
    kept: Vec<u8>,
    limit: usize,
    dropped: u64,
    open: bool,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>, limit: usize) -> io::Result<Self> {
        let pipe = pipe.ok_or_else(|| io::Error::other("the process has no output pipe"))?;
        Ok(Self {
            pipe: pipe::Receiver::from_owned_fd(pipe)?,
            buffer: vec![0; READ_SIZE],
            kept: Vec::new(),
            limit,
            dropped: 0,
            open: true,
        })
    }

    /// Waits for output and takes one buffer of it. May be cancelled: nothing is lost.
    async fn read(&mut self) {
        if self.pipe.readable().await.is_err() {
            self.open = false;
            return;
        }
        self.take();
    }

    /// Bytes taken without waiting; 0 when there are none now.
    fn take(&mut self) -> usize {
        match self.pipe.try_read(&mut self.buffer) {
            Ok(0) => self.open = false,
            Ok(len) => {
                let keep = len.min(self.limit - self.kept.len());
                self.kept.extend_from_slice(&self.buffer[..keep]);
                self.dropped += (len - keep) as u64;
                return len;
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.open = false,
        }
        0
    }

    /// Takes what the ended process left in the pipe. If others hold the pipe open, what they write from now on is read and dropped.
    fn finish(mut self) -> (Vec<u8>, u64) {
        let mut drained = 0;
        while self.open && drained < DRAIN_LIMIT {
            match self.take() {
                0 => break,
                len => drained += len,
            }
        }
        let output = (std::mem::take(&mut self.kept), self.dropped);
        if self.open {
            self.limit = 0;
            tokio::spawn(async move {
                while self.open {
                    self.read().await;
                }
            });
        }
        output
    }
}

#[cfg(test)]
mod tests;
