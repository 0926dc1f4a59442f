//! Every default of the configuration, in one place. Sources: the design's reference on resilience (start-up budget,
//! probes, drain) and on operations (addresses, paths).

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

/// The configuration file of root.
pub const ROOT_CONFIG_FILE: &str = "/etc/plugvisor/plugvisor.toml";
/// Where plugins' configuration directories are, as root.
pub const ROOT_CONFIG_ROOT: &str = "/etc/plugvisor/plugins";
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

/// Connections of one plugin to the egress proxy at once.
pub const EGRESS_CONNECTIONS: usize = 256;
/// Connections of all plugins to it; each takes two descriptors of the supervisor.
pub const EGRESS_CONNECTIONS_OF_ALL: usize = 4096;
/// The longest head of a request through it.
pub const EGRESS_HEAD_BYTES: usize = 16 * 1024;
/// The most header fields of one.
pub const EGRESS_HEAD_FIELDS: usize = 100;
/// How long a head may take.
pub const EGRESS_HEAD_TIME: Duration = Duration::from_secs(10);
/// How long a connection may rest between two requests.
pub const EGRESS_REST: Duration = Duration::from_secs(60);
/// Names of one plugin that are looked up at once.
pub const EGRESS_LOOKUPS: usize = 8;
/// Names of all plugins that are looked up at once; each takes a thread.
pub const EGRESS_LOOKUPS_OF_ALL: usize = 64;
/// How long looking a name up may take.
pub const EGRESS_LOOKUP_TIME: Duration = Duration::from_secs(5);
/// Addresses of a name that are tried.
pub const EGRESS_ATTEMPTS: usize = 4;
/// How long one address is tried alone (RFC 8305, section 8).
pub const EGRESS_STAGGER: Duration = Duration::from_millis(250);
/// How long connecting may take.
pub const EGRESS_CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long nothing may pass through a connection in either direction.
pub const EGRESS_IDLE: Duration = Duration::from_secs(300);

/// Connections to one address of a plugin at once; each takes two descriptors of the supervisor.
pub const INGRESS_CONNECTIONS: u16 = 64;
/// How long a connection may wait for the plugin to be ready and to take it.
pub const INGRESS_CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long nothing may pass through it in either direction.
pub const INGRESS_IDLE: Duration = Duration::from_secs(300);
/// How long a plugin may take to take the last bytes of a connection that both sides have ended.
pub const INGRESS_SETTLE: Duration = Duration::from_secs(5);
/// How long taking a plugin's sockets over from an earlier supervisor may take: each call on one waits for whoever uses it.
pub const INGRESS_TAKE_TIME: Duration = Duration::from_secs(5);
/// How long a connection that a plugin's process refuses waits to hear that the process has ended.
pub const INGRESS_END_HEARD: Duration = Duration::from_secs(3);
