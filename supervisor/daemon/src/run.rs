//! The running supervisor: everything that was prepared is put together, served, and taken down in order.

mod edges;
mod running;
mod signals;
mod tell;

use std::{collections::BTreeSet, io, time::Duration};

use self::{
    running::{Parts, Running},
    signals::Signals,
};
use crate::{
    broker::StartError,
    config::{Config, LauncherConfig},
    discovery::PluginDirectory,
    ingress::IngressError,
    launcher::{self, LauncherError, Link, Tie},
    listeners::{Holding, ListenError},
    logs::LogDirectory,
    runtime_directory::RuntimeDirectory,
    state::Opened,
    traces::ExportError,
};

/// How long the launcher may take to end after its connection is closed.
const LAUNCHER_PATIENCE: Duration = Duration::from_secs(10);

/// Everything that was opened, bound and started while the process had one thread.
#[derive(Debug)]
pub struct Prepared {
    /// The configuration.
    pub config: Config,
    /// Locked.
    pub runtime_directory: RuntimeDirectory,
    /// Users that may use the sockets.
    pub allowed: BTreeSet<u32>,
    /// The configured directories.
    pub directories: Vec<PluginDirectory>,
    /// What earlier supervisors remembered.
    pub state: Opened,
    /// Where what plugins print is kept, if it is.
    pub logs: Option<LogDirectory>,
    /// The plugins' parent.
    pub launcher: Link,
}

/// Why the supervisor ended other than by being asked to.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Signals, or a listener.
    #[error("the system refused what the supervisor needs: {0}; check the limit on open files")]
    Io(#[from] io::Error),
    /// The launcher refused the first requests.
    #[error("the launcher cannot be asked: {0}; install plugvisord and plugvisor-launcher together")]
    Launcher(#[from] LauncherError),
    /// The broker did not start.
    #[error(transparent)]
    Broker(#[from] StartError),
    /// Traces cannot be sent where the configuration says.
    #[error(transparent)]
    Traces(#[from] ExportError),
    /// The sockets that others know.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Where others reach a plugin.
    #[error(transparent)]
    Ingress(#[from] IngressError),
    /// The launcher does not start with what it was given.
    #[error(
        "the launcher refused how it was started: correct what it says above, from the line on that begins with \
         plugvisor-launcher, then start plugvisord again"
    )]
    LauncherConfiguration,
    /// The launcher could not start.
    #[error(
        "the launcher did not start ({0}): see what it says above; if it says nothing, install plugvisord and \
         plugvisor-launcher together"
    )]
    LauncherStart(String),
    /// The launcher ended by itself, and every plugin with it.
    #[error("the launcher ended: {0}; every plugin has ended with it; start plugvisord again and report this as a bug")]
    LauncherLost(String),
}

impl RunError {
    /// The exit status: 78 when a configuration must be changed, 74 when the host refused something.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::LauncherConfiguration => 78,
            Self::Io(_)
            | Self::Launcher(_)
            | Self::Broker(_)
            | Self::Traces(_)
            | Self::Listen(_)
            | Self::Ingress(_)
            | Self::LauncherStart(_)
            | Self::LauncherLost(_) => 74,
        }
    }
}

/// Runs until it is asked to stop or cannot go on. Leaves no process, cgroup, socket or file behind, unless the launcher
/// was started elsewhere: then plugins run on, and the sockets stay for the next supervisor.
pub async fn run(prepared: Prepared) -> Result<(), RunError> {
    let Prepared {
        config,
        mut runtime_directory,
        allowed,
        directories,
        state: opened,
        logs,
        launcher: Link { connection, tie, since },
    } = prepared;
    let holding = match (&config.launcher, &tie) {
        (LauncherConfig::Embedded { linger }, Tie::Started(_)) if linger.is_zero() => Holding::NotHeld,
        (LauncherConfig::Embedded { .. } | LauncherConfig::External { .. }, _) => Holding::Held,
    };
    let mut signals = Signals::new()?;
    let (store, remembered, closing_state) = opened.start()?;
    let result = async {
        let parts = Parts {
            config,
            allowed,
            directories,
            logs,
            runtime_directory: &mut runtime_directory,
            connection,
            since,
            holding,
            store: &store,
            remembered,
        };
        let running = Running::start(parts).await?;
        let lost = running.until_stopped(&mut signals).await;
        running.stop(lost, &tie, holding, &mut signals).await
    }
    .await;
    // Everything has been noted by now: no driver is left.
    let _ = tokio::task::spawn_blocking(move || closing_state.close()).await;
    // By now nothing holds the connection, whatever happened above. A launcher that outlives this supervisor keeps the
    // sockets, and plugins if there are any; any other ends by itself.
    let ended = match &result {
        Ok(()) => tie.ends_with_us(),
        Err(RunError::LauncherLost(_) | RunError::LauncherStart(_)) => true,
        Err(_) => holding == Holding::NotHeld,
    };
    let mut result = result;
    let removed = if ended {
        match tokio::task::spawn_blocking(move || tie.wait(LAUNCHER_PATIENCE)).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(status)))
                if status.code() == Some(launcher::CONFIGURATION)
                    && matches!(result, Err(RunError::LauncherStart(_))) =>
            {
                result = Err(RunError::LauncherConfiguration);
            }
            Ok(Ok(Some(status))) => tracing::warn!(%status, "the launcher did not end cleanly"),
            Ok(Err(error)) if error.kind() == io::ErrorKind::TimedOut => {
                tracing::error!("the launcher still runs; see its messages above");
            }
            other => tracing::warn!(?other, "the launcher's end is not known"),
        }
        runtime_directory.remove()
    } else {
        runtime_directory.leave()
    };
    if let Err(error) = removed {
        tracing::warn!(%error, "the runtime directory was not cleaned up");
    }
    tracing::info!("plugvisord has stopped");
    result
}
