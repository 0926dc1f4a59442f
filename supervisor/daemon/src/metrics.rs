//! The metrics page: every series of `plugvisor_*`, rendered from live state at each scrape, so that a plugin's series
//! go with the plugin.

use std::{collections::BTreeMap, time::Duration};

use plugvisor_core::{breaker::Position, route::Reason};

use crate::{
    broker::{CallSeries, DURATION_BOUNDS, Snapshot},
    driver::{PluginHandle, PluginView},
    ingress::Outcome,
    observe::exposition::{Kind, Page},
    stats::{self, Stalled, Usage},
    supervisor::Supervisor,
};

const STATES: [&str; 7] = ["unknown", "discovered", "loading", "loaded", "unloaded", "failed", "quarantined"];
const START_REASONS: [&str; 3] = ["initial", "restart", "request"];
const EXIT_CAUSES: [&str; 4] = ["code", "signal", "oom", "unknown"];
const BREAKER_STATES: [&str; 3] = ["closed", "open", "half_open"];

/// The names of gRPC's status codes, by number.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// One plugin at the moment of the scrape.
struct Row {
    view: std::sync::Arc<PluginView>,
    usage: Usage,
    open_files: Option<u64>,
}

/// How long the launcher may take to say what every launch uses.
const STATS_PATIENCE: Duration = Duration::from_secs(1);

/// The whole page.
pub async fn page(supervisor: &Supervisor) -> String {
    let snapshot = supervisor.shared.calls.broker().snapshot().await.unwrap_or_default();
    let plugins = supervisor.fleet.plugins();
    // Reading cgroup files is reading memory of the kernel, yet it is a system call per file.
    let mut rows = tokio::task::spawn_blocking(move || rows(&plugins)).await.unwrap_or_default();
    open_files(supervisor, &mut rows).await;
    let mut page = Page::default();
    host(&mut page, supervisor);
    lives(&mut page, &rows);
    usage(&mut page, &rows);
    pressure(&mut page, &rows);
    denials(&mut page, &snapshot, &rows);
    egress(&mut page, &rows);
    ingress(&mut page, &rows);
    calls(&mut page, &snapshot);
    breakers(&mut page, &snapshot, supervisor, &rows);
    logs(&mut page, supervisor, &rows);
    page.into_text() + &supervisor.shared.events.render_counters()
}

fn logs(page: &mut Page, supervisor: &Supervisor, rows: &[Row]) {
    let figures: Vec<_> = rows
        .iter()
        .filter_map(|Row { view, .. }| Some((view, supervisor.shared.logs.figures(&view.name.parse().ok()?))))
        .collect();
    page.family("plugvisor_log_lines_total", Kind::Counter, "Lines that plugins printed and that were kept.");
    for (view, figures) in &figures {
        page.sample(&[("plugin", &view.name)], figures.kept());
    }
    page.family("plugvisor_log_lines_dropped_total", Kind::Counter, "Lines over the rate, and lines not kept on disk.");
    for (view, figures) in &figures {
        page.sample(&[("plugin", &view.name), ("reason", "rate")], figures.over_rate());
        page.sample(&[("plugin", &view.name), ("reason", "disk")], figures.not_on_disk());
    }
}

fn rows(plugins: &BTreeMap<String, PluginHandle>) -> Vec<Row> {
    let row = |handle: &PluginHandle| {
        let view = std::sync::Arc::clone(&handle.view.borrow());
        let usage = view.process.as_ref().map(|process| stats::usage(&process.cgroups)).unwrap_or_default();
        Row { view, usage, open_files: None }
    };
    plugins.values().map(row).collect()
}

/// The launcher counts descriptors: the supervisor may not look into processes of other users.
async fn open_files(supervisor: &Supervisor, rows: &mut [Row]) {
    let asked = rows.iter_mut().filter_map(|row| {
        let launch = row.view.process.as_ref()?.launch;
        let launcher = supervisor.shared.launcher.clone();
        Some(async move { row.open_files = launcher.stats(launch).await.ok().and_then(|stats| stats.open_files) })
    });
    let _ = tokio::time::timeout(STATS_PATIENCE, futures_util::future::join_all(asked)).await;
}

