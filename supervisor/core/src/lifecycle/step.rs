//! The one function that changes a state.

use super::{
    Condition, Context, Effect, Event, Failed, Haste, Life, Loaded, Loading, Origin, Phase, RefusedTransition, Stage,
    State, Stopping, Then,
};
use crate::{Code, Generation, event::PluginEvent};

/// What `event` makes of `life`, and what is to be done, in that order.
///
/// # Errors
///
/// [`RefusedTransition`] for a request that the state does not admit. Reports are never refused: stale ones change
/// nothing and have no effects.
pub fn step(life: Life, event: Event, context: Context<'_>) -> Result<(Life, Vec<Effect>), RefusedTransition> {
    if event.generation().is_some_and(|generation| generation != life.generation) {
        return Ok((life, Vec::new()));
    }
    let mut step = Step { life, context, effects: Vec::new() };
    let state = std::mem::replace(&mut step.life.state, State::Unknown);
    step.life.state = match state {
        State::Unknown => step.unknown(event)?,
        State::Discovered => step.discovered(event)?,
        State::Loading(loading) => step.loading(loading, event)?,
        State::Loaded(loaded) => step.loaded(loaded, event)?,
        State::Unloaded => step.unloaded(event)?,
        State::Failed(failed) => step.failed(failed, event)?,
        State::Quarantined => step.quarantined(&event)?,
    };
    Ok((step.life, step.effects))
}

pub(super) struct Step<'a> {
    pub(super) life: Life,
    pub(super) context: Context<'a>,
    pub(super) effects: Vec<Effect>,
}

pub(super) type Next = Result<State, RefusedTransition>;

