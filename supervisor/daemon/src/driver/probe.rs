//! Liveness and readiness of one loaded generation. Sends probes at their times and reports what they changed; counting
//! is the core's.

use std::{path::PathBuf, time::Duration};

use plugvisor_core::{
    Generation,
    lifecycle::Event,
    probe::{Change, Liveness, ProbePolicy, Probes, Readiness},
};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};

use super::{
    Inward,
    worker::{Health, Worker},
};
use crate::{
    broker::{BrokerHandle, PluginIdentity},
    stats,
};

pub(super) struct Prober {
    pub(super) policy: ProbePolicy,
    pub(super) worker: Worker,
    pub(super) identity: PluginIdentity,
    pub(super) broker: BrokerHandle,
    pub(super) cgroups: Vec<PathBuf>,
    pub(super) inward: mpsc::Sender<Inward>,
}

impl Prober {
    /// Runs until it is dropped, or the plugin hangs.
    pub(super) async fn run(self) {
        let mut probes = Probes::new(self.policy.clone());
        let (mut ready_at, mut live_at) =
            (Instant::now() + self.policy.readiness_every, Instant::now() + self.policy.liveness_every);
        let mut misses = 0;
        let mut throttle = Throttle::new(&self.cgroups);
        loop {
            sleep_until(ready_at.min(live_at)).await;
            let began = Instant::now();
            let health = self.worker.check(self.policy.timeout).await;
            if matches!(health, Health::Silent(_)) && began.elapsed() > self.policy.timeout * 2 {
                // This supervisor itself did not run for a while, and so the plugin may not have either: after a pause of
                // the machine no silence is evidence against anybody. It is asked again at once.
                tracing::debug!(plugin = %self.identity, took = ?began.elapsed(), "a probe was held up on this side");
                continue;
            }
            let mut changes = Vec::new();
            if began >= ready_at {
                ready_at = began + self.policy.readiness_every;
                let serving = health == Health::Serving;
                if serving {
                    // Only an answer that the plugin would give to callers too closes a breaker.
                    let _ = self.broker.health_probe_ok(&self.identity).await;
                }
                changes.extend(probes.readiness(if serving { Readiness::Serving } else { Readiness::NotServing }));
            }
            if began >= live_at {
                live_at = began + self.policy.liveness_every;
                let found = match &health {
                    Health::Serving | Health::NotServing => Liveness::Answered,
                    Health::Silent(_) if throttle.more_than_half(&self.cgroups) => Liveness::MissedThrottled,
                    Health::Silent(_) => Liveness::Missed,
                };
                misses = if found == Liveness::Missed { misses + 1 } else { 0 };
                if let Health::Silent(detail) = &health {
                    tracing::warn!(plugin = %self.identity, %detail, "liveness probe missed");
                }
                changes.extend(probes.liveness(found));
            }
            for change in changes {
                let generation: Generation = self.identity.generation;
                let event = match change {
                    Change::Hung => Event::Hung { generation, missed: misses },
                    Change::ReadyLost => Event::ReadyLost { generation },
                    Change::ReadyRegained => Event::ReadyRegained { generation },
                };
                if self.inward.send(Inward::Life(event)).await.is_err() || change == Change::Hung {
                    return;
                }
            }
        }
    }
}

/// How much of the time since the last look the kernel held the plugin back.
struct Throttle {
    at: Instant,
    total: Duration,
}

impl Throttle {
    fn new(cgroups: &[PathBuf]) -> Self {
        Self { at: Instant::now(), total: stats::throttled(cgroups).unwrap_or_default() }
    }

    fn more_than_half(&mut self, cgroups: &[PathBuf]) -> bool {
        let total = stats::throttled(cgroups).unwrap_or_default();
        let (passed, held) = (self.at.elapsed(), total.saturating_sub(self.total));
        *self = Self { at: Instant::now(), total };
        held > passed / 2
    }
}
