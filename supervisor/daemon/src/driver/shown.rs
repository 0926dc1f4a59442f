//! What others see of a plugin: its view, its place in the route table, its events.

use std::{sync::Arc, time::SystemTime};

use plugvisor_core::{
    Generation, Time,
    event::{BrokerEvent, Event as DomainEvent},
    lifecycle::{Condition, Event, Loaded, State},
    route::{Availability, Plugin as RoutePlugin},
};

use super::Driver;
use crate::{
    calls,
    events::Subject,
    state::{Note, TRANSITIONS_KEPT, TransitionRecord},
};

impl Driver {
    /// Tells the route table when what callers may expect has changed.
    pub(super) async fn route(&mut self) {
        let serving = matches!(self.life.state(), State::Loaded(Loaded { condition: Condition::Serving { .. }, .. }));
        let availability = if serving && self.run.as_ref().is_some_and(|run| run.registered) {
            Availability::Serving
        } else {
            Availability::Unavailable { why: unavailable(self.life.state()) }
        };
        let bundle = self.view.borrow().bundle.clone();
        let services = bundle.map(|bundle| calls::offers(&bundle.services)).unwrap_or_default();
        let (name, generation) = (self.name.clone(), self.life.generation());
        let plugin = RoutePlugin { name, generation, availability, services };
        if self.route.as_ref() != Some(&plugin) {
            self.route = Some(plugin.clone());
            let _ = self.shared.calls.set(plugin).await;
        }
    }

    /// Shows the state to everyone, and begins what being loaded begins.
    pub(super) fn publish(&mut self, before: &State, cause: String) {
        let state = self.life.state().clone();
        let now_loaded = matches!(state, State::Loaded(_)) && !matches!(before, State::Loaded(_));
        let (life, began) = (&self.life, self.shared.began);
        let (from, to) = (state_text(before), state_text(&state));
        let transition =
            (from != to).then(|| TransitionRecord { at: SystemTime::now(), from: from.into(), to: to.into(), cause });
        if let Some(transition) = &transition {
            self.shared.state.note(&self.name, Note::Transition(transition.clone()));
        }
        self.view.send_modify(|view| {
            let view = Arc::make_mut(view);
            if let Some(transition) = transition {
                view.since = transition.at;
                view.transitions.push_back(transition);
                if view.transitions.len() > TRANSITIONS_KEPT {
                    view.transitions.pop_front();
                }
            }
            if let State::Failed(failed) = &state {
                view.last_error = Some(failed.error.clone());
                view.restart_at = failed.restart.map(|restart| began + restart.at.since(Time::ZERO));
            } else {
                view.restart_at = None;
            }
            view.generation = life.generation();
            view.restarts = life.restarts();
            view.state = state.clone();
        });
        if now_loaded {
            self.loaded(self.life.generation());
        }
    }

    pub(super) fn emit(&self, event: impl Into<DomainEvent>) {
        self.tell(self.life.generation(), event);
    }

    pub(super) fn tell(&self, generation: Generation, event: impl Into<DomainEvent>) {
        let subject = if generation == Generation::NONE {
            Subject::Plugin(self.name.to_string())
        } else {
            Subject::Generation(self.name.clone(), generation)
        };
        self.shared.events.publish(subject, event);
    }

    pub(super) fn emit_services(&self, event: impl Fn(String) -> BrokerEvent) {
        let services = self.route.iter().flat_map(|plugin| &plugin.services);
        let mut names: Vec<&String> = services.map(|service| &service.name).collect();
        names.dedup();
        for name in names {
            self.emit(event(name.clone()));
        }
    }
}

pub(super) fn describe(event: &Event) -> String {
    match event {
        Event::PhaseDone { phase, .. } => format!("{phase} done"),
        Event::PhaseFailed { phase, failure, .. } => format!("{phase} failed: {}", failure.error.message),
        Event::Exited { exit, .. } => format!("its process {}", exit.describe()),
        other => other.name().to_owned(),
    }
}

/// The state with what is worth a line in the list of transitions.
const fn state_text(state: &State) -> &'static str {
    match state {
        State::Loaded(Loaded { condition: Condition::Degraded { .. }, .. }) => "LOADED (degraded)",
        State::Loaded(Loaded { condition: Condition::Draining(_), .. }) => "LOADED (draining)",
        other => other.name(),
    }
}

fn unavailable(state: &State) -> String {
    match state {
        State::Unknown | State::Discovered | State::Unloaded => {
            "it is not loaded; `plugvisor load` loads it".to_owned()
        }
        State::Loading(_) => "it is being loaded".to_owned(),
        State::Loaded(Loaded { condition, .. }) => match condition {
            Condition::Serving { .. } => "it is about to serve".to_owned(),
            Condition::Degraded { .. } => "its health service does not say SERVING".to_owned(),
            Condition::Draining(_) => "it is on its way out".to_owned(),
        },
        State::Failed(failed) if failed.restart.is_some() => format!("it will be restarted: {}", failed.error.message),
        State::Failed(failed) => format!("it failed: {}", failed.error.message),
        State::Quarantined => "it is quarantined".to_owned(),
    }
}
