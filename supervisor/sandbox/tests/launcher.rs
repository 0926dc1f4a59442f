//! The life of launches through the real launcher, as root and as an ordinary user: start, sockets, signals, limits,
//! ends, and that nothing is left. What the walls deny is in `walls.rs`, what the protocol refuses in `hostile.rs`.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::Instant,
};

use harness::{As, Harness, Manner, is_root, patience, read_all, wait_readable};
use plugvisor_sandbox::protocol::{
    Control, Exit, Grant, Host, Launch, Level, Limits, Notice, ProbeState, RefusalCode, Reply, Request, SocketMode,
};

const TERM: i32 = 15;
const ABRT: i32 = 6;
const KILL: i32 = 9;

fn full_limits() -> Limits {
    Limits {
        memory_bytes: Some(64 << 20),
        cpu_percent: Some(50),
        pids: Some(16),
        file_size_bytes: Some(1 << 20),
        open_files: Some(256),
    }
}

#[test]
fn a_control_that_cannot_be_read_back_ends_the_launch() {
    if !is_root() {
        println!("SKIP privileged-lane: only root's launcher can lack a capability");
        return;
    }
    // What a child may ever have is a matter of the thread that starts it.
    let launcher_without_ptrace = std::thread::spawn(|| {
        rustix::thread::remove_capability_from_bounding_set(rustix::thread::CapabilitySet::SYS_PTRACE)
            .expect("the capability is given up");
        let mut harness = Harness::start(As::Root);
        let mut request = harness.request(&["pause"]);
        for allowed in [Vec::new(), Control::ALL.to_vec()] {
            request.allow_degraded = allowed;
            let refusal =
                harness.try_launch(request.clone()).map(|plugin| plugin.launched).expect_err("it runs unseen");
            assert_eq!(refusal.code, RefusalCode::ControlUnavailable, "{refusal:?}");
            for word in ["walled", "process", "pid-namespace", "/ns/net", "Permission denied", "CAP_SYS_PTRACE"] {
                assert!(refusal.message.contains(word), "{word} is not in {}", refusal.message);
            }
            let left = |group: &std::path::PathBuf| group.to_string_lossy().contains("/walled-");
            assert!(!harness.cgroups().iter().any(left), "{:?}", harness.cgroups());
        }
    });
    launcher_without_ptrace.join().expect("the launcher refuses");
}

#[test]
fn groups_that_a_killed_launcher_left_are_in_nobodys_way() {
    if !is_root() {
        println!("SKIP privileged-lane: an ordinary user may make no cgroup on some hosts");
        return;
    }
    let mut harness = Harness::start(As::Root);
    let request = harness.request(&["pause"]);
    let left = harness.launch(request.clone());
    // On cgroup v1 what is frozen does not die of its launcher's death; elsewhere it may take as long as it likes.
    assert_eq!(harness.ask(&Request::Freeze { launch: left.launched.launch }, &[]).0, Reply::Done);
    harness.process.kill().expect("SIGKILL");
    harness.process.wait().expect("its end");
    harness.restart();
    // The same name, the same generation, and again the first launch.
    let next = harness.launch(request);
    for group in &next.launched.cgroups {
        assert!(!left.launched.cgroups.contains(group) || group.contains("/spare-"), "{group} is the left one's");
    }
    for group in left.launched.cgroups.iter().map(std::path::Path::new) {
        // Only v1's freezer has it.
        drop(fs::write(group.join("freezer.state"), "THAWED"));
    }
    assert!(wait_readable(left.pidfd.as_fd(), Instant::now() + patience()), "what was left dies");
}

#[test]
fn every_control_is_read_back_from_the_kernel() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let mut request = harness.request(&["pause"]);
        request.limits = full_limits();
        let plugin = harness.launch(request);
        let inspect = Request::Inspect { launch: plugin.launched.launch };
        let Reply::Inspected(again) = harness.ask(&inspect, &[]).0 else { panic!("not inspected") };
        assert_eq!(again, plugin.launched.controls, "read later, nothing has changed");
        let names: Vec<_> = again.iter().map(|state| state.control).collect();
        assert_eq!(names, Level::Process.controls().collect::<Vec<_>>());
        for state in &again {
            // An ordinary user has these limits only in a delegated cgroup, and never a uid to give away.
            let may_lack = matches!(state.control, Control::OwnUid | Control::MemoryLimit | Control::CpuLimit);
            println!("{as_:?} {:18} {:?} from {}", state.control.as_str(), state.enforced, state.read_from);
            assert!(state.enforced.is_some() || (as_ == As::Ordinary && may_lack), "{state:?}");
            assert_eq!(state.unavailable.is_empty(), state.enforced.is_some(), "{state:?}");
        }
        let enforced = |control| again.iter().find(|state| state.control == control).and_then(|s| s.enforced.clone());
        let status = fs::read_to_string(format!("/proc/{}/status", plugin.launched.pid)).expect("its status");
        assert!(status.contains("NoNewPrivs:\t1"), "the test reads the same process: {status}");
        if as_ == As::Root {
            assert_eq!(enforced(Control::MemoryLimit), Some(format!("{} bytes", 64 << 20)));
            assert!(
                plugin.launched.uid > 1_000_000_000
                    && status.contains(&format!("Uid:\t{0}\t{0}\t{0}\t{0}", plugin.launched.uid))
            );
            assert!(!plugin.launched.cgroups.is_empty());
        }
        harness.ask(&Request::Kill { launch: plugin.launched.launch }, &[]);
        assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Signal(KILL), false));
        assert!(
            harness.cgroups().iter().all(|path| !path.to_string_lossy().contains("walled")),
            "{:?}",
            harness.cgroups()
        );
    }
}

