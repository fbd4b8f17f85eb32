//! The machine's devices: made or restored in window order, put on the bus, wired to their interrupt lines and doorbells.
//!
//! Windows: disks first, then vsock, then rng, then net. The order is part of the machine's shape, so a restored guest finds each where it was.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, VmFd};
use stasis_devices::exit_counter::{ExitCounter, ExitCounterState};
use stasis_devices::serial::{Serial, SerialState};
use stasis_devices::virtio::VirtioDevice;
use stasis_devices::virtio::block::{Block, ID_BYTES};
use stasis_devices::virtio::mmio::{MmioDevice, MmioState, QUEUE_NOTIFY};
use stasis_devices::virtio::net::{Net, NetCounters};
use stasis_devices::virtio::rng::Rng;
use stasis_devices::virtio::vsock::{Vsock, VsockConfig};
use stasis_devices::vmgenid::{VmGenId, VmGenIdState};
use stasis_snapshot::manifest::StateBlob;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use super::disk::Disk;
use super::spec::{self, MachineSpec, SpecError};
use super::{Backends, Host};
use crate::bus::{Bus, lock};
use crate::console::ConsoleLog;
use crate::control::types::{NetworkMetrics, Traffic};
use crate::kvm::{During, KvmError};
use crate::layout;
use crate::memory::GuestRam;
use crate::turns::Turns;

