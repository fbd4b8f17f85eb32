//! A machine restored in a new process equals the machine that was captured: pulse on this machine's own `/dev/kvm`.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use rand::Rng;
use stasis_api::dev::{EmbeddedS3, Fault, FaultProxy, Rule};
use stasis_snapshot::manifest::Manifest;
use stasis_snapshot::store::s3::{S3Settings, S3Store};
use stasis_snapshot::store::{ObjectStore, Precondition};
use stasis_tests::host;
use stasis_tests::suite::{Outcome, Suite};
use stasis_tests::vmm::{Error, Stored, Vmm, directory_store, memory_file, no_pulse, pulse};
use stasis_vmm::control::types::{CaptureMode, Paging, VmState};

fn main() {
    let small = [(1, 512, ""), (2, 512, "")];
    let large = [(1, 6144, " high=64"), (2, 6144, " high=64")];
    let mut suite = Suite::default();
    for (vcpus, memory_mib, more) in small.into_iter().chain(large) {
        let name = format!("three_generations_equal_{vcpus}_vcpu_{memory_mib}_mib");
        suite = suite.test(&name, no_pulse(), move || three_generations(vcpus, memory_mib, more));
    }
    suite
        .test("random_histories_restore_what_was_live_1_vcpu", no_pulse(), || random_history(1))
        .test("random_histories_restore_what_was_live_2_vcpu", no_pulse(), || random_history(2))
        .test("a_guest_runs_before_its_memory_is_there", no_pulse(), lazy)
        .test("pauses_while_pages_are_on_their_way_change_nothing_1_vcpu", no_pulse(), || kicked_while_waiting(1))
        .test("pauses_while_pages_are_on_their_way_change_nothing_2_vcpu", no_pulse(), || kicked_while_waiting(2))
        .test("memory_that_stayed_is_not_fetched_again", no_pulse(), kept)
        .test("a_page_that_cannot_be_had_ends_the_machine", no_pulse(), page_lost)
        .test("no_port_exit_is_lost_or_doubled_across_1000_pauses", no_pulse(), || thousand_pauses(1000))
        .test("a_guest_that_dies_ends_its_process_with_the_reason", no_pulse(), dead_guest)
        .test("a_file_that_is_no_kernel_is_refused", no_pulse(), no_kernel)
        .main();
}

/// Where generation `n` goes: by a name that says so, or nothing would ever be compacted.
fn generation(n: u32) -> String {
    format!("v1/t/sandbox/p/{n}-1-{n:032x}")
}

/// How many generations the manifest names.
fn generations(manifest: &[u8]) -> Result<usize, Error> {
    let packs = Manifest::decode(manifest)?.packs;
    Ok(packs.iter().filter_map(|pack| pack.key.split("/pack/").next()).collect::<BTreeSet<_>>().len())
}

/// Two captures of a machine that did not run in between: no page is sent, and devices are as they were.
fn the_same(first: &Stored, second: &Stored) -> Result<(), Error> {
    assert_eq!(second.report.sent_pages, 0, "{:?}", second.report);
    let (first, second) = (Manifest::decode(&first.manifest)?, Manifest::decode(&second.manifest)?);
    assert!(first.images == second.images && first.packs == second.packs);
    assert_eq!(first.state.len(), second.state.len());
    for (before, after) in first.state.iter().zip(&second.state) {
        // Time goes on in vCPUs and in the VM's clock.
        let clocks = before.kind.starts_with("vcpu/") || before.kind == "vm";
        assert!(before == after || clocks, "{} differs", before.kind);
    }
    Ok(())
}

