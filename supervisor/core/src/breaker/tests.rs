//! The numbers of the breaker, and the breaker against a plain list of calls.

use std::time::Duration;

use proptest::prelude::*;

use super::{Breaker, Mode, OpenCause, Outcome, Permit, Position, Settings, Transition};
use crate::Time;

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn at(millis: u64) -> Time {
    Time::from_millis(millis)
}

fn call(breaker: &mut Breaker, outcome: Outcome, now: Time) -> Option<Transition> {
    let permit = breaker.admit(now).expect("admitted");
    breaker.record(permit, outcome, ms(1), now)
}

fn steady() -> Settings {
    Settings { recovery_spread: 0.0, ..Settings::default() }
}

fn opened(transition: Option<Transition>) -> Option<(OpenCause, Duration)> {
    match transition {
        Some(Transition::Opened { cause, open_for, window: _ }) => Some((cause, open_for)),
        Some(Transition::HalfOpened | Transition::Closed { .. }) | None => None,
    }
}

/// A breaker that opened at the moment 0.
fn open() -> Breaker {
    let mut breaker = Breaker::new(steady(), 1);
    for _ in 0..4 {
        assert_eq!(call(&mut breaker, Outcome::Failure, at(0)), None);
    }
    let transition = call(&mut breaker, Outcome::Failure, at(0));
    assert_eq!(opened(transition), Some((OpenCause::ConsecutiveFailures, ms(60_000))));
    breaker
}

#[test]
fn the_seed_defaults_are_those_of_the_contract() {
    let Settings {
        mode,
        failure_threshold,
        recovery,
        half_open_calls,
        bucket,
        rate_calls,
        failure_rate,
        slow_rate,
        ..
    } = Settings::default();
    assert_eq!((mode, failure_threshold, recovery, half_open_calls), (Mode::On, 5, ms(60_000), 3));
    assert_eq!((bucket, rate_calls, failure_rate, slow_rate), (ms(1000), 20, 0.5, 0.8));
}

#[test]
fn another_supervisor_goes_on_where_it_stood() {
    // Open: the rest of the open time, and the doubling goes on.
    let mut breaker = open();
    for permit in [at(60_000), at(180_000)] {
        assert!(opened(call(&mut breaker, Outcome::Failure, permit)).is_some());
    }
    let memory = breaker.memory(at(180_000));
    assert_eq!((memory.position, memory.open_left, memory.reopened), (Position::Open, ms(240_000), 2));
    let mut again = Breaker::resume(steady(), 2, memory, at(7));
    assert!(again.admit(at(240_006)).is_err());
    assert_eq!(
        opened(call(&mut again, Outcome::Failure, at(240_007))),
        Some((OpenCause::HalfOpenFailure, ms(480_000)))
    );

    // Half-open begins anew.
    let mut breaker = open();
    let lent = breaker.admit(at(60_000)).unwrap();
    let mut again = Breaker::resume(steady(), 2, breaker.memory(at(60_001)), at(9));
    assert_eq!(again.snapshot(at(9)).position, Position::HalfOpen);
    for _ in 0..2 {
        assert_eq!(call(&mut again, Outcome::Success, at(9)), None);
    }
    assert!(matches!(call(&mut again, Outcome::Success, at(9)), Some(Transition::Closed { .. })));
    drop(lent);

    // Closed: failures in a row are not forgotten, and never open it by themselves.
    let mut breaker = Breaker::new(steady(), 1);
    for _ in 0..4 {
        call(&mut breaker, Outcome::Failure, at(0));
    }
    let memory = breaker.memory(at(0));
    let mut again = Breaker::resume(steady(), 2, memory, at(0));
    assert!(opened(call(&mut again, Outcome::Failure, at(0))).is_some());
    let strict = Settings { failure_threshold: 2, ..steady() };
    assert_eq!(Breaker::resume(strict, 2, memory, at(0)).snapshot(at(0)).position, Position::Closed);

    // One that never opens has nothing to go on from.
    let off = Settings { mode: Mode::Off, ..steady() };
    let mut again = Breaker::resume(off, 2, open().memory(at(0)), at(0));
    assert_eq!(call(&mut again, Outcome::Failure, at(0)), None);
}

