//! A plugin's life: its states, what changes them, and what is to be done at each change.
//!
//! [`step`] is the one function that changes a state. It is pure: the driver of a plugin feeds it [`Event`]s in the
//! order in which they happened and carries out the [`Effect`]s in the order in which they are returned. The diagram in
//! `docs/lifecycle.md` is produced from it, and a test holds the two together.
//!
//! Two kinds of events come in. *Requests* (load, unload, restart, stop, quarantine) are refused when the state does
//! not admit them, and nothing changes. *Reports* carry the generation that they speak of; one that speaks of another
//! generation, or of a phase or stage that is over, is stale and is ignored.
//!
//! A process that outlived an earlier supervisor is taken over by [`Event::Reattached`], as the first thing in a life.
//!
//! Promises, held by property tests: a process is launched only in LOADING(launch), and no second one before the first
//! is gone; a state without a process is entered only when the process is known to be gone; what was launched is
//! terminated or killed; calls are routed only while LOADED and serving.

mod change;
#[cfg(test)]
mod diagram;
mod event;
mod state;
mod step;
#[cfg(test)]
mod tests;

use std::time::Duration;

use plugvisor_package::PluginName;

pub use self::{
    event::{Effect, Event, Haste},
    state::{
        Condition, Failed, Failure, Loaded, Loading, Origin, Permanence, Phase, Scheduled, Stage, State, Stopping, Then,
    },
    step::step,
};
use crate::{
    Error, Generation, Jitter, Time,
    event::PluginEvent,
    restart::{RestartHistory, RestartPolicy, Restarts},
};

/// The rules of a life.
#[derive(Clone, Debug, PartialEq)]
pub struct LifePolicy {
    /// Restart and back-off.
    pub restart: RestartPolicy,
    /// Time for calls in flight to end. Default: 10 s.
    pub drain: Duration,
    /// Time from SIGTERM to the kill. Default: 10 s.
    pub grace: Duration,
}

impl Default for LifePolicy {
    fn default() -> Self {
        Self { restart: RestartPolicy::default(), drain: Duration::from_secs(10), grace: Duration::from_secs(10) }
    }
}

/// What [`step`] needs from outside.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The moment of the event.
    pub now: Time,
    /// Spreads the restart that the event may cause.
    pub jitter: Jitter,
    /// The plugin's rules.
    pub policy: &'a LifePolicy,
}

/// A plugin's state and what must be remembered across states.
#[derive(Clone, Debug, PartialEq)]
pub struct Life {
    name: PluginName,
    state: State,
    generation: Generation,
    restarts: Restarts,
}

impl Life {
    /// A plugin of which nothing is known but its name.
    #[must_use]
    pub fn new(name: PluginName) -> Self {
        Self { name, state: State::Unknown, generation: Generation::NONE, restarts: Restarts::default() }
    }

    /// A plugin of which an earlier supervisor knew: generations go on counting, and failures are not forgotten.
    #[must_use]
    pub fn remembered(name: PluginName, generation: Generation, history: RestartHistory) -> Self {
        Self { name, state: State::Unknown, generation, restarts: Restarts::restore(history) }
    }

    /// What of its failures outlives the supervisor.
    #[must_use]
    pub fn history(&self) -> RestartHistory {
        self.restarts.history()
    }

    /// Its name.
    #[must_use]
    pub const fn name(&self) -> &PluginName {
        &self.name
    }

    /// Its state.
    #[must_use]
    pub const fn state(&self) -> &State {
        &self.state
    }

    /// The generation of the present load, or of the last one.
    #[must_use]
    pub const fn generation(&self) -> Generation {
        self.generation
    }

    /// How often it was restarted after failures.
    #[must_use]
    pub const fn restarts(&self) -> u32 {
        self.restarts.total()
    }

    /// Whether a process of it runs or may be about to.
    #[must_use]
    pub fn has_process(&self) -> bool {
        match &self.state {
            State::Loading(loading) => loading.has_process(),
            State::Loaded(_) => true,
            State::Unknown | State::Discovered | State::Unloaded | State::Failed(_) | State::Quarantined => false,
        }
    }

    /// [`step`] in place: on a refusal nothing changes.
    ///
    /// # Errors
    ///
    /// As [`step`].
    pub fn apply(&mut self, event: Event, context: Context<'_>) -> Result<Vec<Effect>, RefusedTransition> {
        let (next, effects) = step(self.clone(), event, context)?;
        *self = next;
        Ok(effects)
    }
}

/// A request that the state does not admit. Nothing changed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{error}")]
pub struct RefusedTransition {
    /// The request's name.
    pub request: &'static str,
    /// The state's name.
    pub state: &'static str,
    /// What to tell the requester.
    pub error: Error,
}

impl RefusedTransition {
    /// The event that tells of it.
    #[must_use]
    pub const fn event(&self) -> PluginEvent {
        PluginEvent::Refused { request: self.request, state: self.state }
    }
}