/// Digest before the pause equals digest after the resume in a new process, with another dirty set in each generation.
async fn three_generations(vcpus: u8, memory_mib: u32, more: &str) -> Outcome {
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    let cmdline = format!("mix=real fill=128 hot=8 cpus={vcpus}{more}");
    vmm.boot_pulse(vcpus, memory_mib, &cmdline).await?;
    vmm.console_until("R\n").await?;
    let mut digests = Vec::new();
    for generation in 1..=3 {
        vmm.console_until("...").await?;
        vmm.ask_pulse(b's', "S").await?;
        let before = vmm.digest().await?;
        let stored = vmm.capture(&*store, &format!("v1/t/sandbox/p/{generation}")).await?;
        the_same(&stored, &vmm.capture(&*store, &format!("v1/t/sandbox/p/{generation}-again")).await?)?;
        vmm.shutdown().await?;
        vmm = Vmm::start(&dir.path().join(generation.to_string())).await?;
        vmm.restore(&*store, &stored.manifest).await?;
        vmm.client.resume().await?;
        let after = vmm.digest().await?;
        assert_eq!(before, after, "generation {generation}");
        digests.push(after.0);
        vmm.ask_pulse(b'0' + generation, "P").await?;
        vmm.ask_pulse(b'g', "G").await?;
    }
    assert!(!vmm.console_until("...").await?.contains('!'), "a hot page lost what the pass before wrote");
    digests.dedup();
    assert_eq!(digests.len(), 3, "each generation had something of its own");
    vmm.shutdown().await?;
    Ok(())
}

/// Captures of every kind in random order, some of which fail or are cancelled, while the guest dirties other pages in each step; whatever
/// the way back, the restored guest has the memory of the one that was stopped.
async fn random_history(vcpus: u8) -> Outcome {
    const STEPS: u32 = 24;
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let mut memory = memory_file()?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    let cmdline = format!("mix=real fill=48 hot=3 cpus={vcpus}");
    vmm.boot_with(File::open(pulse())?, Some(memory.try_clone()?), vcpus, 128, &cmdline).await?;
    vmm.console_until("R\n").await?;
    let mut wakes = 0;
    for step in 1..=STEPS {
        let (what, seed) = (rand::rng().random_range(0..6), rand::rng().random_range(0..10_u8));
        vmm.ask_pulse(b'0' + seed, "P").await?;
        vmm.console_until(".").await?;
        let prefix = generation(step);
        match what {
            0 => drop(vmm.capture_running(&*store, &prefix, CaptureMode::Round).await?),
            1 => {
                // The clone has what the original had when it stood still; the original goes on.
                let stored = vmm.capture_running(&*store, &prefix, CaptureMode::Staged).await?;
                let mut clone = Vmm::start(&dir.path().join(format!("clone{step}"))).await?;
                clone.restore(&*store, &stored.manifest).await?;
                clone.client.resume().await?;
                clone.console_until("..").await?;
                clone.shutdown().await?;
            }
            2 => {
                // Fewer packs than are needed: the capture fails, some of its packs are stored.
                vmm.client.pause().await?;
                let failed = vmm.capture_in(&*store, &prefix, CaptureMode::Stopped, 0).await;
                assert!(failed.is_err(), "step {step}: a capture without grants");
                vmm.client.resume().await?;
            }
            3 => {
                // Cancelled while it runs, or too late for that.
                let paused = vmm.client.pause().await?;
                let client = vmm.client.clone();
                let after = rand::rng().random_range(0..20_000);
                let cancel = async {
                    tokio::time::sleep(Duration::from_micros(after)).await;
                    client.cancel_capture().await
                };
                let capture = vmm.capture_in(&*store, &prefix, CaptureMode::Stopped, paused.packs_needed);
                let (_, cancelled) = tokio::join!(capture, cancel);
                cancelled?;
                vmm.client.resume().await?;
            }
            _ => {
                vmm.ask_pulse(b's', "S").await?;
                let before = vmm.digest().await?;
                let stored = vmm.capture(&*store, &prefix).await?;
                let notes = vmm.keep().await?;
                vmm.shutdown().await?;
                vmm = Vmm::start(&dir.path().join(step.to_string())).await?;
                let stays = what == 4;
                if !stays {
                    memory = memory_file()?;
                }
                let notes = stays.then_some(&notes[..]);
                let file = Some(memory.try_clone()?);
                let report = vmm.restore_with(&*store, &stored.manifest, file, notes, Paging::default()).await?;
                assert_eq!(report.kept, stays, "step {step}");
                vmm.client.resume().await?;
                assert_eq!(before, vmm.digest().await?, "step {step}: the way was {what}");
                vmm.ask_pulse(b'g', "G").await?;
                wakes += 1;
            }
        }
        assert!(
            !vmm.console_until("..").await?.contains('!'),
            "step {step}: a hot page lost what the pass before wrote"
        );
    }
    println!("{wakes} wakes in {STEPS} steps");
    vmm.shutdown().await?;
    Ok(())
}

