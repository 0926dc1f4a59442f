//! Who may call what, case by case, and what no input may bring about.

use plugvisor_package::{Capability, PluginName, TrustTier};
use proptest::prelude::*;

use super::{
    Availability, Caller, Decision, Explanation, Export, Finding, HostModule, MAX_HOPS, Plugin, PluginCaller, Reason,
    RouteTable, Service, Step, check_hops, explain, extend_hops, route,
};
use crate::{CapabilitySet, Generation, Rights};

fn name(text: &str) -> PluginName {
    text.parse().unwrap()
}

fn service(name: &str, token: Option<&str>, export: Export) -> Service {
    Service { name: name.to_owned(), token: token.map(str::to_owned), export }
}

fn shared(global: bool, capabilities: &[Capability]) -> Export {
    Export::Shared { global, capabilities: CapabilitySet::of(capabilities) }
}

fn plugin(text: &str, services: Vec<Service>) -> Plugin {
    Plugin { name: name(text), generation: Generation(1), availability: Availability::Serving, services }
}

fn caller(text: &str, granted: &[Capability], dependencies: &[&str]) -> PluginCaller {
    let dependencies = dependencies.iter().map(|text| name(text)).collect();
    PluginCaller {
        name: name(text),
        generation: Generation(1),
        rights: Rights::of(CapabilitySet::of(granted)),
        dependencies,
    }
}

fn table() -> RouteTable {
    let mut down = plugin("down", vec![service("acme.Down", None, shared(true, &[]))]);
    down.availability = Availability::Unavailable { why: "it restarts in 0.4 s".to_owned() };
    RouteTable::new([
        plugin(
            "alpha",
            vec![
                service("acme.Open", None, shared(true, &[])),
                service("acme.Private", None, Export::Private),
                service("acme.Friends", None, shared(false, &[])),
                service("acme.Guarded", None, shared(true, &[Capability::WriteTemp])),
                service("acme.Twice", Some("a"), shared(true, &[])),
                service("grpc.health.v1.Health", None, shared(true, &[])),
            ],
        ),
        plugin("beta", vec![service("acme.Twice", Some("b"), shared(true, &[]))]),
        down,
    ])
}

/// The provider's name, or why not.
fn outcome(caller: Caller<'_>, service: &str, token: Option<&str>) -> Result<String, Reason> {
    match route(&table(), caller, service, token, None) {
        Ok(Decision::Provider(provider)) => Ok(provider.name().to_string()),
        Ok(Decision::Host(module)) => Ok(format!("host {}", module.service())),
        Err(refusal) => {
            assert!(!refusal.message.is_empty() && !refusal.hint.is_empty(), "{refusal:?}");
            Err(refusal.reason)
        }
    }
}

#[test]
fn plugins_reach_what_is_shared_with_them() {
    let usual = caller("gamma", &[Capability::InternalCalls], &[]);
    let friend = caller("gamma", &[Capability::InternalCalls], &["alpha"]);
    let able = caller("gamma", &[Capability::InternalCalls, Capability::WriteTemp], &[]);
    let mute = caller("gamma", &[Capability::WriteTemp], &["alpha"]);
    let table = [
        (&usual, "acme.Open", None, Ok("alpha")),
        (&usual, "acme.Nothing", None, Err(Reason::UnknownService)),
        (&usual, "acme.Private", None, Err(Reason::CallerNotAllowed)),
        (&usual, "acme.Friends", None, Err(Reason::CallerNotAllowed)),
        (&friend, "acme.Friends", None, Ok("alpha")),
        (&usual, "acme.Guarded", None, Err(Reason::CallerNotAllowed)),
        (&able, "acme.Guarded", None, Ok("alpha")),
        (&mute, "acme.Open", None, Err(Reason::CallerNotAllowed)),
        (&usual, "acme.Twice", None, Err(Reason::AmbiguousService)),
        (&usual, "acme.Twice", Some("a"), Ok("alpha")),
        (&usual, "acme.Twice", Some("b"), Ok("beta")),
        (&usual, "acme.Twice", Some("c"), Err(Reason::UnknownToken)),
        (&usual, "acme.Open", Some("a"), Err(Reason::UnknownToken)),
        (&usual, "acme.Down", None, Err(Reason::ProviderNotReady)),
        (&usual, "", None, Err(Reason::UnknownService)),
    ];
    for (caller, service, token, expected) in table {
        let expected = expected.map(str::to_owned);
        assert_eq!(outcome(Caller::Plugin(caller), service, token), expected, "{service} {token:?}");
    }
}

