//! What every event says of itself.

use std::time::Duration;

use serde_json::json;

use super::{
    BreakerEvent, BrokerEvent, ConfigEvent, CustomEvent, DependencyEvent, Event, Exit, ExitKind, PluginEvent,
    ResourceEvent, SecurityEvent, SupervisorEvent,
};
use crate::{
    Code, Error, Severity,
    breaker::{OpenCause, Transition, Window},
};

fn error() -> Error {
    Error::new(Code::NeverListened, "plugin x never listened", "serve the socket")
}

fn exit(kind: ExitKind, oom: bool) -> Exit {
    Exit { kind, oom, uptime_ms: 1500, stderr_tail: vec!["panic".to_owned()] }
}

fn samples() -> Vec<Event> {
    let text = String::new;
    let plugin = [
        PluginEvent::Discovered { directory: text() },
        PluginEvent::Validated { version: text(), digest: plugvisor_package::Digest::of(b"") },
        PluginEvent::Rejected { stage: text(), error: error(), problems: Vec::new() },
        PluginEvent::LoadingProgress { phase: "init", percent: 80 },
        PluginEvent::Starting {
            pid: 1,
            cgroups: Vec::new(),
            level: "process",
            launch_exec_us: 1,
            launch_parts_us: Vec::new(),
        },
        PluginEvent::HandshakeOk { ms: 1 },
        PluginEvent::HandshakeFailed { stage: text(), error: error(), stderr_tail: Vec::new() },
        PluginEvent::Ready { ms: 1 },
        PluginEvent::Degraded { probe: "readiness" },
        PluginEvent::Recovered { ms: 1 },
        PluginEvent::Hung { missed: 3 },
        PluginEvent::Stopping { why: "unload", drain_ms: 10_000 },
        PluginEvent::Drained { inflight_left: 0 },
        PluginEvent::Exited { exit: exit(ExitKind::Code(0), false), expected: true },
        PluginEvent::Killed { stage: "terminate" },
        PluginEvent::RestartScheduled { attempt: 1, delay_ms: 400 },
        PluginEvent::Crashloop { count: 5, window_ms: 60_000 },
        PluginEvent::Quarantined { by: text() },
        PluginEvent::Unloaded {},
        PluginEvent::GaveUp { error: error() },
        PluginEvent::Reattached { gap_ms: 300 },
        PluginEvent::OrphanReaped { why: text() },
        PluginEvent::Removed {},
        PluginEvent::Refused { request: "load", state: "LOADED" },
    ];
    let mut all: Vec<Event> = plugin.into_iter().map(Event::from).collect();
    all.extend([
        SupervisorEvent::Started { version: text(), pid: 1 }.into(),
        SupervisorEvent::Ready { plugins: 3, failed: 0 }.into(),
        SupervisorEvent::Stopping { why: "signal" }.into(),
        SupervisorEvent::StateRebuilt { moved_to: text(), why: text() }.into(),
        SupervisorEvent::StateReadOnly { why: text(), cause: "disk_full" }.into(),
        SupervisorEvent::StateRecovered {}.into(),
        SupervisorEvent::LauncherLost { error: error() }.into(),
        DependencyEvent::Waiting { on: Vec::new() }.into(),
        DependencyEvent::Satisfied {}.into(),
        DependencyEvent::Lost { on: text() }.into(),
        DependencyEvent::CycleRejected { path: Vec::new() }.into(),
        SecurityEvent::TrustAssessed { tier: "verified", level: "process" }.into(),
        SecurityEvent::CapabilityGranted { capability: "api:internal-calls" }.into(),
        SecurityEvent::CapabilityDenied { capability: "api:internal-calls", why: text(), hint: text() }.into(),
        SecurityEvent::ChecksumMismatch { expected: text(), found: text() }.into(),
        SecurityEvent::SandboxDegraded { missing: Vec::new() }.into(),
        SecurityEvent::PeerMismatch { expected: text(), found: text() }.into(),
        BrokerEvent::ServiceRegistered { service: text() }.into(),
        BrokerEvent::ServiceWithdrawn { service: text() }.into(),
        BrokerEvent::CallDenied {
            caller: text(),
            service: text(),
            denial: "unknown_service",
            message: text(),
            hint: "load it".to_owned(),
        }
        .into(),
        BrokerEvent::ProtocolError { peer: text(), detail: text() }.into(),
        BrokerEvent::PayloadRejected { sender: text(), limit_bytes: 1 }.into(),
        BrokerEvent::LoopRejected { path: text() }.into(),
        BrokerEvent::OverloadShed { calls: 1 }.into(),
        BrokerEvent::IngressSocketsLost { lost: 1, all: 64, message: text(), more: 0, hint: "restart it".to_owned() }
            .into(),
        BreakerEvent::HalfOpened {}.into(),
        ResourceEvent::DiskLow { place: "/var/lib/plugvisor/logs".into() }.into(),
        BreakerEvent::Closed { open_ms: 1 }.into(),
        BreakerEvent::Forced { actor: "uid 1000".into(), from: "open" }.into(),
        BreakerEvent::Opened { cause: "failure_rate", rate: 0.5, slow_rate: 0.0, calls: 20, open_ms: 1 }.into(),
        ResourceEvent::OomKilled { limit_bytes: None }.into(),
        ResourceEvent::LogsDropped { lines: 1 }.into(),
        ConfigEvent::Loaded { file: text() }.into(),
    ]);
    all
}

