//! Watches a guest's console from a thread of its own and notes when each byte was there.

use std::fs::File;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::vmm::Error;

/// Between two looks: what a time can be late by.
const LOOK: Duration = Duration::from_micros(100);

/// Niceness of the watching thread: it must not wait behind guests that spin.
const PRIORITY: i32 = -10;

/// A byte that the guest printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// When it was seen.
    pub at: Instant,
    /// When it was not there yet: the look before.
    pub after: Instant,
    /// It.
    pub byte: u8,
}

/// A pass of pulse over its hot set, from the end of the gap before it to its tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// When it began; when both its ends were seen in one look, the look before, so that no pass is taken for shorter than it may be.
    pub began: Instant,
    /// When it ended.
    pub ended: Instant,
}

impl Pass {
    /// How long it took.
    pub fn took(&self) -> Duration {
        self.ended - self.began
    }
}

/// A watch over one console log, from now on; the file may come later, or be replaced by a new one once.
pub struct Watch {
    beats: Arc<Mutex<Vec<Beat>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Begins. Bytes that are in the file already are not reported.
    pub fn start(path: PathBuf) -> Self {
        let beats = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let before = std::fs::metadata(&path).ok().map(|m| (m.ino(), m.len()));
        let (to, until) = (beats.clone(), stop.clone());
        let thread = std::thread::spawn(move || watch(&path, before, &to, &until));
        Self { beats, stop, thread: Some(thread) }
    }

    /// What was seen so far.
    pub fn beats(&self) -> Vec<Beat> {
        self.beats.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits until `found` finds something in what was seen.
    pub async fn until<T>(
        &self,
        what: &str,
        within: Duration,
        mut found: impl FnMut(&[Beat]) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + within;
        loop {
            let beats = self.beats();
            if beats.iter().any(|beat| beat.byte == b'!') {
                return Err("pulse has lost memory: it prints '!'".into());
            }
            if let Some(answer) = found(&beats) {
                return Ok(answer);
            }
            if Instant::now() > deadline {
                return Err(format!("waited {} s for {what}", within.as_secs()).into());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only reads a file: a panic there is a bug that the missing beats show.
            let _ = thread.join();
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "looking at a file every 100 µs is what this thread is for")]
fn watch(path: &PathBuf, before: Option<(u64, u64)>, to: &Mutex<Vec<Beat>>, stop: &AtomicBool) {
    let mut open: Option<(File, u64)> = None;
    let mut buffer = [0; 4096];
    // Thread by thread on Linux. Without the right to it, a busy machine makes what is seen a little later.
    let _ = rustix::process::setpriority_process(None, PRIORITY);
    let mut after = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        if open.is_none()
            && let Ok(file) = File::open(path)
            && let Ok(metadata) = file.metadata()
        {
            let from = before.filter(|(inode, _)| *inode == metadata.ino()).map_or(0, |(_, len)| len);
            open = Some((file, from));
        }
        if let Some((file, at)) = &mut open {
            while let Ok(read) = file.read_at(&mut buffer, *at) {
                let now = Instant::now();
                *at += read as u64;
                let seen = buffer[..read].iter().map(|byte| Beat { at: now, after, byte: *byte });
                to.lock().unwrap_or_else(PoisonError::into_inner).extend(seen);
                if read < buffer.len() {
                    after = now;
                    break;
                }
            }
        } else {
            after = Instant::now();
        }
        std::thread::sleep(LOOK);
    }
}

/// Whole passes, in order.
pub fn passes(beats: &[Beat]) -> impl Iterator<Item = Pass> + '_ {
    beats.windows(2).filter(|two| two[0].byte == b',' && two[1].byte == b'.').map(|two| {
        let began = if two[0].at == two[1].at { two[0].after } else { two[0].at };
        Pass { began, ended: two[1].at }
    })
}

/// Where the guest stood still: the longest silence after `from` that no pass explains, and when it ended.
pub fn longest_silence(beats: &[Beat], from: Instant, to: Instant) -> Option<(Duration, Instant)> {
    beats
        .windows(2)
        .filter(|two| two[1].at >= from && two[0].at <= to && two[1].byte == b',')
        .map(|two| (two[1].at - two[0].at, two[1].at))
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE: Duration = Duration::from_micros(500);

    fn beat(at: Instant, byte: u8) -> Beat {
        Beat { at, after: at.checked_sub(LATE).unwrap(), byte }
    }

    fn beats(text: &str, start: Instant) -> Vec<Beat> {
        text.bytes().zip(0..).map(|(byte, n)| beat(start + Duration::from_millis(n), byte)).collect()
    }

    #[test]
    fn a_pass_is_from_the_last_beat_to_the_tick() {
        let start = Instant::now();
        let seen: Vec<_> = passes(&beats(".,,,..,.", start)).map(|pass| pass.ended - start).collect();
        assert_eq!(seen, [Duration::from_millis(4), Duration::from_millis(7)], "the second of two ticks is no pass");
    }

    #[test]
    fn a_pass_that_one_look_saw_whole_is_as_long_as_it_can_be() {
        let start = Instant::now();
        let seen: Vec<_> = passes(&[beat(start, b','), beat(start, b'.')]).map(|pass| pass.took()).collect();
        assert_eq!(seen, [LATE]);
    }

    #[test]
    fn a_silence_that_ends_in_a_tick_is_a_pass() {
        let start = Instant::now();
        let ms = |n| start + Duration::from_millis(n);
        let seen = [beat(ms(0), b','), beat(ms(40), b'.'), beat(ms(41), b','), beat(ms(61), b','), beat(ms(62), b',')];
        assert_eq!(longest_silence(&seen, start, ms(100)), Some((Duration::from_millis(20), ms(61))));
        assert_eq!(longest_silence(&seen, ms(62), ms(100)), Some((Duration::from_millis(1), ms(62))));
    }

    #[tokio::test]
    async fn a_watch_sees_what_comes_into_a_file_that_comes_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let watch = Watch::start(path.clone());
        std::fs::write(&path, ",,.").unwrap();
        let passes = watch.until("a pass", Duration::from_secs(10), |beats| passes(beats).next()).await.unwrap();
        assert!(passes.ended >= passes.began);
        let again = Watch::start(path.clone());
        std::io::Write::write_all(&mut File::options().append(true).open(&path).unwrap(), b"G").unwrap();
        again
            .until("new bytes", Duration::from_secs(10), |b| (b.len() == 1 && b[0].byte == b'G').then_some(()))
            .await
            .unwrap();
    }
}
