//! Events of everything but a plugin's life.

use std::borrow::Cow;

use serde::Serialize;

use super::{Event, Group};
use crate::{
    Error, Severity,
    breaker::{Transition, Window},
};

/// Events of type `io.plugvisor.supervisor.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SupervisorEvent {
    /// It reads its configuration and begins.
    Started {
        /// Its version.
        version: String,
        /// Its process.
        pid: u32,
    },
    /// Every plugin that loads by itself is loaded or has failed.
    Ready {
        /// Those loaded.
        plugins: u32,
        /// Those failed.
        failed: u32,
    },
    /// It stops.
    Stopping {
        /// "signal", "request", "launcher_lost".
        why: &'static str,
    },
    /// Its own state could not be read, was moved aside, and was begun anew from the configuration.
    StateRebuilt {
        /// Where the old one lies.
        moved_to: String,
        /// What was wrong with it.
        why: String,
    },
    /// Its own state cannot be written: plugins run on, and what must be remembered is refused.
    StateReadOnly {
        /// Why.
        why: String,
        /// "disk_full", "locked" or "io".
        cause: &'static str,
    },
    /// Its own state can be written again, and what happened meanwhile has been.
    StateRecovered {},
    /// The launcher, the plugins' parent, is gone, and every plugin with it.
    LauncherLost {
        /// What is known.
        error: Error,
    },
}

/// Events of type `io.plugvisor.dependency.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DependencyEvent {
    /// A plugin waits for others before it is launched.
    Waiting {
        /// Their names.
        on: Vec<String>,
    },
    /// It waits no longer.
    Satisfied {},
    /// A plugin that it depends on is no longer loaded.
    Lost {
        /// Its name.
        on: String,
    },
    /// Plugins depend on one another in a circle.
    CycleRejected {
        /// The circle; the first name is also the last.
        path: Vec<String>,
    },
}

/// Events of type `io.plugvisor.security.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SecurityEvent {
    /// The tier that counts for a plugin.
    TrustAssessed {
        /// The tier.
        tier: &'static str,
        /// The isolation level that follows.
        level: &'static str,
    },
    /// A capability was granted.
    CapabilityGranted {
        /// Its name.
        capability: &'static str,
    },
    /// A capability was asked for and not granted.
    CapabilityDenied {
        /// Its name.
        capability: &'static str,
        /// Why, in words.
        why: String,
        /// What to do next.
        #[serde(skip)]
        hint: String,
    },
    /// The bytes to execute are not the bytes expected.
    ChecksumMismatch {
        /// The digest expected.
        expected: String,
        /// The digest found.
        found: String,
    },
    /// The operator allows controls to be missing, and they are.
    SandboxDegraded {
        /// Their names.
        missing: Vec<String>,
    },
    /// The other end of a socket is not who it should be.
    PeerMismatch {
        /// Who was expected.
        expected: String,
        /// Who it was.
        found: String,
    },
}

/// Events of type `io.plugvisor.broker.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BrokerEvent {
    /// Calls to a service now reach a plugin.
    ServiceRegistered {
        /// Its name.
        service: String,
    },
    /// They no longer do.
    ServiceWithdrawn {
        /// Its name.
        service: String,
    },
    /// The broker refused a call.
    CallDenied {
        /// Who called: a plugin's name or "uid 1000".
        caller: String,
        /// What was called.
        service: String,
        /// A [`crate::route::Reason`].
        denial: &'static str,
        /// What was refused and why.
        message: String,
        /// What to do next.
        #[serde(skip)]
        hint: String,
    },
    /// A peer broke HTTP/2 or gRPC.
    ProtocolError {
        /// Who: a plugin's name or "uid 1000".
        peer: String,
        /// What it did.
        detail: String,
    },
    /// A message was over the limit.
    PayloadRejected {
        /// Who sent it.
        sender: String,
        /// The limit.
        limit_bytes: u64,
    },
    /// A call came back to a plugin on its own path.
    LoopRejected {
        /// The path in words.
        path: String,
    },
    /// The egress proxy refused a plugin a connection.
    EgressDenied {
        /// Where it wanted to go, as it named it: `host:port`; empty when that could not be read.
        host: String,
        /// Why: `not_listed`, `address_refused`, `smuggling` and so on, as in the answer's `plugvisor-reason`.
        denial: &'static str,
        /// What was refused and why.
        message: String,
        /// Further refusals since the last such event, which had none of their own.
        more: u64,
        /// What to do next.
        #[serde(skip)]
        hint: String,
    },
    /// A connection from outside to a plugin was closed without having been carried.
    IngressFailed {
        /// Who connected.
        peer: String,
        /// To which of the plugin's addresses.
        address: String,
        /// Why: `not_ready`, `refused`, `not_taken` and so on, as in the metrics.
        failure: &'static str,
        /// What was closed and why.
        message: String,
        /// Further ones since the last such event, which had none of their own.
        more: u64,
        /// What to do next.
        #[serde(skip)]
        hint: String,
    },
    /// Sockets by which a plugin is connected to cannot be used again, until it is launched again.
    IngressSocketsLost {
        /// How many of this generation's.
        lost: u64,
        /// How many it had.
        all: u64,
        /// Why.
        message: String,
        /// Further losses since the last such event, which had none of their own.
        more: u64,
        /// What to do next.
        #[serde(skip)]
        hint: String,
    },
    /// Calls were refused because a plugin has too many.
    OverloadShed {
        /// Calls refused since the last such event.
        calls: u64,
    },
}

