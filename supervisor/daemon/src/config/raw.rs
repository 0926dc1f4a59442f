//! The file's tables as they are written. Every key is optional here; what is missing is filled in by `validate`.

use std::{collections::BTreeMap, path::PathBuf};

use plugvisor_sandbox::tables::Table;
use serde::Deserialize;

/// Paths.
const PATH: &str = "a path in text, such as \"/srv/plugins\"";
/// Times, in the keys that end so.
const MILLISECONDS: &str = "a number of milliseconds, such as 5000 for five seconds";
/// Sizes.
const BYTES: &str = "a number of bytes, such as 67108864 for 64 MiB";
/// Counts.
const COUNT: &str = "a number, such as 8";
/// Capabilities.
const GRANTS: &str = "a list of capabilities, such as [\"api:internal-calls\"]";
/// What is on or off.
const SWITCH: &str = "true or false";

/// `[supervisor]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Supervisor {
    /// Directory of the sockets and the lock. Default: /run/plugvisor as root, $XDG_RUNTIME_DIR/plugvisor, else
    /// /tmp/plugvisor-<uid>.
    pub(super) runtime_directory: Option<PathBuf>,
    /// Directory of what is remembered when the supervisor ends. Default: /var/lib/plugvisor as root,
    /// $XDG_STATE_HOME/plugvisor, else ~/.local/state/plugvisor.
    pub(super) state_directory: Option<PathBuf>,
    /// Loopback address of /metrics, /healthz and /readyz. Default: 127.0.0.1:4001. Port 0 takes a free one.
    pub(super) metrics_address: Option<String>,
    /// User to become when started by root. Default: nobody.
    pub(super) user: Option<String>,
    /// Plugins that start at once at most; who waits is served by loadOrder. Default: 8.
    pub(super) parallel_starts: Option<u32>,
    /// Controls of the walls that may be missing on this host, such as "memory-limit". Default: none.
    pub(super) allow_degraded: Option<Vec<String>>,
}

impl Table for Supervisor {
    fn takes(key: &str) -> &'static str {
        match key {
            "runtime_directory" | "state_directory" => PATH,
            "metrics_address" => "an address in text, such as \"127.0.0.1:4001\"",
            "user" => "the name of a user in text, such as \"plugvisor\"",
            "parallel_starts" => COUNT,
            "allow_degraded" => "a list of controls, such as [\"memory-limit\"]",
            _ => "",
        }
    }
}

/// `[launcher]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Launcher {
    /// Socket of a launcher that was started elsewhere, such as by systemd; its plugins outlive this supervisor.
    /// Default: plugvisord starts a launcher of its own.
    pub(super) socket: Option<PathBuf>,
    /// Directory of the plugins' configuration directories, one of each plugin's name, for filesystem:read-config. Default:
    /// /etc/plugvisor/plugins as root, else $XDG_CONFIG_HOME/plugvisor/plugins.
    pub(super) config_root: Option<PathBuf>,
    /// Directory of the plugins' data directories, which are made when they are needed, for filesystem:read-data and
    /// write-data. Default: beside the state directory, /var/lib/plugvisor-data as root.
    pub(super) data_root: Option<PathBuf>,
    /// How long the launcher that plugvisord starts keeps plugins running when plugvisord dies, so that a new plugvisord
    /// finds them again: whole seconds, such as "30s", "5m" or "1h". Default: "0s", plugins end with plugvisord.
    pub(super) linger: Option<String>,
}

impl Table for Launcher {
    fn takes(key: &str) -> &'static str {
        match key {
            "socket" | "config_root" | "data_root" => PATH,
            "linger" => "a time in text, in whole seconds, minutes or hours, such as \"30s\", \"5m\" or \"1h\"",
            _ => "",
        }
    }
}

