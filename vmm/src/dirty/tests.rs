//! The tracker against a plain model: a vCPU and a device write to random places, captures succeed, fail half-way and run while the vCPU goes on
//! writing. A page that the tracker does not name has what was captured of it last.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::{VcpuExit, VcpuFd};
use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::inherited::HostFiles;
use crate::machine::bare::{Bare, BareMachine, Size};

/// Where the guest's program lies, and its list of accesses.
const CODE: u64 = 0x1000;
const LIST: u64 = 0x2000;
/// Accesses of one list at most: it ends with a zero.
const ACCESSES: usize = 1023;
/// What the vCPU accesses begins here.
const FREE: u64 = 0x10_0000;
/// For each 32-bit address of the list: read the byte there, and unless the address is odd, change it. Then leave by a port.
///
/// ```text
/// next: lodsd;  test eax, eax;  jz done;  mov cl, [eax];  test al, 1;  jnz next;  add [eax], bl;  jmp next
/// done: out 0x80, al
/// ```
const PROGRAM: [u8; 17] =
    [0xad, 0x85, 0xc0, 0x74, 0x0a, 0x8a, 0x08, 0xa8, 0x01, 0x75, 0xf5, 0x00, 0x18, 0xeb, 0xf1, 0xe6, 0x80];

/// A machine without devices, and what is known of its memory.
struct Subject {
    machine: BareMachine,
    vcpu: Option<VcpuFd>,
    presence: Arc<Presence>,
    tracker: DirtyTracker,
    /// Pages that were captured, as they were then; all others were captured as zero.
    durable: BTreeMap<u64, [u8; PAGE_SIZE]>,
    /// Every page that was ever accessed.
    accessed: PageSet,
}

/// One access of the vCPU: an address of the list.
fn vcpu_address(rng: &mut SmallRng, end: u64) -> u32 {
    // Runs of neighbours, and pages far from any other.
    let page = if rng.random() { rng.random_range(0..40) } else { rng.random_range(0..(end - FREE) >> 12) };
    u32::try_from(FREE + (page << 12) + rng.random_range(0..4096)).unwrap()
}

fn run_list(vcpu: &mut VcpuFd) {
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rsi, regs.rbx, regs.rflags) = (CODE, LIST, 1, 2);
    vcpu.set_regs(&regs).unwrap();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(0x80, _)) => return,
            Err(error) if error.errno() == libc::EINTR => {}
            other => panic!("{other:?}"),
        }
    }
}

