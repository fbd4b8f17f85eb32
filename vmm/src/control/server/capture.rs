//! Captures: one at a time, in each of its modes, and what ends it early.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stasis_snapshot::capture::{self, Options};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Server;
use crate::control::refusal::{Refusal, failed};
use crate::control::types::{CaptureMode, CaptureReport, CaptureRequest, DirtyReport, VmState};
use crate::machine::capture::{Content, Order};
use crate::machine::staging::Staging;
use crate::machine::{Machine, MachineError};

/// A capture that runs.
pub(super) struct Running {
    pub(super) cancel: CancellationToken,
    /// Cancelled when it has ended.
    done: CancellationToken,
    mode: CaptureMode,
    /// PUTs in flight at most.
    pub(super) share: watch::Sender<u16>,
}

impl Running {
    pub(super) fn is_round(&self) -> bool {
        self.mode == CaptureMode::Round
    }
}

/// A capture about to start.
struct Prepared {
    request: capture::CaptureRequest,
    content: Content,
    stop_us: u64,
}

impl Server {
    /// A round that runs is cancelled and waited for: what it sent stays sent.
    pub(super) async fn end_round(&self) {
        loop {
            let done = match &*self.capture.lock().await {
                Some(running) if running.is_round() => {
                    running.cancel.cancel();
                    running.done.clone()
                }
                _ => return,
            };
            done.cancelled().await;
        }
    }

    pub(super) async fn dirty(&self) -> Result<DirtyReport, Refusal> {
        let slot = self.machine.lock().await;
        let Some(machine) = slot.as_deref() else {
            return Err(Refusal::WrongState { state: VmState::Empty, what: "a look at what is dirty" });
        };
        let counts = tokio::task::block_in_place(|| machine.estimate_dirty(&Options::default())).map_err(failed)?;
        Ok(DirtyReport {
            memory_pages: counts.memory_pages,
            disk_blocks: counts.disk_blocks,
            packs_needed: counts.packs_needed,
        })
    }

    /// What a capture is prepared from, in its mode; the machine is as the mode leaves it.
    fn prepare(
        machine: &mut Machine,
        mode: CaptureMode,
        order: Order,
        staging: Option<Staging>,
    ) -> Result<Prepared, MachineError> {
        match (mode, staging) {
            (CaptureMode::Round, _) => {
                Ok(Prepared { request: machine.prepare_round(order)?, content: Content::None, stop_us: 0 })
            }
            (CaptureMode::Disks, _) => {
                Ok(Prepared { request: machine.prepare_disks(order)?, content: Content::Disks, stop_us: 0 })
            }
            (CaptureMode::Staged, Some(staging)) => {
                let (request, state, stop_us) = machine.prepare_staged(order, staging)?;
                Ok(Prepared { request, content: Content::Machine(state), stop_us })
            }
            (CaptureMode::Stopped | CaptureMode::Staged, _) => {
                let (request, state) = machine.prepare_stopped(order)?;
                Ok(Prepared { request, content: Content::Machine(state), stop_us: 0 })
            }
        }
    }

    pub(super) async fn capture(&self, request: CaptureRequest) -> Result<(Vec<u8>, CaptureReport), Refusal> {
        let connections = request.connections.max(1);
        let memory = request.memory_bytes.unwrap_or(Options::default().memory);
        let options = Options { connections, memory, ..Options::default() };
        let cancel = CancellationToken::new();
        let sink = Arc::new(self.granted(request.packs)?);
        let (share, share_changes) = watch::channel(connections);
        let running = Running { cancel: cancel.clone(), done: CancellationToken::new(), mode: request.mode, share };
        // Whatever happens, those that wait for the end of this capture hear of it.
        let _done = running.done.clone().drop_guard();
        let prepared = {
            let mut slot = self.machine.lock().await;
            let wanted = match request.mode {
                CaptureMode::Stopped | CaptureMode::Disks => VmState::Paused,
                CaptureMode::Round | CaptureMode::Staged => VmState::Running,
            };
            self.only_in(wanted, slot.as_deref(), "a capture").await?;
            let mut current = self.capture.lock().await;
            let (Some(machine), None) = (slot.as_deref_mut(), &*current) else {
                return Err(Refusal::WrongState { state: VmState::Capturing, what: "a capture" });
            };
            let order =
                Order { sink, options, connections: share_changes, cancel: cancel.clone(), seal: request.seal.clone() };
            let prepared = tokio::task::block_in_place(|| {
                // Made before the guest stops.
                let staging = match request.mode {
                    CaptureMode::Staged => Some(Staging::with_room(machine.estimate_dirty(&options)?.memory_pages)),
                    CaptureMode::Stopped | CaptureMode::Disks | CaptureMode::Round => None,
                };
                Self::prepare(machine, request.mode, order, staging)
            })
            .map_err(failed)?;
            *current = Some(running);
            prepared
        };
        let started = Instant::now();
        let deadline = Duration::from_millis(request.deadline_ms);
        let mut sending = std::pin::pin!(capture::capture(prepared.request));
        let mut late = false;
        let outcome = tokio::select! {
            outcome = &mut sending => outcome,
            () = tokio::time::sleep(deadline) => {
                late = true;
                cancel.cancel();
                // A cancelled capture ends by itself, and must be waited for: it may be reading memory.
                sending.await
            }
        };
        let upload_us = started.elapsed().as_micros() as u64;
        let mut slot = self.machine.lock().await;
        *self.capture.lock().await = None;
        let Some(machine) = slot.as_deref_mut() else {
            return Err(Refusal::WrongState { state: VmState::Empty, what: "a capture" });
        };
        let stats = outcome.as_ref().map(|c| c.stats).unwrap_or_default();
        let state_us = prepared.content.micros();
        let finish = || machine.finish_capture(prepared.content, outcome, request.seal.as_ref());
        let draft = tokio::task::block_in_place(finish).map_err(|e| match (late, cancel.is_cancelled()) {
            (true, _) => Refusal::TooSlow,
            (false, true) => Refusal::Cancelled,
            (false, false) => failed(e),
        })?;
        if request.mode != CaptureMode::Stopped {
            tokio::spawn(crate::heap::quiet_down());
        }
        let report = CaptureReport {
            state_us,
            upload_us,
            scanned_pages: stats.scanned_pages,
            zero_pages: stats.zero_pages,
            base_pages: stats.base_pages,
            unchanged_pages: stats.unchanged_pages,
            stop_us: prepared.stop_us,
            sent_pages: stats.sent_pages,
            sent_bytes: stats.sent_bytes,
            packs: stats.packs,
            cpu_us: stats.cpu_us,
        };
        Ok((draft, report))
    }
}
