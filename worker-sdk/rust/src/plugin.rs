//! What an author writes: the [`Plugin`] trait and the values in its signatures.

use std::{error::Error, fmt, future::Future, sync::Arc};

use serde::{Deserialize, de::DeserializeOwned};

use crate::{Host, Services};

/// A plugin.
///
/// The methods may be written as `async fn`. Only [`start`](Plugin::start) and [`services`](Plugin::services) are needed.
pub trait Plugin: Sized + Send + Sync + 'static {
    /// The configuration: the manifest's defaults overlaid with the operator's. What does not fit the type refuses the
    /// load with an error naming the key. Use `#[serde(deny_unknown_fields)]` so that a misspelt key is an error too, and
    /// [`NoConfig`] when there is nothing to configure.
    type Config: DeserializeOwned + Send + 'static;

    /// Makes the plugin ready to be called. An error refuses the load; the supervisor limits the time.
    fn start(config: Self::Config, host: Host) -> impl Future<Output = Result<Self, StartError>> + Send;

    /// Adds the gRPC services that the plugin serves. Called once, after `start`.
    fn services(self: Arc<Self>, services: &mut Services);

    /// Takes a new configuration while running. The default says that this plugin cannot, and the old one stays.
    fn reconfigure(&self, config: Self::Config) -> impl Future<Output = Result<(), ReconfigureError>> + Send {
        let _ = config;
        async { Err(ReconfigureError::Unsupported) }
    }

    /// No new call will come. The SDK waits for the calls in flight by itself; finish other work here.
    fn drain(&self) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// The process is about to end. Called once, after draining.
    fn stop(&self, reason: StopReason) -> impl Future<Output = ()> + Send {
        let _ = reason;
        async {}
    }

    /// A lifecycle notice that the manifest asked for in `events.lifecycle`.
    fn hook(&self, hook: Hook) -> impl Future<Output = ()> + Send {
        let _ = hook;
        async {}
    }
}

/// The configuration of a plugin that has none: anything but an empty one is an error.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoConfig {}

/// Why a plugin did not start.
///
/// Any other error becomes [`StartError::Failed`] with `?`; this is why the type is not itself an [`Error`].
#[derive(Debug)]
#[non_exhaustive]
pub enum StartError {
    /// The configuration cannot work, now or later: names the key and what is wrong. The process exits with 78 when it
    /// ends, so that it is not restarted.
    Configuration(String),
    /// Something failed that may work another time.
    Failed(Box<dyn Error + Send + Sync>),
}

impl StartError {
    /// A configuration error: `key` as the operator wrote it, and what is wrong with its value.
    pub fn configuration(key: &str, problem: impl fmt::Display) -> Self {
        Self::Configuration(format!("{key}: {problem}"))
    }
}

impl<E: Into<Box<dyn Error + Send + Sync>>> From<E> for StartError {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Configuration(problem) => write!(formatter, "configuration: {problem}"),
            Self::Failed(error) => {
                write!(formatter, "{error}")?;
                let mut source = error.source();
                while let Some(cause) = source {
                    write!(formatter, ": {cause}")?;
                    source = cause.source();
                }
                Ok(())
            }
        }
    }
}

/// Why a new configuration was not taken; the old one stays in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReconfigureError {
    /// The plugin takes its configuration only at its start.
    #[error("this plugin takes its configuration only at its start; restart it")]
    Unsupported,
    /// The configuration cannot work: names the key and what is wrong.
    #[error("configuration: {0}")]
    Invalid(String),
}

/// Why the process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StopReason {
    /// The plugin is being unloaded.
    Unload,
    /// It will be started again.
    Restart,
    /// The supervisor stops.
    Shutdown,
    /// A signal came without a reason, or with one that this version does not know.
    Unknown,
}

/// A lifecycle notice.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Hook {
    /// Before the plugin is routed to.
    BeforeLoad,
    /// The plugin is routed to.
    AfterLoad,
    /// The plugin is about to be unloaded.
    BeforeUnload,
    /// Something about this plugin failed.
    OnError {
        /// The stable code of what failed.
        code: String,
        /// The text of what failed.
        message: String,
    },
}
