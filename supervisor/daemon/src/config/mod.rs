//! `plugvisor.toml`: from text to values that the rest may rely upon.
//!
//! Everything is read and checked before anything is bound or started, and all problems are reported at once, each with
//! its line, its key and, for a misspelt name, a suggestion. This module knows no socket, no plugin and no kernel.

pub mod defaults;
mod listen;
mod problem;
mod raw;
#[cfg(feature = "schema")]
mod schema;
mod show;
#[cfg(test)]
mod tests;
mod validate;

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    io::Read as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use plugvisor_core::egress::Network;
use plugvisor_package::{Capability, Destination, Manifest, PluginName, TrustTier, VariableName};
use plugvisor_sandbox::protocol::Control;

use crate::traces::TraceSettings;

pub use plugvisor_sandbox::tables::Problem;
pub use problem::ConfigError;
#[cfg(feature = "schema")]
pub use schema::schema;
pub use show::{Origin, Setting};

use crate::logs::{FileLimits, LogLimits};

/// The whole configuration, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file it was read from; `None` when there was none and the defaults hold.
    pub file: Option<PathBuf>,
    /// The supervisor's own settings.
    pub supervisor: SupervisorConfig,
    /// The plugins' parent.
    pub launcher: LauncherConfig,
    /// Where plugins' configuration directories are, for a launcher that plugvisord starts. Absolute.
    pub config_root: PathBuf,
    /// Where their data directories are; `None` stands for a directory beside the state directory.
    data_root: Option<PathBuf>,
    /// What is kept of what plugins print.
    pub logs: LogsConfig,
    /// Where traces of calls are sent; `None` sends none.
    pub traces: Option<TraceSettings>,
    /// Where bundles are looked for, in the order given.
    pub directories: Vec<DirectoryConfig>,
    /// Settings of single plugins; a plugin that is not here has [`PluginConfig::default`].
    pub plugins: BTreeMap<PluginName, PluginConfig>,
    places: show::Places,
    /// See [`Config::place`].
    place: Arc<str>,
    /// Keys that a flag has set, with the flag.
    flags: BTreeMap<&'static str, &'static str>,
}

/// The supervisor's own settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SupervisorConfig {
    /// Absolute; holds the sockets and the lock.
    pub runtime_directory: PathBuf,
    /// Absolute; holds what is remembered when the supervisor ends.
    pub state_directory: PathBuf,
    /// Where `/metrics`, `/healthz` and `/readyz` are served; always a loopback address.
    pub metrics_address: SocketAddr,
    /// The user to become when started by root.
    pub user: String,
    /// Plugins that start at once at most.
    pub parallel_starts: u32,
    /// Controls that may be missing on this host.
    pub allow_degraded: BTreeSet<Control>,
}

/// Which launcher is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LauncherConfig {
    /// plugvisord starts it. It outlives plugvisord by this time, with its plugins; zero ends them with it.
    Embedded {
        /// Whole seconds.
        linger: Duration,
    },
    /// It was started elsewhere and listens here. plugvisord never ends it.
    External {
        /// Absolute.
        socket: PathBuf,
    },
}

/// What is kept of what plugins print.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogsConfig {
    /// Absolute; `None` stands for `logs` in the state directory.
    pub directory: Option<PathBuf>,
    /// Bounds on disk.
    pub files: FileLimits,
    /// Bounds of what is read and kept in memory.
    pub lines: LogLimits,
}

/// One directory of bundles.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryConfig {
    /// Which `[[directory]]` of the file it is, counted from 0.
    pub index: usize,
    /// Absolute.
    pub path: PathBuf,
    /// The tier that the operator gives to every bundle in it.
    pub tier: TrustTier,
    /// The capabilities that bundles in it may hold.
    pub grants: BTreeSet<Capability>,
}

/// Whether a discovered plugin is loaded at start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadMode {
    /// At start.
    #[default]
    Auto,
    /// When an operator asks.
    Manual,
}