#[test]
fn local_applications_reach_what_is_shared_and_no_host_module() {
    let local = Caller::Local { uid: 1000 };
    for (service, token, expected) in [
        ("acme.Open", None, Ok("alpha")),
        ("acme.Friends", None, Ok("alpha")),
        ("acme.Twice", Some("b"), Ok("beta")),
        ("acme.Private", None, Err(Reason::CallerNotAllowed)),
        ("acme.Down", None, Err(Reason::ProviderNotReady)),
        ("plugvisor.host.v1.Events", None, Err(Reason::CallerNotAllowed)),
    ] {
        assert_eq!(outcome(local, service, token), expected.map(str::to_owned), "{service}");
    }
}

#[test]
fn the_supervisors_own_names_never_reach_a_plugin() {
    let granted = caller("gamma", &[Capability::PublishEvents], &[]);
    let plain = caller("gamma", &[Capability::InternalCalls], &[]);
    let events = HostModule::Events.service();
    assert_eq!(outcome(Caller::Plugin(&granted), events, None), Ok(format!("host {events}")));
    assert_eq!(outcome(Caller::Plugin(&plain), events, None), Err(Reason::CallerNotAllowed));
    for service in ["grpc.health.v1.Health", "plugvisor.worker.v1.Worker", "plugvisor.admin.v1.Other", "grpc."] {
        assert_eq!(outcome(Caller::Plugin(&plain), service, None), Err(Reason::UnknownService), "{service}");
    }
}

#[test]
fn plugins_may_serve_other_packages_below_plugvisor() {
    let refusal = |service| route(&table(), Caller::Local { uid: 1000 }, service, None, None).unwrap_err();
    assert!(refusal("plugvisor.host.v1.Nothing").hint.contains("belong to the supervisor"));
    for service in ["plugvisor.examples.v1.Nobody", "plugvisor.hosting.v1.Nobody"] {
        let refusal = refusal(service);
        assert_eq!(refusal.reason, Reason::UnknownService);
        assert!(!refusal.hint.contains("belong to the supervisor"), "{service}: {}", refusal.hint);
    }
}

#[test]
fn a_refusal_names_caller_service_and_fix() {
    let usual = caller("gamma", &[], &[]);
    let refusal = route(&table(), Caller::Plugin(&usual), "acme.Open", None, None).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "plugin gamma called acme.Open without the capability api:internal-calls: its manifest does not ask for it, and \
         the operator did not grant it"
    );
    assert!(refusal.hint.contains("[plugin.gamma]") && refusal.hint.contains("plugin.json"), "{}", refusal.hint);

    let long = format!("acme.{}", "ä".repeat(5000));
    let refusal = route(&table(), Caller::Local { uid: 0 }, &long, None, None).unwrap_err();
    assert!(refusal.message.len() < 200, "a stranger's name fills the message: {} bytes", refusal.message.len());
}

/// The capabilities of the host's own services, each with its service, what of the weaker ones does not open it and what
/// opens it, and whether this version serves it.
const MODULES: [(Capability, &str, &[Capability], bool); 11] = {
    use Capability as C;
    [
        (C::DatabaseReadOnly, "plugvisor.host.v1.DatabaseReader", &[C::DatabaseReadWrite, C::DatabaseAdmin], false),
        (C::DatabaseReadWrite, "plugvisor.host.v1.DatabaseWriter", &[C::DatabaseAdmin], false),
        (C::DatabaseAdmin, "plugvisor.host.v1.DatabaseAdmin", &[], false),
        (C::ExternalApi, "plugvisor.host.v1.ExternalApi", &[], false),
        (C::SystemAdmin, "plugvisor.admin.v1.Admin", &[], false),
        (C::PublishEvents, "plugvisor.host.v1.Events", &[], true),
        (C::SubscribeEvents, "plugvisor.host.v1.Subscriptions", &[], false),
        (C::CryptoOperations, "plugvisor.host.v1.Crypto", &[], false),
        (C::UserAuth, "plugvisor.host.v1.Users", &[], false),
        (C::TokenManagement, "plugvisor.host.v1.Tokens", &[], false),
        (C::ReadSecrets, "plugvisor.host.v1.Secrets", &[], false),
    ]
};