#[test]
fn status_codes_mean_what_the_table_says() {
    let table = [
        (0, Outcome::Success),
        (1, Outcome::Ignored),
        (2, Outcome::Failure),
        (3, Outcome::Ignored),
        (4, Outcome::Failure),
        (5, Outcome::Ignored),
        (6, Outcome::Ignored),
        (7, Outcome::Ignored),
        (8, Outcome::Overloaded),
        (9, Outcome::Ignored),
        (10, Outcome::Ignored),
        (11, Outcome::Ignored),
        (12, Outcome::Ignored),
        (13, Outcome::Failure),
        (14, Outcome::Failure),
        (15, Outcome::Failure),
        (16, Outcome::Ignored),
        (17, Outcome::Failure),
        (-1, Outcome::Failure),
    ];
    for (code, outcome) in table {
        assert_eq!(Outcome::of_grpc(code), outcome, "code {code}");
    }
}

#[test]
fn five_failures_in_a_row_open_it_and_a_success_between_does_not() {
    open();
    let mut breaker = Breaker::new(steady(), 1);
    for round in 0..4 {
        // Far apart, so that the window stays empty and only the row counts.
        for failure in 0..4 {
            let now = at(round * 100_000 + failure);
            assert_eq!(call(&mut breaker, Outcome::Failure, now), None);
        }
        assert_eq!(call(&mut breaker, Outcome::Success, at(round * 100_000 + 5)), None);
    }
}

#[test]
fn callers_errors_and_overload_neither_count_nor_interrupt_the_row() {
    let mut breaker = Breaker::new(steady(), 1);
    for _ in 0..4 {
        call(&mut breaker, Outcome::Failure, at(0));
        for _ in 0..100 {
            assert_eq!(call(&mut breaker, Outcome::Ignored, at(0)), None);
            assert_eq!(call(&mut breaker, Outcome::Overloaded, at(0)), None);
        }
    }
    assert_eq!(breaker.snapshot(at(0)).window.calls, 4);
    assert!(opened(call(&mut breaker, Outcome::Failure, at(0))).is_some());
}

#[test]
fn half_of_twenty_calls_failing_opens_it() {
    for (calls, expected) in [(19, None), (20, Some(OpenCause::FailureRate))] {
        let mut breaker = Breaker::new(steady(), 1);
        let mut last = None;
        for number in 0..calls {
            let outcome = if number % 2 == 0 { Outcome::Success } else { Outcome::Failure };
            // Spread over the ten buckets.
            last = opened(call(&mut breaker, outcome, at(number * 450))).map(|(cause, _)| cause).or(last);
        }
        assert_eq!(last, expected, "{calls} calls");
    }
}

#[test]
fn calls_leave_the_window_after_ten_buckets() {
    let mut breaker = Breaker::new(steady(), 1);
    for number in 0..10 {
        let outcome = if number % 2 == 0 { Outcome::Failure } else { Outcome::Success };
        call(&mut breaker, outcome, at(0));
    }
    assert_eq!(breaker.snapshot(at(9999)).window.calls, 10);
    assert_eq!(breaker.snapshot(at(10_000)).window.calls, 0);
    for number in 0..19 {
        let outcome = if number % 2 == 0 { Outcome::Failure } else { Outcome::Success };
        assert_eq!(call(&mut breaker, outcome, at(10_000)), None, "call {number}: the earlier ten are forgotten");
    }
}

#[test]
fn eighty_percent_of_slow_calls_open_it_and_without_a_limit_none_is_slow() {
    for (limit, expected) in [(None, None), (Some(ms(100)), Some(OpenCause::SlowRate))] {
        let mut breaker = Breaker::new(Settings { slow_after: limit, ..steady() }, 1);
        let mut cause = None;
        for number in 0..20 {
            let latency = if number < 4 { ms(100) } else { ms(101) };
            let permit = breaker.admit(at(number)).expect("admitted");
            cause = opened(breaker.record(permit, Outcome::Success, latency, at(number))).map(|(cause, _)| cause);
            assert!(cause.is_none() || number == 19, "opened at call {number}");
        }
        assert_eq!(cause, expected);
    }
}

