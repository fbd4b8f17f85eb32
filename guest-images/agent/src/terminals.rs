//! Terminals: a shell on a pseudo-terminal that lives on while nobody is attached.
//!
//! One task for each reads what the shell writes, keeps the last of it for whoever attaches later, and passes it on to those who are
//! attached. One who does not keep up is detached: the shell waits for readers only so long. The shell's end is the end of its process;
//! the terminal stays listed with what it showed last until it is deleted or makes room for a new one.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetpgrp, tcsetwinsize};
use stasis_agent::protocol::terminals::{Create, Terminal, Terminals};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::exec::{self, ExecError};
use crate::files::replace::random;
use crate::reaper::{Process, Reaper};

/// Terminals at once. One whose shell has ended makes room.
const TERMINALS: usize = 64;
/// Readers of one terminal at once.
const ATTACHED: usize = 16;
/// Bytes kept for who attaches later.
const KEPT: usize = 256 << 10;
/// Bytes read at once.
const CHUNK: usize = 16 << 10;
/// Chunks that a reader may be behind.
const QUEUE: usize = 64;
/// How long the shell waits for one reader.
const PATIENCE: Duration = Duration::from_secs(20);
/// From the hang-up to the kill of a deleted terminal's shell.
const GRACE: Duration = Duration::from_secs(2);
/// After the shell has ended: for what it wrote last to be read. What it left in the background may write for ever.
const LAST_WORDS: Duration = Duration::from_millis(200);
const SHELLS: [&str; 2] = ["/bin/bash", "/bin/sh"];

/// Why a terminal was not made, found or attached to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TerminalError {
    #[error("there is no terminal {0:?}")]
    NotFound(String),
    #[error("there is a terminal {0:?} already")]
    Exists(String),
    #[error("there are {TERMINALS} terminals already: delete one first")]
    TooMany,
    #[error("{ATTACHED} readers are attached to the terminal already")]
    TooManyReaders,
    #[error(transparent)]
    Exec(#[from] ExecError),
    #[error("cannot {operation}")]
    Kernel {
        operation: &'static str,
        #[source]
        source: io::Error,
    },
}

/// All terminals.
pub(crate) struct Registry {
    reaper: Arc<Reaper>,
    all: Mutex<VecDeque<Arc<Shell>>>,
}

/// One terminal.
struct Shell {
    request: Create,
    id: String,
    created_at_ms: i64,
    inner: Mutex<Inner>,
    /// Set once: the shell has ended and what it wrote was read.
    ended: watch::Sender<bool>,
}

struct Inner {
    cols: u16,
    rows: u16,
    cwd: String,
    running: Option<Running>,
    /// It was started once.
    started: bool,
    exit_code: Option<i32>,
    kept: VecDeque<u8>,
    readers: Vec<mpsc::Sender<Vec<u8>>>,
}

#[derive(Clone)]
struct Running {
    terminal: Arc<AsyncFd<OwnedFd>>,
    /// Of the shell, and of its process group; none once it has ended, since its id may be another's then.
    pid: Option<Pid>,
}

/// The two ends that somebody who is attached uses.
pub(crate) struct Attached {
    /// What the terminal showed last, then what it shows; ends with the shell.
    pub(crate) output: mpsc::Receiver<Vec<u8>>,
    pub(crate) before: Vec<u8>,
    pub(crate) input: Input,
}

/// Where keys go. Without a shell they go nowhere.
pub(crate) struct Input(Option<Arc<AsyncFd<OwnedFd>>>);

impl Registry {
    pub(crate) fn new(reaper: Arc<Reaper>) -> Arc<Self> {
        Arc::new(Self { reaper, all: Mutex::default() })
    }

