//! The link between a guest and its host: what honest sides carry, and what a hostile guest may say.

use std::{
    ffi::CString,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    time::Instant,
};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};

use super::{
    Poll,
    link::{self, Frame, HEAD, MOST_DATA, Target, WINDOW},
    monitor::{break_off, deaf_after},
    plan::{Access, Plan},
    relay::{Broken, Event, LINGER, MOST_INWARD, MOST_OUTWARD, Relay, Side, Socket},
};
use crate::kernel;

/// Connections to ports at once.
const PORTS: usize = 3;

fn nobody(_: Target) -> io::Result<Socket> {
    Err(io::ErrorKind::ConnectionRefused.into())
}

fn pair() -> (UnixStream, UnixStream) {
    let pair = UnixStream::pair().expect("a pair");
    for end in [&pair.0, &pair.1] {
        end.set_nonblocking(true).expect("it does not wait");
    }
    pair
}

/// One turn of one side, without waiting when there is nothing.
fn turn(relay: &mut Relay<UnixStream>, open: impl FnMut(Target) -> io::Result<Socket>) -> Result<Vec<Event>, Broken> {
    let mut polls = Vec::new();
    relay.interests(&mut polls);
    // What is always ready ends the waiting.
    let (always, _other) = pair();
    polls.push(Poll::new(&always, super::relay::OUT));
    kernel::wait(&mut polls, None).expect("polls");
    polls.pop();
    relay.turn(&polls, open)
}

/// A host's side, and the other end of its link.
fn host() -> (Relay<UnixStream>, UnixStream) {
    let (link, guest) = pair();
    (Relay::new(Side::Host, link, PORTS, break_off), guest)
}

/// What a host makes of these bytes.
fn said(bytes: &[u8]) -> Result<Vec<Event>, Broken> {
    let (mut relay, mut guest) = host();
    guest.write_all(bytes).expect("it fits");
    turn(&mut relay, nobody)
}

