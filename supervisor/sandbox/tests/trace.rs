//! Traces of a program that does known things, in both lanes: what is proposed is exactly what it needs, and holds.
#![allow(missing_docs, reason = "a test")]

mod harness;

use std::{
    os::fd::{AsFd as _, AsRawFd as _},
    time::Instant,
};

use harness::{As, Harness, patience, read_all, wait_readable};
use plugvisor_package::Capability;
use plugvisor_sandbox::{
    protocol::{Exit, Grant, Level, RefusalCode, Tier},
    rules::{AllowFile, syscalls},
    seqpacket::{Received, Seqpacket},
    trace::{Book, Proposal, Seen, Survival, propose, rules_file, watch},
};
use rustix::io::FdFlags;

/// A launcher that traces, and where the listeners of its launches come from.
fn tracing(as_: As) -> (Harness, Seqpacket) {
    let (ours, theirs) = Seqpacket::pair().expect("a socket pair");
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).expect("inheritable");
    let harness = Harness::start_with(as_, |options| {
        options.trace = Some(theirs.as_raw_fd());
        options.spares = 0;
        options.bundle_roots.iter_mut().for_each(|root| root.tier = Tier::Internal);
    });
    (harness, ours)
}

/// Runs the test plugin in a trace: what was seen, and what it printed.
fn traced(as_: As, level: Level, args: &[&str]) -> (Seen, String) {
    let (mut harness, listeners) = tracing(as_);
    let watching = std::thread::spawn(move || {
        let deadline = Instant::now() + patience();
        assert!(wait_readable(listeners.as_fd(), deadline), "no listener came");
        let Ok(Received::Packet(packet)) = listeners.try_recv() else { panic!("no packet") };
        let listener = packet.descriptors.into_iter().next().expect("a listener");
        watch(&listener, &Book::of_this_build().expect("the data files")).expect("watches")
    });
    let mut request = harness.request_at(level, args);
    request.grants = vec![Grant::WriteTemp];
    let mut plugin = harness.launch(request);
    let text = read_all(&mut plugin.stdout);
    let errors = read_all(&mut plugin.stderr);
    assert_eq!(harness.exit_of(plugin.launched.launch).0, Exit::Code(0), "{text} {errors}");
    (watching.join().expect("the watching thread"), text)
}

/// Runs it as it would be run.
fn launched(harness: &mut Harness, level: Level, capabilities: &[Capability], args: &[&str]) -> String {
    let mut request = harness.request_at(level, args);
    request.grants = Grant::of_all(capabilities.iter().copied());
    let mut plugin = harness.launch(request);
    let text = read_all(&mut plugin.stdout);
    harness.exit_of(plugin.launched.launch);
    text
}

fn proposed(seen: &Seen, level: Level, capabilities: &[Capability]) -> Proposal {
    propose(seen, &Book::of_this_build().expect("the data files"), level, capabilities, Survival::Unknown)
}

/// What a proposal says, a thing a line.
fn told(proposal: &Proposal) -> String {
    let mut lines: Vec<String> = Vec::new();
    for call in &proposal.denied {
        let by: Vec<&str> = call.capabilities.iter().map(|capability| capability.as_str()).collect();
        let level = call.level.map_or("no level", Level::as_str);
        lines.push(format!("{} {}: {} at {level}", call.name, call.count, by.join(" ")));
    }
    for outside in &proposal.outside {
        let by = outside.capability.map_or("nothing", Capability::as_str);
        lines.push(format!("{} {} {}: {by}", outside.access, outside.what, outside.count));
    }
    let names: Vec<&str> = proposal.capabilities.iter().map(|capability| capability.as_str()).collect();
    lines.push(format!("{}: {}", proposal.level.as_str(), names.join(" ")));
    lines.join("\n")
}

