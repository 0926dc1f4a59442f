//! One supervisor goes, another comes: what ran runs on, nothing that was written or that ended is lost, and each is told
//! once it was acknowledged no more.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use harness::{As, Harness, Plugin, is_root, patience, supervisor_uid, wait_readable};
use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    options::{Linger, Listen, Supervisor},
    protocol::{
        Condition, Exit, Hello, Kept, Launch, LaunchId, Over, ReattachState, RefusalCode, Reply, Request, VERSION,
    },
    seqpacket::{Received, Seqpacket},
};
use rustix::{
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    process::{Pid, Signal, kill_process},
};

/// A connection to the plugin, over which it is told what to write.
fn steps(plugin: &Plugin) -> UnixStream {
    let worker = UnixStream::connect(format!("/proc/self/fd/{}", plugin.worker.as_raw_fd())).expect("its socket");
    worker.set_read_timeout(Some(patience())).expect("a time limit");
    worker
}

/// Has it write one line on each stream; both are in the pipes when this returns.
fn step(worker: &mut UnixStream, letter: u8) {
    worker.write_all(&[letter]).expect("asks");
    worker.read_exact(&mut [0]).expect("it has written");
}

/// Reads until the text is there.
fn read_until(pipe: &mut fs::File, wanted: &str) -> String {
    let deadline = Instant::now() + patience();
    let (mut text, mut bytes) = (String::new(), [0; 4096]);
    while !text.contains(wanted) {
        match pipe.read(&mut bytes) {
            Ok(0) => panic!("it ended: {text:?}"),
            Ok(count) => text.push_str(&String::from_utf8_lossy(&bytes[..count])),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(wait_readable(pipe.as_fd(), deadline), "{wanted:?} did not come: {text:?}");
            }
            Err(error) => panic!("read: {error}"),
        }
    }
    text
}

fn over(harness: &mut Harness, launch: LaunchId) -> Option<Over> {
    harness.list().launches.iter().find(|known| known.launch == launch).and_then(|known| match known.condition {
        Condition::Over(over) => Some(over),
        Condition::Up { .. } => None,
    })
}

