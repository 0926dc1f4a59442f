//! One task per plugin, which owns its life.
//!
//! ```text
//!   admin, fleet ──Command──▶ ┌────────┐ ──Effect──▶ phases, probes, timers: tasks of one generation
//!                             │ Driver │                         │
//!   launcher, probes ◀────────│  step  │ ◀───────Inward──────────┘
//!                             └────────┘ ──PluginView──▶ admin, metrics, dependents
//! ```
//!
//! What happens next is decided by `plugvisor_core::lifecycle::step` alone; the driver feeds it events in the order in
//! which they happened and carries out its effects in theirs. Everything that a generation started ends with its token.

mod adopt;
mod dependencies;
mod effects;
mod exit;
mod launch;
mod load;
mod probe;
mod settings;
mod shown;
mod verify;
mod view;
mod worker;

use std::{
    collections::BTreeMap,
    hash::{BuildHasher as _, RandomState},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use plugvisor_core::{
    Error, Generation, Jitter, Time,
    event::PluginEvent,
    lifecycle::{Context, Effect, Event, Haste, Life, LifePolicy, Phase, State},
    route::Plugin as RoutePlugin,
};
use plugvisor_package::{Bundle, PluginName};
use plugvisor_sandbox::protocol::{Control, Known};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument as _;

use self::adopt::Inherited;
pub use adopt::Living;
pub(crate) use dependencies::graph;
pub(crate) use launch::check_restart;
pub(crate) use settings::rights;
pub(crate) use verify::{InVain, decide, in_vain, ungiven};
pub use view::{BundleInfo, ExitView, Figures, PluginView, ProcessView};

use self::{shown::describe, verify::Verified, worker::Worker};
use crate::{
    calls::Calls,
    config::{LoadMode, PluginConfig},
    discovery::Source,
    egress::EgressHost,
    events::Events,
    ingress::Ingress,
    launcher::{Launcher, Process},
    logs::Logs,
    meter::Meter,
    starts::{Place, Starts},
    state::{BreakerRecord, Desired, Note, PluginRecord, Store},
    traces::Tracer,
};

/// How long one hook may take.
const HOOK_PATIENCE: Duration = Duration::from_secs(5);

/// What every driver shares.
#[derive(Debug)]
pub struct Shared {
    /// The plugins' parent.
    pub launcher: Launcher,
    /// Routes and the broker.
    pub calls: Calls,
    /// Where events go.
    pub events: Arc<Events>,
    /// Where lines go.
    pub logs: Arc<Logs>,
    /// Controls that may be missing.
    pub allow_degraded: Vec<Control>,
    /// Where the operator writes the configuration, for messages.
    pub place: Arc<str>,
    /// Every plugin, for dependencies.
    pub plugins: Plugins,
    /// What the egress proxies of all plugins share.
    pub egress: Arc<EgressHost>,
    /// Where others reach plugins.
    pub ingress: Arc<Ingress>,
    /// What outlives the supervisor.
    pub state: Store,
    /// Who may start now.
    pub starts: Starts,
    /// True when what was taken over takes calls, or was waited for long enough: until then nobody who waited for a
    /// supervisor is let in, to find a provider that is not there yet.
    pub reattached: watch::Receiver<bool>,
    /// When the supervisor's clock began: with the host.
    pub began: Instant,
    /// Traces of calls, when they are sent anywhere.
    pub tracer: Option<Tracer>,
}

/// A plugin as others reach it.
#[derive(Clone, Debug)]
pub struct PluginHandle {
    /// `None` for a bundle that was rejected: there is nothing to command.
    pub commands: Option<mpsc::Sender<Command>>,
    /// What it is now.
    pub view: watch::Receiver<Arc<PluginView>>,
    /// Where its bundle lies.
    pub source: Source,
}

/// Every plugin by its name; replaced whole when one comes or goes.
pub type Plugins = Arc<ArcSwap<BTreeMap<String, PluginHandle>>>;

/// What others ask of a driver.
#[derive(Debug)]
pub enum Command {
    /// Load it. The answer is the generation to wait for.
    Load(oneshot::Sender<Result<Generation, Error>>),
    /// Stop it and keep it stopped.
    Unload(oneshot::Sender<Result<Generation, Error>>),
    /// Stop it and load it anew.
    Restart(oneshot::Sender<Result<Generation, Error>>),
    /// The supervisor stops. The driver ends when nothing of the plugin runs.
    Stop(Haste),
    /// The supervisor ends and the plugin runs on. The driver ends at once.
    Leave,
}

/// What comes back to a driver from its own tasks.
#[derive(Debug)]
enum Inward {
    /// For the lifecycle.
    Life(Event),
    /// A dependency will not come by itself.
    Blocked(Generation, Error, watch::Receiver<Arc<PluginView>>),
    /// It has come all the same.
    Unblocked(Generation),
    /// Everyone that it depends on is loaded, and it is its turn.
    Resolved(Generation, Place),
    /// A bundle was read and judged.
    Verified(Generation, Box<Verified>),
    /// A process runs.
    Launched(Generation, Box<Process>),
    /// The plugin was reached; its socket and the connection to it.
    Reached(Generation, Arc<OwnedFd>, Worker),
    /// Who waited for a supervisor is let in.
    Admit(Generation),
    /// Init is over; the SDK's name.
    Initialised(Generation, String),
}

/// What one generation holds.
struct Run {
    generation: Generation,
    cancel: CancellationToken,
    began: Instant,
    /// Until it is loaded or has failed.
    start: Option<Place>,
    verified: Option<Verified>,
    process: Option<Running>,
    /// What its process was launched as, when an earlier supervisor launched it.
    adopted: Option<Box<Known>>,
    registered: bool,
}

struct Running {
    view: Arc<ProcessView>,
    launched_at: Instant,
    deadline: Instant,
    /// The worker socket's descriptor as the launcher gave it.
    given: Arc<OwnedFd>,
    /// Where it dials the broker, until the broker has it.
    broker_listener: Option<OwnedFd>,
    /// Where it dials the egress proxy, when that was granted, until the proxy has it.
    egress: Option<OwnedFd>,
    /// What its connections with the outside share.
    meter: Option<Arc<Meter>>,
    socket: Option<Arc<OwnedFd>>,
    worker: Option<Worker>,
}

/// The task of one plugin.
pub struct Driver {
    shared: Arc<Shared>,
    name: PluginName,
    source: Source,
    config: PluginConfig,
    policy: LifePolicy,
    life: Life,
    run: Option<Run>,
    /// The bundle as discovery read it, for the first load only.
    found: Option<Bundle>,
    /// A process to take over, for the beginning only.
    living: Option<Box<Inherited>>,
    inward: mpsc::Sender<Inward>,
    received: mpsc::Receiver<Inward>,
    view: watch::Sender<Arc<PluginView>>,
    tasks: TaskTracker,
    restart: Option<CancellationToken>,
    /// The breaker of the last generation that an earlier supervisor ran.
    breaker: Option<BreakerRecord>,
    route: Option<RoutePlugin>,
    start_reason: &'static str,
    stopping: bool,
    leaving: bool,
}

impl Driver {
    /// A driver for a discovered bundle, and the handle to it. Nothing happens until [`Driver::run`].
    pub fn new(
        shared: Arc<Shared>,
        source: Source,
        bundle: Bundle,
        config: PluginConfig,
        remembered: Option<PluginRecord>,
    ) -> (Self, DriverInbox, PluginHandle) {
        let name = bundle.manifest.name.clone();
        let (commands, inbox) = mpsc::channel(16);
        let (inward, received) = mpsc::channel(64);
        let info = verify::info(&bundle);
        let PluginRecord { desired, generation, sdk, restarts, breaker, transitions } = remembered.unwrap_or_default();
        let wanted = match desired {
            Some(desired) => desired == Desired::Loaded,
            None => config.load == LoadMode::Auto,
        };
        let life = Life::remembered(name.clone(), generation, restarts);
        let view = PluginView {
            name: name.to_string(),
            state: life.state().clone(),
            since: SystemTime::now(),
            generation: life.generation(),
            restarts: life.restarts(),
            directory: source.path(),
            bundle: Some(Arc::new(info)),
            tier: source.tier(),
            verdict: None,
            process: None,
            last_error: None,
            problems: Vec::new(),
            restart_at: None,
            transitions,
            last_exit: None,
            sdk,
            wanted,
            figures: Figures {
                ingress: shared.ingress.front(&name).map(|front| front.figures()),
                ..Figures::default()
            },
        };
        let (view, seen) = watch::channel(Arc::new(view));
        let handle = PluginHandle { commands: Some(commands), view: seen, source: source.clone() };
        let driver = Self {
            shared,
            name,
            source,
            policy: settings::life(&config),
            // A plugin that is loaded by hand later is read again then; its files need not stay open until then.
            found: wanted.then_some(bundle),
            config,
            life,
            living: None,
            run: None,
            inward,
            received,
            view,
            tasks: TaskTracker::new(),
            restart: None,
            breaker,
            route: None,
            start_reason: "initial",
            stopping: false,
            leaving: false,
        };
        (driver, DriverInbox(inbox), handle)
    }

    /// Lives until the supervisor stops and nothing of the plugin runs any more.
    pub async fn run(mut self, inbox: DriverInbox) {
        let DriverInbox(mut commands) = inbox;
        let directory = self.source.path().display().to_string();
        let _ = self.apply(Event::Discovered { directory }).await;
        if let Some(inherited) = self.living.take() {
            self.take_over(*inherited).await;
        }
        let over = |this: &Self| {
            let runs = this.life.has_process() || matches!(this.life.state(), State::Loading(_));
            this.leaving || (this.stopping && !runs)
        };
        while !over(&self) {
            // Both are cancel-safe. Commands come first, so that a stop is not held up by a busy plugin.
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(command) => self.command(command).await,
                    None => self.command(Command::Stop(Haste::Gentle)).await,
                },
                Some(inward) = self.received.recv() => self.inward(inward).await,
            }
        }
        self.cancel_restart();
        if self.leaving {
            // What is left of its tasks reads pipes that go on.
            if let Some(run) = &self.run {
                run.cancel.cancel();
            }
            return;
        }
        self.forget(self.life.generation()).await;
        self.tasks.close();
        self.tasks.wait().await;
    }

    async fn command(&mut self, command: Command) {
        let (event, wanted, reply) = match command {
            Command::Load(reply) => (Event::LoadRequested, true, reply),
            Command::Unload(reply) => (Event::UnloadRequested, false, reply),
            Command::Restart(reply) => (Event::RestartRequested, true, reply),
            Command::Leave => {
                self.leaving = true;
                return;
            }
            Command::Stop(haste) => {
                self.stopping = true;
                let _ = self.apply(Event::StopRequested(haste)).await;
                return;
            }
        };
        self.view.send_if_modified(|view| {
            view.wanted != wanted && std::mem::replace(&mut Arc::make_mut(view).wanted, wanted) != wanted
        });
        if self.start_reason != "initial" || self.life.generation() != Generation::NONE {
            self.start_reason = "request";
        }
        let restart = event == Event::RestartRequested;
        let answer = self.apply(event).await.map(|()| {
            let generation = self.life.generation();
            // A restart of a running plugin begins its new generation when the old one has ended.
            let later =
                restart && !self.view.borrow().is_settled() && self.run.as_ref().is_some_and(|r| r.process.is_some());
            if later { generation.next() } else { generation }
        });
        let _ = reply.send(answer);
    }

    async fn inward(&mut self, inward: Inward) {
        match inward {
            Inward::Life(event) => {
                if let Event::RestartDue { .. } = event {
                    self.start_reason = "restart";
                }
                let _ = self.apply(event).await;
            }
            Inward::Blocked(generation, error, by) => self.blocked(generation, error, by).await,
            Inward::Unblocked(generation) => self.unblocked(generation).await,
            Inward::Resolved(generation, place) => {
                if let Some(run) = self.of(generation) {
                    run.start = Some(place);
                    self.done(generation, Phase::Resolve).await;
                }
            }
            Inward::Verified(generation, verified) => {
                self.judged(generation, *verified).await;
            }
            Inward::Launched(generation, process) => self.launched(generation, *process).await,
            Inward::Reached(generation, socket, worker) => {
                let Some(run) = self.of(generation) else { return };
                let adopted = run.adopted.is_some();
                if let Some(running) = run.process.as_mut() {
                    let ms = running.launched_at.elapsed();
                    running.socket = Some(socket);
                    running.worker = Some(worker);
                    if !adopted {
                        self.emit(PluginEvent::HandshakeOk { ms: millis(ms) });
                    }
                    self.done(generation, Phase::Handshake).await;
                }
            }
            Inward::Admit(generation) => self.admit(generation).await,
            Inward::Initialised(generation, sdk) => {
                if self.of(generation).is_some() {
                    self.shared.state.note(&self.name, Note::Sdk(sdk.clone()));
                    self.view.send_modify(|view| Arc::make_mut(view).sdk = sdk);
                    self.done(generation, Phase::Init).await;
                }
            }
        }
    }

    async fn done(&mut self, generation: Generation, phase: Phase) {
        let _ = self.apply(Event::PhaseDone { generation, phase }).await;
    }

    /// The present run, if it is of this generation: what an earlier one reports is stale.
    fn of(&mut self, generation: Generation) -> Option<&mut Run> {
        self.run.as_mut().filter(|run| run.generation == generation)
    }

    /// Feeds one event to the lifecycle and carries out what follows, until nothing does.
    async fn apply(&mut self, event: Event) -> Result<(), Error> {
        let mut next = Some(event);
        while let Some(event) = next.take() {
            self.note_exit(&event);
            let (before, cause) = (self.life.state().clone(), describe(&event));
            let history = self.life.history();
            let jitter = Jitter::from_bits(RandomState::new().hash_one(self.life.generation().0));
            let now = Time::after_start(self.shared.began.elapsed());
            let context = Context { now, jitter, policy: &self.policy };
            let effects = match self.life.apply(event, context) {
                Ok(effects) => effects,
                Err(refused) => {
                    let event = PluginEvent::Refused { request: refused.request, state: refused.state };
                    self.emit(event);
                    return Err(refused.error);
                }
            };
            if self.life.history() != history {
                self.shared.state.note(&self.name, Note::Restarts(self.life.history()));
            }
            // What is told comes after what is shown: who hears of an event finds the state that it speaks of. A step
            // that ends one generation and begins the next speaks of the old one until it is forgotten.
            let mut about = self.life.generation();
            if let Some(Effect::Forget { generation }) = effects.iter().find(|e| matches!(e, Effect::Forget { .. })) {
                about = *generation;
            }
            let mut told = Vec::new();
            for effect in effects {
                match effect {
                    Effect::Emit(event) => told.push((about, event)),
                    effect => {
                        if matches!(effect, Effect::Forget { .. }) {
                            about = self.life.generation();
                        }
                        // Only Handshake and Register may answer at once; they are the last effects of their step.
                        next = next.or(self.carry_out(effect).await);
                    }
                }
            }
            self.route().await;
            self.publish(&before, cause);
            for (generation, event) in told {
                self.tell(generation, event);
            }
        }
        Ok(())
    }

    /// Runs a task of this generation; what it returns comes back, unless the generation is forgotten first.
    fn spawn(&mut self, generation: Generation, work: impl Future<Output = Option<Inward>> + Send + 'static) {
        if let Some(run) = self.of(generation) {
            let cancel = run.cancel.clone();
            self.spawn_until(cancel, generation, work);
        }
    }

    fn spawn_until(
        &self,
        cancel: CancellationToken,
        generation: Generation,
        work: impl Future<Output = Option<Inward>> + Send + 'static,
    ) {
        let inward = self.inward.clone();
        let span = tracing::info_span!("plugin", plugin = %self.name, %generation);
        self.tasks.spawn(
            async move {
                if let Some(Some(found)) = cancel.run_until_cancelled(work).await {
                    let _ = inward.send(found).await;
                }
            }
            .instrument(span),
        );
    }
}

/// The commands that a driver will read.
#[derive(Debug)]
pub struct DriverInbox(mpsc::Receiver<Command>);

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