/// `[logs]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Logs {
    /// Directory of the files that keep what plugins print. Default: logs in the state directory.
    pub(super) directory: Option<PathBuf>,
    /// Bytes of one file, beyond which it is rotated. Default: 4194304.
    pub(super) file_bytes: Option<u64>,
    /// Files of one plugin, rotated ones included; 0 keeps nothing on disk. Default: 4.
    pub(super) files: Option<u32>,
    /// Bytes of all files together. Default: 268435456.
    pub(super) total_bytes: Option<u64>,
    /// Lines that a plugin's stdout and stderr may each have in a second; more are dropped and counted. Default: 500.
    pub(super) lines_per_second: Option<u32>,
    /// Bytes of a line, beyond which it is kept in pieces. Default: 8192.
    pub(super) line_bytes: Option<usize>,
}

impl Table for Logs {
    fn takes(key: &str) -> &'static str {
        match key {
            "directory" => PATH,
            "file_bytes" | "total_bytes" | "line_bytes" => BYTES,
            "files" | "lines_per_second" => COUNT,
            _ => "",
        }
    }
}

/// `[traces]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Traces {
    /// Where OTLP over gRPC without TLS is received, such as "http://127.0.0.1:4317". Default: no traces are sent.
    pub(super) endpoint: Option<String>,
    /// Share, from 0 to 1, of the traces begun here that are kept; a caller's own decision is followed. Default: 1.
    pub(super) sample: Option<f64>,
}

impl Table for Traces {
    fn takes(key: &str) -> &'static str {
        match key {
            "endpoint" => "an address in text, such as \"http://127.0.0.1:4317\"",
            "sample" => "a share from 0 to 1, such as 0.1",
            _ => "",
        }
    }
}

/// `[[directory]]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Directory {
    /// Directory whose subdirectories are bundles. Relative to this file. Required.
    pub(super) path: Option<PathBuf>,
    /// Trust that you give to every bundle in it: internal, verified, community, untrusted or quarantined.
    /// Default: untrusted.
    pub(super) tier: Option<String>,
    /// Capabilities that bundles in it may hold, such as "api:internal-calls". Default: none.
    pub(super) grants: Option<Vec<String>>,
}

impl Table for Directory {
    fn takes(key: &str) -> &'static str {
        match key {
            "path" => PATH,
            "tier" => "a tier in text: \"internal\", \"verified\", \"community\", \"untrusted\" or \"quarantined\"",
            "grants" => GRANTS,
            _ => "",
        }
    }
}

/// `[plugin.NAME]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Plugin {
    /// "auto" loads it at start, "manual" on request. Default: auto.
    pub(super) load: Option<String>,
    /// Replaces the directory's grants.
    pub(super) grants: Option<Vec<String>>,
    /// Laid over the manifest's defaults and handed to the plugin.
    #[cfg_attr(feature = "schema", schemars(with = "Option<std::collections::BTreeMap<String, serde_json::Value>>"))]
    pub(super) config: Option<toml::Table>,
    /// Variables of its environment, for a plugin with process:access-env; they replace the manifest's. Never secrets:
    /// whoever may look at a process of its user sees them.
    pub(super) env: Option<BTreeMap<String, String>>,
    /// Names of variables that it is given with the values that they have in the supervisor's own environment, for a plugin
    /// with process:access-env. One that is not set there is left out.
    pub(super) pass_env: Option<Vec<String>>,
    /// Limits that replace the manifest's.
    pub(super) limits: Option<Limits>,
    /// What it may reach through the egress proxy, and where others reach it.
    pub(super) network: Option<Network>,
    /// Restart and back-off.
    pub(super) restart: Option<Restart>,
    /// The circuit breaker.
    pub(super) breaker: Option<Breaker>,
    /// Probes and time limits.
    pub(super) health: Option<Health>,
}

