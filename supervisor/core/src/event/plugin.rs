//! Events of a plugin's life.

use std::borrow::Cow;

use plugvisor_package::Digest;
use serde::Serialize;

use super::{Event, Group};
use crate::{Code, Error, Severity};

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Exit {
    /// How its first process ended.
    #[serde(flatten)]
    pub kind: ExitKind,
    /// The kernel killed it, or one of its processes, for memory.
    pub oom: bool,
    /// From exec to exit.
    pub uptime_ms: u64,
    /// Its last lines on stderr.
    pub stderr_tail: Vec<String>,
}

/// The end of a process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitKind {
    /// By itself, with this status.
    Code(i32),
    /// By this signal, such as "SIGKILL".
    Signal(String),
    /// Nobody can tell: the launcher, its parent, is gone.
    Unknown,
}

impl Exit {
    /// In words: "was killed by SIGKILL", "ended with status 1", "ran out of memory".
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.kind {
            _ if self.oom => "was killed by the kernel: it used more memory than its limit".to_owned(),
            ExitKind::Code(code) => format!("ended with status {code}"),
            ExitKind::Signal(signal) => format!("was killed by {signal}"),
            ExitKind::Unknown => "ended; how is not known, because its launcher is gone".to_owned(),
        }
    }
}

/// Events of type `io.plugvisor.plugin.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PluginEvent {
    /// Its bundle was found.
    Discovered {
        /// The bundle's directory.
        directory: String,
    },
    /// Manifest, bundle and policy agree that it may be launched.
    Validated {
        /// The version in its manifest.
        version: String,
        /// The bundle's content digest.
        digest: Digest,
    },
    /// It is not launched, or not served: something is wrong with it.
    Rejected {
        /// The load phase that refused it; "discover" before any.
        stage: String,
        /// What is wrong.
        error: Error,
        /// What else is wrong, when several problems were found at once.
        #[serde(skip_serializing_if = "Vec::is_empty")]
        problems: Vec<String>,
    },
    /// A load phase began.
    LoadingProgress {
        /// The phase's name.
        phase: &'static str,
        /// 0, and 100 when loaded.
        percent: u8,
    },
    /// Its process runs.
    Starting {
        /// The first process.
        pid: u32,
        /// Its cgroup directories.
        cgroups: Vec<String>,
        /// The isolation level.
        level: &'static str,
        /// From the launcher's reading of the request to the exec, in microseconds.
        launch_exec_us: u64,
        /// What each part of it took, in microseconds, in the order in which they were done.
        launch_parts_us: Vec<(String, u64)>,
    },
    /// It serves gRPC.
    HandshakeOk {
        /// Since the exec.
        ms: u64,
    },
    /// It does not.
    HandshakeFailed {
        /// The phase.
        stage: String,
        /// What went wrong.
        error: Error,
        /// Its last lines on stderr.
        stderr_tail: Vec<String>,
    },
    /// It is loaded and takes calls.
    Ready {
        /// Since the load began.
        ms: u64,
    },
    /// It is loaded and takes no calls, because its health service does not say SERVING.
    Degraded {
        /// The probe: "readiness".
        probe: &'static str,
    },
    /// It takes calls again.
    Recovered {
        /// How long it did not.
        ms: u64,
    },
    /// It does not answer its liveness probes and is killed.
    Hung {
        /// Probes missed in a row.
        missed: u32,
    },
    /// It is being stopped.
    Stopping {
        /// "unload", "restart", "shutdown", "quarantine", "failure".
        why: &'static str,
        /// Time that its calls in flight have to end.
        drain_ms: u64,
    },
    /// Its calls have ended, or their time has.
    Drained {
        /// Calls still in flight.
        inflight_left: u32,
    },
    /// Its process ended.
    Exited {
        /// How.
        #[serde(flatten)]
        exit: Exit,
        /// It was asked to.
        expected: bool,
    },
    /// It did not end when asked, and is being killed.
    Killed {
        /// The stage that ran out: "terminate", "hung", "failed", "now".
        stage: &'static str,
    },
    /// It will be started again.
    RestartScheduled {
        /// Restarts since its failures were last forgiven, from 1.
        attempt: u32,
        /// Until then.
        delay_ms: u64,
    },
    /// It fails again and again.
    Crashloop {
        /// Failures within the window.
        count: u32,
        /// The window.
        window_ms: u64,
    },
    /// It is never started until the quarantine is lifted.
    Quarantined {
        /// Who did it.
        by: String,
    },
    /// Nothing of it runs.
    Unloaded {},
    /// It is in FAILED, and will not be started again by itself.
    GaveUp {
        /// Why.
        error: Error,
    },
    /// A process that an earlier supervisor launched was found living, and takes calls again.
    Reattached {
        /// How long nobody supervised it.
        gap_ms: u64,
    },
    /// A process that an earlier supervisor launched was found living and could not be taken over: it is killed.
    OrphanReaped {
        /// Why not.
        why: String,
    },
    /// Its bundle is gone.
    Removed {},
    /// A request did not fit its state and changed nothing.
    Refused {
        /// What was asked.
        request: &'static str,
        /// The state that it is in.
        state: &'static str,
    },
}