/// Settings of one plugin. `None` leaves what the manifest or the default says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PluginConfig {
    /// Whether it is loaded at start.
    pub load: LoadMode,
    /// Replaces the directory's grants.
    pub grants: Option<BTreeSet<Capability>>,
    /// Laid over the manifest's defaults and handed to `Worker.Init`.
    pub config: serde_json::Map<String, serde_json::Value>,
    /// Variables of its environment: those that are written, and those that are passed on and were set.
    pub environment: BTreeMap<VariableName, String>,
    /// Names that are passed on when they are set, and were not.
    pub unset: BTreeSet<VariableName>,
    /// Limits that replace the manifest's; the tier's ceilings still hold.
    pub limits: LimitsConfig,
    /// What it may reach through the egress proxy, and where others reach it.
    pub network: NetworkConfig,
    /// Restart and back-off.
    pub restart: RestartConfig,
    /// The circuit breaker.
    pub breaker: BreakerConfig,
    /// Probes and time limits of the plugin's life.
    pub health: HealthConfig,
}

/// Limits of one plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LimitsConfig {
    /// Bytes of memory of all its processes together.
    pub memory_bytes: Option<u64>,
    /// Percent of one CPU.
    pub cpu_percent: Option<u32>,
    /// Processes and threads together.
    pub pids: Option<u32>,
    /// The largest file that it may write.
    pub file_size_bytes: Option<u64>,
    /// Open descriptors of one process.
    pub open_files: Option<u32>,
    /// The longest call that the broker lets run.
    pub call_timeout: Option<Duration>,
    /// Bytes per second through the egress proxy and by connections to it, both directions together.
    pub network_bytes: Option<u64>,
}

/// What one plugin may reach through the egress proxy, and where others reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Beyond these it may not go; `None` leaves what the manifest lists.
    pub egress: Option<Vec<Destination>>,
    /// Addresses that are not public and that it may reach all the same.
    pub addresses: Vec<Network>,
    /// Where others reach it.
    pub listen: Vec<ListenConfig>,
}

/// One address where others reach a plugin that serves TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenConfig {
    /// Where others connect; port 0 takes a free one.
    pub address: SocketAddr,
    /// Where the plugin listens in its own network namespace.
    pub port: u16,
    /// Connections at once; more wait in the queue of the address.
    pub max_connections: u16,
    /// How long a connection may wait for the plugin to be ready and to take it.
    pub connect_timeout: Duration,
    /// How long nothing may pass in either direction.
    pub idle_timeout: Duration,
}

impl ListenConfig {
    /// Why it leads nowhere: the plugin does not say that it listens at this port.
    #[must_use]
    pub fn unlisted(&self, manifest: &Manifest) -> Option<String> {
        let ports = &manifest.runtime.listen;
        let listed: Vec<String> = ports.iter().map(u16::to_string).collect();
        let listed = if listed.is_empty() { "none".to_owned() } else { listed.join(", ") };
        (!ports.contains(&self.port)).then(|| {
            format!(
                "{} leads to port {} of plugin {}, whose plugin.json says that it listens at (runtime.network.listen): {listed}",
                self.address, self.port, manifest.name
            )
        })
    }
}

/// Restart and back-off of one plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestartConfig {
    /// `false` leaves a plugin that ended in FAILED.
    pub enabled: Option<bool>,
    /// The first delay.
    pub initial_delay: Option<Duration>,
    /// The longest delay.
    pub max_delay: Option<Duration>,
    /// Exits inside the window that make a crash loop.
    pub crash_loop_exits: Option<u32>,
    /// The window of the crash loop.
    pub crash_loop_window: Option<Duration>,
}

/// The circuit breaker of one plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BreakerConfig {
    /// `false` never opens.
    pub enabled: Option<bool>,
    /// Failures in a row that open it.
    pub failure_threshold: Option<u32>,
    /// How long it stays open at first.
    pub recovery_timeout: Option<Duration>,
    /// Calls let through while half open.
    pub half_open_max_calls: Option<u32>,
}

/// Probes and time limits of one plugin's life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthConfig {
    /// From launch to ready; `None` leaves the manifest's `maxStartupTime`.
    pub startup_timeout: Option<Duration>,
    /// Between liveness probes.
    pub liveness_interval: Duration,
    /// How long one liveness probe may take.
    pub liveness_timeout: Duration,
    /// Liveness probes missed in a row that end the process.
    pub liveness_misses: u32,
    /// Between readiness probes.
    pub readiness_interval: Duration,
    /// How long a drain may take before SIGTERM.
    pub drain_timeout: Duration,
    /// From SIGTERM to the kill.
    pub stop_timeout: Duration,
}