/// Waits until the launcher knows that a plugin is over; the list is the only thing that tells it.
fn await_over(harness: &mut Harness, launch: LaunchId) -> Over {
    let deadline = Instant::now() + patience();
    loop {
        if let Some(over) = over(harness, launch) {
            return over;
        }
        assert!(Instant::now() < deadline, "it is not over");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn inode(fd: &OwnedFd) -> u64 {
    rustix::fs::fstat(fd).expect("fstat").st_ino
}

#[test]
fn the_next_supervisor_finds_everything_again() {
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        assert_eq!(harness.list().unattended_nanos, None, "the first supervisor");
        let request = harness.request(&["steps"]);
        let mut plugin = harness.launch(request.clone());
        let launch = plugin.launched.launch;
        let (pid, broker) = (plugin.launched.pid, inode(&plugin.broker));
        let mut worker = steps(&plugin);
        step(&mut worker, b'a');
        assert_eq!(read_until(&mut plugin.stdout, "\n"), "out a\n");
        // The next line is in the pipe when the supervisor is killed, the one after is written while there is none.
        step(&mut worker, b'b');
        drop(plugin);
        harness.disconnect();
        step(&mut worker, b'c');
        harness.connect();

        let listed = harness.list();
        assert!(listed.unattended_nanos.is_some_and(|nanos| nanos > 0));
        assert_eq!((listed.launches.len(), listed.more, listed.ends_forgotten), (1, false, 0));
        let known = &listed.launches[0];
        assert_eq!((known.launch, known.plugin.as_str(), known.generation), (launch, "walled", 7));
        assert_eq!((known.bundle, &known.limits), (request.bundle, &request.limits));
        assert!(matches!(known.condition, Condition::Up { pid: same, .. } if same == pid));

        step(&mut worker, b'd');
        let (reattached, [out, err], again) = harness.reattach(launch);
        let mut again = again.expect("it is up");
        assert_eq!((again.launched.pid, inode(&again.broker)), (pid, broker));
        assert!(!again.launched.controls.is_empty());
        assert_eq!((reattached.stdout.lost, reattached.stderr.lost), (0, 0));
        step(&mut worker, b'e');
        assert_eq!(out + &read_until(&mut again.stdout, "e\n"), "out b\nout c\nout d\nout e\n", "each line once");
        assert_eq!(
            err + &read_until(&mut again.stderr, "e\n"),
            "err a\nerr b\nerr c\nerr d\nerr e\n",
            "and stderr, of which nothing was read"
        );
        assert_eq!(harness.ask(&Request::Acknowledge { launch }, &[]).0, Reply::Done);
        let (reattached, ..) = harness.reattach(launch);
        assert_eq!((reattached.stdout, reattached.stderr), (Kept::default(), Kept::default()), "acknowledged");
        assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
        assert_eq!(harness.exit_of(launch), (Exit::Signal(9), false));
    }
}

#[test]
fn what_was_handed_over_and_not_acknowledged_is_handed_over_again() {
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let request = harness.request(&["steps"]);
    let plugin = harness.launch(request);
    let launch = plugin.launched.launch;
    let mut worker = steps(&plugin);
    drop(plugin);
    harness.disconnect();
    let mut all = String::new();
    for letter in [b'a', b'b', b'c'] {
        step(&mut worker, letter);
        all.push_str(&format!("out {}\n", char::from(letter)));
        harness.connect();
        let refused = harness.ask(&Request::Acknowledge { launch }, &[]).0;
        assert!(matches!(refused, Reply::Refused(refusal) if refusal.code == RefusalCode::Policy), "nothing was read");
        let (_, [kept, _], again) = harness.reattach(launch);
        let mut pipe = again.expect("it is up").stdout;
        let rest = all.strip_prefix(&kept).expect("from the first line on");
        assert_eq!(if rest.is_empty() { String::new() } else { read_until(&mut pipe, rest) }, rest);
        // What it read from the pipe itself is its own; what it got from the launcher it has not acknowledged.
        all = kept;
        harness.disconnect();
    }
}

#[test]
fn ends_are_kept_until_they_are_acknowledged() {
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let mut request = harness.request(&["steps"]);
        request.generation = 9;
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let mut worker = steps(&plugin);
        let told = harness.request(&["exit", "3"]);
        let told = harness.launch(told).launched.launch;
        assert_eq!(harness.exit_of(told), (Exit::Code(3), false));
        harness.disconnect();
        step(&mut worker, b'z');
        rustix::process::pidfd_send_signal(&plugin.pidfd, Signal::ABORT).expect("it lives");
        assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()));
        drop(plugin);
        for _ in 0..2 {
            harness.connect();
            let Over { exit, oom_killed, .. } = await_over(&mut harness, launch);
            assert_eq!((exit, oom_killed), (Exit::Signal(6), false));
            let (reattached, texts, _) = harness.reattach(launch);
            assert!(matches!(reattached.state, ReattachState::Over(over) if over.exit == Exit::Signal(6)));
            assert_eq!(texts, ["out z\n", "err z\n"], "its last words");
            let known = harness.list().launches;
            assert_eq!(known.iter().map(|known| known.launch).collect::<Vec<_>>(), [launch, told]);
            assert_eq!(known[0].generation, 9);
            assert!(over(&mut harness, told).is_some_and(|over| over.exit == Exit::Code(3)), "told, not acknowledged");
            harness.disconnect();
        }
        harness.connect();
        for launch in [launch, told] {
            assert_eq!(harness.ask(&Request::Acknowledge { launch }, &[]).0, Reply::Done);
            let Reply::Refused(refusal) = harness.ask(&Request::Acknowledge { launch }, &[]).0 else {
                panic!("acknowledged twice")
            };
            assert_eq!(refusal.code, RefusalCode::UnknownLaunch);
        }
        assert!(harness.list().launches.is_empty());
    }
}