#[test]
fn an_open_breaker_refuses_until_its_time_and_says_how_long() {
    let mut breaker = open();
    let refused = breaker.admit(at(20_000)).unwrap_err();
    assert_eq!(refused.retry_after, ms(40_000));
    assert_eq!(breaker.snapshot(at(20_000)).position, Position::Open);
    assert_eq!(breaker.tick(at(59_999)), None);
    let permit = breaker.admit(at(60_000)).expect("half-open");
    assert_eq!(permit.transition(), Some(Transition::HalfOpened));
}

#[test]
fn half_open_lets_three_through_and_three_successes_close_it() {
    let mut breaker = open();
    let permits: Vec<Permit> = (0..3).map(|_| breaker.admit(at(60_000)).expect("one of three")).collect();
    assert_eq!(breaker.admit(at(60_001)).unwrap_err().retry_after, ms(29_999));
    let mut last = None;
    for permit in permits {
        assert_eq!(last, None);
        last = breaker.record(permit, Outcome::Success, ms(1), at(60_010));
    }
    assert_eq!(last, Some(Transition::Closed { open: ms(60_010) }));
    assert_eq!(breaker.snapshot(at(60_010)).position, Position::Closed);
}

#[test]
fn what_says_nothing_gives_the_half_open_call_back() {
    let mut breaker = open();
    for _ in 0..10 {
        assert_eq!(call(&mut breaker, Outcome::Ignored, at(60_000)), None);
        assert_eq!(call(&mut breaker, Outcome::Overloaded, at(60_000)), None);
    }
    assert_eq!(breaker.snapshot(at(60_000)).position, Position::HalfOpen);
}

#[test]
fn a_failure_while_half_open_doubles_the_open_time_up_to_the_cap() {
    let mut breaker = open();
    let mut now = at(60_000);
    for expected in [120_000, 240_000, 480_000, 600_000, 600_000] {
        let transition = call(&mut breaker, Outcome::Failure, now);
        assert_eq!(opened(transition), Some((OpenCause::HalfOpenFailure, ms(expected))));
        now = now + ms(expected);
    }
    // Closing forgets the doubling.
    for _ in 0..3 {
        call(&mut breaker, Outcome::Success, now);
    }
    for _ in 0..4 {
        call(&mut breaker, Outcome::Failure, now);
    }
    assert_eq!(opened(call(&mut breaker, Outcome::Failure, now)), Some((OpenCause::ConsecutiveFailures, ms(60_000))));
}

#[test]
fn half_open_is_bounded_in_time() {
    // Calls let through that never end.
    let mut breaker = open();
    let lost = breaker.admit(at(60_000)).expect("half-open");
    assert_eq!(breaker.tick(at(89_999)), None);
    assert_eq!(opened(breaker.tick(at(90_000))), Some((OpenCause::HalfOpenTimeout, ms(120_000))));
    assert_eq!(breaker.record(lost, Outcome::Success, ms(1), at(90_001)), None, "its epoch is over");

    // Fewer calls than asked for, all well.
    let mut breaker = open();
    call(&mut breaker, Outcome::Success, at(60_000));
    assert_eq!(breaker.tick(at(90_000)), Some(Transition::Closed { open: ms(90_000) }));

    // No call at all: nothing is judged, and a call is let through whenever it comes.
    let mut breaker = open();
    assert_eq!(breaker.tick(at(60_000)), Some(Transition::HalfOpened));
    assert_eq!(breaker.tick(at(1_000_000)), None);
    assert!(breaker.admit(at(1_000_000)).is_ok());
}

#[test]
fn health_probes_let_an_idle_breaker_recover_but_not_early() {
    let mut breaker = open();
    for second in 1..60 {
        assert_eq!(breaker.probe(Outcome::Success, at(second * 1000)), None, "after {second} s");
    }
    assert_eq!(breaker.probe(Outcome::Success, at(60_000)), Some(Transition::HalfOpened));
    assert_eq!(breaker.probe(Outcome::Success, at(62_000)), None);
    assert_eq!(breaker.probe(Outcome::Success, at(64_000)), Some(Transition::Closed { open: ms(64_000) }));

    let mut breaker = open();
    assert_eq!(
        opened(breaker.probe(Outcome::Failure, at(60_000))).map(|(cause, _)| cause),
        Some(OpenCause::HalfOpenFailure)
    );

    let mut breaker = Breaker::new(steady(), 1);
    for _ in 0..100 {
        assert_eq!(breaker.probe(Outcome::Failure, at(0)), None, "probes do not open a closed breaker");
    }
}

