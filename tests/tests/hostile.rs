//! Guests that abuse their devices (`guest-images/hostile`), on this machine's own `/dev/kvm`.
//!
//! Whatever the guest does, its VMM neither panics nor dies of a signal: it goes on, or ends with a reason of its own. It still answers, can be
//! paused, saved and resumed. And the guest of another VMM beside it answers nearly as fast as it does alone: both are measured in turns, in
//! one run, since how busy this machine is otherwise changes.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use stasis_tests::host;
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, Vmm, directory_store, no_pulse};
use stasis_vmm::control::CONSOLE_LOG;
use stasis_vmm::control::types::{
    BootRequest, DiskConfig, FdToken, MacAddress, MachineConfig, NetworkConfig, RateLimit, VmState,
};

const ATTACKS: [&str; 12] = [
    "descriptors",
    "loops",
    "rings",
    "registers",
    "doorbells",
    "resets",
    "discards",
    "vsock",
    "frames",
    "console",
    "exits",
    "everything",
];
/// How long each attack goes on before the measurement.
const DURATION: Duration = Duration::from_secs(1);
/// How often the attack stands still and goes on while the neighbour is measured.
const TURNS: usize = 5;
/// Round trips of one turn, each way.
const ROUND_TRIPS: usize = 60;
/// Longest round trip.
const LONGEST: Duration = Duration::from_secs(10);
/// What the neighbour may be slower by: this factor, or this much where it answers in no time.
const FACTOR: u32 = 2;
const SLACK: Duration = Duration::from_millis(1);
/// Longest that a pause of the abused machine may take: what its devices do in one event.
const PAUSE: Duration = Duration::from_secs(10);

fn main() {
    let mut suite = Suite::default();
    for attack in ATTACKS {
        suite = suite.test(&format!("a_guest_that_abuses_{attack}"), lacking(), move || abuse(attack));
    }
    suite.main();
}

fn hostile() -> PathBuf {
    host::built("images/hostile/hostile.elf")
}

fn lacking() -> Option<String> {
    no_pulse().or_else(|| host::missing(&hostile(), "guest-images/hostile/build makes it"))
}

/// What stands in for a tap, and the host's end of it.
fn network_pair() -> Result<(std::fs::File, UnixDatagram), Error> {
    let (tap, other_end) = UnixDatagram::pair()?;
    other_end.set_nonblocking(true)?;
    Ok((OwnedFd::from(tap).into(), other_end))
}

fn disk(overlay: FdToken) -> DiskConfig {
    let overlay = Some(overlay);
    DiskConfig { base: None, base_digest: None, base_index: None, overlay, size_mib: 16, read_only: false }
}

/// Boots a machine with one device of each kind; answers the host's end of its network.
async fn boot(vmm: &mut Vmm, attack: &str) -> Result<UnixDatagram, Error> {
    let (tap, other_end) = network_pair()?;
    let files = vec![std::fs::File::open(hostile())?, tempfile::tempfile()?, tap];
    let tokens = vmm.send(files).await?;
    let machine = MachineConfig {
        vcpus: 1,
        memory_mib: 64,
        vsock_cid: Some(3),
        exit_counter: false,
        network: Some(NetworkConfig {
            mac: "02:00:00:00:00:01".parse::<MacAddress>()?,
            mtu: 1500,
            to_guest: RateLimit::default(),
            from_guest: RateLimit::default(),
        }),
    };
    let request = BootRequest {
        machine,
        kernel: tokens[0],
        initramfs: None,
        cmdline: format!("attack={attack}"),
        disks: vec![disk(tokens[1])],
        memory: None,
        tap: Some(tokens[2]),
        disks_from: None,
        id: None,
    };
    vmm.client.boot(&request).await?;
    vmm.console_until("R\n").await?;
    Ok(other_end)
}

#[expect(
    clippy::disallowed_methods,
    reason = "the runtime's own sleep is in steps of a millisecond, of which a round trip is a part"
)]
fn wait_a_little() {
    std::thread::sleep(Duration::from_micros(50));
}

