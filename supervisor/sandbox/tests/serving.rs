//! TCP served by a plugin (`network:tcp-server`): it listens in its own network namespace, at the ports of its manifest, and is
//! connected to by sockets that were made there. As root and as an ordinary user, by children made ahead and not; and in a
//! machine, through its monitor.
#![allow(missing_docs, reason = "tests")]

#[path = "harness/guest.rs"]
mod guest;
mod harness;

use std::{
    fs::{self, File},
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    thread,
    time::Instant,
};

use harness::{As, Harness, PORTS, patience, wait_readable};
use plugvisor_sandbox::{
    options::Linger,
    protocol::{Exit, Grant, Launch, LaunchId, Level, MAX_DESCRIPTORS, MAX_INWARD, RefusalCode, Reply, Request},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{connect, connect_unspec, sockopt},
    thread::{ThreadNameSpaceType, move_into_thread_name_spaces},
};

const EPERM: &str = "1";
const EACCES: &str = "13";
const ENETUNREACH: &str = "101";
const ECONNREFUSED: &str = "111";
const ECONNRESET: &str = "104";

const WALLED: [Level; 3] = [Level::Process, Level::Container, Level::Sandbox];

fn serving(mut launch: Launch, inward: u16) -> Launch {
    launch.grants = vec![Grant::TcpServer];
    launch.inward = inward;
    launch
}

/// With the grant it listens at its ports alone and connects to nobody; without it there is no TCP at all, and with the one for
/// the proxy nobody may bind.
#[test]
fn it_listens_at_its_own_ports_and_nowhere_else() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        // The control: something listens on the host's loopback, and others reach it.
        let host = TcpListener::bind("127.0.0.1:0").expect("the host's port");
        let host = host.local_addr().expect("its address").to_string();
        // Landlock has rules for TCP from its version 4 on. Before it the namespace alone holds.
        let rules = harness.landlock_version() >= 4;
        let or = |with, without| if rules { with } else { without };
        let [port, other] = PORTS.map(|port| format!("0.0.0.0:{port}"));
        let serves: Vec<(Vec<&str>, &str)> = vec![
            (vec!["inet-descriptors"], "0"),
            (vec!["tcp-bind", &port], "ok"),
            (vec!["tcp-bind", &other], "ok"),
            (vec!["tcp-bind", "127.0.0.1:8081"], or(EACCES, "ok")),
            (vec!["tcp-bind", "127.0.0.1:3128"], or(EACCES, "ok")),
            (vec!["tcp-bind", "127.0.0.1:0"], or(EACCES, "ok")),
            (vec!["listen-unbound"], or("ok then 13", "ok then ok")),
            (vec!["tcp", "127.0.0.1:8080"], or(EACCES, ECONNREFUSED)),
            (vec!["tcp", &host], or(EACCES, ECONNREFUSED)),
            (vec!["tcp", "192.0.2.1:443"], or(EACCES, ENETUNREACH)),
            (vec!["fastopen", "8080"], EPERM),
            (vec!["socket", "2", "2"], EPERM),
            (vec!["socket", "16", "3"], EPERM),
        ];
        let dials = vec![(vec!["tcp-bind", port.as_str()], or(EACCES, "ok")), (vec!["tcp", "127.0.0.1:3128"], "ok")];
        let both = vec![(vec!["tcp-bind", port.as_str()], "ok"), (vec!["tcp", "127.0.0.1:3128"], "ok")];
        let none = vec![(vec!["tcp-bind", port.as_str()], EPERM), (vec!["tcp", "127.0.0.1:8080"], EPERM)];
        let cases = [
            (&[Grant::TcpServer][..], serves),
            (&[Grant::Egress], dials),
            (&[Grant::Egress, Grant::TcpServer], both),
            (&[], none),
        ];
        for level in WALLED {
            for (grants, attempts) in &cases {
                let args: Vec<&str> = attempts.iter().flat_map(|(args, _)| args.iter().copied()).collect();
                let allowed = harness.request_at(level, &args).allow_degraded;
                let got = harness.attempt(
                    |launch| {
                        launch.level = level;
                        launch.grants = grants.to_vec();
                        launch.inward = if grants.contains(&Grant::TcpServer) { 3 } else { 0 };
                        launch.allow_degraded = allowed;
                    },
                    &args,
                );
                let got: Vec<&str> = got.iter().map(|(_, result)| result.as_str()).collect();
                let expected: Vec<&str> = attempts.iter().map(|(_, expected)| *expected).collect();
                assert_eq!(got, expected, "{as_:?} {level:?} {grants:?}: {attempts:?}");
            }
        }
    }
}

