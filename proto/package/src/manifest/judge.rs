//! From fields that are right one by one to a manifest that is right as a whole.
//!
//! Every conversion takes its raw object apart completely, so a new field does not build until it is judged here. This
//! module does not know JSON's types; the reader has dealt with them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::Value;

use super::{
    Activation, BundleOptimization, ByteSize, Caching, CircuitBreaker, Config, CrossPluginService, Dependency, Events,
    Guard, GuardScope, LifecycleHooks, Manifest, Module, Monitoring, Optimization, ResourceLimits, Runtime, Sandbox,
    Security, Signature, raw,
    reader::{List, Notes, Whole},
};
use crate::{IsolationLevel, PluginName, json::At};

const MODULE: At<'_> = At::Key(&At::Root, "module");
const RUNTIME: At<'_> = At::Key(&At::Root, "runtime");

/// The most names that are listed in place of one that is not known.
const MOST_LISTED: usize = 12;

/// The manifest, or `None` when a required field is missing; the finding has been added by then.
pub(crate) fn manifest(document: raw::Document, source: Value, notes: &mut Notes) -> Option<Manifest> {
    let raw::Document {
        name,
        version,
        description,
        author,
        license,
        dependencies,
        load_order,
        critical,
        security: raw_security,
        optimization: raw_optimization,
        events: raw_events,
        monitoring: raw_monitoring,
        module: raw_module,
        runtime: raw_runtime,
    } = document;

    let dependencies = self::dependencies(dependencies.unwrap_or_default(), name.as_ref(), notes);
    let security = security(raw_security.unwrap_or_default(), notes);
    let optimization = optimization(raw_optimization.unwrap_or_default());
    let events = events(raw_events.unwrap_or_default());
    let monitoring = monitoring(raw_monitoring.unwrap_or_default());
    let module = module(raw_module.unwrap_or_default(), notes);
    let runtime = runtime(raw_runtime.unwrap_or_default(), name.as_ref(), notes);
    Some(Manifest {
        name: name?,
        version: version?,
        description,
        author: author.map(|text| text.0),
        license: license.map(|text| text.0),
        dependencies,
        load_order,
        critical: critical.unwrap_or(false),
        security,
        optimization,
        events,
        monitoring,
        module,
        runtime,
        source,
        inactive: std::mem::take(&mut notes.inactive),
    })
}

fn dependencies(list: List<Dependency>, own: Option<&PluginName>, notes: &mut Notes) -> Vec<Dependency> {
    let at = At::Key(&At::Root, "dependencies");
    let mut seen = BTreeSet::new();
    for (index, dependency) in &list.0 {
        if Some(&dependency.name) == own {
            let remove = Some("remove it".to_owned());
            notes.findings.add(At::Index(&at, *index), "a plugin cannot depend on itself", remove);
        } else if !seen.insert(&dependency.name) {
            let message = format!("{} stands more than once", dependency.name);
            notes.findings.add(At::Index(&at, *index), message, Some("join the ranges with a comma".to_owned()));
        }
    }
    list.into_values()
}

fn security(raw: raw::Security, notes: &mut Notes) -> Security {
    let raw::Security { trust_level, capabilities, signature, checksum, sandbox } = raw;
    let mut capabilities = capabilities.unwrap_or_default().into_values();
    capabilities.sort();
    let signature = signature.and_then(|raw::Signature { algorithm, key_id, signature }| {
        Some(Signature { algorithm: algorithm?, key_id: key_id?.0, signature: signature?.0 })
    });
    let checksum = checksum.and_then(|raw::Checksum { algorithm, hash }| match algorithm? {
        raw::ChecksumAlgorithm::Sha256 => hash.map(|hash| hash.0),
    });
    Security {
        trust_level,
        capabilities,
        signature,
        checksum,
        sandbox: self::sandbox(sandbox.unwrap_or_default(), notes),
    }
}

fn sandbox(raw: raw::Sandbox, notes: &mut Notes) -> Sandbox {
    let raw::Sandbox { enabled, isolation_level, resource_limits } = raw;
    let enabled = enabled.unwrap_or(true);
    if !enabled && let Some(level) = isolation_level.filter(|level| *level > IsolationLevel::None) {
        let security = At::Key(&At::Root, "security");
        let message = format!("it is false, which asks for no walls, but isolationLevel asks for {level}");
        let suggestion = Some("leave one of the two out".to_owned());
        notes.findings.add(At::Key(&At::Key(&security, "sandbox"), "enabled"), message, suggestion);
    }
    let raw::ResourceLimits { max_memory, max_cpu, max_file_size, max_network_bandwidth, max_execution_time } =
        resource_limits.unwrap_or_default();
    let resource_limits = ResourceLimits {
        max_memory: max_memory.map(size),
        max_cpu_percent: max_cpu.map(count),
        max_file_size: max_file_size.map(size),
        max_network_bandwidth: max_network_bandwidth.map(size),
        max_execution_time: max_execution_time.map(millis),
    };
    Sandbox { enabled, isolation_level, resource_limits }
}