impl Table for Plugin {
    fn takes(key: &str) -> &'static str {
        match key {
            "load" => "\"auto\" or \"manual\"",
            "grants" => GRANTS,
            "config" => "a table, such as { title = \"Holidays\" }",
            "env" => "a table of texts, such as { TZ = \"UTC\" }",
            "pass_env" => "a list of names, such as [\"RUST_LOG\"]",
            _ => "",
        }
    }
}

/// `[plugin.NAME.limits]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Limits {
    /// Bytes of memory of all its processes together.
    pub(super) memory_bytes: Option<u64>,
    /// Percent of one CPU.
    pub(super) cpu_percent: Option<u32>,
    /// Processes and threads together.
    pub(super) pids: Option<u32>,
    /// Largest file that it may write, in bytes.
    pub(super) file_size_bytes: Option<u64>,
    /// Open descriptors of one process.
    pub(super) open_files: Option<u32>,
    /// Longest call, in milliseconds.
    pub(super) call_timeout_ms: Option<u64>,
    /// Bytes per second through the egress proxy and by connections to it, both directions together.
    pub(super) network_bytes_per_second: Option<u64>,
}

impl Table for Limits {
    fn takes(key: &str) -> &'static str {
        match key {
            "memory_bytes" | "file_size_bytes" => BYTES,
            "cpu_percent" => "a number of percent of one CPU, such as 50",
            "pids" | "open_files" => COUNT,
            "call_timeout_ms" => MILLISECONDS,
            "network_bytes_per_second" => "a number of bytes, such as 1000000 for 1 MB each second",
            _ => "",
        }
    }
}

/// `[plugin.NAME.network]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Network {
    /// Destinations as "host:port" beyond which it may not go, whatever its manifest lists; "*.example.com:443" means every
    /// name under example.com. Default: those of its manifest.
    pub(super) egress: Option<Vec<String>>,
    /// Addresses and networks, such as "127.0.0.1" or "10.1.0.0/16", that it may reach although they are not public:
    /// loopback, private, link-local, the host's own. Default: none.
    pub(super) addresses: Option<Vec<String>>,
    /// Where others reach it by TCP, for a plugin with network:tcp-server. Default: nowhere.
    pub(super) listen: Option<Vec<Listen>>,
}

impl Table for Network {
    fn takes(key: &str) -> &'static str {
        match key {
            "egress" => "a list of destinations, such as [\"example.org:443\"]",
            "addresses" => "a list of addresses and networks, such as [\"10.1.0.0/16\"]",
            _ => "",
        }
    }
}

/// `[[plugin.NAME.network.listen]]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Listen {
    /// Address and port where others connect, such as "0.0.0.0:8443"; port 0 takes a free one. Required.
    pub(super) address: Option<String>,
    /// Port at which the plugin listens in its own network namespace, one of its manifest's. Required.
    pub(super) port: Option<u16>,
    /// Connections at once; more wait in the queue of the address. At most 256 of all addresses of a plugin. Default: 64.
    pub(super) max_connections: Option<u16>,
    /// How long a connection may wait for the plugin to be ready and to take it, in milliseconds. Default: 10000.
    pub(super) connect_timeout_ms: Option<u64>,
    /// How long nothing may pass through a connection before it is closed, in milliseconds. Default: 300000.
    pub(super) idle_timeout_ms: Option<u64>,
}

impl Table for Listen {
    fn takes(key: &str) -> &'static str {
        match key {
            "address" => "an address and a port in text, such as \"0.0.0.0:8443\"",
            "port" => "a port: a number from 1024 to 65535, such as 8080",
            "max_connections" => "a number from 1 to 256, such as 64",
            "connect_timeout_ms" | "idle_timeout_ms" => MILLISECONDS,
            _ => "",
        }
    }
}

