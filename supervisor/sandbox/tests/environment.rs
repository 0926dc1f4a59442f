//! The operator's variables (`process:access-env`), as a plugin sees them, and what of them no supervisor can have given.
//! As root and as an ordinary user.
#![allow(missing_docs, reason = "tests")]

mod harness;

use harness::{As, Harness, LEVELS, Manner, read_all};
use plugvisor_sandbox::{
    options::{Options, Variable},
    protocol::{Exit, Grant, Launch, Level, Refusal, RefusalCode, Tier, environment_digest},
};

fn asks() -> Manner {
    let mut manner = Manner::of(&["env"]);
    manner.security = serde_json::json!({ "capabilities": ["process:access-env"] });
    manner
}

/// A launcher whose starter lets the plugin `walled` have these, and trusts it.
fn start(as_: As, names: &[&str]) -> Harness {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    Harness::start_with(as_, |options: &mut Options| {
        options.bundle_roots[0].tier = Tier::Internal;
        let variable = |name: &String| Variable {
            plugin: "walled".parse().expect("a name"),
            name: name.parse().expect("a variable"),
        };
        options.variables = names.iter().map(variable).collect();
    })
}

fn with(mut request: Launch, environment: &[(&str, &str)]) -> Launch {
    request.grants = vec![Grant::AccessEnv];
    request.environment = environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    request
}

/// The plugin's environment as it sees it, sorted.
fn seen(harness: &mut Harness, request: Launch) -> Vec<String> {
    let mut plugin = harness.launch(request);
    let text = read_all(&mut plugin.stdout);
    assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
    let mut all: Vec<String> =
        text.trim_end().strip_prefix("env ").expect("its environment").split('|').map(str::to_owned).collect();
    all.sort();
    all
}

#[test]
fn without_the_grant_there_are_the_hosts_variables_and_its_own() {
    for as_ in As::possible() {
        let mut harness = start(as_, &["TZ"]);
        for level in LEVELS {
            let request = harness.request_at_in(level, &asks());
            for variable in seen(&mut harness, request.clone()) {
                let (name, _) = variable.split_once('=').expect("NAME=VALUE");
                let own = ["COLOUR", "LANG", "LISTEN_FDS", "LISTEN_PID", "PATH"].contains(&name);
                assert!(own || name.starts_with("PLUGVISOR_"), "{as_:?} {level:?}: {variable}");
            }
            // Nor can it be given any beside the grant.
            let request = Launch { grants: vec![], ..with(request, &[("TZ", "UTC")]) };
            let refusal = harness.try_launch(request).map(drop).expect_err("it may not see them");
            assert_eq!(refusal.code, RefusalCode::Policy);
            assert!(refusal.message.contains("process:access-env"), "{}", refusal.message);
        }
    }
}

#[test]
fn with_the_grant_it_sees_the_operators_and_they_outweigh_its_own() {
    for as_ in As::possible() {
        let mut harness = start(as_, &["COLOUR", "LANG", "TITLE"]);
        for level in LEVELS {
            let request = harness.request_at_in(level, &asks());
            let before = seen(&mut harness, request.clone());
            assert!(before.contains(&"COLOUR=blue".to_owned()) && before.contains(&"LANG=C.UTF-8".to_owned()));
            let given = [("COLOUR", "red"), ("LANG", "de_LI.UTF-8"), ("TITLE", "a = b; \u{e9}")];
            let after = seen(&mut harness, with(request, &given));
            // A process of the host has a number of its own each time.
            let is_pid = |variable: &&String| variable.starts_with("LISTEN_PID=");
            let new: Vec<&String> =
                after.iter().filter(|variable| !before.contains(variable) && !is_pid(variable)).collect();
            assert_eq!(new, ["COLOUR=red", "LANG=de_LI.UTF-8", "TITLE=a = b; \u{e9}"], "{as_:?} {level:?}");
            assert_eq!(after.len(), before.len() + 1, "each name once: {after:?}");
        }
    }
}

fn refused(harness: &mut Harness, environment: &[(&str, &str)]) -> Refusal {
    let request = with(harness.request_in(&asks()), environment);
    harness.try_launch(request).map(drop).expect_err(&format!("{environment:?}"))
}

