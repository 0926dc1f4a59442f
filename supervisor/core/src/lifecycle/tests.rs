//! The promises of the lifecycle, against a driver and a kernel that are simulated by hand.

use std::time::Duration;

use proptest::prelude::*;

use super::{
    Condition, Context, Effect, Event, Failure, Haste, Life, LifePolicy, Origin, Permanence, Phase, RefusedTransition,
    State, step,
};
use crate::{
    Code, Error, Generation, Jitter, Time,
    event::{Exit, ExitKind, PluginEvent},
};

/// The world outside of [`step`]: it carries out effects, checks that each is allowed, and knows what could happen next.
struct World {
    life: Life,
    policy: LifePolicy,
    now: Time,
    /// The phase that was begun and not answered.
    working: Option<(Generation, Phase)>,
    /// The process that runs, whatever `life` believes.
    running: Option<Generation>,
    /// The process was asked to end, or is being killed.
    asked_to_end: bool,
    /// Who calls are routed to.
    routed: Option<Generation>,
    draining: Option<Generation>,
    grace: Option<Generation>,
    restart: Option<(Generation, Duration)>,
    launched: u32,
    exits_told: u32,
    told: Vec<PluginEvent>,
}

/// What the outside does next.
#[derive(Clone, Debug)]
enum Act {
    /// A person or the supervisor asks for something.
    Request(u8),
    /// A phase under way ends well.
    Done,
    /// A phase under way ends badly.
    Fail(Permanence),
    /// The process ends, asked or not.
    Exit(i32),
    ReadyLost,
    ReadyRegained,
    Hung,
    Drained,
    GracePassed,
    RestartDue,
    /// A process of an earlier supervisor's is found, of the last generation known or a later one.
    Found(u8),
    /// A report of an earlier generation, or of something that is over.
    Stale(u8),
    Wait(u16),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..8_u8).prop_map(Act::Request),
        12 => Just(Act::Done),
        1 => prop_oneof![Just(Permanence::Transient), Just(Permanence::Permanent)].prop_map(Act::Fail),
        2 => prop_oneof![Just(0), Just(1), Just(78)].prop_map(Act::Exit),
        1 => Just(Act::ReadyLost),
        1 => Just(Act::ReadyRegained),
        1 => Just(Act::Hung),
        3 => Just(Act::Drained),
        3 => Just(Act::GracePassed),
        3 => Just(Act::RestartDue),
        2 => (0..8_u8).prop_map(Act::Stale),
        1 => (0..2_u8).prop_map(Act::Found),
        1 => any::<u16>().prop_map(Act::Wait),
    ]
}

/// How long what is found living had been ready.
const READY_FOR: Duration = Duration::from_secs(100);

fn failure(permanence: Permanence) -> Failure {
    let error = Error::new(Code::NeverListened, "made up", "none");
    Failure { error, permanence, stderr_tail: vec!["last words".to_owned()] }
}

fn exit(code: i32) -> Exit {
    Exit { kind: ExitKind::Code(code), oom: false, uptime_ms: 5, stderr_tail: Vec::new() }
}

impl World {
    fn new() -> Self {
        Self {
            life: Life::new("sample".parse().unwrap()),
            policy: LifePolicy::default(),
            now: Time::ZERO,
            working: None,
            running: None,
            asked_to_end: false,
            routed: None,
            draining: None,
            grace: None,
            restart: None,
            launched: 0,
            exits_told: 0,
            told: Vec::new(),
        }
    }