/// All sockets into a launch, page by page.
fn inward(harness: &mut Harness, launch: LaunchId) -> Vec<TcpStream> {
    let mut sockets = Vec::new();
    loop {
        let from = u16::try_from(sockets.len()).expect("few");
        match harness.ask(&Request::Inward { launch, from }, &[]) {
            (Reply::Inward { all }, some) => {
                assert!(some.len() <= MAX_DESCRIPTORS);
                sockets.extend(some.into_iter().map(TcpStream::from));
                assert!(!sockets.is_empty() || all == 0);
                if sockets.len() == usize::from(all) {
                    return sockets;
                }
            }
            (other, _) => panic!("{other:?}"),
        }
    }
}

/// Reads one line, byte by byte: what follows is left in the pipe.
fn line(pipe: &mut File) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        assert!(wait_readable(pipe.as_fd(), Instant::now() + patience()), "no line: {line:?}");
        let mut byte = [0];
        assert_eq!(pipe.read(&mut byte).expect("the pipe"), 1, "it ended: {line:?}");
        line.push(byte[0]);
    }
    String::from_utf8_lossy(&line).trim_end().to_owned()
}

fn connected(socket: &TcpStream) {
    connecting(socket, PORTS[0]);
    assert!(socket.take_error().expect("its error").is_none() && socket.peer_addr().is_ok());
}

/// Connects, and waits for what comes of it.
fn connecting(socket: &TcpStream, port: u16) {
    let result = connect(socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port));
    assert!(matches!(result, Ok(()) | Err(rustix::io::Errno::INPROGRESS)), "{result:?}");
    let mut fds = [PollFd::new(socket, PollFlags::OUT)];
    let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
    assert_eq!(poll(&mut fds, Some(&limit)), Ok(1), "it is not taken");
}

/// One connection, both sides of which end in order; the client says first that it has said everything.
fn talk(mut socket: &TcpStream, stdout: &mut File) {
    connected(socket);
    assert_eq!(line(stdout), "accepted");
    socket.write_all(b"hello").expect("room");
    socket.shutdown(Shutdown::Write).expect("it goes on hearing");
    assert_eq!(line(stdout), "served hello");
    socket.set_nonblocking(false).expect("waits");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    assert_eq!(answer, "heard hello");
    connect_unspec(socket).expect("it is disconnected");
    assert_eq!(socket.peer_addr().expect_err("nobody").kind(), ErrorKind::NotConnected);
}

/// By sockets that were made inside and are used again. The next supervisor gets the same ones, and ends what the last one
/// left under way.
#[test]
fn it_is_connected_to_by_sockets_made_inside() {
    for as_ in As::possible() {
        for spared in [true, false] {
            let mut harness = Harness::start_listening(as_, Linger::Forever);
            if spared {
                harness.await_spares();
            }
            let address = format!("0.0.0.0:{}", PORTS[0]);
            let request = serving(harness.request(&["tcp-serve", &address, "5"]), 9);
            let plugin = harness.launch(request);
            let launch = plugin.launched.launch;
            let mut stdout = plugin.stdout;
            assert_eq!(line(&mut stdout), "listening");
            let sockets = inward(&mut harness, launch);
            assert_eq!(sockets.len(), 9, "{as_:?}");
            talk(&sockets[0], &mut stdout);
            talk(&sockets[0], &mut stdout);
            talk(&sockets[8], &mut stdout);
            // Outside there is nothing at this port, and inside nothing at another one.
            assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, PORTS[0])).is_err(), "it is the namespace's");

            connected(&sockets[3]);
            assert_eq!(line(&mut stdout), "accepted");
            drop((plugin.pidfd, plugin.broker, plugin.worker, plugin.stderr, sockets, stdout));
            harness.disconnect();
            harness.connect();
            let (_, _, again) = harness.reattach(launch);
            let mut stdout = again.expect("it is up").stdout;
            let known = harness.list().launches;
            assert_eq!(known.iter().find(|known| known.launch == launch).map(|known| known.inward), Some(9));
            let sockets = inward(&mut harness, launch);
            assert_eq!(sockets.len(), 9);
            let connected: Vec<bool> = sockets.iter().map(|socket| socket.peer_addr().is_ok()).collect();
            assert_eq!(connected, [false, false, false, true, false, false, false, false, false], "{as_:?}");
            connect_unspec(&sockets[3]).expect("it is disconnected");
            assert_eq!(line(&mut stdout), format!("served {ECONNRESET}"), "{as_:?}: who spoke to it is gone");
            talk(&sockets[3], &mut stdout);
            assert_eq!(harness.exit_of(launch), (Exit::Code(0), false));
            match harness.ask(&Request::Inward { launch, from: 0 }, &[]) {
                (Reply::Refused(refusal), _) => assert_eq!(refusal.code, RefusalCode::UnknownLaunch),
                (other, _) => panic!("{other:?}"),
            }
        }
    }
}

