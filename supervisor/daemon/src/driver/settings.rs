//! The rules of one plugin's life, from the manifest, the operator's configuration and the defaults, in that order of
//! weight: the operator replaces the manifest.

use std::{sync::Arc, time::Duration};

use plugvisor_core::{
    CapabilitySet, Rights, breaker,
    egress::{AddressRules, AllowList},
    lifecycle::LifePolicy,
    policy::{Asked, Limits, Operator, Policy, Verdict},
    probe::ProbePolicy,
    restart::{RestartMode, RestartPolicy},
};
use plugvisor_package::{ByteSize, Capability, IsolationLevel, Manifest, TrustTier};
use plugvisor_sandbox::protocol;

use crate::{
    config::{BreakerConfig, HealthConfig, LimitsConfig, NetworkConfig, PluginConfig, RestartConfig, defaults},
    discovery::Source,
    egress::Rules,
    meter::Meter,
};

/// Restart, drain and grace.
pub(super) fn life(config: &PluginConfig) -> LifePolicy {
    let RestartConfig { enabled, initial_delay, max_delay, crash_loop_exits, crash_loop_window } = &config.restart;
    let usual = RestartPolicy::default();
    let base = initial_delay.unwrap_or(usual.base);
    let restart = RestartPolicy {
        mode: if *enabled == Some(false) { RestartMode::Never } else { RestartMode::Always },
        base,
        cap: max_delay.unwrap_or(usual.cap).max(base),
        crash_count: crash_loop_exits.unwrap_or(usual.crash_count),
        crash_window: crash_loop_window.unwrap_or(usual.crash_window),
        ..usual
    };
    LifePolicy { restart, drain: config.health.drain_timeout, grace: config.health.stop_timeout }
}

/// Liveness and readiness.
pub(super) fn probes(config: &HealthConfig) -> ProbePolicy {
    ProbePolicy {
        liveness_every: config.liveness_interval,
        timeout: config.liveness_timeout,
        liveness_misses: config.liveness_misses,
        readiness_every: config.readiness_interval,
        ..ProbePolicy::default()
    }
}

/// From launch to ready.
pub(super) fn startup_time(manifest: &Manifest, config: &HealthConfig) -> Duration {
    config.startup_timeout.or(manifest.monitoring.max_startup_time).unwrap_or(defaults::STARTUP_TIMEOUT)
}

/// The circuit breaker.
pub(super) fn breaker(manifest: &Manifest, config: &BreakerConfig) -> breaker::Settings {
    let BreakerConfig { enabled, failure_threshold, recovery_timeout, half_open_max_calls } = config;
    let said = &manifest.monitoring.circuit_breaker;
    let usual = breaker::Settings::default();
    let on = enabled.or(said.enabled).unwrap_or(true);
    breaker::Settings {
        mode: if on { breaker::Mode::On } else { breaker::Mode::Off },
        failure_threshold: failure_threshold.or(said.failure_threshold).unwrap_or(usual.failure_threshold),
        recovery: recovery_timeout.or(said.recovery_timeout).unwrap_or(usual.recovery),
        half_open_calls: half_open_max_calls.or(said.half_open_max_calls).unwrap_or(usual.half_open_calls),
        slow_after: manifest.monitoring.max_response_time,
        ..usual
    }
}

/// What the manifest asks for.
pub(super) fn asked(manifest: &Manifest) -> Asked {
    let security = &manifest.security;
    let limits = &security.sandbox.resource_limits;
    Asked {
        tier: security.trust_level,
        capabilities: security.capabilities.iter().copied().collect(),
        level: if security.sandbox.enabled { security.sandbox.isolation_level } else { Some(IsolationLevel::None) },
        limits: Limits {
            memory_bytes: limits.max_memory.map(ByteSize::bytes),
            cpu_percent: limits.max_cpu_percent,
            file_size_bytes: limits.max_file_size.map(ByteSize::bytes),
            call_time: limits.max_execution_time,
            network_bytes: limits.max_network_bandwidth.map(ByteSize::bytes),
            ..Limits::NONE
        },
    }
}

/// What the operator set.
pub(super) fn operator(
    tier: TrustTier,
    directory_grants: CapabilitySet,
    config: &PluginConfig,
    place: &Arc<str>,
) -> Operator {
    let LimitsConfig { memory_bytes, cpu_percent, pids, file_size_bytes, open_files, call_timeout, network_bytes } =
        &config.limits;
    Operator {
        tier,
        grants: config.grants.as_ref().map_or(directory_grants, |grants| grants.iter().copied().collect()),
        limits: Limits {
            memory_bytes: *memory_bytes,
            cpu_percent: *cpu_percent,
            pids: *pids,
            file_size_bytes: *file_size_bytes,
            open_files: *open_files,
            call_time: *call_timeout,
            network_bytes: *network_bytes,
        },
        place: Arc::clone(place),
    }
}

/// What a plugin of this manifest might do, whether the policy lets it run or not.
pub(crate) fn rights(manifest: &Manifest, source: &Source, config: &PluginConfig, place: &Arc<str>) -> Rights {
    Policy::default().rights(&asked(manifest), &operator(source.tier(), source.grants(), config, place))
}

/// The variables that it is started with: those of the operator, when it may see them.
pub(super) fn environment(verdict: &Verdict, config: &PluginConfig) -> Vec<(String, String)> {
    if !verdict.granted().contains(Capability::AccessEnv) {
        return Vec::new();
    }
    config.environment.iter().map(|(name, value)| (name.to_string(), value.clone())).collect()
}

/// How many sockets are made to connect to it: one for each connection that its addresses may have.
pub(super) fn inward(verdict: &Verdict, config: &PluginConfig) -> u16 {
    if !verdict.granted().contains(Capability::TcpServer) {
        return 0;
    }
    config.network.listen.iter().fold(0, |all, listen| all.saturating_add(listen.max_connections))
}

/// What the egress proxy lets it reach.
pub(super) fn egress(
    manifest: &Manifest,
    verdict: &Verdict,
    network: NetworkConfig,
    bandwidth: Option<Arc<Meter>>,
) -> Rules {
    let NetworkConfig { egress, addresses, listen: _ } = network;
    Rules {
        allow: AllowList::new(manifest.runtime.egress.clone(), egress),
        addresses: AddressRules { listed: addresses },
        rights: verdict.rights.clone(),
        bandwidth,
    }
}

/// The limits that the kernel holds.
pub(super) fn kernel_limits(limits: &Limits) -> protocol::Limits {
    let Limits { memory_bytes, cpu_percent, pids, file_size_bytes, open_files, call_time: _, network_bytes: _ } =
        limits;
    protocol::Limits {
        memory_bytes: *memory_bytes,
        cpu_percent: *cpu_percent,
        pids: *pids,
        file_size_bytes: *file_size_bytes,
        open_files: *open_files,
    }
}
