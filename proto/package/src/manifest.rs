//! The manifest `plugin.json`: what a plugin says about itself and asks for.
//!
//! A manifest that exists is well formed: every value was checked when it was parsed, and all problems are reported at
//! once. What this module does not know is what a host grants, which tier a plugin has, or what else is installed;
//! what only a host can tell is listed by [`Manifest::not_checked`].
//!
//! ```text
//! bytes --strict JSON--> Value --reader--> raw::* --judge--> Manifest
//!         duplicates,             types,             ranges, grammars,
//!         sizes, depth            unknown keys       references
//! ```

mod grammar;
mod judge;
mod raw;
mod reader;

use std::{collections::BTreeMap, time::Duration};

use serde_json::Value;

use self::reader::{Notes, Read};
pub use self::{
    grammar::GrammarError,
    reader::{Class, Field, Kind},
};
use crate::{
    Capability, Destination, Digest, IsolationLevel, ManifestLimits, PluginName, Problems, TrustTier,
    json::{self, At},
    problem::Findings,
};

/// A checked manifest.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// The plugin's name.
    pub name: PluginName,
    /// The plugin's version.
    pub version: semver::Version,
    /// What it does, for people.
    pub description: Option<String>,
    /// Who wrote it, for people.
    pub author: Option<String>,
    /// Under which terms, for people; an SPDX expression by custom.
    pub license: Option<String>,
    /// The plugins it needs. A name stands at most once and is never its own.
    pub dependencies: Vec<Dependency>,
    /// Who starts first when several could and not all may at once: the lowest; 0 when it says nothing.
    pub load_order: Option<i32>,
    /// Whether the host is not ready while it is wanted and does not serve.
    pub critical: bool,
    /// Trust, capabilities, walls.
    pub security: Security,
    /// Inactive: what a registry may do to the bundle.
    pub optimization: Optimization,
    /// Hooks it wants and events it publishes.
    pub events: Events,
    /// Time budgets and the circuit breaker.
    pub monitoring: Monitoring,
    /// The services it serves and who may call them.
    pub module: Module,
    /// How its process is started.
    pub runtime: Runtime,
    source: Value,
    inactive: Vec<String>,
}

impl Manifest {
    /// The manifest's file name in a bundle.
    pub const FILE_NAME: &'static str = "plugin.json";

    /// Every field of the manifest, with its type, its description and what this version does with it.
    pub const FIELDS: &'static [Field] = raw::Document::FIELDS;

    /// Reads and judges a manifest.
    ///
    /// # Errors
    ///
    /// Every problem found. When the document is not JSON, that is the only one.
    pub fn parse(bytes: &[u8], limits: &ManifestLimits) -> Result<Self, Problems> {
        let mut findings = Findings::new(limits.problems);
        let source = json::read(bytes, limits, &mut findings);
        let mut notes = Notes { findings, inactive: Vec::new() };
        let manifest = source.and_then(|source| {
            let document = raw::Document::read(&source, At::Root, &mut notes)?;
            judge::manifest(document, source, &mut notes)
        });
        notes.findings.into_result()?;
        Ok(manifest.expect("a manifest that could not be made has a finding that says why"))
    }

    /// The document as it was written.
    #[must_use]
    pub fn as_json(&self) -> &Value {
        &self.source
    }

    /// The fields that the document sets and that do nothing in this version, as JSON paths in the order of the
    /// document's fields.
    #[must_use]
    pub fn inactive_fields(&self) -> &[String] {
        &self.inactive
    }

    /// The canonical form that the content digest covers: RFC 8785, without `security.signature` and
    /// `security.checksum`, and without `security` when nothing else stands in it. So a signature and a checksum can be
    /// added to any manifest without changing the digest that they state.
    #[must_use]
    pub fn canonical(&self) -> Vec<u8> {
        let mut document = self.source.clone();
        if let Some(document) = document.as_object_mut() {
            let security = document.get_mut("security").and_then(Value::as_object_mut);
            let empty = security.is_some_and(|security| {
                security.remove("signature");
                security.remove("checksum");
                security.is_empty()
            });
            if empty {
                document.remove("security");
            }
        }
        serde_json_canonicalizer::to_vec(&document).expect("a value read from JSON can be written as JSON")
    }