fn host(page: &mut Page, supervisor: &Supervisor) {
    page.family("plugvisor_build_info", Kind::Gauge, "The running version; always 1.");
    page.sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
    page.family("plugvisor_config_last_reload_successful", Kind::Gauge, "Whether the configuration last read holds.");
    page.sample(&[], 1);
    page.family("plugvisor_sandbox_degraded", Kind::Gauge, "Controls that are missing and allowed to be.");
    let degraded = supervisor.degraded();
    for feature in &supervisor.features.controls {
        let name = feature.control.as_str();
        page.sample(&[("control", name)], u8::from(degraded.iter().any(|control| control == name)));
    }
    if let Some(tracer) = &supervisor.shared.tracer {
        page.family("plugvisor_otlp_dropped_total", Kind::Counter, "Traced calls whose spans were not delivered.");
        page.sample(&[], tracer.dropped());
    }
    page.family("plugvisor_process_resident_bytes", Kind::Gauge, "Resident memory of Plugvisor's own processes.");
    for (process, pid) in [("plugvisord", std::process::id()), ("plugvisor-launcher", supervisor.shared.launcher.pid())]
    {
        page.sample(&[("process", process)], stats::resident_bytes(pid).unwrap_or(0));
    }
}

fn lives(page: &mut Page, rows: &[Row]) {
    page.family("plugvisor_plugin_info", Kind::Gauge, "A known plugin; always 1.");
    for Row { view, .. } in rows {
        let version = view.bundle.as_ref().map(|bundle| bundle.manifest.version.to_string()).unwrap_or_default();
        page.sample(&[("plugin", &view.name), ("version", &version)], 1);
    }
    page.family("plugvisor_plugin_state", Kind::Gauge, "1 for the state that the plugin is in.");
    for Row { view, .. } in rows {
        let now = view.state.name().to_ascii_lowercase();
        for state in STATES {
            page.sample(&[("plugin", &view.name), ("state", state)], u8::from(state == now));
        }
    }
    page.family("plugvisor_plugin_starts_total", Kind::Counter, "Processes launched, by reason.");
    for Row { view, .. } in rows {
        for reason in START_REASONS {
            let count = view.figures.starts.get(reason).copied().unwrap_or(0);
            page.sample(&[("plugin", &view.name), ("reason", reason)], count);
        }
    }
    page.family("plugvisor_plugin_exits_total", Kind::Counter, "Processes ended, by cause.");
    for Row { view, .. } in rows {
        for cause in EXIT_CAUSES {
            let count = view.figures.exits.get(cause).copied().unwrap_or(0);
            page.sample(&[("plugin", &view.name), ("cause", cause)], count);
        }
    }
    page.family("plugvisor_plugin_backoff_seconds", Kind::Gauge, "Time to the next restart; 0 when there is none.");
    for Row { view, .. } in rows {
        let left = view.restart_at.map(|at| at.saturating_duration_since(tokio::time::Instant::now()));
        page.sample(&[("plugin", &view.name)], left.unwrap_or_default().as_secs_f64());
    }
    page.family("plugvisor_plugin_start_duration_seconds", Kind::Gauge, "How long the last load took.");
    for Row { view, .. } in rows {
        if let Some(duration) = view.figures.start_duration {
            page.sample(&[("plugin", &view.name)], duration.as_secs_f64());
        }
    }
}

fn usage(page: &mut Page, rows: &[Row]) {
    let mut family = |name, kind, help, figure: fn(&Usage) -> Option<f64>| {
        page.family(name, kind, help);
        for Row { view, usage, .. } in rows {
            if let Some(value) = figure(usage) {
                page.sample(&[("plugin", &view.name)], value);
            }
        }
    };
    #[allow(clippy::cast_precision_loss, reason = "Prometheus' values are doubles")]
    {
        family("plugvisor_plugin_memory_bytes", Kind::Gauge, "Memory of the present processes.", |usage| {
            usage.memory_bytes.map(|bytes| bytes as f64)
        });
        family("plugvisor_plugin_memory_limit_bytes", Kind::Gauge, "The limit on memory.", |usage| {
            usage.memory_limit_bytes.map(|bytes| bytes as f64)
        });
        family("plugvisor_plugin_pids", Kind::Gauge, "Present processes and threads.", |usage| {
            usage.pids.map(|pids| pids as f64)
        });
    }
    family("plugvisor_plugin_cpu_seconds_total", Kind::Counter, "CPU time of the present launch.", |usage| {
        usage.cpu.map(|time| time.as_secs_f64())
    });
    family(
        "plugvisor_plugin_cpu_throttled_seconds_total",
        Kind::Counter,
        "Time for which the CPU limit held the present launch back.",
        |usage| usage.throttled.map(|time| time.as_secs_f64()),
    );
}

