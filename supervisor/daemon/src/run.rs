//! The running supervisor: everything that was prepared is put together, served, and taken down in order.

use std::{collections::BTreeSet, io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use plugvisor_core::{
    Code, Error, Time,
    event::{BreakerEvent, BrokerEvent as DomainEvent, ConfigEvent, SupervisorEvent},
    lifecycle::Haste,
    route::{HostModule, Reason, Refusal},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, watch},
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admin,
    broker::{
        Broker, BrokerConfig, BrokerEvent, CallerIdentity, HostService, LocalSpec, PluginIdentity, Sender, StartError,
    },
    calls::Calls,
    config::{Config, LauncherConfig},
    discovery::PluginDirectory,
    driver::{Plugins, Shared},
    egress::{EgressHost, EgressLimits},
    events::{Events, Subject},
    fleet::Fleet,
    host_events::{HostEvents, PublishLimits},
    ingress::{Ingress, IngressError},
    launcher::{self, Inventory, Launcher, LauncherEnd, LauncherError, Link, Tie},
    listeners::{self, Holding, ListenError, Listeners},
    logs::{LogDirectory, LogFiles, Logs},
    observe::{self, ServerLimits},
    runtime_directory::RuntimeDirectory,
    service,
    starts::Starts,
    state::{self, BreakerRecord, Note, Opened},
    supervisor::Supervisor,
    traces::{ExportError, Exporter},
};

/// How long calls that no plugin's drain has ended may take to be cut.
const BROKER_PATIENCE: Duration = Duration::from_secs(1);

/// How long who waited for this supervisor waits for what it takes over.
const ADMIT_AT_THE_LATEST: Duration = Duration::from_secs(2);

/// How long calls in flight may take to end when plugins run on without this supervisor.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