/// A child, a signal to its init, a temporary file, a TCP socket, and a file of the host.
const DEEDS: [&str; 12] =
    ["forks", "1", "kill", "1", "append", "/tmp/x", "socket", "2", "1", "read", "/etc/passwd", "thread"];

const TOLD: &str = "socket 1: network:http-client at sandbox
clone 1: process:spawn-child at sandbox
kill 1: process:signal-handling at sandbox
clone3 1:  at no level
read /etc/passwd 1: nothing
write /tmp/x 1: filesystem:write-temp
sandbox: network:http-client filesystem:write-temp process:spawn-child process:signal-handling";

#[test]
fn what_is_proposed_is_what_it_needs_and_holds() {
    for as_ in As::possible() {
        let (seen, text) = traced(as_, Level::Container, &DEEDS);
        assert_eq!(text, "forks 1 then ok\nkill ok\nappend ok\nsocket ok\nread 2\nthread ok\n", "{as_:?}");
        let proposal = proposed(&seen, Level::Sandbox, &[]);
        assert_eq!(told(&proposal), TOLD, "{as_:?}");
        // With exactly that, nothing of what it does is refused; without any one of it, something is.
        let mut harness = Harness::start_trusting(as_);
        let whole = launched(&mut harness, proposal.level, &proposal.capabilities, &DEEDS);
        assert_eq!(whole, text, "{as_:?}");
        for left_out in &proposal.capabilities {
            let rest: Vec<Capability> =
                proposal.capabilities.iter().copied().filter(|capability| capability != left_out).collect();
            let refused = launched(&mut harness, proposal.level, &rest, &DEEDS);
            let line = match left_out {
                Capability::SpawnChild => "forks 0 then 1\n",
                Capability::SignalHandling => "kill 1\n",
                Capability::WriteTemp => "append 30\n",
                _ => "socket 1\n",
            };
            assert!(refused.contains(line), "{as_:?} without {left_out}: {refused}");
        }
        // And the manifest that says so is told that it is right.
        let again = proposed(&seen, proposal.level, &proposal.capabilities);
        assert_eq!((again.level, &again.capabilities), (proposal.level, &proposal.capabilities));
        assert!(again.unused.is_empty(), "{:?}", again.unused);
        let refused: Vec<&str> = again.denied.iter().map(|call| call.name.as_str()).collect();
        assert_eq!(refused, ["clone3"], "which fails for everybody, and libraries fall back");
    }
}

#[test]
fn the_level_is_the_strongest_that_holds() {
    // Memory that is written and executed, as of a just-in-time compiler, and another program in place of its own.
    let map = ["raw", "9", "0,4096,7,0x22,-1,0"];
    let exec = ["exec", "/usr/bin/true"];
    for as_ in As::possible() {
        for deeds in [&map[..], &exec] {
            let (seen, text) = traced(as_, Level::Container, deeds);
            let proposal = proposed(&seen, Level::Sandbox, &[]);
            assert_eq!(
                (proposal.level, proposal.capabilities.as_slice()),
                (Level::Container, &[][..]),
                "{as_:?} {deeds:?}"
            );
            assert_eq!(proposal.above.len(), 1, "{:?}", proposal.above);
            let mut harness = Harness::start_trusting(as_);
            assert_eq!(launched(&mut harness, Level::Container, &[], deeds), text, "{as_:?}");
            assert_ne!(launched(&mut harness, Level::Sandbox, &[], deeds), text, "{as_:?}");
        }
    }
}

