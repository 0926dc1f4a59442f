//! The changes that [`step`](super::step) chooses from, each with its effects.

use std::time::Duration;

use super::{
    Condition, Context, Effect, Event, Failed, Failure, Haste, Loaded, Loading, Origin, Permanence, Phase,
    RefusedTransition, Scheduled, Stage, State, Stopping, Then,
    step::{Next, Step},
};
use crate::{
    Code, Error, Time,
    event::{Exit, ExitKind, PluginEvent, millis},
    restart::{Pace, Retry},
};

impl Step<'_> {
    /// Begins a load of a new generation.
    pub(super) fn load(&mut self) -> State {
        self.life.generation = self.life.generation.next();
        self.begin(Phase::Resolve, self.context.now, Origin::Launched)
    }

    pub(super) fn begin(&mut self, phase: Phase, began: Time, origin: Origin) -> State {
        self.emit(PluginEvent::LoadingProgress { phase: phase.as_str(), percent: phase.percent() });
        self.effects.push(Effect::Begin { generation: self.life.generation, phase });
        State::Loading(Loading { phase, began, origin, stopping: None })
    }

    pub(super) fn phase_done(&mut self, loading: Loading) -> State {
        let next = loading.next();
        let Loading { phase, began, origin, stopping } = loading;
        if let Some(mut stopping) = stopping {
            // The process that nobody wants any more has come after all. Other phases that end while stopping say
            // nothing new.
            if stopping.stage == Stage::AwaitLaunch {
                self.kill(&mut stopping);
                let phase = Phase::Handshake;
                return State::Loading(Loading { phase, began, origin, stopping: Some(stopping) });
            }
            return State::Loading(Loading { phase, began, origin, stopping: Some(stopping) });
        }
        if let Some(next) = next {
            return self.begin(next, began, origin);
        }
        let now = self.context.now;
        self.emit(PluginEvent::LoadingProgress { phase: "loaded", percent: 100 });
        let longest_ready = match origin {
            Origin::Launched => {
                self.emit(PluginEvent::Ready { ms: millis(now - began) });
                Duration::ZERO
            }
            Origin::Adopted { ready_for, gap } => {
                self.emit(PluginEvent::Reattached { gap_ms: millis(gap + (now - began)) });
                ready_for
            }
        };
        State::Loaded(Loaded { condition: Condition::Serving { since: now }, longest_ready })
    }

    pub(super) fn phase_failed(&mut self, loading: Loading, failure: Failure) -> State {
        let Loading { phase, began, origin, stopping } = loading;
        if let Some(stopping) = stopping {
            return if stopping.stage == Stage::AwaitLaunch {
                self.gone(stopping.then, None)
            } else {
                State::Loading(Loading { phase, began, origin, stopping: Some(stopping) })
            };
        }
        let (stage, error) = (phase.as_str().to_owned(), failure.error.clone());
        match phase {
            Phase::Verify if origin != Origin::Launched => {
                // Whatever is wrong with it, what there is now is loaded instead, and says so itself.
                self.emit(PluginEvent::OrphanReaped { why: error.message });
                let mut stopping = Stopping { stage: Stage::Terminate, then: Then::Renew };
                self.kill(&mut stopping);
                State::Loading(Loading { phase, began, origin, stopping: Some(stopping) })
            }
            Phase::Resolve | Phase::Verify => {
                self.emit(PluginEvent::Rejected { stage, error, problems: Vec::new() });
                self.gone(Then::Fail(failure), None)
            }
            Phase::Launch => {
                self.emit(PluginEvent::HandshakeFailed { stage, error, stderr_tail: Vec::new() });
                self.gone(Then::Fail(failure), None)
            }
            Phase::Handshake | Phase::Init | Phase::Register => {
                self.emit(PluginEvent::HandshakeFailed { stage, error, stderr_tail: failure.stderr_tail.clone() });
                if phase == Phase::Register {
                    self.withdraw();
                }
                let mut stopping = Stopping { stage: Stage::Terminate, then: Then::Fail(failure) };
                self.emit(PluginEvent::Killed { stage: "failed" });
                self.kill(&mut stopping);
                State::Loading(Loading { phase, began, origin, stopping: Some(stopping) })
            }
        }
    }

    pub(super) fn stop_loading(&mut self, loading: Loading, then: Then, haste: Haste) -> State {
        let has_process = loading.has_process();
        let Loading { phase, began, origin, stopping } = loading;
        let stopping = match (stopping, phase) {
            (Some(stopping), _) => self.redirect(stopping, then, haste),
            (None, Phase::Resolve | Phase::Verify) if !has_process => return self.gone(then, None),
            (None, Phase::Launch) => {
                self.emit_stopping(&then, Duration::ZERO);
                Stopping { stage: Stage::AwaitLaunch, then }
            }
            (None, Phase::Resolve | Phase::Verify | Phase::Handshake | Phase::Init | Phase::Register) => {
                self.emit_stopping(&then, Duration::ZERO);
                if phase == Phase::Register {
                    self.withdraw();
                }
                match haste {
                    Haste::Gentle => self.terminate(then),
                    Haste::Now => self.kill_now(then),
                }
            }
        };
        State::Loading(Loading { phase, began, origin, stopping: Some(stopping) })
    }

    pub(super) fn stop_loaded(&mut self, loaded: Loaded, then: Then, haste: Haste) -> State {
        let Loaded { condition, longest_ready } = loaded;
        let ready = self.longest_ready(&condition, longest_ready);
        if let Condition::Serving { .. } = condition {
            self.withdraw();
        }
        let stopping = match (condition, haste) {
            (Condition::Draining(stopping), _) => self.redirect(stopping, then, haste),
            (Condition::Serving { .. } | Condition::Degraded { .. }, Haste::Gentle) => {
                let (generation, time) = (self.life.generation, self.context.policy.drain);
                self.emit_stopping(&then, time);
                self.effects.push(Effect::Drain { generation, time });
                Stopping { stage: Stage::Drain, then }
            }
            (Condition::Serving { .. } | Condition::Degraded { .. }, Haste::Now) => {
                self.emit_stopping(&then, Duration::ZERO);
                self.kill_now(then)
            }
        };
        State::Loaded(Loaded { condition: Condition::Draining(stopping), longest_ready: ready })
    }

    /// A further wish while it is already on its way out.
    pub(super) fn redirect(&mut self, stopping: Stopping, then: Then, haste: Haste) -> Stopping {
        let Stopping { stage, then: before } = stopping;
        let then = match (before, then) {
            (kept @ Then::Quarantine { .. }, _) => kept,
            (Then::Stop, Then::Fail(_) | Then::Restart | Then::Renew | Then::Unload | Then::Stop) => Then::Stop,
            (Then::Stop, new @ Then::Quarantine { .. })
            | (Then::Fail(_) | Then::Restart | Then::Renew | Then::Unload, new) => new,
        };
        match (haste, stage) {
            (Haste::Now, Stage::Drain | Stage::Terminate) => self.kill_now(then),
            (Haste::Now, Stage::AwaitLaunch | Stage::Kill) | (Haste::Gentle, _) => Stopping { stage, then },
        }
    }

    pub(super) fn terminate(&mut self, then: Then) -> Stopping {
        let (generation, grace) = (self.life.generation, self.context.policy.grace);
        self.effects.push(Effect::Terminate { generation, grace, why: then.as_str() });
        Stopping { stage: Stage::Terminate, then }
    }

    pub(super) fn kill_now(&mut self, then: Then) -> Stopping {
        let mut stopping = Stopping { stage: Stage::Terminate, then };
        self.emit(PluginEvent::Killed { stage: "now" });
        self.kill(&mut stopping);
        stopping
    }

    pub(super) fn kill(&mut self, stopping: &mut Stopping) {
        stopping.stage = Stage::Kill;
        self.effects.push(Effect::Kill { generation: self.life.generation });
    }

    pub(super) fn grace_passed(&mut self, stopping: &mut Stopping) {
        if stopping.stage == Stage::Terminate {
            self.emit(PluginEvent::Killed { stage: "terminate" });
            self.kill(stopping);
        }
    }

    pub(super) fn ready_lost(&mut self, loaded: Loaded) -> State {
        let Loaded { condition, longest_ready } = loaded;
        let longest_ready = self.longest_ready(&condition, longest_ready);
        let condition = match condition {
            Condition::Serving { .. } => {
                self.withdraw();
                self.emit(PluginEvent::Degraded { probe: "readiness" });
                Condition::Degraded { since: self.context.now }
            }
            same @ (Condition::Degraded { .. } | Condition::Draining(_)) => same,
        };
        State::Loaded(Loaded { condition, longest_ready })
    }

    pub(super) fn ready_regained(&mut self, loaded: Loaded) -> State {
        let Loaded { condition, longest_ready } = loaded;
        let condition = match condition {
            Condition::Degraded { since } => {
                let now = self.context.now;
                self.effects.push(Effect::Restore { generation: self.life.generation });
                self.emit(PluginEvent::Recovered { ms: millis(now - since) });
                Condition::Serving { since: now }
            }
            same @ (Condition::Serving { .. } | Condition::Draining(_)) => same,
        };
        State::Loaded(Loaded { condition, longest_ready })
    }

    pub(super) fn hung(&mut self, loaded: Loaded, missed: u32) -> State {
        let Loaded { condition, longest_ready } = loaded;
        let longest_ready = self.longest_ready(&condition, longest_ready);
        if let Condition::Serving { .. } = condition {
            self.withdraw();
        }
        let error = Error::new(
            Code::Hung,
            format!("plugin {} did not answer {missed} liveness probes in a row", self.life.name),
            "see `plugvisor logs` for what it was doing; a handler may block its event loop",
        );
        self.emit(PluginEvent::Hung { missed });
        self.emit(PluginEvent::Killed { stage: "hung" });
        let failure = Failure { error, permanence: Permanence::Transient, stderr_tail: Vec::new() };
        let mut stopping = Stopping { stage: Stage::Terminate, then: Then::Fail(failure) };
        self.kill(&mut stopping);
        State::Loaded(Loaded { condition: Condition::Draining(stopping), longest_ready })
    }

    pub(super) fn exited(&mut self, stopping: Option<Stopping>, exit: Exit, ready: Option<Duration>) -> State {
        let expected = stopping.as_ref().is_some_and(|stopping| match stopping.stage {
            Stage::Terminate | Stage::Kill => true,
            Stage::AwaitLaunch | Stage::Drain => false,
        });
        self.emit(PluginEvent::Exited { exit: exit.clone(), expected });
        let then = stopping.map_or_else(
            || {
                let permanent = matches!(exit.kind, ExitKind::Code(code) if !exit.oom
                    && self.context.policy.restart.permanent_codes.contains(&code));
                Then::Fail(Failure {
                    error: exit.error(self.life.name.as_str()),
                    permanence: if permanent { Permanence::Permanent } else { Permanence::Transient },
                    stderr_tail: exit.stderr_tail,
                })
            },
            |stopping| stopping.then,
        );
        self.gone(then, ready)
    }

    /// Nothing runs any more, or nothing ever did: what was to come comes.
    pub(super) fn gone(&mut self, then: Then, ready: Option<Duration>) -> State {
        self.effects.push(Effect::Forget { generation: self.life.generation });
        match then {
            Then::Unload | Then::Stop => {
                self.emit(PluginEvent::Unloaded {});
                State::Unloaded
            }
            Then::Quarantine { by } => self.quarantine(by),
            Then::Restart => {
                self.life.restarts.forgive();
                self.load()
            }
            Then::Renew => self.load(),
            Then::Fail(failure) => State::Failed(self.fail(failure, ready)),
        }
    }

    pub(super) fn fail(&mut self, failure: Failure, ready: Option<Duration>) -> Failed {
        let Failure { error, permanence, stderr_tail: _ } = failure;
        let Context { now, jitter, policy } = self.context;
        let retry = match permanence {
            Permanence::Permanent => Retry::Never,
            Permanence::Transient => self.life.restarts.failed(&policy.restart, ready, now, jitter),
        };
        match retry {
            Retry::Never => {
                self.emit(PluginEvent::GaveUp { error: error.clone() });
                Failed { error, restart: None }
            }
            Retry::After { attempt, delay, pace } => {
                if let Pace::CrashLoopBegins { count, window } = pace {
                    self.emit(PluginEvent::Crashloop { count, window_ms: millis(window) });
                }
                self.emit(PluginEvent::RestartScheduled { attempt, delay_ms: millis(delay) });
                self.effects.push(Effect::ScheduleRestart { generation: self.life.generation, delay });
                let crash_loop = pace != Pace::Normal;
                Failed { error, restart: Some(Scheduled { at: now + delay, attempt, crash_loop }) }
            }
        }
    }

    pub(super) fn quarantine(&mut self, by: String) -> State {
        self.emit(PluginEvent::Quarantined { by });
        State::Quarantined
    }

    pub(super) fn cancel_restart(&mut self, failed: &Failed) {
        if failed.restart.is_some() {
            self.effects.push(Effect::CancelRestart);
        }
    }

    pub(super) fn longest_ready(&self, condition: &Condition, before: Duration) -> Duration {
        match condition {
            Condition::Serving { since } => before.max(self.context.now - *since),
            Condition::Degraded { .. } | Condition::Draining(_) => before,
        }
    }

    pub(super) fn withdraw(&mut self) {
        self.effects.push(Effect::Withdraw { generation: self.life.generation });
    }

    pub(super) fn emit_stopping(&mut self, then: &Then, drain: Duration) {
        self.emit(PluginEvent::Stopping { why: then.as_str(), drain_ms: millis(drain) });
    }

    pub(super) fn emit(&mut self, event: PluginEvent) {
        self.effects.push(Effect::Emit(event));
    }

    pub(super) fn refuse(&self, state: &State, event: &Event, code: Code) -> Next {
        let (name, request) = (&self.life.name, event.name());
        let (message, hint) = match code {
            Code::PluginNotFound => (
                format!("no plugin is called {name}"),
                "`plugvisor status` lists the plugins; `plugvisor config show` has the directories where bundles are looked for"
                    .to_owned(),
            ),
            Code::PluginAlreadyLoaded => (
                format!("plugin {name} is {} already", state.name()),
                match state {
                    State::Loading(_) => format!(
                        "`plugvisor events --follow --plugin {name}` shows how far it is; to give up the attempt: \
                         `plugvisor unload {name}`"
                    ),
                    State::Unknown
                    | State::Discovered
                    | State::Loaded(_)
                    | State::Unloaded
                    | State::Failed(_)
                    | State::Quarantined => format!("to start it anew: `plugvisor restart {name}`"),
                },
            ),
            Code::PluginNotLoaded => (
                format!("plugin {name} is {}: there is nothing to {request}", state.name()),
                format!("to load it: `plugvisor load {name}`"),
            ),
            Code::PluginQuarantined => (
                format!("plugin {name} is quarantined and is never started"),
                "find out why it was quarantined".to_owned(),
            ),
            _ => (
                format!("plugin {name} is {} and on its way out: cannot {request} it now", state.name()),
                format!("wait until `plugvisor status {name}` shows that it has stopped"),
            ),
        };
        Err(RefusedTransition { request, state: state.name(), error: Error::new(code, message, hint) })
    }
}
