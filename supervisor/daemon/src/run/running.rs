//! The supervisor while it runs: put together, taken over from an earlier one, and stopped in order.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use plugvisor_core::{
    Code, Error,
    event::{ConfigEvent, SupervisorEvent},
    lifecycle::Haste,
    route::HostModule,
};
use plugvisor_sandbox::seqpacket::Seqpacket;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::{RunError, edges::Edges, signals::Signals};
use crate::{
    broker::{Broker, BrokerConfig, BrokerHandle, HostService, LocalSpec},
    calls::Calls,
    config::Config,
    discovery::PluginDirectory,
    driver::{Plugins, Shared},
    egress::{EgressHost, EgressLimits},
    events::{Events, Subject},
    fleet::Fleet,
    host_events::{HostEvents, PublishLimits},
    ingress::Ingress,
    launcher::{Inventory, Launcher, LauncherEnd, Tie},
    listeners::{self, Holding, Listeners},
    logs::{LogDirectory, LogFiles, Logs},
    runtime_directory::RuntimeDirectory,
    service,
    starts::Starts,
    state::{Snapshot, Store},
    supervisor::Supervisor,
    traces::Exporter,
};

/// How long calls that no plugin's drain has ended may take to be cut.
const BROKER_PATIENCE: Duration = Duration::from_secs(1);

/// How long who waited for this supervisor waits for what it takes over.
const ADMIT_AT_THE_LATEST: Duration = Duration::from_secs(2);

/// How long calls in flight may take to end when plugins run on without this supervisor.
const LEAVE_PATIENCE: Duration = Duration::from_secs(5);

/// What is put together.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    pub(super) config: Config,
    /// Users that may use the sockets.
    pub(super) allowed: BTreeSet<u32>,
    pub(super) directories: Vec<PluginDirectory>,
    pub(super) logs: Option<LogDirectory>,
    pub(super) runtime_directory: &'a mut RuntimeDirectory,
    /// To the launcher, and when it was made.
    pub(super) connection: Seqpacket,
    pub(super) since: std::time::Instant,
    pub(super) holding: Holding,
    pub(super) store: &'a Store,
    /// What earlier supervisors remembered.
    pub(super) remembered: Snapshot,
}

/// What runs, as far as it must be stopped.
#[derive(Debug)]
pub(super) struct Running {
    client: Launcher,
    broker: BrokerHandle,
    state: Arc<Supervisor>,
    edges: Edges,
    /// Plugins are being loaded or taken over.
    starting: JoinHandle<()>,
}

impl Running {
    /// Puts everything together and begins to serve it.
    pub(super) async fn start(parts: Parts<'_>) -> Result<Self, RunError> {
        let Parts {
            config,
            allowed,
            directories,
            logs,
            runtime_directory,
            connection,
            since,
            holding,
            store,
            remembered,
        } = parts;
        let config = Arc::new(config);
        let client = Launcher::start(connection)
            .await
            .map_err(|error| RunError::LauncherStart(format!("it did not answer the first request: {error}")))?;
        let inventory = match holding {
            Holding::Held => client.inventory().await?,
            Holding::NotHeld => Inventory::default(),
        };
        let Listeners { admin, calls: calls_listener, metrics } =
            listeners::listeners(&client, runtime_directory, &config.supervisor, holding).await?;
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

        let edges = Edges::new();
        if let Some(exporter) = exporter {
            edges.export(exporter);
        }
        edges.tell(&state, broker_events, store.health());
        edges.serve(&state, admin, allowed, metrics);
        tracing::info!(
            runtime_directory = %runtime_directory.path().display(), metrics = %metrics_address,
            launcher = client.pid(), "plugvisord serves"
        );
        service::serves();
        let starting = tokio::spawn(load(Arc::clone(&state), inventory, local, all_reattached, since));
        Ok(Self { client, broker, state, edges, starting })
    }

    /// Waits until this is to stop: because a signal says so, or because the launcher ended, and then why.
    pub(super) async fn until_stopped(&self, signals: &mut Signals) -> Option<String> {
        let mut launcher_end = self.client.end();
        tokio::select! {
            () = signals.stop() => None,
            end = launcher_end.wait_for(Option::is_some) => match end.as_deref() {
                Ok(Some(LauncherEnd::Lost(why))) => Some(why.clone()),
                _ => Some("its connection closed".to_owned()),
            },
        }
    }

    /// Stops everything in order; plugins only if their launcher ends with this supervisor.
    pub(super) async fn stop(
        self,
        lost: Option<String>,
        tie: &Tie,
        holding: Holding,
        signals: &mut Signals,
    ) -> Result<(), RunError> {
        let Self { client, broker, state, edges, starting } = self;
        service::stops();
        starting.abort();
        state.closing.cancel();
        tell_why(&state.shared.events, lost.as_deref());
        let patience = if lost.is_some() || tie.ends_with_us() {
            let haste = if lost.is_some() { Haste::Now } else { Haste::Gentle };
            stop_plugins(&state.fleet, haste, signals).await;
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
        state.shared.logs.close().await;
        edges.end().await;
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
}

/// Takes over what lives, loads the rest, and lets callers in as soon as those whom they wait for are there.
async fn load(
    state: Arc<Supervisor>,
    inventory: Inventory,
    local: LocalSpec,
    all_reattached: watch::Sender<bool>,
    since: std::time::Instant,
) {
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

/// Serves `calls.sock`.
async fn admit(state: &Supervisor, local: LocalSpec) {
    if let Err(error) = state.shared.calls.broker().add_local(local).await {
        tracing::error!(%error, "calls.sock is not served; restart plugvisord");
    }
}

/// Says why everything stops now.
fn tell_why(events: &Events, lost: Option<&str>) {
    let why = match lost {
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
}

/// Stops every plugin; at once when a signal says so again.
async fn stop_plugins(fleet: &Fleet, haste: Haste, signals: &mut Signals) {
    let (haste, hasten) = watch::channel(haste);
    let stopped = fleet.stop(hasten);
    tokio::pin!(stopped);
    tokio::select! {
        () = &mut stopped => {}
        () = signals.stop() => {
            tracing::warn!("told twice to stop: plugins are killed now");
            haste.send_replace(Haste::Now);
            stopped.await;
        }
    }
}

/// The kernel's monotonic clock began when the host was started. Moments counted from then mean the same to every
/// supervisor of one boot, and setting the wall clock moves none of them.
fn began_with_the_host() -> Instant {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let since = Duration::try_from(since).unwrap_or_default();
    let now = std::time::Instant::now();
    Instant::from_std(now.checked_sub(since).unwrap_or(now))
}
