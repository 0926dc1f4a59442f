//! The manifest as it is written: every object with its fields, their types and classes.
//!
//! This is the one table of fields: reading, the published schema and the documentation come from it. What a value means
//! and which values go together is judged elsewhere.

use std::{collections::BTreeMap, str::FromStr};

use serde_json::{Map, Value};

use super::{
    Activation, Compression, Dependency, GuardScope, RuntimeKind, SignatureAlgorithm, SocketMode,
    grammar::{BundlePath, ChecksumHash, Destination, EventType, HostModule, ServiceName, SingleLine, Token},
    reader::{self, Class, Field, Kind, List, Memory, Notes, Read, Sequence, Whole, table},
};
use crate::{
    Capability, IsolationLevel, PluginName, TrustTier,
    json::{At, MAX_INTEGER},
};

const DAY_MS: u64 = 24 * 60 * 60 * 1000;

type Bytes = Whole<1, MAX_INTEGER>;
type Millis = Whole<1, DAY_MS>;
type Count = Whole<1, 10_000>;
type InsidePort = Whole<1_024, 65_535>;

table! {
    /// The whole document.
    Document {
        /// The plugin's name: 1 to 63 characters of a-z, 0-9 and -, beginning with a letter.
        Active name: PluginName = "name" required;
        /// The plugin's version, by Semantic Versioning 2.0.
        Active version: semver::Version = "version" required;
        /// What it does, for people.
        Active description: String = "description";
        /// Who wrote it, for people.
        Active author: SingleLine = "author";
        /// Under which terms, for people; an SPDX expression by custom.
        Active license: SingleLine = "license";
        /// The plugins it needs, as `name` or `name@range`. It may call their services that are not global, too.
        Active dependencies: List<Dependency> = "dependencies";
        /// Who starts first when several plugins could start and not all may at once: the lowest. Default: 0.
        Active load_order: i32 = "loadOrder";
        /// Whether the host is not ready while it is wanted and does not serve.
        Active critical: bool = "critical";
        /// Trust, capabilities, walls.
        Group security: Security = "security";
        /// What a registry may do to a copy of the bundle.
        Group optimization: Optimization = "optimization";
        /// Hooks it wants and events it publishes.
        Group events: Events = "events";
        /// Time budgets and the circuit breaker.
        Group monitoring: Monitoring = "monitoring";
        /// The services it serves and who may call them.
        Group module: Module = "module";
        /// How its process is started.
        Group runtime: Runtime = "runtime";
    }
}

table! {
    /// Trust, capabilities, walls.
    Security {
        /// The most trust it claims; the host never gives more than it verified.
        Active trust_level: TrustTier = "trustLevel";
        /// What it asks for. The host grants what the tier and the operator allow.
        Active capabilities: List<Capability> = "capabilities";
        /// A detached signature over the content digest.
        Refused signature: Signature = "signature";
        /// The content digest; a bundle with another one is not opened.
        Group checksum: Checksum = "checksum";
        /// The walls that it asks for.
        Group sandbox: Sandbox = "sandbox";
    }
}

table! {
    /// A detached signature over the content digest.
    Signature {
        /// The JWS algorithm (RFC 7518).
        Refused algorithm: SignatureAlgorithm = "algorithm" required;
        /// Which key.
        Refused key_id: SingleLine = "keyId" required;
        /// The signature, in base64url.
        Refused signature: SingleLine = "signature" required;
    }
}

table! {
    /// The content digest.
    Checksum {
        /// The only algorithm of the content digest.
        Active algorithm: ChecksumAlgorithm = "algorithm" required;
        /// 64 lower-case hexadecimal digits.
        Active hash: ChecksumHash = "hash" required;
    }
}

table! {
    /// The walls that it asks for.
    Sandbox {
        /// `false` asks for the level none, which the tier may refuse. Default: true.
        Active enabled: bool = "enabled";
        /// The weakest level that it accepts. vm needs a kernel that the host's administrator names.
        Active isolation_level: IsolationLevel = "isolationLevel";
        /// What it may use up.
        Group resource_limits: ResourceLimits = "resourceLimits";
    }
}

