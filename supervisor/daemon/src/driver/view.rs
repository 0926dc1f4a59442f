//! A plugin as others see it: one immutable value, replaced whole at every change.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use plugvisor_core::{
    Error, Generation,
    event::Exit,
    lifecycle::{Condition, Loaded, State},
    policy::Verdict,
};
use plugvisor_package::{Digest, Manifest, Services, TrustTier};
use plugvisor_sandbox::protocol::{ControlState, DirectoryState, LaunchId};
use tokio::time::Instant;

use crate::state::TransitionRecord;

/// Everything about one plugin.
#[derive(Clone, Debug)]
pub struct PluginView {
    /// Its name; of a bundle without a valid one, its directory's.
    pub name: String,
    /// Where it stands.
    pub state: State,
    /// Since when.
    pub since: SystemTime,
    /// The present load, or the last one.
    pub generation: Generation,
    /// Restarts after failures.
    pub restarts: u32,
    /// The bundle's directory.
    pub directory: PathBuf,
    /// What the bundle says; `None` when it could not be read.
    pub bundle: Option<Arc<BundleInfo>>,
    /// The tier of its directory.
    pub tier: TrustTier,
    /// What it was given; `None` before the first successful verification.
    pub verdict: Option<Arc<Verdict>>,
    /// Its process, while one runs.
    pub process: Option<Arc<ProcessView>>,
    /// The last failure; gone once it is loaded again.
    pub last_error: Option<Error>,
    /// What else was wrong, when several problems were found at once.
    pub problems: Vec<String>,
    /// When it is restarted.
    pub restart_at: Option<Instant>,
    /// The newest last.
    pub transitions: VecDeque<TransitionRecord>,
    /// How its last process ended.
    pub last_exit: Option<ExitView>,
    /// The name and version of its SDK, as Init said.
    pub sdk: String,
    /// Whether it is loaded without being asked.
    pub wanted: bool,
    /// Figures for the metrics page.
    pub figures: Figures,
}

/// What of a bundle is kept after it was opened.
#[derive(Debug)]
pub struct BundleInfo {
    /// Its manifest.
    pub manifest: Manifest,
    /// The digest of its content.
    pub digest: Digest,
    /// Its services by their full names.
    pub services: Services,
    /// Its descriptor set.
    pub descriptor_set: Option<Vec<u8>>,
}

/// A process that runs.
#[derive(Clone, Debug)]
pub struct ProcessView {
    /// The launcher's name for it.
    pub launch: LaunchId,
    /// For people.
    pub pid: u32,
    /// The uid that it runs as.
    pub uid: u32,
    /// As read back from the kernel when it was launched.
    pub controls: Vec<ControlState>,
    /// The directories that its grants opened.
    pub directories: Vec<DirectoryState>,
    /// Its cgroup directories.
    pub cgroups: Vec<PathBuf>,
}

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExitView {
    /// When it was noticed.
    pub at: SystemTime,
    /// How.
    pub exit: Exit,
}

/// Counts since the supervisor started.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    /// Launches by reason: initial, restart, request.
    pub starts: BTreeMap<&'static str, u64>,
    /// Exits by cause: code, signal, oom, unknown.
    pub exits: BTreeMap<&'static str, u64>,
    /// Capabilities asked for and not granted, each time that a bundle was verified.
    pub capabilities_denied: u64,
    /// How long the last load took.
    pub start_duration: Option<Duration>,
    /// What passed through its egress proxy.
    pub egress: Arc<crate::egress::Figures>,
    /// What became of connections to it, when it has an address.
    pub ingress: Option<Arc<crate::ingress::Figures>>,
}

impl PluginView {
    /// Whether anything was asked of it, or of the supervisor for it, since the supervisor started.
    #[must_use]
    pub const fn has_begun(&self) -> bool {
        !matches!(self.state, State::Unknown | State::Discovered)
    }

    /// Whether nothing changes before somebody or some time does something.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        match &self.state {
            State::Unknown | State::Discovered | State::Unloaded | State::Failed(_) | State::Quarantined => true,
            State::Loading(_) => false,
            State::Loaded(Loaded { condition, .. }) => !matches!(condition, Condition::Draining(_)),
        }
    }

    /// Whether it takes calls.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        matches!(&self.state, State::Loaded(Loaded { condition: Condition::Serving { .. }, .. }))
    }

    /// Whether it is loaded and not on its way out.
    #[must_use]
    pub fn is_loaded(&self) -> bool {
        matches!(&self.state, State::Loaded(_)) && self.is_settled()
    }

    /// The names of the plugins that it depends on.
    #[must_use]
    pub fn depends_on(&self, name: &str) -> bool {
        let dependencies = self.bundle.iter().flat_map(|bundle| &bundle.manifest.dependencies);
        dependencies.into_iter().any(|dependency| dependency.name.as_str() == name)
    }
}