/// Whether anything but the router holds the capability: the kernel, the egress proxy, or the rules on other plugins.
fn is_held_elsewhere(capability: Capability) -> bool {
    let name = capability.as_str();
    ["network:", "filesystem:", "process:"].iter().any(|category| name.starts_with(category))
        || capability == Capability::InternalCalls
}

#[test]
fn every_capability_without_a_kernel_surface_has_its_service() {
    for capability in Capability::ALL {
        let listed = MODULES.iter().any(|(of, ..)| of == capability);
        assert_eq!(listed, !is_held_elsewhere(*capability), "{capability}");
        assert_eq!(HostModule::for_capability(*capability).is_some(), listed, "{capability}");
    }
    assert_eq!(MODULES.len(), HostModule::ALL.len());
}

#[test]
fn a_service_of_the_host_takes_its_capability_and_nothing_else() {
    for (capability, service, more, served) in MODULES {
        for held in Capability::ALL {
            let opens = *held == capability || more.contains(held);
            let expected = match (opens, served) {
                (true, true) => Ok(format!("host {service}")),
                (true, false) => Err(Reason::ModuleNotAvailable),
                (false, _) => Err(Reason::CallerNotAllowed),
            };
            let caller = caller("gamma", &[*held], &["alpha"]);
            assert_eq!(outcome(Caller::Plugin(&caller), service, None), expected, "{service} with {held}");
        }
        // Everything but what opens it.
        let others = CapabilitySet::ALL.minus(CapabilitySet::of(more)).minus(CapabilitySet::of(&[capability]));
        let everything_else = PluginCaller { rights: Rights::of(others), ..caller("gamma", &[], &[]) };
        assert_eq!(outcome(Caller::Plugin(&everything_else), service, None), Err(Reason::CallerNotAllowed));
        let local = outcome(Caller::Local { uid: 1000 }, service, None);
        assert_eq!(local, Err(Reason::CallerNotAllowed), "{service} is for plugins alone");
    }
}

#[test]
fn a_denied_call_to_the_host_says_which_half_is_missing() {
    let (none, community) = (CapabilitySet::EMPTY, TrustTier::Community);
    for (capability, service, _, _) in MODULES {
        let it = CapabilitySet::of(&[capability]);
        for (asked, by_tier, by_operator, missing) in [
            (none, it, it, &["its manifest does not ask for it"][..]),
            (it, none, it, &["plugins of the tier community may not hold it"]),
            (it, it, none, &["the operator did not grant it"]),
            (none, it, none, &["its manifest does not ask for it", "the operator did not grant it"]),
        ] {
            let rights = Rights::new(asked, community, by_tier, by_operator, "/srv/own.toml".into());
            let who = PluginCaller { rights, ..caller("gamma", &[], &[]) };
            let refusal = route(&table(), Caller::Plugin(&who), service, None, None).unwrap_err();
            assert_eq!(refusal.reason, Reason::CallerNotAllowed, "{service}");
            let head = format!("plugin gamma called {service} without the capability {capability}: ");
            let why = refusal.message.strip_prefix(&head).unwrap_or_else(|| panic!("{}", refusal.message));
            assert_eq!(why, missing.join(", and "));
            // Where the operator's files are is for operators.
            assert_eq!(
                refusal.hint.contains("/srv"),
                missing != ["its manifest does not ask for it"],
                "{}",
                refusal.hint
            );
            assert!(!refusal.caller_hint().contains("/srv"), "{}", refusal.caller_hint());
            for (half, fix) in [
                ("its manifest", "security.capabilities"),
                ("plugins of the tier", "higher tier"),
                ("the operator", "or of [plugin.gamma]"),
            ] {
                let named = missing.iter().any(|missing| missing.starts_with(half));
                assert_eq!(refusal.hint.contains(fix), named, "{service}: {}", refusal.hint);
                assert_eq!(refusal.caller_hint().contains(fix), named, "{service}: {}", refusal.caller_hint());
            }
        }
    }
}

