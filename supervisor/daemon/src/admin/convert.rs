//! From the supervisor's state to the messages of `plugvisor.admin.v1`.
//!
//! Views are taken apart field by field, so that a new field of the contract cannot be forgotten.

use std::{cmp::Ordering, time::Duration};

use plugvisor_core::{
    Severity, breaker,
    event::ExitKind,
    lifecycle::{Loaded, State},
    policy::Verdict,
    route::{Export, HostModule},
};
use plugvisor_package::{Capability, IsolationLevel, Manifest, VariableName};
use plugvisor_proto::{
    admin::v1::{
        BreakerStatus, CapabilityState, Control, DescribePluginResponse, HostFeature, LastExit, LogStream, PluginState,
        PluginStatus, ReadLogsResponse, ServiceState, SupervisorStatus, Transition,
    },
    event::v1::{Event, Severity as WireSeverity},
};
use plugvisor_sandbox::protocol::{ControlState, DirectoryState, ProbeState, Probed};
use tokio::time::Instant;

use super::wire;
use crate::{
    broker::{ProviderSnapshot, Snapshot},
    calls,
    config::{ListenConfig, PluginConfig},
    driver::{ExitView, PluginView},
    events::Record,
    ingress::{Front, Sockets},
    logs::{self, LogLine},
    state::{Health, Rebuilt, TransitionRecord, Writing},
    stats,
    supervisor::Supervisor,
};

/// The supervisor's own line.
pub(super) fn supervisor(state: &Supervisor) -> SupervisorStatus {
    let launcher = state.shared.launcher.pid();
    SupervisorStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        launcher_pid: launcher,
        started_at: Some(wire::timestamp(state.started_at)),
        metrics_address: state.metrics_address.to_string(),
        calls_socket: state.calls_socket.display().to_string(),
        configuration_file: state.config.file.as_ref().map(|file| file.display().to_string()).unwrap_or_default(),
        degraded: state.degraded(),
        ready: matches!(crate::observe::Observed::readiness(state), crate::observe::Readiness::Ready),
        features: state.features.controls.iter().map(feature).collect(),
        resident_bytes: stats::resident_bytes(std::process::id()).unwrap_or(0),
        not_ready: match crate::observe::Observed::readiness(state) {
            crate::observe::Readiness::Ready => Vec::new(),
            crate::observe::Readiness::NotReady(reasons) => reasons,
        },
        state_directory: state.config.supervisor.state_directory.display().to_string(),
        state_trouble: state_trouble(&state.shared.state.health().borrow()),
        launcher_resident_bytes: stats::resident_bytes(launcher).unwrap_or(0),
        reattached_plugins: state.reattached().map_or(0, |(plugins, _)| u32::try_from(plugins).unwrap_or(u32::MAX)),
        reattached_in: state.reattached().and_then(|(_, took)| wire::duration(took)),
    }
}

fn state_trouble(health: &Health) -> String {
    let mut trouble = Vec::new();
    if let Writing::Fails { since: _, cause: _, why } = &health.writing {
        trouble
            .push(format!("it cannot be written ({why}): nothing can be loaded or unloaded by hand; plugins run on"));
    }
    if let Some(Rebuilt { moved_to, why }) = &health.rebuilt {
        trouble.push(format!(
            "it was damaged ({why}), moved to {} and begun anew: unload again what was unloaded by hand",
            moved_to.display()
        ));
    }
    trouble.join("; ")
}

fn feature(probed: &Probed) -> HostFeature {
    let (works, detail) = match &probed.state {
        ProbeState::Works(how) => (true, how.clone()),
        ProbeState::Lacking { why, fix } => (false, format!("{why}; {fix}")),
    };
    HostFeature { name: probed.control.to_string(), works, detail }
}

