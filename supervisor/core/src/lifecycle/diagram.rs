//! `docs/lifecycle.md`, written from what [`step`] does, so that it cannot say anything else.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    time::Duration,
};

use super::{
    Condition, Context, Event, Failure, Haste, Life, LifePolicy, Loading, Origin, Permanence, Phase, State, Then, step,
};
use crate::{
    Code, Error, Jitter, Time,
    event::{Exit, ExitKind},
};

/// A place in the diagram: the state, and the phase or condition within it.
type Place = (&'static str, &'static str);

/// What became of an event: a place, or its refusal.
type Outcome = Result<Place, Code>;

const STATES: [&str; 7] = ["UNKNOWN", "DISCOVERED", "LOADING", "LOADED", "UNLOADED", "FAILED", "QUARANTINED"];

fn place(life: &Life) -> Place {
    let within = match life.state() {
        State::Loading(Loading { stopping: Some(_), .. }) => "stopping",
        State::Loading(Loading { phase, stopping: None, origin: Origin::Launched, .. }) => phase.as_str(),
        State::Loading(Loading { phase, stopping: None, origin: Origin::Adopted { .. }, .. }) => match phase {
            Phase::Verify => "adopt_verify",
            Phase::Handshake => "adopt_handshake",
            Phase::Register => "adopt_register",
            Phase::Resolve | Phase::Launch | Phase::Init => panic!("{phase} of what runs already"),
        },
        State::Loaded(loaded) => loaded.condition.as_str(),
        State::Unknown | State::Discovered | State::Unloaded | State::Failed(_) | State::Quarantined => "",
    };
    (life.state().name(), within)
}

/// What tells lives apart as far as [`step`] can see, times left out.
fn key(life: &Life) -> String {
    let stopping = |stopping: &super::Stopping| {
        let then = match &stopping.then {
            Then::Fail(failure) => format!("fail {:?}", failure.permanence),
            then @ (Then::Restart | Then::Renew | Then::Unload | Then::Stop | Then::Quarantine { .. }) => {
                then.as_str().to_owned()
            }
        };
        format!("{:?} {then}", stopping.stage)
    };
    let detail = match life.state() {
        State::Loading(loading) => {
            format!("{} {:?} {:?}", loading.phase, loading.origin, loading.stopping.as_ref().map(stopping))
        }
        State::Loaded(loaded) => match &loaded.condition {
            Condition::Draining(out) => stopping(out),
            condition @ (Condition::Serving { .. } | Condition::Degraded { .. }) => condition.as_str().to_owned(),
        },
        State::Failed(failed) => failed.restart.is_some().to_string(),
        State::Unknown | State::Discovered | State::Unloaded | State::Quarantined => String::new(),
    };
    format!("{} {detail}", life.state().name())
}

/// One event of each kind that the life could meet, not stale.
fn events(life: &Life) -> Vec<Event> {
    let generation = life.generation();
    let failure =
        |permanence| Failure { error: Error::new(Code::Bug, "made up", "none"), permanence, stderr_tail: Vec::new() };
    let exit = |code| Exit { kind: ExitKind::Code(code), oom: false, uptime_ms: 0, stderr_tail: Vec::new() };
    let mut events = vec![
        Event::Discovered { directory: String::new() },
        Event::LoadRequested,
        Event::Reattached { generation: generation.next(), ready_for: Duration::ZERO, gap: Duration::ZERO },
        Event::ReadyLost { generation },
        Event::ReadyRegained { generation },
        Event::Hung { generation, missed: 3 },
        Event::Exited { generation, exit: exit(1) },
        Event::Exited { generation, exit: exit(78) },
        Event::RestartDue { generation },
        Event::RestartRequested,
        Event::UnloadRequested,
        Event::StopRequested(Haste::Gentle),
        Event::StopRequested(Haste::Now),
        Event::Drained { generation, inflight_left: 0 },
        Event::GracePassed { generation },
        Event::QuarantineRequested { by: String::new() },
        Event::Removed,
    ];
    for phase in Phase::ALL {
        events.push(Event::PhaseDone { generation, phase });
        for permanence in [Permanence::Transient, Permanence::Permanent] {
            events.push(Event::PhaseFailed { generation, phase, failure: failure(permanence) });
        }
    }
    events
}