impl Subject {
    /// `None`, said on standard error, where there is no KVM.
    fn new(memory_bytes: u64, page_tables: bool) -> Option<Self> {
        let files = HostFiles::of_this_host().inspect_err(|error| eprintln!("left out: /dev/kvm: {error}")).ok()?;
        let bare = Bare::new(Size { vcpus: 1, memory_bytes }, &files).unwrap();
        let (machine, mut vcpus) = bare.with_memory(None, &files).unwrap();
        let presence = if page_tables {
            machine.presence.clone()
        } else {
            Arc::new(Presence::without_page_tables(machine.ram.clone(), &files))
        };
        let vcpu = vcpus.remove(0);
        // Flat 32-bit addresses, no paging.
        let mut sregs = vcpu.get_sregs().unwrap();
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.limit, segment.selector) = (0, u32::MAX, 8);
            (segment.db, segment.g, segment.s, segment.present, segment.type_) = (1, 1, 1, 1, 3);
        }
        sregs.cs.type_ = 11;
        sregs.cr0 |= 1;
        vcpu.set_sregs(&sregs).unwrap();
        let pages = machine.ram.pages();
        let tracker = DirtyTracker::for_boot(pages);
        let accessed = PageSet::new(pages);
        let mut subject = Self { machine, vcpu: Some(vcpu), presence, tracker, durable: BTreeMap::new(), accessed };
        subject.device_write(CODE, &PROGRAM);
        Some(subject)
    }

    fn pages(&self) -> u64 {
        self.machine.ram.pages()
    }

    /// The image pages that hold these guest addresses.
    fn pages_at(&self, addresses: Range<u64>) -> Range<u64> {
        let mut first = 0;
        for slot in self.machine.ram.slots() {
            if (slot.start..slot.start + slot.len).contains(&addresses.start) {
                let at = |address: u64| first + (address - slot.start) / PAGE_SIZE as u64;
                return at(addresses.start)..at(addresses.end - 1) + 1;
            }
            first += slot.len / PAGE_SIZE as u64;
        }
        panic!("{addresses:x?} is no memory");
    }

    fn device_write(&mut self, address: u64, bytes: &[u8]) {
        self.machine.ram.guest_memory().write_slice(bytes, GuestAddress(address)).unwrap();
        self.accessed.insert(self.pages_at(address..address + bytes.len() as u64));
    }

    /// A device writes to any slot, over page boundaries too.
    fn some_device_write(&mut self, rng: &mut SmallRng) {
        let slots = self.machine.ram.slots();
        let slot = slots[rng.random_range(0..slots.len())];
        let from = FREE.max(slot.start);
        let len = rng.random_range(1..3 * PAGE_SIZE);
        let address = rng.random_range(from..slot.start + slot.len - len as u64);
        let bytes: Vec<u8> = (0..len).map(|_| rng.random()).collect();
        self.device_write(address, &bytes);
    }

    /// Writes a list of accesses for the vCPU, which a device does as well.
    fn list(&mut self, rng: &mut SmallRng) {
        let end = self.machine.ram.slots()[0].len;
        let addresses: Vec<u32> = (0..rng.random_range(0..ACCESSES)).map(|_| vcpu_address(rng, end)).collect();
        for &address in &addresses {
            let pages = self.pages_at(address.into()..u64::from(address) + 1);
            self.accessed.insert(pages);
        }
        let list: Vec<u8> = addresses.into_iter().chain([0]).flat_map(u32::to_le_bytes).collect();
        self.device_write(LIST, &list);
    }

    fn read(&self, page: u64) -> [u8; PAGE_SIZE] {
        let mut bytes = [0; PAGE_SIZE];
        self.machine.ram.read(page, &mut bytes).unwrap();
        bytes
    }

    fn collect(&mut self) {
        self.collect_and(Then::Track);
    }

    fn collect_and(&mut self, then: Then) {
        self.tracker.collect(&self.machine.vm, &self.machine.ram, &self.presence, then).unwrap();
    }

    /// As at the stop of a named snapshot.
    fn collect_lightly(&mut self) {
        self.tracker.collect_lightly(&self.machine.vm, &self.machine.ram, &self.presence).unwrap();
    }

    /// Reads what is dirty and settles it; one that fails does so with a part of it, of which a part was never stored.
    fn capture(&mut self, rng: &mut SmallRng, fails: bool) {
        let dirty: Vec<u64> = self.tracker.pages().runs().into_iter().flatten().collect();
        for page in dirty {
            let bytes = self.read(page);
            if !fails || rng.random() {
                self.durable.insert(page, bytes);
                self.tracker.settled(page..page + 1);
            }
        }
    }

    /// Nothing runs: what the tracker does not name is durable.
    fn check(&mut self) {
        let mut estimated = self.tracker.estimate(&self.machine.vm, &self.machine.ram, &self.presence).unwrap();
        self.collect();
        let dirty = self.tracker.pages();
        estimated.subtract(dirty);
        assert_eq!(estimated.len(), 0, "a look that changes nothing saw more");
        for page in self.accessed.runs().into_iter().flatten() {
            if !dirty.contains_all(page..page + 1) {
                let durable = self.durable.get(&page).copied().unwrap_or([0; PAGE_SIZE]);
                assert!(self.read(page) == durable, "page {page} was lost");
            }
        }
    }

    /// What a restored machine knows: all of it is durable, all writes are tracked from now on.
    fn as_restored(&mut self) {
        self.collect();
        let mut rng = SmallRng::seed_from_u64(0);
        self.capture(&mut rng, false);
        self.tracker = DirtyTracker::for_restored(&self.machine.vm, &self.machine.ram, &self.presence).unwrap();
        assert_eq!(self.tracker.pages().len(), 0);
    }
}

fn history(seed: u64, memory_bytes: u64, page_tables: bool) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let Some(mut subject) = Subject::new(memory_bytes, page_tables) else { return };
    let mut committed = 0;
    while committed < 4 {
        for _ in 0..rng.random_range(0..3) {
            subject.some_device_write(&mut rng);
        }
        subject.list(&mut rng);
        match rng.random_range(0..8) {
            0 => subject.as_restored(),
            // A round: the vCPU goes through its list meanwhile.
            1..4 => {
                let mut vcpu = subject.vcpu.take().unwrap();
                let guest = std::thread::spawn(move || {
                    (0..3).for_each(|_| run_list(&mut vcpu));
                    vcpu
                });
                subject.collect();
                let fails = rng.random();
                subject.capture(&mut rng, fails);
                subject.vcpu = Some(guest.join().unwrap());
            }
            fate => {
                run_list(subject.vcpu.as_mut().unwrap());
                match rng.random_range(0..3) {
                    0 => subject.collect(),
                    1 => subject.collect_and(Then::Leave),
                    _ => subject.collect_lightly(),
                }
                let fails = fate < 6;
                subject.capture(&mut rng, fails);
                if !fails {
                    assert_eq!(subject.tracker.pages().len(), 0);
                    committed += 1;
                }
            }
        }
        subject.check();
    }
}