/// One plugin's line.
pub(super) fn status(view: &PluginView, calls: &Snapshot) -> PluginStatus {
    let (phase, conditions) = match &view.state {
        State::Loading(loading) => (loading.phase.as_str().to_owned(), Vec::new()),
        State::Loaded(Loaded { condition, .. }) => (String::new(), vec![condition.as_str().to_owned()]),
        State::Unknown | State::Discovered | State::Unloaded | State::Failed(_) | State::Quarantined => {
            Default::default()
        }
    };
    let served = calls.calls.iter().filter(|series| series.provider == view.name);
    let (total, failed) = served.fold((0, 0), |(total, failed), series| {
        let all: u64 = series.by_code.iter().sum();
        (total + all, failed + all - series.by_code[0])
    });
    let breaker = calls.providers.iter().find(|provider| provider.identity.name.as_str() == view.name);
    let process = view.process.as_deref();
    let restart_in = view.restart_at.map(|at| at.saturating_duration_since(Instant::now()));
    let shown_error = view.last_error.as_ref();
    let mut last_error = shown_error.map(|error| error.message.clone()).unwrap_or_default();
    for problem in &view.problems {
        if !last_error.contains(problem.as_str()) {
            last_error.push_str("\n  ");
            last_error.push_str(problem);
        }
    }
    PluginStatus {
        name: view.name.clone(),
        version: view.bundle.as_ref().map(|bundle| bundle.manifest.version.to_string()).unwrap_or_default(),
        state: plugin_state(&view.state).into(),
        phase,
        conditions,
        generation: view.generation.0,
        pid: process.map_or(0, |process| process.pid),
        isolation_level: level(view).as_str().to_owned(),
        tier: view.verdict.as_ref().map_or(view.tier, |verdict| verdict.tier).as_str().to_owned(),
        restarts: view.restarts,
        since: Some(wire::timestamp(view.since)),
        breaker: breaker.map(|provider| provider.breaker.position.as_str().to_owned()).unwrap_or_default(),
        calls_total: total,
        calls_failed_total: failed,
        memory_bytes: process.and_then(|process| stats::usage(&process.cgroups).memory_bytes).unwrap_or(0),
        last_error,
        hint: shown_error.map(|error| error.hint.clone()).unwrap_or_default(),
        restart_in: restart_in.and_then(wire::duration),
        critical: view.bundle.as_ref().is_some_and(|bundle| bundle.manifest.critical),
        crash_loop: match &view.state {
            State::Failed(failed) => failed.restart.is_some_and(|restart| restart.crash_loop),
            State::Unknown
            | State::Discovered
            | State::Loading(_)
            | State::Loaded(_)
            | State::Unloaded
            | State::Quarantined => false,
        },
    }
}

/// The level that it has, or would get.
fn level(view: &PluginView) -> IsolationLevel {
    match (&view.verdict, &view.bundle) {
        (Some(verdict), _) => verdict.level,
        (None, Some(bundle)) => bundle.manifest.security.sandbox.isolation_level.unwrap_or(IsolationLevel::Process),
        (None, None) => IsolationLevel::Process,
    }
}

fn plugin_state(state: &State) -> PluginState {
    match state {
        State::Unknown => PluginState::Unknown,
        State::Discovered => PluginState::Discovered,
        State::Loading(_) => PluginState::Loading,
        State::Loaded(_) => PluginState::Loaded,
        State::Unloaded => PluginState::Unloaded,
        State::Failed(_) => PluginState::Failed,
        State::Quarantined => PluginState::Quarantined,
    }
}