#[test]
fn the_cause_of_an_end_is_kept_and_ends_are_bounded() {
    if is_root() {
        let mut harness = Harness::start_listening(As::Root, Linger::Forever);
        let mut request = harness.request(&["accept", "eat", "1073741824", "pause"]);
        request.limits.memory_bytes = Some(32 << 20);
        let hog = harness.launch(request);
        let launch = hog.launched.launch;
        let mut worker = steps(&hog);
        harness.disconnect();
        worker.write_all(b"go").expect("asks");
        assert!(wait_readable(hog.pidfd.as_fd(), Instant::now() + patience()));
        harness.connect();
        let Over { exit, oom_killed, .. } = await_over(&mut harness, launch);
        assert_eq!((exit, oom_killed), (Exit::Signal(9), true));
    } else {
        println!("SKIP privileged-lane: a memory limit needs root or a delegated cgroup");
    }
    let mut harness = Harness::spawn_listening_with(As::possible()[0], Linger::Forever, |options| {
        options.max_plugins = 2;
    });
    harness.connect();
    let mut ended = Vec::new();
    for code in ["1", "2", "3"] {
        let request = harness.request(&["exit", code]);
        let launch = harness.launch(request).launched.launch;
        harness.exit_of(launch);
        ended.push(launch);
    }
    let listed = harness.list();
    assert_eq!(listed.launches.iter().map(|known| known.launch).collect::<Vec<_>>(), ended[1..], "the newest");
    assert_eq!(listed.ends_forgotten, 1);
}

#[test]
fn output_is_bounded_and_its_writer_never_waits() {
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        // More than a pipe and a ring hold together.
        let request: Launch = harness.request(&["accept", "lines", "20000", "20"]);
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let mut worker = steps(&plugin);
        // Whoever shares the pipe's open description may make it block; it must not be the launcher's.
        rustix::io::ioctl_fionbio(&plugin.stdout, false).expect("blocking");
        harness.disconnect();
        worker.write_all(b"go").expect("asks");
        assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()), "it writes everything and ends");
        harness.connect();
        assert_eq!(await_over(&mut harness, launch).exit, Exit::Code(0));
        let (reattached, [out, _], _) = harness.reattach(launch);
        let all = 20_000 * 20 + "accept ok\nlines ok\n".len() as u64;
        assert_eq!(reattached.stdout.bytes + reattached.stdout.lost, all);
        assert_eq!(reattached.stdout.bytes, 64 << 10);
        assert!(out.ends_with("0000000000000019999\nlines ok\n"), "the newest is kept");
    }
}

#[test]
fn one_supervisor_at_a_time() {
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let said = |connection: &Seqpacket| {
            let deadline = Instant::now() + patience();
            loop {
                match connection.try_recv() {
                    Ok(Received::Packet(packet)) => {
                        let message = codec::decode_from_launcher(&packet.bytes).expect("decodes");
                        let FromLauncher::Reply { id, reply: Reply::Refused(refusal) } = message else {
                            panic!("{message:?}")
                        };
                        return (id, refusal.code);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        assert!(wait_readable(connection.as_fd(), deadline));
                    }
                    other => panic!("closed without a word: {other:?}"),
                }
            }
        };
        let second = harness.knock();
        assert_eq!(said(&second).1, RefusalCode::Busy);
        if is_root() {
            assert_eq!(said(&harness.knock_as(0)).1, RefusalCode::Policy, "not even root");
        }
        // With a request on the way already it is told all the same, whichever comes first.
        let deadline = Instant::now() + patience();
        let third = loop {
            let third = harness.knock();
            let hello = codec::encode_request(41, &Request::Hello(Hello { version: VERSION })).expect("encodes");
            let _ = third.try_send(&hello, &[]);
            // It has a second to read why. Had this thread not run for so long, its request would have reset the
            // connection before it looked.
            assert!(wait_readable(third.as_fd(), deadline), "neither told nor shown out");
            match third.try_recv() {
                Ok(Received::Packet(packet)) => {
                    let told = codec::decode_from_launcher(&packet.bytes).expect("decodes");
                    let FromLauncher::Reply { id: 0, reply: Reply::Refused(refusal) } = told else {
                        panic!("{told:?}")
                    };
                    assert_eq!(refusal.code, RefusalCode::Busy);
                    break third;
                }
                other => assert!(Instant::now() < deadline, "closed without a word: {other:?}"),
            }
        };
        assert!(wait_readable(third.as_fd(), Instant::now() + patience()), "and shown out");
        let end = third.try_recv();
        assert!(matches!(end, Ok(Received::Closed)), "{end:?}");
        assert!(harness.list().launches.is_empty(), "the first is served");
        harness.disconnect();
        harness.connect();
        assert!(harness.list().unattended_nanos.is_some());
    }
}