    /// The security fields whose mechanism has not landed, and what would otherwise run in a way the author did not
    /// mean. A host must refuse to load a plugin that has any: ignoring one would leave the plugin with weaker walls
    /// than its author asked for.
    #[must_use]
    pub fn unsupported(&self) -> Vec<Unsupported> {
        let mut found = Vec::new();
        let mut add = |path: &str, message: String, hint: &str| {
            found.push(Unsupported { path: path.to_owned(), message, hint: hint.to_owned() });
        };
        if self.security.signature.is_some() {
            let message = "signatures are not verified in this version".to_owned();
            add("security.signature", message, "remove it; trust comes from the operator's directory setting");
        }
        if !self.module.guards.is_empty() {
            let message = "guards are not run in this version".to_owned();
            add("module.guards", message, "remove them, and decide inside the service who may do what");
        }
        if self.runtime.kind == RuntimeKind::Task {
            let message = "one-shot tasks are not implemented in this version".to_owned();
            add("runtime.kind", message, "set it to \"service\", and serve the task as a call");
        }
        if self.runtime.protocol != 1 {
            let message = format!("protocol {} is not known to this version", self.runtime.protocol);
            add("runtime.protocol", message, "set it to 1, or install a newer Plugvisor");
        }
        found
    }

    /// What only a host or a registry can tell: `validate` shows it, `verify` fails on it.
    #[must_use]
    pub fn not_checked(&self) -> Vec<NotChecked> {
        let mut found = Vec::new();
        let mut add = |path: String, message: String| found.push(NotChecked { path, message });
        for (index, dependency) in self.dependencies.iter().enumerate() {
            let Dependency { name, range } = dependency;
            add(format!("dependencies[{index}]"), format!("whether a host has {name} in a version that fits {range}"));
        }
        if let Some(signature) = &self.security.signature {
            let message = format!("whether the key {:?} is known and the signature fits", signature.key_id);
            add("security.signature.keyId".to_owned(), message);
        }
        for (index, module) in self.module.imports.iter().enumerate() {
            add(format!("module.imports[{index}]"), format!("whether a host has the module {module}"));
        }
        for (index, guard) in self.module.guards.iter().enumerate() {
            if let Some(source) = &guard.source {
                let message = format!("whether {source} exports the guard {:?}", guard.name);
                add(format!("module.guards[{index}]"), message);
            }
        }
        found
    }
}

/// A field that this version cannot honour and must not ignore.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Unsupported {
    /// The field, as a JSON path.
    pub path: String,
    /// What cannot be honoured.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

/// A statement that cannot be checked from the bundle alone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NotChecked {
    /// The field, as a JSON path.
    pub path: String,
    /// What remains to be checked, and by whom.
    pub message: String,
}

/// A plugin that this one needs, written `name` or `name@range`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dependency {
    /// The other plugin.
    pub name: PluginName,
    /// The versions that will do; any when the manifest gives no range.
    pub range: semver::VersionReq,
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// The number.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

/// Trust, capabilities, walls.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Security {
    /// The most trust it claims; never more than what was verified.
    pub trust_level: Option<TrustTier>,
    /// What it asks for, sorted, each once.
    pub capabilities: Vec<Capability>,
    /// Refused until signatures land.
    pub signature: Option<Signature>,
    /// The content digest that the author states; the bundle's own must be equal.
    pub checksum: Option<Digest>,
    /// Its walls.
    pub sandbox: Sandbox,
}

/// A detached signature over the content digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The JWS algorithm, such as `ES256`.
    pub algorithm: SignatureAlgorithm,
    /// Which key.
    pub key_id: String,
    /// The signature, in base64url.
    pub signature: String,
}

