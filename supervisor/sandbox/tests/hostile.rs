//! A hostile supervisor: every field out of policy, wrong descriptors, broken packets, floods. Each is refused with its
//! type, nothing happens, and the launcher lives on. And hostile files: entries that change while they are read.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    net::{TcpListener, TcpStream},
    os::fd::{AsFd, BorrowedFd},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use harness::{As, Harness, PATIENCE, read_all, wait_readable};
use plugvisor_sandbox::{
    codec::{self, FromLauncher},
    protocol::{Exit, Hello, Launch, Level, MAX_PACKET, RefusalCode, Reply, Request},
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
        ("none", |l| l.level = Level::None, RefusalCode::LevelUnsupported),
        ("container", |l| l.level = Level::Container, RefusalCode::LevelUnsupported),
        ("sandbox", |l| l.level = Level::Sandbox, RefusalCode::LevelUnsupported),
        ("vm", |l| l.level = Level::Vm, RefusalCode::LevelUnsupported),
        ("absolute entry", |l| l.entry = "/bin/sh".into(), RefusalCode::Policy),
        ("climbing entry", |l| l.entry = "bin/../../x".into(), RefusalCode::Policy),
        ("no entry", |l| l.entry.clear(), RefusalCode::Policy),
        ("NUL in the entry", |l| l.entry = "bin/a\0b".into(), RefusalCode::Policy),
        ("NUL in an argument", |l| l.args.push("a\0b".into()), RefusalCode::Policy),
        ("many arguments", |l| l.args = vec![String::new(); 257], RefusalCode::Policy),
        ("LD_PRELOAD", |l| l.env.push(("LD_PRELOAD".into(), "x".into())), RefusalCode::Policy),
        ("PLUGVISOR_BROKER", |l| l.env.push(("PLUGVISOR_BROKER".into(), "x".into())), RefusalCode::Policy),
        ("LISTEN_FDS", |l| l.env.push(("LISTEN_FDS".into(), "x".into())), RefusalCode::Policy),
        ("a variable with =", |l| l.env.push(("A=B".into(), "x".into())), RefusalCode::Policy),
        ("a variable without name", |l| l.env.push((String::new(), "x".into())), RefusalCode::Policy),
        ("NUL in a variable", |l| l.env.push(("A".into(), "\0".into())), RefusalCode::Policy),
        ("many variables", |l| l.env = vec![("A".into(), String::new()); 257], RefusalCode::Policy),
        ("no memory", |l| l.limits.memory_bytes = Some(0), RefusalCode::Policy),
        ("no cpu", |l| l.limits.cpu_percent = Some(0), RefusalCode::Policy),
        ("no pids", |l| l.limits.pids = Some(0), RefusalCode::Policy),
        ("no files", |l| l.limits.open_files = Some(0), RefusalCode::Policy),
        ("too many files", |l| l.limits.open_files = Some(u32::MAX), RefusalCode::Policy),
        ("digest", |l| l.entry_sha256[0] ^= 1, RefusalCode::DigestMismatch),
    ];
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        for (what, change, code) in &changes {
            let mut request = harness.request(&["pause"]);
            change(&mut request);
            let refusal = harness.try_launch(request).map(drop).expect_err(what);
            assert_eq!(refusal.code, *code, "{what}: {}", refusal.message);
            assert!(refusal.message.len() > 20, "{what}: {}", refusal.message);
        }
        still_well(&mut harness);
    }
}

