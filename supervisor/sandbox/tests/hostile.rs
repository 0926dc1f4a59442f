//! A hostile supervisor: every field out of policy, wrong descriptors, broken packets, floods. Each is refused with its
//! type, nothing happens, and the launcher lives on.
//! Imports, which have most to say, are in `store`.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs::File,
    io::{self, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    time::{Duration, Instant},
};

use harness::{As, Harness, Manner, patience, wait_readable};
use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    protocol::{Control, Exit, Grant, Hello, Import, Launch, Level, MAX_PACKET, RefusalCode, Reply, Request, VERSION},
    seqpacket::{MOST_DESCRIPTORS, Received},
};
use rustix::{
    net::{SendFlags, send, sockopt::set_socket_linger},
    process::Signal,
};

fn refusal(reply: Reply) -> (RefusalCode, String) {
    match reply {
        Reply::Refused(refusal) => (refusal.code, refusal.message),
        other => panic!("not refused: {other:?}"),
    }
}

/// That the launcher still launches, and that nothing of what was refused is left.
fn still_well(harness: &mut Harness) {
    assert_eq!(harness.attempt(|_| (), &["thread"]), [("thread".to_owned(), "ok".to_owned())]);
    assert!(harness.cgroups().iter().all(|path| !path.to_string_lossy().contains("walled")));
}

#[test]
fn fields_outside_of_policy() {
    type Change = (&'static str, fn(&mut Launch), RefusalCode);
    let changes: Vec<Change> = vec![
        ("name", |l| l.plugin = "../x".into(), RefusalCode::Policy),
        ("empty name", |l| l.plugin.clear(), RefusalCode::Policy),
        ("none", |l| (l.level, l.allow_degraded) = (Level::None, Control::ALL.to_vec()), RefusalCode::Policy),
        ("vm", |l| l.level = Level::Vm, RefusalCode::ControlUnavailable),
        ("no memory", |l| l.limits.memory_bytes = Some(0), RefusalCode::Policy),
        ("no cpu", |l| l.limits.cpu_percent = Some(0), RefusalCode::Policy),
        ("no pids", |l| l.limits.pids = Some(0), RefusalCode::Policy),
        ("no files", |l| l.limits.open_files = Some(0), RefusalCode::Policy),
        ("too many files", |l| l.limits.open_files = Some(u32::MAX), RefusalCode::Policy),
        ("another bundle", |l| l.bundle[0] ^= 1, RefusalCode::UnknownBundle),
        ("another plugin's bundle", |l| l.plugin = "gallery".into(), RefusalCode::Policy),
        ("a grant that its manifest does not ask for", |l| l.grants = vec![Grant::SpawnChild], RefusalCode::Policy),
    ];
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let modest = Manner { security: serde_json::json!({}), ..Manner::of(&["pause"]) };
        for (what, change, code) in &changes {
            let mut request = harness.request_in(&modest);
            harness.prepared(request.clone());
            change(&mut request);
            let refusal = harness.try_launch(request).map(drop).expect_err(what);
            assert_eq!(refusal.code, *code, "{what}: {}", refusal.message);
            assert!(refusal.message.len() > 20, "{what}: {}", refusal.message);
        }
        still_well(&mut harness);
    }
}

#[test]
fn only_files_of_an_import_carry_descriptors() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let null = File::open("/dev/null").expect("/dev/null");
        let launch = Request::Launch(Box::new(harness.request(&["pause"])));
        for request in [Request::Probe, launch, Request::Import(Import::Commit)] {
            let (reply, _) = harness.ask(&request, &[null.as_fd()]);
            assert_eq!(refusal(reply).0, RefusalCode::Policy);
        }
        still_well(&mut harness);
    }
}

