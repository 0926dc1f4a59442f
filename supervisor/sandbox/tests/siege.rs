//! A supervisor that was taken over, against a launcher that listens: every request out of policy, cut, swollen, with the
//! wrong descriptors; floods; ends at any moment. Each is refused with its type, nothing changes, and all the while the
//! end of a plugin is noticed in time.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use harness::{As, Harness, Plugin, Stopping, listed, make_bundle, patience, wait_readable};
use plugvisor_sandbox::{
    codec::{self, FromLauncher, HEADER_LEN},
    options::Linger,
    protocol::{
        Condition, Exit, Hello, Import, LaunchId, Limits, MAX_HELD, MAX_PACKET, RefusalCode, Reply, Request, VERSION,
    },
    seqpacket::{MOST_DESCRIPTORS, Received, Seqpacket},
};
use rustix::{
    net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socket_with},
    process::Signal,
};

/// One of these tests at a time: the kernel counts the descriptors that are on the way per user, and those of one attack
/// would make the launches of another test fail.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn refusal(reply: Reply) -> (RefusalCode, String) {
    match reply {
        Reply::Refused(refusal) => (refusal.code, refusal.message),
        other => panic!("not refused: {other:?}"),
    }
}

/// What must not change: the launches and how they are, and the held sockets.
fn known(harness: &mut Harness) -> (Vec<(LaunchId, bool, Limits)>, Vec<String>) {
    let listed = harness.list();
    let launches = listed.launches.into_iter().map(|known| {
        let still = matches!(known.condition, Condition::Up { frozen: false, .. });
        (known.launch, still, known.limits)
    });
    (launches.collect(), listed.held)
}

/// A request of each kind that goes on without descriptors, for a launch.
fn requests(launch: LaunchId) -> Vec<Request> {
    vec![
        Request::Signal { launch, signal: 15 },
        Request::Kill { launch },
        Request::Inspect { launch },
        Request::Freeze { launch },
        Request::Thaw { launch },
        Request::Limits { launch, limits: Limits { pids: Some(9), ..Limits::default() } },
        Request::Stats { launch },
        Request::Reattach { launch },
        Request::Acknowledge { launch },
        Request::Inward { launch, from: 0 },
    ]
}

#[test]
fn requests_for_launches_that_are_not() {
    let _alone = alone();
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let request = harness.request(&["pause"]);
        let last = harness.launch(request).launched.launch.0;
        let before = known(&mut harness);
        for launch in [0, last + 1, 1 << 60, u64::MAX].map(LaunchId) {
            for request in requests(launch) {
                let (code, why) = refusal(harness.ask(&request, &[]).0);
                assert_eq!(code, RefusalCode::UnknownLaunch, "{request:?}: {why}");
                assert_eq!(known(&mut harness), before, "{request:?}");
            }
        }
        let Reply::Listed(none) = harness.ask(&Request::List { after: LaunchId(u64::MAX) }, &[]).0 else { panic!() };
        assert!(none.launches.is_empty() && !none.more);
    }
}

#[test]
fn descriptors_where_none_belong() {
    let _alone = alone();
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let request = harness.request(&["pause"]);
    let plugin = harness.launch(request);
    let before = known(&mut harness);
    let open = harness.descriptors();
    let (pipe, _write) = rustix::pipe::pipe().expect("a pipe");
    let mut all = requests(plugin.launched.launch);
    all.extend([
        Request::Hello(Hello { version: VERSION }),
        Request::Probe,
        Request::Policy,
        Request::List { after: LaunchId(0) },
        Request::TakeFd { name: "a".to_owned(), keep: true },
    ]);
    for request in all {
        let (code, why) = refusal(harness.ask(&request, &[pipe.as_fd()]).0);
        assert_eq!(code, RefusalCode::Policy, "{request:?}: {why}");
        assert_eq!(known(&mut harness), before, "{request:?}");
    }
    assert_eq!(harness.descriptors(), open, "all were closed");
}