/// A device cannot be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// A host resource that it needs.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Its place on the bus.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Its saved state does not fit it.
    #[error("cannot restore {kind}")]
    Restore {
        /// Which.
        kind: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Its saved state is missing or of another version.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

fn host(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> DeviceError {
    let what = what.into();
    move |source| DeviceError::Host { what, source }
}

fn bad_state<E: Into<Box<dyn std::error::Error + Send + Sync>>>(kind: &str) -> impl FnOnce(E) -> DeviceError {
    let kind = kind.to_owned();
    move |source| DeviceError::Restore { kind, source: source.into() }
}

/// All devices of a machine.
pub(crate) struct DeviceSet {
    serial: Arc<Mutex<Serial>>,
    console_bytes: Arc<AtomicU64>,
    console_lost: Arc<AtomicU64>,
    exit_counter: Option<Arc<Mutex<ExitCounter>>>,
    virtio: Vec<Arc<Turns<MmioDevice>>>,
    /// Of each disk, read without the device's lock.
    block_requests: Vec<Arc<AtomicU64>>,
    network: Option<Arc<NetCounters>>,
    generation: VmGenId,
    pub(crate) disks: Vec<Disk>,
    /// The interrupt of a new generation id is still owed: it may go out only when the vCPUs are restored.
    new_generation: bool,
}

/// An interrupt line into the in-kernel controllers. Edge triggered: nothing has to be saved of it.
fn irq(vm: &VmFd, gsi: u32) -> Result<EventFd, DeviceError> {
    let event = EventFd::new(libc::EFD_NONBLOCK).map_err(host("create an eventfd"))?;
    vm.register_irqfd(&event, gsi).during("connect an interrupt line")?;
    Ok(event)
}

fn console(place: &Host) -> Result<ConsoleLog, DeviceError> {
    let [log, older] = &place.files.console;
    let rate = place.limits.console_bytes_per_second;
    let opened = log.try_clone().and_then(|log| ConsoleLog::new(log, older.try_clone()?, rate));
    opened.map_err(host("begin the console log"))
}

/// Virtio models in window order.
type Models = Vec<Box<dyn VirtioDevice>>;

/// The virtio models, and the counters of the network device.
fn models(
    machine: &MachineSpec,
    disks: &[Disk],
    tap: Option<OwnedFd>,
    place: &Host,
) -> Result<(Models, Option<Arc<NetCounters>>), DeviceError> {
    let mut models = Models::new();
    for (n, disk) in disks.iter().enumerate() {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(format!("stasis-disk{n}").bytes()) {
            *to = from;
        }
        models.push(Box::new(Block::new(disk.overlay.clone(), id)));
    }
    if let Some(cid) = machine.vsock_cid {
        let listener = place.files.take_vsock().map_err(host("listen for the vsock device"))?;
        let config =
            VsockConfig { connects_per_second: place.limits.vsock_connects_per_second, ..VsockConfig::new(cid) };
        let vsock = Vsock::new(config, listener).map_err(host("create the vsock device"))?;
        models.push(Box::new(vsock));
    }
    models.push(Box::new(Rng::new()));
    let counters = match &machine.network {
        Some(network) => {
            let net = Net::new(network.device(), tap).map_err(host("create the network device"))?;
            let counters = net.counters();
            models.push(Box::new(net));
            Some(counters)
        }
        None if tap.is_some() => return Err(SpecError::TapWithoutNetwork.into()),
        None => None,
    };
    Ok((models, counters))
}

impl DeviceSet {
    /// Devices after power-on.
    pub(crate) fn new(
        machine: &MachineSpec,
        backends: Backends,
        ram: &GuestRam,
        vm: &VmFd,
        place: &Host,
    ) -> Result<Self, DeviceError> {
        let Backends { disks, tap } = backends;
        let console = console(place)?;
        let console_lost = console.lost();
        let serial = Serial::new(irq(vm, layout::SERIAL_GSI)?, Box::new(console));
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| host("draw a generation id")(e.into()))?;
        let generation = VmGenId::new(ram.guest_memory(), GuestAddress(layout::VMGENID), irq(vm, layout::GED_GSI)?, id)
            .map_err(bad_state("vmgenid"))?;
        let exit_counter = machine.exit_counter.then(ExitCounter::new);
        let (models, network) = models(machine, &disks, tap, place)?;
        let virtio = Self::place(models, ram, vm)?;
        Ok(Self::from_parts((serial, console_lost), exit_counter, virtio, network, generation, disks, false))
    }

    /// Devices in their saved state, over restored memory, with a generation id that no other restore has.
    pub(crate) fn restore(
        machine: &MachineSpec,
        state: &[StateBlob],
        backends: Backends,
        ram: &GuestRam,
        vm: &VmFd,
        place: &Host,
        generation_id: [u8; 16],
    ) -> Result<Self, DeviceError> {
        let Backends { disks, tap } = backends;
        let saved: SerialState = spec::unblob(state, SERIAL, SerialState::VERSION)?;
        let console = console(place)?;
        let console_lost = console.lost();
        let serial =
            Serial::restore(&saved, irq(vm, layout::SERIAL_GSI)?, Box::new(console)).map_err(bad_state(SERIAL))?;
        let exit_counter = if machine.exit_counter {
            Some(ExitCounter::restore(&spec::unblob(state, EXIT_COUNTER, ExitCounterState::VERSION)?))
        } else {
            None
        };
        let saved: VmGenIdState = spec::unblob(state, VMGENID, VmGenIdState::VERSION)?;
        let generation = VmGenId::restore(ram.guest_memory(), &saved, irq(vm, layout::GED_GSI)?, generation_id)
            .map_err(bad_state(VMGENID))?;
        let (models, network) = models(machine, &disks, tap, place)?;
        let virtio = Self::place(models, ram, vm)?;
        for (window, device) in virtio.iter().enumerate() {
            let kind = virtio_kind(window);
            let saved: MmioState = spec::unblob(state, &kind, MmioState::VERSION)?;
            device.lock().restore(&saved).map_err(bad_state(&kind))?;
        }
        Ok(Self::from_parts((serial, console_lost), exit_counter, virtio, network, generation, disks, true))
    }

    fn from_parts(
        (serial, console_lost): (Serial, Arc<AtomicU64>),
        exit_counter: Option<ExitCounter>,
        virtio: Vec<Arc<Turns<MmioDevice>>>,
        network: Option<Arc<NetCounters>>,
        generation: VmGenId,
        disks: Vec<Disk>,
        new_generation: bool,
    ) -> Self {
        Self {
            console_bytes: serial.bytes_written(),
            console_lost,
            serial: Arc::new(Mutex::new(serial)),
            exit_counter: exit_counter.map(|c| Arc::new(Mutex::new(c))),
            block_requests: virtio.iter().take(disks.len()).map(|disk| disk.lock().completed()).collect(),
            virtio,
            network,
            generation,
            disks,
            new_generation,
        }
    }

    /// Puts models behind transports, connects interrupt lines and doorbells.
    fn place(
        models: Vec<Box<dyn VirtioDevice>>,
        ram: &GuestRam,
        vm: &VmFd,
    ) -> Result<Vec<Arc<Turns<MmioDevice>>>, DeviceError> {
        let mut placed = Vec::new();
        for (model, window) in models.into_iter().zip(0_u32..layout::VIRTIO_WINDOWS) {
            let line = irq(vm, layout::VIRTIO_GSI_BASE + window)?;
            let device =
                MmioDevice::new(model, ram.guest_memory().clone(), line).map_err(host("create a virtio device"))?;
            let doorbell = layout::VIRTIO_MMIO_BASE + u64::from(window) * layout::VIRTIO_MMIO_SIZE + QUEUE_NOTIFY;
            for (event, queue) in device.queue_events().iter().zip(0_u32..) {
                vm.register_ioevent(event, &IoEventAddress::Mmio(doorbell), queue).during("connect a doorbell")?;
            }
            placed.push(Arc::new(Turns::new(device)));
        }
        Ok(placed)
    }

    pub(crate) fn bus(&self) -> Bus {
        Bus { serial: self.serial.clone(), exit_counter: self.exit_counter.clone(), virtio: self.virtio.clone() }
    }

    pub(crate) fn virtio(&self) -> &[Arc<Turns<MmioDevice>>] {
        &self.virtio
    }

    pub(crate) fn windows(&self) -> u32 {
        self.virtio.len() as u32
    }

    /// Makes up for notifications and interrupts that were under way when the machine stopped. The device thread stands.
    pub(crate) fn kick(&mut self) {
        for device in &self.virtio {
            device.lock().kick_all();
        }
        lock(&self.serial).kick();
        if std::mem::take(&mut self.new_generation)
            && let Err(error) = self.generation.notify()
        {
            tracing::warn!(%error, "the guest was not told of its new generation id");
        }
    }

    /// States of all devices. vCPUs and device thread stand.
    pub(crate) fn save(&self) -> Result<Vec<StateBlob>, SpecError> {
        let mut blobs = Vec::new();
        for (window, device) in self.virtio.iter().enumerate() {
            blobs.push(spec::blob(&virtio_kind(window), MmioState::VERSION, &device.lock().save())?);
        }
        blobs.push(spec::blob(SERIAL, SerialState::VERSION, &lock(&self.serial).save())?);
        if let Some(counter) = &self.exit_counter {
            blobs.push(spec::blob(EXIT_COUNTER, ExitCounterState::VERSION, &lock(counter).save())?);
        }
        blobs.push(spec::blob(VMGENID, VmGenIdState::VERSION, &self.generation.save())?);
        Ok(blobs)
    }

    pub(crate) fn console_input(&self, input: &[u8]) -> usize {
        lock(&self.serial).enqueue(input)
    }

    pub(crate) fn console_bytes(&self) -> u64 {
        self.console_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn console_lost(&self) -> u64 {
        self.console_lost.load(Ordering::Relaxed)
    }

    pub(crate) fn exit_counts(&self) -> Option<ExitCounterState> {
        self.exit_counter.as_ref().map(|c| lock(c).counts().clone())
    }

    /// What the network device did.
    pub(crate) fn network(&self) -> Option<NetworkMetrics> {
        let traffic = |of: &stasis_devices::virtio::net::counters::Traffic| Traffic {
            packets: of.packets(),
            bytes: of.bytes(),
            dropped: of.dropped(),
        };
        self.network.as_ref().map(|counters| NetworkMetrics {
            to_guest: traffic(&counters.to_guest),
            from_guest: traffic(&counters.from_guest),
        })
    }

    /// Requests that the disks answered.
    pub(crate) fn block_requests(&self) -> u64 {
        self.block_requests.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

const SERIAL: &str = "serial";
const EXIT_COUNTER: &str = "exit-counter";
const VMGENID: &str = "vmgenid";

fn virtio_kind(window: usize) -> String {
    format!("virtio/{window}")
}