    fn event(&self, act: &Act) -> Option<Event> {
        let generation = self.life.generation();
        Some(match act {
            Act::Request(0) => Event::Discovered { directory: "/plugins/sample".to_owned() },
            Act::Request(2) => Event::RestartRequested,
            Act::Request(3) => Event::UnloadRequested,
            Act::Request(4) => Event::StopRequested(Haste::Gentle),
            Act::Request(5) => Event::StopRequested(Haste::Now),
            Act::Request(6) => Event::Removed,
            Act::Request(_) => Event::LoadRequested,
            Act::Done => {
                let (generation, phase) = self.working?;
                Event::PhaseDone { generation, phase }
            }
            Act::Fail(permanence) => {
                let (generation, phase) = self.working?;
                Event::PhaseFailed { generation, phase, failure: failure(*permanence) }
            }
            Act::Exit(code) => Event::Exited { generation: self.running?, exit: exit(*code) },
            Act::ReadyLost => Event::ReadyLost { generation },
            Act::ReadyRegained => Event::ReadyRegained { generation },
            Act::Hung => Event::Hung { generation, missed: 3 },
            Act::Drained => Event::Drained { generation: self.draining?, inflight_left: 0 },
            Act::GracePassed => Event::GracePassed { generation: self.grace? },
            Act::RestartDue => Event::RestartDue { generation: self.restart?.0 },
            Act::Found(later) => Event::Reattached {
                generation: Generation(generation.0 + u64::from(*later)),
                ready_for: READY_FOR,
                gap: Duration::from_millis(300),
            },
            Act::Stale(kind) => {
                let generation = Generation(generation.0.checked_sub(1)?);
                match kind {
                    0 => Event::PhaseDone { generation, phase: Phase::Launch },
                    1 => Event::PhaseFailed { generation, phase: Phase::Init, failure: failure(Permanence::Permanent) },
                    2 => Event::ReadyLost { generation },
                    3 => Event::ReadyRegained { generation },
                    4 => Event::Hung { generation, missed: 3 },
                    5 => Event::Exited { generation, exit: exit(1) },
                    6 => Event::Drained { generation, inflight_left: 1 },
                    _ => Event::RestartDue { generation },
                }
            }
            Act::Wait(_) => return None,
        })
    }

    fn act(&mut self, act: &Act) {
        if let Act::Wait(millis) = act {
            self.now = self.now + Duration::from_millis(u64::from(*millis) * 20);
        }
        let Some(event) = self.event(act) else { return };
        // What happens in the world happens whether or not `step` takes notice.
        match &event {
            Event::PhaseDone { generation, phase: Phase::Launch }
                if self.working == Some((*generation, Phase::Launch)) =>
            {
                self.running = Some(*generation);
                self.asked_to_end = false;
                self.launched += 1;
            }
            Event::Reattached { generation, .. }
                if self.life.state() == &State::Discovered && *generation != Generation::NONE =>
            {
                self.running = Some(*generation);
                self.asked_to_end = false;
                self.launched += 1;
            }
            Event::Exited { generation, .. } if self.running == Some(*generation) => self.running = None,
            Event::RestartDue { generation } if self.restart.is_some_and(|(of, _)| of == *generation) => {
                self.restart = None;
            }
            _ => {}
        }
        if let Event::PhaseDone { generation, phase } | Event::PhaseFailed { generation, phase, .. } = &event
            && self.working == Some((*generation, *phase))
        {
            self.working = None;
        }
        let _ = self.feed(event);
    }