#[test]
fn only_listening_sockets_are_held() {
    let _alone = alone();
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let request = harness.request(&["pause"]);
    let plugin = harness.launch(request);
    let before = known(&mut harness);
    let open = harness.descriptors();
    let good = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let path = harness.path("listening.sock");
    let listener = UnixListener::bind(&path).expect("a listener");
    let (stream, _other) = UnixStream::pair().expect("a pair");
    let (pipe, _write) = rustix::pipe::pipe().expect("a pipe");
    let fifo = harness.path("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RWXU).expect("a FIFO");
    let fifo = File::options().read(true).write(true).open(&fifo).expect("a FIFO");
    let by_path = rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).expect("O_PATH");
    let unbound = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
    let (connection, _peer) = Seqpacket::pair().expect("a pair");
    let mut wrong: Vec<(&str, OwnedFd)> = vec![
        ("a device", File::open("/dev/null").expect("/dev/null").into()),
        ("an endless device", File::open("/dev/zero").expect("/dev/zero").into()),
        ("a directory", File::open("/").expect("/").into()),
        ("a regular file", tempfile::tempfile().expect("a file").into()),
        ("a FIFO", fifo.into()),
        ("a pipe", pipe),
        ("a path to a listening socket", by_path),
        ("a connected socket", stream.into()),
        ("a connected packet socket", connection.into()),
        ("a socket that does not listen", unbound),
        ("a datagram socket", UnixDatagram::unbound().expect("a socket").into()),
        ("UDP", UdpSocket::bind("127.0.0.1:0").expect("a socket").into()),
        ("a plugin's broker", plugin.broker.try_clone().expect("a copy")),
        ("a plugin's worker", plugin.worker.try_clone().expect("a copy")),
        ("a pidfd", plugin.pidfd.try_clone().expect("a copy")),
        ("an event set", rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).expect("epoll")),
    ];
    // Multipath TCP looks like TCP but for its protocol.
    let mptcp = std::num::NonZeroU32::new(262).map(rustix::net::Protocol::from_raw);
    match socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, mptcp) {
        Ok(socket) => {
            rustix::net::listen(&socket, 1).expect("listens");
            wrong.push(("multipath TCP", socket));
        }
        Err(error) => println!("SKIP mptcp: {error}"),
    }
    let hold = |name: &str| Request::HoldFd { name: name.to_owned() };
    for (what, descriptor) in &wrong {
        let (code, why) = refusal(harness.ask(&hold("a"), &[descriptor.as_fd()]).0);
        assert_eq!(code, RefusalCode::Policy, "{what}: {why}");
    }
    for descriptors in [vec![], vec![good.as_fd(); 2], vec![good.as_fd(); 8]] {
        assert_eq!(refusal(harness.ask(&hold("a"), &descriptors).0).0, RefusalCode::Policy);
    }
    for name in ["", "A", "a/b", "a\0", "é", &"a".repeat(65), &"a".repeat(60_000)] {
        assert_eq!(refusal(harness.ask(&hold(name), &[good.as_fd()]).0).0, RefusalCode::Policy, "{name:?}");
        let take = Request::TakeFd { name: name.to_owned(), keep: false };
        let (code, why) = refusal(harness.ask(&take, &[]).0);
        assert_eq!(code, RefusalCode::NotHeld);
        assert!(why.len() < 1000, "what is shown of a name is bounded");
    }
    assert_eq!(known(&mut harness), before);
    assert_eq!(harness.descriptors(), open, "all were closed");

    for number in 0..MAX_HELD {
        let listener: BorrowedFd<'_> = if number % 2 == 0 { good.as_fd() } else { listener.as_fd() };
        assert_eq!(harness.ask(&hold(&format!("n{number}")), &[listener]).0, Reply::Done);
    }
    assert_eq!(refusal(harness.ask(&hold("more"), &[good.as_fd()]).0).0, RefusalCode::Exhausted);
    for _ in 0..100 {
        assert_eq!(harness.ask(&hold("n0"), &[good.as_fd()]).0, Reply::Done, "replaced");
    }
    let grown = open.map(|open| open + MAX_HELD);
    assert_eq!(harness.descriptors(), grown, "what was replaced was closed");
}