/// Everything about one plugin. `controls` as the kernel shows them now.
pub(super) fn describe(
    view: &PluginView,
    config: &PluginConfig,
    front: Option<&Front>,
    calls: &Snapshot,
    controls: &[ControlState],
    stderr_tail: Vec<String>,
) -> DescribePluginResponse {
    let bundle = view.bundle.as_deref();
    let services = bundle.map(|bundle| calls::offers(&bundle.services)).unwrap_or_default();
    let mut controls: Vec<Control> = controls.iter().map(control).collect();
    if let Some(verdict) = &view.verdict {
        if let Some(bundle) = bundle.filter(|_| !controls.is_empty()) {
            controls.extend(network(front, &bundle.manifest, verdict));
            controls.extend(environment(config, verdict));
            controls.extend(view.process.iter().flat_map(|process| &process.directories).map(directory));
        }
        note_limits(&mut controls, verdict);
    }
    DescribePluginResponse {
        status: Some(status(view, calls)),
        bundle_directory: view.directory.display().to_string(),
        content_digest: bundle.map(|bundle| bundle.digest.to_string()).unwrap_or_default(),
        controls,
        capabilities: view.verdict.as_deref().map(capabilities).unwrap_or_default(),
        inactive_fields: bundle.map(|bundle| bundle.manifest.inactive_fields().to_vec()).unwrap_or_default(),
        services: services
            .into_iter()
            .map(|service| ServiceState {
                name: service.name,
                token: service.token.unwrap_or_default(),
                exported: matches!(service.export, Export::Shared { .. }),
            })
            .collect(),
        transitions: view.transitions.iter().map(transition).collect(),
        stderr_tail,
        last_exit: view.last_exit.as_ref().map(last_exit),
        manifest: bundle.and_then(|bundle| match bundle.manifest.as_json() {
            serde_json::Value::Object(object) => Some(wire::to_struct(object.clone())),
            _ => None,
        }),
        sdk: view.sdk.clone(),
        tier_reason: tier_reason(view),
        isolation_reason: isolation_reason(view),
    }
}

fn tier_reason(view: &PluginView) -> String {
    let Some(verdict) = &view.verdict else { return String::new() };
    match verdict.tier.cmp(&view.tier) {
        Ordering::Equal => String::new(),
        Ordering::Less => {
            format!("security.trustLevel of its plugin.json limits it to that; its directory gives {}", view.tier)
        }
        // The launcher has verified the approval of one that runs, and judges that of another when it is launched.
        Ordering::Greater => {
            let holds = if view.process.is_some() { "by" } else { "if the launcher accepts" };
            format!("{holds} the approval beside its bundle; its directory gives {}", view.tier)
        }
    }
}

fn isolation_reason(view: &PluginView) -> String {
    let (Some(verdict), Some(bundle)) = (&view.verdict, &view.bundle) else { return String::new() };
    let sandbox = &bundle.manifest.security.sandbox;
    let asked = match (sandbox.enabled, sandbox.isolation_level) {
        (false, _) => IsolationLevel::None,
        (true, asked) => asked.unwrap_or(IsolationLevel::Process),
    };
    if verdict.level == asked {
        return String::new();
    }
    format!("the least for the tier {}; its plugin.json asks for {}", verdict.tier, asked.as_str())
}

fn control(state: &ControlState) -> Control {
    let ControlState { control, requested, enforced, read_from, unavailable } = state;
    Control {
        name: control.to_string(),
        requested: requested.clone(),
        enforced: enforced.clone().unwrap_or_default(),
        read_from: read_from.clone(),
        unavailable: unavailable.clone(),
    }
}

/// A directory of its name.
fn directory(state: &DirectoryState) -> Control {
    let DirectoryState { place, requested, enforced, read_from } = state;
    Control {
        name: place.trim_start_matches('/').replace('/', "-"),
        requested: requested.clone(),
        enforced: enforced.clone().unwrap_or_default(),
        read_from: read_from.clone(),
        unavailable: String::new(),
    }
}

/// The operator's variables, by their names.
fn environment(config: &PluginConfig, verdict: &Verdict) -> Option<Control> {
    let names: Vec<&str> = config.environment.keys().map(VariableName::as_str).collect();
    let given = verdict.granted().contains(Capability::AccessEnv) && !names.is_empty();
    given.then(|| Control {
        name: "environment".to_owned(),
        requested: names.join(", "),
        enforced: "given with the launch, beside the manifest's own".to_owned(),
        read_from: "the launch request, checked by the launcher's policy".to_owned(),
        unavailable: String::new(),
    })
}