/// Memory on both sides of the MMIO gap; next to none of it exists.
const TWO_SLOTS: u64 = (3 << 30) + (16 << 20);

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn page_tables_lose_no_write(seed in any::<u64>()) {
        history(seed, 24 << 20, true);
    }

    #[test]
    fn kvms_log_loses_no_write(seed in any::<u64>()) {
        history(seed, 24 << 20, false);
    }
}

#[test]
fn neither_loses_a_write_above_the_gap() {
    for seed in 0..2 {
        history(seed, TWO_SLOTS, true);
        history(seed, TWO_SLOTS, false);
    }
}

/// KVM answers for the first slot and refuses the second: what was cleared in the first is dirty all the same.
#[test]
fn a_look_at_kvms_log_that_fails_loses_nothing() {
    let Some(mut subject) = Subject::new(TWO_SLOTS, false) else { return };
    subject.collect();
    subject.capture(&mut SmallRng::seed_from_u64(0), false);
    let address = u32::try_from(FREE).unwrap();
    subject.device_write(LIST, &[address.to_le_bytes(), [0; 4]].concat());
    run_list(subject.vcpu.as_mut().unwrap());
    let slots = subject.machine.ram.slots();
    // A slot without bytes is none.
    let gone = Slot { len: 0, ..slots[1] };
    set_memslots(&subject.machine.vm, &[slots[0], gone], true).unwrap();
    let (vm, ram) = (&subject.machine.vm, &subject.machine.ram);
    assert!(subject.tracker.collect(vm, ram, &subject.presence, Then::Track).is_err());
    let page = subject.pages_at(FREE..FREE + 1);
    assert!(subject.tracker.pages().contains_all(page));
}

/// Page tables of which a part is not tracked: what was taken before that is found is dirty all the same.
#[test]
fn a_look_at_page_tables_that_fails_loses_nothing() {
    let Some(mut subject) = Subject::new(24 << 20, true) else { return };
    if !subject.presence.tracks_writes() {
        return eprintln!("left out: this kernel's page tables do not tell what was written");
    }
    subject.collect();
    subject.capture(&mut SmallRng::seed_from_u64(0), false);
    subject.machine.ram.guest_memory().write_slice(&[7], GuestAddress(FREE)).unwrap();
    subject.machine.ram.take_device_writes();
    subject.presence.forget_tracking(subject.pages() - 512..subject.pages());
    let (vm, ram) = (&subject.machine.vm, &subject.machine.ram);
    assert!(subject.tracker.collect(vm, ram, &subject.presence, Then::Track).is_err());
    let page = subject.pages_at(FREE..FREE + 1);
    assert!(subject.tracker.pages().contains_all(page));
}

/// What is collected lightly counts as written until it is collected for good.
#[test]
fn what_is_collected_lightly_is_found_again() {
    let Some(mut subject) = Subject::new(24 << 20, true) else { return };
    if !subject.presence.tracks_writes() {
        return eprintln!("left out: this kernel's page tables do not tell what was written");
    }
    let mut rng = SmallRng::seed_from_u64(0);
    subject.collect();
    subject.capture(&mut rng, false);
    subject.machine.ram.guest_memory().write_slice(&[7], GuestAddress(FREE)).unwrap();
    subject.machine.ram.take_device_writes();
    let page = subject.pages_at(FREE..FREE + 1);
    for lightly in [true, true, false] {
        if lightly {
            subject.collect_lightly();
        } else {
            subject.collect();
        }
        assert!(subject.tracker.pages().contains_all(page.clone()), "lightly: {lightly}");
        subject.capture(&mut rng, false);
        let (vm, ram) = (&subject.machine.vm, &subject.machine.ram);
        let left = subject.tracker.estimate(vm, ram, &subject.presence).unwrap();
        assert_eq!(left.contains_all(page.clone()), lightly);
    }
}