/// How long answers under way may take once everything has stopped.
const EDGE_PATIENCE: Duration = Duration::from_secs(1);

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
        let config = Arc::new(config);
        let client = Launcher::start(connection)
            .await
            .map_err(|error| RunError::LauncherStart(format!("it did not answer the first request: {error}")))?;
        let inventory = match holding {
            Holding::Held => client.inventory().await?,
            Holding::NotHeld => Inventory::default(),
        };
        let Listeners { admin, calls: calls_listener, metrics } =
            listeners::listeners(&client, &mut runtime_directory, &config.supervisor, holding).await?;
        let events = Arc::new(Events::new());
        let started = SupervisorEvent::Started { version: env!("CARGO_PKG_VERSION").into(), pid: std::process::id() };
        events.publish(Subject::Supervisor, started);
        let file = config.file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
        events.publish(Subject::Supervisor, ConfigEvent::Loaded { file });
        let ingress = Ingress::bind(&client, &config.plugins, &inventory.held, holding, &events).await?;
        let ingress = Arc::new(ingress);
        let features = client.probe().await?;

        let plugins: Plugins = Arc::new(ArcSwap::default());
        let module = HostEvents::new(Arc::clone(&events), Arc::clone(&plugins), PublishLimits::default()).into_server();
        let modules = vec![HostService::new(HostModule::Events, module)];
        let (tracer, exporter) = config.traces.clone().map(Exporter::new).transpose()?.unzip();
        let settings = BrokerConfig { tracer: tracer.clone(), ..BrokerConfig::default() };
        let (broker, broker_events) = Broker::start(settings, modules)?;
        let local = LocalSpec { listener: calls_listener.into(), allowed_uids: allowed.iter().copied().collect() };
        let (all_reattached, reattached) = watch::channel(false);

        let files =
            logs.map(|directory| LogFiles::start(directory, config.logs.files, Arc::clone(&events))).transpose()?;
        let logs = Arc::new(Logs::new(config.logs.lines, Arc::clone(&events), files));
        let shared = Arc::new(Shared {
            launcher: client.clone(),
            calls: Calls::start(broker.clone()),
            events: Arc::clone(&events),
            logs: Arc::clone(&logs),
            allow_degraded: config.supervisor.allow_degraded.iter().copied().collect(),
            place: config.place(),
            plugins,
            egress: Arc::new(EgressHost::new(EgressLimits::default())),
            ingress: Arc::clone(&ingress),
            state: store.clone(),
            starts: Starts::new(config.supervisor.parallel_starts),
            reattached,
            began: began_with_the_host(),
            tracer,
        });
        let metrics_address = metrics.local_addr()?;
        let fleet = Fleet::new(Arc::clone(&shared), Arc::clone(&config), directories, remembered.plugins);
        let calls_socket = runtime_directory.path().join("calls.sock");
        let state = Arc::new(Supervisor::new(config, shared, fleet, features, metrics_address, calls_socket));

        let edges = TaskTracker::new();
        let edges_end = CancellationToken::new();
        if let Some(exporter) = exporter {
            edges.spawn(exporter.run(edges_end.clone()));
        }
        edges.spawn(pump(Arc::clone(&state), broker_events));
        edges.spawn({
            let (events, health, end) = (Arc::clone(&events), store.health(), edges_end.clone());
            async move { end.run_until_cancelled(tell_of_state(&events, health)).await.unwrap_or(()) }
        });
        edges.spawn({
            let end = edges_end.clone();
            async move { end.run_until_cancelled(service::lives()).await.unwrap_or(()) }
        });
        edges.spawn({
            let (ingress, end) = (Arc::clone(&ingress), edges_end.clone());
            async move { end.run_until_cancelled(ingress.serve()).await.unwrap_or(()) }
        });
        edges.spawn({
            let serving = admin::serve(admin, Arc::clone(&state), allowed, edges_end.clone());
            async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the admin socket is no longer served");
                }
            }
        });
        edges.spawn({
            let serving = observe::serve(metrics, Arc::clone(&state), ServerLimits::default(), edges_end.clone());
            async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the metrics page is no longer served");
                }
            }
        });
        tracing::info!(
            runtime_directory = %runtime_directory.path().display(), metrics = %metrics_address,
            launcher = client.pid(), "plugvisord serves"
        );
        service::serves();
        let starting = tokio::spawn({
            let state = Arc::clone(&state);
            async move {
                let nobody_lives = inventory.launches.is_empty();
                if nobody_lives {
                    all_reattached.send_replace(true);
                    admit(&state, local).await;
                    state.fleet.discover(inventory).await;
                } else {
                    let found = state.fleet.discover(inventory).await;
                    let reattached = state.fleet.until_reattached(&found);
                    tokio::pin!(reattached);
                    let early = timeout(ADMIT_AT_THE_LATEST, &mut reattached).await;
                    // Who waited in the queues finds everybody there.
                    all_reattached.send_replace(true);
                    admit(&state, local).await;
                    let plugins = match early {
                        Ok(plugins) => plugins,
                        Err(_late) => reattached.await,
                    };
                    state.set_reattached(plugins, since.elapsed());
                }
                state.fleet.until_ready().await;
                state.set_ready(true);
            }
        });

        let mut launcher_end = client.end();
        let lost = tokio::select! {
            () = signals.stop() => None,
            end = launcher_end.wait_for(Option::is_some) => match end.as_deref() {
                Ok(Some(LauncherEnd::Lost(why))) => Some(why.clone()),
                _ => Some("its connection closed".to_owned()),
            },
        };
        service::stops();
        starting.abort();
        state.closing.cancel();
        let why = match &lost {
            None => "signal",
            Some(why) => {
                let error = Error::new(
                    Code::LauncherLost,
                    format!("the launcher ended: {why}; every plugin has ended with it"),
                    "start plugvisord again, and report this as a bug",
                );
                events.publish(Subject::Supervisor, SupervisorEvent::LauncherLost { error });
                "launcher_lost"
            }
        };
        events.publish(Subject::Supervisor, SupervisorEvent::Stopping { why });
        let patience = if lost.is_some() || tie.ends_with_us() {
            let (haste, hasten) = watch::channel(if lost.is_some() { Haste::Now } else { Haste::Gentle });
            let stopped = state.fleet.stop(hasten);
            tokio::pin!(stopped);
            tokio::select! {
                () = &mut stopped => {}
                () = signals.stop() => {
                    tracing::warn!("told twice to stop: plugins are killed now");
                    haste.send_replace(Haste::Now);
                    stopped.await;
                }
            }
            BROKER_PATIENCE
        } else {
            tracing::info!("plugins run on: their launcher was started elsewhere and goes on without a supervisor");
            LEAVE_PATIENCE
        };
        state.stopped.cancel();
        let cut = tokio::select! {
            cut = broker.stop(patience) => cut.unwrap_or(0),
            () = signals.stop() => broker.stop(Duration::ZERO).await.unwrap_or(0),
        };
        state.fleet.leave().await;
        if cut > 0 {
            tracing::warn!(cut, "calls in flight were cut");
        }
        logs.close().await;
        edges_end.cancel();
        edges.close();
        if timeout(EDGE_PATIENCE, edges.wait()).await.is_err() {
            tracing::debug!("a client kept an answer open; its connection is closed");
        }
        if holding == Holding::Held && tie.ends_with_us() && lost.is_none() {
            // Whatever its linger: that is for a supervisor that did not stop but died.
            if let Err(error) = client.end_with_us().await {
                tracing::warn!(%error, "the launcher was not told to end; it does so when its linger has passed");
            }
        }
        client.close();
        match lost {
            None => Ok(()),
            Some(why) => Err(RunError::LauncherLost(why)),
        }
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