/// The guest answers while most of its memory is still in the store, and in the end all of it is right.
async fn lazy() -> Outcome {
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    vmm.boot_pulse(1, 256, "mix=rand fill=128 hot=2").await?;
    vmm.console_until("R\n").await?;
    vmm.ask_pulse(b's', "S").await?;
    let before = vmm.digest().await?;
    let stored = vmm.capture(&*store, "v1/t/sandbox/p/1").await?;
    vmm.shutdown().await?;
    let mut vmm = Vmm::start(&dir.path().join("1")).await?;
    let none = Paging { sweep_mib_per_second: 0, ..Paging::default() };
    let report = vmm.restore_with(&*store, &stored.manifest, None, None, none).await?;
    if report.absent_pages == 0 {
        return Err("this host cannot page memory in: no userfaultfd with shared memory".into());
    }
    vmm.client.resume().await?;
    vmm.ask_pulse(b'g', "G").await?;
    vmm.console_until("...").await?;
    let paging = vmm.client.metrics().await?.paging.unwrap_or_default();
    assert!(paging.absent_pages > 64 << 8, "most is not there: {paging:?}");
    assert!(paging.faults > 0 && paging.resident_us.is_none(), "{paging:?}");
    // A capture now refers to what is absent, and reads nothing of it.
    vmm.ask_pulse(b's', "S").await?;
    let again = vmm.capture(&*store, "v1/t/sandbox/p/2").await?;
    assert!(again.report.scanned_pages < 16 << 8, "{:?}", again.report);
    let absent = vmm.client.metrics().await?.paging.unwrap_or_default().absent_pages;
    assert!(absent > 64 << 8, "the capture brought memory in: {absent} pages are absent");
    vmm.client.resume().await?;
    // The digest reads all of it.
    let live = vmm.digest().await?;
    assert_ne!(live, before, "passes went by");
    vmm.shutdown().await?;
    let mut vmm = Vmm::start(&dir.path().join("2")).await?;
    vmm.restore(&*store, &again.manifest).await?;
    vmm.client.resume().await?;
    assert_eq!(live, vmm.digest().await?);
    vmm.shutdown().await?;
    Ok(())
}

/// The guest reads all of its memory while the store takes its time, and is stopped again and again meanwhile: a vCPU that waits for a page, or
/// KVM that reads or writes guest memory for it, is interrupted and no access is lost.
async fn kicked_while_waiting(vcpus: u8) -> Outcome {
    let dir = host::scratch()?;
    let s3 = EmbeddedS3::start(&dir.path().join("s3"), "127.0.0.1:0".parse()?, "bucket", "access", "secret").await?;
    let proxy = FaultProxy::start(s3.addr()).await?;
    let place = proxy.endpoint().replace("http://", "");
    let store = S3Store::new(S3Settings {
        endpoint: proxy.endpoint(),
        region: "us-east-1".to_owned(),
        bucket: "bucket".to_owned(),
        access_key: "access".to_owned(),
        secret_key: "secret".to_owned(),
        path_style: true,
        request_timeout: Duration::from_mins(1),
        commit_timeout: Duration::from_mins(1),
    })?;
    let mut vmm = Vmm::start_with_store(&dir.path().join("0"), &place).await?;
    vmm.boot_pulse(vcpus, 256, &format!("mix=rand fill=128 hot=2 count=1 gap=20000 ticks=0 cpus={vcpus}")).await?;
    vmm.console_until("R\n").await?;
    vmm.ask_pulse(b's', "S").await?;
    let before = vmm.digest().await?;
    let stored = vmm.capture(&store, "v1/t/sandbox/p/1").await?;
    vmm.shutdown().await?;
    let mut vmm = Vmm::start_with_store(&dir.path().join("1"), &place).await?;
    let slowly = Paging { sweep_mib_per_second: 0, ..Paging::default() };
    vmm.restore_with(&store, &stored.manifest, None, None, slowly).await?;
    proxy.add(Rule::every(Method::GET, "/pack/", Fault::Delay(Duration::from_millis(15))));
    vmm.client.resume().await?;
    vmm.client.console(bytes::Bytes::from_static(b"d")).await?;
    // It reads a granule in a fraction of the time that the next one takes to come, so nearly every pause finds it waiting.
    let (mut pauses, mut waiting, mut longest) = (0, 0, 0);
    while !std::fs::read_to_string(vmm.run_dir.join("console.log"))?.contains("g ") {
        let random = rand::rng().random_range(0..4000);
        tokio::time::sleep(Duration::from_micros(random)).await;
        longest = longest.max(vmm.client.pause().await?.stop_us);
        let absent = vmm.client.metrics().await?.paging.unwrap_or_default().absent_pages;
        pauses += 1;
        waiting += u32::from(absent > 0);
        vmm.client.resume().await?;
    }
    println!("{pauses} pauses, {waiting} of them with pages on their way; the longest took {longest} us");
    assert!(waiting > 50, "only {waiting} of {pauses} pauses came in time");
    assert_eq!(vmm.digest().await?, before);
    let counts = vmm.client.metrics().await?.exit_counter.unwrap_or_default();
    assert_eq!(counts.out_gaps, 0, "{counts:?}");
    vmm.ask_pulse(b'g', "G").await?;
    vmm.ask_pulse(b's', "S").await?;
    assert!(!std::fs::read_to_string(vmm.run_dir.join("console.log"))?.contains('!'), "a page lost what was written");
    vmm.shutdown().await?;
    Ok(())
}

