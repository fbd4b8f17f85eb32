//! A network link for a proxy to imitate: a round-trip time, and a bandwidth that all connections share, each direction having its own.
//!
//! What is imitated: a request's answer comes one round trip later, the first one of a connection two; bytes pass at the link's rate in the
//! order in which they came. What is not: slow start, loss, and TLS handshakes.

use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body as _, Frame, Incoming};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// A link that was idle may send this much at once, in time: tokio's timers have a grain of a millisecond.
const BURST: Duration = Duration::from_millis(2);

/// What a link does to what passes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkShape {
    /// Added to every request, and once more to the first of a connection.
    pub round_trip: Duration,
    /// Bits per second in each direction; unlimited when absent.
    pub bits_per_second: Option<u64>,
}

pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(super) type Bodies = UnsyncBoxBody<Bytes, BoxError>;

/// A body that is here.
pub(super) fn whole(bytes: Bytes) -> Bodies {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// One direction: when what has been let in so far will have passed.
#[derive(Debug)]
struct Lane {
    free_at: Mutex<Instant>,
}

impl Lane {
    fn new() -> Self {
        Self { free_at: Mutex::new(Instant::now()) }
    }

    /// Returns when this many bytes have passed.
    async fn pass(&self, bytes: usize, bits_per_second: u64) {
        let until = {
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = passed(*free_at, Instant::now(), bytes, bits_per_second);
            *free_at
        };
        if until > Instant::now() {
            sleep_until(until).await;
        }
    }
}

/// When this many bytes will have passed that are let in at `now`, behind what will have passed at `free_at`.
fn passed(free_at: Instant, now: Instant, bytes: usize, bits_per_second: u64) -> Instant {
    free_at.max(now.checked_sub(BURST).unwrap_or(now)) + cost(bytes, bits_per_second)
}

fn cost(bytes: usize, bits_per_second: u64) -> Duration {
    let nanos = bytes as u128 * 8 * 1_000_000_000 / u128::from(bits_per_second.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Which way bytes go, as the client sees it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Way {
    Up,
    Down,
}

/// A link that connections share.
#[derive(Debug)]
pub(super) struct Link {
    shape: LinkShape,
    up: Lane,
    down: Lane,
}

impl Link {
    pub(super) fn new(shape: LinkShape) -> Self {
        Self { shape, up: Lane::new(), down: Lane::new() }
    }

    /// The time that an answer is late by. `fresh` says that the connection has carried nothing yet, and is cleared.
    pub(super) async fn travel(&self, fresh: &AtomicBool) {
        let trips = if fresh.swap(false, Ordering::Relaxed) { 2 } else { 1 };
        let late = self.shape.round_trip * trips;
        if !late.is_zero() {
            sleep(late).await;
        }
    }

    /// Returns when this many bytes have passed.
    pub(super) async fn carry(&self, bytes: usize, way: Way) {
        if let Some(rate) = self.shape.bits_per_second {
            let lane = match way {
                Way::Up => &self.up,
                Way::Down => &self.down,
            };
            lane.pass(bytes, rate).await;
        }
    }

    /// The same body at the link's rate.
    pub(super) fn shaped(self: &Arc<Self>, body: Incoming, way: Way) -> Bodies {
        // A stream has no length: an empty one would be sent in chunks.
        if body.is_end_stream() {
            return whole(Bytes::new());
        }
        let link = self.clone();
        let pieces = body.into_data_stream().then(move |piece| {
            let link = link.clone();
            async move {
                let piece = piece.map_err(Box::new)?;
                link.carry(piece.len(), way).await;
                Ok(Frame::data(piece))
            }
        });
        StreamBody::new(pieces).boxed_unsync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_let_in_passes_one_after_the_other() {
        let begun = Instant::now();
        let ms = Duration::from_millis;
        // 12,500 bytes at 100 Mb/s: 1 ms.
        let pass = |free_at, now| passed(free_at, now, 12_500, 100_000_000);
        let together = (0..80).fold(begun, |free_at, _| pass(free_at, begun));
        assert_eq!(together, begun + ms(80));
        assert_eq!(pass(together, begun + ms(50)), begun + ms(81), "behind what is on its way");
        assert_eq!(pass(together, begun + ms(500)), begun + ms(501) - BURST, "a link that was idle saves up a little");
    }

    #[tokio::test]
    async fn connections_share_the_rate() {
        let lane = Arc::new(Lane::new());
        let begun = Instant::now();
        // 8 × 10 × 12,500 bytes at 100 Mb/s: 80 ms, or later on a machine that is busy.
        let senders = (0..8).map(|_| {
            let lane = lane.clone();
            tokio::spawn(async move {
                for _ in 0..10 {
                    lane.pass(12_500, 100_000_000).await;
                }
            })
        });
        futures::future::join_all(senders).await;
        assert!(begun.elapsed() + BURST >= Duration::from_millis(80), "{:?}", begun.elapsed());
    }

    #[test]
    fn a_gigabit_carries_a_megabyte_in_8_ms() {
        assert_eq!(cost(1_000_000, 1_000_000_000), Duration::from_millis(8));
    }
}
