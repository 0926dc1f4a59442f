//! The state that the edges show: one value that admin and metrics read, and that nobody writes but its owners.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use plugvisor_core::breaker::Transition;
use plugvisor_package::PluginName;
use plugvisor_sandbox::protocol::{Host, ProbeState};
use tokio_util::sync::CancellationToken;

use crate::{
    config::Config,
    driver::{PluginView, Shared},
    fleet::Fleet,
    metrics,
    observe::{Observed, Readiness},
};

/// Everything that is shown.
#[derive(Debug)]
pub struct Supervisor {
    /// As it was read.
    pub config: Arc<Config>,
    /// What drivers share.
    pub shared: Arc<Shared>,
    /// All plugins.
    pub fleet: Fleet,
    /// What the launcher found to work here.
    pub features: Host,
    /// When the supervisor started.
    pub started_at: SystemTime,
    /// The real address of the metrics page.
    pub metrics_address: SocketAddr,
    /// Where local applications dial.
    pub calls_socket: PathBuf,
    /// The supervisor stops.
    pub closing: CancellationToken,
    /// Every plugin has been stopped. Long answers last until then, so that who follows sees the stop itself.
    pub stopped: CancellationToken,
    ready: AtomicBool,
    /// Plugins that were found living at the start, and how long it took from the connection to the launcher until
    /// they took calls again.
    reattached: OnceLock<(usize, Duration)>,
    breaker_transitions: Mutex<BTreeMap<(PluginName, &'static str), u64>>,
}

impl Supervisor {
    /// Not ready yet.
    #[must_use]
    pub fn new(
        config: Arc<Config>,
        shared: Arc<Shared>,
        fleet: Fleet,
        features: Host,
        metrics_address: SocketAddr,
        calls_socket: PathBuf,
    ) -> Self {
        Self {
            config,
            shared,
            fleet,
            features,
            started_at: SystemTime::now(),
            metrics_address,
            calls_socket,
            closing: CancellationToken::new(),
            stopped: CancellationToken::new(),
            ready: AtomicBool::new(false),
            reattached: OnceLock::new(),
            breaker_transitions: Mutex::default(),
        }
    }

    /// Every plugin that loads by itself is loaded or has failed.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    /// Every plugin that an earlier supervisor left is taken over.
    pub fn set_reattached(&self, plugins: usize, took: Duration) {
        tracing::info!(plugins, took_ms = took.as_millis(), "plugins of an earlier supervisor were taken over");
        let _ = self.reattached.set((plugins, took));
    }

    /// How many plugins were taken over at the start, and in which time; `None` when none was there.
    #[must_use]
    pub fn reattached(&self) -> Option<(usize, Duration)> {
        self.reattached.get().copied()
    }

    /// Controls that the operator allows to be missing and that are missing.
    #[must_use]
    pub fn degraded(&self) -> Vec<String> {
        let lacking =
            self.features.controls.iter().filter(|feature| matches!(feature.state, ProbeState::Lacking { .. }));
        let allowed = &self.config.supervisor.allow_degraded;
        lacking
            .filter(|feature| allowed.contains(&feature.control))
            .map(|feature| feature.control.to_string())
            .collect()
    }

    /// Counts a change of a breaker.
    pub fn note_breaker(&self, plugin: &PluginName, transition: &Transition) {
        let to = match transition {
            Transition::Opened { .. } => "open",
            Transition::HalfOpened => "half_open",
            Transition::Closed { .. } => "closed",
        };
        let mut counts = self.breaker_transitions.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((plugin.clone(), to)).or_insert(0) += 1;
    }

    /// Changes of breakers so far, by plugin and new state.
    #[must_use]
    pub fn breaker_transitions(&self) -> BTreeMap<(PluginName, &'static str), u64> {
        self.breaker_transitions.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Why a plugin that is critical makes the host not ready. One that an operator unloaded does not.
fn critical(view: &PluginView) -> Option<String> {
    let critical = view.bundle.as_ref().is_some_and(|bundle| bundle.manifest.critical);
    if !critical || !view.wanted || view.is_serving() {
        return None;
    }
    let why = view.last_error.as_ref().map(|error| format!(": {}", error.message)).unwrap_or_default();
    Some(format!("critical plugin {} is {}{why}", view.name, view.state.name()))
}

impl Observed for Supervisor {
    async fn metrics(&self) -> String {
        metrics::page(self).await
    }

    fn readiness(&self) -> Readiness {
        let mut reasons = Vec::new();
        if self.shared.launcher.end().borrow().is_some() {
            reasons.push("the launcher is gone".to_owned());
        }
        if self.closing.is_cancelled() {
            reasons.push("the supervisor is stopping".to_owned());
        } else if !self.ready.load(Ordering::Acquire) {
            for (name, handle) in self.fleet.plugins().iter() {
                let view = handle.view.borrow();
                if view.wanted && !view.is_settled() {
                    reasons.push(format!("plugin {name} is {}", view.state.name()));
                }
            }
            if reasons.is_empty() {
                reasons.push("the supervisor is starting".to_owned());
            }
        }
        for handle in self.fleet.plugins().values() {
            reasons.extend(critical(&handle.view.borrow()));
        }
        if reasons.is_empty() { Readiness::Ready } else { Readiness::NotReady(reasons) }
    }
}