fn optimization(raw: raw::Optimization) -> Optimization {
    let raw::Optimization { bundle_optimization, caching } = raw;
    let raw::BundleOptimization {
        enabled,
        tree_shaking,
        minification,
        compression,
        remove_source_maps,
        remove_test_files,
    } = bundle_optimization.unwrap_or_default();
    let raw::Caching { manifest_cache, validation_cache, security_cache, ttl } = caching.unwrap_or_default();
    Optimization {
        bundle: BundleOptimization {
            enabled,
            tree_shaking,
            minification,
            compression,
            remove_source_maps,
            remove_test_files,
        },
        caching: Caching {
            manifest: manifest_cache,
            validation: validation_cache,
            security: security_cache,
            ttl: ttl.map(millis),
        },
    }
}

fn events(raw: raw::Events) -> Events {
    let raw::Events { lifecycle, custom } = raw;
    let raw::Lifecycle { before_load, after_load, before_unload, on_error } = lifecycle.unwrap_or_default();
    Events {
        lifecycle: LifecycleHooks {
            before_load: before_load.unwrap_or(false),
            after_load: after_load.unwrap_or(false),
            before_unload: before_unload.unwrap_or(false),
            on_error: on_error.unwrap_or(false),
        },
        custom: custom.unwrap_or_default().into_values().into_iter().map(|event| event.0).collect(),
    }
}

fn monitoring(raw: raw::Monitoring) -> Monitoring {
    let raw::Monitoring { performance, circuit_breaker } = raw;
    let raw::Performance { max_startup_time, max_response_time, enable_metrics, enable_tracing } =
        performance.unwrap_or_default();
    let raw::CircuitBreaker { enabled, failure_threshold, recovery_timeout, half_open_max_calls } =
        circuit_breaker.unwrap_or_default();
    Monitoring {
        max_startup_time: max_startup_time.map(millis),
        max_response_time: max_response_time.map(millis),
        enable_metrics,
        enable_tracing,
        circuit_breaker: CircuitBreaker {
            enabled,
            failure_threshold: failure_threshold.map(count),
            recovery_timeout: recovery_timeout.map(millis),
            half_open_max_calls: half_open_max_calls.map(count),
        },
    }
}

fn module(raw: raw::Module, notes: &mut Notes) -> Module {
    let raw::Module { controllers, providers, exports, imports, guards, cross_plugin_services } = raw;
    let names = |list: Option<List<super::grammar::ServiceName>>| {
        list.unwrap_or_default().into_values().into_iter().map(|name| name.0).collect()
    };
    Module {
        controllers: names(controllers),
        providers: names(providers),
        exports: names(exports),
        imports: imports.unwrap_or_default().into_values().into_iter().map(|name| name.0).collect(),
        guards: self::guards(guards.unwrap_or_default(), notes),
        cross_plugin_services: self::cross_plugin_services(cross_plugin_services.unwrap_or_default(), notes),
    }
}

fn guards(list: List<raw::Guard>, notes: &mut Notes) -> Vec<Guard> {
    let at = At::Key(&MODULE, "guards");
    let known: Vec<String> =
        list.0.iter().filter_map(|(_, guard)| guard.name.as_ref().map(|name| name.0.clone())).collect();
    let mut seen = BTreeSet::new();
    let mut guards = Vec::new();
    for (index, raw) in list.0 {
        let at = At::Index(&at, index);
        let raw::Guard { name, class, scope, exported, dependencies, source } = raw;
        let scope = scope.unwrap_or_default();
        match (scope, &source) {
            (GuardScope::External, None) => {
                let message = "an external guard needs the plugin that has it";
                notes.findings.add(At::Key(&at, "source"), message, Some("name the plugin".to_owned()));
            }
            (GuardScope::Local, Some(_)) => {
                let message = "a local guard is the plugin's own and has no source";
                let suggestion = Some("leave it out, or set scope to \"external\"".to_owned());
                notes.findings.add(At::Key(&at, "source"), message, suggestion);
            }
            (GuardScope::External, Some(_)) | (GuardScope::Local, None) => {}
        }
        let dependencies = dependencies.unwrap_or_default();
        for (index, dependency) in &dependencies.0 {
            let at = At::Index(&At::Key(&at, "dependencies"), *index).to_string();
            if name.as_ref() == Some(dependency) {
                notes.findings.add(at, "a guard cannot run before itself", Some("remove it".to_owned()));
            } else if !known.contains(&dependency.0) {
                // A guess could be another guard than the one that is meant.
                let listed = known.iter().collect::<BTreeSet<_>>();
                let listed: Vec<&str> = listed.into_iter().take(MOST_LISTED).map(String::as_str).collect();
                let listed = listed.join(", ");
                let suggestion = (!listed.is_empty()).then(|| format!("its guards are {listed}"));
                notes.findings.add(at, format!("{:?} is not a guard of this manifest", dependency.0), suggestion);
            }
        }
        let Some(name) = name else { continue };
        if !seen.insert(name.0.clone()) {
            notes.findings.add(At::Key(&at, "name"), format!("another guard is named {:?}", name.0), None);
        }
        guards.push(Guard {
            name: name.0,
            class: class.map(|text| text.0),
            scope,
            exported: exported.unwrap_or(false),
            dependencies: dependencies.into_values().into_iter().map(|text| text.0).collect(),
            source,
        });
    }
    guards
}

