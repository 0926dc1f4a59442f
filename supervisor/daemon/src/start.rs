//! The start, while the process has one thread and perhaps root: everything is read, checked, opened, bound and
//! started; then privileges are given up, for good.

use std::{collections::BTreeSet, path::PathBuf};

use clap::Parser;
use plugvisor_package::{PluginName, VariableName};
use plugvisor_sandbox::options::{BundleRoot, Variable};

use crate::{
    config::{Config, ConfigError, LauncherConfig, PluginConfig, Surroundings},
    discovery::PluginDirectory,
    examine,
    launcher::{self, Link, LinkError, SpawnError},
    logs::{LogDirectory, LogDirectoryError},
    open_files,
    privileges::{self, PrivilegeError},
    run::Prepared,
    runtime_directory::{RuntimeDirectory, RuntimeDirectoryError},
    state::{self, Opened, StateDirectory, StateDirectoryError, StateError},
};

/// Starts plugins as walled processes and routes their calls.
#[derive(Debug, Parser)]
#[command(name = "plugvisord", version)]
pub struct Args {
    /// Configuration file [default: /etc/plugvisor/plugvisor.toml as root, else
    /// $XDG_CONFIG_HOME/plugvisor/plugvisor.toml; without a file, the defaults].
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the sockets and the lock, instead of the configured one.
    #[arg(long, value_name = "DIRECTORY")]
    pub runtime_directory: Option<PathBuf>,
    /// Directory of what is remembered, instead of the configured one.
    #[arg(long, value_name = "DIRECTORY")]
    pub state_directory: Option<PathBuf>,
    /// The launcher's program [default: plugvisor-launcher beside this program].
    #[arg(long, value_name = "PROGRAM")]
    pub launcher: Option<PathBuf>,
    /// Socket of a launcher that was started elsewhere, instead of starting one; plugins outlive this program then.
    #[arg(long, value_name = "SOCKET", conflicts_with = "launcher")]
    pub launcher_socket: Option<PathBuf>,
    /// What the administrator approved, for the launcher that this program starts
    /// [default: /etc/plugvisor/launcher.toml as root, if there is one].
    #[arg(long, value_name = "FILE")]
    pub launcher_policy: Option<PathBuf>,
}

