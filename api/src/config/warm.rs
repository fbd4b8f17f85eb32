//! What a host keeps ready so that sandboxes wake soon: their memory, their packs, started VMMs, booted templates. Everything here may be
//! switched off, and is lost without harm.

use super::ConfigError;
use serde::Deserialize;
use std::path::Path;

/// The share of a file system that the pack cache takes by default, in percent.
const PACK_CACHE_PERCENT: u64 = 10;
/// And no more than this, MiB.
const PACK_CACHE_MOST_MIB: u64 = 20 << 10;
/// VMMs started ahead at most.
const MAX_POOL: u16 = 64;

/// What is kept ready.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Warm {
    /// Memory of paused sandboxes kept on this host, MiB in all; 0 keeps none. A quarter of the memory of this host when absent.
    pub keep_memory_mib: Option<u64>,
    /// VMM processes started ahead; 0 starts none.
    pub vmm_pool: u16,
    /// Packs kept on the local disk, MiB in all; 0 keeps none. A tenth of the data directory's file system, at most 20 GiB, when absent.
    pub pack_cache_mib: Option<u64>,
    /// Start sandboxes from a capture of their booted template.
    pub golden: bool,
    /// Pages of a woken sandbox that nobody asked for are fetched at this rate at most, MiB a second; 0 leaves them where they are.
    pub sweep_mib_per_second: u32,
    /// Let the host give huge pages to memory files that ask for them, which Linux by default does not: guests then fault 512 times less
    /// often after a wake and after a snapshot.
    pub huge_pages: bool,
}

impl Default for Warm {
    fn default() -> Self {
        Self {
            keep_memory_mib: None,
            vmm_pool: 2,
            pack_cache_mib: None,
            golden: true,
            sweep_mib_per_second: 256,
            huge_pages: true,
        }
    }
}

impl Warm {
    pub(super) fn check(&self) -> Result<(), ConfigError> {
        if self.vmm_pool > MAX_POOL {
            return Err(ConfigError::Value {
                field: "warm.vmm_pool".to_owned(),
                error: format!("must be at most {MAX_POOL}, not {}", self.vmm_pool),
            });
        }
        Ok(())
    }

    /// Bytes of kept memory, on a host with `host_bytes` of memory.
    pub fn keep_memory_bytes(&self, host_bytes: u64) -> u64 {
        self.keep_memory_mib.map_or(host_bytes / 4, |mib| mib.saturating_mul(1 << 20))
    }

    /// Bytes of the pack cache in `dir`.
    pub fn pack_cache_bytes(&self, dir: &Path) -> u64 {
        self.pack_cache_mib.unwrap_or_else(|| default_pack_cache_mib(file_system_bytes(dir))).saturating_mul(1 << 20)
    }
}

fn default_pack_cache_mib(file_system_bytes: u64) -> u64 {
    ((file_system_bytes / 100 * PACK_CACHE_PERCENT) >> 20).min(PACK_CACHE_MOST_MIB)
}

/// Size of the file system that holds `dir`; 0 when it cannot be asked.
fn file_system_bytes(dir: &Path) -> u64 {
    rustix::fs::statvfs(dir).map_or(0, |found| found.f_blocks.saturating_mul(found.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_said_depends_on_the_host() {
        let warm = Warm::default();
        assert_eq!(warm.keep_memory_bytes(8 << 30), 2 << 30);
        let off = Warm { keep_memory_mib: Some(0), pack_cache_mib: Some(0), ..warm };
        assert_eq!((off.keep_memory_bytes(8 << 30), off.pack_cache_bytes(Path::new("/"))), (0, 0));
        assert_eq!(default_pack_cache_mib(100 << 30), 10 << 10);
        assert_eq!(default_pack_cache_mib(1 << 50), 20 << 10);
        assert!(file_system_bytes(Path::new("/")) > 0);
    }
}