#[test]
fn wrong_descriptors() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let request = harness.request(&["pause"]);
        let entry = File::open(harness.path("bundles/walled/bin/walled")).expect("the entry");
        let bundle = File::open(harness.path("bundles/walled")).expect("the bundle");
        let outside = File::open("/usr").expect("/usr");
        let above = File::open(harness.path("bundles").parent().expect("a parent")).expect("above");
        let null = File::open("/dev/null").expect("/dev/null");
        let (pipe, _write) = rustix::pipe::pipe().expect("a pipe");
        let empty = tempfile::tempfile().expect("a file");
        let write_only =
            File::options().write(true).create(true).truncate(true).open(harness.path("w")).expect("a file");
        let sparse = tempfile::tempfile().expect("a file");
        sparse.set_len(1 << 40).expect("sparse");
        let cases: Vec<(&str, Vec<BorrowedFd<'_>>, RefusalCode)> = vec![
            ("none", vec![], RefusalCode::Policy),
            ("one", vec![entry.as_fd()], RefusalCode::Policy),
            ("three", vec![entry.as_fd(), bundle.as_fd(), null.as_fd()], RefusalCode::Policy),
            ("bundle elsewhere", vec![entry.as_fd(), outside.as_fd()], RefusalCode::Policy),
            ("bundle above the root", vec![entry.as_fd(), above.as_fd()], RefusalCode::Policy),
            ("bundle is a device", vec![entry.as_fd(), null.as_fd()], RefusalCode::Policy),
            ("bundle is a file", vec![entry.as_fd(), entry.as_fd()], RefusalCode::Kernel),
            ("entry is a device", vec![null.as_fd(), bundle.as_fd()], RefusalCode::Entry),
            ("entry is a pipe", vec![pipe.as_fd(), bundle.as_fd()], RefusalCode::Entry),
            ("entry is a directory", vec![bundle.as_fd(), bundle.as_fd()], RefusalCode::Entry),
            ("entry is empty", vec![empty.as_fd(), bundle.as_fd()], RefusalCode::Entry),
            ("entry cannot be read", vec![write_only.as_fd(), bundle.as_fd()], RefusalCode::Entry),
            ("entry is huge", vec![sparse.as_fd(), bundle.as_fd()], RefusalCode::Entry),
        ];
        for (what, descriptors, code) in cases {
            let mut request = request.clone();
            if what.starts_with("entry") {
                // Bytes that were sealed for an earlier launch are not read again; these never were.
                request.entry_sha256 = [7; 32];
            }
            let (reply, _) = harness.ask(&Request::Launch(Box::new(request)), &descriptors);
            let (got, message) = refusal(reply);
            assert_eq!(got, code, "{what}: {message}");
        }
        let (reply, _) = harness.ask(&Request::Probe, &[null.as_fd()]);
        assert_eq!(refusal(reply).0, RefusalCode::Policy);
        still_well(&mut harness);
    }
}

