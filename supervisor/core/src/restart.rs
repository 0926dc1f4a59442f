//! When a plugin that ended is started again. Owns the back-off and the crash-loop count; sleeping is the driver's.

use std::{collections::VecDeque, time::Duration};

use crate::{Jitter, Time};

/// Whether a plugin that ended unasked is started again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RestartMode {
    /// Always, unless its end was permanent.
    #[default]
    Always,
    /// Never; it stays FAILED.
    Never,
}

/// The rules of restarting. The defaults are those of `Default`.
#[derive(Clone, Debug, PartialEq)]
pub struct RestartPolicy {
    /// Whether to restart at all. Default: always.
    pub mode: RestartMode,
    /// The delay after the first failure. Default: 500 ms. It doubles with each further failure.
    pub base: Duration,
    /// The longest delay. Default: 60 s.
    pub cap: Duration,
    /// This many failures within [`crash_window`](Self::crash_window) are a crash loop. Default: 5.
    pub crash_count: u32,
    /// See [`crash_count`](Self::crash_count). Default: 60 s.
    pub crash_window: Duration,
    /// Having been ready for this many times the last delay forgives the failures. Default: 10.
    pub forgive_factor: u32,
    /// The shortest time of being ready that forgives. Default: 60 s.
    pub forgive_min: Duration,
    /// The longest time of being ready that forgiving may need. Default: 10 min.
    pub forgive_max: Duration,
    /// Exit statuses that mean "do not start me again". Default: 78 (`EX_CONFIG` of sysexits.h).
    pub permanent_codes: Vec<i32>,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        Self {
            mode: RestartMode::Always,
            base: Duration::from_millis(500),
            cap: Duration::from_secs(60),
            crash_count: 5,
            crash_window: Duration::from_secs(60),
            forgive_factor: 10,
            forgive_min: Duration::from_secs(60),
            forgive_max: Duration::from_secs(600),
            permanent_codes: vec![78],
        }
    }
}

impl RestartPolicy {
    /// The full delay after `failures` earlier failures: `min(cap, base · 2ⁿ)`.
    #[must_use]
    pub fn delay(&self, failures: u32) -> Duration {
        let factor = 1_u32.checked_shl(failures).unwrap_or(u32::MAX);
        self.base.checked_mul(factor).map_or(self.cap, |delay| delay.min(self.cap))
    }

    /// How long a plugin must have been ready for its failures to be forgiven, when the last delay was `delay`.
    #[must_use]
    pub fn forgive_after(&self, delay: Duration) -> Duration {
        let asked = delay.checked_mul(self.forgive_factor).unwrap_or(Duration::MAX);
        asked.min(self.forgive_max).max(self.forgive_min)
    }
}

/// What happens after a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Start again after the delay.
    After {
        /// Counts the restarts since failures were last forgiven, from 1.
        attempt: u32,
        /// How long to wait, jitter included.
        delay: Duration,
        /// Whether the plugin is in a crash loop, and how this failure made it one.
        pace: Pace,
    },
    /// Not started again: the failure is permanent, or the policy says never.
    Never,
}

/// How the failures follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// Backing off.
    Normal,
    /// This failure made it a crash loop.
    CrashLoopBegins {
        /// Failures within the window.
        count: u32,
        /// The window.
        window: Duration,
    },
    /// It was a crash loop before, and is one still.
    CrashLoop,
}

/// The failures of one plugin as far as they matter for the next delay.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restarts {
    failures: u32,
    crash_loop: bool,
    last_delay: Duration,
    recent: VecDeque<Time>,
    total: u32,
}

/// What of [`Restarts`] is kept where it outlives the supervisor. The moments are those of one boot of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestartHistory {
    /// Failures since they were last forgiven.
    pub failures: u32,
    /// Whether it is in a crash loop.
    pub crash_loop: bool,
    /// The last delay, before jitter.
    pub last_delay: Duration,
    /// The newest failures, the oldest first; never more than [`RestartHistory::MAX_RECENT`].
    pub recent: Vec<Time>,
    /// Restarts after failures in this plugin's life.
    pub total: u32,
}

impl RestartHistory {
    /// Moments that are kept at most, whatever the policy says.
    pub const MAX_RECENT: usize = 64;

    /// What is still true after the host was started anew: its clock began again, and what failed then may work now.
    #[must_use]
    pub fn after_reboot(&self) -> Self {
        Self { total: self.total, ..Self::default() }
    }
}