fn frames(all: &[Frame<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    all.iter().for_each(|frame| frame.write(&mut bytes));
    bytes
}

#[test]
fn what_is_written_is_read() {
    let data = [7; MOST_DATA];
    let all = [
        Frame::Hello { version: 1 },
        Frame::Open { stream: 3, target: Target::Egress },
        Frame::Open { stream: 4, target: Target::Port(65_280) },
        Frame::Data { stream: 3, bytes: &data },
        Frame::End { stream: 3 },
        Frame::Reset { stream: u32::MAX },
        Frame::Credit { stream: 3, bytes: WINDOW },
        Frame::Signal { number: 15 },
        Frame::OutOfMemory,
        Frame::Ended { signal: true, value: 9 },
        Frame::Ended { signal: false, value: -1 },
    ];
    let bytes = frames(&all);
    let mut at = 0;
    for frame in all {
        let (read, length) = link::read(&bytes[at..]).expect("well formed").expect("whole");
        assert_eq!(read, frame);
        // And no piece of it is one.
        for cut in [0, 1, HEAD - 1, length - 1] {
            assert_eq!(link::read(&bytes[at..at + cut]), Ok(None), "{frame:?} cut to {cut}");
        }
        at += length;
    }
    assert_eq!(at, bytes.len());
}

#[test]
fn a_plan_is_read_as_it_was_written() {
    let text = |text: &str| CString::new(text).expect("text");
    let plan = Plan {
        argv: vec![text("/plugin/bin/a"), text("")],
        envp: vec![text("A=b\nc")],
        inherits: true,
        egress: false,
        inward: 9,
        data: Some(Access::Write),
        modules: 4,
        temp: Some(64 << 20),
        memory: Some(u64::MAX),
        pids: None,
        open_files: 1024,
        file_size: Some(0),
    };
    let bytes = plan.write();
    assert_eq!(Plan::read(&bytes), Some(plan));
    assert_eq!(Plan::read(&bytes[..bytes.len() - 1]), None);
}

#[test]
fn a_guest_that_says_what_it_may_not_ends_its_machine() {
    let data = [0; MOST_DATA];
    let too_much: Vec<Frame<'_>> = (0..5).map(|_| Frame::Data { stream: 1, bytes: &data }).collect();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("another kind", vec![99, 0, 0, 0, 0, 0, 0, 0]),
        ("an unknown target", vec![2, 9, 0, 0, 1, 0, 0, 0]),
        ("too long", vec![3, 0, 0xff, 0xff, 1, 0, 0, 0]),
        ("an end with bytes", vec![4, 0, 1, 0, 1, 0, 0, 0]),
        ("the host's number", frames(&[Frame::Open { stream: 2, target: Target::Broker }])),
        ("a port of three bytes", vec![2, 6, 3, 0, 1, 0, 0, 0, 1, 2, 3]),
        ("a port without one", vec![2, 6, 0, 0, 1, 0, 0, 0]),
        ("to a port of its own", frames(&[Frame::Open { stream: 1, target: Target::Port(8080) }])),
        ("to its own socket", frames(&[Frame::Open { stream: 1, target: Target::Worker }])),
        ("a signal", frames(&[Frame::Signal { number: 9 }])),
    ];
    for (what, bytes) in cases {
        let answer = said(&bytes);
        assert!(matches!(answer, Err(Broken::Malformed(_) | Broken::Unexpected(_))), "{what}: {answer:?}");
    }

    // With a connection that is there.
    let (mut relay, mut guest) = host();
    let (plugin, _broker) = pair();
    let mut opened = Some(plugin);
    let mut open = |_: Target| opened.take().map(Socket::Unix).ok_or_else(|| io::ErrorKind::NotFound.into());
    guest.write_all(&frames(&[Frame::Open { stream: 1, target: Target::Broker }])).expect("it fits");
    turn(&mut relay, &mut open).expect("it may");
    for (what, bytes) in [
        ("the same number", frames(&[Frame::Open { stream: 1, target: Target::Broker }])),
        ("more credit than a window", frames(&[Frame::Credit { stream: 1, bytes: 1 }])),
    ] {
        let (link, mut guest) = pair();
        let (plugin, _broker) = pair();
        let mut relay = Relay::new(Side::Host, link, PORTS, break_off);
        let mut opened = Some(plugin);
        let mut open = |_: Target| opened.take().map(Socket::Unix).ok_or_else(|| io::ErrorKind::NotFound.into());
        let mut all = frames(&[Frame::Open { stream: 1, target: Target::Broker }]);
        all.extend(bytes);
        guest.write_all(&all).expect("it fits");
        assert!(matches!(turn(&mut relay, &mut open), Err(Broken::Unexpected(_))), "{what}");
    }
    // Nobody reads at the other end of the connection, which takes some of it by itself.
    let mut broke = false;
    for _ in 0..64 {
        let bytes = frames(&too_much);
        let mut at = 0;
        while at < bytes.len() && !broke {
            match guest.write(&bytes[at..]) {
                Ok(count) => at += count,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            broke = matches!(turn(&mut relay, nobody), Err(Broken::Unexpected(_)));
        }
    }
    assert!(broke, "more than a window was taken");
}

/// As many connections as a guest likes: those to the plugin, over which its health is asked, have room of their own.
#[test]
fn a_guest_that_opens_all_that_it_can_keeps_nobody_out() {
    let (link, mut guest) = pair();
    let mut relay = Relay::new(Side::Host, link, PORTS, break_off);
    let mut others = Vec::new();
    let mut open = |_: Target| {
        let (near, far) = pair();
        others.push(far);
        Ok(Socket::Unix(near))
    };
    let asked = u32::try_from(2 * MOST_OUTWARD).expect("few");
    for stream in (1..).step_by(2).take(2 * MOST_OUTWARD) {
        guest.write_all(&frames(&[Frame::Open { stream, target: Target::Broker }])).expect("it fits");
        turn(&mut relay, &mut open).expect("it may");
    }
    assert_eq!(others.len(), MOST_OUTWARD);
    assert!(!relay.has_room(Target::Broker) && relay.has_room(Target::Worker));
    let inward: Vec<_> = (0..MOST_INWARD)
        .map(|_| {
            assert!(relay.has_room(Target::Worker));
            let (near, far) = pair();
            relay.begin(Target::Worker, Socket::Unix(near)).expect("begins");
            far
        })
        .collect();
    assert!(!relay.has_room(Target::Worker));
    turn(&mut relay, nobody).expect("it goes on");
    let mut said = vec![0; 64 << 10];
    let length = guest.read(&mut said).expect("what was said");
    let (mut at, mut reset, mut opened) = (0, 0, 0);
    while let Ok(Some((frame, length))) = link::read(&said[at..length]) {
        at += length;
        match frame {
            Frame::Reset { .. } => reset += 1,
            Frame::Open { target: Target::Worker, .. } => opened += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((reset, opened), (asked - u32::try_from(MOST_OUTWARD).expect("few"), inward.len()));
}

/// Strangers may come in any number: those to its ports have room of their own, too.
#[test]
fn connections_to_ports_keep_nobody_else_out() {
    let (mut relay, mut guest) = host();
    let mut far = Vec::new();
    let mut open = |target| {
        let (near, other) = pair();
        relay.begin(target, Socket::Unix(near)).expect("begins");
        far.push(other);
    };
    (0..PORTS).for_each(|_| open(Target::Port(8080)));
    open(Target::Worker);
    assert!(!relay.has_room(Target::Port(8443)) && relay.has_room(Target::Worker) && relay.has_room(Target::Broker));
    // One that is over makes room, however much the others say.
    guest.write_all(&frames(&[Frame::Reset { stream: 2 }])).expect("it fits");
    far.iter_mut().for_each(|far| far.write_all(&[1; 4096]).expect("it fits"));
    turn(&mut relay, nobody).expect("it goes on");
    assert!(relay.has_room(Target::Port(8443)));
}

/// Who connects and breaks off, again and again, has a few bytes said of each: with a guest that does not read they would
/// be ever more.
#[test]
fn nobody_is_let_in_while_much_is_on_its_way() {
    let (mut relay, mut guest) = host();
    let broken_off = |relay: &mut Relay<UnixStream>| {
        let (client, inside) = tcp();
        let began = relay.has_room(Target::Port(1));
        if began {
            relay.begin(Target::Port(1), Socket::Tcp(inside)).expect("begins");
        }
        break_off(&client);
        began
    };
    for _ in 0..3 {
        assert!(broken_off(&mut relay));
        turn(&mut relay, nobody).expect("turns");
    }
    while relay.has_room(Target::Worker) {
        relay.tell(Frame::Signal { number: 15 });
    }
    assert!(!broken_off(&mut relay));
    // What the guest begins has its places: the plugin's calls are not refused for it.
    guest.write_all(&frames(&[Frame::Open { stream: 1, target: Target::Broker }])).expect("it fits");
    let (socket, _broker) = pair();
    let mut opened = Some(Socket::Unix(socket));
    turn(&mut relay, |_| opened.take().ok_or_else(|| io::ErrorKind::ConnectionRefused.into())).expect("turns");
    assert!(opened.is_none());
    let mut buffer = vec![0; 1 << 20];
    while !relay.has_room(Target::Port(1)) {
        let read = guest.read(&mut buffer).expect("there is something");
        assert!(read > 0);
        turn(&mut relay, nobody).expect("turns");
    }
}

#[test]
fn what_a_plugin_does_not_read_keeps_no_place_for_ever() {
    let (mut relay, mut guest) = host();
    let (mut client, inside) = tcp();
    let stream = relay.begin(Target::Port(1), Socket::Tcp(inside)).expect("begins");
    let now = Instant::now();
    turn(&mut relay, nobody).expect("turns");
    assert_eq!(relay.patience(now), None);
    // The plugin has said all, and reads nothing of what comes: a window of it is under way, and more waits.
    guest.write_all(&frames(&[Frame::End { stream }])).expect("it fits");
    client.write_all(&vec![1; usize::try_from(WINDOW).expect("a size") + 1]).expect("it fits");
    drop(client);
    let mut buffer = vec![0; 1 << 20];
    while relay.patience(Instant::now()).is_none() {
        turn(&mut relay, nobody).expect("turns");
        let _ = guest.read(&mut buffer);
    }
    assert!(!frames_have(&mut relay, &mut guest, stream));
    relay.end_lingering(Instant::now() + LINGER);
    assert!(frames_have(&mut relay, &mut guest, stream));
    assert_eq!(relay.patience(now), None);
}

/// Whether the guest is told that this connection was broken off.
fn frames_have(relay: &mut Relay<UnixStream>, guest: &mut UnixStream, stream: u32) -> bool {
    turn(relay, nobody).expect("turns");
    let mut buffer = vec![0; 1 << 20];
    let read = guest.read(&mut buffer).unwrap_or(0);
    let reset = frames(&[Frame::Reset { stream }]);
    buffer[..read].ends_with(&reset)
}

/// A TCP connection whose other end is in this process.
fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let near = TcpStream::connect(listener.local_addr().expect("its address")).expect("connects");
    (near, listener.accept().expect("accepts").0)
}

/// Of a connection that one side has ended and the other has not, nothing is wanted; that it was broken off is seen and told,
/// so that it keeps no place.
#[test]
fn a_reset_is_passed_on_though_nothing_is_wanted() {
    let (mut relay, mut guest) = host();
    let (client, near) = tcp();
    relay.begin(Target::Port(8080), Socket::Tcp(near)).expect("begins");
    client.shutdown(std::net::Shutdown::Write).expect("it goes on hearing");
    let mut said = Vec::new();
    let mut until = |relay: &mut Relay<UnixStream>, wanted: Frame<'_>| {
        let wanted = frames(&[wanted]);
        for _ in 0..10_000 {
            turn(relay, nobody).expect("it goes on");
            let mut buffer = [0; 4096];
            if let Ok(count) = guest.read(&mut buffer) {
                said.extend_from_slice(&buffer[..count]);
            }
            if said.ends_with(&wanted) {
                return;
            }
            std::thread::yield_now();
        }
        panic!("{wanted:?} was not said: {said:?}");
    };
    until(&mut relay, Frame::End { stream: 2 });
    assert!(relay.has_heard_all());
    rustix::net::connect_unspec(&client).expect("it is disconnected");
    until(&mut relay, Frame::Reset { stream: 2 });

    // And what a guest breaks off, or a machine's end, is a reset outside.
    let (mut client, near) = tcp();
    relay.begin(Target::Port(8080), Socket::Tcp(near)).expect("begins");
    guest.write_all(&frames(&[Frame::Reset { stream: 4 }])).expect("it fits");
    turn(&mut relay, nobody).expect("it goes on");
    assert_eq!(client.read(&mut [0]).expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    let (mut client, near) = tcp();
    relay.begin(Target::Port(8080), Socket::Tcp(near)).expect("begins");
    drop(relay);
    assert_eq!(client.read(&mut [0]).expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
}

/// Nobody accepts while a supervisor is away, and the monitor has others to carry.
#[test]
fn a_connection_that_nobody_takes_is_refused_and_not_waited_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("broker.sock");
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("a path")).expect("binds");
    rustix::net::listen(&listener, 1).expect("listens");
    let mut waiting = Vec::new();
    let full = loop {
        match super::monitor::reach(&path) {
            Ok(socket) if waiting.len() < 8 => waiting.push(socket),
            other => break other,
        }
    };
    assert!(matches!(&full, Err(error) if error.kind() == io::ErrorKind::WouldBlock), "{full:?}");
    assert!(!waiting.is_empty());
}

#[test]
fn what_comes_of_a_connection_that_is_over_is_passed_over() {
    let bytes = frames(&[
        Frame::Data { stream: 5, bytes: b"late" },
        Frame::Credit { stream: 5, bytes: 1 },
        Frame::End { stream: 5 },
        Frame::Reset { stream: 5 },
        Frame::Hello { version: 1 },
    ]);
    assert_eq!(said(&bytes).expect("well formed"), [Event::Hello { version: 1 }]);
}

/// Bytes in both directions, more than any window, with both ends closed at the end.
#[test]
fn connections_are_carried_whole() {
    let (link, other) = pair();
    let (mut host, mut guest) =
        (Relay::new(Side::Host, link, PORTS, break_off), Relay::new(Side::Guest, other, PORTS, break_off));
    let ((near, inner), (far, outer)) = (pair(), pair());
    host.begin(Target::Worker, Socket::Unix(inner)).expect("begins");
    let mut outer = Some(outer);
    let text: Vec<u8> = (0..500_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    let (mut sent, mut got, mut back, mut answered) = (0, Vec::new(), 0, Vec::new());
    let (mut near_ended, mut far_ended) = (false, false);
    let mut buffer = vec![0; 64 << 10];
    let write = |to: &UnixStream, at: &mut usize| {
        if let Ok(count) = (&*to).write(&text[*at..]) {
            *at += count;
            if *at == text.len() {
                to.shutdown(std::net::Shutdown::Write).expect("it ends");
            }
        }
    };
    let mut read = |from: &UnixStream, to: &mut Vec<u8>, ended: &mut bool| match (&*from).read(&mut buffer) {
        Ok(0) => *ended = true,
        Ok(count) => to.extend_from_slice(&buffer[..count]),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
    };
    for _ in 0..100_000 {
        if near_ended && far_ended {
            break;
        }
        if sent < text.len() {
            write(&near, &mut sent);
        }
        if back < text.len() {
            write(&far, &mut back);
        }
        turn(&mut host, nobody).expect("it goes on");
        let open = |_: Target| outer.take().map(Socket::Unix).ok_or_else(|| io::ErrorKind::NotFound.into());
        turn(&mut guest, open).expect("it goes on");
        read(&far, &mut got, &mut far_ended);
        read(&near, &mut answered, &mut near_ended);
    }
    assert!(near_ended && far_ended, "{} and {} bytes", got.len(), answered.len());
    assert!(got == text && answered == text);
}

proptest! {
    /// Whatever comes, and however it is cut, is read without a panic, and what is read is whole.
    #[test]
    fn any_bytes_are_frames_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(Some((_, length))) = link::read(&bytes) {
            prop_assert!(length <= bytes.len());
        }
        drop(said(&bytes));
        drop(Plan::read(&bytes));
    }
}

/// A listener from which nobody can be taken stays readable: the monitor would ask without end.
#[test]
fn nobody_is_let_in_for_a_while_when_nothing_is_left_to_let_them_in_with() {
    for nothing_left in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::ENOBUFS] {
        let until = deaf_after(&io::Error::from_raw_os_error(nothing_left)).expect("it rests");
        assert!(until > Instant::now());
    }
    for gave_up in [libc::EAGAIN, libc::EINTR, libc::ECONNABORTED] {
        assert!(deaf_after(&io::Error::from_raw_os_error(gave_up)).is_none());
    }
}
