//! Which codec to use: from the measured rates of store and codecs, the one by which the rest of the pages is durable soonest.
//!
//! A byte of pages takes as long as the slower of two stages: the workers compress it at `workers * speed`, and the store takes what it
//! becomes, `ratio` bytes, at the uplink's rate. The decision is a pure function of [`Rates`]; [`Meter`] makes them from what happened.

#![expect(clippy::cast_precision_loss, reason = "estimates")]

use std::time::Duration;

use crate::pack::Codec;

/// A codec other than lz4 must be faster by this much: its estimate is the less certain one.
const ZSTD_MARGIN: f64 = 0.95;
/// And raw frames take room in the store for as long as the snapshot lives.
const RAW_MARGIN: f64 = 0.4;
/// Weight of the newest sample.
const NEWEST: f64 = 0.2;

/// Speed and gain of one codec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CodecRate {
    /// Bytes of pages a second and worker, digest included.
    pub(super) speed: f64,
    /// Stored bytes for each byte of pages.
    pub(super) ratio: f64,
}

/// What the store takes, bytes a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Uplink {
    /// Surely.
    pub(super) least: f64,
    /// Perhaps: if connections that stood idle add as much as those that did not. The same as `least` if none stood idle.
    pub(super) most: f64,
}

/// All that the decision depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rates {
    pub(super) workers: f64,
    /// `None` before the first PUT was confirmed.
    pub(super) uplink: Option<Uplink>,
    pub(super) lz4: CodecRate,
    pub(super) zstd: CodecRate,
    pub(super) raw: CodecRate,
}

impl Rates {
    pub(super) fn choose(&self) -> Codec {
        let Some(uplink) = self.uplink else { return Codec::Lz4 };
        let seconds =
            |codec: CodecRate, link: f64| (codec.ratio / link).max(1.0 / (self.workers.max(1.0) * codec.speed));
        let lz4 = seconds(self.lz4, uplink.most);
        if seconds(self.raw, uplink.least) < RAW_MARGIN * lz4 {
            Codec::Raw
        } else if seconds(self.zstd, uplink.most) < ZSTD_MARGIN * lz4 {
            Codec::Zstd
        } else {
            Codec::Lz4
        }
    }
}

/// Measures.
#[derive(Debug)]
pub(super) struct Meter {
    workers: f64,
    lz4: Option<CodecRate>,
    zstd: Option<CodecRate>,
    raw: Option<CodecRate>,
    uplink: Option<Uplink>,
}

/// What lz4 does before it was measured, and what the others do in relation to it.
const LZ4: CodecRate = CodecRate { speed: 700e6, ratio: 0.5 };
const ZSTD_TO_LZ4: CodecRate = CodecRate { speed: 0.5, ratio: 0.8 };
const RAW_TO_LZ4: f64 = 3.0;

impl Meter {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers: workers as f64, lz4: None, zstd: None, raw: None, uplink: None }
    }

    /// A frame was encoded with `codec` (or tried to be).
    pub(super) fn encoded(&mut self, codec: Codec, pages: usize, stored: usize, took: Duration) {
        let newest = CodecRate {
            speed: pages as f64 / took.as_secs_f64().max(1e-9),
            ratio: stored as f64 / (pages as f64).max(1.0),
        };
        let rate = match codec {
            Codec::Lz4 => &mut self.lz4,
            Codec::Zstd => &mut self.zstd,
            Codec::Raw => &mut self.raw,
        };
        *rate = Some(rate.map_or(newest, |rate| CodecRate {
            speed: mixed(rate.speed, newest.speed),
            ratio: mixed(rate.ratio, newest.ratio),
        }));
    }

    /// A PUT was confirmed while `in_flight` were (itself included), of `connections` that might have been.
    pub(super) fn stored(&mut self, bytes: usize, took: Duration, in_flight: usize, connections: usize) {
        let one = bytes as f64 / took.as_secs_f64().max(1e-9);
        let newest = Uplink { least: one * in_flight as f64, most: one * connections.max(in_flight) as f64 };
        self.uplink = Some(self.uplink.map_or(newest, |uplink| Uplink {
            least: mixed(uplink.least, newest.least),
            most: mixed(uplink.most, newest.most),
        }));
    }

    pub(super) fn rates(&self) -> Rates {
        let lz4 = self.lz4.unwrap_or(LZ4);
        let relative = CodecRate { speed: lz4.speed * ZSTD_TO_LZ4.speed, ratio: lz4.ratio * ZSTD_TO_LZ4.ratio };
        Rates {
            workers: self.workers,
            uplink: self.uplink,
            lz4,
            zstd: self.zstd.unwrap_or(relative),
            raw: CodecRate { speed: self.raw.map_or(lz4.speed * RAW_TO_LZ4, |raw| raw.speed), ratio: 1.0 },
        }
    }
}

