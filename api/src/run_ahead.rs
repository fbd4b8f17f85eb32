//! Whether pages of a running sandbox are sent ahead of its pause (design §5): pure decisions over plain data; `supervisor::ahead` acts on them.
//!
//! A round costs what it reads, compresses and sends, and is only worth it when the pause then has less to do. So: only when the guest is idle
//! or its auto-pause is near, not for little, not for pages that the guest rewrites as fast as they are sent, and never beyond the budget.

use crate::config::RunAhead;
use crate::sources::UnixMs;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// A guest that has written more than this share of what a round looked at, in per cent, by the next look, is not getting ready to sleep.
const REWRITTEN: u64 = 50;
/// After so many looks in vain a round is tried all the same: what is dirty does not tell a guest that goes on rewriting it from one that
/// wrote it once and has been quiet since. By then the rests are long.
const TRY_AFTER: u32 = 5;
/// The longest rest after rounds that were not worth it, in intervals.
const LONGEST_REST: u64 = 32;

/// What rounds of one sandbox have done and cost, since its VM started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[schemars(rename = "RunAheadSpent")]
pub struct Spent {
    /// Rounds that sent something.
    pub rounds: u64,
    /// Bytes that they stored.
    pub bytes: u64,
    /// Looks after which there was no round.
    pub skipped: u64,
    /// Rounds that failed or were cut off by a pause.
    pub cut_off: u64,
    /// Bytes that the budget allows still.
    #[serde(skip)]
    pub allowance: u64,
    /// Since when the allowance grows.
    #[serde(skip)]
    pub filled_at: UnixMs,
    /// No look before this.
    #[serde(skip)]
    pub rest_until: UnixMs,
    /// Looks in a row that were not worth it.
    #[serde(skip)]
    pub in_vain: u32,
    /// Pages that the last round looked at; 0 before the first.
    #[serde(skip)]
    pub last_pages: u64,
}

/// What is known of a running sandbox without asking its VMM.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Now.
    pub now: UnixMs,
    /// The last request that reached it, or its last entry to `running`.
    pub last_request: UnixMs,
    /// When it will be paused by itself, if it will.
    pub auto_pause: Option<UnixMs>,
}

/// What to do after a look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A round now.
    Round,
    /// No round, and no look for a while.
    Skip,
}

fn ms(value: u64) -> UnixMs {
    UnixMs::try_from(value).unwrap_or(UnixMs::MAX)
}

/// Whether it is worth asking the VMM what is dirty.
pub fn look(config: &RunAhead, facts: Facts, spent: &Spent) -> bool {
    let near = near(config, facts);
    let idle = facts.now.saturating_sub(facts.last_request) >= ms(config.idle_ms);
    config.enabled && (idle || near) && facts.now >= spent.rest_until
}

fn near(config: &RunAhead, facts: Facts) -> bool {
    facts.auto_pause.is_some_and(|at| at.saturating_sub(facts.now) <= ms(config.near_ms))
}

/// Whether a round is worth it with `dirty_pages` pages that a capture would look at.
pub fn decide(config: &RunAhead, facts: Facts, spent: &Spent, dirty_pages: u64) -> Step {
    let bytes = dirty_pages.saturating_mul(PAGE);
    let rewritten = spent.last_pages > 0 && dirty_pages * 100 > spent.last_pages * REWRITTEN;
    // The last one before a pause may repeat what the guest rewrites: once.
    let hopeless = rewritten && spent.in_vain < TRY_AFTER && !(near(config, facts) && spent.in_vain == 0);
    if bytes < config.least_kib << 10 || bytes > spent.allowance || hopeless { Step::Skip } else { Step::Round }
}

impl Spent {
    /// The budget grows with time, up to that of a minute.
    pub fn refill(&mut self, config: &RunAhead, now: UnixMs) {
        let minute = config.mib_per_minute << 20;
        if self.filled_at == 0 {
            (self.allowance, self.filled_at) = (minute, now);
            return;
        }
        let passed = u64::try_from(now.saturating_sub(self.filled_at)).unwrap_or(0);
        let grown = u128::from(minute) * u128::from(passed) / 60_000;
        self.allowance = self.allowance.saturating_add(u64::try_from(grown).unwrap_or(u64::MAX)).min(minute);
        self.filled_at = now;
    }

    /// A round has looked at `pages`, stored `bytes` and took `took_ms` of a core: the rest after it keeps the share.
    pub fn round(&mut self, config: &RunAhead, now: UnixMs, pages: u64, bytes: u64, took_ms: u64) {
        self.rounds += 1;
        self.bytes += bytes;
        self.allowance = self.allowance.saturating_sub(bytes);
        self.last_pages = pages;
        // One that was only tried is tried again after one long rest, not after all the short ones.
        self.in_vain = if self.in_vain >= TRY_AFTER { TRY_AFTER - 1 } else { 0 };
        self.rest_until = now + ms(share_rest(config, took_ms).max(config.interval_ms));
    }

    /// A look was not followed by a round.
    pub fn skip(&mut self, config: &RunAhead, now: UnixMs) {
        self.skipped += 1;
        self.rest(config, now);
    }