#[test]
fn permits_of_an_earlier_epoch_are_ignored() {
    let mut breaker = Breaker::new(steady(), 1);
    let mut permits: Vec<Permit> = (0..30).map(|_| breaker.admit(at(0)).expect("closed")).collect();
    for permit in permits.drain(..5) {
        breaker.record(permit, Outcome::Failure, ms(1), at(1));
    }
    assert_eq!(breaker.snapshot(at(1)).position, Position::Open);
    for permit in permits {
        assert_eq!(breaker.record(permit, Outcome::Success, ms(1), at(70_000)), None);
    }
    assert_eq!(breaker.snapshot(at(70_000)).position, Position::Open);
}

#[test]
fn an_off_breaker_admits_everything() {
    let mut breaker = Breaker::new(Settings { mode: Mode::Off, ..steady() }, 1);
    for _ in 0..100 {
        assert_eq!(call(&mut breaker, Outcome::Failure, at(0)), None);
    }
}

#[test]
fn open_times_vary_by_a_fifth_and_differ_between_seeds() {
    let mut seen = Vec::new();
    for seed in 0..50 {
        let mut breaker = Breaker::new(Settings::default(), seed);
        for _ in 0..4 {
            call(&mut breaker, Outcome::Failure, at(0));
        }
        let (_, open_for) = opened(call(&mut breaker, Outcome::Failure, at(0))).expect("the fifth failure");
        assert!((ms(48_000)..=ms(72_000)).contains(&open_for), "{open_for:?}");
        seen.push(open_for);
    }
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), 50);
}

/// The breaker as one would write it without thinking of speed: every call of its closed time in a list.
struct Model {
    position: Position,
    /// Moment in ms, failed, slow.
    calls: Vec<(u64, bool, bool)>,
    until: u64,
    since: u64,
    lent: u32,
    successes: u32,
    reopened: u32,
}

impl Model {
    fn new() -> Self {
        Self { position: Position::Closed, calls: Vec::new(), until: 0, since: 0, lent: 0, successes: 0, reopened: 0 }
    }

    fn open(&mut self, now: u64, again: bool) {
        self.reopened = if again { self.reopened + 1 } else { 0 };
        self.until = now + (60_000_u64 << self.reopened.min(10)).min(600_000);
        self.position = Position::Open;
    }

    fn close(&mut self) {
        *self = Self::new();
    }

    fn tick(&mut self, now: u64) {
        match self.position {
            Position::Open if now >= self.until => {
                self.position = Position::HalfOpen;
                (self.since, self.lent, self.successes) = (now, 0, 0);
            }
            Position::HalfOpen if now >= self.since + 30_000 => match (self.lent, self.successes) {
                (0, 0) => {}
                (_, 0) => self.open(now, true),
                _ => self.close(),
            },
            Position::Closed | Position::Open | Position::HalfOpen => {}
        }
    }

    fn admit(&mut self, now: u64) -> bool {
        self.tick(now);
        match self.position {
            Position::Closed => true,
            Position::Open => false,
            Position::HalfOpen => {
                let admitted = self.lent + self.successes < 3;
                self.lent += u32::from(admitted);
                admitted
            }
        }
    }

    fn record(&mut self, outcome: Outcome, slow: bool, now: u64) {
        let failed = match outcome {
            Outcome::Success => false,
            Outcome::Failure => true,
            Outcome::Ignored | Outcome::Overloaded => {
                self.lent = self.lent.saturating_sub(1);
                return;
            }
        };
        match self.position {
            Position::Open => {}
            Position::HalfOpen if failed => self.open(now, true),
            Position::HalfOpen => {
                self.lent = self.lent.saturating_sub(1);
                self.succeeded();
            }
            Position::Closed => {
                self.calls.push((now, failed, slow));
                let row = self.calls.iter().rev().take_while(|(_, failed, _)| *failed).count();
                let first = (now / 1000).saturating_sub(9) * 1000;
                let window: Vec<_> = self.calls.iter().filter(|(at, ..)| *at >= first).collect();
                let failures = window.iter().filter(|(_, failed, _)| *failed).count();
                let slow = window.iter().filter(|(.., slow)| *slow).count();
                let judged = window.len() >= 20;
                if row >= 5 || judged && (failures * 2 >= window.len() || slow * 5 >= window.len() * 4) {
                    self.open(now, false);
                }
            }
        }
    }