/// Why the supervisor did not start.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub enum StartError {
    /// The configuration.
    Config(#[from] ConfigError),
    /// The runtime directory.
    Runtime(#[from] RuntimeDirectoryError),
    /// The state directory.
    StateDirectory(#[from] StateDirectoryError),
    /// What is in it.
    State(#[from] StateError),
    /// The launcher's program.
    Program(#[from] SpawnError),
    /// The launcher.
    Launcher(#[from] LinkError),
    /// Privileges.
    Privileges(#[from] PrivilegeError),
    /// The directory of logs that the configuration names.
    Logs(#[from] LogDirectoryError),
    /// The launcher does not start with what it was given, and something else is wrong too.
    #[error(
        "the launcher refused how it was started: correct what it says above, from the line on that begins with \
         plugvisor-launcher; besides, {0}"
    )]
    LauncherConfiguration(#[source] Box<Self>),
}

impl StartError {
    /// The exit status: 78 when the configuration must be changed, 74 when the host refused something.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(ConfigError::Invalid { .. })
            | Self::Runtime(RuntimeDirectoryError::TooLong { .. })
            | Self::StateDirectory(StateDirectoryError::Unsafe { .. })
            | Self::State(StateError::Incompatible { .. })
            | Self::Logs(_)
            | Self::LauncherConfiguration(_)
            | Self::Privileges(PrivilegeError::NoUser(_) | PrivilegeError::Root(_)) => 78,
            Self::Config(ConfigError::Unreadable { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => 78,
            Self::Config(ConfigError::Unreadable { .. })
            | Self::Runtime(
                RuntimeDirectoryError::Io { .. }
                | RuntimeDirectoryError::Unsafe { .. }
                | RuntimeDirectoryError::Locked { .. }
                | RuntimeDirectoryError::InTheWay { .. },
            )
            | Self::StateDirectory(
                StateDirectoryError::Io { .. }
                | StateDirectoryError::Locked { .. }
                | StateDirectoryError::InTheWay { .. },
            )
            | Self::State(StateError::Locked { .. } | StateError::Barred { .. } | StateError::Io { .. })
            | Self::Program(_)
            | Self::Launcher(_)
            | Self::Privileges(PrivilegeError::Refused { .. } | PrivilegeError::Left { .. }) => 74,
        }
    }
}

/// Where the administrator's approvals are, if root starts the supervisor.
const POLICY: &str = "/etc/plugvisor/launcher.toml";

/// The launcher's policy file: the one that is named, or the administrator's.
pub(crate) fn policy(named: Option<PathBuf>, uid: u32) -> Option<PathBuf> {
    let named = named.map(|path| std::path::absolute(&path).unwrap_or(path));
    named.or_else(|| Some(PathBuf::from(POLICY)).filter(|path| uid == 0 && path.exists()))
}

/// The variables that the operator gives to plugins, by their names.
fn variables(config: &Config) -> Vec<Variable> {
    let of = |(plugin, settings): (&PluginName, &PluginConfig)| {
        let names: Vec<VariableName> = settings.environment.keys().chain(&settings.unset).cloned().collect();
        names.into_iter().map(|name| Variable { plugin: plugin.clone(), name }).collect::<Vec<_>>()
    };
    config.plugins.iter().flat_map(of).collect()
}

/// Prepares everything. Must be called while the process has one thread.
pub fn prepare(args: Args) -> Result<Prepared, StartError> {
    let Args { config, runtime_directory, state_directory, launcher, launcher_socket, launcher_policy } = args;
    open_files::raise();
    let surroundings = Surroundings::of_process();
    let (mut config, mut problems) = Config::read(config.as_deref(), &surroundings)?;
    if let Some(path) = runtime_directory {
        config.supervisor.runtime_directory = std::path::absolute(&path).unwrap_or(path);
        config.note_flag("supervisor.runtime_directory", "--runtime-directory");
    }
    if let Some(path) = state_directory {
        config.supervisor.state_directory = std::path::absolute(&path).unwrap_or(path);
        config.note_flag("supervisor.state_directory", "--state-directory");
    }
    if let Some(path) = launcher_socket {
        config.launcher = LauncherConfig::External { socket: std::path::absolute(&path).unwrap_or(path) };
        config.note_flag("launcher.socket", "--launcher-socket");
    }
    // With what is wrong in the file, so that it is all told at once.
    let mut directories = Vec::new();
    for directory in &config.directories {
        match PluginDirectory::open(directory) {
            Ok(open) => directories.push(open),
            Err(error) => problems.push(examine::at(&config, format!("directory[{}].path", directory.index), &error)),
        }
    }
    problems.sort_by_key(|problem| problem.line);
    let config = config.without(problems)?;
    let owner = if surroundings.uid == 0 { Some(privileges::find(&config.supervisor.user)?) } else { None };
    let program = launcher.map_or_else(launcher::beside_this_program, Ok)?;

    // From here on others see something; each guard takes its own away again when a later step fails.
    let runtime_directory = RuntimeDirectory::open(&config.supervisor.runtime_directory, owner)?;
    let state_directory = StateDirectory::open(&config.supervisor.state_directory, owner)?;
    let log_directory = Some(config.log_directory()).filter(|_| config.logs.files.files > 0);
    let logs = log_directory.map(|path| LogDirectory::open(&path, owner)).transpose()?;
    let launcher = match &config.launcher {
        LauncherConfig::Embedded { linger } => {
            let root = |directory: &PluginDirectory| BundleRoot {
                tier: directory.tier().into(),
                path: directory.path().to_owned(),
            };
            let roots = directories.iter().map(root).collect();
            // The launcher wants a path without links; the directory itself was opened without following one.
            let path = runtime_directory.path();
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            let own = launcher::Own {
                store: (surroundings.uid == 0).then(|| config.launcher_store()),
                policy: policy(launcher_policy, surroundings.uid),
                config_root: Some(config.config_root.clone()),
                data_root: Some(config.data_root()),
                variables: variables(&config),
            };
            Ok(Link::embedded(&program, &path, roots, *linger, own)?)
        }
        LauncherConfig::External { socket } => Err(socket.clone()),
    };
    let mut allowed = BTreeSet::from([0, surroundings.uid]);
    allowed.extend(owner.map(|owner| owner.uid));
    let dropped = owner.map_or(Ok(()), |owner| privileges::drop_to(&config.supervisor.user, owner));
    // Read by an unprivileged process. What does not start here stops nothing: no plugin was launched or told to end.
    let state = dropped.map_err(StartError::from).and_then(|()| Ok(Opened::open(state_directory, &state::boot_id())?));
    let (state, launcher) = match (state, launcher) {
        (Ok(state), Ok(launcher)) => (state, launcher),
        // One that was started elsewhere lets in the user that the supervisor runs as.
        (Ok(state), Err(socket)) => (state, Link::external(&socket)?),
        // Whoever reads the last line alone must not miss what the launcher has said meanwhile.
        (Err(error), launcher) => {
            return Err(match launcher.is_ok_and(Link::is_refused) {
                true => StartError::LauncherConfiguration(Box::new(error)),
                false => error,
            });
        }
    };
    Ok(Prepared { config, runtime_directory, allowed, directories, state, logs, launcher })
}