/// What lies in the buffers of its connections counts for its memory on cgroup v2, at both ends, and is for who connects to say.
#[test]
fn what_lies_in_a_connection_that_nobody_reads_is_bounded() {
    const MOST: usize = 512 << 10;
    for as_ in As::possible() {
        for spared in [true, false] {
            let mut harness = Harness::start_listening(as_, Linger::Forever);
            if spared {
                harness.await_spares();
            }
            let address = format!("0.0.0.0:{}", PORTS[0]);
            let request = serving(harness.request(&["tcp-serve", &address, "2"]), 2);
            let plugin = harness.launch(request);
            let mut stdout = plugin.stdout;
            assert_eq!(line(&mut stdout), "listening");
            let sockets = inward(&mut harness, plugin.launched.launch);
            // One that it hears, so that nobody hears the other.
            connected(&sockets[0]);
            assert_eq!(line(&mut stdout), "accepted");
            connected(&sockets[1]);
            let mut sent = 0;
            let limit = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
            while poll(&mut [PollFd::new(&sockets[1], PollFlags::OUT)], Some(&limit)) == Ok(1) {
                sent += (&sockets[1]).write(&[b'x'; 16 << 10]).expect("room");
            }
            assert!(sent > 0 && sent < MOST, "{as_:?}: {sent}");
            for socket in &sockets {
                let room = sockopt::socket_recv_buffer_size(socket)
                    .and_then(|receives| sockopt::socket_send_buffer_size(socket).map(|sends| receives + sends));
                assert!(room.is_ok_and(|room| room <= MOST / 2), "{as_:?}: {room:?}");
            }
            if let Some(most) = buffers_of(&plugin.pidfd) {
                assert!(most.iter().all(|most| *most <= MOST / 4), "{as_:?}: {most:?}");
            }
        }
    }
}

/// How far the kernel lets buffers grow in the network namespace of a process; `None` where that is not to be seen or set.
fn buffers_of(pidfd: &OwnedFd) -> Option<[usize; 2]> {
    const FILES: [&str; 2] = ["/proc/sys/net/ipv4/tcp_rmem", "/proc/sys/net/ipv4/tcp_wmem"];
    File::options().write(true).open(FILES[0]).ok()?;
    let network = ThreadNameSpaceType::NETWORK;
    // A thread of its own, which nothing else runs on afterwards.
    let looked = thread::scope(|scope| {
        let look = || {
            move_into_thread_name_spaces(pidfd.as_fd(), network).expect("its network");
            FILES.map(|file| fs::read_to_string(file).expect("a range"))
        };
        scope.spawn(look).join()
    });
    let most = |text: String| text.split_whitespace().last().and_then(|most| most.parse().ok()).expect("three numbers");
    Some(looked.expect("it looks").map(most))
}