#[test]
fn packets_cut_and_swollen_anywhere() {
    let _alone = alone();
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let request = harness.request(&["pause"]);
    let plugin = harness.launch(request);
    let before = known(&mut harness);
    let mut all = requests(plugin.launched.launch);
    all.extend([
        Request::Hello(Hello { version: VERSION }),
        Request::List { after: LaunchId(1 << 40) },
        Request::HoldFd { name: "calls".to_owned() },
        Request::TakeFd { name: "calls".to_owned(), keep: false },
    ]);
    let ask = |harness: &Harness, bytes: &[u8]| {
        send(&harness.connection, bytes, SendFlags::NOSIGNAL).expect("sends");
        let (message, descriptors) = harness.receive(Instant::now() + patience()).expect("the launcher lives");
        assert!(descriptors.is_empty());
        match message {
            FromLauncher::Reply { id, reply } => (id, refusal(reply).0),
            FromLauncher::Notice(notice) => panic!("{notice:?}"),
        }
    };
    for request in all {
        let packet = codec::encode_request(77, &request).expect("encodes");
        for cut in 1..packet.len() {
            let (id, code) = ask(&harness, &packet[..cut]);
            assert_eq!(
                (id, code),
                (if cut < HEADER_LEN { 0 } else { 77 }, RefusalCode::Malformed),
                "{request:?} {cut}"
            );
        }
        for more in [1, 100, MAX_PACKET - packet.len()] {
            let mut longer = packet.clone();
            longer.resize(packet.len() + more, 0);
            assert_eq!(ask(&harness, &longer), (77, RefusalCode::Malformed), "{request:?} and {more}");
        }
        let mut longer = packet.clone();
        longer.resize(MAX_PACKET + 1, 0);
        assert_eq!(ask(&harness, &longer), (0, RefusalCode::Malformed), "{request:?}");
        for version in [0, VERSION + 1, u16::MAX] {
            let mut other = packet.clone();
            other[..2].copy_from_slice(&version.to_le_bytes());
            assert_eq!(ask(&harness, &other), (77, RefusalCode::Version), "{request:?}");
        }
    }
    // Every kind that is not a request.
    for kind in [0, 50, 99, 0x100, 0x101, 0x10c, 0x1fe, 0x1ff, 0x201, 0xffff_u16] {
        let mut packet = codec::encode_request(77, &Request::Probe).expect("encodes");
        packet[2..4].copy_from_slice(&kind.to_le_bytes());
        assert_eq!(ask(&harness, &packet), (77, RefusalCode::Malformed), "{kind}");
    }
    assert_eq!(known(&mut harness), before);
}

#[test]
fn whatever_is_shared_may_be_set_blocking() {
    let _alone = alone();
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let request = harness.request(&["steps"]);
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let mut worker = worker(&plugin);
        let listener = UnixListener::bind(harness.path("held.sock")).expect("a listener");
        assert_eq!(harness.ask(&Request::HoldFd { name: "a".to_owned() }, &[listener.as_fd()]).0, Reply::Done);
        for round in 0..3 {
            // Each supervisor sets everything blocking that it was given, and goes with it still open.
            let (_, mut shared) = harness.ask(&Request::Reattach { launch }, &[]);
            shared.extend(harness.ask(&Request::TakeFd { name: "a".to_owned(), keep: true }, &[]).1);
            shared.extend(
                [plugin.broker.try_clone(), plugin.stdout.try_clone().map(Into::into)].map(|fd| fd.expect("a copy")),
            );
            for fd in &shared {
                let _ = rustix::io::ioctl_fionbio(fd, false);
            }
            rustix::io::ioctl_fionbio(&harness.connection, false).expect("blocking");
            harness.disconnect();
            worker.write_all(b"x").expect("asks");
            worker.read_exact(&mut [0]).expect("it answers");
            harness.connect();
            assert_eq!(known(&mut harness).0.len(), 1, "round {round}");
        }
    }
}

fn worker(plugin: &Plugin) -> UnixStream {
    UnixStream::connect(format!("/proc/self/fd/{}", plugin.worker.as_raw_fd())).expect("its socket")
}