    fn succeeded(&mut self) {
        self.successes += 1;
        if self.successes >= 3 {
            self.close();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_breaker_agrees_with_a_list_of_calls(
        acts in prop::collection::vec((0..12_u8, 0..6_u8, any::<bool>(), 0..3_u8), 1..400),
    ) {
        let mut breaker = Breaker::new(Settings { slow_after: Some(ms(100)), ..steady() }, 0);
        let mut model = Model::new();
        // Calls under way, with the number of changes that the model had seen when they began.
        let mut under_way: Vec<(Permit, u32)> = Vec::new();
        let (mut now, mut changes) = (0, 0);
        for (kind, outcome, slow, wait) in acts {
            now += match wait {
                0 => 0,
                1 => u64::from(kind) * 70,
                _ if kind == 11 => 65_000,
                _ => 310,
            };
            let before = model.position;
            let outcome = match outcome {
                0 => Outcome::Ignored,
                1 => Outcome::Overloaded,
                2 | 3 => Outcome::Failure,
                _ => Outcome::Success,
            };
            match kind {
                0..=4 => {
                    let admitted = model.admit(now);
                    changes += u32::from(model.position != before);
                    match breaker.admit(at(now)) {
                        Ok(permit) => {
                            prop_assert!(admitted);
                            under_way.push((permit, changes));
                        }
                        Err(refused) => {
                            prop_assert!(!admitted);
                            prop_assert!(refused.retry_after > Duration::ZERO);
                        }
                    }
                }
                5..=9 if !under_way.is_empty() => {
                    let (permit, epoch) = under_way.remove(usize::from(kind) % under_way.len());
                    let transition = breaker.record(permit, outcome, ms(if slow { 101 } else { 100 }), at(now));
                    if epoch == changes {
                        model.record(outcome, slow, now);
                    }
                    prop_assert_eq!(transition.is_some(), model.position != before);
                }
                10 => {
                    model.tick(now);
                    let ticked = model.position;
                    if model.position == Position::HalfOpen {
                        match outcome {
                            Outcome::Success => model.succeeded(),
                            Outcome::Failure => model.open(now, true),
                            Outcome::Ignored | Outcome::Overloaded => {}
                        }
                    }
                    changes += u32::from(ticked != before);
                    changes += u32::from(model.position != ticked);
                    let transition = breaker.probe(outcome, at(now));
                    prop_assert_eq!(transition.is_some(), model.position != before || ticked != before);
                }
                _ => {
                    model.tick(now);
                    let transition = breaker.tick(at(now));
                    prop_assert_eq!(transition.is_some(), model.position != before);
                }
            }
            if kind != 10 && kind > 4 {
                changes += u32::from(model.position != before);
            }
            prop_assert_eq!(breaker.snapshot(at(now)).position, model.position);
        }
    }
}

#[test]
fn an_operator_closes_it_and_every_count_begins_anew() {
    let mut breaker = Breaker::new(Settings { failure_threshold: 2, recovery_spread: 0.0, ..Settings::default() }, 1);
    assert_eq!(breaker.reset(at(0)), None, "it was closed");
    let permits = [breaker.admit(at(1)).unwrap(), breaker.admit(at(1)).unwrap(), breaker.admit(at(1)).unwrap()];
    let [one, two, late] = permits;
    assert_eq!(breaker.record(one, Outcome::Failure, ms(1), at(2)), None);
    assert!(matches!(breaker.record(two, Outcome::Failure, ms(1), at(3)), Some(Transition::Opened { .. })));
    assert!(breaker.admit(at(4)).is_err());
    assert_eq!(breaker.reset(at(13)), Some(Transition::Closed { open: ms(10) }));
    let snapshot = breaker.snapshot(at(13));
    assert_eq!((snapshot.position, snapshot.consecutive_failures, snapshot.window.calls), (Position::Closed, 0, 0));
    // A call from before the reset judges nothing; one failure alone does not open it again.
    assert_eq!(breaker.record(late, Outcome::Failure, ms(1), at(14)), None);
    let next = breaker.admit(at(15)).unwrap();
    assert_eq!(breaker.record(next, Outcome::Failure, ms(1), at(16)), None);
}
