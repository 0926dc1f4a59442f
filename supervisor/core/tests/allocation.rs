//! What runs for every call allocates nothing, until a call is refused.

use std::{hint::black_box, time::Duration};

use allocation_counter::measure;
use plugvisor_core::{
    CapabilitySet, Generation, Rights, Time,
    breaker::{Breaker, Outcome, Settings},
    route::{Availability, Caller, Export, Plugin, PluginCaller, RouteTable, Service, route},
};
use plugvisor_package::Capability;

#[test]
fn a_breaker_allocates_nothing_in_any_position() {
    let mut breaker = Breaker::new(Settings::default(), 7);
    let mut positions = Vec::with_capacity(100_000);
    let info = measure(|| {
        for number in 0..100_000_u64 {
            let now = Time::from_millis(number * 20);
            if let Ok(permit) = breaker.admit(now) {
                // Well for a while, then badly for a while.
                let outcome = if number / 5000 % 2 == 0 { Outcome::Success } else { Outcome::Failure };
                black_box(breaker.record(permit, outcome, Duration::from_millis(1), now));
            }
            positions.push(breaker.snapshot(now).position);
        }
    });
    assert_eq!(info.count_total, 0, "{info:?}");
    positions.sort_unstable_by_key(|position| position.as_str());
    positions.dedup();
    assert_eq!(positions.len(), 3, "the calls were to lead through every position");
}

#[test]
fn a_call_that_may_pass_is_routed_without_allocating() {
    let service = |name: &str, token: Option<&str>| Service {
        name: name.to_owned(),
        token: token.map(str::to_owned),
        export: Export::Shared { global: true, capabilities: CapabilitySet::EMPTY },
    };
    let plugin = |name: &str, token| Plugin {
        name: name.parse().unwrap(),
        generation: Generation(1),
        availability: Availability::Serving,
        services: vec![service("acme.v1.One", token), service(&format!("acme.v1.{name}"), None)],
    };
    let table = RouteTable::new([plugin("alpha", Some("a")), plugin("beta", Some("b"))]);
    let caller = PluginCaller {
        name: "gamma".parse().unwrap(),
        generation: Generation(1),
        rights: Rights::of(CapabilitySet::of(&[Capability::InternalCalls])),
        dependencies: Vec::new(),
    };
    let info = measure(|| {
        for caller in [Caller::Plugin(&caller), Caller::Local { uid: 0 }] {
            for (service, token) in [("acme.v1.One", Some("b")), ("acme.v1.alpha", None)] {
                let decision = route(&table, caller, service, token, Some("delta,epsilon"));
                assert!(black_box(decision).is_ok());
            }
        }
    });
    assert_eq!(info.count_total, 0, "{info:?}");
    // The measure itself can fail: a refusal has a text.
    let refused = measure(|| drop(route(&table, Caller::Plugin(&caller), "acme.v1.None", None, None)));
    assert!(refused.count_total > 0);
}
