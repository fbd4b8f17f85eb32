//! One command: as whom and how it is started, what is kept of its output, and when it counts as ended.
//!
//! A command gets a session of its own, hence a process group that a time-out kills as a whole. It has ended when its own process has:
//! what it left in the background runs on, and keeps a reader for the pipes it inherited, since a write to a pipe without one would kill it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustix::process::{Gid, Signal, Uid, WaitStatus, geteuid, ioctl_tiocsctty, kill_process_group, setsid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use stasis_agent::protocol::{ExecReply, ExecRequest};
use tokio::net::unix::pipe;
use tokio::time::{sleep, timeout};

use crate::accounts::{Account, Accounts};
use crate::image::{self, Image};
use crate::reaper::{Process, Reaper};
use crate::trust;

/// What a command finds in its environment beside its user's variables, unless the request says otherwise.
const ENVIRONMENT: [(&str, &str); 2] =
    [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];
/// Who commands run as.
const USER: &str = "root";
/// Where they start, and what relative paths are relative to.
pub(crate) const DIRECTORY: &str = "/root";
/// What command lines are for.
pub(crate) const SHELL: &str = "/bin/sh";

/// Bytes kept of one stream at most, whatever the request asks for: the guest may have little memory.
const OUTPUT_LIMIT: usize = 64 << 20;
/// Bytes read at once.
const READ_SIZE: usize = 64 << 10;
/// What the pipe may still hold when the process has ended; more comes from the background and is not waited for.
const DRAIN_LIMIT: usize = 1 << 20;
/// How long a killed process may take to die; one that hangs in the kernel is answered for without its status.
const KILL_GRACE: Duration = Duration::from_secs(5);

const EXIT_TIMED_OUT: i32 = 124;

/// Why a command was not started. The first three: the end of a sentence that starts with the request's field.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    #[error("{path:?} cannot be used")]
    Directory {
        path: String,
        #[source]
        source: io::Error,
    },
    #[error("has the name {name:?}, which is empty or contains '=' or a zero byte")]
    VariableName { name: String },
    #[error("{name:?} does not exist in the guest")]
    User { name: String },
    #[error("cannot start {program}")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
}

/// Runs a command until its own process has ended or the time is up.
pub(crate) async fn run(reaper: &Reaper, request: ExecRequest) -> Result<ExecReply, ExecError> {
    let user = user(request.user.as_deref())?;
    let mut command = command(SHELL, request.cwd.as_deref(), &user, &request.env)?;
    command.arg("-c").arg(&request.command);
    collect(reaper, command, request.output_limit, Duration::from_millis(request.timeout_ms)).await
}

/// Runs what [`command`] made until its process has ended or the time is up.
pub(crate) async fn collect(
    reaper: &Reaper,
    mut command: Command,
    output_limit: usize,
    within: Duration,
) -> Result<ExecReply, ExecError> {
    let limit = output_limit.min(OUTPUT_LIMIT);
    let program = command.get_program().to_string_lossy().into_owned();
    let start = |source| ExecError::Start { program: program.clone(), source };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = reaper.spawn(&mut command).map_err(start)?;
    let mut stdout = Stream::new(process.child.stdout.take().map(OwnedFd::from), limit).map_err(start)?;
    let mut stderr = Stream::new(process.child.stderr.take().map(OwnedFd::from), limit).map_err(start)?;

    let (status, timed_out) = follow(&mut process, &mut stdout, &mut stderr, within).await;
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

/// Where commands start, and what relative paths are relative to.
pub(crate) fn directory() -> &'static str {
    image::told().map_or(DIRECTORY, |image| &image.workdir)
}

/// The user of this name or number; who commands run as when there is none.
pub(crate) fn user(wanted: Option<&str>) -> Result<Account, ExecError> {
    user_in(image::told(), wanted)
}

/// The same in a guest of that image.
pub(crate) fn user_in(image: Option<&Image>, wanted: Option<&str>) -> Result<Account, ExecError> {
    let accounts = Accounts::read(Path::new("/"));
    let unknown = |name: &str| ExecError::User { name: name.to_owned() };
    match (wanted, image.and_then(|image| image.user.as_deref())) {
        (Some(name), _) => accounts.user(name).ok_or_else(|| unknown(name)),
        (None, Some(name)) => image::account(&accounts, name).ok_or_else(|| unknown(name)),
        // An image without /etc/passwd has a root all the same.
        (None, None) => Ok(accounts.user(USER).unwrap_or_else(|| Account {
            name: USER.to_owned(),
            uid: 0,
            gid: 0,
            home: DIRECTORY.to_owned(),
            shell: SHELL.to_owned(),
            groups: Vec::new(),
        })),
    }
}