/// Events of type `io.plugvisor.breaker.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerEvent {
    /// Calls are refused.
    Opened {
        /// Why.
        cause: &'static str,
        /// The share of failed calls in the window.
        rate: f64,
        /// The share of slow calls in the window.
        slow_rate: f64,
        /// The calls in the window.
        calls: u32,
        /// How long, at least.
        open_ms: u64,
    },
    /// A few calls are let through.
    HalfOpened {},
    /// All calls pass.
    Closed {
        /// Since it first opened.
        open_ms: u64,
    },
    /// An operator closed it.
    Forced {
        /// Who: "uid 1000".
        actor: String,
        /// Where it stood before.
        from: &'static str,
    },
}

impl From<Transition> for BreakerEvent {
    fn from(transition: Transition) -> Self {
        match transition {
            Transition::Opened { cause, window, open_for } => {
                let Window { calls, failed: _, slow: _ } = window;
                let (rate, slow_rate) = (window.failure_rate(), window.slow_rate());
                Self::Opened { cause: cause.as_str(), rate, slow_rate, calls, open_ms: millis(open_for) }
            }
            Transition::HalfOpened => Self::HalfOpened {},
            Transition::Closed { open } => Self::Closed { open_ms: millis(open) },
        }
    }
}

/// Events of type `io.plugvisor.resource.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ResourceEvent {
    /// The kernel killed a plugin for memory.
    OomKilled {
        /// Its limit; `None` when it had none of its own.
        limit_bytes: Option<u64>,
    },
    /// A plugin printed faster than allowed, and lines were dropped.
    LogsDropped {
        /// Lines dropped since the last such event.
        lines: u64,
    },
    /// A disk has no room for what should be kept.
    DiskLow {
        /// The directory.
        place: String,
    },
}

/// Events of type `io.plugvisor.config.*`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ConfigEvent {
    /// The configuration was read.
    Loaded {
        /// The file; empty when none was found and the defaults hold.
        file: String,
    },
}

pub(crate) fn millis(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

macro_rules! into_event {
    ($($group:ident: $type:ident),+) => {
        $(impl From<$type> for Event {
            fn from(event: $type) -> Self {
                Self::$group(event)
            }
        })+
    };
}

into_event!(
    Supervisor: SupervisorEvent,
    Dependency: DependencyEvent,
    Security: SecurityEvent,
    Broker: BrokerEvent,
    Breaker: BreakerEvent,
    Resource: ResourceEvent,
    Config: ConfigEvent
);

/// For each variant: name, severity, reason, hint.
macro_rules! group {
    ($type:ident { $($pattern:pat => $name:literal, $severity:expr, $reason:expr, $hint:expr;)+ }) => {
        impl Group for $type {
            fn name(&self) -> &'static str {
                #[allow(unused_variables, reason = "one pattern serves four functions")]
                match self { $($pattern => $name),+ }
            }

            fn severity(&self) -> Severity {
                #[allow(unused_variables, reason = "one pattern serves four functions")]
                match self { $($pattern => $severity),+ }
            }

            fn reason(&self) -> &'static str {
                #[allow(unused_variables, reason = "one pattern serves four functions")]
                match self { $($pattern => $reason),+ }
            }

            fn hint(&self) -> Cow<'_, str> {
                #[allow(unused_variables, reason = "one pattern serves four functions")]
                match self { $($pattern => Cow::from($hint)),+ }
            }
        }
    };
}