/// `[plugin.NAME.restart]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Restart {
    /// false leaves a plugin that ended in FAILED. Default: true.
    pub(super) enabled: Option<bool>,
    /// First delay, in milliseconds. Default: 500.
    pub(super) initial_delay_ms: Option<u64>,
    /// Longest delay, in milliseconds. Default: 60000.
    pub(super) max_delay_ms: Option<u64>,
    /// Exits inside the window that make a crash loop. Default: 5.
    pub(super) crash_loop_exits: Option<u32>,
    /// Window of the crash loop, in milliseconds. Default: 60000.
    pub(super) crash_loop_window_ms: Option<u64>,
}

impl Table for Restart {
    fn takes(key: &str) -> &'static str {
        match key {
            "enabled" => SWITCH,
            "initial_delay_ms" | "max_delay_ms" | "crash_loop_window_ms" => MILLISECONDS,
            "crash_loop_exits" => COUNT,
            _ => "",
        }
    }
}

/// `[plugin.NAME.breaker]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Breaker {
    /// false never opens. Default: true.
    pub(super) enabled: Option<bool>,
    /// Failures in a row that open it. Default: 5.
    pub(super) failure_threshold: Option<u32>,
    /// How long it stays open at first, in milliseconds. Default: 60000.
    pub(super) recovery_timeout_ms: Option<u64>,
    /// Calls let through while half open. Default: 3.
    pub(super) half_open_max_calls: Option<u32>,
}

impl Table for Breaker {
    fn takes(key: &str) -> &'static str {
        match key {
            "enabled" => SWITCH,
            "failure_threshold" | "half_open_max_calls" => COUNT,
            "recovery_timeout_ms" => MILLISECONDS,
            _ => "",
        }
    }
}

/// `[plugin.NAME.health]`
#[derive(Debug, Default, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(default, deny_unknown_fields)]
pub(super) struct Health {
    /// From launch to ready, in milliseconds. Default: the manifest's maxStartupTime, else 30000.
    pub(super) startup_timeout_ms: Option<u64>,
    /// Between liveness probes, in milliseconds. Default: 5000.
    pub(super) liveness_interval_ms: Option<u64>,
    /// How long a liveness probe may take, in milliseconds. Default: 1000.
    pub(super) liveness_timeout_ms: Option<u64>,
    /// Liveness probes missed in a row that end the process. Default: 3.
    pub(super) liveness_misses: Option<u32>,
    /// Between readiness probes, in milliseconds. Default: 2000.
    pub(super) readiness_interval_ms: Option<u64>,
    /// How long a drain may take before SIGTERM, in milliseconds. Default: 10000.
    pub(super) drain_timeout_ms: Option<u64>,
    /// From SIGTERM to the kill, in milliseconds. Default: 10000.
    pub(super) stop_timeout_ms: Option<u64>,
}

impl Table for Health {
    fn takes(key: &str) -> &'static str {
        match key {
            "startup_timeout_ms"
            | "liveness_interval_ms"
            | "liveness_timeout_ms"
            | "readiness_interval_ms"
            | "drain_timeout_ms"
            | "stop_timeout_ms" => MILLISECONDS,
            "liveness_misses" => COUNT,
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use plugvisor_sandbox::tables::silent_keys;

    use super::*;

    /// Keys that hold tables are read by themselves.
    const TABLES: [&str; 6] = ["limits", "network", "restart", "breaker", "health", "listen"];

    #[test]
    fn every_key_says_what_it_takes() {
        let silent = [
            silent_keys::<Supervisor>(&TABLES),
            silent_keys::<Launcher>(&TABLES),
            silent_keys::<Logs>(&TABLES),
            silent_keys::<Traces>(&TABLES),
            silent_keys::<Directory>(&TABLES),
            silent_keys::<Plugin>(&TABLES),
            silent_keys::<Limits>(&TABLES),
            silent_keys::<Network>(&TABLES),
            silent_keys::<Listen>(&TABLES),
            silent_keys::<Restart>(&TABLES),
            silent_keys::<Breaker>(&TABLES),
            silent_keys::<Health>(&TABLES),
        ];
        assert_eq!(silent.concat(), Vec::<&str>::new());
    }
}