table! {
    /// What it may use up. Absent: the host's default.
    ResourceLimits {
        /// Bytes of memory of all its processes together.
        Active max_memory: Memory = "maxMemory";
        /// Percent of one CPU: 100 is one whole CPU.
        Active max_cpu: Whole<1, 102_400> = "maxCPU";
        /// Bytes of the largest file that it may write.
        Active max_file_size: Bytes = "maxFileSize";
        /// Bytes per second on the network, both directions together.
        Active max_network_bandwidth: Bytes = "maxNetworkBandwidth";
        /// Milliseconds of the longest call.
        Active max_execution_time: Millis = "maxExecutionTime";
    }
}

table! {
    /// What a registry may do to a copy of the bundle.
    Optimization {
        /// Making the bundle smaller.
        Group bundle_optimization: BundleOptimization = "bundleOptimization";
        /// What may be cached.
        Group caching: Caching = "caching";
    }
}

table! {
    /// Making the bundle smaller.
    BundleOptimization {
        /// Whether any of it is done.
        Inactive enabled: bool = "enabled";
        /// Leave out files that nothing reaches.
        Inactive tree_shaking: bool = "treeShaking";
        /// Minify scripts and strip symbols.
        Inactive minification: bool = "minification";
        /// How the download is compressed.
        Inactive compression: Compression = "compression";
        /// Leave out source maps.
        Inactive remove_source_maps: bool = "removeSourceMaps";
        /// Leave out tests.
        Inactive remove_test_files: bool = "removeTestFiles";
    }
}

table! {
    /// What may be cached.
    Caching {
        /// The parsed manifest.
        Inactive manifest_cache: bool = "manifestCache";
        /// The verdict of validation.
        Inactive validation_cache: bool = "validationCache";
        /// The verdict on signatures.
        Inactive security_cache: bool = "securityCache";
        /// Milliseconds that an entry is kept.
        Inactive ttl: Whole<1, MAX_INTEGER> = "ttl";
    }
}

table! {
    /// Hooks it wants and events it publishes.
    Events {
        /// Which hooks are called. Default: none.
        Group lifecycle: Lifecycle = "lifecycle";
        /// The event types that it may publish, such as `com.example.page.made`.
        Active custom: List<EventType> = "custom";
    }
}

table! {
    /// Which hooks are called.
    Lifecycle {
        /// After Init, before the first call is routed.
        Active before_load: bool = "beforeLoad";
        /// When it is loaded.
        Active after_load: bool = "afterLoad";
        /// Before it is drained.
        Active before_unload: bool = "beforeUnload";
        /// When something of it failed.
        Inactive on_error: bool = "onError";
    }
}

table! {
    /// Time budgets and the circuit breaker.
    Monitoring {
        /// Time budgets.
        Group performance: Performance = "performance";
        /// The circuit breaker.
        Group circuit_breaker: CircuitBreaker = "circuitBreaker";
    }
}

table! {
    /// Time budgets.
    Performance {
        /// Milliseconds from launch to ready.
        Active max_startup_time: Millis = "maxStartupTime";
        /// Milliseconds; a slower call counts as slow in the breaker.
        Active max_response_time: Millis = "maxResponseTime";
        /// Whether the plugin's own metrics are collected.
        Inactive enable_metrics: bool = "enableMetrics";
        /// Whether its calls are traced.
        Inactive enable_tracing: bool = "enableTracing";
    }
}

table! {
    /// The circuit breaker. Absent: the host's default.
    CircuitBreaker {
        /// Whether there is one.
        Active enabled: bool = "enabled";
        /// Consecutive failures that open it.
        Active failure_threshold: Count = "failureThreshold";
        /// Milliseconds that it stays open at first.
        Active recovery_timeout: Millis = "recoveryTimeout";
        /// Calls let through while half open.
        Active half_open_max_calls: Count = "halfOpenMaxCalls";
    }
}