/// `program` in a session of its own, with the environment of `user` and `env` over it, in `cwd` or where that user is at home.
pub(crate) fn command(
    program: &str,
    cwd: Option<&str>,
    user: &Account,
    env: &BTreeMap<String, String>,
) -> Result<Command, ExecError> {
    command_in(image::told(), program, cwd, user, env)
}

/// The same in a guest of that image, whose variables and working directory come before the user's.
pub(crate) fn command_in(
    image: Option<&Image>,
    program: &str,
    cwd: Option<&str>,
    user: &Account,
    env: &BTreeMap<String, String>,
) -> Result<Command, ExecError> {
    if let Some(name) = env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(ExecError::VariableName { name: name.clone() });
    }
    let directory = match cwd {
        Some(cwd) if cwd.starts_with('/') => cwd.to_owned(),
        Some(cwd) => format!("{}/{cwd}", image.map_or(DIRECTORY, |image| &image.workdir)),
        None => match image {
            Some(image) => image.workdir.clone(),
            None if user.name == USER => DIRECTORY.to_owned(),
            None if Path::new(&user.home).is_dir() => user.home.clone(),
            None => "/".to_owned(),
        },
    };
    // Looked at here because the error of a spawn does not tell a missing directory from a missing program.
    let found = std::fs::metadata(&directory)
        .and_then(|found| if found.is_dir() { Ok(()) } else { Err(io::ErrorKind::NotADirectory.into()) });
    found.map_err(|source| ExecError::Directory { path: directory.clone(), source })?;

    #[expect(clippy::disallowed_methods, reason = "running commands is what the agent is for")]
    let mut command = Command::new(program);
    let shell = if user.shell.is_empty() { SHELL } else { &user.shell };
    command.current_dir(&directory).env_clear().envs(ENVIRONMENT);
    command.env("HOME", &user.home).env("USER", &user.name).env("LOGNAME", &user.name).env("SHELL", shell);
    command.envs(image.iter().flat_map(|image| &image.env)).envs(trust::variables());
    command.env("PWD", directory).envs(env);
    let switch = (geteuid().as_raw() != user.uid).then(|| Switch::to(user));
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are system calls, and nothing is allocated or freed.
    unsafe {
        command.pre_exec(move || {
            setsid()?;
            switch.as_ref().map_or(Ok(()), Switch::apply)
        });
    }
    Ok(command)
}

/// Makes the terminal that is the command's standard input the one that controls its session.
pub(crate) fn control_terminal(command: &mut Command) {
    // SAFETY: one system call on descriptor 0, which the child has; see `command`, after whose closure this one runs.
    unsafe {
        command.pre_exec(|| {
            let stdin = std::os::fd::BorrowedFd::borrow_raw(0);
            ioctl_tiocsctty(stdin).map_err(io::Error::from)
        });
    }
}

/// Who a child becomes.
struct Switch {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Switch {
    fn to(user: &Account) -> Self {
        let groups = std::iter::once(user.gid).chain(user.groups.iter().copied()).map(Gid::from_raw).collect();
        Self { uid: Uid::from_raw(user.uid), gid: Gid::from_raw(user.gid), groups }
    }

    /// In the child, whose only thread this is. The groups first: after the user is changed it is not allowed.
    fn apply(&self) -> io::Result<()> {
        set_thread_groups(&self.groups)?;
        set_thread_res_gid(self.gid, self.gid, self.gid)?;
        set_thread_res_uid(self.uid, self.uid, self.uid)?;
        Ok(())
    }
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

/// As a shell tells it: 128 and the signal for what was killed.
pub(crate) fn exit_code(status: WaitStatus) -> i32 {
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
        let read = self.pipe.try_read(&mut self.buffer);
        self.keep(read);
    }

    /// Keeps of what was read into the buffer as much as the limit allows. Returns the bytes that were read.
    fn keep(&mut self, read: io::Result<usize>) -> usize {
        match read {
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
            // Asked of the pipe and not of the runtime, which may learn only after the status that there is something to read.
            let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.pipe, &mut self.buffer[..]));
            match self.keep(read.map_err(io::Error::from)) {
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