#[test]
fn a_supervisor_may_be_killed_at_any_moment() {
    let _alone = alone();
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let request = harness.request(&["steps"]);
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
        let mut other = harness.request(&["pause"]);
        other.plugin = "walled-other".to_owned();
        let other = harness.prepared(other);
        let third = harness.path("bundles/walled-third");
        make_bundle(&harness.path("bundles"), "walled-third");
        let (begin, files) = listed(&third);
        let open: Vec<File> = files.iter().map(|file| File::open(third.join(&file.path)).expect("a file")).collect();
        let script: Vec<(Request, Vec<BorrowedFd<'_>>)> = vec![
            (Request::Hello(Hello { version: VERSION }), vec![]),
            (Request::List { after: LaunchId(0) }, vec![]),
            (Request::Reattach { launch }, vec![]),
            (Request::HoldFd { name: "calls".to_owned() }, vec![listener.as_fd()]),
            (Request::Launch(Box::new(other)), vec![]),
            (Request::Import(Import::Begin(begin)), vec![]),
            (Request::Import(Import::Files(files)), open.iter().map(AsFd::as_fd).collect()),
            (Request::Limits { launch, limits: Limits { pids: Some(64), ..Limits::default() } }, vec![]),
            (Request::TakeFd { name: "calls".to_owned(), keep: true }, vec![]),
            (Request::Stats { launch }, vec![]),
            (Request::Acknowledge { launch }, vec![]),
            (Request::TakeFd { name: "calls".to_owned(), keep: false }, vec![]),
        ];
        // Once in peace.
        let (reply, descriptors) = harness.ask(&script[4].0, &script[4].1);
        let Reply::Launched(launched) = reply else { panic!("{reply:?}") };
        drop(descriptors);
        let end = |harness: &mut Harness, launch| {
            if harness.ask(&Request::Kill { launch }, &[]).0 == Reply::Done {
                harness.exit_of(launch);
                harness.ask(&Request::Acknowledge { launch }, &[]);
            }
        };
        end(&mut harness, launched.launch);
        let baseline = harness.descriptors();
        harness.disconnect();
        for steps in 0..=script.len() {
            for wait in [0, 1] {
                harness.connection = knock(&harness);
                for (number, (request, descriptors)) in script[..steps].iter().enumerate() {
                    let packet = codec::encode_request(number as u64, request).expect("encodes");
                    harness.connection.try_send(&packet, descriptors).expect("sends");
                }
                std::thread::sleep(Duration::from_millis(wait));
                // Nothing was read; everything that was on the way goes with it.
                harness.disconnect();
                harness.connect();
                let listed = harness.list();
                let up = listed.launches.iter().find(|known| known.launch == launch).expect("it is known");
                assert!(matches!(up.condition, Condition::Up { frozen: false, .. }), "{steps}: {up:?}");
                for known in &listed.launches {
                    if known.launch != launch {
                        end(&mut harness, known.launch);
                    }
                }
                for name in listed.held {
                    assert_eq!(harness.ask(&Request::TakeFd { name, keep: false }, &[]).0, Reply::Taken);
                }
                let (_, _, again) = harness.reattach(launch);
                drop(again);
                assert_eq!(harness.ask(&Request::Acknowledge { launch }, &[]).0, Reply::Done);
                assert_eq!(known(&mut harness).0.len(), 1);
                // A launch that nobody was told of takes a moment to end.
                let deadline = Instant::now() + patience();
                while harness.descriptors() != baseline {
                    assert!(Instant::now() < deadline, "{steps} requests, then killed: {baseline:?} were open");
                }
                harness.disconnect();
            }
        }
        harness.connect();
        let mut worker = worker(&plugin);
        worker.write_all(b"x").expect("asks");
        worker.read_exact(&mut [0]).expect("it still serves");
    }
}

/// A connection that was let in: the end of the last one may come a moment later.
fn knock(harness: &Harness) -> Seqpacket {
    let deadline = Instant::now() + patience();
    loop {
        let connection = harness.knock();
        let hello = codec::encode_request(0, &Request::Hello(Hello { version: VERSION })).expect("encodes");
        let _ = connection.try_send(&hello, &[]);
        assert!(wait_readable(connection.as_fd(), deadline), "neither let in nor turned away");
        if let Ok(Received::Packet(packet)) = connection.try_recv()
            && let FromLauncher::Reply { reply: Reply::Hello { .. }, .. } =
                codec::decode_from_launcher(&packet.bytes).expect("decodes")
        {
            return connection;
        }
        assert!(Instant::now() < deadline, "nobody is let in");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn who_is_turned_away_leaves_nothing_that_is_closed_in_the_loop() {
    let _alone = alone();
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let request = harness.request(&["pause"]);
    let launch = harness.launch(request).launched.launch;
    // Its last close waits for as long as the listener lives.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut stream = TcpStream::connect(listener.local_addr().expect("its address")).expect("connects");
    stream.set_nonblocking(true).expect("O_NONBLOCK");
    while stream.write(&[0; 64 << 10]).is_ok() {}
    stream.set_nonblocking(false).expect("O_NONBLOCK");
    rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::from_secs(1000))).expect("SO_LINGER");

    harness.stop();
    let second = harness.knock();
    let mut sent = 0;
    for _ in 0..12 {
        let many = vec![stream.as_fd(); MOST_DESCRIPTORS];
        let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many)));
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        // How many descriptors an ordinary user may have on the way depends on its limit on open files.
        let Ok(_) = rustix::net::sendmsg(&second, &[io::IoSlice::new(b"x")], &mut control, flags) else { break };
        sent += MOST_DESCRIPTORS;
    }
    println!("{sent} descriptors on the way");
    assert!(sent > 0);
    drop(stream);
    harness.signal(Signal::CONT);
    harness.await_closing();
    assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
    assert_eq!(harness.exit_of(launch).0, Exit::Signal(9), "while the close hangs");
    drop(listener);
    drop(second);
    assert!(harness.list().launches.iter().all(|known| !matches!(known.condition, Condition::Up { .. })));
}