fn pressure(page: &mut Page, rows: &[Row]) {
    page.family("plugvisor_plugin_open_fds", Kind::Gauge, "Open descriptors of the first process.");
    for Row { view, open_files, .. } in rows {
        if let Some(count) = open_files {
            page.sample(&[("plugin", &view.name)], count);
        }
    }
    page.family(
        "plugvisor_plugin_pressure_stalled_seconds_total",
        Kind::Counter,
        "Time for which some task of the present launch waited for want of a resource.",
    );
    for Row { view, usage, .. } in rows {
        let Stalled { cpu, memory, io } = usage.stalled;
        for (resource, time) in [("cpu", cpu), ("memory", memory), ("io", io)] {
            if let Some(time) = time {
                page.sample(&[("plugin", &view.name), ("resource", resource)], time.as_secs_f64());
            }
        }
    }
}

/// What plugins asked for and were not given. The kernel's own refusals (seccomp, Landlock) are errors of system calls
/// that only the plugin sees, so they are not counted.
fn denials(page: &mut Page, snapshot: &Snapshot, rows: &[Row]) {
    page.family(
        "plugvisor_security_denials_total",
        Kind::Counter,
        "Calls, capabilities and connections that a plugin was refused.",
    );
    for Row { view, .. } in rows {
        let not_allowed = Reason::CallerNotAllowed.as_str();
        let refused = snapshot.rejected.iter().filter(|r| r.caller == view.name && r.reason == not_allowed);
        let calls: u64 = refused.map(|rejected| rejected.count).sum();
        page.sample(&[("plugin", &view.name), ("kind", "call")], calls);
        page.sample(&[("plugin", &view.name), ("kind", "capability")], view.figures.capabilities_denied);
        page.sample(&[("plugin", &view.name), ("kind", "egress")], view.figures.egress.denials());
    }
}

fn egress(page: &mut Page, rows: &[Row]) {
    page.family(
        "plugvisor_egress_bytes_total",
        Kind::Counter,
        "Bytes between a plugin's egress proxy and its destinations: out of the plugin, and into it.",
    );
    for Row { view, .. } in rows {
        page.sample(&[("plugin", &view.name), ("direction", "in")], view.figures.egress.bytes_in());
        page.sample(&[("plugin", &view.name), ("direction", "out")], view.figures.egress.bytes_out());
    }
}

/// Of plugins that have an address, which the configuration decides.
fn ingress(page: &mut Page, rows: &[Row]) {
    let figures = || rows.iter().filter_map(|row| Some((&row.view.name, row.view.figures.ingress.as_deref()?)));
    page.family(
        "plugvisor_ingress_bytes_total",
        Kind::Counter,
        "Bytes between a plugin and who connected to it from outside: out of the plugin, and into it.",
    );
    for (plugin, figures) in figures() {
        page.sample(&[("plugin", plugin), ("direction", "in")], figures.traffic().bytes_in());
        page.sample(&[("plugin", plugin), ("direction", "out")], figures.traffic().bytes_out());
    }
    page.family("plugvisor_ingress_connections", Kind::Gauge, "Connections from outside to a plugin that are open.");
    for (plugin, figures) in figures() {
        page.sample(&[("plugin", plugin)], figures.connections());
    }
    page.family(
        "plugvisor_ingress_connections_total",
        Kind::Counter,
        "Connections from outside to a plugin that are over, by how they went.",
    );
    for (plugin, figures) in figures() {
        for outcome in Outcome::ALL {
            page.sample(&[("plugin", plugin), ("outcome", outcome.as_str())], figures.outcomes(outcome));
        }
    }
    page.family(
        "plugvisor_ingress_sockets_lost_total",
        Kind::Counter,
        "Sockets into a plugin that could not be used again; each is one connection less until it is restarted.",
    );
    for (plugin, figures) in figures() {
        page.sample(&[("plugin", plugin)], figures.sockets_lost());
    }
}

