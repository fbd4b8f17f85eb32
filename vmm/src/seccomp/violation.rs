//! What happens when a thread makes a system call that its role does not have: the exit note says so, and the process ends.

use std::fs::File;
use std::io;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use super::ROLE;
use crate::control::types::EXIT_SECCOMP;

static EXIT_NOTE: AtomicI32 = AtomicI32::new(-1);

/// The kernel's `siginfo_t` of a SIGSYS (`include/uapi/asm-generic/siginfo.h`).
#[repr(C)]
struct Info {
    signal: i32,
    error: i32,
    code: i32,
    padding: i32,
    address: u64,
    call: i32,
    architecture: u32,
}

/// Catches violations from here on.
pub(super) fn install(exit_note: &File) -> io::Result<()> {
    let note: RawFd = exit_note.try_clone()?.into_raw_fd();
    EXIT_NOTE.store(note, Ordering::Release);
    // SAFETY: zeroes are a value of it: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_flags = libc::SA_SIGINFO;
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = caught;
    action.sa_sigaction = handler as libc::sighandler_t;
    // SAFETY: `caught` makes only calls that a signal handler may, and does not return.
    let installed = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    if installed < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Text in a buffer of its own: a signal handler allocates nothing.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }
}

fn note(call: i32, role: &str) -> Line {
    let mut line = Line { bytes: [0; 256], len: 0 };
    line.push(b"{\"status\":");
    line.push_number(EXIT_SECCOMP.unsigned_abs());
    line.push(b",\"reason\":\"ended by seccomp: system call ");
    line.push_number(call.unsigned_abs());
    line.push(b" is not one of a ");
    line.push(role.as_bytes());
    line.push(b" thread\"}");
    line
}

extern "C" fn caught(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands a SIGSYS handler a siginfo of this layout, and it lives as long as the handler runs.
    let call = unsafe { (*info.cast::<Info>()).call };
    let role = ROLE.get().map_or("main", super::Role::name);
    let line = note(call, role);
    // SAFETY: writes initialised bytes to a descriptor of ours; then ends the process. Both calls are in every table.
    unsafe {
        libc::pwrite(EXIT_NOTE.load(Ordering::Acquire), line.bytes.as_ptr().cast(), line.len, 0);
        libc::write(2, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_SECCOMP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::types::ExitNote;

    #[test]
    fn the_note_is_one_that_the_supervisor_reads() {
        let line = note(321, "devices");
        let read: ExitNote = serde_json::from_slice(&line.bytes[..line.len]).unwrap();
        assert_eq!(read.status, EXIT_SECCOMP);
        assert_eq!(read.reason, "ended by seccomp: system call 321 is not one of a devices thread");
        assert!(note(i32::MAX, "receiver").len < 200);
    }
}
