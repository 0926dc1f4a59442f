//! Every default of the configuration, in one place. Sources: the design's reference on resilience (start-up budget,
//! probes, drain) and on operations (addresses, paths).

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

/// The configuration file of root.
pub const ROOT_CONFIG_FILE: &str = "/etc/plugvisor/plugvisor.toml";
/// The longest configuration file.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;
/// The runtime directory of root.
pub const ROOT_RUNTIME_DIRECTORY: &str = "/run/plugvisor";
/// The state directory of root.
pub const ROOT_STATE_DIRECTORY: &str = "/var/lib/plugvisor";
/// `/metrics`, `/healthz` and `/readyz`.
pub const METRICS_ADDRESS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 4001);
/// Plugins that start at once.
pub const PARALLEL_STARTS: u32 = 8;
/// Whom root becomes.
pub const USER: &str = "nobody";
/// How long an embedded launcher outlives a supervisor that died.
pub const LINGER: Duration = Duration::ZERO;

/// From launch to ready, when neither the manifest nor the operator says.
pub const STARTUP_TIMEOUT: Duration = Duration::from_secs(30);
/// Between liveness probes.
pub const LIVENESS_INTERVAL: Duration = Duration::from_secs(5);
/// How long a liveness probe may take.
pub const LIVENESS_TIMEOUT: Duration = Duration::from_secs(1);
/// Liveness probes missed in a row that end a process.
pub const LIVENESS_MISSES: u32 = 3;
/// Between readiness probes.
pub const READINESS_INTERVAL: Duration = Duration::from_secs(2);
/// How long a drain may take before SIGTERM.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// From SIGTERM to the kill.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);
