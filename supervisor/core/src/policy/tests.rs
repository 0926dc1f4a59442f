//! Tiers, walls and capabilities, case by case.

use plugvisor_package::{Capability as C, IsolationLevel as L, PluginName, TrustTier as T};
use proptest::prelude::*;

use super::{Asked, CapabilitySet, Limits, Operator, Policy, WhyNot};
use crate::Code;

fn name() -> PluginName {
    "sample".parse().unwrap()
}

fn operator(tier: T, grants: &[C]) -> Operator {
    Operator { tier, grants: CapabilitySet::of(grants), limits: Limits::NONE, place: "plugvisor.toml".into() }
}

#[test]
fn the_level_is_the_stronger_of_manifest_and_tier() {
    // manifest's tier, manifest's level, directory's tier, and what follows
    let table = [
        (None, None, T::Verified, Ok(L::Process)),
        (None, None, T::Internal, Ok(L::Process)),
        (None, Some(L::None), T::Verified, Ok(L::Process)),
        (None, Some(L::None), T::Internal, Ok(L::None)),
        (None, Some(L::Container), T::Verified, Ok(L::Container)),
        (None, Some(L::Sandbox), T::Internal, Ok(L::Sandbox)),
        (None, Some(L::Vm), T::Internal, Ok(L::Vm)),
        (None, None, T::Community, Ok(L::Container)),
        (None, Some(L::Process), T::Community, Ok(L::Container)),
        (None, None, T::Untrusted, Ok(L::Sandbox)),
        (None, Some(L::None), T::Untrusted, Ok(L::Sandbox)),
        (Some(T::Internal), None, T::Verified, Ok(L::Process)),
        (Some(T::Internal), None, T::Untrusted, Ok(L::Sandbox)),
        (Some(T::Community), None, T::Verified, Ok(L::Container)),
        (None, None, T::Quarantined, Err((Code::TierNeverRuns, "directory"))),
        (Some(T::Quarantined), None, T::Internal, Err((Code::TierNeverRuns, "trustLevel"))),
    ];
    for (bound, level, tier, expected) in table {
        let asked = Asked { tier: bound, level, ..Asked::default() };
        let verdict = Policy::default().decide(&name(), &asked, &operator(tier, &[]));
        match (verdict, expected) {
            (Ok(verdict), Ok(level)) => {
                assert_eq!(verdict.level, level, "{asked:?} {tier}");
                assert_eq!(verdict.tier, bound.map_or(tier, |bound| bound.min(tier)));
            }
            (Err(error), Err((code, fix))) => {
                assert_eq!(error.code, code, "{asked:?} {tier}");
                assert!(error.hint.contains(fix), "{asked:?} {tier}: {}", error.hint);
                assert!(error.message.contains("sample"));
            }
            (verdict, expected) => panic!("{asked:?} {tier}: {verdict:?}, expected {expected:?}"),
        }
    }
}

#[test]
fn every_difference_between_asked_and_granted_has_a_reason() {
    let asked = Asked {
        capabilities: CapabilitySet::of(&[C::WriteTemp, C::InternalCalls, C::SystemAdmin, C::SpawnChild]),
        ..Asked::default()
    };
    let grants = [C::WriteTemp, C::SystemAdmin, C::SpawnChild, C::HttpClient];
    let verdict = Policy::default().decide(&name(), &asked, &operator(T::Verified, &grants)).unwrap();
    let table: Vec<_> = verdict.capabilities.iter().map(|verdict| (verdict.capability, verdict.why_not)).collect();
    let expected = [
        (C::HttpClient, Some(WhyNot::NotAsked)),
        (C::WriteTemp, None),
        (C::SpawnChild, None),
        (C::InternalCalls, Some(WhyNot::NotGranted)),
        (C::SystemAdmin, Some(WhyNot::TierForbids(T::Verified))),
    ];
    assert_eq!(table, expected);
    assert_eq!(verdict.granted(), CapabilitySet::of(&[C::WriteTemp, C::SpawnChild]));
}

#[test]
fn ceilings_hold_and_defaults_fill_in() {
    let asked = Asked { limits: Limits { memory_bytes: Some(u64::MAX), ..Limits::NONE }, ..Asked::default() };
    let verdict = Policy::default().decide(&name(), &asked, &operator(T::Verified, &[])).unwrap();
    assert_eq!(verdict.limits.memory_bytes, Some(2 << 30));
    assert_eq!(verdict.limits.cpu_percent, Some(100));
    assert_eq!(verdict.limit_notes.len(), 1);
    assert_eq!(verdict.limit_notes[0].limit, "maxMemory");
    assert!(verdict.limit_notes[0].why.contains("verified"));
}

#[test]
fn tiers_may_hold_less_the_less_they_are_trusted() {
    let policy = Policy::default();
    let tiers = [T::Quarantined, T::Untrusted, T::Community, T::Verified, T::Internal];
    for pair in tiers.windows(2) {
        let (lower, upper) = (policy.rules(pair[0]), policy.rules(pair[1]));
        assert!(lower.capabilities.minus(upper.capabilities).is_empty(), "{} holds what {} may not", pair[0], pair[1]);
        assert!(lower.weakest.is_none() || lower.weakest > upper.weakest, "{} has weaker walls", pair[0]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn granted_is_asked_and_tier_and_operator(asked: u32, grants: u32, tier in 0..5_usize, bound in 0..6_usize) {
        let set = |bits: u32| C::ALL.iter().copied().enumerate()
            .filter(|(index, _)| bits & 1 << index != 0).map(|(_, capability)| capability).collect::<CapabilitySet>();
        let tiers = [T::Quarantined, T::Untrusted, T::Community, T::Verified, T::Internal];
        let asked = Asked { capabilities: set(asked), tier: tiers.get(bound).copied(), ..Asked::default() };
        let operator = Operator { tier: tiers[tier], grants: set(grants), limits: Limits::NONE, place: "plugvisor.toml".into() };
        let policy = Policy::default();
        if let Ok(verdict) = policy.decide(&name(), &asked, &operator) {
            let tier = policy.rules(verdict.tier).capabilities;
            prop_assert_eq!(verdict.granted(), asked.capabilities.and(tier).and(operator.grants));
            prop_assert!(verdict.tier <= operator.tier);
            let weakest = policy.rules(verdict.tier).weakest.expect("a tier that runs");
            prop_assert_eq!(verdict.level, weakest.max(L::Process));
            for one in &verdict.capabilities {
                prop_assert_eq!(one.why_not.is_none(), verdict.granted().contains(one.capability));
            }
        }
    }
}