fn cross_plugin_services(list: List<raw::CrossPluginService>, notes: &mut Notes) -> Vec<CrossPluginService> {
    let at = At::Key(&MODULE, "crossPluginServices");
    let mut tokens = BTreeSet::new();
    let mut services = Vec::new();
    for (index, raw) in list.0 {
        let at = At::Index(&at, index);
        let raw::CrossPluginService { service_name, token, global, description, capabilities } = raw;
        if let Some(token) = &token
            && !tokens.insert(token.0.clone())
        {
            let message = format!("another service has the token {:?}", token.0);
            notes.findings.add(At::Key(&at, "token"), message, Some("give each service its own".to_owned()));
        }
        let Some(service_name) = service_name else { continue };
        let mut capabilities = capabilities.unwrap_or_default().into_values();
        capabilities.sort();
        services.push(CrossPluginService {
            service_name: service_name.0,
            token: token.map(|token| token.0),
            global: global.unwrap_or(false),
            description,
            capabilities,
        });
    }
    services
}

fn runtime(raw: raw::Runtime, name: Option<&PluginName>, notes: &mut Notes) -> Runtime {
    let raw::Runtime {
        exec,
        args,
        env,
        socket,
        kind,
        activation,
        idle_stop,
        protocol,
        descriptor_set,
        network,
        config,
    } = raw;
    let raw::Network { egress, listen } = network.unwrap_or_default();
    let raw::Config { schema, defaults } = config.unwrap_or_default();
    let activation = activation.unwrap_or_default();
    if activation == Activation::OnDemand {
        notes.inactive.push(At::Key(&RUNTIME, "activation").to_string());
    }
    Runtime {
        exec: exec.map_or_else(|| format!("bin/{}", name.map_or("", PluginName::as_str)), |path| path.0),
        args: args.unwrap_or_default().0,
        env: environment(env.unwrap_or_default(), notes),
        socket: socket.unwrap_or_default(),
        kind: kind.unwrap_or_default(),
        activation,
        idle_stop: idle_stop.map(millis),
        protocol: protocol.map_or(1, count),
        descriptor_set_stated: descriptor_set.is_some(),
        descriptor_set: descriptor_set.map_or_else(|| Runtime::DESCRIPTOR_SET.to_owned(), |path| path.0),
        egress: egress.unwrap_or_default().into_values().into_iter().map(|text| text.0).collect(),
        listen: ports(listen.unwrap_or_default(), notes),
        config: Config { schema, defaults: defaults.unwrap_or_default() },
    }
}

/// The ports that it listens at.
fn ports<const MIN: u64, const MAX: u64>(listen: List<Whole<MIN, MAX>>, notes: &mut Notes) -> Vec<u16> {
    const { assert!(MAX <= u16::MAX as u64, "the type's upper bound fits") };
    let network = At::Key(&RUNTIME, "network");
    let at = At::Key(&network, "listen");
    if listen.0.len() > Runtime::MOST_PORTS {
        let message = format!("{} ports; at most {} may be listened at", listen.0.len(), Runtime::MOST_PORTS);
        notes.findings.add(at, message, None);
    }
    let mut ports = Vec::new();
    for (index, port) in listen.0 {
        let port = u16::try_from(port.0).expect("the type's upper bound was checked when it was compiled");
        if port == Runtime::PROXY_PORT {
            let message = format!("{port} is the port of the egress proxy in every plugin's network namespace");
            notes.findings.add(At::Index(&at, index), message, Some("listen at another one".to_owned()));
        } else {
            ports.push(port);
        }
    }
    ports
}

fn environment(env: BTreeMap<String, String>, notes: &mut Notes) -> BTreeMap<String, String> {
    let at = At::Key(&RUNTIME, "env");
    for key in env.keys() {
        let at = At::Key(&at, key);
        let head = key.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
        if !head || !key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            let message = "the name of a variable has letters, digits and _ only, and no digit first";
            notes.findings.add(at, message, None);
        } else if ["PLUGVISOR_", "LISTEN_"].iter().any(|prefix| key.starts_with(prefix)) {
            notes.findings.add(at, "the host sets this variable", Some("remove it".to_owned()));
        } else if key.starts_with("LD_") {
            let message = "variables of the dynamic loader could run other code than the entry";
            notes.findings.add(at, message, Some("link with an rpath below $ORIGIN instead".to_owned()));
        }
    }
    env
}

fn size<const MIN: u64, const MAX: u64>(whole: Whole<MIN, MAX>) -> ByteSize {
    ByteSize(whole.0)
}

fn millis<const MIN: u64, const MAX: u64>(whole: Whole<MIN, MAX>) -> Duration {
    Duration::from_millis(whole.0)
}

fn count<const MIN: u64, const MAX: u64>(whole: Whole<MIN, MAX>) -> u32 {
    const { assert!(MAX <= u32::MAX as u64, "the type's upper bound fits") };
    u32::try_from(whole.0).expect("the type's upper bound was checked when it was compiled")
}
