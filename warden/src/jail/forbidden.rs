//! System calls that no jailed process may use, from before its program runs: they answer `EPERM`. What a program needs by itself is
//! narrower still and its own matter (a VMM has a filter for each of its threads); this wall holds before those are there, and for
//! programs that have none.

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

/// Each with what it would open.
const CALLS: &[(i64, &str)] = &[
    (libc::SYS_ptrace, "another process's memory and registers"),
    (libc::SYS_process_vm_readv, "another process's memory"),
    (libc::SYS_process_vm_writev, "another process's memory"),
    (libc::SYS_process_madvise, "another process's memory"),
    (libc::SYS_pidfd_getfd, "another process's descriptors"),
    (libc::SYS_kcmp, "where kernel objects lie"),
    (libc::SYS_unshare, "namespaces, in which old kernel code is reachable without privileges"),
    (libc::SYS_setns, "namespaces of others"),
    (libc::SYS_mount, "file systems"),
    (libc::SYS_umount2, "what lies under a mount"),
    (libc::SYS_pivot_root, "another root"),
    (libc::SYS_chroot, "another root"),
    (libc::SYS_open_tree, "mounts"),
    (libc::SYS_move_mount, "mounts"),
    (libc::SYS_fsopen, "file systems"),
    (libc::SYS_fsmount, "file systems"),
    (libc::SYS_fspick, "file systems"),
    (libc::SYS_mount_setattr, "mounts"),
    (libc::SYS_mknod, "device nodes"),
    (libc::SYS_mknodat, "device nodes"),
    (libc::SYS_open_by_handle_at, "files outside the tree"),
    (libc::SYS_name_to_handle_at, "names for files outside the tree"),
    (libc::SYS_keyctl, "kernel keyrings, which are not of any namespace"),
    (libc::SYS_add_key, "kernel keyrings"),
    (libc::SYS_request_key, "kernel keyrings"),
    (libc::SYS_bpf, "the kernel's interpreter"),
    (libc::SYS_perf_event_open, "what others do"),
    (libc::SYS_init_module, "kernel code"),
    (libc::SYS_finit_module, "kernel code"),
    (libc::SYS_delete_module, "kernel code"),
    (libc::SYS_kexec_load, "another kernel"),
    (libc::SYS_kexec_file_load, "another kernel"),
    (libc::SYS_reboot, "the host"),
    (libc::SYS_swapon, "swap"),
    (libc::SYS_swapoff, "swap"),
    (libc::SYS_acct, "accounting"),
    (libc::SYS_quotactl, "quotas"),
    (libc::SYS_syslog, "the kernel's log"),
    (libc::SYS_iopl, "ports"),
    (libc::SYS_ioperm, "ports"),
    (libc::SYS_settimeofday, "the clock"),
    (libc::SYS_clock_settime, "the clock"),
    (libc::SYS_adjtimex, "the clock"),
    (libc::SYS_clock_adjtime, "the clock"),
    (libc::SYS_sethostname, "the host's name"),
    (libc::SYS_setdomainname, "the host's name"),
    (libc::SYS_io_uring_setup, "work in the kernel that no filter sees"),
    (libc::SYS_io_uring_enter, "as above"),
    (libc::SYS_io_uring_register, "as above"),
    (libc::SYS_userfaultfd, "faults of the kernel's own accesses; the device gives what is needed"),
    (libc::SYS_fanotify_init, "what others open"),
    (libc::SYS_lookup_dcookie, "where files lie"),
    (libc::SYS_vhangup, "terminals"),
    (libc::SYS_migrate_pages, "another process's memory"),
    (libc::SYS_move_pages, "another process's memory"),
];

/// The filter.
pub(super) fn filter() -> Result<BpfProgram, seccompiler::Error> {
    let rules = CALLS.iter().map(|(call, _)| (*call, Vec::<SeccompRule>::new())).collect();
    let denied = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    Ok(SeccompFilter::new(rules, SeccompAction::Allow, denied, TargetArch::x86_64)?.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_compiles_and_names_each_call_once() {
        let mut numbers: Vec<_> = CALLS.iter().map(|(call, _)| call).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), CALLS.len());
        assert!(!filter().unwrap().is_empty());
    }
}