    /// Makes a terminal, and starts its shell unless that is to be done later.
    pub(crate) fn create(&self, request: Create) -> Result<Terminal, TerminalError> {
        let mut all = lock(&self.all);
        if let Some(id) = &request.id
            && all.iter().any(|shell| shell.id == *id)
        {
            return Err(TerminalError::Exists(id.clone()));
        }
        if all.len() >= TERMINALS {
            let over = all.iter().position(|shell| *shell.ended.borrow()).ok_or(TerminalError::TooMany)?;
            all.remove(over);
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let shell = Arc::new(Shell {
            id: request.id.clone().unwrap_or_else(|| format!("pty-{:016x}", random())),
            created_at_ms: i64::try_from(now.as_millis()).unwrap_or(i64::MAX),
            inner: Mutex::new(Inner {
                cols: request.cols,
                rows: request.rows,
                cwd: request.cwd.clone().unwrap_or_else(|| exec::DIRECTORY.to_owned()),
                running: None,
                started: false,
                exit_code: None,
                kept: VecDeque::new(),
                readers: Vec::new(),
            }),
            ended: watch::Sender::new(false),
            request,
        });
        if shell.request.lazy_start {
            // What cannot start later is refused now.
            shell.command()?;
        } else {
            shell.start(&self.reaper)?;
        }
        all.push_back(Arc::clone(&shell));
        Ok(shell.describe())
    }

    pub(crate) fn list(&self) -> Terminals {
        Terminals { items: lock(&self.all).iter().map(|shell| shell.describe()).collect() }
    }

    fn find(&self, id: &str) -> Result<Arc<Shell>, TerminalError> {
        let all = lock(&self.all);
        all.iter().find(|shell| shell.id == id).cloned().ok_or_else(|| TerminalError::NotFound(id.to_owned()))
    }

    pub(crate) fn get(&self, id: &str) -> Result<Terminal, TerminalError> {
        Ok(self.find(id)?.describe())
    }

    pub(crate) fn resize(&self, id: &str, cols: u16, rows: u16) -> Result<Terminal, TerminalError> {
        let shell = self.find(id)?;
        {
            let mut inner = lock(&shell.inner);
            (inner.cols, inner.rows) = (cols, rows);
            if let Some(running) = &inner.running {
                tcsetwinsize(running.terminal.get_ref(), size(cols, rows)).map_err(kernel("resize the terminal"))?;
            }
        }
        Ok(shell.describe())
    }

    /// Hangs up, and kills the shell if that does not end it.
    pub(crate) async fn delete(&self, id: &str) -> Result<(), TerminalError> {
        let shell = self.find(id)?;
        lock(&self.all).retain(|other| !Arc::ptr_eq(other, &shell));
        for signal in [Signal::HUP, Signal::KILL] {
            let Some(running) = lock(&shell.inner).running.clone() else { break };
            // What runs in front has a process group of its own. Neither may be there any more.
            if let Ok(front) = tcgetpgrp(running.terminal.get_ref()) {
                let _ = kill_process_group(front, signal);
            }
            if let Some(pid) = running.pid {
                let _ = kill_process_group(pid, signal);
            }
            let mut ended = shell.ended.subscribe();
            if timeout(GRACE, ended.wait_for(|ended| *ended)).await.is_ok() {
                break;
            }
        }
        Ok(())
    }

    /// Attaches a reader and writer; starts the shell of a terminal that waited for one.
    pub(crate) fn attach(&self, id: &str) -> Result<Attached, TerminalError> {
        let shell = self.find(id)?;
        if !lock(&shell.inner).started {
            shell.start(&self.reaper)?;
        }
        let mut inner = lock(&shell.inner);
        inner.readers.retain(|reader| !reader.is_closed());
        if inner.readers.len() >= ATTACHED {
            return Err(TerminalError::TooManyReaders);
        }
        let (sender, output) = mpsc::channel(QUEUE);
        if inner.running.is_some() {
            inner.readers.push(sender);
        }
        let input = Input(inner.running.as_ref().map(|running| Arc::clone(&running.terminal)));
        Ok(Attached { output, before: inner.kept.iter().copied().collect(), input })
    }
}

impl Shell {
    fn describe(&self) -> Terminal {
        let inner = lock(&self.inner);
        Terminal {
            id: self.id.clone(),
            cwd: inner.cwd.clone(),
            envs: self.request.envs.clone(),
            cols: inner.cols,
            rows: inner.rows,
            created_at_ms: self.created_at_ms,
            active: inner.running.is_some(),
            lazy_start: self.request.lazy_start,
            exit_code: inner.exit_code,
        }
    }

    fn command(&self) -> Result<std::process::Command, TerminalError> {
        let user = exec::user(self.request.user.as_deref())?;
        let mut env: BTreeMap<String, String> = [("TERM".to_owned(), "xterm-256color".to_owned())].into();
        env.extend(self.request.environment.clone());
        env.extend(self.request.envs.clone());
        if let Some(line) = &self.request.command {
            let mut command = exec::command(exec::SHELL, self.request.cwd.as_deref(), &user, &env)?;
            command.arg("-c").arg(line);
            return Ok(command);
        }
        let shell = std::iter::once(user.shell.as_str())
            .chain(SHELLS)
            .find(|shell| rustix::fs::access(*shell, rustix::fs::Access::EXEC_OK).is_ok())
            .unwrap_or(SHELLS[1])
            .to_owned();
        Ok(exec::command(&shell, self.request.cwd.as_deref(), &user, &env)?)
    }

