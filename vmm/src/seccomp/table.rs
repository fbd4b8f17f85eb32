//! The tables: each system call that a role may make, and why. Where the arguments matter they are part of the entry.

use super::Role;

/// One system call.
pub(super) struct Entry {
    pub(super) call: i64,
    pub(super) only: Only,
    #[cfg_attr(not(test), expect(dead_code, reason = "for those who read the table; a test sees that it is there"))]
    pub(super) reason: &'static str,
}

/// With which arguments.
#[derive(Clone, Copy)]
pub(super) enum Only {
    /// Any.
    Always,
    /// An argument (counted from 0) that has one of these values.
    Is { argument: u8, values: &'static [(u64, &'static str)] },
    /// An argument of which the masked bits are these.
    Bits { argument: u8, mask: u64, value: u64 },
    /// An ioctl whose type and number (`type << 8 | number`) is one of these.
    Ioctls(&'static [(u64, &'static str)]),
}

const fn any(call: i64, reason: &'static str) -> Entry {
    Entry { call, only: Only::Always, reason }
}

const fn ioctls(numbers: &'static [(u64, &'static str)], reason: &'static str) -> Entry {
    Entry { call: libc::SYS_ioctl, only: Only::Ioctls(numbers), reason }
}

/// Memory that is executable is never made.
const fn not_executable(call: i64, reason: &'static str) -> Entry {
    Entry { call, only: Only::Bits { argument: 2, mask: libc::PROT_EXEC as u64, value: 0 }, reason }
}

/// What every thread needs: memory, locks, its own end, log lines, and the note of a violation.
pub(super) const EVERY: &[Entry] = &[
    any(libc::SYS_futex, "locks and condition variables"),
    any(libc::SYS_sched_yield, "locks that spin"),
    not_executable(libc::SYS_mmap, "the heap; memory files"),
    not_executable(libc::SYS_mprotect, "the heap grows; guard pages"),
    any(libc::SYS_mremap, "the heap grows"),
    any(libc::SYS_munmap, "the heap shrinks; a thread's stack at its end"),
    any(libc::SYS_brk, "the heap"),
    any(libc::SYS_madvise, "memory given back; huge pages"),
    any(libc::SYS_write, "log lines; eventfds"),
    any(libc::SYS_pwrite64, "the console log; the exit note"),
    any(libc::SYS_read, "eventfds and timers"),
    any(libc::SYS_close, "descriptors that are dropped"),
    any(libc::SYS_rt_sigreturn, "after the signal that kicks a vCPU"),
    any(libc::SYS_rt_sigprocmask, "the C library around thread starts and aborts"),
    any(libc::SYS_sigaltstack, "the runtime's guard against stack overflow, at a thread's start and end"),
    any(libc::SYS_gettid, "aborts; signals to a thread"),
    any(libc::SYS_getpid, "aborts; signals to a thread"),
    Entry {
        call: libc::SYS_tgkill,
        only: Only::Always,
        reason: "kicks of vCPUs and aborts; there is no other process in its namespace",
    },
    any(libc::SYS_clock_gettime, "clocks, where the kernel gives them to no vDSO"),
    any(libc::SYS_clock_nanosleep, "waits with a deadline"),
    any(libc::SYS_getrandom, "keys of hash tables; the entropy device"),
    any(libc::SYS_exit, "a thread's end"),
    any(libc::SYS_exit_group, "the process's end"),
    any(libc::SYS_restart_syscall, "a wait that a signal interrupted"),
    Entry {
        call: libc::SYS_prctl,
        only: Only::Is {
            argument: 0,
            values: &[
                (libc::PR_SET_NAME as u64, "PR_SET_NAME"),
                (libc::PR_SET_NO_NEW_PRIVS as u64, "PR_SET_NO_NEW_PRIVS"),
                (libc::PR_SET_VMA as u64, "PR_SET_VMA"),
                (PR_GET_AUXV, "PR_GET_AUXV"),
            ],
        },
        reason: "a thread's name; a filter's precondition; names of the C library's mappings; what the \
                 kernel told the process at its start",
    },
    Entry {
        call: libc::SYS_seccomp,
        only: Only::Is { argument: 0, values: &[(libc::SECCOMP_SET_MODE_FILTER as u64, "SECCOMP_SET_MODE_FILTER")] },
        reason: "a thread enters its role, which can only narrow what it may",
    },
    any(libc::SYS_set_robust_list, "a thread's start"),
    any(libc::SYS_rseq, "a thread's start"),
    any(libc::SYS_sched_getaffinity, "how many processors there are; a thread's stack"),
    Entry {
        call: libc::SYS_rt_sigaction,
        // Not SIGSYS: the handler of violations stays.
        only: Only::Is {
            argument: 0,
            values: &[
                (libc::SIGABRT as u64, "SIGABRT"),
                (libc::SIGSEGV as u64, "SIGSEGV"),
                (libc::SIGBUS as u64, "SIGBUS"),
                (KICK, "the kick of vCPUs"),
            ],
        },
        reason: "aborts; stack overflows; the handler of kicks, with the first machine",
    },
];