impl Step<'_> {
    fn unknown(&mut self, event: Event) -> Next {
        match event {
            Event::Discovered { directory } => {
                self.emit(PluginEvent::Discovered { directory });
                Ok(State::Discovered)
            }
            Event::QuarantineRequested { by } => Ok(self.quarantine(by)),
            Event::LoadRequested | Event::RestartRequested | Event::UnloadRequested | Event::Reattached { .. } => {
                self.refuse(&State::Unknown, &event, Code::PluginNotFound)
            }
            Event::StopRequested(_)
            | Event::Removed
            | Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::ReadyLost { .. }
            | Event::ReadyRegained { .. }
            | Event::Hung { .. }
            | Event::Exited { .. }
            | Event::Drained { .. }
            | Event::GracePassed { .. }
            | Event::RestartDue { .. } => Ok(State::Unknown),
        }
    }

    fn discovered(&mut self, event: Event) -> Next {
        match event {
            Event::LoadRequested | Event::RestartRequested => Ok(self.load()),
            Event::Reattached { generation, ready_for, gap }
                if generation >= self.life.generation && generation != Generation::NONE =>
            {
                self.life.generation = generation;
                Ok(self.begin(Phase::Verify, self.context.now, Origin::Adopted { ready_for, gap }))
            }
            Event::Reattached { .. } => self.refuse(&State::Discovered, &event, Code::PluginWrongState),
            Event::Removed => {
                self.emit(PluginEvent::Removed {});
                Ok(State::Unknown)
            }
            Event::QuarantineRequested { by } => Ok(self.quarantine(by)),
            Event::UnloadRequested => self.refuse(&State::Discovered, &event, Code::PluginNotLoaded),
            Event::Discovered { .. }
            | Event::StopRequested(_)
            | Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::ReadyLost { .. }
            | Event::ReadyRegained { .. }
            | Event::Hung { .. }
            | Event::Exited { .. }
            | Event::Drained { .. }
            | Event::GracePassed { .. }
            | Event::RestartDue { .. } => Ok(State::Discovered),
        }
    }

    fn loading(&mut self, mut loading: Loading, event: Event) -> Next {
        match event {
            Event::PhaseDone { phase, .. } if phase == loading.phase => Ok(self.phase_done(loading)),
            Event::PhaseFailed { phase, failure, .. } if phase == loading.phase => {
                Ok(self.phase_failed(loading, failure))
            }
            Event::Exited { exit, .. } if loading.has_process() => {
                if loading.phase == Phase::Register && loading.stopping.is_none() {
                    self.withdraw();
                }
                let ready = match loading.origin {
                    Origin::Launched => None,
                    Origin::Adopted { ready_for, gap: _ } => Some(ready_for),
                };
                Ok(self.exited(loading.stopping, exit, ready))
            }
            Event::GracePassed { .. } => {
                if let Some(stopping) = &mut loading.stopping {
                    self.grace_passed(stopping);
                }
                Ok(State::Loading(loading))
            }
            Event::LoadRequested => {
                let code = match loading.stopping {
                    None => Code::PluginAlreadyLoaded,
                    Some(_) => Code::PluginWrongState,
                };
                self.refuse(&State::Loading(loading), &event, code)
            }
            Event::Reattached { .. } => self.refuse(&State::Loading(loading), &event, Code::PluginAlreadyLoaded),
            Event::RestartRequested | Event::UnloadRequested if is_final(loading.stopping.as_ref()) => {
                self.refuse(&State::Loading(loading), &event, Code::PluginWrongState)
            }
            Event::RestartRequested => Ok(self.stop_loading(loading, Then::Restart, Haste::Gentle)),
            Event::UnloadRequested => Ok(self.stop_loading(loading, Then::Unload, Haste::Gentle)),
            Event::StopRequested(haste) => Ok(self.stop_loading(loading, Then::Stop, haste)),
            Event::QuarantineRequested { by } => Ok(self.stop_loading(loading, Then::Quarantine { by }, Haste::Now)),
            Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::Exited { .. }
            | Event::Discovered { .. }
            | Event::Removed
            | Event::ReadyLost { .. }
            | Event::ReadyRegained { .. }
            | Event::Hung { .. }
            | Event::Drained { .. }
            | Event::RestartDue { .. } => Ok(State::Loading(loading)),
        }
    }

    fn loaded(&mut self, loaded: Loaded, event: Event) -> Next {
        let Loaded { condition, longest_ready } = loaded;
        let stopping = match &condition {
            Condition::Serving { .. } | Condition::Degraded { .. } => None,
            Condition::Draining(stopping) => Some(stopping),
        };
        match event {
            Event::ReadyLost { .. } => Ok(self.ready_lost(Loaded { condition, longest_ready })),
            Event::ReadyRegained { .. } => Ok(self.ready_regained(Loaded { condition, longest_ready })),
            Event::Hung { missed, .. } => match condition {
                Condition::Serving { .. } | Condition::Degraded { .. } => {
                    Ok(self.hung(Loaded { condition, longest_ready }, missed))
                }
                Condition::Draining(_) => Ok(State::Loaded(Loaded { condition, longest_ready })),
            },
            Event::Exited { exit, .. } => {
                let ready = self.longest_ready(&condition, longest_ready);
                if let Condition::Serving { .. } = condition {
                    self.withdraw();
                }
                let stopping = match condition {
                    Condition::Serving { .. } | Condition::Degraded { .. } => None,
                    Condition::Draining(stopping) => Some(stopping),
                };
                Ok(self.exited(stopping, exit, Some(ready)))
            }
            Event::Drained { inflight_left, .. } => match condition {
                Condition::Draining(Stopping { stage: Stage::Drain, then }) => {
                    self.emit(PluginEvent::Drained { inflight_left });
                    let condition = Condition::Draining(self.terminate(then));
                    Ok(State::Loaded(Loaded { condition, longest_ready }))
                }
                Condition::Serving { .. } | Condition::Degraded { .. } | Condition::Draining(_) => {
                    Ok(State::Loaded(Loaded { condition, longest_ready }))
                }
            },
            Event::GracePassed { .. } => {
                let mut condition = condition;
                if let Condition::Draining(stopping) = &mut condition {
                    self.grace_passed(stopping);
                }
                Ok(State::Loaded(Loaded { condition, longest_ready }))
            }
            Event::LoadRequested => {
                let code = match stopping {
                    None => Code::PluginAlreadyLoaded,
                    Some(_) => Code::PluginWrongState,
                };
                self.refuse(&State::Loaded(Loaded { condition, longest_ready }), &event, code)
            }
            Event::Reattached { .. } => {
                self.refuse(&State::Loaded(Loaded { condition, longest_ready }), &event, Code::PluginAlreadyLoaded)
            }
            Event::RestartRequested | Event::UnloadRequested if is_final(stopping) => {
                self.refuse(&State::Loaded(Loaded { condition, longest_ready }), &event, Code::PluginWrongState)
            }
            Event::RestartRequested => {
                Ok(self.stop_loaded(Loaded { condition, longest_ready }, Then::Restart, Haste::Gentle))
            }
            Event::UnloadRequested => {
                Ok(self.stop_loaded(Loaded { condition, longest_ready }, Then::Unload, Haste::Gentle))
            }
            Event::StopRequested(haste) => Ok(self.stop_loaded(Loaded { condition, longest_ready }, Then::Stop, haste)),
            Event::QuarantineRequested { by } => {
                let then = Then::Quarantine { by };
                Ok(self.stop_loaded(Loaded { condition, longest_ready }, then, Haste::Now))
            }
            Event::Discovered { .. }
            | Event::Removed
            | Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::RestartDue { .. } => Ok(State::Loaded(Loaded { condition, longest_ready })),
        }
    }

    fn unloaded(&mut self, event: Event) -> Next {
        match event {
            Event::LoadRequested | Event::RestartRequested => Ok(self.load()),
            Event::Removed => {
                self.emit(PluginEvent::Removed {});
                Ok(State::Unknown)
            }
            Event::QuarantineRequested { by } => Ok(self.quarantine(by)),
            Event::UnloadRequested => self.refuse(&State::Unloaded, &event, Code::PluginNotLoaded),
            Event::Reattached { .. } => self.refuse(&State::Unloaded, &event, Code::PluginWrongState),
            Event::Discovered { .. }
            | Event::StopRequested(_)
            | Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::ReadyLost { .. }
            | Event::ReadyRegained { .. }
            | Event::Hung { .. }
            | Event::Exited { .. }
            | Event::Drained { .. }
            | Event::GracePassed { .. }
            | Event::RestartDue { .. } => Ok(State::Unloaded),
        }
    }

    fn failed(&mut self, failed: Failed, event: Event) -> Next {
        match event {
            Event::RestartDue { .. } if failed.restart.is_some() => {
                self.life.restarts.restarted();
                Ok(self.load())
            }
            Event::LoadRequested | Event::RestartRequested => {
                self.cancel_restart(&failed);
                self.life.restarts.forgive();
                Ok(self.load())
            }
            Event::UnloadRequested | Event::StopRequested(_) => {
                self.cancel_restart(&failed);
                self.emit(PluginEvent::Unloaded {});
                Ok(State::Unloaded)
            }
            Event::Removed => {
                self.cancel_restart(&failed);
                self.emit(PluginEvent::Removed {});
                Ok(State::Unknown)
            }
            Event::QuarantineRequested { by } => {
                self.cancel_restart(&failed);
                Ok(self.quarantine(by))
            }
            Event::Reattached { .. } => self.refuse(&State::Failed(failed), &event, Code::PluginWrongState),
            Event::RestartDue { .. }
            | Event::Discovered { .. }
            | Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::ReadyLost { .. }
            | Event::ReadyRegained { .. }
            | Event::Hung { .. }
            | Event::Exited { .. }
            | Event::Drained { .. }
            | Event::GracePassed { .. } => Ok(State::Failed(failed)),
        }
    }

    fn quarantined(&self, event: &Event) -> Next {
        match event {
            Event::LoadRequested | Event::RestartRequested | Event::Reattached { .. } => {
                self.refuse(&State::Quarantined, event, Code::PluginQuarantined)
            }
            Event::UnloadRequested => self.refuse(&State::Quarantined, event, Code::PluginNotLoaded),
            // Also when its bundle goes and comes back: a quarantine is not shaken off by copying files.
            Event::Discovered { .. }
            | Event::Removed
            | Event::StopRequested(_)
            | Event::QuarantineRequested { .. }
            | Event::PhaseDone { .. }
            | Event::PhaseFailed { .. }
            | Event::ReadyLost { .. }
            | Event::ReadyRegained { .. }
            | Event::Hung { .. }
            | Event::Exited { .. }
            | Event::Drained { .. }
            | Event::GracePassed { .. }
            | Event::RestartDue { .. } => Ok(State::Quarantined),
        }
    }
}

/// Whether a stop leads where no plain request leads out of.
const fn is_final(stopping: Option<&Stopping>) -> bool {
    match stopping {
        None => false,
        Some(stopping) => match stopping.then {
            Then::Stop | Then::Quarantine { .. } => true,
            Then::Fail(_) | Then::Restart | Then::Renew | Then::Unload => false,
        },
    }
}
