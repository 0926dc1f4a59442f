//! What the lifecycle orders, carried out: phases begun, plugins drained, ended and forgotten.

use std::{sync::Arc, time::Duration};

use plugvisor_core::{
    Generation,
    event::BrokerEvent,
    lifecycle::{Effect, Event, Phase},
};
use plugvisor_proto::worker::v1::LifecycleHook;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::{Driver, HOOK_PATIENCE, Inward, Run, probe::Prober, settings, worker::Worker};
use crate::{broker::PluginIdentity, state::Note};

impl Driver {
    pub(super) async fn carry_out(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Begin { generation, phase } => return self.begin(generation, phase).await,
            Effect::Withdraw { generation } => {
                self.set_ready(generation, false).await;
                self.admit_connections(generation, false);
                self.emit_services(|service| BrokerEvent::ServiceWithdrawn { service });
            }
            Effect::Restore { generation } => {
                self.set_ready(generation, true).await;
                self.admit_connections(generation, true);
                self.emit_services(|service| BrokerEvent::ServiceRegistered { service });
            }
            Effect::Drain { generation, time } => self.drain(generation, time),
            Effect::Terminate { generation, grace, why } => self.terminate(generation, grace, why),
            Effect::Kill { generation } => self.kill(generation),
            Effect::ScheduleRestart { generation, delay } => {
                let cancel = CancellationToken::new();
                self.restart = Some(cancel.clone());
                self.spawn_until(cancel, generation, async move {
                    sleep(delay).await;
                    Some(Inward::Life(Event::RestartDue { generation }))
                });
            }
            Effect::CancelRestart => self.cancel_restart(),
            Effect::Emit(event) => self.tell(self.life.generation(), event),
            Effect::Forget { generation } => self.forget(generation).await,
        }
        None
    }

    pub(super) fn cancel_restart(&mut self) {
        if let Some(restart) = self.restart.take() {
            restart.cancel();
        }
    }

    pub(super) async fn begin(&mut self, generation: Generation, phase: Phase) -> Option<Event> {
        match phase {
            Phase::Resolve => {
                self.cancel_restart();
                self.shared.state.note(&self.name, Note::Begun(generation));
                self.run = Some(Run {
                    generation,
                    cancel: CancellationToken::new(),
                    began: Instant::now(),
                    start: None,
                    verified: None,
                    process: None,
                    adopted: None,
                    registered: false,
                });
                self.begin_resolve(generation);
            }
            Phase::Verify => self.begin_verify(generation),
            Phase::Launch => self.begin_launch(generation),
            Phase::Handshake => return self.begin_handshake(generation).await,
            Phase::Init => self.begin_init(generation),
            Phase::Register => return Some(self.register(generation).await),
        }
        None
    }

    pub(super) fn drain(&mut self, generation: Generation, time: Duration) {
        let (broker, identity) = (self.shared.calls.broker().clone(), self.identity(generation));
        let worker = self.worker(generation);
        let before_unload = self.hook_wanted(|hooks| hooks.before_unload);
        self.spawn(generation, async move {
            if let (Some(worker), true) = (&worker, before_unload) {
                report_hook(worker, LifecycleHook::BeforeUnload).await;
            }
            let asked = async {
                match &worker {
                    Some(worker) => worker.drain(time).await.unwrap_or(0),
                    None => 0,
                }
            };
            let (left, said) = tokio::join!(broker.drain(&identity, time), asked);
            let left = left.map_or(0, |drained| u32::try_from(drained.in_flight).unwrap_or(u32::MAX));
            Some(Inward::Life(Event::Drained { generation, inflight_left: left.max(said) }))
        });
    }

    pub(super) fn terminate(&mut self, generation: Generation, grace: Duration, why: &'static str) {
        let Some(launch) = self.of(generation).and_then(|run| Some(run.process.as_ref()?.view.launch)) else { return };
        let (worker, launcher) = (self.worker(generation), self.shared.launcher.clone());
        self.spawn(generation, async move {
            let until = Instant::now() + grace;
            if let Some(worker) = worker {
                worker.stop(why, grace, grace.min(Duration::from_secs(2))).await;
            }
            if let Err(error) = launcher.signal(launch, nix::sys::signal::Signal::SIGTERM as i32).await {
                tracing::debug!(%error, "SIGTERM was not sent; the process may have ended");
            }
            tokio::time::sleep_until(until).await;
            Some(Inward::Life(Event::GracePassed { generation }))
        });
    }

    pub(super) fn kill(&mut self, generation: Generation) {
        let Some(launch) = self.of(generation).and_then(|run| Some(run.process.as_ref()?.view.launch)) else { return };
        let launcher = self.shared.launcher.clone();
        self.spawn(generation, async move {
            if let Err(error) = launcher.kill(launch).await {
                tracing::debug!(%error, "the kill was not carried out; the process may have ended");
            }
            None
        });
    }

    pub(super) async fn register(&mut self, generation: Generation) -> Event {
        let phase = Phase::Register;
        match self.try_register(generation).await {
            Ok(()) => Event::PhaseDone { generation, phase },
            Err(failure) => Event::PhaseFailed { generation, phase, failure },
        }
    }

    /// What follows from being loaded: probes and the hook.
    pub(super) fn loaded(&mut self, generation: Generation) {
        let Some(worker) = self.worker(generation) else { return };
        let Some(run) = self.of(generation) else { return };
        run.start = None;
        let (took, cgroups) = (run.began.elapsed(), run.process.as_ref().map(|p| p.view.cgroups.clone()));
        // One that was taken over was not started, and its hook was called when it was.
        let started = run.adopted.is_none();
        self.view.send_modify(|view| {
            let view = Arc::make_mut(view);
            if started {
                view.figures.start_duration = Some(took);
            }
            view.last_error = None;
            view.problems.clear();
        });
        let prober = Prober {
            policy: settings::probes(&self.config.health),
            worker: worker.clone(),
            identity: self.identity(generation),
            broker: self.shared.calls.broker().clone(),
            cgroups: cgroups.unwrap_or_default(),
            inward: self.inward.clone(),
        };
        self.watch_dependencies(generation);
        self.open_ingress(generation);
        let after_load = started && self.hook_wanted(|hooks| hooks.after_load);
        self.spawn(generation, async move {
            if after_load {
                report_hook(&worker, LifecycleHook::AfterLoad).await;
            }
            prober.run().await;
            None
        });
    }

    pub(super) async fn forget(&mut self, generation: Generation) {
        let Some(run) = self.run.take_if(|run| run.generation == generation) else { return };
        run.cancel.cancel();
        if run.process.is_some() {
            let identity = self.identity(generation);
            let broker = self.shared.calls.broker();
            if run.registered {
                let _ = broker.remove_provider(&identity).await;
            }
            let _ = broker.remove_caller(&identity).await;
        }
        self.view.send_modify(|view| Arc::make_mut(view).process = None);
    }

    pub(super) async fn set_ready(&mut self, generation: Generation, ready: bool) {
        if self.of(generation).is_some_and(|run| run.registered) {
            let _ = self.shared.calls.broker().set_ready(&self.identity(generation), ready).await;
        }
    }

    /// Whether new connections from outside are let in; those under way go on.
    fn admit_connections(&mut self, generation: Generation, admitted: bool) {
        if self.of(generation).is_some()
            && let Some(front) = self.shared.ingress.front(&self.name)
        {
            front.set_ready(admitted);
        }
    }

    pub(super) fn identity(&self, generation: Generation) -> PluginIdentity {
        PluginIdentity { name: self.name.clone(), generation }
    }

    pub(super) fn worker(&mut self, generation: Generation) -> Option<Worker> {
        self.of(generation)?.process.as_ref()?.worker.clone()
    }

    pub(super) fn hook_wanted(&self, which: impl Fn(&plugvisor_package::LifecycleHooks) -> bool) -> bool {
        self.view.borrow().bundle.as_ref().is_some_and(|bundle| which(&bundle.manifest.events.lifecycle))
    }
}

async fn report_hook(worker: &Worker, hook: LifecycleHook) {
    if let Err(why) = worker.hook(hook, HOOK_PATIENCE).await {
        tracing::warn!(hook = hook.as_str_name(), %why, "a lifecycle hook failed");
    }
}