#[test]
fn an_allowed_call_to_a_module_that_does_not_exist_yet_says_so() {
    for (capability, service, _, served) in MODULES {
        let who = caller("gamma", &[capability], &[]);
        match route(&table(), Caller::Plugin(&who), service, None, None) {
            Ok(Decision::Host(module)) => assert!(served && module.service() == service),
            Ok(Decision::Provider(_)) => panic!("{service} is a plugin's"),
            Err(refusal) => {
                assert_eq!((refusal.reason, served), (Reason::ModuleNotAvailable, false), "{refusal:?}");
                assert!(refusal.message.contains(service) && refusal.message.contains("this version"), "{refusal}");
                assert!(!refusal.message.contains("without"), "{refusal}");
            }
        }
    }
}

#[test]
fn loops_and_long_paths_are_refused() {
    let (alpha, beta) = (name("alpha"), name("beta"));
    fn reason(hops: Option<&str>, from: &PluginName, to: &PluginName) -> Result<(), Reason> {
        check_hops(hops, from, to).map_err(|refusal| refusal.reason)
    }
    assert_eq!(reason(None, &alpha, &beta), Ok(()));
    assert_eq!(reason(Some(""), &alpha, &beta), Ok(()));
    assert_eq!(reason(Some("gamma"), &alpha, &beta), Ok(()));
    assert_eq!(reason(None, &alpha, &alpha), Err(Reason::Loop));
    assert_eq!(reason(Some("beta"), &alpha, &beta), Err(Reason::Loop));
    assert_eq!(reason(Some("gamma,beta,delta"), &alpha, &beta), Err(Reason::Loop));
    // A name that only begins like the provider's is another plugin.
    assert_eq!(reason(Some("beta-2"), &alpha, &beta), Ok(()));
    for bad in ["Beta", "a,,b", ",", "a b", "a\n"] {
        assert_eq!(reason(Some(bad), &alpha, &beta), Err(Reason::BadRequest), "{bad:?}");
    }

    let mut path: Option<String> = None;
    for hop in 1..=MAX_HOPS {
        let from = name(&format!("p{hop}"));
        assert_eq!(reason(path.as_deref(), &from, &beta), Ok(()), "hop {hop}");
        path = Some(extend_hops(path.as_deref(), &from));
    }
    assert_eq!(reason(path.as_deref(), &alpha, &beta), Err(Reason::Loop), "one hop too many");
    let huge = "x,".repeat(100_000);
    assert_eq!(reason(Some(&huge), &alpha, &beta), Err(Reason::Loop));

    let usual = caller("alpha", &[Capability::InternalCalls], &[]);
    let refusal = route(&table(), Caller::Plugin(&usual), "acme.Open", None, Some("gamma")).unwrap_err();
    assert_eq!(refusal.reason, Reason::Loop);
    assert!(refusal.message.ends_with("gamma -> alpha -> alpha"), "{}", refusal.message);
}

#[test]
fn of_two_plugins_with_one_name_the_first_stays() {
    let first = plugin("alpha", vec![service("acme.First", None, shared(true, &[]))]);
    let second = plugin("alpha", vec![service("acme.Second", None, shared(true, &[]))]);
    let table = RouteTable::new([first, second]);
    assert_eq!(table.services().collect::<Vec<_>>(), ["acme.First"]);
    assert!(table.providers().iter().enumerate().all(|(index, provider)| provider.slot() == index));
}