impl Default for HealthConfig {
    fn default() -> Self {
        Self {
            startup_timeout: None,
            liveness_interval: defaults::LIVENESS_INTERVAL,
            liveness_timeout: defaults::LIVENESS_TIMEOUT,
            liveness_misses: defaults::LIVENESS_MISSES,
            readiness_interval: defaults::READINESS_INTERVAL,
            drain_timeout: defaults::DRAIN_TIMEOUT,
            stop_timeout: defaults::STOP_TIMEOUT,
        }
    }
}

impl Config {
    /// What holds when there is no file.
    #[must_use]
    pub fn without_file(surroundings: &Surroundings) -> Self {
        Self {
            file: None,
            supervisor: SupervisorConfig {
                runtime_directory: surroundings.runtime_directory(),
                state_directory: surroundings.state_directory(),
                metrics_address: defaults::METRICS_ADDRESS,
                user: defaults::USER.to_owned(),
                parallel_starts: defaults::PARALLEL_STARTS,
                allow_degraded: BTreeSet::new(),
            },
            launcher: LauncherConfig::Embedded { linger: defaults::LINGER },
            config_root: surroundings.config_root(),
            data_root: None,
            logs: LogsConfig { directory: None, files: FileLimits::default(), lines: LogLimits::default() },
            traces: None,
            directories: Vec::new(),
            plugins: BTreeMap::new(),
            places: show::Places::default(),
            place: surroundings
                .config_file()
                .map_or_else(|| "plugvisor.toml".into(), |file| file.display().to_string().into()),
            flags: BTreeMap::new(),
        }
    }

    /// Reads `path`, or without one the default file, which may be absent.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or something in it is wrong.
    pub fn load(path: Option<&Path>, surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let (config, problems) = Self::read(path, surroundings)?;
        config.without(problems)
    }

    /// The same, with what is wrong beside what could be read all the same: for whoever has more to look at.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn read(path: Option<&Path>, surroundings: &Surroundings) -> Result<(Self, Vec<Problem>), ConfigError> {
        let (path, required) = match path {
            // Whoever reads a message may be in another directory.
            Some(path) => (std::path::absolute(path).unwrap_or_else(|_| path.to_owned()), true),
            None => match surroundings.config_file() {
                Some(path) => (path, false),
                None => return Ok((Self::without_file(surroundings), Vec::new())),
            },
        };
        let read = |path: &Path| {
            let mut text = String::new();
            // One byte more than allowed, so that a longer file is noticed and never read whole.
            fs::File::open(path)?.take(defaults::MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
            Ok::<_, std::io::Error>(text)
        };
        match read(&path) {
            Ok(text) if text.len() as u64 > defaults::MAX_FILE_BYTES => Err(ConfigError::too_long(path)),
            Ok(text) => Ok(validate::parse(&text, &path, surroundings)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {
                Ok((Self::without_file(surroundings), Vec::new()))
            }
            Err(error) => Err(ConfigError::Unreadable { path, source: error }),
        }
    }

    /// Checks `text`. `path` names the file in errors and is what relative paths in it are relative to.
    pub fn parse(text: &str, path: &Path, surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let (config, problems) = validate::parse(text, path, surroundings);
        config.without(problems)
    }

    /// Itself, when nothing is wrong with it.
    ///
    /// # Errors
    ///
    /// Everything that is.
    pub fn without(self, problems: Vec<Problem>) -> Result<Self, ConfigError> {
        if problems.is_empty() {
            return Ok(self);
        }
        let path = self.file.unwrap_or_else(|| self.place.as_ref().into());
        Err(ConfigError::Invalid { path, problems })
    }

    /// The path of the file that was read, or that would be if it were there: where messages say that something is to be
    /// written.
    #[must_use]
    pub fn place(&self) -> Arc<str> {
        Arc::clone(&self.place)
    }

    /// The line on which a key is set, counted from 1; `None` when nobody set it there.
    #[must_use]
    pub fn line(&self, key: &str) -> Option<usize> {
        self.places.line(key)
    }

    /// Where what plugins print is kept.
    #[must_use]
    pub fn log_directory(&self) -> PathBuf {
        self.logs.directory.clone().unwrap_or_else(|| self.supervisor.state_directory.join("logs"))
    }

    /// Where plugins' data directories are. Beside the state directory and not in it: that one is the supervisor's own.
    #[must_use]
    pub fn data_root(&self) -> PathBuf {
        self.data_root.clone().unwrap_or_else(|| beside(&self.supervisor.state_directory, "-data"))
    }

    /// Where the launcher that plugvisord starts keeps its store, which is nobody's but root's on the whole way.
    #[must_use]
    pub fn launcher_store(&self) -> PathBuf {
        beside(&self.supervisor.state_directory, "-launcher")
    }

    /// Notes that a flag has set a key.
    pub fn note_flag(&mut self, key: &'static str, flag: &'static str) {
        self.flags.insert(key, flag);
    }

    /// The settings of one plugin.
    #[must_use]
    pub fn plugin(&self, name: &PluginName) -> PluginConfig {
        self.plugins.get(name).cloned().unwrap_or_default()
    }
}

/// The directory beside this one whose name ends so.
fn beside(directory: &Path, end: &str) -> PathBuf {
    let mut name = directory.file_name().unwrap_or("plugvisor".as_ref()).to_owned();
    name.push(end);
    directory.with_file_name(name)
}

/// What the process was started with and the defaults depend on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Surroundings {
    /// The effective uid.
    pub uid: u32,
    /// `XDG_RUNTIME_DIR`, when it is set and absolute.
    pub xdg_runtime_dir: Option<PathBuf>,
    /// `XDG_CONFIG_HOME`, else `$HOME/.config`.
    pub xdg_config_home: Option<PathBuf>,
    /// `XDG_STATE_HOME`, else `$HOME/.local/state`.
    pub xdg_state_home: Option<PathBuf>,
    /// Its own environment, of which plugins may be given single variables.
    pub variables: BTreeMap<OsString, OsString>,
}