table! {
    /// The services it serves and who may call them. A name without a dot means the one service so named in the
    /// descriptor set.
    Module {
        /// Services offered to the outside, through the gateway.
        Inactive controllers: List<ServiceName> = "controllers";
        /// Services that the process serves.
        Active providers: List<ServiceName> = "providers";
        /// Services, of those it serves, that others may call.
        Active exports: List<ServiceName> = "exports";
        /// Host modules that it calls, such as `DatabaseModule`.
        Inactive imports: List<HostModule> = "imports";
        /// Yes/no decisions before a call.
        Refused guards: List<Guard> = "guards";
        /// Services that other plugins may call, by token or under conditions.
        Active cross_plugin_services: List<CrossPluginService> = "crossPluginServices";
    }
}

table! {
    /// A yes/no decision before a call.
    Guard {
        /// Its name.
        Refused name: SingleLine = "name" required;
        /// The author's own name for what decides.
        Refused class: SingleLine = "class";
        /// Whether it is the plugin's own or another's. Default: local.
        Refused scope: GuardScope = "scope";
        /// Whether other plugins may name it.
        Refused exported: bool = "exported";
        /// Guards that run before it.
        Refused dependencies: List<SingleLine> = "dependencies";
        /// For an external guard, the plugin that has it.
        Refused source: PluginName = "source";
    }
}

table! {
    /// A service that other plugins may call.
    CrossPluginService {
        /// The service.
        Active service_name: ServiceName = "serviceName" required;
        /// A caller selects this provider by the metadata `plugvisor-token`.
        Active token: Token = "token";
        /// `false`: only plugins that name this one in `dependencies` may call it. Default: false.
        Active global: bool = "global";
        /// What it is for, for people.
        Active description: String = "description";
        /// What a caller must have been granted.
        Active capabilities: List<Capability> = "capabilities";
    }
}

table! {
    /// How its process is started.
    Runtime {
        /// The entry's path in the bundle. Default: `bin/` and the plugin's name.
        Active exec: BundlePath = "exec";
        /// Arguments after the program's name.
        Active args: Sequence = "args";
        /// Its own variables; never `PLUGVISOR_*`, `LISTEN_*` or `LD_*`.
        Active env: BTreeMap<String, String> = "env";
        /// Who binds the worker socket: inherit (the plugin gets it listening, as descriptor 3) or bind. Default: inherit.
        Active socket: SocketMode = "socket";
        /// Whether the process stays (service, the default) or runs once (task, refused until it lands).
        Active kind: RuntimeKind = "kind";
        /// When it is started. Default: eager. on-demand is inactive: it is started when it is loaded.
        Active activation: Activation = "activation";
        /// Milliseconds that an on-demand plugin may be idle before it is stopped.
        Inactive idle_stop: Millis = "idleStop";
        /// The version of the environment's contract that it expects. Default: 1, the only one.
        Active protocol: Whole<1, 65_535> = "protocol";
        /// The path of its `google.protobuf.FileDescriptorSet` in the bundle. Default: `descriptor.binpb`.
        Active descriptor_set: BundlePath = "descriptorSet";
        /// What it asks to reach.
        Group network: Network = "network";
        /// Its configuration.
        Group config: Config = "config";
    }
}

table! {
    /// What it asks to reach.
    Network {
        /// Destinations as `host:port`; `*.example.com:443` means every name under example.com.
        Active egress: List<Destination> = "egress";
        /// Ports of TCP that it listens at in its own network namespace, with `network:tcp-server`; not 3128.
        Active listen: List<InsidePort> = "listen";
    }
}

table! {
    /// Its configuration.
    Config {
        /// The JSON Schema that a configuration must satisfy.
        Inactive schema: Map<String, Value> = "schema";
        /// What holds where the operator says nothing.
        Active defaults: Map<String, Value> = "defaults";
    }
}

/// Words and the values they stand for.
macro_rules! words {
    ($($type:ty { $($word:literal = $value:expr),+ $(,)? })+) => {$(
        impl Read for $type {
            const KIND: Kind = Kind::Word(&[$($word),+]);

            fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
                reader::word(&[$(($word, $value)),+], value, at, notes)
            }
        }
    )+};
}