#[test]
fn probe_names_every_control() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let Reply::Probe(Host { controls: probed, levels }) = harness.ask(&Request::Probe, &[]).0 else {
            panic!("not probed")
        };
        assert_eq!(levels.iter().map(|probed| probed.level).collect::<Vec<_>>(), Level::ALL);
        for probed in levels {
            println!("{as_:?} {probed:?}");
            let refused = probed.lacking.iter().any(|lacking| !lacking.may_be_allowed);
            assert_eq!(refused, probed.level == Level::Vm, "{probed:?}");
            assert!(as_ == As::Ordinary || refused || probed.lacking.is_empty(), "{probed:?}");
        }
        // Nobody has named a kernel here.
        let all = Control::ALL.into_iter().filter(|control| *control != Control::OwnKernel);
        assert_eq!(probed.iter().map(|probed| probed.control).collect::<Vec<_>>(), all.collect::<Vec<_>>());
        for probed in probed {
            println!("{as_:?} {probed:?}");
            match probed.state {
                ProbeState::Works(by) => assert!(!by.is_empty()),
                ProbeState::Lacking { why, fix } => {
                    assert_eq!(as_, As::Ordinary, "{}: {why}", probed.control);
                    assert!(!why.is_empty() && !fix.is_empty());
                }
            }
        }
    }
}

#[test]
fn what_the_host_lacks_is_refused_unless_allowed() {
    if is_root() {
        let mut harness = Harness::start(As::Ordinary);
        let mut request = harness.request(&[]);
        request.allow_degraded.clear();
        request.limits.memory_bytes = Some(64 << 20);
        let refusal = harness.try_launch(request.clone()).map(drop).expect_err("own-uid is lacking");
        assert_eq!(refusal.code, RefusalCode::ControlUnavailable);
        for word in ["walled", "own-uid", "allow_degraded", "as root"] {
            assert!(refusal.message.contains(word), "{word} in {}", refusal.message);
        }
        // Where the harness can delegate a cgroup, an ordinary user has limits.
        let lacks_limits = !harness.place.has_limits();
        assert_eq!(refusal.message.contains("memory-limit"), lacks_limits, "{}", refusal.message);
        request.allow_degraded = vec![Control::OwnUid, Control::MemoryLimit];
        harness.launch(request);
    } else {
        println!("SKIP privileged-lane: what an ordinary user lacks is known for certain only when root made it one");
    }
}

#[test]
fn ends_are_told_as_they_were() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        for (args, exit) in [
            (vec!["exit", "7"], Exit::Code(7)),
            (vec!["abort"], Exit::Signal(ABRT)),
            (vec!["nonsense"], Exit::Code(101)),
        ] {
            let request = harness.request(&args);
            let plugin = harness.launch(request);
            assert_eq!(harness.exit_of(plugin.launched.launch), (exit, false), "{args:?} {as_:?}");
            assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now()), "the pidfd tells it too");
        }
        // A program without a handler dies of SIGTERM, as it would outside of the PID namespace.
        let request = harness.request(&["env", "pause"]);
        let mut plugin = harness.launch(request);
        let mut first = [0; 1];
        assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()));
        plugin.stdout.read_exact(&mut first).expect("a line");
        let launch = plugin.launched.launch;
        assert_eq!(harness.ask(&Request::Signal { launch, signal: TERM }, &[]).0, Reply::Done);
        assert_eq!(harness.exit_of(launch), (Exit::Signal(TERM), false));
        for request in [Request::Signal { launch, signal: TERM }, Request::Kill { launch }, Request::Inspect { launch }]
        {
            let Reply::Refused(refusal) = harness.ask(&request, &[]).0 else { panic!("{request:?} of a dead launch") };
            assert_eq!(refusal.code, RefusalCode::UnknownLaunch);
        }
    }
}