impl Restarts {
    /// Goes on from a history.
    #[must_use]
    pub fn restore(history: RestartHistory) -> Self {
        let RestartHistory { failures, crash_loop, last_delay, recent, total } = history;
        Self { failures, crash_loop, last_delay, recent: recent.into(), total }
    }

    /// The history to keep.
    #[must_use]
    pub fn history(&self) -> RestartHistory {
        let Self { failures, crash_loop, last_delay, recent, total } = self;
        let old = recent.len().saturating_sub(RestartHistory::MAX_RECENT);
        let recent = recent.iter().skip(old).copied().collect();
        RestartHistory { failures: *failures, crash_loop: *crash_loop, last_delay: *last_delay, recent, total: *total }
    }

    /// Restarts after failures in this plugin's life, never reset. One that is only scheduled is none: an operator's start
    /// may come before it.
    #[must_use]
    pub const fn total(&self) -> u32 {
        self.total
    }

    /// Failures since they were last forgiven.
    #[must_use]
    pub const fn failures(&self) -> u32 {
        self.failures
    }

    /// Forgets the failures, because an operator asked for a start.
    pub fn forgive(&mut self) {
        let total = self.total;
        *self = Self { total, ..Self::default() };
    }

    /// Notes that the restart which a failure has scheduled is made.
    pub fn restarted(&mut self) {
        self.total = self.total.saturating_add(1);
    }