/// What a supervisor that was taken over could try.
#[test]
fn no_supervisor_gives_more_than_the_policy_names() {
    for as_ in As::possible() {
        let mut harness = start(as_, &["A", "B"]);
        let request = with(harness.request_in(&asks()), &[("A", "1"), ("B", "2")]);
        harness.launch(request.clone());
        let long = "x".repeat(4097);
        for (environment, named) in [
            (&[("TZ", "UTC")][..], "[[environment]]"),
            (&[("LD_PRELOAD", "/tmp/x.so")], "loader"),
            (&[("GCONV_PATH", "/tmp")], "loader"),
            (&[("PYTHONPATH", "/tmp")], "loader"),
            (&[("PATH", "/tmp")], "loader"),
            (&[("HTTPS_PROXY", "http://192.0.2.1")], "proxies"),
            (&[("PLUGVISOR_BROKER", "/tmp/x")], "the host sets"),
            (&[("LISTEN_FDS", "9")], "the host sets"),
            (&[("A", "() { :; }")], "function"),
            (&[("A", "1\0LD_PRELOAD=/tmp/x.so")], "NUL"),
            (&[("A=1\0LD_PRELOAD", "x")], "letters"),
            (&[("", "x")], "letters"),
            (&[("A", &long)], "4096"),
            (&[("A", "1"), ("A", "2")], "order"),
            (&[("B", "1"), ("A", "2")], "order"),
        ] {
            let refusal = refused(&mut harness, environment);
            assert_eq!(refusal.code, RefusalCode::Policy, "{environment:?}: {}", refusal.message);
            assert!(refusal.message.contains(named), "{environment:?}: {}", refusal.message);
        }
        let names: Vec<String> = (0..65).map(|number| format!("V{number:03}")).collect();
        let many: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
        assert!(refused(&mut harness, &many).message.contains("at most 64"));
        let big = "x".repeat(4000);
        let many: Vec<(&str, &str)> = names[..5].iter().map(|name| (name.as_str(), big.as_str())).collect();
        assert!(refused(&mut harness, &many).message.contains("16384 bytes"));
        // A bundle that does not ask.
        let request = Launch { environment: vec![], ..with(harness.request(&["env"]), &[]) };
        let refusal = harness.try_launch(request).map(drop).expect_err("its manifest does not ask");
        assert!(refusal.message.contains("security.capabilities"), "{}", refusal.message);
        // Others under another name.
        let mut other = with(harness.request_in(&asks()), &[("A", "1")]);
        other.plugin = "walled-other".to_owned();
        let refusal = harness.try_launch(other).map(drop).expect_err("it is another plugin's");
        assert!(refusal.message.contains("walled-other"), "{}", refusal.message);
    }
}

/// Whoever can import may give any bundle any name: what belongs to the name is for those that were approved under it.
#[test]
fn an_unapproved_bundle_gets_nothing_of_its_name() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_store(as_, |options| {
            options.bundle_roots.clear();
            options.variables =
                vec![Variable { plugin: "walled".parse().expect("a name"), name: "A".parse().expect("a variable") }];
        });
        let request = with(harness.request_at_in(Level::Sandbox, &asks()), &[("A", "1")]);
        let refusal = harness.try_launch(request.clone()).map(drop).expect_err("nobody approved it");
        assert_eq!(refusal.code, RefusalCode::Policy);
        assert!(refusal.message.contains("untrusted") && refusal.message.contains("AccessEnv"), "{}", refusal.message);
        // The control: without the grant it runs, and approved it has it.
        let plain = Launch { grants: vec![], environment: vec![], ..request.clone() };
        harness.launch(plain);
        let digest = plugvisor_package::Digest::from_bytes(request.bundle);
        let entry = format!("[[approved]]\nname = \"walled\"\ntier = \"community\"\ndigest = \"{digest}\"\n");
        harness.write_policy(&format!("version = 1\n{entry}"));
        assert!(seen(&mut harness, request).contains(&"A=1".to_owned()), "{as_:?}");
    }
}

/// The next supervisor compares what runs with what it would launch.
#[test]
fn what_was_given_is_known_by_its_digest() {
    for as_ in As::possible() {
        let mut harness = start(as_, &["A"]);
        let mut manner = asks();
        manner.args = vec!["pause".to_owned()];
        let request = with(harness.request_in(&manner), &[("A", "1")]);
        let plugin = harness.launch(request.clone());
        let listed = harness.list();
        let known = listed.launches.iter().find(|known| known.launch == plugin.launched.launch).expect("it runs");
        assert_eq!(known.environment, environment_digest(&request.environment));
        let other = |environment: &[(&str, &str)]| environment_digest(&with(request.clone(), environment).environment);
        for different in [&[][..], &[("A", "2")], &[("A1", "")], &[("A", "1"), ("B", "1")]] {
            assert_ne!(known.environment, other(different), "{different:?}");
        }
    }
}