#[test]
fn who_says_nothing_keeps_nobody_out() {
    let mut harness = Harness::spawn_listening(As::possible()[0], Linger::Forever);
    let silent = harness.knock();
    // While it is let in nobody else is; then it is shown out, and `connect`, which tries until it is let in, succeeds.
    harness.connect();
    assert!(wait_readable(silent.as_fd(), Instant::now() + patience()), "its connection stays open");
    let end = silent.try_recv();
    assert!(matches!(end, Ok(Received::Closed)), "{end:?}");
}

#[test]
fn the_first_supervisor_may_come_with_the_launcher() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with(as_, |options| {
            let Supervisor::Inherited(fd) = options.supervisor else { panic!("the harness inherits") };
            let path = options.runtime_directory.join("launcher.sock");
            let linger = Linger::Forever;
            options.supervisor = Supervisor::Listen(Listen { path, first: Some(fd), uid: supervisor_uid(), linger });
        });
        let request = harness.request(&["pause"]);
        let launch = harness.launch(request).launched.launch;
        assert_eq!(harness.list().unattended_nanos, None);
        harness.disconnect();
        harness.connect();
        assert!(harness.list().unattended_nanos.is_some());
        assert!(harness.reattach(launch).2.is_some());
    }
}

#[test]
fn a_service_manager_may_hold_the_socket() {
    let harness = Harness::spawn_listening(As::possible()[0], Linger::Forever);
    let path = harness.path("run/passed.sock");
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("a socket");
    bind(&socket, &SocketAddrUnix::new(&path).expect("an address")).expect("binds");
    listen(&socket, 4).expect("listens");
    let uid = rustix::process::geteuid().as_raw().to_string();
    let runtime = harness.path("passed");
    fs::create_dir(&runtime).expect("a directory");
    let start = |socket: OwnedFd| {
        let mut command = Command::new("sh");
        command.arg("-c").arg("LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\" 3<&0 </dev/null");
        command.arg(harness.path("plugvisor-launcher")).args(["--cgroup-root", "plugvisor-test-passed"]);
        command.args(["--supervisor-uid", &uid, "--linger", "0", "--listen"]).arg(&path);
        command.arg("--runtime-directory").arg(&runtime).stdin(Stdio::from(socket));
        command.stderr(Stdio::piped()).spawn().expect("it starts")
    };
    let mut process = start(socket.try_clone().expect("a copy"));
    let connection = Seqpacket::connect(&path).expect("the socket listens before the launcher does");
    let hello = codec::encode_request(3, &Request::Hello(Hello { version: VERSION })).expect("encodes");
    connection.try_send(&hello, &[]).expect("sends");
    assert!(wait_readable(connection.as_fd(), Instant::now() + patience()));
    let Ok(Received::Packet(packet)) = connection.try_recv() else { panic!("no packet") };
    let message = codec::decode_from_launcher(&packet.bytes).expect("decodes");
    assert!(matches!(message, FromLauncher::Reply { id: 3, reply: Reply::Hello { .. } }), "{message:?}");
    drop(connection);
    assert!(process.wait().expect("it ends").success());
    assert!(path.exists(), "the path is not the launcher's to remove");

    let (wrong, _other) = UnixStream::pair().expect("a pair");
    let output = start(wrong.into()).wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(74), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn it_lingers_as_long_as_it_was_told() {
    for as_ in As::possible() {
        for linger in [Linger::For(Duration::ZERO), Linger::For(Duration::from_secs(1)), Linger::Forever] {
            let mut harness = Harness::start_listening(as_, linger);
            let request = harness.request(&["pause"]);
            let plugin = harness.launch(request);
            let gone = Instant::now();
            harness.disconnect();
            if linger == Linger::Forever {
                harness.connect();
                assert_eq!(harness.list().launches.len(), 1);
                kill_process(Pid::from_child(&harness.process), Signal::TERM).expect("SIGTERM");
            }
            assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()), "it ends with the launcher");
            if let Linger::For(time) = linger {
                assert!(gone.elapsed() >= time, "{:?}", gone.elapsed());
            }
            assert!(harness.process.wait().expect("wait").success());
            assert_eq!(harness.cgroups(), Vec::<std::path::PathBuf>::new());
            assert_eq!(fs::read_dir(harness.path("run")).expect("the runtime directory").count(), 0);
        }
    }
}