group!(SupervisorEvent {
    Self::Started { .. } => "supervisor.started", Severity::Info, "started", "";
    Self::Ready { failed: 0, .. } => "supervisor.ready", Severity::Info, "all_loaded", "";
    Self::Ready { .. } => "supervisor.ready", Severity::Warning, "some_failed",
        "`plugvisor status` says which and why";
    Self::Stopping { why } => "supervisor.stopping", Severity::Info, why, "";
    Self::StateRebuilt { .. } => "supervisor.state_rebuilt", Severity::Critical, "corrupt",
        "unload again what was unloaded by hand; keep the old file until you know why the disk lost it";
    Self::StateReadOnly { cause, .. } => "supervisor.state_read_only", Severity::Critical, cause,
        "make the state directory writable; the supervisor tries again by itself";
    Self::StateRecovered {} => "supervisor.state_recovered", Severity::Info, "written", "";
    Self::LauncherLost { error } => "supervisor.launcher_lost", error.code.severity(), error.code.as_str(),
        error.hint.as_str();
});
group!(DependencyEvent {
    Self::Waiting { .. } => "dependency.waiting", Severity::Info, "not_loaded", "";
    Self::Satisfied {} => "dependency.satisfied", Severity::Info, "loaded", "";
    Self::Lost { .. } => "dependency.lost", Severity::Warning, "not_loaded",
        "calls to it are refused until it is loaded again";
    Self::CycleRejected { .. } => "dependency.cycle_rejected", Severity::Error, "cycle",
        "remove one of these dependencies";
});
group!(SecurityEvent {
    Self::TrustAssessed { .. } => "security.trust_assessed", Severity::Info, "directory_tier", "";
    Self::CapabilityGranted { .. } => "security.capability_granted", Severity::Info, "granted", "";
    Self::CapabilityDenied { hint, .. } => "security.capability_denied", Severity::Info, "not_granted", hint.as_str();
    Self::ChecksumMismatch { .. } => "security.checksum_mismatch", Severity::Critical, "digest_differs",
        "find out who changed the bundle, then install it anew";
    Self::SandboxDegraded { .. } => "security.sandbox_degraded", Severity::Warning, "allowed_by_operator",
        "make the host able to enforce them, then remove them from allow_degraded";
    Self::PeerMismatch { .. } => "security.peer_mismatch", Severity::Critical, "wrong_peer",
        "find out which process took the socket";
});
group!(BrokerEvent {
    Self::ServiceRegistered { .. } => "broker.service_registered", Severity::Info, "ready", "";
    Self::ServiceWithdrawn { .. } => "broker.service_withdrawn", Severity::Info, "not_ready", "";
    Self::CallDenied { denial, hint, .. } => "broker.call_denied", Severity::Warning, denial, hint.as_str();
    Self::EgressDenied { denial, hint, .. } => "broker.egress_denied", Severity::Warning, denial, hint.as_str();
    Self::IngressFailed { failure, hint, .. } => "broker.ingress_failed", Severity::Warning, failure, hint.as_str();
    Self::IngressSocketsLost { hint, .. } => "broker.ingress_sockets_lost", Severity::Warning, "unusable", hint.as_str();
    Self::ProtocolError { .. } => "broker.protocol_error", Severity::Error, "protocol",
        "the peer must speak gRPC over HTTP/2";
    Self::PayloadRejected { .. } => "broker.payload_rejected", Severity::Warning, "too_large",
        "send less in one message, or use a stream";
    Self::LoopRejected { .. } => "broker.loop_rejected", Severity::Error, "loop",
        "break the circle of calls between these plugins";
    Self::OverloadShed { .. } => "broker.overload_shed", Severity::Warning, "overloaded",
        "call less often, or let more calls run at once";
});
group!(BreakerEvent {
    Self::Opened { cause, .. } => "breaker.opened", Severity::Error, cause,
        "see `plugvisor logs` for why its calls fail; the breaker tries again by itself";
    Self::HalfOpened {} => "breaker.half_opened", Severity::Info, "open_time_passed", "";
    Self::Closed { .. } => "breaker.closed", Severity::Info, "recovered", "";
    Self::Forced { .. } => "breaker.forced", Severity::Warning, "reset",
        "if its calls go on failing, it opens again";
});
group!(ResourceEvent {
    Self::OomKilled { .. } => "resource.oom_killed", Severity::Error, "limit",
        "raise maxMemory, or make the plugin use less";
    Self::LogsDropped { .. } => "resource.logs_dropped", Severity::Warning, "rate",
        "make the plugin print less";
    Self::DiskLow { .. } => "resource.disk_low", Severity::Error, "no_room",
        "free space there; log lines that come meanwhile are counted and lost";
});
group!(ConfigEvent {
    Self::Loaded { .. } => "config.loaded", Severity::Info, "read", "";
});
