//! Liveness and readiness: how many missed or answered probes change what is believed of a plugin.
//!
//! Knows only results in order; sending probes and killing what hangs are the driver's.

use std::time::Duration;

/// How a plugin is probed. The defaults are those of `Default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbePolicy {
    /// Time between liveness probes. Default: 5 s.
    pub liveness_every: Duration,
    /// Time that one probe may take. Default: 1 s.
    pub timeout: Duration,
    /// Consecutive liveness misses that make a plugin hung. Default: 3.
    pub liveness_misses: u32,
    /// Time between readiness probes. Default: 2 s.
    pub readiness_every: Duration,
    /// Consecutive answers other than SERVING that take a plugin out. Default: 1.
    pub out_after: u32,
    /// Consecutive SERVING answers that take it in again. Default: 2.
    pub in_after: u32,
}

impl Default for ProbePolicy {
    fn default() -> Self {
        Self {
            liveness_every: Duration::from_secs(5),
            timeout: Duration::from_secs(1),
            liveness_misses: 3,
            readiness_every: Duration::from_secs(2),
            out_after: 1,
            in_after: 2,
        }
    }
}

/// What one liveness probe found. Any answer counts, NOT_SERVING too: the process is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// It answered.
    Answered,
    /// It did not answer in time, or the connection failed.
    Missed,
    /// It did not answer while the kernel throttled it more than half of the time: no evidence against it.
    MissedThrottled,
}

/// What one readiness probe found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It said SERVING.
    Serving,
    /// It said anything else, or nothing in time.
    NotServing,
}

/// What a probe changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Enough liveness probes were missed: it hangs. Said once.
    Hung,
    /// It is no longer ready.
    ReadyLost,
    /// It is ready again.
    ReadyRegained,
}

/// The counters of one generation, which begins ready: its first SERVING ended the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probes {
    policy: ProbePolicy,
    misses: u32,
    hung: bool,
    ready: bool,
    against: u32,
}

impl Probes {
    /// The counters of a generation that has just become ready.
    #[must_use]
    pub fn new(policy: ProbePolicy) -> Self {
        Self { policy, misses: 0, hung: false, ready: true, against: 0 }
    }

    /// Whether it is believed ready.
    #[must_use]
    pub const fn is_ready(&self) -> bool {
        self.ready
    }

    /// Notes a liveness probe.
    pub fn liveness(&mut self, found: Liveness) -> Option<Change> {
        match found {
            Liveness::Answered => self.misses = 0,
            Liveness::MissedThrottled => {}
            Liveness::Missed => self.misses = self.misses.saturating_add(1),
        }
        let hung = !self.hung && self.misses >= self.policy.liveness_misses.max(1);
        self.hung |= hung;
        hung.then_some(Change::Hung)
    }

    /// Notes a readiness probe.
    pub fn readiness(&mut self, found: Readiness) -> Option<Change> {
        let agrees = (found == Readiness::Serving) == self.ready;
        self.against = if agrees { 0 } else { self.against.saturating_add(1) };
        let needed = if self.ready { self.policy.out_after } else { self.policy.in_after };
        if self.against < needed.max(1) {
            return None;
        }
        self.against = 0;
        self.ready = !self.ready;
        Some(if self.ready { Change::ReadyRegained } else { Change::ReadyLost })
    }
}

#[cfg(test)]
mod tests {
    use super::{Change, Liveness, ProbePolicy, Probes, Readiness};

    #[test]
    fn three_misses_in_a_row_are_a_hang_said_once() {
        let mut probes = Probes::new(ProbePolicy::default());
        use Liveness::{Answered as A, Missed as M, MissedThrottled as T};
        let table =
            [(M, None), (M, None), (A, None), (M, None), (T, None), (M, None), (M, Some(Change::Hung)), (M, None)];
        for (index, (found, change)) in table.into_iter().enumerate() {
            assert_eq!(probes.liveness(found), change, "probe {index}");
        }
        assert!(probes.is_ready(), "liveness is not readiness");
    }

    #[test]
    fn throttled_misses_alone_never_kill() {
        let mut probes = Probes::new(ProbePolicy::default());
        assert!((0..1000).all(|_| probes.liveness(Liveness::MissedThrottled).is_none()));
    }

    #[test]
    fn out_after_one_and_in_after_two() {
        let mut probes = Probes::new(ProbePolicy::default());
        use Readiness::{NotServing as N, Serving as S};
        let table = [
            (S, None),
            (N, Some(Change::ReadyLost)),
            (N, None),
            (S, None),
            (N, None),
            (S, None),
            (S, Some(Change::ReadyRegained)),
            (S, None),
            (N, Some(Change::ReadyLost)),
        ];
        for (index, (found, change)) in table.into_iter().enumerate() {
            assert_eq!(probes.readiness(found), change, "probe {index}");
        }
        assert!(!probes.is_ready());
    }

    #[test]
    fn zero_in_a_policy_counts_as_one() {
        let policy = ProbePolicy { liveness_misses: 0, out_after: 0, in_after: 0, ..ProbePolicy::default() };
        let mut probes = Probes::new(policy);
        assert_eq!(probes.liveness(Liveness::Answered), None);
        assert_eq!(probes.liveness(Liveness::Missed), Some(Change::Hung));
        assert_eq!(probes.readiness(Readiness::Serving), None);
        assert_eq!(probes.readiness(Readiness::NotServing), Some(Change::ReadyLost));
    }
}