#[test]
fn both_sockets_reach_their_other_side() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let request = harness.request(&["unix", "/run/plugvisor/broker.sock", "accept", "pause"]);
        let plugin = harness.launch(request);
        assert!(wait_readable(plugin.broker.as_fd(), Instant::now() + patience()), "a connection from the plugin");
        let broker = UnixListener::from(plugin.broker.try_clone().expect("dup"));
        broker.accept().expect("the plugin's connection");
        let path = format!("/proc/self/fd/{}", plugin.worker.as_raw_fd());
        let mut worker = UnixStream::connect(&path).expect("the worker socket");
        worker.write_all(b"ping").expect("write");
        let mut answer = [0; 4];
        worker.read_exact(&mut answer).expect("read");
        assert_eq!(&answer, b"ping");
        // Nobody but the plugin holds the listener: when it is gone, a connection is refused at once.
        harness.ask(&Request::Kill { launch: plugin.launched.launch }, &[]);
        harness.exit_of(plugin.launched.launch);
        let error = UnixStream::connect(&path).expect_err("nobody listens");
        assert_eq!(error.raw_os_error(), Some(111), "ECONNREFUSED");
    }
}

#[test]
fn a_plugin_may_bind_its_own_socket() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let bound = Manner::of(&["bind-accept", "/run/plugvisor/worker/worker.sock"]);
        let request = harness.request_in(&Manner { socket: SocketMode::Bind, ..bound });
        let mut plugin = harness.launch(request);
        assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()), "it says when it is bound");
        let path = format!("/proc/self/fd/{}/worker.sock", plugin.worker.as_raw_fd());
        let mut worker = UnixStream::connect(path).expect("the worker socket");
        worker.write_all(b"ping").expect("write");
        let mut answer = [0; 4];
        worker.read_exact(&mut answer).expect("read");
        assert_eq!(&answer, b"ping");
        assert_eq!(read_all(&mut plugin.stdout), "bound\nbind-accept ok\n");
    }
}

/// The directory is a small file system of the launch's own, not the host's: a plugin that binds and binds takes no inode
/// of anybody else's.
#[test]
fn a_plugin_that_binds_its_own_socket_makes_few_files() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let paths: Vec<String> = (0..20).map(|number| format!("/run/plugvisor/worker/{number}.sock")).collect();
        let binds: Vec<&str> = paths.iter().flat_map(|path| ["bind", path]).collect();
        let request = harness.request_in(&Manner { socket: SocketMode::Bind, ..Manner::of(&binds) });
        let mut plugin = harness.launch(request);
        let said = read_all(&mut plugin.stdout);
        assert!(said.starts_with("bind ok\n") && said.ends_with("bind 28\n"), "{as_:?}: {said}");
        assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
    }
}

#[test]
fn output_can_be_reopened_by_path() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let lines = harness.attempt(|_| (), &["append", "/dev/stdout"]);
        assert_eq!(lines, [("xappend".to_owned(), "ok".to_owned())]);
    }
}

#[test]
fn a_memory_hog_is_killed_and_told() {
    if !is_root() {
        println!("SKIP privileged-lane: a memory limit needs root or a delegated cgroup");
        return;
    }
    let mut harness = Harness::start(As::Root);
    let sibling = harness.request(&["pause"]);
    let sibling = harness.launch(sibling);
    let mut request = harness.request(&["eat", "1073741824", "pause"]);
    request.limits.memory_bytes = Some(32 << 20);
    let hog = harness.launch(request);
    let launch = hog.launched.launch;
    harness.await_notice(|notice| (*notice == Notice::OutOfMemory { launch }).then_some(()));
    assert_eq!(harness.exit_of(launch), (Exit::Signal(KILL), true));
    assert!(!wait_readable(sibling.pidfd.as_fd(), Instant::now()), "the sibling lives");
}

#[test]
fn a_fork_bomb_is_capped() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let lines = harness.attempt(
            |launch| {
                launch.grants = vec![Grant::SpawnChild];
                launch.limits.pids = Some(8);
            },
            // At most 64 even without a wall.
            &["forks", "64"],
        );
        // Eight processes are the program and seven children; the next fork is EAGAIN.
        assert_eq!(lines, [("forks".to_owned(), "7 then 11".to_owned())], "{as_:?}");
    }
}

#[test]
fn daemons_die_with_their_plugin() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let spawn = |launch: &mut Launch| launch.grants = vec![Grant::SpawnChild];
        // The plugin ends by itself and leaves a daemon, which holds the output pipes: their end proves that it died.
        assert_eq!(harness.attempt(spawn, &["daemons"]), [("daemons".to_owned(), "ok".to_owned())]);
        // The plugin lives, is killed, and its daemon with it.
        let mut request = harness.request(&["daemons", "pause"]);
        spawn(&mut request);
        let mut plugin = harness.launch(request);
        assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()));
        assert_eq!(harness.ask(&Request::Kill { launch: plugin.launched.launch }, &[]).0, Reply::Done);
        assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Signal(KILL), false));
        read_all(&mut plugin.stdout);
        read_all(&mut plugin.stderr);
    }
}