    /// Notes a failure that might pass and says when to try again. `ready_for` is how long the plugin had been ready
    /// without a break when it failed; `None` when it never was.
    pub fn failed(&mut self, policy: &RestartPolicy, ready_for: Option<Duration>, now: Time, jitter: Jitter) -> Retry {
        if policy.mode == RestartMode::Never {
            return Retry::Never;
        }
        if ready_for.is_some_and(|ready| ready >= policy.forgive_after(self.last_delay)) {
            self.forgive();
        }
        let kept = policy.crash_count.max(1) as usize;
        self.recent.push_back(now);
        while self.recent.len() > kept || self.recent.front().is_some_and(|at| now - *at > policy.crash_window) {
            self.recent.pop_front();
        }
        let pace = if self.crash_loop {
            Pace::CrashLoop
        } else if self.recent.len() == kept {
            self.crash_loop = true;
            Pace::CrashLoopBegins { count: policy.crash_count.max(1), window: policy.crash_window }
        } else {
            Pace::Normal
        };
        let full = if self.crash_loop { policy.cap } else { policy.delay(self.failures) };
        self.failures = self.failures.saturating_add(1);
        self.last_delay = full;
        Retry::After { attempt: self.failures, delay: jitter.between(full / 2, full), pace }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::{Pace, RestartMode, RestartPolicy, Restarts, Retry};
    use crate::{Jitter, Time};

    const fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    fn delay(retry: Retry) -> Duration {
        match retry {
            Retry::After { delay, .. } => delay,
            Retry::Never => panic!("not retried"),
        }
    }

    #[test]
    fn delays_are_those_of_the_table() {
        let policy = RestartPolicy::default();
        let table = [500, 1000, 2000, 4000, 8000, 16_000, 32_000, 60_000, 60_000];
        for (failures, expected) in (0..).zip(table) {
            assert_eq!(policy.delay(failures), ms(expected), "after {failures} failures");
        }
        for failures in [31, 32, 33, 1000, u32::MAX] {
            assert_eq!(policy.delay(failures), policy.cap, "after {failures} failures");
        }
    }

    #[test]
    fn ten_delays_of_being_ready_forgive_within_bounds() {
        let policy = RestartPolicy::default();
        for (delay, expected) in [(500, 60_000), (6000, 60_000), (8000, 80_000), (60_000, 600_000), (90_000, 600_000)] {
            assert_eq!(policy.forgive_after(ms(delay)), ms(expected), "after a delay of {delay} ms");
        }
        let mut restarts = Restarts::default();
        let mut now = Time::ZERO;
        for _ in 0..3 {
            restarts.failed(&policy, None, now, Jitter::new(1.0));
            restarts.restarted();
            now = now + ms(1000);
        }
        let mut other = restarts.clone();
        assert_eq!(delay(restarts.failed(&policy, Some(ms(59_999)), now, Jitter::new(1.0))), ms(4000));
        assert_eq!(delay(other.failed(&policy, Some(ms(60_000)), now, Jitter::new(1.0))), ms(500));
        assert_eq!((other.failures(), other.total()), (1, 3));
    }

    #[test]
    fn five_failures_within_a_minute_are_a_crash_loop_until_forgiven() {
        let policy = RestartPolicy::default();
        let mut restarts = Restarts::default();
        let mut paces = Vec::new();
        for failure in 0..7_u64 {
            let retry = restarts.failed(&policy, None, Time::from_millis(failure * 15_000), Jitter::new(1.0));
            let Retry::After { pace, delay, .. } = retry else { panic!("not retried") };
            assert_eq!(delay == policy.cap, failure >= 4, "failure {failure}");
            paces.push(pace);
        }
        let begins = Pace::CrashLoopBegins { count: 5, window: ms(60_000) };
        assert_eq!(paces[3..], [Pace::Normal, begins, Pace::CrashLoop, Pace::CrashLoop]);

        // One millisecond more than the window between the first and the fifth is no crash loop.
        let mut restarts = Restarts::default();
        for at in [0, 15_000, 30_000, 45_000, 60_001] {
            let retry = restarts.failed(&policy, None, Time::from_millis(at), Jitter::MIDDLE);
            assert!(matches!(retry, Retry::After { pace: Pace::Normal, .. }), "at {at} ms: {retry:?}");
        }

        restarts.forgive();
        assert_eq!(delay(restarts.failed(&policy, None, Time::from_millis(60_002), Jitter::new(0.0))), ms(250));
    }

    #[test]
    fn a_history_goes_on_where_it_stopped() {
        let policy = RestartPolicy::default();
        let mut straight = Restarts::default();
        for failure in 0..8_u64 {
            // As if the supervisor were started anew before each failure.
            let mut again = Restarts::restore(straight.history());
            let now = Time::from_millis(failure * 9000);
            let expected = straight.failed(&policy, None, now, Jitter::MIDDLE);
            assert_eq!(again.failed(&policy, None, now, Jitter::MIDDLE), expected, "failure {failure}");
            assert_eq!(again, straight);
            straight.restarted();
        }
        let rebooted = Restarts::restore(straight.history().after_reboot());
        assert_eq!((rebooted.failures(), rebooted.total()), (0, 8));
    }

    #[test]
    fn never_is_never() {
        let policy = RestartPolicy { mode: RestartMode::Never, ..RestartPolicy::default() };
        let mut restarts = Restarts::default();
        assert_eq!(restarts.failed(&policy, None, Time::ZERO, Jitter::MIDDLE), Retry::Never);
        assert_eq!(restarts.total(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// The model counts in a plain list what the tracker counts in a ring.
        #[test]
        fn the_tracker_agrees_with_a_list(
            failures in prop::collection::vec((0..40_000_u64, 0..700_000_u64, any::<bool>(), 0.0..1.0_f64), 1..60),
        ) {
            let policy = RestartPolicy::default();
            let mut restarts = Restarts::default();
            let (mut times, mut now, mut last, mut looping) = (Vec::<u64>::new(), 0, ms(0), false);
            for (wait, ready, was_ready, jitter) in failures {
                now += wait;
                let ready = was_ready.then_some(ms(ready));
                if ready.is_some_and(|ready| ready >= (last * 10).clamp(ms(60_000), ms(600_000))) {
                    times.clear();
                    looping = false;
                }
                times.push(now);
                let within = times.iter().filter(|at| now - **at <= 60_000).count();
                let begins = !looping && within >= 5;
                looping |= begins;
                let count = u32::try_from(times.len()).unwrap();
                last = if looping { ms(60_000) } else { ms(500 << (count - 1).min(10)).min(ms(60_000)) };

                let jitter = Jitter::new(jitter);
                match restarts.failed(&policy, ready, Time::from_millis(now), jitter) {
                    Retry::Never => prop_assert!(false, "not retried"),
                    Retry::After { attempt, delay, pace } => {
                        prop_assert_eq!(attempt, count);
                        prop_assert!(last / 2 <= delay && delay <= last, "{:?} of {:?}", delay, last);
                        prop_assert_eq!(delay, jitter.between(last / 2, last));
                        let expected = match (begins, looping) {
                            (true, _) => Pace::CrashLoopBegins { count: 5, window: ms(60_000) },
                            (false, true) => Pace::CrashLoop,
                            (false, false) => Pace::Normal,
                        };
                        prop_assert_eq!(pace, expected);
                    }
                }
            }
        }
    }
}