#[test]
fn what_no_capability_allows_is_recorded_and_refused() {
    let number = |name: &str| syscalls::number(name).expect("a name").expect("a number").to_string();
    let calls = [
        ("mount", "0"),
        ("umount2", "0"),
        ("pivot_root", "0"),
        ("ptrace", "0"),
        ("bpf", "0"),
        ("init_module", "0"),
        ("finit_module", "0"),
        ("delete_module", "0"),
        ("kexec_load", "0"),
        ("setns", "-1,0"),
        ("unshare", "0x10000000"),
        ("process_vm_readv", "1"),
        ("perf_event_open", "0"),
        ("io_uring_setup", "1"),
        ("keyctl", "0"),
        ("open_by_handle_at", "0"),
        ("memfd_create", "0"),
        ("prctl", "1,0"),
        ("socket", "2,2"),
        // A filter with a listener of its own could let these through.
        ("seccomp", "1,8,0"),
    ];
    let numbers: Vec<String> = calls.iter().map(|(name, _)| number(name)).collect();
    let args: Vec<&str> = calls.iter().zip(&numbers).flat_map(|((_, args), number)| ["raw", number, args]).collect();
    for as_ in As::possible() {
        let (seen, text) = traced(as_, Level::Container, &args);
        let refused = "raw 1\n".repeat(calls.len());
        assert_eq!(text, refused, "{as_:?}: each fails with EPERM, as without a trace");
        let proposal = proposed(&seen, Level::Process, &[]);
        let mut names: Vec<&str> = calls.iter().map(|(name, _)| *name).filter(|name| *name != "seccomp").collect();
        names.sort_unstable();
        let mut denied: Vec<&str> = proposal
            .denied
            .iter()
            .inspect(|call| assert_eq!((call.level, call.count, call.capabilities.len()), (None, 1, 0), "{call:?}"))
            .map(|call| call.name.as_str())
            .collect();
        denied.sort_unstable();
        assert_eq!(denied, names, "{as_:?}");
        assert_eq!(seen.listeners, 1);
        assert_eq!(proposal.capabilities, []);
    }
}

#[test]
fn the_calls_that_it_made_are_a_policy() {
    for as_ in As::possible() {
        let (seen, _) = traced(as_, Level::Process, &["thread", "list", "/plugin"]);
        let text = rules_file(&seen, &Book::of_this_build().expect("the data files"), "walled");
        let policy: AllowFile = toml::from_str(&text).expect("a policy");
        let names: Vec<&String> = policy.allow.iter().flat_map(|calling| &calling.syscalls).collect();
        for name in ["execve", "clone", "exit_group", "openat", "mmap"] {
            let here = names.iter().any(|known| *known == name);
            assert_eq!(here, name != "execve", "{as_:?}: {name} in {names:?}");
        }
        assert!(policy.allow.iter().all(|calling| calling.reason.starts_with("seen ")), "{text}");
    }
}

#[test]
fn other_levels_are_not_traced() {
    let (mut harness, _listeners) = tracing(As::possible()[0]);
    for level in [Level::None, Level::Sandbox] {
        let refusal = harness.try_launch(harness.request_at(level, &[])).err().expect("refused");
        assert_eq!(refusal.code, RefusalCode::Policy, "{refusal:?}");
        assert!(refusal.message.contains("a trace is made at the levels process and container"), "{refusal:?}");
    }
}

#[test]
fn without_whoever_traces_nothing_is_executed() {
    for as_ in As::possible() {
        let (mut harness, listeners) = tracing(as_);
        drop(listeners);
        let refusal = harness.try_launch(harness.request_at(Level::Container, &[])).err().expect("refused");
        assert_eq!(refusal.code, RefusalCode::Kernel, "{as_:?} {refusal:?}");
    }
}

#[test]
fn a_launcher_of_a_service_manager_traces_nothing() {
    let launcher = env!("CARGO_BIN_EXE_plugvisor-launcher");
    for variable in ["LISTEN_FDS", "NOTIFY_SOCKET"] {
        let flags = ["--socket-fd", "0", "--trace-fd", "3", "--cgroup-root", "p", "--runtime-directory", "/nowhere"];
        let refused = std::process::Command::new(launcher).args(flags).env(variable, "1").output().expect("it starts");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(78), "{said}");
        assert!(said.contains("--trace-fd is refused"), "{said}");
    }
}