fn calls(page: &mut Page, snapshot: &Snapshot) {
    page.family("plugvisor_rpc_calls_total", Kind::Counter, "Finished calls that reached a provider.");
    for series in &snapshot.calls {
        let CallSeries { caller, provider, method, by_code, .. } = series;
        for (code, count) in CODES.iter().zip(by_code).filter(|(_, count)| **count > 0) {
            let labels = [("caller", caller.as_str()), ("callee", provider), ("method", method), ("code", code)];
            page.sample(&labels, count);
        }
    }
    page.family("plugvisor_rpc_duration_seconds", Kind::Histogram, "Durations of finished calls.");
    let mut durations: BTreeMap<(&str, &str), Durations> = BTreeMap::new();
    for series in &snapshot.calls {
        durations.entry((&series.provider, &series.method)).or_default().add(series);
    }
    for ((callee, method), durations) in durations {
        durations.render(page, callee, method);
    }
    page.family("plugvisor_rpc_inflight", Kind::Gauge, "Calls in flight.");
    for provider in &snapshot.providers {
        page.sample(&[("callee", provider.identity.name.as_str())], provider.in_flight);
    }
    page.family("plugvisor_rpc_limit", Kind::Gauge, "Calls that may be in flight at once.");
    for provider in &snapshot.providers {
        page.sample(&[("callee", provider.identity.name.as_str())], provider.limits.max_concurrent);
    }
    page.family("plugvisor_rpc_rejected_total", Kind::Counter, "Calls that the broker refused.");
    for rejected in &snapshot.rejected {
        page.sample(&[("caller", &rejected.caller), ("reason", rejected.reason)], rejected.count);
    }
    page.family("plugvisor_broker_connections", Kind::Gauge, "Connections from plugins and local applications.");
    page.sample(&[], snapshot.caller_connections);
    page.family(
        "plugvisor_broker_events_dropped_total",
        Kind::Counter,
        "Events of the broker that nobody read in time.",
    );
    page.sample(&[], snapshot.events_dropped);
}

fn breakers(page: &mut Page, snapshot: &Snapshot, supervisor: &Supervisor, rows: &[Row]) {
    page.family("plugvisor_breaker_state", Kind::Gauge, "1 for the state that the provider's breaker is in.");
    for provider in &snapshot.providers {
        let now = position(provider.breaker.position);
        for state in BREAKER_STATES {
            page.sample(&[("callee", provider.identity.name.as_str()), ("state", state)], u8::from(state == now));
        }
    }
    page.family("plugvisor_breaker_transitions_total", Kind::Counter, "Changes of a breaker, by the new state.");
    let counts = supervisor.breaker_transitions();
    for Row { view, .. } in rows {
        for state in BREAKER_STATES {
            let of = |((plugin, to), count): (&(plugvisor_package::PluginName, &'static str), &u64)| {
                (plugin.as_str() == view.name && *to == state).then_some(*count)
            };
            page.sample(&[("callee", &view.name), ("to", state)], counts.iter().find_map(of).unwrap_or(0));
        }
    }
}

const fn position(position: Position) -> &'static str {
    position.as_str()
}

#[derive(Default)]
struct Durations {
    buckets: [u64; DURATION_BOUNDS.len() + 1],
    sum: Duration,
}

impl Durations {
    fn add(&mut self, series: &CallSeries) {
        for (all, one) in self.buckets.iter_mut().zip(series.durations) {
            *all += one;
        }
        self.sum += series.duration_sum;
    }

    fn render(&self, page: &mut Page, callee: &str, method: &str) {
        let mut below = 0;
        let bounds = DURATION_BOUNDS.iter().map(|bound| bound.as_secs_f64().to_string()).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(self.buckets) {
            below += count;
            page.suffixed("_bucket", &[("callee", callee), ("method", method), ("le", &bound)], below);
        }
        page.suffixed("_sum", &[("callee", callee), ("method", method)], self.sum.as_secs_f64());
        page.suffixed("_count", &[("callee", callee), ("method", method)], below);
    }
}
