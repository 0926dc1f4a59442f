//! The phases of a load from handshake to register, and what all phases share. Each runs as a task of its generation and
//! reports its end; the lifecycle decides what follows.

use std::sync::Arc;

use plugvisor_core::{
    Code, Error, Generation, Time,
    event::BrokerEvent,
    lifecycle::{Event, Failure, Permanence, Phase},
    route::PluginCaller,
};
use plugvisor_package::SocketMode;
use plugvisor_proto::worker::v1::LifecycleHook;

use super::{
    Driver, HOOK_PATIENCE, Inward, settings,
    worker::{Init, Trouble, Way, Worker, bound_socket},
};
use crate::broker::{CallLimits, CallerSpec, ProviderSpec};

pub(super) fn permanent(error: Error) -> Failure {
    Failure { error, permanence: Permanence::Permanent, stderr_tail: Vec::new() }
}

pub(super) fn transient(error: Error) -> Failure {
    Failure { error, permanence: Permanence::Transient, stderr_tail: Vec::new() }
}

pub(super) fn failed(generation: Generation, phase: Phase, failure: Failure) -> Inward {
    Inward::Life(Event::PhaseFailed { generation, phase, failure })
}

impl Driver {
    pub(super) async fn begin_handshake(&mut self, generation: Generation) -> Option<Event> {
        if self.of(generation).is_some_and(|run| run.adopted.is_some()) {
            self.admit_later(generation);
        } else if let Err(failure) = self.add_caller(generation).await {
            return Some(Event::PhaseFailed { generation, phase: Phase::Handshake, failure });
        }
        let name = self.name.clone();
        let run = self.of(generation)?;
        let verified = run.verified.as_ref()?;
        let way = Way { mode: verified.info.manifest.runtime.socket, level: verified.verdict.level };
        let running = run.process.as_ref()?;
        let (given, uid, deadline) = (Arc::clone(&running.given), running.view.uid, running.deadline);
        let adopted = run.adopted.is_some();
        self.spawn_phase(generation, Phase::Handshake, async move {
            let (socket, peer) = match way.mode {
                SocketMode::Inherit => (given, None),
                SocketMode::Bind => (Arc::new(bound_socket(name.as_str(), &given, way, deadline).await?), Some(uid)),
            };
            let worker = Worker::new(Arc::clone(&socket), peer);
            if adopted {
                // There is no Init to wait behind.
                worker.serving(name.as_str(), deadline).await?;
            } else {
                worker.first_answer(name.as_str(), way, deadline).await?;
            }
            Ok(Inward::Reached(generation, socket, worker))
        });
        None
    }

    /// From its first instruction on the plugin may call others, as far as its grants go.
    pub(super) async fn add_caller(&mut self, generation: Generation) -> Result<(), Failure> {
        let name = self.name.clone();
        let caller = self.of(generation).and_then(|run| {
            let verified = run.verified.as_ref()?;
            let running = run.process.as_mut()?;
            let dependencies = verified.info.manifest.dependencies.iter().map(|d| d.name.clone()).collect();
            let caller = PluginCaller { name, generation, rights: verified.verdict.rights.clone(), dependencies };
            Some(CallerSpec { caller, listener: running.broker_listener.take()?, uid: Some(running.view.uid) })
        });
        let Some(caller) = caller else { return Ok(()) };
        self.shared.calls.broker().add_caller(caller).await.map_err(|error| {
            let hint = "raise the limit on open files of plugvisord, then `plugvisor restart`";
            transient(Error::new(Code::ResourceExhausted, error.to_string(), hint))
        })
    }

    pub(super) fn begin_init(&mut self, generation: Generation) {
        let config = self.config.config.clone();
        let before_load = self.hook_wanted(|hooks| hooks.before_load);
        let (name, place) = (self.name.clone(), Arc::clone(&self.shared.place));
        let Some(worker) = self.worker(generation) else { return };
        let Some(run) = self.of(generation) else { return };
        let (Some(verified), Some(running)) = (&run.verified, &run.process) else { return };
        let (info, verdict, deadline) = (Arc::clone(&verified.info), Arc::clone(&verified.verdict), running.deadline);
        self.spawn_phase(generation, Phase::Init, async move {
            let mut merged = info.manifest.runtime.config.defaults.clone();
            merged.extend(config);
            let ask = Init {
                plugin: name.as_str(),
                generation: generation.0,
                config: merged,
                granted: verdict.granted(),
                provided: &info.services.provided,
                place: &place,
            };
            let sdk = worker.init(ask, deadline).await?;
            worker.serving(name.as_str(), deadline).await?;
            if before_load {
                worker.hook(LifecycleHook::BeforeLoad, HOOK_PATIENCE).await.map_err(|why| Trouble {
                    error: Error::new(
                        Code::PluginInitFailed,
                        format!("plugin {name} refused to be loaded in its hook beforeLoad: {why}"),
                        format!("see `plugvisor logs {name}`"),
                    ),
                    permanence: Permanence::Transient,
                })?;
            }
            Ok(Inward::Initialised(generation, sdk))
        });
    }

    pub(super) async fn try_register(&mut self, generation: Generation) -> Result<(), Failure> {
        let name = self.name.clone();
        let gone = |what: &str| {
            let message = format!("plugin {name} cannot be registered: {what}");
            transient(Error::new(Code::InputOutput, message, "`plugvisor restart` tries again"))
        };
        let identity = self.identity(generation);
        let breaker = self.config.breaker.clone();
        // Of a generation that was taken over. That of one launched here is new, and the record of another one.
        let now = Time::after_start(self.shared.began.elapsed());
        let breaker_memory = self.breaker.take().and_then(|record| record.memory(generation, now));
        let provider = self.run.as_ref().filter(|run| run.generation == generation).and_then(|run| {
            let (verified, running) = (run.verified.as_ref()?, run.process.as_ref()?);
            let socket = running.socket.as_ref()?.try_clone();
            let breaker = settings::breaker(&verified.info.manifest, &breaker);
            let limits = CallLimits { max_deadline: verified.verdict.limits.call_time, ..CallLimits::default() };
            Some(socket.map(|socket| ProviderSpec {
                identity: identity.clone(),
                socket,
                breaker,
                breaker_memory,
                limits,
            }))
        });
        let provider =
            provider.ok_or_else(|| gone("its process is gone"))?.map_err(|error| gone(&error.to_string()))?;
        let broker = self.shared.calls.broker().clone();
        broker.add_provider(provider).await.map_err(|stopped| gone(&stopped.to_string()))?;
        if let Some(run) = self.of(generation) {
            run.registered = true;
        }
        broker.set_ready(&identity, true).await.map_err(|stopped| gone(&stopped.to_string()))?;
        self.emit_services(|service| BrokerEvent::ServiceRegistered { service });
        Ok(())
    }

    /// Runs a phase that asks the plugin something.
    fn spawn_phase(
        &mut self,
        generation: Generation,
        phase: Phase,
        work: impl Future<Output = Result<Inward, Trouble>> + Send + 'static,
    ) {
        let (logs, name) = (Arc::clone(&self.shared.logs), self.name.clone());
        self.spawn(generation, async move {
            Some(work.await.unwrap_or_else(|Trouble { error, permanence }| {
                let stderr_tail = logs.stderr_tail(&name, generation.0, super::exit::TAIL);
                failed(generation, phase, Failure { error, permanence, stderr_tail })
            }))
        });
    }
}