/// The enumeration here and the one on the wire are one.
#[test]
fn reasons_are_those_of_the_contract() {
    let proto = include_str!("../../../../proto/plugvisor/broker/v1/broker.proto");
    let mut lines = proto.lines().map(str::trim);
    let mut on_the_wire = Vec::new();
    while let Some(line) = lines.next() {
        let Some(status) = line.strip_prefix("// ").and_then(|comment| comment.split_once(": ")) else { continue };
        let Some((constant, number)) = lines.next().and_then(|line| line.strip_suffix(';')?.split_once(" = ")) else {
            continue;
        };
        let Some(reason) = constant.strip_prefix("REASON_") else { continue };
        on_the_wire.push((reason.to_ascii_lowercase(), number.parse::<usize>().unwrap(), status.0.to_owned()));
    }
    let statuses = |code| match code {
        3 => "INVALID_ARGUMENT",
        4 => "DEADLINE_EXCEEDED",
        5 => "NOT_FOUND",
        7 => "PERMISSION_DENIED",
        8 => "RESOURCE_EXHAUSTED",
        9 => "FAILED_PRECONDITION",
        12 => "UNIMPLEMENTED",
        13 => "INTERNAL",
        14 => "UNAVAILABLE",
        other => panic!("no refusal has the status {other}"),
    };
    let here = Reason::ALL
        .iter()
        .zip(1..)
        .map(|(reason, number)| (reason.as_str().to_owned(), number, statuses(reason.grpc_status()).to_owned()));
    assert_eq!(here.collect::<Vec<_>>(), on_the_wire);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever a stranger sends, only a serving plugin that shares the service with the caller is chosen.
    #[test]
    fn nothing_unshared_is_ever_reached(
        offers in prop::collection::vec((0..4_usize, 0..3_usize, prop::option::of(0..2_u8), any::<Option<bool>>()), 0..12),
        serving in prop::collection::vec(any::<bool>(), 4),
        asked in 0..4_usize,
        token in prop::option::of("[ab0-1]{0,2}"),
        granted: bool,
        dependency in prop::option::of(0..4_usize),
        hops in prop::option::of("[a-z0-9,-]{0,40}"),
    ) {
        let names = ["p0", "p1", "p2", "p3"];
        let services = ["acme.A", "acme.B", "acme.C", "acme.D"];
        let plugins = names.iter().enumerate().map(|(index, text)| {
            let mine = offers.iter().filter(|offer| offer.0 == index);
            let mut plugin = plugin(text, mine.map(|(_, which, token, global)| {
                let token = token.map(|number| number.to_string());
                let export = global.map_or(Export::Private, |global| shared(global, &[]));
                service(services[*which], token.as_deref(), export)
            }).collect());
            if !serving[index] {
                plugin.availability = Availability::Unavailable { why: "down".to_owned() };
            }
            plugin
        });
        let table = RouteTable::new(plugins);
        let granted: &[_] = if granted { &[Capability::InternalCalls] } else { &[] };
        let dependencies: Vec<_> = dependency.map(|index| names[index]).into_iter().collect();
        let me = caller("me", granted, &dependencies);
        let decision = route(&table, Caller::Plugin(&me), services[asked], token.as_deref(), hops.as_deref());
        if let Ok(decision) = decision {
            let Decision::Provider(provider) = decision else { panic!("a host module for {}", services[asked]) };
            let index = provider.slot();
            prop_assert!(!granted.is_empty() && serving[index]);
            let shared = offers.iter().any(|(of, which, offered, global)| {
                let offered = offered.map(|number| number.to_string());
                *of == index
                    && *which == asked
                    && (token.is_none() || token == offered)
                    && (*global == Some(true) || *global == Some(false) && dependency == Some(index))
            });
            prop_assert!(shared);
            let on_path = hops.iter().flat_map(|path| path.split(',')).any(|hop| hop == provider.name().as_str());
            prop_assert!(!on_path);
        }
    }
}