/// JWS signature algorithms (RFC 7518, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names of RFC 7518")]
pub enum SignatureAlgorithm {
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    ES512,
}

/// The walls that the plugin asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// `false` asks for the level NONE, which the tier may refuse.
    pub enabled: bool,
    /// The weakest level that it accepts; the host may choose a stronger one.
    pub isolation_level: Option<IsolationLevel>,
    /// What it may use up.
    pub resource_limits: ResourceLimits,
}

impl Default for Sandbox {
    fn default() -> Self {
        Self { enabled: true, isolation_level: None, resource_limits: ResourceLimits::default() }
    }
}

/// What a plugin may use up. `None` leaves the host's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// Memory of all its processes together; at least 1 MiB.
    pub max_memory: Option<ByteSize>,
    /// Percent of one CPU: 100 is one whole CPU, 250 two and a half.
    pub max_cpu_percent: Option<u32>,
    /// The largest file that it may write.
    pub max_file_size: Option<ByteSize>,
    /// Bytes per second through the egress proxy, both directions together.
    pub max_network_bandwidth: Option<ByteSize>,
    /// The longest call.
    pub max_execution_time: Option<Duration>,
}

/// Inactive: what a registry may do to a copy of the bundle.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Optimization {
    /// Making the bundle smaller.
    pub bundle: BundleOptimization,
    /// What may be cached.
    pub caching: Caching,
}

/// Inactive: making the bundle smaller. `None` is the registry's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BundleOptimization {
    /// Whether any of it is done.
    pub enabled: Option<bool>,
    /// Leave out files that nothing reaches.
    pub tree_shaking: Option<bool>,
    /// Minify scripts and strip symbols.
    pub minification: Option<bool>,
    /// How the download is compressed.
    pub compression: Option<Compression>,
    /// Leave out source maps.
    pub remove_source_maps: Option<bool>,
    /// Leave out tests.
    pub remove_test_files: Option<bool>,
}

/// Compression of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Compression {
    Gzip,
    Brotli,
    Deflate,
    Lz4,
    Zstd,
}

/// Inactive: what may be cached. `None` is the host's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caching {
    /// The parsed manifest.
    pub manifest: Option<bool>,
    /// The verdict of validation.
    pub validation: Option<bool>,
    /// The verdict on signatures.
    pub security: Option<bool>,
    /// For how long.
    pub ttl: Option<Duration>,
}

/// Hooks it wants and events it publishes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Which hooks are called; all off by default.
    pub lifecycle: LifecycleHooks,
    /// The event types that it may publish.
    pub custom: Vec<String>,
}

/// Which hooks of `plugvisor.worker.v1.Worker/Hook` are called.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools, reason = "four independent switches, as the manifest has them")]
pub struct LifecycleHooks {
    /// After Init, before the first call is routed.
    pub before_load: bool,
    /// When it is LOADED.
    pub after_load: bool,
    /// Before it is drained.
    pub before_unload: bool,
    /// Inactive: when something of it failed.
    pub on_error: bool,
}

/// Time budgets and the circuit breaker. `None` leaves the host's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Monitoring {
    /// From launch to ready.
    pub max_startup_time: Option<Duration>,
    /// A call slower than this counts as slow in the breaker.
    pub max_response_time: Option<Duration>,
    /// Inactive: whether the plugin's own metrics are collected.
    pub enable_metrics: Option<bool>,
    /// Inactive: whether its calls are traced.
    pub enable_tracing: Option<bool>,
    /// The circuit breaker.
    pub circuit_breaker: CircuitBreaker,
}

/// The circuit breaker. `None` leaves the host's default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CircuitBreaker {
    /// Whether there is one.
    pub enabled: Option<bool>,
    /// Consecutive failures that open it.
    pub failure_threshold: Option<u32>,
    /// How long it stays open at first.
    pub recovery_timeout: Option<Duration>,
    /// Calls let through while half open.
    pub half_open_max_calls: Option<u32>,
}