/// What the supervisor itself holds a plugin's network to: there is nothing to be read back from the kernel.
fn network(front: Option<&Front>, manifest: &Manifest, verdict: &Verdict) -> Vec<Control> {
    let mut controls: Vec<Control> =
        proxied(manifest, verdict).into_iter().chain(connected(front, manifest, verdict)).collect();
    if let Some(bytes) = verdict.limits.network_bytes.filter(|_| !controls.is_empty()) {
        controls.push(Control {
            name: "network-bandwidth".to_owned(),
            requested: format!("{bytes} bytes per second"),
            enforced: "both directions together".to_owned(),
            read_from: "the supervisor, which carries every byte".to_owned(),
            unavailable: String::new(),
        });
    }
    controls
}

/// What its egress proxy lets it reach.
fn proxied(manifest: &Manifest, verdict: &Verdict) -> Option<Control> {
    let network = [Capability::HttpClient, Capability::WebSocket, Capability::DnsResolve];
    if !network.iter().any(|capability| verdict.granted().contains(*capability)) {
        return None;
    }
    let list: Vec<String> = manifest.runtime.egress.iter().map(ToString::to_string).collect();
    let (list, open) = match list.as_slice() {
        [] => ("no destination".to_owned(), "nothing is let through".to_owned()),
        list => {
            let name = &manifest.name;
            (list.join(", "), format!("their public addresses, and those that [plugin.{name}.network] addresses lists"))
        }
    };
    Some(Control {
        name: "egress".to_owned(),
        requested: list,
        enforced: open,
        read_from: "the supervisor's egress proxy".to_owned(),
        unavailable: String::new(),
    })
}

/// What the supervisor holds connections to it to. That it listens at these ports alone is the kernel's: Landlock, and the
/// network namespace, which nobody else is in.
fn connected(front: Option<&Front>, manifest: &Manifest, verdict: &Verdict) -> Option<Control> {
    if !verdict.granted().contains(Capability::TcpServer) {
        return None;
    }
    let ports: Vec<String> = manifest.runtime.listen.iter().map(u16::to_string).collect();
    let ports = if ports.is_empty() { "no port".to_owned() } else { format!("ports {}", ports.join(", ")) };
    let address = |(address, listen): (std::net::SocketAddr, ListenConfig)| {
        format!("{address} leads to port {}, {} connections at most", listen.port, listen.max_connections)
    };
    let addresses: Vec<String> = front.iter().flat_map(|front| front.addresses().map(address)).collect();
    let lost =
        front.and_then(Front::sockets_of_current).filter(|sockets| sockets.lost > 0).map(|Sockets { all, lost }| {
            format!(
                "; {lost} of {all} sockets into it cannot be used again until it is restarted, so many connections less"
            )
        });
    Some(Control {
        name: "ingress".to_owned(),
        requested: format!("{ports} of its network namespace"),
        enforced: match addresses.as_slice() {
            [] => format!("nobody connects to it: [[plugin.{}.network.listen]] has no address", manifest.name),
            addresses => addresses.join("; ") + &lost.unwrap_or_default(),
        },
        read_from: "the supervisor's listening sockets".to_owned(),
        unavailable: String::new(),
    })
}

/// Where a limit is not the one that the manifest asked for, the control that holds it says so too.
fn note_limits(controls: &mut [Control], verdict: &Verdict) {
    for note in &verdict.limit_notes {
        let holder = match note.limit {
            "maxMemory" => "memory-limit",
            "maxCPU" => "cpu-limit",
            "pids" => "pids-limit",
            "maxNetworkBandwidth" => "network-bandwidth",
            // File sizes and open files are rlimits; the longest call is the broker's, and has no control.
            _ => "rlimits",
        };
        if let Some(control) = controls.iter_mut().find(|control| control.name == holder) {
            control.requested = format!("{} ({}: {})", control.requested, note.limit, note.why);
        }
    }
}