    fn feed(&mut self, event: Event) -> Result<(), RefusedTransition> {
        let before = self.life.clone();
        let is_report = event.generation().is_some();
        let is_stale = event.generation().is_some_and(|generation| generation != before.generation());
        let context = Context { now: self.now, jitter: Jitter::MIDDLE, policy: &self.policy };
        let effects = match self.life.apply(event, context) {
            Ok(effects) => effects,
            Err(refused) => {
                assert!(!is_report, "a report was refused");
                assert_eq!(self.life, before, "a refusal changed something");
                assert!(!refused.error.hint.is_empty());
                return Err(refused);
            }
        };
        if is_stale {
            assert_eq!((&self.life, effects.len()), (&before, 0), "a stale report had effects");
        }
        for effect in effects {
            self.carry_out(effect);
        }
        self.check(&before);
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) {
        let current = self.life.generation();
        match effect {
            Effect::Begin { generation, phase } => {
                assert_eq!(generation, current);
                let State::Loading(loading) = self.life.state() else { panic!("{phase} begun outside of LOADING") };
                assert_eq!((loading.phase, &loading.stopping), (phase, &None));
                assert_eq!(self.working, None, "two phases at once");
                match phase {
                    Phase::Verify if loading.origin != Origin::Launched => {
                        assert_eq!(self.running, Some(generation), "nothing to take over");
                    }
                    Phase::Resolve | Phase::Verify | Phase::Launch => {
                        assert_eq!(loading.origin, Origin::Launched, "{phase} of what runs already");
                        assert_eq!(self.running, None, "{phase} while a process runs");
                    }
                    Phase::Init => {
                        assert_eq!((self.running, loading.origin), (Some(generation), Origin::Launched));
                    }
                    Phase::Handshake => assert_eq!(self.running, Some(generation)),
                    Phase::Register => {
                        assert_eq!((self.running, self.routed), (Some(generation), None));
                        self.routed = Some(generation);
                    }
                }
                self.working = Some((generation, phase));
            }
            Effect::Withdraw { generation } => assert_eq!(self.routed.take(), Some(generation)),
            Effect::Restore { generation } => assert_eq!(self.routed.replace(generation), None),
            Effect::Drain { generation, time } => {
                assert_eq!((self.running, self.routed), (Some(generation), None));
                assert_eq!(time, self.policy.drain);
                self.draining = Some(generation);
            }
            Effect::Terminate { generation, grace, why: _ } => {
                assert_eq!((self.running, self.routed), (Some(generation), None));
                assert_eq!(grace, self.policy.grace);
                self.draining = None;
                self.grace = Some(generation);
                self.asked_to_end = true;
            }
            Effect::Kill { generation } => {
                assert_eq!((self.running, self.routed), (Some(generation), None));
                self.draining = None;
                self.asked_to_end = true;
            }
            Effect::ScheduleRestart { generation, delay } => {
                assert_eq!(generation, current);
                assert_eq!(self.restart.replace((generation, delay)), None, "two restarts scheduled");
            }
            Effect::CancelRestart => assert!(self.restart.take().is_some(), "no restart was scheduled"),
            Effect::Emit(event) => {
                self.exits_told += u32::from(matches!(event, PluginEvent::Exited { .. }));
                self.told.push(event);
            }
            Effect::Forget { generation } => {
                assert!(generation <= current);
                assert_eq!((self.running, self.routed), (None, None), "forgot what still runs or is routed to");
                self.working = self.working.filter(|(of, _)| *of != generation);
                self.draining = None;
                self.grace = None;
            }
        }
    }

    fn check(&self, before: &Life) {
        assert!(self.life.generation() >= before.generation());
        assert!(
            legal(before.state(), self.life.state()),
            "{} became {}",
            before.state().name(),
            self.life.state().name()
        );
        let launching = self.working.is_some_and(|(_, phase)| phase == Phase::Launch);
        if !self.life.has_process() {
            assert_eq!((self.running, launching, self.routed), (None, false, None), "{:?}", self.life);
        }
        match self.life.state() {
            State::Loaded(loaded) => {
                assert_eq!(self.running, Some(self.life.generation()));
                let serving = matches!(loaded.condition, Condition::Serving { .. });
                assert_eq!(self.routed.is_some(), serving, "routed and serving differ");
            }
            State::Loading(loading) => {
                let registering = loading.phase == Phase::Register && loading.stopping.is_none();
                assert_eq!(self.routed.is_some(), registering);
            }
            State::Failed(failed) => {
                assert_eq!(failed.restart.is_some(), self.restart.is_some(), "a restart without a timer");
            }
            State::Unknown | State::Discovered | State::Unloaded | State::Quarantined => {
                assert_eq!(self.restart, None, "a restart is still scheduled");
            }
        }
        assert_eq!(self.exits_told, self.launched - u32::from(self.running.is_some()), "one event for each exit");
    }