// Floods.

/// How long the launcher takes to reap the whole of a plugin once the kernel has told it that it is over: from the moment
/// at which the plugin's init was seen to be dead for the first time, or rather from the look before it, until it is gone.
///
/// What a process needs to die is not the launcher's, and so does not count. Nor does the time for which the launcher, or
/// the thread that looks, was ready to run and this machine did not let it: that is about the machine, and tests share
/// theirs. What a launcher takes that serves an attack first is its own time on the processor, which counts in full. The
/// connection is not used, so that it may be under attack meanwhile.
fn noticing(launcher: u32, plugin: &Plugin) -> Duration {
    let pid = plugin.launched.pid;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let init = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("its parent").trim().to_owned();
    let held_up = || held_up(&launcher.to_string()) + held_up("thread-self");
    assert_eq!(life(&init), Life::Alive);
    rustix::process::pidfd_send_signal(&plugin.pidfd, Signal::KILL).expect("it lives");
    let killed = Instant::now();
    let mut before = (killed, held_up());
    let mut dead = None;
    loop {
        let now = (Instant::now(), held_up());
        match life(&init) {
            Life::Alive => before = now,
            Life::Dead => _ = dead.get_or_insert(before),
            Life::Gone => {
                let (since, waited) = dead.unwrap_or(before);
                // Looked at after the last look: what was waited for since belongs to the same time.
                return since.elapsed().saturating_sub(held_up().saturating_sub(waited));
            }
        }
        assert!(killed.elapsed() < patience(), "nobody notices that {init} is over");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Life {
    Alive,
    /// It has ended, and its parent has not asked how.
    Dead,
    Gone,
}

fn life(pid: &str) -> Life {
    // The name in parentheses may hold anything, so the fields begin after the last one (proc_pid_stat(5)).
    match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
        Err(_) => Life::Gone,
        Ok(stat) if stat.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with(['Z', 'X'])) => Life::Dead,
        Ok(_) => Life::Alive,
    }
}

/// For how long a process with one thread, or a thread, has been ready to run and was not running
/// (`Documentation/scheduler/sched-stats.rst`).
fn held_up(of: &str) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{of}/schedstat")).unwrap_or_default();
    Duration::from_nanos(text.split_whitespace().nth(1).and_then(|field| field.parse().ok()).unwrap_or(0))
}

/// The middle one of some deaths.
fn median(harness: &Harness, plugins: &[Plugin]) -> Duration {
    let mut all: Vec<Duration> = plugins.iter().map(|plugin| noticing(harness.process.id(), plugin)).collect();
    all.sort();
    all[all.len() / 2]
}

const DEATHS: usize = 7;
/// The attack ends only after the deaths were noticed, so a launcher that serves it first would take until `patience()`.
const IN_TIME: Duration = Duration::from_millis(100);

fn victims(harness: &mut Harness) -> Vec<Plugin> {
    let launch = |_| {
        let request = harness.request(&["pause"]);
        harness.launch(request)
    };
    (0..DEATHS).map(launch).collect()
}

fn judge(what: &str, war: Duration, peace: Duration) {
    println!("{what}: reaped {war:?} after the end, in peace {peace:?}");
    assert!(war <= IN_TIME, "{what}: {war:?}, in peace {peace:?}");
}

/// Runs an attack over and over in a thread while plugins die. The control is the same launcher in peace.
fn under(what: &str, attack: impl Fn(&Harness, &Seqpacket) + Sync) {
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let plugins = victims(&mut harness);
    let peace = median(&harness, &plugins);
    let plugins = victims(&mut harness);
    let stop = AtomicBool::new(false);
    let (begun, begins) = std::sync::mpsc::channel();
    let connection =
        Seqpacket::from_fd(harness.connection.as_fd().try_clone_to_owned().expect("a copy")).expect("a socket");
    let war = std::thread::scope(|scope| {
        let (harness, stop, attack) = (&harness, &stop, &attack);
        let attacker = scope.spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                attack(harness, &connection);
                let _ = begun.send(());
            }
        });
        let _stopping = Stopping(stop);
        begins.recv_timeout(patience()).expect("the attack begins");
        let war = median(harness, &plugins);
        stop.store(true, Ordering::Relaxed);
        attacker.join().expect("the attacker");
        war
    });
    judge(what, war, peace);
    // And it is well.
    harness.disconnect();
    harness.connect();
    let request = harness.request(&["pause"]);
    let launch = harness.launch(request).launched.launch;
    assert!(known(&mut harness).0.iter().any(|(id, up, _)| *id == launch && *up));
}

