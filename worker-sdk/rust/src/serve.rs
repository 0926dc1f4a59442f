//! The `main` of a plugin: environment, runtime, signals, exit code.

use std::{future::pending, io, path::Path, process::ExitCode, time::Duration};

use plugvisor_client::Client;
use serde_json::Value;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    Plugin,
    control::Init,
    listen::{Environment, Incoming},
    log,
    run::{Assembly, Limits},
};

/// `EX_CONFIG` of sysexits.h: a fault that a restart does not cure; the supervisor does not restart after it.
const EXIT_CONFIGURATION: u8 = 78;
/// `EX_OSERR` of sysexits.h.
const EXIT_SYSTEM: u8 = 71;

/// Which threads run the plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Runtime {
    /// One thread: the shortest way from a call to its answer. Long computations belong in `tokio::task::spawn_blocking`.
    CurrentThread,
    /// This many threads.
    MultiThread(usize),
}

/// How a plugin is served.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    runtime: Runtime,
    blocking_threads: usize,
    drain: Duration,
    concurrent_calls: u32,
}

impl Default for Options {
    /// One thread, 4 more for blocking work, 5 s to drain, 1024 calls at the same time.
    fn default() -> Self {
        Self {
            runtime: Runtime::CurrentThread,
            blocking_threads: 4,
            drain: Duration::from_secs(5),
            concurrent_calls: 1024,
        }
    }
}

impl Options {
    /// The threads that serve calls.
    #[must_use]
    pub fn runtime(mut self, runtime: Runtime) -> Self {
        self.runtime = runtime;
        self
    }

    /// The most threads for `spawn_blocking`, at least 1. They count against the plugin's limit of processes.
    #[must_use]
    pub fn blocking_threads(mut self, threads: usize) -> Self {
        self.blocking_threads = threads.max(1);
        self
    }

    /// How long SIGTERM waits for the calls in flight. Keep it below the supervisor's own grace.
    #[must_use]
    pub fn drain(mut self, limit: Duration) -> Self {
        self.drain = limit;
        self
    }

    /// The most calls at the same time on one connection; more wait at the caller's side.
    #[must_use]
    pub fn concurrent_calls(mut self, calls: u32) -> Self {
        self.concurrent_calls = calls;
        self
    }
}

/// Serves the plugin until the supervisor ends it: return it from `main`.
///
/// Exit codes: 0 after SIGTERM or SIGINT; 78 when the environment or the configuration can never work; 71 when the
/// system failed.
///
/// Alone, without a supervisor, `PLUGVISOR_LISTEN=/tmp/plugin.sock` names the socket to bind, `PLUGVISOR_CONFIG` a JSON
/// file with the configuration, and `PLUGVISOR_BROKER` the socket that calls go to.
pub fn serve<P: Plugin>() -> ExitCode {
    serve_with::<P>(Options::default())
}

/// [`serve`] with other options.
pub fn serve_with<P: Plugin>(options: Options) -> ExitCode {
    let environment = Environment::read();
    log::install(&environment);
    match serve_in::<P>(options, &environment) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let (Failure::Permanent(message) | Failure::System(message)) = &failure;
            tracing::error!("{message}");
            ExitCode::from(match failure {
                Failure::Permanent(_) => EXIT_CONFIGURATION,
                Failure::System(_) => EXIT_SYSTEM,
            })
        }
    }
}

enum Failure {
    Permanent(String),
    System(String),
}

fn serve_in<P: Plugin>(options: Options, environment: &Environment) -> Result<(), Failure> {
    // Before the runtime, and so before any thread, because it edits the environment.
    let listener = environment.listen().map_err(|error| Failure::Permanent(error.to_string()))?;
    let mut builder = match options.runtime {
        Runtime::CurrentThread => tokio::runtime::Builder::new_current_thread(),
        Runtime::MultiThread(threads) => {
            let mut builder = tokio::runtime::Builder::new_multi_thread();
            builder.worker_threads(threads.max(1));
            builder
        }
    };
    let runtime = builder
        .enable_all()
        .max_blocking_threads(options.blocking_threads)
        .build()
        .map_err(|error| Failure::System(format!("cannot start the runtime: {error}")))?;
    let outcome = runtime.block_on(async {
        let system = |error: io::Error| Failure::System(format!("cannot prepare the plugin: {error}"));
        let mut signals = Signals::new().map_err(system)?;
        let incoming = Incoming::new(listener).map_err(system)?;
        run::<P>(options, environment, incoming, &mut signals).await
    });
    // A blocking thread that is still at work must not hold up the end.
    runtime.shutdown_background();
    outcome
}

async fn run<P: Plugin>(
    options: Options,
    environment: &Environment,
    incoming: Incoming,
    signals: &mut Signals,
) -> Result<(), Failure> {
    let client = match &environment.broker {
        Some(path) => Client::lazy(path),
        None => Client::unavailable("this plugin has no broker to call through: PLUGVISOR_BROKER is not set"),
    };
    let assembly = Assembly::<P>::new(client).await;
    if !environment.supervised {
        let init = alone(environment).map_err(Failure::Permanent)?;
        let failed = assembly.control.initialise(init).await.err();
        if let Some(status) = failed {
            let message = status.message().to_owned();
            let permanent = assembly.control.is_misconfigured();
            return Err(if permanent { Failure::Permanent(message) } else { Failure::System(message) });
        }
        tracing::info!(socket = ?environment.listen, "serving alone, without a supervisor");
    }
    let control = std::sync::Arc::clone(&assembly.control);
    let limits = Limits { drain: options.drain, streams: options.concurrent_calls };
    // One receiver, asked twice: the first signal ends in order, the second at once.
    let signals = tokio::sync::Mutex::new(signals);
    let signalled = async || signals.lock().await.next().await;
    let served = assembly.run(incoming, limits, signalled(), signalled()).await;
    served.map_err(|error| Failure::System(format!("cannot serve: {error}")))?;
    if control.is_misconfigured() {
        return Err(Failure::Permanent("the configuration was refused at Init; correct it and load the plugin".into()));
    }
    Ok(())
}

/// What Init would have said.
fn alone(environment: &Environment) -> Result<Init, String> {
    let config = match &environment.config {
        Some(path) => read_config(path)?,
        None => Value::Object(serde_json::Map::new()),
    };
    Ok(Init {
        plugin: environment.plugin.clone(),
        generation: environment.generation,
        capabilities: Vec::new(),
        config,
        limit: None,
    })
}

fn read_config(path: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| format!("cannot read {} (PLUGVISOR_CONFIG): {error}", path.display()))?;
    serde_json::from_str(&text).map_err(|error| format!("{} (PLUGVISOR_CONFIG) is not JSON: {error}", path.display()))
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The next SIGTERM or SIGINT. Safe to cancel.
    async fn next(&mut self) {
        let received = tokio::select! {
            received = self.terminate.recv() => received,
            received = self.interrupt.recv() => received,
        };
        if received.is_none() {
            // No signal can ever come again.
            pending::<()>().await;
        }
    }
}