#[test]
fn types_are_the_tags_and_reasons_are_stable_words() {
    for event in samples() {
        let value = serde_json::to_value(&event).unwrap();
        let (group, inner) = value.as_object().and_then(|map| map.iter().next()).expect("tagged by its group");
        let (name, _) = inner.as_object().and_then(|map| map.iter().next()).expect("tagged by its name");
        assert_eq!(event.type_name(), format!("io.plugvisor.{group}.{name}.v1"));
        let reason = event.reason();
        assert!(!reason.is_empty() && reason.len() < 64, "{reason:?}");
        assert!(
            reason.chars().all(|c| c.is_ascii_lowercase() || matches!(c, '_' | '.'))
                || event.type_name().contains("refused"),
            "{reason:?}"
        );
    }
}

#[test]
fn whatever_is_worse_than_information_says_what_to_do() {
    for event in samples() {
        let is_bad = event.severity() > Severity::Info;
        // A forced kill is explained by the event before it, unless the plugin ignored SIGTERM.
        assert!(!is_bad || !event.hint().is_empty(), "{} has no hint", event.type_name());
    }
}

#[test]
fn data_is_the_fields_alone() {
    let event =
        Event::from(PluginEvent::Exited { exit: exit(ExitKind::Signal("SIGKILL".to_owned()), true), expected: false });
    let expected = json!({
        "signal": "SIGKILL", "oom": true, "uptime_ms": 1500, "stderr_tail": ["panic"], "expected": false,
    });
    assert_eq!(serde_json::Value::Object(event.data()), expected);
    assert_eq!((event.reason(), event.severity()), ("oom", Severity::Error));
    assert!(event.hint().contains("maxMemory"));
    assert_eq!(Event::from(PluginEvent::Unloaded {}).data(), serde_json::Map::new());
    let rejected =
        Event::from(PluginEvent::Rejected { stage: "verify".to_owned(), error: error(), problems: Vec::new() });
    assert_eq!(rejected.data()["error"]["code"], "communication.never_listened");
    assert_eq!((rejected.reason(), rejected.hint().as_ref()), ("communication.never_listened", "serve the socket"));
}

#[test]
fn an_address_that_is_taken_may_be_the_worker_socket() {
    for (line, told) in [
        ("OSError: [Errno 98] Address already in use", true),
        ("Error: listen EADDRINUSE: address already in use /plugvisor/worker.sock", true),
        ("panic", false),
    ] {
        let exit = Exit { stderr_tail: vec![line.to_owned()], ..exit(ExitKind::Code(1), false) };
        let hint = exit.error("web").hint;
        assert_eq!(hint.contains("runtime.socket: \"bind\""), told, "{hint}");
        assert!(hint.contains("`plugvisor logs web`"), "{hint}");
    }
}

#[test]
fn a_plugins_own_events_cannot_pass_for_the_supervisors() {
    let data = json!({"n": 1}).as_object().cloned().unwrap();
    let event = Event::Custom(CustomEvent { name: "plugin.exited".to_owned(), data: data.clone() });
    assert_eq!(event.type_name(), "io.plugvisor.custom.plugin.exited.v1");
    assert_eq!((event.severity(), event.reason(), event.data()), (Severity::Info, "published", data));
}

#[test]
fn a_breakers_change_tells_its_numbers() {
    let window = Window { calls: 20, failed: 10, slow: 5 };
    let cause = OpenCause::FailureRate;
    let event =
        Event::from(BreakerEvent::from(Transition::Opened { cause, window, open_for: Duration::from_secs(60) }));
    let expected = json!({"cause": "failure_rate", "rate": 0.5, "slow_rate": 0.25, "calls": 20, "open_ms": 60_000});
    assert_eq!(serde_json::Value::Object(event.data()), expected);
    assert_eq!(event.reason(), "failure_rate");
}

#[test]
fn exits_become_errors_that_name_plugin_and_cause() {
    for (exit, code, text) in [
        (exit(ExitKind::Code(1), false), Code::PluginExited, "plugin x ended with status 1"),
        (exit(ExitKind::Code(78), false), Code::PluginMisconfigured, "plugin x ended with status 78"),
        (exit(ExitKind::Signal("SIGSEGV".to_owned()), false), Code::PluginExited, "plugin x was killed by SIGSEGV"),
        (exit(ExitKind::Signal("SIGKILL".to_owned()), true), Code::OutOfMemory, "plugin x was killed by the kernel"),
        (exit(ExitKind::Unknown, false), Code::PluginExited, "plugin x ended; how is not known"),
    ] {
        let error = exit.error("x");
        assert_eq!(error.code, code);
        assert!(error.message.starts_with(text) && !error.hint.is_empty(), "{error:?}");
    }
}
