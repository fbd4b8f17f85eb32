//! What of this process's own memory stays resident: an idle sandbox is to cost little more than its guest's memory.
//!
//! A capture and a restore go through many megabytes of buffers in a moment. By default the C library asks the kernel for each large one, and
//! the kernel clears it: a sixth of a capture's time, measured. So freed memory stays while it is needed again, and is given back when things
//! are quiet. With it go the mapped pages of the program: by then most of its code has run for the last time in a while, and it comes back from
//! the page cache in pieces of 64 KiB.

use std::ops::Range;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::mm::{Advice, madvise};

/// Requests below this are served from freed memory where possible, bytes: more than a pack's buffer.
const FROM_HEAP: libc::c_int = 32 << 20;
/// Free memory at the end of the heap that is not given back at once, bytes.
const KEPT: libc::c_int = 64 << 20;

/// Free memory that is made ready ahead, bytes: about what the restore of a sandbox with some hundred MiB allocates.
const READY: usize = 4 << 20;
/// Bytes of the kernel's pages.
const PAGE: usize = 4096;

/// Heaps at most. Only the first gives back what is free at its end, and each of the others would keep up to 64 MiB of that: 20 MiB were seen
/// after a wake. What threads allocate often is small and comes from caches of their own.
const HEAPS: libc::c_int = 1;

/// How long a blocking thread waits for more: each keeps a stack, and an idle sandbox needs none.
pub const IDLE_THREAD: Duration = Duration::from_millis(500);

/// How long such a thread may take to end.
const END_OF_THREAD: Duration = Duration::from_millis(50);

/// Where the program and its libraries lie. Noted at the start: a jail may show no `/proc` later, and nothing is loaded after it.
static PROGRAM: OnceLock<Vec<Range<usize>>> = OnceLock::new();

/// Keeps freed memory from now on. Called before there are threads.
pub fn keep_freed() {
    // SAFETY: `mallopt` takes plain numbers and is called before other threads allocate.
    let done = unsafe {
        [
            libc::mallopt(libc::M_MMAP_THRESHOLD, FROM_HEAP),
            libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT),
            libc::mallopt(libc::M_ARENA_MAX, HEAPS),
        ]
    };
    if done.contains(&0) {
        tracing::debug!("the C library keeps its own ways with freed memory");
    }
    match std::fs::read_to_string("/proc/self/maps") {
        Ok(maps) => drop(PROGRAM.set(maps.lines().filter_map(program_pages).collect())),
        Err(error) => tracing::debug!(%error, "the program's pages will stay"),
    }
}

/// Has some free memory in place: the kernel takes up to half a millisecond for each MiB that is new, and a wake would wait for it.
pub fn make_ready() {
    let mut room = vec![0_u8; READY];
    // A zeroed allocation is only promised: a write to each page makes it. Freed, it stays (see `keep_freed`).
    for page in room.chunks_mut(PAGE) {
        if let Some(first) = page.first_mut() {
            *first = std::hint::black_box(0);
        }
    }
}

/// Gives freed memory and the program's pages back to the kernel. Takes a millisecond or two; for when a burst of work is over.
pub fn give_back() {
    // SAFETY: callable at any time from any thread.
    unsafe { libc::malloc_trim(0) };
    PROGRAM.get().into_iter().flatten().for_each(unmap);
}

/// The same beside everything else, and once more when the threads that have worked are gone: they leave what each of them kept for itself, and end
/// with code that nothing else needs.
pub async fn quiet_down() {
    if let Err(error) = tokio::task::spawn_blocking(give_back).await {
        tracing::debug!(%error, "freed memory stays");
    }
    tokio::time::sleep(IDLE_THREAD + END_OF_THREAD).await;
    // In place: another thread for it would be one more that ends.
    give_back();
}

/// The addresses of a line of `/proc/self/maps`, if nobody can ever have written there: code, and what a program or a library begins with. Other
/// read-only pages of a file may hold what the loader wrote before it protected them.
fn program_pages(line: &str) -> Option<Range<usize>> {
    let mut words = line.split_ascii_whitespace();
    let (addresses, rights, offset) = (words.next()?, words.next()?, words.next()?);
    let path = words.nth(2)?;
    let begins = rights == "r--p" && offset.bytes().all(|digit| digit == b'0');
    if !path.starts_with('/') || !(rights == "r-xp" || begins) {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

fn unmap(pages: &Range<usize>) {
    // SAFETY: a private mapping of a file in which no page was written: each is read from the file again when it is next touched.
    if let Err(error) = unsafe { madvise(pages.start as *mut _, pages.len(), Advice::LinuxDontNeed) } {
        tracing::debug!(%error, "pages of the program stay");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_never_written_is_given_back() {
        let code = "55d0a000-55d0b000 r-xp 00010000 fe:00 42   /usr/bin/stasis-vmm";
        assert_eq!(program_pages(code), Some(0x55d0_a000..0x55d0_b000));
        assert!(program_pages("7f00-7f01 r--p 00000000 fe:00 42 /usr/lib/libc.so.6").is_some());
        for other in [
            "7f00-7f01 r--p 00200000 fe:00 42 /usr/lib/libc.so.6",
            "7f00-7f01 rw-p 00000000 fe:00 42 /usr/lib/libc.so.6",
            "7f00-7f01 r-xp 00000000 00:00 0 [vdso]",
            "7f00-7f01 rw-s 00000000 00:01 7 /memfd:guest-memory (deleted)",
            "7f00-7f01 r-xp 00000000 00:00 0",
            "",
        ] {
            assert_eq!(program_pages(other), None, "{other}");
        }
    }

    #[test]
    fn a_process_goes_on_after_it_has_given_back() {
        keep_freed();
        make_ready();
        let kept: Vec<u8> = (0..=255).collect();
        give_back();
        assert_eq!(kept.iter().map(|&byte| u64::from(byte)).sum::<u64>(), 255 * 128);
        assert!(std::thread::spawn(|| "runs".len()).join().is_ok_and(|len| len == 4));
    }
}