fn capabilities(verdict: &Verdict) -> Vec<CapabilityState> {
    let state = |capability: &plugvisor_core::policy::CapabilityVerdict| CapabilityState {
        name: capability.capability.to_string(),
        granted: capability.why_not.is_none(),
        reason: match (capability.why_not, HostModule::for_capability(capability.capability)) {
            (Some(why), _) => why.describe(),
            (None, Some(module)) if !module.is_served() => {
                format!("{} is not available in this version", module.service())
            }
            (None, _) => String::new(),
        },
    };
    verdict.capabilities.iter().map(state).collect()
}

fn transition(view: &TransitionRecord) -> Transition {
    let TransitionRecord { at, from, to, cause } = view;
    Transition { at: Some(wire::timestamp(*at)), from: from.to_string(), to: to.to_string(), cause: cause.clone() }
}

fn last_exit(view: &ExitView) -> LastExit {
    let ExitView { at, exit } = view;
    let (code, signal) = match &exit.kind {
        ExitKind::Code(code) => (Some(*code), String::new()),
        ExitKind::Signal(signal) => (None, signal.clone()),
        ExitKind::Unknown => (None, String::new()),
    };
    LastExit {
        at: Some(wire::timestamp(*at)),
        code,
        signal,
        oom: exit.oom,
        uptime: wire::duration(Duration::from_millis(exit.uptime_ms)),
    }
}

/// An event in its envelope.
pub(super) fn event(record: &Record, source: &str) -> Event {
    let Record { id, sequence, time, subject, type_name, event } = record;
    let severity = match event.severity() {
        Severity::Info => WireSeverity::Info,
        Severity::Warning => WireSeverity::Warning,
        Severity::Error => WireSeverity::Error,
        Severity::Critical => WireSeverity::Critical,
    };
    Event {
        id: id.to_string(),
        source: source.to_owned(),
        r#type: type_name.clone(),
        subject: subject.text(),
        time: Some(wire::timestamp(*time)),
        sequence: *sequence,
        severity: severity.into(),
        traceparent: String::new(),
        correlation_id: String::new(),
        causation_id: String::new(),
        reason: event.reason().to_owned(),
        hint: event.hint().into_owned(),
        data: Some(wire::to_struct(event.data())),
    }
}

/// A provider's breaker.
pub(super) fn breaker(provider: &ProviderSnapshot) -> BreakerStatus {
    let ProviderSnapshot { identity, ready: _, breaker, in_flight, limits: _, connected: _ } = provider;
    let breaker::Snapshot { position, consecutive_failures, window, retry_after } = *breaker;
    BreakerStatus {
        plugin: identity.name.to_string(),
        generation: identity.generation.0,
        state: position.as_str().to_owned(),
        consecutive_failures,
        calls: window.calls,
        failed: window.failed,
        slow: window.slow,
        retry_after: if retry_after.is_zero() { None } else { wire::duration(retry_after) },
        in_flight: u32::try_from(*in_flight).unwrap_or(u32::MAX),
    }
}

/// A line of a plugin's log. `missed`: lines that this reader did not get before it.
pub(super) fn log_line(line: &LogLine, missed: u64) -> ReadLogsResponse {
    let LogLine { at, plugin, generation, stream, line, continues, dropped_before } = line;
    let stream = match stream {
        logs::LogStream::Stdout => LogStream::Stdout,
        logs::LogStream::Stderr => LogStream::Stderr,
    };
    ReadLogsResponse {
        at: Some(wire::timestamp(*at)),
        plugin: plugin.to_string(),
        generation: *generation,
        stream: stream.into(),
        line: line.clone(),
        continues: *continues,
        missed: missed + dropped_before,
    }
}
