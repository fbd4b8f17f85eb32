//! The lock of a device that the device thread and vCPUs share, with turns: a device that its guest keeps busy does not keep others waiting.
//!
//! A plain lock is handed to whoever asks first, and a thread that gives it back and asks again at once is first nearly always. So a device
//! thread with a device that is always ready would keep its guest's vCPUs out, and a vCPU that waits for a device cannot be stopped for a
//! pause.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::bus::lock;

/// How long the device thread stands back for those who wait. They are woken long before that, or the host is too busy to be fair.
const STAND_BACK: Duration = Duration::from_millis(1);

/// A device behind its lock.
pub(crate) struct Turns<T> {
    device: Mutex<T>,
    /// Threads other than the device thread that wait for the lock.
    waiting: AtomicU32,
    /// The device thread waits until they had it.
    stands_back: AtomicBool,
    gate: Mutex<()>,
    passed: Condvar,
}

impl<T> Turns<T> {
    pub(crate) fn new(device: T) -> Self {
        let (waiting, stands_back) = (AtomicU32::new(0), AtomicBool::new(false));
        Self { device: Mutex::new(device), waiting, stands_back, gate: Mutex::new(()), passed: Condvar::new() }
    }

    /// For everybody but the device thread.
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let device = lock(&self.device);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        // Here or in `lock_next`, one of the two sees what the other wrote.
        if self.stands_back.load(Ordering::SeqCst) {
            drop(lock(&self.gate));
            self.passed.notify_one();
        }
        device
    }

    /// For the device thread, once for each event: after those who wait already.
    pub(crate) fn lock_next(&self) -> MutexGuard<'_, T> {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            let gate = lock(&self.gate);
            self.stands_back.store(true, Ordering::SeqCst);
            let waits = |(): &mut ()| self.waiting.load(Ordering::SeqCst) > 0;
            drop(self.passed.wait_timeout_while(gate, STAND_BACK, waits).unwrap_or_else(PoisonError::into_inner));
            self.stands_back.store(false, Ordering::SeqCst);
        }
        lock(&self.device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::time::Instant;

    #[test]
    fn who_waits_gets_a_device_that_is_always_busy() {
        let device = Arc::new(Turns::new(()));
        let ended = Arc::new(AtomicBool::new(false));
        let (tell, is_busy) = std::sync::mpsc::sync_channel(1);
        let busy = {
            let (device, ended) = (device.clone(), ended.clone());
            std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let _device = device.lock_next();
                    let _ = tell.try_send(());
                    let until = Instant::now() + Duration::from_millis(5);
                    while Instant::now() < until {
                        std::hint::spin_loop();
                    }
                }
            })
        };
        is_busy.recv().unwrap();
        let begun = Instant::now();
        for _ in 0..20 {
            drop(device.lock());
        }
        let took = begun.elapsed();
        ended.store(true, Ordering::Relaxed);
        busy.join().unwrap();
        assert!(took < Duration::from_secs(2), "{took:?} for 20 turns of 5 ms at most");
    }
}