#[test]
fn listening_sockets_outlive_the_supervisor() {
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let path = harness.path("calls.sock");
    let listener = UnixListener::bind(&path).expect("binds");
    let hold = Request::HoldFd { name: "calls".to_owned() };
    assert_eq!(harness.ask(&hold, &[listener.as_fd()]).0, Reply::Done);
    drop(listener);
    harness.disconnect();
    let mut caller = UnixStream::connect(&path).expect("it waits in the backlog");
    caller.write_all(b"hello").expect("write");
    harness.connect();
    assert_eq!(harness.list().held, ["calls"]);
    for keep in [true, false] {
        let (reply, mut sockets) = harness.ask(&Request::TakeFd { name: "calls".to_owned(), keep }, &[]);
        assert_eq!((reply, sockets.len()), (Reply::Taken, 1));
        if keep {
            let listener = UnixListener::from(sockets.remove(0));
            let mut bytes = [0; 5];
            listener.accept().expect("the caller").0.read_exact(&mut bytes).expect("read");
            assert_eq!(&bytes, b"hello");
        }
    }
    let (reply, _) = harness.ask(&Request::TakeFd { name: "calls".to_owned(), keep: true }, &[]);
    assert!(matches!(reply, Reply::Refused(refusal) if refusal.code == RefusalCode::NotHeld));
    // The launcher closes what it gave back a moment after the answer.
    let deadline = Instant::now() + patience();
    while UnixStream::connect(&path).is_ok() {
        assert!(Instant::now() < deadline, "somebody still holds it");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_launch_under_way_is_known_or_gone() {
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let mut wait = Duration::ZERO;
        let mut known_of = 0;
        for round in 0..12 {
            let mut request = harness.request(&["pause"]);
            request.plugin = format!("walled-round-{round}");
            let request = harness.prepared(request);
            harness.send(&Request::Launch(Box::new(request)), &[]);
            // Killed at another moment of the launch each time.
            std::thread::sleep(wait);
            wait += Duration::from_micros(500);
            harness.disconnect();
            harness.connect();
            for known in harness.list().launches {
                known_of += 1;
                let launch = known.launch;
                let (_, _, plugin) = harness.reattach(launch);
                assert!(plugin.is_some(), "{known:?}");
                assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
                harness.exit_of(launch);
                assert_eq!(harness.ask(&Request::Acknowledge { launch }, &[]).0, Reply::Done);
            }
            let deadline = Instant::now() + patience();
            while harness.cgroups().iter().any(|path| path.to_string_lossy().contains("round-")) {
                assert!(Instant::now() < deadline, "{:?}", harness.cgroups());
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert!(harness.list().launches.is_empty());
        println!("{as_:?}: {known_of} of 12 launches were known to the next supervisor");
    }
}

#[test]
fn a_second_launcher_in_the_same_place_does_not_start() {
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let request = harness.request(&["pause"]);
    let plugin = harness.launch(request);
    let uid = supervisor_uid().to_string();
    let (run, path) = (harness.path("run"), harness.path("run/launcher.sock"));
    let start = || {
        let mut command = Command::new(harness.path("plugvisor-launcher"));
        command.args(["--cgroup-root", "plugvisor-test-second", "--supervisor-uid", &uid, "--listen"]).arg(&path);
        let output = command.arg("--runtime-directory").arg(&run).output().expect("it runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, why) = start();
    assert_eq!(code, Some(74), "{why}");
    assert!(why.contains("another launcher listens there"), "{why}");
    assert!(!wait_readable(plugin.pidfd.as_fd(), Instant::now()));
    assert!(fs::exists(run.join("launcher")).expect("its directory"), "what the first one needs is there");
    assert_eq!(harness.list().launches.len(), 1);
}