/// The only algorithm of the content digest.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ChecksumAlgorithm {
    Sha256,
}

words! {
    ChecksumAlgorithm { "sha256" = Self::Sha256 }
    Compression {
        "gzip" = Self::Gzip,
        "brotli" = Self::Brotli,
        "deflate" = Self::Deflate,
        "lz4" = Self::Lz4,
        "zstd" = Self::Zstd,
    }
    GuardScope { "local" = Self::Local, "external" = Self::External }
    SocketMode { "inherit" = Self::Inherit, "bind" = Self::Bind }
    RuntimeKind { "service" = Self::Service, "task" = Self::Task }
    Activation { "eager" = Self::Eager, "on-demand" = Self::OnDemand }
    SignatureAlgorithm {
        "RS256" = Self::RS256,
        "RS384" = Self::RS384,
        "RS512" = Self::RS512,
        "PS256" = Self::PS256,
        "PS384" = Self::PS384,
        "PS512" = Self::PS512,
        "ES256" = Self::ES256,
        "ES384" = Self::ES384,
        "ES512" = Self::ES512,
    }
    TrustTier {
        "internal" = Self::Internal,
        "verified" = Self::Verified,
        "community" = Self::Community,
        "untrusted" = Self::Untrusted,
        "quarantined" = Self::Quarantined,
    }
    IsolationLevel {
        "none" = Self::None,
        "process" = Self::Process,
        "container" = Self::Container,
        "sandbox" = Self::Sandbox,
        "vm" = Self::Vm,
    }
}

impl Read for Capability {
    const KIND: Kind = Kind::Word(Self::NAMES);

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let text = reader::text(value, at, notes)?;
        let found = text.parse().ok();
        if found.is_none() {
            reader::unknown_word(text, Self::allowed_for(text), at, notes);
        }
        found
    }
}

/// Texts with a grammar of their own: what they are, and the regular expression that the schema publishes.
macro_rules! texts {
    ($($type:ty { $what:literal, $pattern:literal })+) => {$(
        impl Read for $type {
            const KIND: Kind = Kind::Text($what, $pattern);

            fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
                reader::parsed(value, at, notes)
            }
        }
    )+};
}

texts! {
    PluginName { "plugin name", "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$" }
    Dependency { "`name` or `name@range`", "^[a-z]([a-z0-9-]{0,61}[a-z0-9])?(@.+)?$" }
    SingleLine { "text on one line", "^[^\\u0000-\\u001f\\u007f]+$" }
    ChecksumHash { "64 hexadecimal digits", "^[0-9a-f]{64}$" }
    EventType { "event type", "^[a-z][a-z0-9_-]*(\\.[a-z0-9_-]+)+$" }
    HostModule { "host module", "^[A-Za-z][A-Za-z0-9_]*$" }
    ServiceName { "service", "^[A-Za-z_][A-Za-z0-9_]*(\\.[A-Za-z_][A-Za-z0-9_]*)*$" }
    Token { "token", "^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$" }
    BundlePath { "path in the bundle", "^[^/]+(/[^/]+)*$" }
    Destination { "`host:port`", "^.+:[0-9]{1,5}$" }
}

impl Read for semver::Version {
    const KIND: Kind = Kind::Text("semantic version", "^(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)\\.(0|[1-9][0-9]*)([-+].+)?$");

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let text = reader::text(value, at, notes)?;
        match Self::parse(text) {
            Ok(version) => Some(version),
            Err(error) => {
                // "1", "1.2" and "v1.2.3" are what people write first.
                let bare = text.trim_start_matches(['v', 'V']);
                let completed = [bare.to_owned(), format!("{bare}.0"), format!("{bare}.0.0")];
                let suggestion = completed.iter().find(|text| Self::from_str(text).is_ok());
                let suggestion = suggestion.map(|text| format!("write {text:?}"));
                let message = format!("{} is not a semantic version: {error}", crate::json::Excerpt(text));
                notes.findings.add(at, message, suggestion);
                None
            }
        }
    }
}