    /// Opens the terminal and starts the shell on it. Called once.
    fn start(self: &Arc<Self>, reaper: &Reaper) -> Result<(), TerminalError> {
        let mut command = self.command()?;
        let mut inner = lock(&self.inner);
        if inner.started {
            return Ok(());
        }
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .map_err(kernel("open a terminal"))?;
        grantpt(&ours).and_then(|()| unlockpt(&ours)).map_err(kernel("open a terminal"))?;
        let theirs = ioctl_tiocgptpeer(&ours, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .map_err(kernel("open a terminal"))?;
        tcsetwinsize(&ours, size(inner.cols, inner.rows)).map_err(kernel("resize the terminal"))?;
        let flags = fcntl_getfl(&ours).map_err(kernel("open a terminal"))?;
        fcntl_setfl(&ours, flags | OFlags::NONBLOCK).map_err(kernel("open a terminal"))?;
        let copy = || theirs.try_clone().map(Stdio::from).map_err(kernel("open a terminal"));
        command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
        exec::control_terminal(&mut command);
        let program = command.get_program().to_string_lossy().into_owned();
        if let Some(directory) = command.get_current_dir() {
            inner.cwd = directory.to_string_lossy().into_owned();
        }
        let process = reaper.spawn(&mut command).map_err(|source| ExecError::Start { program, source })?;
        // SAFETY: the descriptor is owned by the `AsyncFd`: it stays open, and the same, until the `AsyncFd` is dropped.
        let terminal = Arc::new(unsafe { AsyncFd::register(ours) }.map_err(kernel("watch a terminal"))?);
        inner.running = Some(Running { terminal: Arc::clone(&terminal), pid: Some(process.pid) });
        inner.started = true;
        tokio::spawn(Arc::clone(self).follow(process, terminal));
        Ok(())
    }

    /// Passes on what the shell writes until it has ended.
    async fn follow(self: Arc<Self>, mut process: Process, terminal: Arc<AsyncFd<OwnedFd>>) {
        let status = loop {
            tokio::select! {
                biased;
                read = read(&terminal) => {
                    let Ok(chunk) = read else {
                        // The last process that had the terminal is gone.
                        break (&mut process.exited).await.ok();
                    };
                    self.pass_on(chunk).await;
                }
                status = &mut process.exited => {
                    if let Some(running) = &mut lock(&self.inner).running {
                        running.pid = None;
                    }
                    let last_words = async {
                        while let Ok(chunk) = read(&terminal).await {
                            self.pass_on(chunk).await;
                        }
                    };
                    let _ = timeout(LAST_WORDS, last_words).await;
                    break status.ok();
                }
            }
        };
        {
            let mut inner = lock(&self.inner);
            inner.running = None;
            inner.exit_code = status.map(exec::exit_code);
            inner.readers.clear();
        }
        self.ended.send_replace(true);
    }

    async fn pass_on(&self, chunk: Vec<u8>) {
        let readers = {
            let mut inner = lock(&self.inner);
            inner.kept.extend(&chunk);
            let over = inner.kept.len().saturating_sub(KEPT);
            inner.kept.drain(..over);
            inner.readers.clone()
        };
        for reader in readers {
            let late = reader.send_timeout(chunk.clone(), PATIENCE).await.is_err();
            if late {
                lock(&self.inner).readers.retain(|other| !other.same_channel(&reader));
            }
        }
    }
}

impl Input {
    /// Types `bytes`. Waits as long as the shell does not read; an error when it is gone.
    pub(crate) async fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        let Some(terminal) = &self.0 else { return Ok(()) };
        while !bytes.is_empty() {
            let mut ready = terminal.writable().await?;
            match ready.try_io(|fd| rustix::io::write(fd.get_ref(), bytes).map_err(io::Error::from)) {
                Ok(written) => bytes = bytes.get(written?..).unwrap_or_default(),
                Err(_not_ready) => {}
            }
        }
        Ok(())
    }
}

async fn read(terminal: &AsyncFd<OwnedFd>) -> io::Result<Vec<u8>> {
    let mut chunk = vec![0; CHUNK];
    loop {
        let mut ready = terminal.readable().await?;
        match ready.try_io(|fd| rustix::io::read(fd.get_ref().as_fd(), &mut chunk).map_err(io::Error::from)) {
            Ok(Ok(0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(Ok(len)) => {
                chunk.truncate(len);
                return Ok(chunk);
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_not_ready) => {}
        }
    }
}

fn size(cols: u16, rows: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 }
}

fn kernel<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> TerminalError {
    move |source| TerminalError::Kernel { operation, source: source.into() }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