impl From<PluginEvent> for Event {
    fn from(event: PluginEvent) -> Self {
        Self::Plugin(event)
    }
}

impl Group for PluginEvent {
    fn name(&self) -> &'static str {
        match self {
            Self::Discovered { .. } => "plugin.discovered",
            Self::Validated { .. } => "plugin.validated",
            Self::Rejected { .. } => "plugin.rejected",
            Self::LoadingProgress { .. } => "plugin.loading_progress",
            Self::Starting { .. } => "plugin.starting",
            Self::HandshakeOk { .. } => "plugin.handshake_ok",
            Self::HandshakeFailed { .. } => "plugin.handshake_failed",
            Self::Ready { .. } => "plugin.ready",
            Self::Degraded { .. } => "plugin.degraded",
            Self::Recovered { .. } => "plugin.recovered",
            Self::Hung { .. } => "plugin.hung",
            Self::Stopping { .. } => "plugin.stopping",
            Self::Drained { .. } => "plugin.drained",
            Self::Exited { .. } => "plugin.exited",
            Self::Killed { .. } => "plugin.killed",
            Self::RestartScheduled { .. } => "plugin.restart_scheduled",
            Self::Crashloop { .. } => "plugin.crashloop",
            Self::Quarantined { .. } => "plugin.quarantined",
            Self::Unloaded {} => "plugin.unloaded",
            Self::GaveUp { .. } => "plugin.gave_up",
            Self::Reattached { .. } => "plugin.reattached",
            Self::OrphanReaped { .. } => "plugin.orphan_reaped",
            Self::Removed {} => "plugin.removed",
            Self::Refused { .. } => "plugin.refused",
        }
    }

    fn severity(&self) -> Severity {
        match self {
            Self::Discovered { .. }
            | Self::Validated { .. }
            | Self::LoadingProgress { .. }
            | Self::Starting { .. }
            | Self::HandshakeOk { .. }
            | Self::Ready { .. }
            | Self::Recovered { .. }
            | Self::Stopping { .. }
            | Self::RestartScheduled { .. }
            | Self::Unloaded {}
            | Self::Reattached { .. }
            | Self::Removed {}
            | Self::Exited { expected: true, .. }
            | Self::Drained { inflight_left: 0 } => Severity::Info,
            Self::Degraded { .. }
            | Self::Killed { .. }
            | Self::Quarantined { .. }
            | Self::OrphanReaped { .. }
            | Self::Refused { .. }
            | Self::Drained { .. } => Severity::Warning,
            Self::Rejected { error, .. } | Self::HandshakeFailed { error, .. } | Self::GaveUp { error } => {
                error.code.severity()
            }
            Self::Hung { .. } | Self::Exited { expected: false, .. } | Self::Crashloop { .. } => Severity::Error,
        }
    }

    fn reason(&self) -> &'static str {
        match self {
            Self::Discovered { .. } => "bundle_found",
            Self::Validated { .. } => "accepted",
            Self::Rejected { error, .. } | Self::HandshakeFailed { error, .. } | Self::GaveUp { error } => {
                error.code.as_str()
            }
            Self::LoadingProgress { phase, .. } => phase,
            Self::Starting { .. } => "launched",
            Self::HandshakeOk { .. } | Self::Ready { .. } | Self::Recovered { .. } | Self::Reattached { .. } => {
                "serving"
            }
            Self::OrphanReaped { .. } => "not_adopted",
            Self::Degraded { .. } => "not_serving",
            Self::Hung { .. } => "liveness_missed",
            Self::Stopping { why, .. } => why,
            Self::Drained { inflight_left: 0 } => "idle",
            Self::Drained { .. } => "deadline",
            Self::Exited { exit, .. } => exit.reason(),
            Self::Killed { stage } => stage,
            Self::RestartScheduled { .. } => "backoff",
            Self::Crashloop { .. } => "repeated_failures",
            Self::Quarantined { .. } | Self::Unloaded {} => "requested",
            Self::Removed {} => "bundle_gone",
            Self::Refused { request, .. } => request,
        }
    }

    fn hint(&self) -> Cow<'_, str> {
        match self {
            Self::Rejected { error, .. } | Self::HandshakeFailed { error, .. } | Self::GaveUp { error } => {
                error.hint.as_str().into()
            }
            Self::Degraded { .. } => "see `plugvisor logs` for why its health service does not say SERVING".into(),
            Self::Hung { .. } => {
                "see `plugvisor logs` for what it was doing; a handler may block its event loop".into()
            }
            Self::Exited { expected: false, exit } => exit.hint("").into(),
            Self::Killed { stage: "terminate" } => "make the plugin end within its grace when it gets SIGTERM".into(),
            Self::Crashloop { .. } => {
                "`plugvisor logs` shows what it printed last; `plugvisor restart` tries at once".into()
            }
            Self::Drained { inflight_left: 1.. } => "calls outlived the drain time and were cut off".into(),
            Self::Quarantined { .. } => "look into why before it is lifted".into(),
            Self::OrphanReaped { .. } => "`plugvisor status` shows what runs in its place".into(),
            Self::Refused { .. } => "`plugvisor status` shows the states".into(),
            Self::Discovered { .. }
            | Self::Validated { .. }
            | Self::LoadingProgress { .. }
            | Self::Starting { .. }
            | Self::HandshakeOk { .. }
            | Self::Ready { .. }
            | Self::Recovered { .. }
            | Self::Stopping { .. }
            | Self::Drained { inflight_left: 0 }
            | Self::Exited { expected: true, .. }
            | Self::Killed { .. }
            | Self::RestartScheduled { .. }
            | Self::Unloaded {}
            | Self::Reattached { .. }
            | Self::Removed {} => "".into(),
        }
    }
}