/// Linux `include/uapi/linux/prctl.h`, 6.4 and later.
const PR_GET_AUXV: u64 = 0x4155_5856;

/// The first real-time signal that the C library leaves to programs (it keeps 32 and 33), which kicks vCPUs.
const KICK: u64 = 34;

const VCPU: &[Entry] = &[
    ioctls(
        &[
            (0xae80, "KVM_RUN"),
            (0xae81, "KVM_GET_REGS"),
            (0xae83, "KVM_GET_SREGS"),
            (0xae88, "KVM_GET_MSRS"),
            (0xae8c, "KVM_GET_FPU"),
            (0xae8e, "KVM_GET_LAPIC"),
            (0xae91, "KVM_GET_CPUID2"),
            (0xae98, "KVM_GET_MP_STATE"),
            (0xae9f, "KVM_GET_VCPU_EVENTS"),
            (0xaea1, "KVM_GET_DEBUGREGS"),
            (0xaea3, "KVM_GET_TSC_KHZ; KVM_ENABLE_CAP has the same number"),
            (0xaea4, "KVM_GET_XSAVE"),
            (0xaea6, "KVM_GET_XCRS"),
            (0xaecc, "KVM_GET_SREGS2"),
            (0xaecf, "KVM_GET_XSAVE2"),
            (0xaee2, "KVM_GET_DEVICE_ATTR"),
        ],
        "runs the guest; reads its state at a pause",
    ),
    any(libc::SYS_ftruncate, "the console log starts over"),
    any(libc::SYS_lseek, "the console log starts over"),
    any(libc::SYS_epoll_ctl, "a driver starts or resets the vsock device, or the network device"),
    any(libc::SYS_timerfd_settime, "as above"),
    any(libc::SYS_shutdown, "a driver resets the vsock device"),
];

const DEVICES: &[Entry] = &[
    any(libc::SYS_epoll_wait, "waits for doorbells and sockets"),
    any(libc::SYS_epoll_pwait, "as above"),
    any(libc::SYS_epoll_ctl, "connections come and go"),
    any(libc::SYS_timerfd_settime, "deadlines of connections"),
    any(libc::SYS_accept4, "a client of the guest's vsock"),
    any(libc::SYS_recvfrom, "bytes of a client"),
    any(libc::SYS_sendto, "bytes for a client"),
    any(libc::SYS_recvmsg, "as above"),
    any(libc::SYS_sendmsg, "as above"),
    any(libc::SYS_shutdown, "a connection's end"),
    any(libc::SYS_fcntl, "sockets that do not block"),
    ioctls(
        &[(0x5421, "FIONBIO"), (0x54d0, "TUNSETOFFLOAD"), (0x54d8, "TUNSETVNETHDRSZ")],
        "sockets that do not block; what a driver of the network device has agreed to, with its first work",
    ),
    any(libc::SYS_readv, "block requests; frames from the tap"),
    any(libc::SYS_writev, "block requests; frames for the tap"),
    any(libc::SYS_pread64, "block requests"),
    any(libc::SYS_preadv, "block requests"),
    any(libc::SYS_pwritev, "block requests"),
    any(libc::SYS_fallocate, "discards"),
    any(libc::SYS_ftruncate, "discards"),
    any(libc::SYS_lseek, "where a disk has data"),
    any(libc::SYS_fsync, "flushes"),
    any(libc::SYS_fdatasync, "flushes"),
];

const FAULTS: &[Entry] = &[
    any(libc::SYS_poll, "waits for faults"),
    any(libc::SYS_ppoll, "as above"),
    ioctls(
        &[
            (0xaa00, "UFFDIO_REGISTER"),
            (0xaa01, "UFFDIO_UNREGISTER"),
            (0xaa02, "UFFDIO_WAKE"),
            (0x6610, "PAGEMAP_SCAN"),
        ],
        "makes memory present",
    ),
    any(libc::SYS_fallocate, "memory without content"),
    any(libc::SYS_lseek, "where a memory file has data"),
];

const RECEIVER: &[Entry] = &[
    any(libc::SYS_accept4, "the supervisor's connection"),
    any(libc::SYS_recvmsg, "opened files"),
    any(libc::SYS_recvfrom, "the end of a connection"),
    any(libc::SYS_sendto, "the word that they are there"),
    any(libc::SYS_setsockopt, "its deadline"),
    any(libc::SYS_fcntl, "as above"),
];