/// Everything that can happen, found by trying every event in every life that can be reached.
fn table() -> BTreeMap<(Place, &'static str), BTreeSet<Outcome>> {
    let policy = LifePolicy::default();
    let context = Context { now: Time::ZERO, jitter: Jitter::MIDDLE, policy: &policy };
    let mut table = BTreeMap::<_, BTreeSet<_>>::new();
    let mut waiting = VecDeque::from([Life::new("sample".parse().unwrap())]);
    let mut seen = BTreeSet::new();
    while let Some(life) = waiting.pop_front() {
        if !seen.insert(key(&life)) {
            continue;
        }
        for event in events(&life) {
            let row = table.entry((place(&life), event.name())).or_default();
            match step(life.clone(), event, context) {
                Ok((next, effects)) => {
                    // What changes nothing is not an arrow, but what begins anew in the same place is.
                    if key(&next) != key(&life) || !effects.is_empty() {
                        row.insert(Ok(place(&next)));
                    }
                    waiting.push_back(next);
                }
                Err(refused) => {
                    row.insert(Err(refused.error.code));
                }
            }
        }
    }
    table
}

fn document() -> String {
    let table = table();
    let mut text = String::from(
        "# The life of a plugin\n\n\
         Produced from `plugvisor_core::lifecycle::step` by a test of that module; do not edit. To write it anew: \
         `PLUGVISOR_BLESS=1 cargo test -p plugvisor-core diagram`.\n\n\
         ```mermaid\nstateDiagram-v2\n    [*] --> UNKNOWN\n",
    );
    for composite in ["LOADING", "LOADED"] {
        let _ = writeln!(text, "    state {composite} {{");
        write_edges(&mut text, &table, "        ", |from, to| {
            (from.0 == composite && to.0 == composite && from.1 != to.1).then(|| (node(from), node(to)))
        });
        text.push_str("    }\n");
    }
    write_edges(&mut text, &table, "    ", |from, to| (from.0 != to.0).then(|| (from.0.to_owned(), to.0.to_owned())));
    text.push_str(
        "```\n\n\
         Requests are refused where the table gives an error code, and nothing changes. A report of an earlier\n\
         generation, and any event that is not in the table, changes nothing.\n\n\
         | state | event | becomes |\n|---|---|---|\n",
    );
    for state in STATES {
        for (((from, within), event), outcomes) in table.iter().filter(|(((from, _), _), _)| *from == state) {
            let outcomes: Vec<_> = outcomes
                .iter()
                .map(|outcome| match outcome {
                    Ok((to, within)) => format!("{to} {within}").trim().to_owned(),
                    Err(code) => format!("refused: `{code}`"),
                })
                .collect();
            if !outcomes.is_empty() {
                let from = format!("{from} {within}");
                let _ = writeln!(text, "| {} | {event} | {} |", from.trim(), outcomes.join(", or "));
            }
        }
    }
    text
}

/// Writes the arrows that `select` picks, those between the same two places as one.
fn write_edges(
    text: &mut String,
    table: &BTreeMap<(Place, &'static str), BTreeSet<Outcome>>,
    indent: &str,
    select: impl Fn(Place, Place) -> Option<(String, String)>,
) {
    let mut edges = BTreeMap::<_, BTreeSet<_>>::new();
    for ((from, event), outcomes) in table {
        for to in outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()) {
            if let Some(edge) = select(*from, *to) {
                edges.entry(edge).or_default().insert(*event);
            }
        }
    }
    for ((from, to), events) in edges {
        let events: Vec<_> = events.into_iter().collect();
        let _ = writeln!(text, "{indent}{from} --> {to}: {}", events.join(", "));
    }
}

fn node((state, within): Place) -> String {
    // Mermaid's names are global, so "stopping" of one state must differ from another's.
    format!("{}_{within}", state.to_ascii_lowercase())
}

#[test]
fn the_document_is_what_step_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/lifecycle.md");
    let document = document();
    if std::env::var_os("PLUGVISOR_BLESS").is_some() {
        std::fs::write(path, &document).unwrap();
    }
    let written = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        written == document,
        "docs/lifecycle.md is out of date: PLUGVISOR_BLESS=1 cargo test -p plugvisor-core diagram"
    );
}

#[test]
fn every_state_phase_and_condition_can_be_reached_and_left() {
    let table = table();
    let places: BTreeSet<_> = table.keys().map(|(place, _)| *place).collect();
    let within = |state| places.iter().filter(|(name, _)| *name == state).count();
    assert_eq!(STATES.map(within), [1, 1, 10, 3, 1, 1, 1]);
    for from in places.iter().filter(|(state, _)| *state != "QUARANTINED") {
        let leaves = table
            .iter()
            .filter(|((place, _), _)| place == from)
            .any(|(_, outcomes)| outcomes.iter().any(|outcome| outcome.is_ok_and(|to| to != *from)));
        assert!(leaves, "nothing leads out of {from:?}");
    }
}