/// Round trips through the neighbour's guest, which stands still: a byte to its serial port, and its answer.
async fn round_trips(neighbour: &Vmm) -> Result<Vec<Duration>, Error> {
    let log = std::fs::File::open(neighbour.run_dir.join(CONSOLE_LOG))?;
    let mut times = Vec::with_capacity(ROUND_TRIPS);
    for _ in 0..ROUND_TRIPS {
        let answered = log.metadata()?.len() + "S\n".len() as u64;
        let begun = Instant::now();
        neighbour.client.console(bytes::Bytes::from_static(b"s")).await?;
        while log.metadata()?.len() < answered {
            if begun.elapsed() > LONGEST {
                return Err("the neighbour does not answer".into());
            }
            wait_a_little();
        }
        times.push(begun.elapsed());
    }
    Ok(times)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// The median round trip of the neighbour while the attack stands still, and while it goes on.
async fn alone_and_beside(neighbour: &Vmm, vmm: &Vmm) -> Result<(Duration, Duration), Error> {
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        let begun = Instant::now();
        vmm.client.pause().await?;
        assert!(begun.elapsed() < PAUSE, "paused after {:?}", begun.elapsed());
        alone.extend(round_trips(neighbour).await?);
        vmm.client.resume().await?;
        beside.extend(round_trips(neighbour).await?);
    }
    Ok((median(alone), median(beside)))
}

/// Empties the host's end of the network for some time.
async fn let_go_on(network: &UnixDatagram, time: Duration) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        while network.recv(&mut [0; 16]).is_ok() {}
        let _ = network.send(&[0; 200]);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn abuse(attack: &str) -> Outcome {
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let mut neighbour = Vmm::start(&dir.path().join("neighbour")).await?;
    neighbour.boot_pulse(1, 64, "fill=8 hot=1 ticks=0").await?;
    neighbour.console_until("R\n").await?;
    // No pass of its own comes between a question and its answer.
    neighbour.client.console(bytes::Bytes::from_static(b"s")).await?;
    neighbour.console_until("S\n").await?;

    let mut vmm = Vmm::start(&dir.path().join("hostile")).await?;
    let network = boot(&mut vmm, attack).await?;
    let_go_on(&network, DURATION).await;
    let (alone, beside) = alone_and_beside(&neighbour, &vmm).await?;
    let_go_on(&network, DURATION).await;

    // Nothing of this is an end that a guest asks for, so it goes on.
    let metrics = vmm.client.metrics().await?;
    eprintln!("{attack}: neighbour {alone:?} alone, {beside:?} beside; {:?}", metrics.exits);
    assert!(beside <= alone * FACTOR + SLACK, "{attack}: {alone:?} alone, {beside:?} beside it");

    let begun = Instant::now();
    let stored = vmm.capture(&*store, "v1/t/sandbox/h/1").await?;
    assert!(begun.elapsed() < PAUSE, "{attack}: stopped after {:?}", begun.elapsed());
    vmm.client.resume().await?;
    let_go_on(&network, DURATION / 2).await;
    assert_eq!(vmm.client.status().await?.state, VmState::Running);

    // Whatever state its devices were in, it is one that another process can take up, and be abused from.
    let mut second = Vmm::start(&dir.path().join("second")).await?;
    let (tap, network) = network_pair()?;
    let tokens = second.send(vec![tempfile::tempfile()?, tap]).await?;
    let mut request = second.restore_request(&*store, &stored.manifest).await?;
    request.disks = vec![disk(tokens[0])];
    request.tap = Some(tokens[1]);
    second.client.restore(&request).await?;
    second.client.resume().await?;
    let_go_on(&network, DURATION / 2).await;
    assert_eq!(second.client.status().await?.state, VmState::Running);
    second.shutdown().await?;

    let log = std::fs::read_to_string(vmm.run_dir.join("vmm.log"))?;
    assert!(!log.contains("panicked"), "{attack}: {log}");
    assert!(log.lines().count() < 1000, "{attack}: a guest that writes the log: {} lines", log.lines().count());
    vmm.shutdown().await?;
    neighbour.shutdown().await?;
    Ok(())
}