fn mixed(before: f64, newest: f64) -> f64 {
    before + NEWEST * (newest - before)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LZ4_RATE: CodecRate = CodecRate { speed: 800e6, ratio: 0.45 };
    const ZSTD_RATE: CodecRate = CodecRate { speed: 450e6, ratio: 0.33 };
    const RAW_RATE: CodecRate = CodecRate { speed: 3e9, ratio: 1.0 };

    fn rates(workers: f64, gigabits: f64) -> Rates {
        let uplink = Some(Uplink { least: gigabits * 125e6, most: gigabits * 125e6 });
        Rates { workers, uplink, lz4: LZ4_RATE, zstd: ZSTD_RATE, raw: RAW_RATE }
    }

    #[test]
    fn the_slower_stage_decides() {
        for (workers, gigabits, expected) in [
            (4.0, 1.0, Codec::Zstd),
            (8.0, 10.0, Codec::Zstd),
            // Four workers lose more by zstd than a link of 10 Gb/s gains.
            (2.0, 10.0, Codec::Lz4),
            (4.0, 25.0, Codec::Lz4),
            (2.0, 100.0, Codec::Raw),
            (16.0, 100.0, Codec::Lz4),
        ] {
            assert_eq!(rates(workers, gigabits).choose(), expected, "{workers} workers, {gigabits} Gb/s");
        }
    }

    #[test]
    fn nothing_measured_is_lz4() {
        assert_eq!(Rates { uplink: None, ..rates(4.0, 1.0) }.choose(), Codec::Lz4);
        assert_eq!(Meter::new(4).rates().choose(), Codec::Lz4);
    }

    #[test]
    fn idle_connections_prove_neither_a_slow_nor_a_fast_store() {
        // One PUT at 30 MB/s, seven connections idle: 240 MB/s perhaps.
        let uplink = Some(Uplink { least: 30e6, most: 8.0 * 450e6 });
        assert_eq!(Rates { uplink, ..rates(2.0, 1.0) }.choose(), Codec::Lz4);
        let uplink = Some(Uplink { least: 400e6, most: 80e9 });
        assert_eq!(Rates { uplink, ..rates(2.0, 1.0) }.choose(), Codec::Lz4);
    }

    #[test]
    fn a_codec_that_turns_out_not_to_gain_is_left() {
        let mut meter = Meter::new(4);
        let frame = 256 << 10;
        for _ in 0..20 {
            meter.encoded(Codec::Lz4, frame, frame * 95 / 100, Duration::from_micros(150));
            meter.stored(8 << 20, Duration::from_millis(500), 8, 8);
        }
        assert_eq!(meter.rates().choose(), Codec::Zstd);
        for _ in 0..20 {
            meter.encoded(Codec::Zstd, frame, frame * 95 / 100, Duration::from_micros(300));
        }
        assert_eq!(meter.rates().choose(), Codec::Lz4);
    }

    #[test]
    fn a_link_that_becomes_slow_is_noticed() {
        let mut meter = Meter::new(2);
        for _ in 0..20 {
            meter.encoded(Codec::Lz4, 256 << 10, 100 << 10, Duration::from_micros(350));
            meter.stored(8 << 20, Duration::from_millis(40), 8, 8);
        }
        assert_eq!(meter.rates().choose(), Codec::Lz4);
        for _ in 0..20 {
            meter.stored(8 << 20, Duration::from_millis(600), 8, 8);
        }
        assert_eq!(meter.rates().choose(), Codec::Zstd);
    }
}