#[test]
fn broken_packets() {
    let mut harness = Harness::start(As::possible()[0]);
    let raw = |harness: &Harness, bytes: &[u8]| {
        send(&harness.connection, bytes, SendFlags::NOSIGNAL).expect("send");
        let (message, _) = harness.receive(Instant::now() + patience()).expect("an answer");
        let FromLauncher::Reply { id, reply } = message else { panic!("not a reply") };
        (id, refusal(reply).0)
    };
    let good = codec::encode_request(77, &Request::Probe).expect("encodes");
    let mut version = good.clone();
    version[0] = 9;
    let mut kind = good.clone();
    kind[2] = 99;
    let mut trailing = good.clone();
    trailing.push(0);
    assert_eq!(raw(&harness, b""), (0, RefusalCode::Malformed));
    assert_eq!(raw(&harness, &good[..5]), (0, RefusalCode::Malformed));
    assert_eq!(raw(&harness, &version), (77, RefusalCode::Version));
    assert_eq!(raw(&harness, &kind), (77, RefusalCode::Malformed));
    assert_eq!(raw(&harness, &trailing), (77, RefusalCode::Malformed));
    assert_eq!(raw(&harness, &vec![0; MAX_PACKET + 1]), (0, RefusalCode::Malformed));
    let launch = codec::encode_request(78, &Request::Launch(Box::new(harness.request(&["pause"])))).expect("encodes");
    assert_eq!(raw(&harness, &launch[..launch.len() / 2]), (78, RefusalCode::Malformed));
    let hello = Request::Hello(Hello { version: VERSION + 1 });
    assert_eq!(refusal(harness.ask(&hello, &[]).0).0, RefusalCode::Version);
    let signal = Request::Signal { launch: plugvisor_sandbox::protocol::LaunchId(1), signal: 19 };
    assert_eq!(refusal(harness.ask(&signal, &[]).0).0, RefusalCode::Policy);
    still_well(&mut harness);
}

#[test]
fn more_descriptors_than_allowed_are_closed() {
    let mut harness = Harness::start(As::possible()[0]);
    still_well(&mut harness);
    let before = harness.descriptors();
    let null = File::open("/dev/null").expect("/dev/null");
    send_many(&harness, null.as_fd());
    let (message, _) = harness.receive(Instant::now() + patience()).expect("an answer");
    let FromLauncher::Reply { reply, .. } = message else { panic!("not a reply") };
    assert_eq!(refusal(reply).0, RefusalCode::Malformed);
    assert_eq!(harness.descriptors(), before);
}

/// One packet with as many descriptors as the kernel allows.
fn send_many(harness: &Harness, descriptor: BorrowedFd<'_>) {
    let many = vec![descriptor; MOST_DESCRIPTORS];
    let mut space = vec![std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&many)));
    rustix::net::sendmsg(&harness.connection, &[io::IoSlice::new(b"x")], &mut control, SendFlags::NOSIGNAL)
        .expect("send");
}

