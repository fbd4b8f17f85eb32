//! A machine's life: made ahead, booted or restored, paused, resumed, its memory kept.

use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stasis_snapshot::capture::Options;
use stasis_snapshot::pager::PackCache;
use stasis_snapshot::seal::DataKeys;

use super::Server;
use super::capture::Running;
use crate::control::refusal::{Refusal, failed};
use crate::control::types::{
    BootRequest, KeepRequest, PauseReport, PrepareRequest, RestoreReport, RestoreRequest, VmState, VmStatus,
};
use crate::dirty::Then;
use crate::machine::kept::Kept;
use crate::machine::reboot::{Stored, reboot};
use crate::machine::restore::{self, RestoreFailed};
use crate::machine::{self, Backends, BootFiles, Machine};

/// Longest notes on kept memory: 16 bytes a page of the largest machine, and runs.
const MAX_NOTES: u64 = 64 << 20;

/// How long the working set is recorded after a wake.
const RECORD_WORKING_SET: Duration = Duration::from_secs(10);

impl Server {
    pub(super) async fn prepare_for(&self, request: PrepareRequest) -> Result<(), Refusal> {
        let slot = self.machine.lock().await;
        self.only_in(VmState::Empty, slot.as_deref(), "a preparation").await?;
        let bare = tokio::task::block_in_place(|| {
            crate::heap::make_ready();
            machine::make_ready(request.vcpus, request.memory_mib, &self.settings.host)
        });
        *self.ready.lock().await = Some(bare.map_err(failed)?);
        Ok(())
    }

    pub(super) async fn boot(&self, request: BootRequest) -> Result<VmStatus, Refusal> {
        let mut slot = self.machine.lock().await;
        self.only_in(VmState::Empty, slot.as_deref(), "a boot").await?;
        let files = BootFiles {
            kernel: self.take("kernel", request.kernel)?,
            initramfs: request.initramfs.map(|token| self.take("initramfs", token)).transpose()?,
            cmdline: request.cmdline,
            memory: request.memory.map(|token| self.take("memory", token)).transpose()?,
        };
        let backends = Backends {
            disks: self.disks(request.disks)?,
            tap: request.tap.map(|token| self.take("tap", token)).transpose()?.map(OwnedFd::from),
        };
        let ready = self.ready.lock().await.take();
        let machine = match request.disks_from {
            None => {
                tokio::task::block_in_place(|| Machine::boot(&request.machine, ready, files, backends, self.host()))
                    .map_err(failed)?
            }
            Some(from) => {
                let manifest = self.manifest(from.manifest, &from.manifest_digest)?;
                let packs = self.granted(from.packs)?;
                let cache_files = packs.cache_files();
                let stored = Stored {
                    manifest,
                    keys: DataKeys::new(from.keys),
                    packs: Arc::new(packs),
                    cache: (!cache_files.is_empty()).then(|| Arc::new(PackCache::new(cache_files))),
                    connections: from.connections,
                };
                reboot(&request.machine, ready, files, backends, self.host(), stored).await.map_err(failed)?
            }
        };
        *slot = Some(Box::new(machine));
        self.belongs_to(request.id);
        Ok(self.describe(slot.as_deref()).await)
    }

    /// There is one machine in a life, so the first answer stays.
    fn belongs_to(&self, sandbox: Option<String>) {
        if let Some(id) = sandbox {
            self.sandbox.get_or_init(|| id);
        }
    }

    pub(super) async fn restore(&self, request: RestoreRequest) -> Result<RestoreReport, Refusal> {
        let mut slot = self.machine.lock().await;
        self.only_in(VmState::Empty, slot.as_deref(), "a restore").await?;
        let started = Instant::now();
        let mut manifest = self.manifest(request.manifest, &request.manifest_digest)?;
        let keys = DataKeys::new(request.keys);
        manifest.open_state(&keys).map_err(failed)?;
        let packs = self.granted(request.packs)?;
        let cache_files = packs.cache_files();
        let kept = match request.kept {
            None => None,
            Some(token) => Some(Kept::read(&mut self.take("kept notes", token)?.take(MAX_NOTES)).map_err(failed)?),
        };
        let input = restore::Input {
            ready: self.ready.lock().await.take(),
            packs: Arc::new(packs),
            keys,
            cache: (!cache_files.is_empty()).then(|| Arc::new(PackCache::new(cache_files))),
            memory: request.memory.map(|token| self.take("memory", token)).transpose()?,
            kept,
            paging: request.paging,
            backends: Backends {
                disks: self.disks(request.disks)?,
                tap: request.tap.map(|token| self.take("tap", token)).transpose()?.map(OwnedFd::from),
            },
            network_limits: request.network_limits,
            generation_id: generation_id(&request.generation_id)?,
            host: self.host(),
        };
        let manifest_us = started.elapsed().as_micros() as u64;
        let (machine, report) = restore::restore(manifest, input).await.map_err(|e: RestoreFailed| failed(e))?;
        *slot = Some(Box::new(machine));
        self.belongs_to(request.id);
        Ok(RestoreReport { manifest_us, ..report })
    }