    /// Answers everything that is open, as a sound world would sooner or later.
    fn settle(&mut self) {
        for _ in 0..20 {
            let act = if self.working.is_some() {
                Act::Done
            } else if self.draining.is_some() {
                Act::Drained
            } else if self.asked_to_end && self.running.is_some() {
                Act::Exit(0)
            } else {
                return;
            };
            self.act(&act);
        }
        panic!("it does not come to rest: {:?}", self.life);
    }

    fn loaded() -> Self {
        let mut world = Self::new();
        world.act(&Act::Request(0));
        world.act(&Act::Request(1));
        world.settle();
        assert!(matches!(world.life.state(), State::Loaded(_)));
        world
    }

    /// Found again by a new supervisor, before anything was asked of it.
    fn adopted() -> Self {
        let mut world = Self::new();
        world.act(&Act::Request(0));
        world.act(&Act::Found(1));
        world
    }

    fn named(&self, name: &str) -> Vec<&PluginEvent> {
        let name = format!("io.plugvisor.plugin.{name}.v1");
        let told = self.told.iter();
        told.filter(|event| crate::event::Event::from((*event).clone()).type_name() == name).collect()
    }
}

/// The changes that the design allows; staying is one.
fn legal(from: &State, to: &State) -> bool {
    match from {
        State::Unknown => matches!(to, State::Unknown | State::Discovered | State::Quarantined),
        State::Discovered => {
            matches!(to, State::Discovered | State::Loading(_) | State::Unknown | State::Quarantined)
        }
        State::Loading(_) => {
            matches!(to, State::Loading(_) | State::Loaded(_) | State::Failed(_) | State::Unloaded | State::Quarantined)
        }
        State::Loaded(_) => {
            matches!(to, State::Loaded(_) | State::Loading(_) | State::Failed(_) | State::Unloaded | State::Quarantined)
        }
        State::Unloaded | State::Failed(_) => {
            matches!(to, State::Unloaded | State::Failed(_) | State::Loading(_) | State::Unknown | State::Quarantined)
        }
        State::Quarantined => matches!(to, State::Quarantined),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_promises_hold(acts in prop::collection::vec(act(), 1..200), haste: bool, end: bool) {
        let mut world = World::new();
        world.act(&Act::Request(0));
        for act in &acts {
            world.act(act);
        }
        if end {
            world.feed(Event::QuarantineRequested { by: "test".to_owned() }).unwrap();
        }
        // However it came here, a stop brings it to rest.
        let haste = if haste { Haste::Now } else { Haste::Gentle };
        world.feed(Event::StopRequested(haste)).unwrap();
        world.settle();
        prop_assert!(!world.life.has_process());
        prop_assert_eq!((world.running, world.routed, world.restart), (None, None, None));
        if end {
            prop_assert_eq!(world.life.state(), &State::Quarantined);
            let refused = world.feed(Event::LoadRequested).unwrap_err();
            prop_assert_eq!(refused.error.code, Code::PluginQuarantined);
        }
    }

    /// Events that no sound world would send: they may mislead, but not break it.
    #[test]
    fn nonsense_neither_panics_nor_turns_generations_back(
        kinds in prop::collection::vec((0..18_usize, 0..4_u64, 0..6_usize), 1..200),
    ) {
        let policy = LifePolicy::default();
        let context = Context { now: Time::ZERO, jitter: Jitter::MIDDLE, policy: &policy };
        let mut life = Life::new("sample".parse().unwrap());
        for (kind, behind, phase) in kinds {
            let generation = Generation(life.generation().0.saturating_sub(behind));
            let phase = Phase::ALL[phase];
            let event = match kind {
                0 => Event::Discovered { directory: String::new() },
                1 => Event::Removed,
                2 => Event::LoadRequested,
                3 => Event::RestartRequested,
                4 => Event::UnloadRequested,
                5 => Event::StopRequested(Haste::Gentle),
                6 => Event::StopRequested(Haste::Now),
                7 => Event::PhaseFailed { generation, phase, failure: failure(Permanence::Transient) },
                8 => Event::ReadyLost { generation },
                9 => Event::ReadyRegained { generation },
                10 => Event::Hung { generation, missed: 3 },
                11 => Event::Exited { generation, exit: exit(1) },
                12 => Event::Drained { generation, inflight_left: 2 },
                13 => Event::GracePassed { generation },
                14 => Event::RestartDue { generation },
                15 => Event::Reattached { generation, ready_for: READY_FOR, gap: READY_FOR },
                _ => Event::PhaseDone { generation, phase },
            };
            let before = life.generation();
            if let Ok((next, _)) = step(life.clone(), event, context) {
                prop_assert!(next.generation() >= before);
                prop_assert!(legal(life.state(), next.state()));
                life = next;
            }
        }
    }
}

#[test]
fn a_load_goes_through_its_phases_and_tells_of_each() {
    let world = World::loaded();
    let phases: Vec<_> = world
        .named("loading_progress")
        .into_iter()
        .map(|event| match event {
            PluginEvent::LoadingProgress { phase, percent } => (*phase, *percent),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = [
        ("resolve", 0),
        ("verify", 15),
        ("launch", 30),
        ("handshake", 50),
        ("init", 80),
        ("register", 95),
        ("loaded", 100),
    ];
    assert_eq!(phases, expected);
    assert_eq!(world.named("ready").len(), 1);
}

#[test]
fn what_lives_is_taken_over_without_a_launch_or_init() {
    let mut world = World::adopted();
    assert!(world.life.has_process());
    world.now = world.now + Duration::from_millis(50);
    world.settle();
    assert!(matches!(world.life.state(), State::Loaded(_)));
    let phases: Vec<_> = world
        .named("loading_progress")
        .into_iter()
        .map(|event| match event {
            PluginEvent::LoadingProgress { phase, .. } => *phase,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(phases, ["verify", "handshake", "register", "loaded"]);
    assert_eq!((world.life.generation(), world.launched), (Generation(1), 1));
    assert_eq!(world.named("reattached"), [&PluginEvent::Reattached { gap_ms: 350 }]);
    // It had been ready for long enough before, so its failure is its first.
    world.act(&Act::Exit(1));
    assert_eq!(world.restart, Some((Generation(1), Duration::from_millis(375))));
}

#[test]
fn what_lives_and_is_not_what_is_there_now_gives_way_to_it() {
    let mut world = World::adopted();
    world.act(&Act::Fail(Permanence::Permanent));
    assert!(world.asked_to_end && world.life.has_process());
    world.act(&Act::Exit(9));
    world.settle();
    assert!(matches!(world.life.state(), State::Loaded(_)));
    assert_eq!((world.life.generation(), world.life.restarts()), (Generation(2), 0));
    assert_eq!(world.named("orphan_reaped"), [&PluginEvent::OrphanReaped { why: "made up".to_owned() }]);
    assert_eq!(world.named("rejected").len() + world.named("gave_up").len(), 0);
}

#[test]
fn what_died_while_nobody_looked_is_restarted_like_any_other() {
    let mut world = World::adopted();
    world.act(&Act::Exit(3));
    let State::Failed(failed) = world.life.state() else { panic!("{:?}", world.life) };
    assert_eq!(failed.error.code, Code::PluginExited);
    assert_eq!(world.named("exited").len(), 1);
    world.act(&Act::RestartDue);
    world.settle();
    assert_eq!((world.life.generation(), world.life.restarts()), (Generation(2), 1));
}

#[test]
fn what_is_being_taken_over_can_be_stopped_at_any_time() {
    for done in 0..3 {
        let mut world = World::adopted();
        for _ in 0..done {
            world.act(&Act::Done);
        }
        world.act(&Act::Request(4));
        assert!(world.asked_to_end && world.life.has_process(), "after {done} phases");
        world.act(&Act::Exit(0));
        assert_eq!(world.life.state(), &State::Unloaded);
    }
}

#[test]
fn nothing_is_taken_over_twice_or_without_a_generation() {
    let mut world = World::adopted();
    let again = Event::Reattached { generation: Generation(2), ready_for: READY_FOR, gap: READY_FOR };
    assert_eq!(world.feed(again.clone()).unwrap_err().error.code, Code::PluginAlreadyLoaded);
    let mut world = World::new();
    assert_eq!(world.feed(again).unwrap_err().error.code, Code::PluginNotFound);
    world.act(&Act::Request(0));
    let none = Event::Reattached { generation: Generation::NONE, ready_for: READY_FOR, gap: READY_FOR };
    assert_eq!(world.feed(none).unwrap_err().error.code, Code::PluginWrongState);
}

#[test]
fn a_stop_drains_then_asks_then_kills() {
    let mut world = World::loaded();
    world.act(&Act::Request(3));
    assert_eq!((world.routed, world.asked_to_end), (None, false), "drained before it is asked to end");
    world.act(&Act::Drained);
    assert!(world.asked_to_end);
    assert_eq!(world.named("killed").len(), 0);
    world.act(&Act::GracePassed);
    assert_eq!(world.named("killed"), [&PluginEvent::Killed { stage: "terminate" }]);
    world.act(&Act::Exit(0));
    assert_eq!(world.life.state(), &State::Unloaded);
    assert_eq!(world.named("restart_scheduled").len(), 0);
}

#[test]
fn a_process_that_dies_unasked_is_restarted_in_a_new_generation() {
    let mut world = World::loaded();
    let before = world.life.generation();
    world.act(&Act::Exit(1));
    let State::Failed(failed) = world.life.state() else { panic!("{:?}", world.life) };
    // uniform(d/2, d) of d = 0.5 s, at the middle.
    assert_eq!(failed.restart.map(|restart| restart.at), Some(Time::from_millis(375)));
    assert_eq!(world.restart, Some((before, Duration::from_millis(375))));
    world.act(&Act::RestartDue);
    world.settle();
    assert!(matches!(world.life.state(), State::Loaded(_)));
    assert_eq!((world.life.generation(), world.life.restarts()), (before.next(), 1));
}

#[test]
fn a_restart_that_is_scheduled_and_not_made_is_not_counted() {
    // Another start is asked for before it is due, or none.
    for request in [Event::RestartRequested, Event::LoadRequested, Event::UnloadRequested] {
        let mut world = World::loaded();
        world.act(&Act::Exit(1));
        assert!(world.restart.is_some());
        assert_eq!(world.life.restarts(), 0, "it may never be made");
        world.feed(request.clone()).expect("it may be asked for");
        world.settle();
        assert_eq!((world.restart, world.life.restarts()), (None, 0), "{request:?}");
    }
}

#[test]
fn exit_78_and_permanent_failures_are_not_restarted() {
    let mut world = World::loaded();
    world.act(&Act::Exit(78));
    let State::Failed(failed) = world.life.state() else { panic!("{:?}", world.life) };
    assert_eq!((failed.error.code, failed.restart), (Code::PluginMisconfigured, None));
    assert_eq!(world.named("gave_up").len(), 1);

    world.act(&Act::Request(1));
    world.act(&Act::Fail(Permanence::Permanent));
    let State::Failed(failed) = world.life.state() else { panic!("{:?}", world.life) };
    assert_eq!((failed.error.code, failed.restart), (Code::NeverListened, None));
    assert_eq!(world.named("rejected").len(), 1);
}

#[test]
fn a_failed_handshake_kills_before_it_counts_as_failed() {
    let mut world = World::new();
    world.act(&Act::Request(0));
    world.act(&Act::Request(1));
    for _ in 0..3 {
        world.act(&Act::Done);
    }
    world.act(&Act::Fail(Permanence::Transient));
    assert!(matches!(world.life.state(), State::Loading(_)), "the process is not gone yet");
    assert!(world.asked_to_end);
    world.act(&Act::Exit(0));
    assert!(matches!(world.life.state(), State::Failed(_)));
    assert_eq!(world.named("handshake_failed").len(), 1);
    assert!(world.restart.is_some());
}

#[test]
fn a_process_that_comes_after_the_stop_is_killed() {
    let mut world = World::new();
    world.act(&Act::Request(0));
    world.act(&Act::Request(1));
    world.act(&Act::Done);
    world.act(&Act::Done);
    world.act(&Act::Request(3));
    assert!(world.life.has_process(), "the launcher's answer is awaited");
    world.act(&Act::Done);
    assert!(world.asked_to_end, "killed on arrival");
    world.act(&Act::Exit(0));
    assert_eq!(world.life.state(), &State::Unloaded);
}

#[test]
fn readiness_withdraws_and_restores_and_a_hang_kills() {
    let mut world = World::loaded();
    world.act(&Act::ReadyLost);
    assert_eq!(world.routed, None);
    world.act(&Act::ReadyLost);
    assert_eq!(world.named("degraded").len(), 1, "said once");
    world.act(&Act::ReadyRegained);
    assert_eq!(world.routed, Some(world.life.generation()));
    world.act(&Act::Hung);
    assert!(world.asked_to_end);
    world.act(&Act::Exit(0));
    let State::Failed(failed) = world.life.state() else { panic!("{:?}", world.life) };
    assert_eq!(failed.error.code, Code::Hung);
    assert!(failed.restart.is_some());
}

#[test]
fn five_failures_in_a_minute_are_a_crash_loop_and_an_operator_starts_anew() {
    let mut world = World::loaded();
    for failures in 1..=6 {
        world.act(&Act::Exit(1));
        let (_, delay) = world.restart.unwrap();
        let State::Failed(failed) = world.life.state() else { panic!("{:?}", world.life) };
        let crash_loop = failed.restart.is_some_and(|restart| restart.crash_loop);
        assert_eq!(crash_loop, failures >= 5, "after {failures} failures");
        if crash_loop {
            assert_eq!(delay, Duration::from_secs(45), "three quarters of the cap");
        }
        world.now = world.now + delay;
        world.act(&Act::RestartDue);
        world.settle();
    }
    assert_eq!(world.named("crashloop").len(), 1, "said once");
    world.act(&Act::Exit(1));
    world.act(&Act::Request(2));
    assert_eq!(world.restart, None, "the scheduled restart is off");
    world.settle();
    world.act(&Act::Exit(1));
    assert_eq!(world.restart.map(|(_, delay)| delay), Some(Duration::from_millis(375)), "forgiven");
}

#[test]
fn requests_that_do_not_fit_say_what_to_do() {
    let mut world = World::new();
    assert_eq!(world.feed(Event::LoadRequested).unwrap_err().error.code, Code::PluginNotFound);
    world.act(&Act::Request(0));
    assert_eq!(world.feed(Event::UnloadRequested).unwrap_err().error.code, Code::PluginNotLoaded);
    let mut world = World::loaded();
    let refused = world.feed(Event::LoadRequested).unwrap_err();
    assert_eq!((refused.error.code, refused.state, refused.request), (Code::PluginAlreadyLoaded, "LOADED", "load"));
    world.feed(Event::StopRequested(Haste::Gentle)).unwrap();
    assert_eq!(world.feed(Event::RestartRequested).unwrap_err().error.code, Code::PluginWrongState);
}

#[test]
fn a_minute_of_being_ready_forgives_even_if_it_degrades_before_it_dies() {
    for (ready_ms, degrades, delay_ms) in
        [(60_000, false, 375), (60_000, true, 375), (59_999, false, 750), (59_999, true, 750)]
    {
        let mut world = World::loaded();
        world.act(&Act::Exit(1));
        world.act(&Act::RestartDue);
        world.settle();
        world.now = world.now + Duration::from_millis(ready_ms);
        if degrades {
            world.act(&Act::ReadyLost);
            world.now = world.now + Duration::from_secs(1);
        }
        world.act(&Act::Exit(1));
        let delay = world.restart.map(|(_, delay)| delay);
        assert_eq!(delay, Some(Duration::from_millis(delay_ms)), "ready for {ready_ms} ms, degrades: {degrades}");
    }
}