    /// A round over `pages` was cut off after `took_ms`. What it sent is not known, so all that it may have sent is counted against the budget.
    pub fn cut_off(&mut self, config: &RunAhead, now: UnixMs, pages: u64, took_ms: u64) {
        self.cut_off += 1;
        self.allowance = self.allowance.saturating_sub(pages.saturating_mul(PAGE));
        self.rest(config, now);
        self.rest_until = self.rest_until.max(now + ms(share_rest(config, took_ms)));
    }

    fn rest(&mut self, config: &RunAhead, now: UnixMs) {
        let intervals = (1_u64 << self.in_vain.min(16)).min(LONGEST_REST);
        self.in_vain += 1;
        self.rest_until = now + ms(config.interval_ms.saturating_mul(intervals));
    }
}

/// How long to rest after `took_ms` of a core, so that both together keep the share.
fn share_rest(config: &RunAhead, took_ms: u64) -> u64 {
    took_ms.saturating_mul(100 - config.core_percent.min(100)) / config.core_percent.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMs = 1_000_000;

    fn facts(idle_for: i64, pause_in: Option<i64>) -> Facts {
        Facts { now: NOW, last_request: NOW - idle_for, auto_pause: pause_in.map(|ms| NOW + ms) }
    }

    fn fresh(config: &RunAhead) -> Spent {
        let mut spent = Spent::default();
        spent.refill(config, NOW);
        spent
    }

    #[test]
    fn only_idle_guests_and_those_about_to_be_paused_are_looked_at() {
        let config = RunAhead { idle_ms: 10_000, near_ms: 30_000, ..RunAhead::default() };
        let spent = fresh(&config);
        assert!(look(&config, facts(10_000, None), &spent));
        assert!(!look(&config, facts(9_999, None), &spent));
        assert!(look(&config, facts(0, Some(30_000)), &spent));
        assert!(!look(&config, facts(0, Some(30_001)), &spent));
        assert!(!look(&RunAhead { enabled: false, ..config }, facts(10_000, None), &spent));
        assert!(!look(&config, facts(10_000, None), &Spent { rest_until: NOW + 1, ..spent }));
    }

    #[test]
    fn little_too_much_and_what_is_rewritten_is_left_to_the_pause() {
        let config = RunAhead { least_kib: 4096, mib_per_minute: 100, ..RunAhead::default() };
        let spent = fresh(&config);
        let idle = facts(60_000, None);
        assert_eq!(decide(&config, idle, &spent, 1023), Step::Skip);
        assert_eq!(decide(&config, idle, &spent, 1024), Step::Round);
        assert_eq!(decide(&config, idle, &spent, 25_600), Step::Round);
        assert_eq!(decide(&config, idle, &spent, 25_601), Step::Skip, "beyond the budget");
        let after = Spent { last_pages: 8192, ..spent };
        assert_eq!(decide(&config, idle, &after, 5000), Step::Skip, "more than half of it again");
        assert_eq!(decide(&config, idle, &after, 4000), Step::Round);
        let soon = facts(0, Some(1000));
        assert_eq!(decide(&config, soon, &after, 5000), Step::Round);
        assert_eq!(decide(&config, soon, &Spent { in_vain: 1, ..after }, 5000), Step::Skip);
        assert_eq!(decide(&config, idle, &Spent { in_vain: 5, ..after }, 5000), Step::Round, "it may be quiet by now");
    }

    #[test]
    fn the_budget_and_the_rest_bound_what_rounds_cost() {
        let config = RunAhead { mib_per_minute: 60, core_percent: 25, interval_ms: 1000, ..RunAhead::default() };
        let mut spent = fresh(&config);
        spent.round(&config, NOW, 20_000, 50 << 20, 2000);
        assert_eq!((spent.allowance, spent.rest_until), (10 << 20, NOW + 6000));
        spent.refill(&config, NOW + 5000);
        assert_eq!(spent.allowance, 15 << 20);
        spent.refill(&config, NOW + 600_000);
        assert_eq!(spent.allowance, 60 << 20, "never more than that of a minute");
        for rest in [1, 2, 4, 8, 16, 32, 32] {
            spent.skip(&config, NOW);
            assert_eq!(spent.rest_until, NOW + 1000 * rest);
        }
        assert_eq!((spent.rounds, spent.bytes, spent.skipped), (1, 50 << 20, 7));
        spent.round(&config, NOW, 20_000, 1 << 20, 10);
        spent.skip(&config, NOW);
        assert_eq!(spent.rest_until, NOW + 16_000, "what was tried in vain is not tried again soon");
    }

    #[test]
    fn a_round_that_is_cut_off_costs_what_it_may_have_cost() {
        let config = RunAhead { mib_per_minute: 60, core_percent: 25, interval_ms: 1000, ..RunAhead::default() };
        let mut spent = fresh(&config);
        spent.cut_off(&config, NOW, 10 << 8, 2000);
        assert_eq!((spent.allowance, spent.rest_until, spent.cut_off), (50 << 20, NOW + 6000, 1));
        spent.cut_off(&config, NOW, u64::MAX, 10);
        assert_eq!((spent.allowance, spent.rest_until), (0, NOW + 2000));
        assert_eq!(decide(&config, facts(60_000, None), &spent, 1024), Step::Skip);
    }
}