/// A TCP socket whose last close waits for as long as the listener lives: its peer never reads.
fn lingering() -> (TcpListener, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a listener");
    let mut stream = TcpStream::connect(listener.local_addr().expect("its address")).expect("connects");
    stream.set_nonblocking(true).expect("O_NONBLOCK");
    let full = loop {
        if let Err(error) = stream.write(&[0; 64 << 10]) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    // close(2) of a non-blocking socket would linger all the same, but nothing here depends on it.
    stream.set_nonblocking(false).expect("O_NONBLOCK");
    set_socket_linger(&stream, Some(Duration::from_secs(1000))).expect("SO_LINGER");
    (listener, stream)
}

#[test]
fn descriptors_that_do_not_close_hold_up_nothing() {
    for as_ in As::possible() {
        for way in ["refused", "malformed", "launch", "too many"] {
            let mut harness = Harness::start(as_);
            still_well(&mut harness);
            let before = harness.descriptors();
            let request = harness.request(&["accept"]);
            let plugin = harness.launch(request);
            let (listener, stream) = lingering();
            // Stopped, so that the packet and not this process holds the last reference.
            harness.stop();
            match way {
                "refused" => {
                    harness.send(&Request::Probe, &[stream.as_fd()]);
                }
                "malformed" => harness.connection.try_send(b"x", &[stream.as_fd()]).expect("sends"),
                "launch" => {
                    let request = Request::Launch(Box::new(harness.request(&["pause"])));
                    harness.send(&request, &[stream.as_fd(), stream.as_fd()]);
                }
                _ => send_many(&harness, stream.as_fd()),
            }
            drop(stream);
            harness.signal(Signal::CONT);
            // The stream lingers for far longer than anybody waits here: whoever waited for its close would not answer.
            let (message, _) = harness.receive(Instant::now() + patience()).expect("an answer");
            assert!(matches!(message, FromLauncher::Reply { reply: Reply::Refused(_), .. }), "{way}: {message:?}");
            // The close begins after the answer. Whatever is asked now is asked while it hangs.
            harness.await_closing();
            assert!(matches!(harness.ask(&Request::Probe, &[]).0, Reply::Probe(_)));
            let kill = Request::Kill { launch: plugin.launched.launch };
            assert_eq!(harness.ask(&kill, &[]).0, Reply::Done);
            assert_eq!(harness.exit_of(plugin.launched.launch).0, Exit::Signal(9), "{way}");
            drop(listener);
            still_well(&mut harness);
            assert_eq!(harness.descriptors(), before, "{way}");
        }
    }
}

#[test]
fn descriptors_that_never_close_end_the_connection() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let request = harness.request(&["pause"]);
        let plugin = harness.launch(request);
        let (listener, stream) = lingering();
        harness.stop();
        harness.send(&Request::Probe, &[stream.as_fd()]);
        drop(stream);
        harness.signal(Signal::CONT);
        let deadline = Instant::now() + patience();
        while harness.receive(deadline).is_some() {}
        assert!(wait_readable(plugin.pidfd.as_fd(), deadline), "the plugin ended");
        assert_eq!(harness.process.wait().expect("it ends").code(), Some(74));
        assert_eq!(harness.cgroups(), Vec::<std::path::PathBuf>::new());
        drop(listener);
    }
}

#[test]
fn a_flood_is_held_in_the_socket() {
    let mut harness = Harness::start(As::possible()[0]);
    let packet = codec::encode_request(5, &Request::Probe).expect("encodes");
    // Nothing is read meanwhile: the launcher's queue fills, then the socket, then the sender is told to wait.
    let mut sent = 0_u32;
    let full = loop {
        match harness.connection.try_send(&packet, &[]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 100_000, "the flood has no bound");
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    let mut answers = 0;
    while answers < sent {
        match harness.receive(Instant::now() + patience()).expect("the launcher lives") {
            (FromLauncher::Reply { id: 5, reply: Reply::Probe(_) }, _) => answers += 1,
            (other, _) => panic!("{other:?}"),
        }
    }
    still_well(&mut harness);
}

#[test]
fn hello_comes_first_and_plugins_are_counted() {
    let mut harness = Harness::start_with(As::possible()[0], |options| options.max_plugins = 2);
    for _ in 0..2 {
        let request = harness.request(&["pause"]);
        harness.launch(request);
    }
    let request = harness.request(&["pause"]);
    let refused = harness.try_launch(request).map(drop).expect_err("a third");
    assert_eq!(refused.code, RefusalCode::Exhausted, "{}", refused.message);

    let silent = Harness::start_silent(As::possible()[0]);
    let packet = codec::encode_request(1, &Request::Probe).expect("encodes");
    silent.connection.try_send(&packet, &[]).expect("sends");
    let (message, _) = silent.receive(Instant::now() + patience()).expect("an answer");
    let FromLauncher::Reply { reply, .. } = message else { panic!("not a reply") };
    assert_eq!(refusal(reply).0, RefusalCode::Policy);
    assert!(matches!(silent.connection.try_recv(), Err(error) if error.kind() == io::ErrorKind::WouldBlock));
    drop::<Option<Received>>(None);
}
