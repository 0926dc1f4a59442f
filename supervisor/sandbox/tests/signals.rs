//! Signals (`process:signal-handling`), sent from inside: to itself always, to its own children with the grant, to nobody
//! else ever. As root and as an ordinary user.
#![allow(missing_docs, reason = "tests")]

mod harness;

use harness::{As, Harness, read_all};
use plugvisor_sandbox::protocol::{Exit, Grant, Level};

const EPERM: &str = "1";
const ESRCH: &str = "3";
const ABORT: i32 = 6;

const WALLED: [Level; 3] = [Level::Process, Level::Container, Level::Sandbox];

/// Every way of sending one to a child.
const WAYS: [&str; 7] = ["kill", "tgkill", "tkill", "queue", "queue-thread", "pidfd", "owner"];

fn to_child() -> Vec<&'static str> {
    WAYS.iter().flat_map(|way| ["signal-child", way]).collect()
}

#[test]
fn its_children_are_signalled_with_the_grant_alone() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        for level in WALLED {
            let without = harness.attempt_at(level, &[Grant::SpawnChild], &to_child());
            assert_eq!(without, [EPERM; WAYS.len()], "{as_:?} {level:?}");
            let with = harness.attempt_at(level, &[Grant::SpawnChild, Grant::SignalHandling], &to_child());
            assert_eq!(with, ["ok"; WAYS.len()], "{as_:?} {level:?}");
        }
        // No wall is claimed there.
        assert_eq!(harness.attempt_at(Level::None, &[], &to_child()), ["ok"; WAYS.len()], "{as_:?}");
    }
}

/// Runtimes need them: a handler, raise(3), abort(3), a signal to one of its threads.
#[test]
fn itself_it_always_may_signal() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        for level in WALLED {
            let own = [
                "handle-signal",
                "signal-self",
                "kill",
                "signal-self",
                "tgkill",
                "signal-self",
                "tkill",
                "signal-self",
                "owner",
            ];
            assert_eq!(harness.attempt_at(level, &[], &own), ["ok"; 5], "{as_:?} {level:?}");
            let plugin = {
                let request = harness.request_at(level, &["abort"]);
                harness.launch(request)
            };
            assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Signal(ABORT), false), "{as_:?} {level:?}");
        }
    }
}

#[test]
fn nobody_outside_is_reached_with_the_grant() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let mut sibling = {
            let mut request = harness.request(&["pause"]);
            request.plugin = "walled-sibling".to_owned();
            harness.launch(request)
        };
        let others = [harness.process.id(), std::process::id(), sibling.launched.pid].map(|pid| pid.to_string());
        for level in WALLED {
            let grants = [Grant::SpawnChild, Grant::SignalHandling];
            let probes: Vec<&str> = others.iter().flat_map(|pid| ["kill", pid]).collect();
            assert_eq!(harness.attempt_at(level, &grants, &probes), [ESRCH; 3], "{as_:?} {level:?}");
            // Its init, which is all that is there beside it, heeds no signal that it has no handler for; and everybody,
            // which is nobody but itself.
            let sigkill = "1,9";
            let number = libc::SYS_kill.to_string();
            let probes = ["raw", &number, sigkill, "signal-child", "kill", "kill", "-1"];
            assert_eq!(harness.attempt_at(level, &grants, &probes), ["ok", "ok", ESRCH], "{as_:?} {level:?}");
        }
        let request = plugvisor_sandbox::protocol::Request::Kill { launch: sibling.launched.launch };
        harness.ask(&request, &[]);
        assert_eq!(harness.exit_of(sibling.launched.launch), (Exit::Signal(9), false), "it lived until now");
        read_all(&mut sibling.stdout);
    }
}
