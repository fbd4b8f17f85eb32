//! Memory kept on this host from the last pause (design §6): the memory files of sandboxes that are paused, so that a wake here finds every
//! page in place. A cache: bounded by allocated bytes, evicted least recently paused first, empty after a restart of the supervisor.
//!
//! An entry belongs to one sandbox and to one manifest of it. It is moved out by the wake that uses it, so that two VMMs never share a memory
//! file; a wake that fails has lost it. Files are closed on a blocking thread, since freeing a gigabyte takes the kernel a while.

use crate::ids::SandboxId;
use crate::known_packs::KnownPacks;
use stasis_snapshot::ids::Digest;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Unit of `st_blocks`, bytes.
const STAT_BLOCK: u64 = 512;

/// What a wake of one commit needs, in memory.
#[derive(Debug)]
pub struct Kept {
    /// The memory file.
    pub memory: Arc<File>,
    /// What the VMM that made the commit noted about the file, to be read from its beginning.
    pub notes: File,
    /// The manifest of the commit, whose digest was checked; likewise.
    pub manifest: File,
    /// The packs that it names.
    pub known: Arc<KnownPacks>,
}

/// What is kept now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[schemars(rename = "KeptMemoryUsage")]
pub struct Usage {
    /// Sandboxes.
    pub sandboxes: usize,
    /// Bytes allocated to their memory files.
    pub bytes: u64,
    /// Bytes that may be kept.
    pub budget: u64,
    /// Wakes that found their memory here.
    pub hits: u64,
    /// Wakes that did not.
    pub misses: u64,
    /// Entries that were dropped to make room or for want of memory.
    pub evicted: u64,
}

/// The cache.
#[derive(Debug)]
pub struct KeptMemory {
    budget: u64,
    entries: Mutex<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    kept: HashMap<SandboxId, Entry>,
    puts: u64,
    hits: u64,
    misses: u64,
    evicted: u64,
}

#[derive(Debug)]
struct Entry {
    digest: Digest,
    kept: Kept,
    bytes: u64,
    put: u64,
}

/// Which of these entries (key, bytes, age: the smaller the older) must go so that at most `budget` bytes are left: the oldest first.
fn victims<K: Clone>(entries: impl Iterator<Item = (K, u64, u64)>, budget: u64) -> Vec<K> {
    let mut entries: Vec<_> = entries.collect();
    let mut total: u64 = entries.iter().map(|(_, bytes, _)| bytes).sum();
    entries.sort_unstable_by_key(|(_, _, age)| *age);
    let mut out = Vec::new();
    for (key, bytes, _) in entries {
        if total <= budget {
            break;
        }
        total -= bytes;
        out.push(key);
    }
    out
}

impl KeptMemory {
    /// One that keeps at most `budget` bytes; with 0 nothing.
    pub fn new(budget: u64) -> Self {
        Self { budget, entries: Mutex::default() }
    }

    /// Whether anything is kept at all.
    pub fn is_on(&self) -> bool {
        self.budget > 0
    }

    /// Keeps the memory of `sandbox` as of the manifest with this digest, in place of what was kept of it before.
    pub fn put(&self, sandbox: &SandboxId, digest: Digest, kept: Kept) {
        let bytes = match kept.memory.metadata() {
            Ok(found) => found.blocks() * STAT_BLOCK,
            Err(error) => {
                tracing::warn!(%error, %sandbox, "a memory file cannot be looked at and is not kept");
                return release(vec![kept]);
            }
        };
        let mut entries = self.entries();
        entries.puts += 1;
        let put = entries.puts;
        let old = entries.kept.insert(sandbox.clone(), Entry { digest, kept, bytes, put });
        let mut gone = entries.shrink(self.budget);
        drop(entries);
        gone.extend(old.map(|entry| entry.kept));
        release(gone);
    }

    /// Moves out what is kept of `sandbox`, if it is of the manifest with this digest; what is of another is dropped.
    pub fn take(&self, sandbox: &SandboxId, digest: Digest) -> Option<Kept> {
        let mut entries = self.entries();
        let found = entries.kept.remove(sandbox);
        let hit = found.as_ref().is_some_and(|entry| entry.digest == digest);
        *(if hit { &mut entries.hits } else { &mut entries.misses }) += 1;
        drop(entries);
        let kept = found?.kept;
        if hit {
            return Some(kept);
        }
        release(vec![kept]);
        None
    }