/// The kernel's monotonic clock began when the host was started. Moments counted from then mean the same to every
/// supervisor of one boot, and setting the wall clock moves none of them.
fn began_with_the_host() -> Instant {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let since = Duration::try_from(since).unwrap_or_default();
    let now = std::time::Instant::now();
    Instant::from_std(now.checked_sub(since).unwrap_or(now))
}

/// What becomes of the state directory becomes events.
async fn tell_of_state(events: &Events, mut health: watch::Receiver<state::Health>) {
    let (mut rebuilt, mut works) = (None, true);
    loop {
        let now = health.borrow_and_update().clone();
        if now.rebuilt != rebuilt {
            if let Some(state::Rebuilt { moved_to, why }) = &now.rebuilt {
                let (moved_to, why) = (moved_to.display().to_string(), why.clone());
                events.publish(Subject::Supervisor, SupervisorEvent::StateRebuilt { moved_to, why });
            }
            rebuilt = now.rebuilt;
        }
        match now.writing {
            state::Writing::Fails { cause, why, since: _ } => {
                events.publish(Subject::Supervisor, SupervisorEvent::StateReadOnly { why, cause });
                works = false;
            }
            state::Writing::Works if !works => {
                events.publish(Subject::Supervisor, SupervisorEvent::StateRecovered {});
                works = true;
            }
            state::Writing::Works => {}
        }
        if health.changed().await.is_err() {
            return;
        }
    }
}

/// Serves `calls.sock`.
async fn admit(state: &Supervisor, local: LocalSpec) {
    if let Err(error) = state.shared.calls.broker().add_local(local).await {
        tracing::error!(%error, "calls.sock is not served; restart plugvisord");
    }
}

/// What the broker noticed becomes events.
async fn pump(state: Arc<Supervisor>, mut noticed: mpsc::Receiver<BrokerEvent>) {
    let of = |identity: &PluginIdentity| Subject::Generation(identity.name.clone(), identity.generation);
    let events = &state.shared.events;
    while let Some(event) = noticed.recv().await {
        match event {
            BrokerEvent::BreakerChanged { provider, transition, memory } => {
                let now = Time::after_start(state.shared.began.elapsed());
                let record = BreakerRecord::of(provider.generation, memory, now);
                state.shared.state.note(&provider.name, Note::Breaker(record));
                state.note_breaker(&provider.name, &transition);
                events.publish(of(&provider), BreakerEvent::from(transition));
            }
            BrokerEvent::ProviderLost { provider, detail, in_flight } => {
                tracing::warn!(plugin = %provider, %detail, in_flight, "the broker lost its connection to a plugin");
            }
            BrokerEvent::ProviderProtocolError { provider, detail } => {
                let peer = provider.name.to_string();
                events.publish(of(&provider), DomainEvent::ProtocolError { peer, detail });
            }
            BrokerEvent::CallerRejected { caller, detail } => {
                events.publish(Subject::Supervisor, DomainEvent::ProtocolError { peer: caller, detail });
            }
            BrokerEvent::CallDenied { caller, service, refusal } => {
                let subject = match &caller {
                    CallerIdentity::Plugin(plugin) => of(plugin),
                    CallerIdentity::Local { .. } => Subject::Supervisor,
                };
                let Refusal { reason, message, hint } = refusal;
                let event = if reason == Reason::Loop {
                    DomainEvent::LoopRejected { path: message }
                } else {
                    DomainEvent::CallDenied { caller: caller.label(), service, denial: reason.as_str(), message, hint }
                };
                events.publish(subject, event);
            }
            BrokerEvent::MessageTooLarge { provider, caller, sender, size: _, limit } => {
                let sender = match sender {
                    Sender::Caller => caller,
                    Sender::Provider => provider.name.to_string(),
                };
                events.publish(of(&provider), DomainEvent::PayloadRejected { sender, limit_bytes: limit.into() });
            }
        }
    }
}

/// SIGTERM and SIGINT stop; SIGHUP is answered with what it cannot do yet.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for a signal to stop. Cancel-safe: a signal is taken only when it is returned.
    async fn stop(&mut self) {
        loop {
            tokio::select! {
                _ = self.terminate.recv() => return,
                _ = self.interrupt.recv() => return,
                _ = self.hang_up.recv() => {
                    tracing::warn!("SIGHUP: this version cannot reload its configuration; restart plugvisord");
                }
            }
        }
    }
}