/// In its guest it is reached at its ports as at other levels: both ends of a connection are passed on, and so is a reset, both
/// ways; and what it said last before its end arrives.
#[test]
fn in_a_machine_it_is_reached_too() {
    for as_ in As::possible() {
        let Some(guest) = guest::find() else { return };
        let mut harness = Harness::start_trusting_with_machines(as_, |place| guest.settings(place));
        let address = format!("0.0.0.0:{}", PORTS[0]);
        let request = serving(harness.request_at(Level::Vm, &["tcp-serve", &address, "4"]), 3);
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        let mut stdout = plugin.stdout;
        assert_eq!(line(&mut stdout), "listening", "{as_:?}");
        let sockets = inward(&mut harness, launch);
        assert_eq!(sockets.len(), 3, "{as_:?}");
        talk(&sockets[0], &mut stdout);
        talk(&sockets[0], &mut stdout);
        assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, PORTS[0])).is_err(), "it is the namespace's");

        // Nobody listens there in the guest.
        connecting(&sockets[1], PORTS[1]);
        sockets[1].set_nonblocking(false).expect("waits");
        // It may be over by now, which is told once.
        let over = sockets[1].take_error().expect("its error");
        let error = over.or_else(|| (&sockets[1]).read(&mut [0]).err()).expect("a reset, and not the end of an answer");
        assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{as_:?}");
        // And what its manifest does not name is nobody's, though its guest may bind it.
        let refused = match connect(&sockets[2], &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8081)) {
            Err(rustix::io::Errno::INPROGRESS) => {
                poll(&mut [PollFd::new(&sockets[2], PollFlags::OUT)], None).expect("it is told");
                sockets[2].take_error().expect("its error").and_then(|error| error.raw_os_error())
            }
            other => other.err().map(rustix::io::Errno::raw_os_error),
        };
        assert_eq!(refused.map(|errno| errno.to_string()).as_deref(), Some(ECONNREFUSED), "{as_:?}");
        connect_unspec(&sockets[2]).expect("it is disconnected");

        connected(&sockets[2]);
        assert_eq!(line(&mut stdout), "accepted");
        connect_unspec(&sockets[2]).expect("it is disconnected");
        assert_eq!(line(&mut stdout), format!("served {ECONNRESET}"), "{as_:?}: who spoke to it is gone");

        // More than it has windows, which it answers before it ends; and so arrives.
        let mut socket = &sockets[2];
        connected(socket);
        assert_eq!(line(&mut stdout), "accepted");
        socket.set_nonblocking(false).expect("waits");
        let text = "x".repeat(300_000);
        socket.write_all(text.as_bytes()).expect("it takes all");
        socket.shutdown(Shutdown::Write).expect("it goes on hearing");
        let mut answer = String::new();
        socket.read_to_string(&mut answer).expect("an answer");
        assert_eq!(answer.len(), "heard ".len() + text.len(), "{as_:?}");
        assert_eq!(line(&mut stdout).len(), "served ".len() + text.len());
        assert_eq!(harness.exit_of(launch), (Exit::Code(0), false), "{as_:?}");
    }
}

/// The most that may be asked for are made, and let go of with the launch.
#[test]
fn the_most_sockets_are_made_and_let_go_of() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        // Whatever the launcher opens once is open by then.
        let request = harness.request(&["exit", "0"]);
        let first = harness.launch(request).launched.launch;
        harness.exit_of(first);
        let before = harness.descriptors();
        let request = serving(harness.request(&["pause"]), MAX_INWARD);
        let plugin = harness.launch(request);
        let sockets = inward(&mut harness, plugin.launched.launch);
        assert_eq!(sockets.len(), usize::from(MAX_INWARD), "{as_:?}");
        let sockets: Vec<OwnedFd> = sockets.into_iter().map(OwnedFd::from).collect();
        drop(sockets);
        assert_eq!(harness.ask(&Request::Kill { launch: plugin.launched.launch }, &[]).0, Reply::Done);
        harness.exit_of(plugin.launched.launch);
        assert_eq!(harness.descriptors(), before, "{as_:?}");
    }
}

/// What does not fit is refused, and says what to do.
#[test]
fn what_nothing_holds_is_refused() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let plain = harness.request(&["pause"]);
        let none = harness.request_at(Level::None, &["pause"]);
        let cases = [
            (serving(none, 1), "host's network"),
            (Launch { inward: 1, ..plain.clone() }, "network:tcp-server"),
            (serving(plain.clone(), MAX_INWARD + 1), "too many"),
        ];
        for (launch, word) in cases {
            let refusal = harness.try_launch(launch).err().expect("it is refused");
            assert!(refusal.code == RefusalCode::Policy && refusal.message.contains(word), "{as_:?}: {refusal:?}");
        }
        // Without any, it serves nobody and lives.
        let request = serving(plain, 0);
        let plugin = harness.launch(request);
        assert_eq!(inward(&mut harness, plugin.launched.launch).len(), 0);
    }
}
