//! The egress process: found again or started, and given each sandbox that has a network with names.
//!
//! One process serves all sandboxes of a supervisor. Like a VMM it outlives its supervisor, so that a restart cuts no connection: the next
//! supervisor finds it by its socket in the data directory. What it was told is only in its memory: one that was started anew is told
//! everything again by `supervisor::network`.

use crate::launcher::Launcher;
use stasis_egress::control::client::{Client, ClientError};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Its control socket, in the data directory.
const SOCKET: &str = "egress.sock";
/// Its messages and its process, beside it.
const LOG: &str = "egress.log";
const NOTE: &str = "egress.json";
/// How long one may take to answer that was just started.
const START: Duration = Duration::from_secs(10);

/// Where the egress process is, or is to be.
#[derive(Debug)]
pub struct EgressProcess {
    program: PathBuf,
    data_dir: PathBuf,
    arguments: Vec<String>,
    /// How to talk to it.
    pub client: Client,
    /// Held while one is started, so that there is one.
    starting: tokio::sync::Mutex<()>,
}

impl EgressProcess {
    /// Of `program`, which is started with `arguments` when none answers below `data_dir`.
    pub fn new(program: &Path, data_dir: &Path, arguments: Vec<String>) -> Self {
        Self {
            program: program.to_owned(),
            data_dir: data_dir.to_owned(),
            arguments,
            client: Client::new(&data_dir.join(SOCKET)),
            starting: tokio::sync::Mutex::default(),
        }
    }

    /// Returns when one answers; says whether it was started just now, and so knows nothing.
    pub async fn ensure(&self) -> io::Result<bool> {
        let _one = self.starting.lock().await;
        if self.client.status().await.is_ok() {
            return Ok(false);
        }
        self.start()?;
        let begun = Instant::now();
        loop {
            match self.client.status().await {
                Ok(_) => return Ok(true),
                Err(ClientError::Unreachable { .. }) if begun.elapsed() < START => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                Err(error) => return Err(io::Error::other(error)),
            }
        }
    }

    fn start(&self) -> io::Result<()> {
        let log = File::options().append(true).create(true).open(self.data_dir.join(LOG))?;
        let note = File::create(self.data_dir.join(NOTE))?;
        let socket = self.data_dir.join(SOCKET).display().to_string();
        let arguments = [["--control-socket".to_owned(), socket].as_slice(), &self.arguments].concat();
        Launcher::start_helper(&self.program, &arguments, log, note)
    }
}