#[test]
fn plugins_die_with_a_killed_launcher() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let mut request = harness.request(&["daemons", "pause"]);
        request.grants = vec![Grant::SpawnChild];
        let mut plugin = harness.launch(request);
        assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()));
        assert!(!wait_readable(plugin.pidfd.as_fd(), Instant::now()), "it lives");
        harness.process.kill().expect("SIGKILL");
        assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()), "the plugin died with the launcher");
        // The daemon held the pipe too.
        read_all(&mut plugin.stdout);
    }
}

#[test]
fn nothing_is_left_when_the_supervisor_goes() {
    for as_ in As::possible() {
        for by_signal in [false, true] {
            let mut harness = Harness::start(as_);
            let mut request = harness.request(&["pause"]);
            request.limits = full_limits();
            let plugin = harness.launch(request);
            if by_signal {
                let pid = rustix::process::Pid::from_raw(harness.process.id().cast_signed()).expect("a pid");
                rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
            } else {
                let (unused, _) = plugvisor_sandbox::seqpacket::Seqpacket::pair().expect("a pair");
                harness.connection = unused;
            }
            assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()), "the plugin is killed");
            assert!(harness.process.wait().expect("wait").success());
            assert_eq!(harness.cgroups(), Vec::<std::path::PathBuf>::new());
            assert_eq!(fs::read_dir(harness.path("run")).expect("the runtime directory").count(), 0);
        }
    }
}

#[test]
fn a_hundred_launches_leave_nothing() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        // Those of this test: the host may mount what it wants meanwhile.
        let place = harness.directory.path().display().to_string();
        let mounts = || {
            let all = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
            all.lines().filter(|line| line.contains("plugvisor") || line.contains(&place)).count()
        };
        let before = mounts();
        let mut baseline = None;
        let mut times = Vec::new();
        for round in 0..100 {
            let mut request = harness.request(&["exit", "0"]);
            request.limits = full_limits();
            let plugin = harness.launch(request);
            times.push(plugin.launched.launch_exec_nanos);
            assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
            let most = *baseline.get_or_insert_with(|| harness.descriptors());
            harness.await_descriptors(most, &format!("after launch {round}"));
        }
        times.sort_unstable();
        let [fastest, median, slow] = [0, 50, 90].map(|at| times[at] / 1000);
        println!("{as_:?}: launch to exec, fastest {fastest} us, median {median} us, 90th percentile {slow} us");
        assert_eq!(mounts(), before, "no mount reached the host");
        let left: Vec<_> =
            harness.cgroups().into_iter().filter(|path| path.to_string_lossy().contains("walled")).collect();
        assert_eq!(left, Vec::<std::path::PathBuf>::new());
        let sockets = fs::read_dir(harness.path("run/launcher"));
        if let Ok(sockets) = sockets {
            assert_eq!(sockets.count(), 2, "only the mount point and the store");
        }
    }
}

#[test]
fn the_launcher_stays_small() {
    let mut harness = Harness::start(As::possible()[0]);
    for _ in 0..3 {
        let request = harness.request(&["pause"]);
        harness.launch(request);
    }
    let status = fs::read_to_string(format!("/proc/{}/status", harness.process.id())).expect("its status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    let kib: u64 = resident.trim().trim_end_matches(" kB").parse().expect("a number");
    println!("launcher: {kib} KiB resident with three plugins");
    // 4 MiB is the bound in release; a debug build carries more code.
    let bound = if cfg!(debug_assertions) { 8 } else { 4 } * 1024;
    assert!(kib <= bound, "{kib} KiB");
}

#[test]
fn launches_overlap() {
    let mut harness = Harness::start(As::possible()[0]);
    let plugins: Vec<_> = (0..8)
        .map(|number| {
            let mut request = harness.request(&["pause"]);
            request.plugin = format!("walled-{number}");
            harness.launch(request)
        })
        .collect();
    if is_root() {
        let mut uids: Vec<u32> = plugins.iter().map(|plugin| plugin.launched.uid).collect();
        uids.dedup();
        assert_eq!(uids.len(), 8, "each name has its own uid: {uids:?}");
        let mut request = harness.request(&["pause"]);
        request.plugin = "walled-3".to_owned();
        let again = harness.launch(request);
        assert_eq!(again.launched.uid, plugins[3].launched.uid, "and keeps it");
    }
    for plugin in &plugins {
        assert!(!wait_readable(plugin.pidfd.as_fd(), Instant::now()), "each runs beside the others");
    }
}