/// Packets of every sort, some with descriptors.
fn barrage() -> Vec<Vec<u8>> {
    let mut all = vec![Request::Probe, Request::Policy, Request::List { after: LaunchId(0) }];
    // Launches that are over, and such as are dying.
    for launch in (2..16).step_by(3).map(LaunchId) {
        all.extend(requests(launch).into_iter().filter(|request| {
            !matches!(request, Request::Kill { .. } | Request::Signal { .. } | Request::Freeze { .. })
        }));
    }
    let mut packets: Vec<Vec<u8>> =
        all.iter().map(|request| codec::encode_request(5, request).expect("encodes")).collect();
    packets.extend([vec![0], vec![0xff; 64], vec![0; MAX_PACKET]]);
    packets
}

#[test]
fn a_flood_of_requests_whose_answers_nobody_reads() {
    let _alone = alone();
    let packets = barrage();
    under("requests, unread", |_, connection| {
        for packet in &packets {
            if connection.try_send(packet, &[]).is_err() {
                // The queue is full: the launcher has stopped reading, as it should.
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    });
}

#[test]
fn a_flood_of_requests_with_descriptors() {
    let _alone = alone();
    let packets = barrage();
    let null = File::open("/dev/null").expect("/dev/null");
    under("requests, read", |_, connection| {
        for packet in &packets {
            let _ = connection.try_send(packet, &[null.as_fd(); 8]);
            let _ = connection.try_send(packet, &[]);
            while let Ok(Received::Packet(_)) = connection.try_recv() {}
        }
    });
}

#[test]
fn a_flood_of_connections() {
    let _alone = alone();
    let null = File::open("/dev/null").expect("/dev/null");
    under("connections", |harness, _| {
        // The thread becomes the supervisor's user once, and not for each connection.
        if harness::is_root() {
            let uid = rustix::fs::Uid::from_raw(harness::supervisor_uid());
            rustix::thread::set_thread_res_uid(uid, uid, uid).expect("becomes another user");
        }
        let path = harness.path("run/launcher.sock");
        let mut open = Vec::new();
        while open.len() < 100 {
            match Seqpacket::connect(&path) {
                Ok(connection) => {
                    let _ = connection.try_send(b"garbage", &[null.as_fd(); 8]);
                    open.push(connection);
                }
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "only the backlog holds it up: {error}");
                    std::thread::sleep(Duration::from_micros(100));
                }
            }
        }
    });
}

#[test]
fn a_flood_of_held_sockets() {
    let _alone = alone();
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    under("held sockets", |_, connection| {
        for number in 0..100 {
            // A few names that are replaced over and over, and many for which there is no room.
            let name = format!("n{}", number % 40);
            for request in [Request::HoldFd { name: name.clone() }, Request::TakeFd { name, keep: number % 3 > 0 }] {
                let hold = matches!(request, Request::HoldFd { .. });
                let packet = codec::encode_request(number, &request).expect("encodes");
                let descriptors: &[BorrowedFd<'_>] = if hold { &[listener.as_fd()] } else { &[] };
                let _ = connection.try_send(&packet, descriptors);
            }
            while let Ok(Received::Packet(_)) = connection.try_recv() {}
        }
    });
}

#[test]
fn a_flood_of_output_while_nobody_reads() {
    let _alone = alone();
    let mut harness = Harness::start_listening(As::possible()[0], Linger::Forever);
    let plugins = victims(&mut harness);
    let peace = median(&harness, &plugins);
    let plugins = victims(&mut harness);
    let writers: Vec<Plugin> = (0..3)
        .map(|_| {
            let request = harness.request(&["lines", "2000000000", "100"]);
            harness.launch(request)
        })
        .collect();
    harness.disconnect();
    judge("output", median(&harness, &plugins), peace);
    harness.connect();
    for writer in writers {
        let launch = writer.launched.launch;
        let (reattached, _, again) = harness.reattach(launch);
        assert!(reattached.stdout.bytes <= 64 << 10 && reattached.stdout.lost > 0, "{reattached:?}");
        drop(again);
        assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
        harness.exit_of(launch);
    }
}
