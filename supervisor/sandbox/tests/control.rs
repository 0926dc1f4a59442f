//! What can be changed and measured of a running launch: freeze and thaw, limits, statistics.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use harness::{As, Harness, Plugin, is_root, patience, wait_readable};
use plugvisor_sandbox::protocol::{Condition, Control, Exit, LaunchId, Limits, RefusalCode, Reply, Request, Stats};

fn worker(plugin: &Plugin) -> UnixStream {
    UnixStream::connect(format!("/proc/self/fd/{}", plugin.worker.as_raw_fd())).expect("its socket")
}

fn stats(harness: &mut Harness, launch: LaunchId) -> Stats {
    match harness.ask(&Request::Stats { launch }, &[]).0 {
        Reply::Stats(stats) => stats,
        other => panic!("{other:?}"),
    }
}

/// Waits until the kernel has frozen all of it; there is no event for it on v1.
fn await_frozen(harness: &mut Harness, launch: LaunchId, frozen: bool) {
    let deadline = Instant::now() + patience();
    while stats(harness, launch).frozen != Some(frozen) {
        assert!(Instant::now() < deadline, "it does not become {frozen}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn refused(reply: Reply) -> (RefusalCode, String) {
    match reply {
        Reply::Refused(refusal) => (refusal.code, refusal.message),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn what_is_frozen_stands_still_until_it_is_thawed_or_killed() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let request = harness.request(&["steps"]);
        let plugin = harness.launch(request.clone());
        let launch = plugin.launched.launch;
        let mut worker = worker(&plugin);
        worker.write_all(b"a").expect("asks");
        worker.read_exact(&mut [0]).expect("it answers");
        let reply = harness.ask(&Request::Freeze { launch }, &[]).0;
        if stats(&mut harness, launch).frozen.is_none() {
            let (code, why) = refused(reply);
            assert_eq!((as_, code), (As::Ordinary, RefusalCode::ControlUnavailable), "{why}");
            println!("SKIP freezer-rootless: {why}");
            continue;
        }
        assert_eq!(reply, Reply::Done);
        await_frozen(&mut harness, launch, true);
        worker.write_all(b"b").expect("asks");
        worker.set_read_timeout(Some(Duration::from_millis(50))).expect("a time limit");
        assert_eq!(worker.read(&mut [0]).expect_err("it stands still").kind(), io::ErrorKind::WouldBlock);
        let Reply::Listed(listed) = harness.ask(&Request::List { after: LaunchId(0) }, &[]).0 else { panic!() };
        assert!(matches!(listed.launches[0].condition, Condition::Up { frozen: true, .. }));
        assert_eq!(harness.ask(&Request::Thaw { launch }, &[]).0, Reply::Done);
        worker.set_read_timeout(Some(patience())).expect("a time limit");
        worker.read_exact(&mut [0]).expect("it answers what waited");
        await_frozen(&mut harness, launch, false);

        for end in [Request::Kill { launch }, Request::Signal { launch, signal: 9 }] {
            let plugin = harness.launch(request.clone());
            let launch = plugin.launched.launch;
            assert_eq!(harness.ask(&Request::Freeze { launch }, &[]).0, Reply::Done);
            await_frozen(&mut harness, launch, true);
            let end = match end {
                Request::Kill { .. } => Request::Kill { launch },
                _ => Request::Signal { launch, signal: 9 },
            };
            assert_eq!(harness.ask(&end, &[]).0, Reply::Done);
            assert_eq!(harness.exit_of(launch), (Exit::Signal(9), false), "{end:?}");
        }
        // And when the launcher ends.
        assert_eq!(harness.ask(&Request::Freeze { launch }, &[]).0, Reply::Done);
        await_frozen(&mut harness, launch, true);
        harness.disconnect();
        assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()));
        assert!(harness.process.wait().expect("wait").success());
        assert_eq!(harness.cgroups(), Vec::<std::path::PathBuf>::new());
    }
}

#[test]
fn what_a_launch_uses_is_what_the_kernel_says() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let mut request = harness.request(&["hold", "33554432", "accept", "pause"]);
        request.limits = Limits { memory_bytes: Some(256 << 20), pids: Some(16), ..Limits::default() };
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let mut worker = worker(&plugin);
        worker.write_all(b"x").expect("asks");
        worker.read_exact(&mut [0]).expect("it holds them");
        let stats = stats(&mut harness, launch);
        println!("{as_:?} {stats:?}");
        assert!(stats.open_files.is_some_and(|count| (3..=8).contains(&count)), "{stats:?}");
        if as_ == As::Root {
            assert_eq!((stats.memory_limit_bytes, stats.oom_kills), (Some(256 << 20), Some(0)));
            assert!(stats.memory_bytes.is_some_and(|bytes| bytes > 32 << 20), "{stats:?}");
            assert!(stats.memory_peak_bytes >= stats.memory_bytes);
            assert_eq!(stats.pids, Some(2), "the program and its init");
            assert!(stats.cpu_nanos.is_some() && stats.cpu_throttled_nanos.is_some(), "{stats:?}");
        }
        let gone = Request::Stats { launch: LaunchId(99) };
        assert_eq!(refused(harness.ask(&gone, &[]).0).0, RefusalCode::UnknownLaunch);
    }
}