/// A restore over the memory file of the VMM that made the snapshot fetches nothing, and sends only what changed afterwards.
async fn kept() -> Outcome {
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let memory = memory_file()?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    vmm.boot_with(File::open(pulse())?, Some(memory.try_clone()?), 1, 128, "mix=rand fill=64 hot=2").await?;
    vmm.console_until("R\n").await?;
    vmm.ask_pulse(b's', "S").await?;
    let before = vmm.digest().await?;
    let stored = vmm.capture(&*store, "v1/t/sandbox/p/1").await?;
    let notes = vmm.keep().await?;
    vmm.shutdown().await?;
    // Without its packs: whatever was fetched would fail.
    std::fs::remove_dir_all(dir.path().join("store/v1"))?;
    std::fs::create_dir_all(dir.path().join("store/v1"))?;
    let mut vmm = Vmm::start(&dir.path().join("1")).await?;
    let empty = directory_with(&dir.path().join("other"), &stored.manifest).await?;
    let report = vmm.restore_with(&*empty, &stored.manifest, Some(memory), Some(&notes), Paging::default()).await?;
    assert!(report.kept && report.absent_pages == 0 && report.fetched_bytes == 0, "{report:?}");
    vmm.client.resume().await?;
    assert_eq!(before, vmm.digest().await?);
    let again = vmm.capture(&*store, "v1/t/sandbox/p/2").await?;
    assert!(again.report.sent_pages < 64, "it stood still: {:?}", again.report);
    assert!(again.report.unchanged_pages > 0, "what was only touched is told by its digest: {:?}", again.report);
    vmm.shutdown().await?;
    Ok(())
}

/// Packs that are gone from the store: the machine ends and says which, it does not hang nor show other memory.
async fn page_lost() -> Outcome {
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    vmm.boot_pulse(1, 128, "mix=rand fill=64 hot=2").await?;
    vmm.console_until("R\n").await?;
    let stored = vmm.capture(&*store, "v1/t/sandbox/p/1").await?;
    vmm.shutdown().await?;
    let mut vmm = Vmm::start(&dir.path().join("1")).await?;
    let broken = directory_with(&dir.path().join("other"), &stored.manifest).await?;
    // The end may come before either answer.
    if vmm.restore(&*broken, &stored.manifest).await.is_ok() {
        let _ = vmm.client.resume().await;
    }
    let note = vmm.ended().await?;
    assert_eq!(note.status, 4, "{note:?}");
    assert!(note.reason.contains("pack"), "{note:?}");
    Ok(())
}