/// The services it serves and who may call them, as written: a name without a dot is resolved against the bundle's
/// descriptor set when the bundle is opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Module {
    /// Inactive: services offered to the outside, through the gateway.
    pub controllers: Vec<String>,
    /// Services that the process serves.
    pub providers: Vec<String>,
    /// Services that others may call.
    pub exports: Vec<String>,
    /// Inactive: host modules that it calls.
    pub imports: Vec<String>,
    /// Refused until guards land.
    pub guards: Vec<Guard>,
    /// Services that other plugins may call, with a token or under conditions.
    pub cross_plugin_services: Vec<CrossPluginService>,
}

/// A yes/no decision before a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Its name.
    pub name: String,
    /// The service that decides; the author's own name for it.
    pub class: Option<String>,
    /// Whose guard it is.
    pub scope: GuardScope,
    /// Whether other plugins may name it.
    pub exported: bool,
    /// Guards that run before it.
    pub dependencies: Vec<String>,
    /// For an external guard, the plugin that has it.
    pub source: Option<PluginName>,
}

/// Whose guard it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GuardScope {
    /// The plugin's own.
    #[default]
    Local,
    /// Another plugin's.
    External,
}

/// A service that other plugins may call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrossPluginService {
    /// The service's name, full or without a dot.
    pub service_name: String,
    /// Selects this provider by the metadata `plugvisor-token`.
    pub token: Option<String>,
    /// `false`: only plugins that name this one in `dependencies` may call it.
    pub global: bool,
    /// What it is for, for people.
    pub description: Option<String>,
    /// What a caller must have been granted.
    pub capabilities: Vec<Capability>,
}

/// How the process is started.
#[derive(Clone, Debug, PartialEq)]
pub struct Runtime {
    /// The entry's path in the bundle; `bin/<name>` by default.
    pub exec: String,
    /// Arguments after the program's name.
    pub args: Vec<String>,
    /// Its own variables; never `PLUGVISOR_*`, `LISTEN_*` or `LD_*`.
    pub env: BTreeMap<String, String>,
    /// Who binds the worker socket.
    pub socket: SocketMode,
    /// Whether it stays.
    pub kind: RuntimeKind,
    /// When it is started.
    pub activation: Activation,
    /// Inactive: how long an on-demand plugin may be idle.
    pub idle_stop: Option<Duration>,
    /// The version of the environment's contract that it expects; 1 is the only one.
    pub protocol: u32,
    /// The path of its descriptor set in the bundle.
    pub descriptor_set: String,
    /// Whether the manifest names the descriptor set, so that its absence is an error.
    pub descriptor_set_stated: bool,
    /// What it asks to reach through the egress proxy.
    pub egress: Vec<Destination>,
    /// The ports of TCP that it listens at in its own network namespace.
    pub listen: Vec<u16>,
    /// Its configuration.
    pub config: Config,
}

impl Runtime {
    /// The default of `descriptorSet`.
    pub const DESCRIPTOR_SET: &'static str = "descriptor.binpb";

    /// Where the egress proxy is in a plugin's network namespace, and nothing else may be.
    pub const PROXY_PORT: u16 = 3128;

    /// The most ports that one may listen at.
    pub const MOST_PORTS: usize = 16;
}

/// Who binds the worker socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SocketMode {
    /// The launcher; the plugin inherits it as descriptor 3.
    #[default]
    Inherit,
    /// The plugin binds the path in `PLUGVISOR_LISTEN`.
    Bind,
}

/// Whether the process stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuntimeKind {
    /// Serves until it is stopped.
    #[default]
    Service,
    /// Runs once. Refused until one-shot tasks land.
    Task,
}

/// When the process is started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Activation {
    /// When the plugin is loaded.
    #[default]
    Eager,
    /// At its first call. Inactive: started when it is loaded, which is earlier and never later.
    OnDemand,
}

/// The plugin's configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// Inactive: the JSON Schema that a configuration must satisfy.
    pub schema: Option<serde_json::Map<String, Value>>,
    /// What holds where the operator says nothing.
    pub defaults: serde_json::Map<String, Value>,
}