impl Exit {
    fn reason(&self) -> &'static str {
        match self.kind {
            _ if self.oom => "oom",
            ExitKind::Code(_) => "code",
            ExitKind::Signal(_) => "signal",
            ExitKind::Unknown => "unknown",
        }
    }

    /// `of` is what follows a command: a space and the plugin's name, or nothing where the reader sees the name beside it.
    fn hint(&self, of: &str) -> String {
        match self.kind {
            _ if self.oom => "raise maxMemory, or make the plugin use less".to_owned(),
            ExitKind::Code(78) => format!(
                "its configuration is wrong: `plugvisor logs{of}` shows what it said; mend it, then `plugvisor \
                 restart{of}`"
            ),
            ExitKind::Code(_) if self.names_taken_address() => format!(
                "`plugvisor logs{of}` shows what it printed last; if the address that is in use is its worker socket, that is \
                 listening already as descriptor 3: serve on the descriptor, or have the program bind the socket itself, \
                 by runtime.socket: \"bind\" in its plugin.json"
            ),
            ExitKind::Code(_) | ExitKind::Unknown => format!("`plugvisor logs{of}` shows what it printed last"),
            ExitKind::Signal(_) => format!(
                "not sent by Plugvisor: it crashed or was killed; `plugvisor logs{of}` shows what it printed last"
            ),
        }
    }

    /// Whether its last lines say, in the words of most libraries, that an address is taken. The first thing that a program
    /// which does not know of inherited sockets does is to bind the one that it is given.
    fn names_taken_address(&self) -> bool {
        self.stderr_tail.iter().any(|line| {
            let line = line.to_ascii_lowercase();
            ["address already in use", "address in use", "eaddrinuse"].iter().any(|words| line.contains(words))
        })
    }

    /// The error that this exit is, when nobody asked for it.
    #[must_use]
    pub fn error(&self, plugin: &str) -> Error {
        let code = match self.kind {
            _ if self.oom => Code::OutOfMemory,
            ExitKind::Code(78) => Code::PluginMisconfigured,
            ExitKind::Code(_) | ExitKind::Signal(_) | ExitKind::Unknown => Code::PluginExited,
        };
        Error::new(code, format!("plugin {plugin} {}", self.describe()), self.hint(&format!(" {plugin}")))
    }
}