    pub(super) async fn pause(&self) -> Result<PauseReport, Refusal> {
        let mut slot = loop {
            self.end_round().await;
            let slot = self.machine.lock().await;
            // One that began in between is ended, too; none begins while this is held.
            if !self.capture.lock().await.as_ref().is_some_and(Running::is_round) {
                break slot;
            }
        };
        // What a staged capture sends must not be collected once more before it is settled.
        let staged = self.capture.lock().await.is_some();
        let state = if staged { VmState::Capturing } else { self.state(slot.as_deref()).await };
        let (Some(machine), VmState::Running | VmState::Paused) = (slot.as_deref_mut(), state) else {
            return Err(Refusal::WrongState { state, what: "a pause" });
        };
        tokio::task::block_in_place(|| {
            let stop = machine.pause().map_err(failed)?;
            let counts = machine.collect_dirty(&Options::default(), Then::Leave).map_err(failed)?;
            Ok(PauseReport {
                dirty_memory_pages: counts.memory_pages,
                dirty_disk_blocks: counts.disk_blocks,
                packs_needed: counts.packs_needed,
                stop_us: stop.as_micros() as u64,
            })
        })
    }

    pub(super) async fn keep(&self, request: KeepRequest) -> Result<(), Refusal> {
        let slot = self.machine.lock().await;
        self.only_in(VmState::Paused, slot.as_deref(), "keeping its memory").await?;
        let Some(machine) = slot.as_deref() else {
            return Err(Refusal::WrongState { state: VmState::Empty, what: "keeping its memory" });
        };
        let mut notes = self.take("kept notes", request.notes)?;
        tokio::task::block_in_place(|| machine.keep(&mut notes)).map_err(failed)
    }

    pub(super) async fn resume(self: &Arc<Self>) -> Result<VmStatus, Refusal> {
        let mut slot = self.machine.lock().await;
        self.only_in(VmState::Paused, slot.as_deref(), "a resume").await?;
        if let Some(machine) = slot.as_deref_mut() {
            tokio::task::block_in_place(|| machine.resume()).map_err(failed)?;
        }
        self.record_working_set();
        Ok(self.describe(slot.as_deref()).await)
    }

    /// Ends the recording of the working set some time after a wake.
    fn record_working_set(self: &Arc<Self>) {
        let server = Arc::downgrade(self);
        tokio::spawn(async move {
            tokio::time::sleep(RECORD_WORKING_SET).await;
            if let Some(server) = server.upgrade()
                && let Some(machine) = server.machine.lock().await.as_deref()
            {
                tokio::task::block_in_place(|| {
                    machine.close_working_set();
                    crate::heap::give_back();
                });
            }
        });
    }
}

fn generation_id(hex: &str) -> Result<[u8; 16], Refusal> {
    u128::from_str_radix(hex, 16)
        .ok()
        // `from_str_radix` alone would take a sign.
        .filter(|_| hex.len() == 32 && hex.bytes().all(|digit| digit.is_ascii_hexdigit()))
        .map(u128::to_be_bytes)
        .ok_or_else(|| Refusal::BadRequest("generation_id must be 32 hexadecimal digits".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_ids_are_16_bytes_of_hex() {
        assert_eq!(generation_id("000102030405060708090a0b0c0d0e0f").unwrap()[..3], [0, 1, 2]);
        for bad in ["", "00", "zz0102030405060708090a0b0c0d0e0f", "+00102030405060708090a0b0c0d0e0f"] {
            assert!(generation_id(bad).is_err(), "{bad}");
        }
    }
}
