//! How captures and wakes of one host share its connections to the store: evenly, whoever came first.
//!
//! Who transfers holds a [`Share`]. When one comes or goes, a task tells the captures that run what theirs is now; a wake keeps what it began
//! with. That a message is late or lost costs fairness for a moment and nothing else.

use stasis_vmm::control::client::Client;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Fewer would leave the link idle between two requests.
const LEAST: u16 = 2;

/// Connections of each of `n` transfers, when the host has `host` of them and one transfer takes `each` at most.
pub fn share(host: u16, each: u16, n: usize) -> u16 {
    let even = u16::try_from(usize::from(host) / n.max(1)).unwrap_or(u16::MAX);
    even.max(LEAST).min(each.max(1))
}

/// The connections of a host.
#[derive(Debug)]
pub struct FairShare {
    host: u16,
    each: u16,
    transfers: Mutex<Transfers>,
}

#[derive(Debug, Default)]
struct Transfers {
    next: u64,
    /// `None` for one that cannot be told.
    running: HashMap<u64, Option<Client>>,
}

/// The right to transfer, until it is dropped.
#[derive(Debug)]
pub struct Share {
    of: Arc<FairShare>,
    number: u64,
}

impl FairShare {
    /// `host` connections in all, at most `each` for one transfer.
    pub fn new(host: u16, each: u16) -> Arc<Self> {
        Arc::new(Self { host, each, transfers: Mutex::default() })
    }

    /// A transfer begins. A capture names its VMM, to be told when its share changes.
    pub fn join(self: &Arc<Self>, vmm: Option<&Client>) -> Share {
        let mut transfers = self.transfers();
        let before = transfers.running.len();
        let number = transfers.next;
        transfers.next += 1;
        self.tell(&transfers, before, before + 1);
        transfers.running.insert(number, vmm.cloned());
        drop(transfers);
        Share { of: self.clone(), number }
    }

    /// Transfers that run.
    pub fn running(&self) -> usize {
        self.transfers().running.len()
    }

    /// Tells those who run of a share that changes.
    fn tell(self: &Arc<Self>, transfers: &Transfers, before: usize, after: usize) {
        if share(self.host, self.each, before) == share(self.host, self.each, after) {
            return;
        }
        for vmm in transfers.running.values().flatten() {
            let (of, vmm) = (self.clone(), vmm.clone());
            tokio::spawn(async move {
                // As it is when this is sent: of several changes at once, the last word is the last state.
                let connections = share(of.host, of.each, of.running());
                if let Err(error) = vmm.set_connections(connections).await {
                    tracing::debug!(%error, connections, "a capture keeps the connections it has");
                }
            });
        }
    }

    fn transfers(&self) -> MutexGuard<'_, Transfers> {
        self.transfers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// Requests in flight at most, as of now.
    pub fn connections(&self) -> u16 {
        share(self.of.host, self.of.each, self.of.running())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut transfers = self.of.transfers();
        let before = transfers.running.len();
        transfers.running.remove(&self.number);
        // Without a runtime everything ends anyway.
        if tokio::runtime::Handle::try_current().is_ok() {
            self.of.tell(&transfers, before, before - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_even_and_within_both_bounds() {
        assert_eq!(share(64, 32, 1), 32);
        assert_eq!(share(64, 32, 2), 32);
        assert_eq!(share(64, 32, 4), 16);
        assert_eq!(share(64, 32, 20), 3);
        assert_eq!(share(64, 32, 1000), 2, "nobody starves");
        assert_eq!(share(64, 32, 0), 32);
        assert_eq!(share(64, 1, 4), 1);
    }

    #[tokio::test]
    async fn shares_shrink_and_grow_with_those_who_transfer() {
        let fair = FairShare::new(8, 6);
        let first = fair.join(None);
        assert_eq!(first.connections(), 6);
        let second = fair.join(None);
        assert_eq!((first.connections(), second.connections()), (4, 4));
        let third = fair.join(None);
        assert_eq!(third.connections(), 2);
        drop((first, third));
        assert_eq!((fair.running(), second.connections()), (1, 6));
    }
}
