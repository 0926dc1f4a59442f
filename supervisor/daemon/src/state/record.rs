//! What is remembered of one plugin. Names and numbers only: no configuration, no argument, no secret.

use std::{
    borrow::Cow,
    collections::VecDeque,
    time::{Duration, SystemTime},
};

use plugvisor_core::{
    Generation, Time,
    breaker::{Memory, Position},
    restart::RestartHistory,
};

/// Transitions that are remembered of one plugin.
pub const TRANSITIONS_KEPT: usize = 32;

/// The longest text of a transition's cause that is kept.
const MAX_TEXT: usize = 1024;

/// Everything that is remembered of one plugin. The moments in it are those of the host's present boot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PluginRecord {
    /// What an operator asked for last; `None` leaves it to the configuration.
    pub desired: Option<Desired>,
    /// The last generation that was begun.
    pub generation: Generation,
    /// The name and version of its SDK, as its last `Init` answered.
    pub sdk: String,
    /// Its failures.
    pub restarts: RestartHistory,
    /// The breaker of the generation that ran last.
    pub breaker: Option<BreakerRecord>,
    /// The oldest first.
    pub transitions: VecDeque<TransitionRecord>,
}

/// What an operator wants of a plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// It is loaded whenever the supervisor starts.
    Loaded,
    /// It stays unloaded until somebody asks for it.
    Unloaded,
}

/// A breaker that was not closed, or counted failures, when it was last noted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BreakerRecord {
    /// Of which generation.
    pub generation: Generation,
    /// Where it stood.
    pub position: Position,
    /// When that was noted.
    pub at: Time,
    /// How much longer it was to refuse calls then; zero unless open.
    pub open_left: Duration,
    /// How often in a row half-open had led back to open.
    pub reopened: u32,
    /// Failures in a row.
    pub consecutive: u32,
}

/// One change of state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TransitionRecord {
    /// When, for people: no rule depends on it.
    pub at: SystemTime,
    /// From which state.
    pub from: Cow<'static, str>,
    /// To which state.
    pub to: Cow<'static, str>,
    /// What caused it.
    pub cause: String,
}

impl BreakerRecord {
    /// What to remember of a breaker at `now`; `None` when there is nothing that a new one would not be.
    #[must_use]
    pub fn of(generation: Generation, memory: Memory, now: Time) -> Option<Self> {
        let Memory { position, open_left, reopened, consecutive } = memory;
        let new = position == Position::Closed && consecutive == 0;
        (!new).then_some(Self { generation, position, at: now, open_left, reopened, consecutive })
    }

    /// Where it stands at `now`, if it is of this generation: the next one's breaker is new.
    #[must_use]
    pub fn memory(&self, generation: Generation, now: Time) -> Option<Memory> {
        let Self { generation: of, position, at, open_left, reopened, consecutive } = *self;
        let open_left = open_left.saturating_sub(now - at);
        (of == generation).then_some(Memory { position, open_left, reopened, consecutive })
    }
}

/// One thing to remember.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// A load was begun.
    Begun(Generation),
    /// Its failures are counted so now.
    Restarts(RestartHistory),
    /// Its breaker stands so now; `None` forgets it.
    Breaker(Option<BreakerRecord>),
    /// Its `Init` answered.
    Sdk(String),
    /// Its state changed.
    Transition(TransitionRecord),
}

impl Desired {
    /// As it is stored.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Loaded => "loaded",
            Self::Unloaded => "unloaded",
        }
    }
}

impl PluginRecord {
    /// Takes a note in.
    pub(super) fn take(&mut self, note: Note) {
        match note {
            // Generations only rise, whatever the order in which notes come.
            Note::Begun(generation) => self.generation = self.generation.max(generation),
            Note::Restarts(history) => self.restarts = history,
            Note::Breaker(breaker) => self.breaker = breaker,
            Note::Sdk(mut sdk) => {
                shorten(&mut sdk);
                self.sdk = sdk;
            }
            Note::Transition(mut transition) => {
                shorten(&mut transition.cause);
                self.transitions.push_back(transition);
                while self.transitions.len() > TRANSITIONS_KEPT {
                    self.transitions.pop_front();
                }
            }
        }
    }

    /// What is still true after the host was started anew.
    pub(super) fn reboot(&mut self) {
        self.restarts = self.restarts.after_reboot();
        self.breaker = None;
    }
}

/// Causes may hold what a plugin said.
fn shorten(text: &mut String) {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
}