/// The step that refuses, or `None`; and that what comes before passes and what comes after is not reached.
fn refusing_step(caller: Caller<'_>, service: &str, token: Option<&str>) -> Option<Step> {
    let table = table();
    let Explanation { verdict, steps } = explain(&table, caller, service, token);
    assert_eq!(verdict, route(&table, caller, service, token, None), "the verdict is the router's own");
    let refused: Vec<Step> =
        steps.iter().filter(|(_, finding)| *finding == Finding::Refused).map(|(step, _)| *step).collect();
    assert_eq!(refused.len(), usize::from(verdict.is_err()), "one step refuses, or none: {steps:?}");
    assert_eq!(steps.iter().map(|(step, _)| *step).collect::<Vec<_>>(), Step::ALL);
    for (step, finding) in &steps {
        let reached = refused.first().is_none_or(|refused| step <= refused);
        assert_eq!(*finding != Finding::NotReached, reached, "{step}: {finding:?}");
    }
    refused.first().copied()
}

#[test]
fn an_explanation_names_the_step_that_decides() {
    let usual = caller("gamma", &[Capability::InternalCalls], &[]);
    let mute = caller("gamma", &[], &["alpha"]);
    let alpha = caller("alpha", &[Capability::InternalCalls], &[]);
    let reader = caller("gamma", &[Capability::ReadSecrets], &[]);
    let table = [
        (&usual, "acme.Open", None, None),
        (&usual, "acme.Twice", Some("b"), None),
        (&usual, "acme.Nothing", None, Some(Step::Service)),
        (&usual, "plugvisor.admin.v1.Other", None, Some(Step::Service)),
        (&usual, "plugvisor.admin.v1.Admin", None, Some(Step::Grant)),
        (&reader, "plugvisor.host.v1.Secrets", None, Some(Step::Provider)),
        (&mute, "acme.Open", None, Some(Step::Grant)),
        (&usual, "plugvisor.host.v1.Events", None, Some(Step::Grant)),
        (&usual, "acme.Twice", None, Some(Step::Token)),
        (&usual, "acme.Twice", Some("c"), Some(Step::Token)),
        (&usual, "acme.Private", None, Some(Step::Export)),
        (&usual, "acme.Friends", None, Some(Step::Export)),
        (&usual, "acme.Guarded", None, Some(Step::Export)),
        (&alpha, "acme.Open", None, Some(Step::Hops)),
        (&usual, "acme.Down", None, Some(Step::Provider)),
    ];
    for (who, service, token, step) in table {
        assert_eq!(refusing_step(Caller::Plugin(who), service, token), step, "{} {service} {token:?}", who.name);
    }
    let local = Caller::Local { uid: 1000 };
    assert_eq!(refusing_step(local, "acme.Open", None), None);
    assert_eq!(refusing_step(local, "acme.Private", None), Some(Step::Export));
    assert_eq!(refusing_step(local, "plugvisor.host.v1.Events", None), Some(Step::Grant));
}

proptest! {
    #[test]
    fn an_explanation_never_disagrees_with_the_router(
        who in prop::sample::select(vec!["alpha", "beta", "gamma", "down"]),
        internal in any::<bool>(),
        temp in any::<bool>(),
        friend in any::<bool>(),
        service in prop::sample::select(vec![
            "acme.Open", "acme.Private", "acme.Friends", "acme.Guarded", "acme.Twice", "acme.Down", "acme.No",
            "grpc.health.v1.Health", "plugvisor.host.v1.Events", "plugvisor.host.v1.Secrets",
        ]),
        secrets in any::<bool>(),
        token in prop::option::of(prop::sample::select(vec!["a", "b", "z", ""])),
        local in any::<bool>(),
    ) {
        let held = [
            (internal, Capability::InternalCalls),
            (temp, Capability::WriteTemp),
            (secrets, Capability::ReadSecrets),
        ];
        let granted: Vec<Capability> = held.iter().filter(|(held, _)| *held).map(|(_, c)| *c).collect();
        let plugin = caller(who, &granted, if friend { &["alpha"] } else { &[] });
        let who = if local { Caller::Local { uid: 7 } } else { Caller::Plugin(&plugin) };
        refusing_step(who, service, token);
    }
}