#[test]
fn broken_packets() {
    let mut harness = Harness::start(As::possible()[0]);
    let raw = |harness: &Harness, bytes: &[u8]| {
        send(&harness.connection, bytes, SendFlags::NOSIGNAL).expect("send");
        let (message, _) = harness.receive(Instant::now() + PATIENCE).expect("an answer");
        let FromLauncher::Reply { id, reply } = message else { panic!("not a reply") };
        (id, refusal(reply).0)
    };
    let good = codec::encode_request(77, &Request::Probe).expect("encodes");
    let mut version = good.clone();
    version[0] = 9;
    let mut kind = good.clone();
    kind[2] = 3;
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
    let hello = Request::Hello(Hello { version: 2 });
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
    let (message, _) = harness.receive(Instant::now() + PATIENCE).expect("an answer");
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
            harness.signal(Signal::STOP);
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
            let deadline = Instant::now() + Duration::from_secs(1);
            let (message, _) = harness.receive(deadline).expect("an answer");
            assert!(matches!(message, FromLauncher::Reply { reply: Reply::Refused(_), .. }), "{way}: {message:?}");
            // The close begins after the answer. Whatever is asked now is asked while it hangs.
            harness.await_closing();
            let asked = Instant::now();
            assert!(matches!(harness.ask(&Request::Probe, &[]).0, Reply::Probe(_)));
            let kill = Request::Kill { launch: plugin.launched.launch };
            assert_eq!(harness.ask(&kill, &[]).0, Reply::Done);
            assert_eq!(harness.exit_of(plugin.launched.launch).0, Exit::Signal(9), "{way}");
            assert!(asked.elapsed() < Duration::from_secs(1), "{way}: {:?}", asked.elapsed());
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
        harness.signal(Signal::STOP);
        harness.send(&Request::Probe, &[stream.as_fd()]);
        drop(stream);
        harness.signal(Signal::CONT);
        let deadline = Instant::now() + PATIENCE;
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
        match harness.receive(Instant::now() + PATIENCE).expect("the launcher lives") {
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
    let (message, _) = silent.receive(Instant::now() + PATIENCE).expect("an answer");
    let FromLauncher::Reply { reply, .. } = message else { panic!("not a reply") };
    assert_eq!(refusal(reply).0, RefusalCode::Policy);
    assert!(matches!(silent.connection.try_recv(), Err(error) if error.kind() == io::ErrorKind::WouldBlock));
    drop::<Option<Received>>(None);
}

#[test]
fn an_entry_that_changes_while_it_is_read() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let good = fs::read(harness.path("bundles/walled/bin/walled")).expect("the entry");
        let mut bad = b"#!/bin/sh\necho thread EVIL\n".to_vec();
        bad.resize(good.len(), b'\n');
        let path = harness.path("bundles/walled/bin/changing");
        fs::write(&path, &good).expect("the entry");
        let stop = AtomicBool::new(false);
        let (mut ran, mut refused) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut file = File::options().write(true).open(&path).expect("the entry");
                while !stop.load(Ordering::Relaxed) {
                    for bytes in [&bad, &good] {
                        file.seek(SeekFrom::Start(0)).expect("seek");
                        file.write_all(bytes).expect("write");
                    }
                }
            });
            for round in 0..60 {
                let mut request = harness.request(&["thread"]);
                // Another digest each time, so that no sealed copy of an earlier launch is used: the good bytes with
                // a tail, which an ELF loader ignores.
                let mut tailed = good.clone();
                tailed.extend_from_slice(&u32::to_le_bytes(round));
                request.entry_sha256 = sha2::Digest::finalize(sha2::Digest::chain_update(
                    <sha2::Sha256 as sha2::Digest>::new(),
                    if round % 2 == 0 { &good } else { &tailed },
                ))
                .into();
                let entry = File::open(&path).expect("the entry");
                match harness.launch_entry(request, &entry) {
                    Ok(mut plugin) => {
                        assert_eq!(read_all(&mut plugin.stdout), "thread ok\n", "only the good bytes ran");
                        assert_eq!(harness.exit_of(plugin.launched.launch).0, Exit::Code(0));
                        ran += 1;
                    }
                    Err(refusal) => {
                        assert_eq!(refusal.code, RefusalCode::DigestMismatch, "{}", refusal.message);
                        refused += 1;
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        println!("{as_:?}: {ran} ran, {refused} refused");
        assert!(refused > 0, "the file did change");
    }
}

#[test]
fn scripts_and_strange_entries() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let mut run = |bytes: &[u8]| {
            let path = harness.path("bundles/walled/bin/other");
            fs::write(&path, bytes).expect("the entry");
            let mut request = harness.request(&[]);
            request.entry_sha256 = <[u8; 32]>::from(<sha2::Sha256 as sha2::Digest>::digest(bytes));
            let entry = File::open(&path).expect("the entry");
            harness.launch_entry(request, &entry).map(|mut plugin| read_all(&mut plugin.stdout))
        };
        let sh = run(b"#!/bin/sh\necho \"$PLUGVISOR_PLUGIN $$ $(( 6 * 7 ))\"\n").expect("a script");
        assert_eq!(sh, "walled 2 42\n");
        if fs::exists("/usr/bin/python3").unwrap_or(false) {
            let python = b"#!/usr/bin/python3\nimport threading, asyncio, json, ssl\n\
                t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()\n\
                asyncio.run(asyncio.sleep(0)); print('done')\n";
            assert_eq!(run(python).expect("a script"), "thread\ndone\n");
            // Rootless the plugin owns its sealed entry; it must not be able to spoil the next launch of it.
            let spoil = b"#!/usr/bin/python3\nimport os\nprint('ran')\nfor mode in 0, 0o111:\n    \
                try: os.fchmod(4, mode)\n    except PermissionError: pass\n";
            assert_eq!(run(spoil).expect("a script"), "ran\n");
            assert_eq!(run(spoil).expect("a script"), "ran\n", "{as_:?}: a second time");
        } else {
            println!("SKIP python-script: there is no /usr/bin/python3");
        }
        for (what, bytes) in [
            ("neither ELF nor script", b"hello".to_vec()),
            ("a script without its interpreter", b"#!/nowhere/interpreter\n".to_vec()),
            ("an ELF for another machine", {
                let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xf3\0\x01\0\0\0".to_vec();
                elf.resize(256, 0);
                elf
            }),
        ] {
            let refusal = run(&bytes).expect_err(what);
            assert_eq!(refusal.code, RefusalCode::Entry, "{what}: {}", refusal.message);
        }
    }
}