impl Surroundings {
    /// Those of this process.
    #[must_use]
    pub fn of_process() -> Self {
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        Self {
            uid: rustix::process::geteuid().as_raw(),
            xdg_runtime_dir: absolute("XDG_RUNTIME_DIR"),
            xdg_config_home: absolute("XDG_CONFIG_HOME").or_else(|| Some(absolute("HOME")?.join(".config"))),
            xdg_state_home: absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state"))),
            variables: std::env::vars_os().collect(),
        }
    }

    /// The default runtime directory: `/run/plugvisor` as root, `$XDG_RUNTIME_DIR/plugvisor`, else
    /// `/tmp/plugvisor-<uid>`.
    #[must_use]
    pub fn runtime_directory(&self) -> PathBuf {
        match &self.xdg_runtime_dir {
            _ if self.uid == 0 => PathBuf::from(defaults::ROOT_RUNTIME_DIRECTORY),
            Some(directory) => directory.join("plugvisor"),
            None => PathBuf::from(format!("/tmp/plugvisor-{}", self.uid)),
        }
    }

    /// The default state directory: `/var/lib/plugvisor` as root, `$XDG_STATE_HOME/plugvisor`, else
    /// `$HOME/.local/state/plugvisor`; without a home, `/var/tmp/plugvisor-<uid>`.
    #[must_use]
    pub fn state_directory(&self) -> PathBuf {
        match &self.xdg_state_home {
            _ if self.uid == 0 => PathBuf::from(defaults::ROOT_STATE_DIRECTORY),
            Some(directory) => directory.join("plugvisor"),
            None => PathBuf::from(format!("/var/tmp/plugvisor-{}", self.uid)),
        }
    }

    /// The default place of plugins' configuration directories: `/etc/plugvisor/plugins` as root,
    /// `$XDG_CONFIG_HOME/plugvisor/plugins`; without a home, the same below `/var/tmp/plugvisor-<uid>`.
    #[must_use]
    pub fn config_root(&self) -> PathBuf {
        match &self.xdg_config_home {
            _ if self.uid == 0 => PathBuf::from(defaults::ROOT_CONFIG_ROOT),
            Some(directory) => directory.join("plugvisor/plugins"),
            None => PathBuf::from(format!("/var/tmp/plugvisor-{}/plugins", self.uid)),
        }
    }

    /// The default configuration file.
    #[must_use]
    pub fn config_file(&self) -> Option<PathBuf> {
        if self.uid == 0 {
            return Some(PathBuf::from(defaults::ROOT_CONFIG_FILE));
        }
        Some(self.xdg_config_home.as_ref()?.join("plugvisor/plugvisor.toml"))
    }
}