#[test]
fn limits_change_as_a_whole_or_not_at_all() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let mut request = harness.request(&["hold", "33554432", "accept", "pause"]);
        request.limits = Limits { pids: Some(16), cpu_percent: Some(50), ..Limits::default() };
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let mut worker = worker(&plugin);
        worker.write_all(b"x").expect("asks");
        worker.read_exact(&mut [0]).expect("it holds them");
        let mut change = |limits: Limits| harness.ask(&Request::Limits { launch, limits }, &[]).0;
        if as_ == As::Ordinary {
            let reply = change(Limits { memory_bytes: Some(64 << 20), ..Limits::default() });
            if let Reply::Refused(refusal) = reply {
                assert_eq!(refusal.code, RefusalCode::ControlUnavailable, "{}", refusal.message);
                println!("SKIP limits-rootless: {}", refusal.message);
                continue;
            }
        }
        for (memory, cpu, pids) in [(64_u64 << 20, 25, 8_u32), (128 << 20, 75, 32), (96 << 20, 75, 32)] {
            let limits =
                Limits { memory_bytes: Some(memory), cpu_percent: Some(cpu), pids: Some(pids), ..Limits::default() };
            let Reply::Limited(states) = change(limits) else { panic!("refused") };
            let enforced: Vec<_> = states.iter().map(|state| (state.control, state.enforced.clone())).collect();
            assert_eq!(enforced[0], (Control::MemoryLimit, Some(format!("{memory} bytes"))));
            assert!(
                matches!(&enforced[1], (Control::CpuLimit, Some(text)) if text.starts_with(&(cpu * 1000).to_string()))
            );
            assert_eq!(enforced[2], (Control::PidsLimit, Some((pids + 1).to_string())));
        }
        // Everything else stays as it was: too low, out of bounds, or not to be changed.
        for (limits, code) in [
            (
                Limits { memory_bytes: Some(8 << 20), pids: Some(4), ..Limits::default() },
                RefusalCode::ControlUnavailable,
            ),
            (Limits { memory_bytes: Some(0), ..Limits::default() }, RefusalCode::Policy),
            (Limits { memory_bytes: Some(u64::MAX), ..Limits::default() }, RefusalCode::Policy),
            (Limits { cpu_percent: Some(0), ..Limits::default() }, RefusalCode::Policy),
            (Limits { pids: Some(0), ..Limits::default() }, RefusalCode::Policy),
            (Limits { pids: Some(1000), ..Limits::default() }, RefusalCode::Policy),
            (Limits { open_files: Some(100), ..Limits::default() }, RefusalCode::Policy),
            (Limits { file_size_bytes: Some(100), ..Limits::default() }, RefusalCode::Policy),
        ] {
            let (got, why) = refused(change(limits.clone()));
            assert_eq!(got, code, "{limits:?}: {why}");
        }
        let Reply::Limited(states) = change(Limits::default()) else { panic!("refused") };
        assert_eq!(states[0].enforced, Some(format!("{} bytes", 96 << 20)));
        assert_eq!(states[2].enforced, Some("33".to_owned()));
        let Reply::Listed(listed) = harness.ask(&Request::List { after: LaunchId(0) }, &[]).0 else { panic!() };
        assert_eq!(listed.launches[0].limits.memory_bytes, Some(96 << 20));
    }
}

#[test]
fn a_memory_limit_that_came_later_is_watched_too() {
    if !is_root() {
        println!("SKIP privileged-lane: a memory limit needs root or a delegated cgroup");
        return;
    }
    let mut harness = Harness::start(As::Root);
    let request = harness.request(&["accept", "eat", "1073741824", "pause"]);
    let plugin = harness.launch(request);
    let launch = plugin.launched.launch;
    let limits = Limits { memory_bytes: Some(32 << 20), ..Limits::default() };
    assert!(matches!(harness.ask(&Request::Limits { launch, limits }, &[]).0, Reply::Limited(_)));
    worker(&plugin).write_all(b"go").expect("asks");
    assert_eq!(harness.exit_of(launch), (Exit::Signal(9), true));
}
