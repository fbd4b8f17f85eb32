//! The guest's console on the host: a log of bounded size in two files, which whoever starts the VMM opens, written at a bounded rate.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use stasis_devices::token_bucket::TokenBucket;

/// A log that starts over when it is full; what it held until then is kept in the older file.
///
/// What a guest prints faster than its rate is lost, as on a slow line without flow control: a writer that waited would hold its vCPU, and one
/// that did not would have the host's disk work for nothing.
pub(crate) struct ConsoleLog {
    file: File,
    older: File,
    written: u64,
    rate: TokenBucket,
    lost: Arc<AtomicU64>,
    clock: fn() -> Instant,
}

/// Bytes of one log file. The guest decides how much it prints; two files bound what the host keeps.
const LIMIT: u64 = 1 << 20;
/// Bytes that may come at once, however slow the rate is: what a kernel says while it boots, many times over.
const BURST: u64 = LIMIT;
const CHUNK: usize = 64 << 10;

impl ConsoleLog {
    /// Appends to `file`, so many bytes a second at most.
    pub(crate) fn new(file: File, older: File, bytes_per_second: u64) -> std::io::Result<Self> {
        Self::with_clock(file, older, bytes_per_second, Instant::now)
    }

    fn with_clock(file: File, older: File, bytes_per_second: u64, clock: fn() -> Instant) -> std::io::Result<Self> {
        let written = file.metadata()?.len();
        let rate = TokenBucket::new(bytes_per_second, BURST, clock());
        Ok(Self { file, older, written, rate, lost: Arc::default(), clock })
    }

    /// Counts the bytes that were lost.
    pub(crate) fn lost(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.lost)
    }

    /// A reader that finds the file shorter than what it has read goes on with the older one, at the same place.
    fn start_over(&mut self) -> std::io::Result<()> {
        self.older.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        let (mut chunk, mut at) = (vec![0; CHUNK], 0);
        loop {
            let len = self.file.read(&mut chunk)?;
            if len == 0 {
                break;
            }
            self.older.write_all_at(&chunk[..len], at)?;
            at += len as u64;
        }
        self.file.set_len(0)?;
        self.written = 0;
        Ok(())
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.rate.opens((self.clock)()).is_some() {
            self.lost.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            return Ok(bytes.len());
        }
        if self.written >= LIMIT {
            self.start_over()?;
        }
        let written = self.file.write_at(bytes, self.written)?;
        self.written += written as u64;
        self.rate.take(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Duration;

    fn files() -> [File; 2] {
        [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()]
    }

    fn sizes(files: &[File; 2]) -> [u64; 2] {
        files.each_ref().map(|file| file.metadata().unwrap().len())
    }

    fn log(files: &[File; 2], bytes_per_second: u64, clock: fn() -> Instant) -> ConsoleLog {
        let [file, older] = files.each_ref().map(|file| file.try_clone().unwrap());
        ConsoleLog::with_clock(file, older, bytes_per_second, clock).unwrap()
    }

    #[test]
    fn a_chatty_guest_fills_two_files_and_no_more() {
        let files = files();
        let mut log = log(&files, u64::MAX, Instant::now);
        for n in 0..40_u8 {
            log.write_all(&vec![n; 100_000]).unwrap();
        }
        let sizes = sizes(&files);
        assert!(sizes.iter().sum::<u64>() <= 2 * (LIMIT + 100_000), "{sizes:?}");
        // The older one ends where the other begins.
        let mut byte = [0; 2];
        files[1].read_exact_at(&mut byte[..1], sizes[1] - 1).unwrap();
        files[0].read_exact_at(&mut byte[1..], 0).unwrap();
        assert_eq!(byte[0] + 1, byte[1]);
        assert_eq!(log.lost().load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_comes_too_fast_is_lost_and_counted_and_the_log_goes_on() {
        static NOW: Mutex<Option<Instant>> = Mutex::new(None);
        fn clock() -> Instant {
            NOW.lock().unwrap().unwrap()
        }
        *NOW.lock().unwrap() = Some(Instant::now());
        let files = files();
        let mut log = log(&files, 1000, clock);
        let burst = usize::try_from(BURST).unwrap();
        for _ in 0..burst + 5000 {
            log.write_all(b"x").unwrap();
        }
        assert_eq!(sizes(&files).iter().sum::<u64>(), BURST);
        assert_eq!(log.lost().load(Ordering::Relaxed), 5000);
        *NOW.lock().unwrap() = Some(clock() + Duration::from_secs(1));
        for _ in 0..5000 {
            log.write_all(b"y").unwrap();
        }
        assert_eq!(log.lost().load(Ordering::Relaxed), 9000);
    }
}