/// A store that has every pack of the manifest, each cut to nothing.
async fn directory_with(root: &Path, manifest: &[u8]) -> Result<Arc<dyn ObjectStore>, Error> {
    let store = directory_store(root)?;
    for pack in Manifest::decode(manifest)?.packs {
        store.put(&pack.key, bytes::Bytes::from_static(b"nothing"), &Precondition::None).await?;
    }
    Ok(store)
}

/// Pulse counts its port accesses, the device counts them too. Each restored machine is a new process.
async fn thousand_pauses(pauses: u32) -> Outcome {
    let dir = host::scratch()?;
    let store = directory_store(&dir.path().join("store"))?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    vmm.boot_pulse(1, 16, "fill=1 hot=1 count=1 gap=2000 ticks=0").await?;
    vmm.console_until("R\n").await?;
    let mut counted = 0;
    for pause in 1..=pauses {
        let random = rand::rng().random_range(0..3000);
        tokio::time::sleep(Duration::from_micros(random)).await;
        let stored = vmm.capture(&*store, &generation(pause)).await?;
        let named = generations(&stored.manifest)?;
        assert!(named <= 8, "pause {pause}: the manifest names {named} generations");
        let old = vmm.run_dir.clone();
        vmm.shutdown().await?;
        vmm = Vmm::start(&dir.path().join(pause.to_string())).await?;
        vmm.restore(&*store, &stored.manifest).await?;
        let counts = vmm.client.metrics().await?.exit_counter.unwrap_or_default();
        assert_eq!(counts.out_gaps, 0, "pause {pause}: an OUT was lost or doubled");
        assert!(counts.outs.abs_diff(counts.ins) <= 1, "pause {pause}: {counts:?}");
        counted = counts.outs;
        vmm.client.resume().await?;
        std::fs::remove_dir_all(old)?;
    }
    // Pulse prints '!' when an IN was lost or doubled; the digest's answer comes after all it printed.
    let path = vmm.run_dir.join("console.log");
    vmm.ask_pulse(b'd', "D ").await?;
    assert!(!std::fs::read_to_string(path)?.contains('!'), "an IN was lost or doubled");
    assert!(counted > u64::from(pauses), "the guest made progress: {counted} OUTs");
    vmm.shutdown().await?;
    Ok(())
}

/// A kernel that is no kernel: the boot says so, and the VMM is as empty as before.
async fn no_kernel() -> Outcome {
    let dir = host::scratch()?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    let Err(refused) = vmm.boot(tempfile::tempfile()?, 1, 16, "").await else {
        return Err("an empty file was booted".into());
    };
    assert!(refused.to_string().contains("kernel"), "{refused}");
    assert_eq!(vmm.client.status().await?.state, VmState::Empty);
    vmm.boot_pulse(1, 16, "fill=1 hot=1").await?;
    vmm.console_until("R\n").await?;
    vmm.shutdown().await?;
    Ok(())
}

/// A 64-bit ELF of one undefined instruction, at 1 MiB: without an IDT it ends the machine.
fn suicidal_kernel() -> Vec<u8> {
    const ENTRY: u64 = 0x10_0000;
    const CODE: [u8; 2] = [0x0f, 0x0b];
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // One loadable segment: readable, writable, executable.
    for half in [1_u32, 7] {
        elf.extend(half.to_le_bytes());
    }
    for word in [HEADERS, ENTRY, ENTRY, CODE.len() as u64, CODE.len() as u64, 1] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(CODE);
    elf
}

/// The process of a machine that died ends by itself and says why.
async fn dead_guest() -> Outcome {
    let dir = host::scratch()?;
    let mut vmm = Vmm::start(&dir.path().join("0")).await?;
    let mut kernel = tempfile::tempfile()?;
    std::io::Write::write_all(&mut kernel, &suicidal_kernel())?;
    std::io::Seek::rewind(&mut kernel)?;
    vmm.boot(kernel, 1, 16, "").await?;
    let note = vmm.ended().await?;
    // Hardware reports a triple fault; a KVM that emulates ring 0 may report that it cannot go on.
    assert!(matches!(note.status, 2 | 3) && !note.reason.is_empty(), "{note:?}");
    Ok(())
}