    /// Drops what is kept of `sandbox`.
    pub fn forget(&self, sandbox: &SandboxId) {
        let found = self.entries().kept.remove(sandbox);
        release(found.into_iter().map(|entry| entry.kept).collect());
    }

    /// Drops the oldest until at most `bytes` are kept.
    pub fn shrink_to(&self, bytes: u64) {
        let gone = self.entries().shrink(bytes);
        release(gone);
    }

    /// What is kept now.
    pub fn usage(&self) -> Usage {
        let entries = self.entries();
        Usage {
            sandboxes: entries.kept.len(),
            bytes: entries.kept.values().map(|entry| entry.bytes).sum(),
            budget: self.budget,
            hits: entries.hits,
            misses: entries.misses,
            evicted: entries.evicted,
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Each critical section inserts or removes whole entries.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    fn shrink(&mut self, budget: u64) -> Vec<Kept> {
        let victims = victims(self.kept.iter().map(|(id, entry)| (id.clone(), entry.bytes, entry.put)), budget);
        self.evicted += victims.len() as u64;
        victims.iter().filter_map(|id| self.kept.remove(id)).map(|entry| entry.kept).collect()
    }
}

/// Closes memory files where it may take its time.
fn release(gone: Vec<Kept>) {
    if gone.is_empty() {
        return;
    }
    if tokio::runtime::Handle::try_current().is_ok() {
        tokio::task::spawn_blocking(move || drop(gone));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn kept(kib: usize) -> Kept {
        let mut memory = tempfile::tempfile().unwrap();
        memory.write_all(&vec![1; kib << 10]).unwrap();
        let file = || tempfile::tempfile().unwrap();
        Kept { memory: Arc::new(memory), notes: file(), manifest: file(), known: Arc::default() }
    }

    fn id(text: &str) -> SandboxId {
        SandboxId::parse(text).unwrap()
    }

    #[test]
    fn the_oldest_go_first_and_no_more_than_needed() {
        let entries = [("a", 10, 3), ("b", 20, 1), ("c", 30, 2)];
        assert_eq!(victims(entries.into_iter(), 60), Vec::<&str>::new());
        assert_eq!(victims(entries.into_iter(), 59), ["b"]);
        assert_eq!(victims(entries.into_iter(), 39), ["b", "c"]);
        assert_eq!(victims(entries.into_iter(), 0), ["b", "c", "a"]);
    }

    #[test]
    fn an_entry_is_taken_once_and_only_for_its_manifest() {
        let cache = KeptMemory::new(1 << 20);
        let (one, two) = (Digest::of(b"1"), Digest::of(b"2"));
        cache.put(&id("sbx-a"), one, kept(4));
        assert!(cache.take(&id("sbx-a"), one).is_some());
        assert!(cache.take(&id("sbx-a"), one).is_none());
        cache.put(&id("sbx-a"), one, kept(4));
        assert!(cache.take(&id("sbx-a"), two).is_none());
        assert_eq!(cache.usage().sandboxes, 0, "what is of another manifest is of no use");
        assert_eq!((cache.usage().hits, cache.usage().misses), (1, 2));
    }

    #[test]
    fn the_budget_is_of_allocated_bytes() {
        let cache = KeptMemory::new(100 << 10);
        for name in ["sbx-a", "sbx-b", "sbx-c"] {
            cache.put(&id(name), Digest::of(b"1"), kept(40));
        }
        assert_eq!(cache.usage().sandboxes, 2);
        assert!(cache.take(&id("sbx-a"), Digest::of(b"1")).is_none());
        cache.put(&id("sbx-d"), Digest::of(b"1"), kept(200));
        assert_eq!(cache.usage().sandboxes, 0, "one that is larger than the budget is not kept");
        cache.put(&id("sbx-e"), Digest::of(b"1"), kept(4));
        cache.shrink_to(0);
        assert_eq!(cache.usage().bytes, 0);
    }
}
