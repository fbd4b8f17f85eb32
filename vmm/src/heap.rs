//! How this process's heap treats what was freed.
//!
//! A capture and a restore go through many megabytes of buffers in a moment. By default the C library asks the kernel for each large one, and
//! the kernel clears it: a sixth of a capture's time, measured. So freed memory stays while it is needed again, and is given back when things
//! are quiet, since an idle sandbox is to cost little more than its guest's memory.

/// Requests below this are served from freed memory where possible, bytes: more than a pack's buffer.
const FROM_HEAP: libc::c_int = 32 << 20;
/// Free memory at the end of the heap that is not given back at once, bytes.
const KEPT: libc::c_int = 64 << 20;

/// Heaps at most. Many of them, one for each thread, would each keep their freed memory.
const HEAPS: libc::c_int = 2;

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
}

/// Gives freed memory back to the kernel. Takes a millisecond or two; for when a burst of work is over.
pub fn give_back() {
    // SAFETY: callable at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}
