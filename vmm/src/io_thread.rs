//! The thread that does all device work: one event loop, and a gate at which it can be held.
//!
//! While the gate is closed the loop stands between two events, so nothing is in flight in any device (the contract of
//! [`stasis_devices`]). The gate is closed after the vCPUs have stopped and opened before they run again.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use stasis_devices::virtio::mmio::MmioDevice;
use vmm_sys_util::eventfd::EventFd;

use crate::seccomp::{self, Role};
use crate::turns::Turns;

/// How long the loop may take to reach the gate: one event's work, which devices bound.
const GATE_DEADLINE: Duration = Duration::from_secs(30);

/// The event loop cannot be started or does not answer.
#[derive(Debug, thiserror::Error)]
pub enum IoThreadError {
    /// It could not be set up.
    #[error("cannot start the device thread: {what}")]
    Start {
        /// What failed.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It did not reach the gate in time, or is gone.
    #[error("the device thread does not stop: a device has been busy for {} s", GATE_DEADLINE.as_secs())]
    Stuck,
}

/// Held while the loop stands still. Dropping it lets the loop go on.
pub(crate) struct Closed {
    _open: SyncSender<()>,
}

/// What the gate is told.
enum Order {
    /// Say so on the first, then wait until the second is dropped.
    Hold {
        reached: SyncSender<()>,
        open: Receiver<()>,
    },
    Quit,
}

struct Gate {
    orders: Receiver<Order>,
    bell: EventFd,
    quit: bool,
}

impl Gate {
    fn process(&mut self) {
        let _ = self.bell.read();
        while let Ok(order) = self.orders.try_recv() {
            match order {
                Order::Hold { reached, open } => {
                    if reached.send(()).is_ok() {
                        // Ends when the other end is dropped: nothing is ever sent.
                        let _ = open.recv();
                    }
                }
                Order::Quit => self.quit = true,
            }
        }
    }
}

/// The gate as the loop sees it, shared with the thread that asks whether to quit.
struct GateSubscriber(Arc<Mutex<Gate>>);

impl MutEventSubscriber for GateSubscriber {
    fn process(&mut self, _: Events, _: &mut EventOps) {
        crate::bus::lock(&self.0).process();
    }

    fn init(&mut self, ops: &mut EventOps) {
        let gate = crate::bus::lock(&self.0);
        if let Err(error) = ops.add(Events::new(&gate.bell, EventSet::IN)) {
            tracing::error!(%error, "the device thread cannot be stopped");
        }
    }
}

/// A device as the loop sees it.
struct DeviceSubscriber(Arc<Turns<MmioDevice>>);

impl MutEventSubscriber for DeviceSubscriber {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        self.0.lock_next().process(events, ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        self.0.lock_next().init(ops);
    }
}

/// The handle of the device thread.
pub(crate) struct IoThread {
    orders: SyncSender<Order>,
    bell: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts the loop for these devices, with the gate open.
    pub(crate) fn start(devices: &[Arc<Turns<MmioDevice>>]) -> Result<Self, IoThreadError> {
        fn fail<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
            what: &'static str,
        ) -> impl FnOnce(E) -> IoThreadError {
            move |source| IoThreadError::Start { what, source: source.into() }
        }
        let bell = EventFd::new(libc::EFD_NONBLOCK).map_err(fail("eventfd"))?;
        let (orders, inbox) = sync_channel(4);
        let gate =
            Arc::new(Mutex::new(Gate { orders: inbox, bell: bell.try_clone().map_err(fail("eventfd"))?, quit: false }));
        let mut manager: EventManager<Box<dyn MutEventSubscriber + Send>> =
            EventManager::new().map_err(|e| fail("epoll")(std::io::Error::other(e.to_string())))?;
        manager.add_subscriber(Box::new(GateSubscriber(gate.clone())));
        for device in devices {
            manager.add_subscriber(Box::new(DeviceSubscriber(device.clone())));
        }
        let thread = std::thread::Builder::new()
            .name("devices".to_owned())
            .spawn(move || {
                seccomp::enter(Role::Devices);
                while !crate::bus::lock(&gate).quit {
                    if let Err(error) = manager.run() {
                        tracing::error!(%error, "device event loop");
                        return;
                    }
                }
            })
            .map_err(fail("thread"))?;
        Ok(Self { orders, bell, thread: Some(thread) })
    }

    fn order(&self, order: Order) -> Result<(), IoThreadError> {
        self.orders.try_send(order).map_err(|_| IoThreadError::Stuck)?;
        self.bell.write(1).map_err(|_| IoThreadError::Stuck)
    }

    /// Stops the loop between two events.
    pub(crate) fn close_gate(&self) -> Result<Closed, IoThreadError> {
        let (reached_tx, reached) = sync_channel(1);
        let (open_tx, open) = sync_channel(1);
        self.order(Order::Hold { reached: reached_tx, open })?;
        reached.recv_timeout(GATE_DEADLINE).map_err(|_| IoThreadError::Stuck)?;
        Ok(Closed { _open: open_tx })
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        if self.order(Order::Quit).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}