const WORKER: &[Entry] = &[
    ioctls(
        &[
            (0xae00, "KVM_GET_API_VERSION"),
            (0xae01, "KVM_CREATE_VM"),
            (0xae02, "KVM_GET_MSR_INDEX_LIST"),
            (0xae03, "KVM_CHECK_EXTENSION"),
            (0xae04, "KVM_GET_VCPU_MMAP_SIZE"),
            (0xae05, "KVM_GET_SUPPORTED_CPUID"),
            (0xae41, "KVM_CREATE_VCPU"),
            (0xae42, "KVM_GET_DIRTY_LOG"),
            (0xae46, "KVM_SET_USER_MEMORY_REGION"),
            (0xae47, "KVM_SET_TSS_ADDR"),
            (0xae48, "KVM_SET_IDENTITY_MAP_ADDR"),
            (0xae60, "KVM_CREATE_IRQCHIP"),
            (0xae62, "KVM_GET_IRQCHIP"),
            (0xae63, "KVM_SET_IRQCHIP"),
            (0xae76, "KVM_IRQFD"),
            (0xae77, "KVM_CREATE_PIT2"),
            (0xae79, "KVM_IOEVENTFD"),
            (0xae7b, "KVM_SET_CLOCK"),
            (0xae7c, "KVM_GET_CLOCK"),
            (0xae82, "KVM_SET_REGS"),
            (0xae84, "KVM_SET_SREGS"),
            (0xae89, "KVM_SET_MSRS"),
            (0xae8d, "KVM_SET_FPU"),
            (0xae8f, "KVM_SET_LAPIC"),
            (0xae90, "KVM_SET_CPUID2"),
            (0xae99, "KVM_SET_MP_STATE"),
            (0xaea0, "KVM_SET_VCPU_EVENTS, KVM_SET_PIT2"),
            (0xaea2, "KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ"),
            (0xaea5, "KVM_SET_XSAVE"),
            (0xaea7, "KVM_SET_XCRS"),
            (0xaead, "KVM_KVMCLOCK_CTRL"),
            (0xaec0, "KVM_CLEAR_DIRTY_LOG"),
            (0xaecd, "KVM_SET_SREGS2"),
            (0xaee1, "KVM_SET_DEVICE_ATTR"),
            (0xaee3, "KVM_HAS_DEVICE_ATTR"),
            (0xaa3f, "UFFDIO_API"),
        ],
        "makes, restores and saves machines",
    ),
    Entry {
        call: libc::SYS_clone,
        // A thread of this process, and no namespace.
        only: Only::Bits {
            argument: 0,
            mask: (libc::CLONE_THREAD | libc::CLONE_VM | NAMESPACES) as u64,
            value: (libc::CLONE_THREAD | libc::CLONE_VM) as u64,
        },
        reason: "threads of machines and of blocking work",
    },
    any(libc::SYS_clone3, "answered that there is no such call: see `answered`"),
    any(libc::SYS_openat, "as above"),
    any(libc::SYS_memfd_create, "guest memory"),
    any(libc::SYS_eventfd2, "doorbells and interrupts"),
    any(libc::SYS_epoll_create1, "the device thread's loop"),
    any(libc::SYS_timerfd_create, "deadlines of vsock connections"),
    any(libc::SYS_socketpair, "questions to the dialler"),
    any(libc::SYS_getsockopt, "errors of a connection"),
    any(libc::SYS_setsockopt, "options of a connection"),
    any(libc::SYS_getsockname, "the runtime looks at a socket that it takes over"),
    any(libc::SYS_getpeername, "as above"),
    any(libc::SYS_dup, "descriptors that are shared"),
    any(libc::SYS_fstat, "lengths of files"),
    any(libc::SYS_newfstatat, "lengths of files"),
    any(libc::SYS_statx, "lengths of files"),
    any(libc::SYS_sysinfo, "whether the host swaps"),
    any(libc::SYS_uname, "the host's kernel, for the manifest"),
    any(libc::SYS_getpriority, "threads of the background"),
    any(libc::SYS_setpriority, "threads of the background"),
    any(libc::SYS_copy_file_range, "files written from files"),
    any(libc::SYS_membarrier, "the C library"),
];

const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP;

/// The table of a role, without what every thread needs.
pub(super) const fn of(role: Role) -> &'static [Entry] {
    match role {
        Role::Vcpu => VCPU,
        Role::Devices => DEVICES,
        Role::Faults => FAULTS,
        Role::Receiver => RECEIVER,
        Role::Worker => WORKER,
    }
}
