//! The sandboxes of the process, and what the supervisor may do with them. Instructions come one at a time: each is over, connections of the
//! state before included, when the next begins.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Mutex;

use crate::config::Settings;
use crate::control::types::{
    MAX_KEY, PutSandbox, Refused, RefusedCode, ReplacePolicy, SandboxRef, SandboxReport, Sockets,
};
use crate::counters::Counters;
use crate::proxy::upstream::{RootError, Roots};
use crate::sandbox::{Sandbox, SetUpError, Shared};

/// Sandboxes of one process at most.
const MAX_SANDBOXES: usize = 10_000;

struct Entry {
    generation: u64,
    sandbox: Arc<Sandbox>,
}

/// See the module.
pub struct Sandboxes {
    shared: Arc<Shared>,
    entries: Mutex<HashMap<String, Entry>>,
}

fn refused(code: RefusedCode, message: impl Into<String>) -> Refused {
    Refused { code, message: message.into() }
}

fn unknown(key: &str) -> Refused {
    refused(RefusedCode::Unknown, format!("there is no sandbox {key}"))
}

fn stale(key: &str, there: u64, said: u64) -> Refused {
    refused(RefusedCode::Stale, format!("{key} is of generation {there}, the instruction is for {said}"))
}

fn invalid(error: &SetUpError) -> Refused {
    refused(RefusedCode::Invalid, crate::chain(error))
}

impl Sandboxes {
    /// None yet.
    pub fn new(settings: Settings) -> Result<Self, RootError> {
        let roots = Roots::new(&settings.extra_roots)?;
        let servers = Arc::new(RwLock::new(settings.upstreams.clone()));
        Ok(Self { shared: Arc::new(Shared { settings, servers, roots }), entries: Mutex::default() })
    }

    /// Puts a sandbox in place of what there may be under its key.
    pub async fn put(&self, put: &PutSandbox, sockets: Sockets) -> Result<(), Refused> {
        let PutSandbox { key, generation, policy, authority, .. } = put;
        if !(1..=MAX_KEY).contains(&key.len()) || !key.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(refused(RefusedCode::Invalid, format!("a key is 1 to {MAX_KEY} bytes of visible ASCII")));
        }
        let mut entries = self.entries.lock().await;
        let before = entries.get(key);
        if let Some(before) = before.filter(|before| before.generation > *generation) {
            return Err(stale(key, before.generation, *generation));
        }
        if before.is_none() && entries.len() >= MAX_SANDBOXES {
            return Err(refused(RefusedCode::Full, format!("there are {MAX_SANDBOXES} sandboxes already")));
        }
        let counters = before.map_or_else(|| Arc::new(Counters::default()), |b| Arc::clone(&b.sandbox.counters));
        let sandbox = Sandbox::new(&self.shared, counters, policy, authority.as_ref()).map_err(|e| invalid(&e))?;
        // From here on the one before is gone, whatever happens: two must not read the same sockets.
        if let Some(before) = entries.remove(key) {
            before.sandbox.end().await.map_err(|e| invalid(&e))?;
        }
        sandbox.serve(sockets).map_err(|e| invalid(&e))?;
        entries.insert(key.clone(), Entry { generation: *generation, sandbox });
        Ok(())
    }

    /// Puts another policy in force.
    pub async fn replace(&self, replace: &ReplacePolicy) -> Result<(), Refused> {
        let ReplacePolicy { key, generation, policy, authority } = replace;
        let mut entries = self.entries.lock().await;
        let entry = entries.get_mut(key).ok_or_else(|| unknown(key))?;
        if entry.generation > *generation {
            return Err(stale(key, entry.generation, *generation));
        }
        entry.sandbox.replace(policy, authority.as_ref()).await.map_err(|e| invalid(&e))?;
        entry.generation = *generation;
        Ok(())
    }

    /// Takes a sandbox away; none when it was not there.
    pub async fn remove(&self, which: &SandboxRef) -> Result<Option<SandboxReport>, Refused> {
        let mut entries = self.entries.lock().await;
        let Some(entry) = entries.get(&which.key) else { return Ok(None) };
        if entry.generation > which.generation {
            return Err(stale(&which.key, entry.generation, which.generation));
        }
        let Some(entry) = entries.remove(&which.key) else { return Ok(None) };
        entry.sandbox.end().await.map_err(|e| invalid(&e))?;
        Ok(Some(entry.sandbox.counters.report(entry.generation)))
    }

    /// Counters and last refusals.
    pub async fn report(&self, key: &str) -> Result<SandboxReport, Refused> {
        let entries = self.entries.lock().await;
        let entry = entries.get(key).ok_or_else(|| unknown(key))?;
        Ok(entry.sandbox.counters.report(entry.generation))
    }

    /// Which there are, and their open connections.
    pub async fn list(&self) -> (Vec<SandboxRef>, u64) {
        let entries = self.entries.lock().await;
        let connections = entries.values().map(|e| e.sandbox.counters.connections()).sum();
        let reference = |(key, entry): (&String, &Entry)| SandboxRef { key: key.clone(), generation: entry.generation };
        let mut sandboxes: Vec<SandboxRef> = entries.iter().map(reference).collect();
        sandboxes.sort_by(|a, b| a.key.cmp(&b.key));
        (sandboxes, connections)
    }

    /// The name servers that are asked.
    pub fn upstreams(&self) -> Vec<std::net::SocketAddr> {
        self.shared.servers.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks others from now on.
    pub fn set_upstreams(&self, servers: Vec<std::net::SocketAddr>) {
        *self.shared.servers.write().unwrap_or_else(PoisonError::into_inner) = servers;
    }

    /// Ends all.
    pub async fn end(&self) {
        for (key, entry) in self.entries.lock().await.drain() {
            if let Err(error) = entry.sandbox.end().await {
                tracing::warn!(key, error = crate::chain(&error), "a sandbox did not end");
            }
        }
    }
}
