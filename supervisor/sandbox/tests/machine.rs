//! The level VM, with a real kernel in a real emulator: what is refused without one, what runs in one, how it ends, and
//! what is left.
//!
//! A kernel is needed. `PLUGVISOR_TEST_GUEST` names a directory with `boot/vmlinuz-VERSION` and `lib/modules/VERSION` in it,
//! as `cargo xtask test` makes one; without it the host's own `/boot` is looked at.
#![allow(missing_docs, reason = "tests")]

#[path = "harness/guest.rs"]
mod guest;
mod harness;

use std::{
    fs,
    io::{Read, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::{fs::PermissionsExt, net::UnixStream},
    },
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use harness::{As, Harness, Manner, Plugin, patience, read_all, wait_readable};
use plugvisor_sandbox::protocol::{
    Control, Exit, Grant, Launch, Level, Limits, Notice, PolicyFile, RefusalCode, Reply, Request, SocketMode,
};

/// A launcher that has machines, and to which plugins are the operator's own.
fn start(as_: As) -> Option<Harness> {
    guest::find().map(|guest| Harness::start_trusting_with_machines(as_, |place| guest.settings(place)))
}

fn in_machine(harness: &Harness, manner: &Manner) -> Launch {
    let mut request = harness.request_at_in(Level::Vm, manner);
    request.limits = Limits { memory_bytes: Some(64 << 20), pids: Some(16), ..Limits::default() };
    request
}

/// Waits until it has printed this; what it has printed by then.
fn read_until(plugin: &mut Plugin, wanted: &str) -> String {
    let deadline = Instant::now() + patience();
    let mut said = String::new();
    while !said.contains(wanted) {
        assert!(wait_readable(plugin.stdout.as_fd(), deadline), "it says {wanted:?}, and not {said:?}");
        let mut bytes = [0; 64];
        let read = plugin.stdout.read(&mut bytes).expect("a piece");
        assert!(read > 0, "it ended with {said:?}: {}", read_all(&mut plugin.stderr));
        said.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    said
}

/// All that it printed, when it has ended.
fn whole(harness: &mut Harness, plugin: &mut Plugin) -> (String, String, Exit) {
    let said = read_all(&mut plugin.stdout);
    let errors = read_all(&mut plugin.stderr);
    let (exit, _) = harness.exit_of(plugin.launched.launch);
    (said, errors, exit)
}

#[test]
fn without_a_kernel_it_is_refused_and_the_fix_is_said() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let request = harness.request_at(Level::Vm, &["pause"]);
        let refusal = harness.try_launch(request).map(|_| ()).expect_err("there is no [vm]");
        assert_eq!(refusal.code, RefusalCode::ControlUnavailable, "{refusal:?}");
        for word in ["own-kernel", "[vm]", "kernel = ", "qemu-system-x86"] {
            assert!(refusal.message.contains(word), "{word}: {}", refusal.message);
        }
        // Nobody may allow it to be missing.
        let mut request = harness.request_at(Level::Vm, &["pause"]);
        request.allow_degraded = Control::ALL.to_vec();
        assert!(harness.try_launch(request).is_err());
        let Reply::Probe(host) = harness.ask(&Request::Probe, &[]).0 else { panic!("no probe") };
        let vm = host.levels.into_iter().find(|level| level.level == Level::Vm).expect("the level");
        assert!(vm.lacking.iter().any(|lacking| lacking.control == Some(Control::OwnKernel)), "{vm:?}");
    }
}

#[test]
fn what_is_named_and_wrong_is_said() {
    let mut harness = Harness::start_with_store(As::possible()[0], |_| ());
    // Any program does for the emulator: it is never started.
    harness.write_policy("version = 1\n[vm]\nkernel = \"/nowhere/vmlinuz\"\nemulator = \"/usr/bin/env\"\n");
    let Reply::Probe(host) = harness.ask(&Request::Probe, &[]).0 else { panic!("no probe") };
    let vm = host.levels.into_iter().find(|level| level.level == Level::Vm).expect("the level");
    let told = vm.lacking.iter().find(|lacking| lacking.control == Some(Control::OwnKernel)).expect("it is lacking");
    assert!(told.why.contains("/nowhere/vmlinuz") && !told.may_be_allowed, "{told:?}");
    // While the file itself cannot be used, that is the cause, and not what the level lacks for it.
    let request = harness.request_at(Level::Vm, &["pause"]);
    let request = harness.prepared(request);
    harness.write_policy("version = 2\n");
    let refusal = harness.launch_stored(request).map(|_| ()).expect_err("the file does not hold");
    assert_eq!(refusal.code, RefusalCode::PolicyFile, "{refusal:?}");
    let Reply::Policy(state) = harness.ask(&Request::Policy, &[]).0 else { panic!("no answer about the policy") };
    assert!(matches!(&state, PolicyFile::Unusable { why, .. } if why.contains("version: is 2")), "{state:?}");
    harness.write_policy("version = 1\n");
    assert!(matches!(harness.ask(&Request::Policy, &[]).0, Reply::Policy(PolicyFile::Usable { .. })));
}

#[test]
fn a_plugin_runs_on_its_own_kernel_and_the_walls_around_it_are_confirmed() {
    for as_ in As::possible() {
        let Some(mut harness) = start(as_) else { return };
        let begun = Instant::now();
        let args = ["cat", "/proc/version", "cat", "/proc/self/status", "list", "/plugin", "env", "exit", "7"];
        let request = in_machine(&harness, &Manner::of(&args));
        let mut plugin = harness.launch(request);
        for state in &plugin.launched.controls {
            println!("{as_:?} {:18} {:?} from {}", state.control.as_str(), state.enforced, state.read_from);
        }
        let names: Vec<Control> = plugin.launched.controls.iter().map(|state| state.control).collect();
        assert!(names.contains(&Control::OwnKernel) && names.contains(&Control::SingleExec), "{names:?}");
        let (said, errors, exit) = whole(&mut harness, &mut plugin);
        println!("{as_:?}: from the request to its end {:?}", begun.elapsed());
        assert_eq!(exit, Exit::Code(7), "{said}{errors}");
        let own = fs::read_to_string("/proc/version").expect("a version");
        let lines: Vec<&str> = said.lines().filter_map(|line| Some(line.split_once(' ')?.1)).collect();
        assert!(lines[0].contains("Linux version") && lines[0] != own.trim(), "{said}");
        assert!(lines[1].contains("Uid:\t60000") && lines[1].contains("CapEff:\t0000000000000000"), "{said}");
        assert_eq!(lines[2], "bin,plugin.json");
        assert!(lines[3].contains("COLOUR=blue") && lines[3].contains("PLUGVISOR_BROKER=/run/plugvisor/broker.sock"));
    }
}

#[test]
fn its_configuration_is_a_copy_that_has_its_bounds() {
    for as_ in As::possible() {
        let Some(mut harness) = start(as_) else { return };
        let place = "/plugvisor/config";
        let args = ["cat", "/plugvisor/config/greeting", "list", place, "append", "/plugvisor/config/greeting", "env"];
        let mut request = in_machine(&harness, &Manner::of(&args));
        request.grants = vec![Grant::ReadConfig];
        let mut plugin = harness.launch(request.clone());
        let states = plugin.launched.directories.clone();
        assert_eq!(states.len(), 1, "{as_:?}: {states:?}");
        let held = states[0].enforced.as_deref().unwrap_or_default();
        assert!(held.starts_with("ro,nosuid,nodev,noexec") && held.contains("a copy"), "{as_:?}: {states:?}");
        let (said, errors, exit) = whole(&mut harness, &mut plugin);
        assert_eq!(exit, Exit::Code(0), "{as_:?}: {said}{errors}");
        let lines: Vec<&str> = said.lines().filter_map(|line| Some(line.split_once(' ')?.1)).collect();
        // Permission denied, as to whom a file is not writable.
        assert_eq!(lines[..3], ["hello", "greeting", "13"], "{as_:?}: {said}{errors}");
        assert!(lines[3].contains("PLUGVISOR_CONFIG_DIR=/plugvisor/config"), "{as_:?}: {said}");

        // More than a machine has room for is told with the numbers.
        let large = harness.path("config/walled/large");
        fs::File::create(&large).and_then(|file| file.set_len((4 << 20) + 1)).expect("a file");
        fs::set_permissions(&large, fs::Permissions::from_mode(0o644)).expect("chmod");
        let mut plugin = harness.launch(request.clone());
        let (_, errors, exit) = whole(&mut harness, &mut plugin);
        assert_eq!(exit, Exit::Code(70), "{as_:?}: {errors}");
        for words in ["packing its archive", "/plugvisor/config", "at most 4194304"] {
            assert!(errors.contains(words), "{as_:?}: {words:?}: {errors}");
        }
        fs::remove_file(&large).expect("removes");

        // So is what its user may not read; an ordinary user's plugins are that user.
        if as_ == As::Root {
            let closed = harness.path("config/walled/closed");
            fs::write(&closed, "of root").expect("a file");
            fs::set_permissions(&closed, fs::Permissions::from_mode(0o600)).expect("chmod");
            let mut plugin = harness.launch(request.clone());
            let (_, errors, exit) = whole(&mut harness, &mut plugin);
            assert_eq!(exit, Exit::Code(70), "{errors}");
            for words in ["/plugvisor/config/closed: Permission denied", "chmod o+r"] {
                assert!(errors.contains(words), "{words:?}: {errors}");
            }
        }
    }
}

/// As at the other levels, and by the same words: what it writes is in the host's directory, and the next machine has it.
#[test]
fn its_data_are_the_hosts() {
    for as_ in As::possible() {
        let Some(mut harness) = start(as_) else { return };
        let request = |harness: &mut Harness, grants: &[Grant], args: &[&str]| {
            let mut request = in_machine(harness, &Manner::of(args));
            request.grants = grants.to_vec();
            request.limits.file_size_bytes = Some(256 << 20);
            let mut plugin = harness.launch(request);
            let states = plugin.launched.directories.clone();
            let (said, errors, exit) = whole(harness, &mut plugin);
            assert_eq!(exit, Exit::Code(0), "{as_:?}: {said}{errors}");
            let lines = said.lines().filter_map(|line| Some(line.split_once(' ')?.1.to_owned()));
            (lines.collect::<Vec<_>>(), states, errors)
        };
        let (directory, file, moved) = ("/plugvisor/data/d", "/plugvisor/data/d/file", "/plugvisor/data/d/moved");
        let (program, socket) = ("/plugvisor/data/program", "/plugvisor/data/socket");
        let write = [
            "mkdir",
            directory,
            "write",
            file,
            "kept",
            "rename",
            file,
            moved,
            "cat",
            moved,
            "list",
            "/plugvisor/data",
            "copy-say",
            program,
            "remove",
            program,
            "bind",
            socket,
            "env",
            "keep",
            "/plugvisor/data/kept",
        ];
        let (seen, states, errors) = request(&mut harness, &[Grant::WriteData], &write);
        assert!(
            states[0].enforced.as_deref().is_some_and(|held| held.starts_with("rw,nosuid,nodev,noexec")),
            "{states:?}"
        );
        // Neither programs nor sockets.
        assert_eq!(seen[..8], ["ok", "ok", "ok", "kept", "d", "13", "ok", "13"], "{as_:?}: {seen:?} {errors}");
        assert!(seen[8].contains("PLUGVISOR_DATA_DIR=/plugvisor/data"), "{seen:?}");
        assert_eq!(seen[9], "ok", "{as_:?}: what programs do with files");
        let outside = harness.path("data/walled/d/moved");
        assert_eq!(fs::read_to_string(&outside).expect("what it wrote"), "kept", "{as_:?}");

        let read = ["cat", moved, "append", moved, "append", "/plugvisor/data/new", "list", directory];
        let (seen, states, errors) = request(&mut harness, &[Grant::ReadData], &read);
        assert!(states[0].enforced.as_deref().is_some_and(|held| held.starts_with("ro,")), "{states:?}");
        assert_eq!(seen, ["kept", "30", "30", "moved"], "{as_:?}: {errors}");

        // A link leads where it leads in the machine, and not outside.
        let link = harness.path("data/walled/link");
        std::os::unix::fs::symlink(harness.path("key-of-nobody"), &link).expect("a link");
        let (seen, ..) = request(&mut harness, &[Grant::ReadData], &["read", "/plugvisor/data/link"]);
        assert_eq!(seen, ["2"], "{as_:?}");
        // And without a grant there is nothing.
        let (seen, states, _) = request(&mut harness, &[], &["list", "/plugvisor/data"]);
        assert_eq!((seen, states.len()), (vec!["2".to_owned()], 0), "{as_:?}");
    }
}

#[test]
fn it_serves_on_both_kinds_of_socket_and_reaches_its_broker() {
    for as_ in As::possible() {
        let Some(mut harness) = start(as_) else { return };
        for socket in [SocketMode::Inherit, SocketMode::Bind] {
            let broker = "/run/plugvisor/broker.sock";
            let args = match socket {
                SocketMode::Inherit => vec!["unix", broker, "accept"],
                SocketMode::Bind => vec!["unix", broker, "bind-accept", "/run/plugvisor/worker/worker.sock"],
            };
            let request = in_machine(&harness, &Manner { socket, ..Manner::of(&args) });
            let mut plugin = harness.launch(request);
            let path = match socket {
                SocketMode::Inherit => format!("/proc/self/fd/{}", plugin.worker.as_raw_fd()),
                SocketMode::Bind => {
                    read_until(&mut plugin, "bound\n");
                    format!("/proc/self/fd/{}/worker.sock", plugin.worker.as_raw_fd())
                }
            };
            let mut worker = UnixStream::connect(path).expect("the worker socket");
            worker.write_all(b"ping").expect("write");
            let mut answer = [0; 4];
            worker.read_exact(&mut answer).unwrap_or_else(|error| panic!("{as_:?} {socket:?}: {error}"));
            assert_eq!(&answer, b"ping", "{as_:?} {socket:?}");
            let (said, errors, exit) = whole(&mut harness, &mut plugin);
            assert!(said.ends_with("accept ok\n"), "{as_:?} {socket:?}: {said}{errors}");
            assert_eq!(exit, Exit::Code(0));
        }
    }
}

#[test]
fn it_ends_as_the_plugin_does_and_nothing_is_left() {
    for as_ in As::possible() {
        let Some(mut harness) = start(as_) else { return };
        let request = in_machine(&harness, &Manner::of(&["abort"]));
        let mut plugin = harness.launch(request);
        let (said, errors, exit) = whole(&mut harness, &mut plugin);
        assert_eq!(exit, Exit::Signal(6), "{said}{errors}");

        // A signal for the plugin goes to the plugin.
        let request = in_machine(&harness, &Manner::of(&["cat", "/proc/self/comm", "pause"]));
        let mut plugin = harness.launch(request);
        read_until(&mut plugin, "cat");
        let launch = plugin.launched.launch;
        println!("{as_:?}: {:?}", harness.ask(&Request::Stats { launch }, &[]).0);
        assert_eq!(harness.ask(&Request::Signal { launch, signal: 15 }, &[]).0, Reply::Done);
        assert_eq!(harness.exit_of(launch), (Exit::Signal(15), false));

        // Its memory is its guest's to hold.
        let manner = Manner::of(&["eat", "134217728"]);
        let request = in_machine(&harness, &manner);
        let mut plugin = harness.launch(request);
        let (said, errors) = (read_all(&mut plugin.stdout), read_all(&mut plugin.stderr));
        let launch = plugin.launched.launch;
        // With the cause, as at any other level, and the notice of it before.
        harness.await_notice(|notice| (*notice == Notice::OutOfMemory { launch }).then_some(()));
        assert_eq!(harness.exit_of(launch), (Exit::Signal(9), true), "{said}{errors}");
        assert!(errors.contains("maxMemory"), "{errors}");

        let request = in_machine(&harness, &Manner::of(&["pause"]));
        let plugin = harness.launch(request);
        let launch = plugin.launched.launch;
        assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
        assert_eq!(harness.exit_of(launch), (Exit::Signal(9), false));
        let left = harness.cgroups().into_iter().filter(|path| path.to_string_lossy().contains("walled")).count();
        assert_eq!(left, 0, "{:?}", harness.cgroups());
    }
}

/// Its deadlines are worth nothing otherwise.
#[test]
fn its_time_runs_as_fast_as_the_hosts() {
    let Some(mut harness) = start(As::possible()[0]) else { return };
    let request = in_machine(&harness, &Manner::of(&["cat", "/proc/uptime", "accept", "cat", "/proc/uptime"]));
    let mut plugin = harness.launch(request);
    let first = read_until(&mut plugin, "\n");
    let begun = Instant::now();
    // Time itself is what is measured here.
    std::thread::sleep(Duration::from_secs(3));
    let path = format!("/proc/self/fd/{}", plugin.worker.as_raw_fd());
    UnixStream::connect(path).and_then(|mut worker| worker.write_all(b"go")).expect("the worker socket");
    let said = read_all(&mut plugin.stdout);
    let ours = begun.elapsed().as_secs_f64();
    assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false), "{said}");
    // The time since it booted, and how much of it was idle.
    let uptime = |line: &str| line.split_whitespace().nth(1).and_then(|text| text.parse::<f64>().ok());
    let theirs = said.lines().last().and_then(uptime).zip(uptime(&first)).map(|(last, first)| last - first);
    let theirs = theirs.unwrap_or_else(|| panic!("{first}{said}"));
    println!("{ours:.2} s here, {theirs:.2} s there");
    // What was said is on its way for some part of a second.
    assert!((theirs - ours).abs() < 0.1 * ours + 0.5, "{ours:.2} s here, {theirs:.2} s there");
}

/// Rows of the escape suite whose column for VM is G: what it finds, stops or opens is its guest's.
#[test]
fn a_hostile_plugin_touches_its_guest_only() {
    let Some(mut harness) = start(As::possible()[0]) else { return };
    let secret = harness.path("secret");
    fs::write(&secret, "key").expect("a secret");
    let (foreign, own) = (harness.path("foreign.sock"), std::process::id().to_string());
    let _foreign = std::os::unix::net::UnixListener::bind(&foreign).expect("a socket");
    let local = std::net::TcpListener::bind("127.0.0.1:0").expect("a listener");
    let address = local.local_addr().expect("an address").to_string();
    let (secret, foreign) = (secret.display().to_string(), foreign.display().to_string());
    let environment = format!("/proc/{own}/environ");
    let args = [
        // 1, 4, 5, 9, 13, 16, 12, 31, 34
        "read",
        &secret,
        "list",
        "/proc/1/root",
        "read",
        &environment,
        "kill",
        &own,
        "unix",
        &foreign,
        "tcp",
        &address,
        "list",
        "/proc/self/fd",
        "append",
        "/proc/sys/kernel/core_pattern",
        "append",
        "/dev/vport0p1",
        "append",
        "/plugin/plugin.json",
    ];
    let request = in_machine(&harness, &Manner::of(&args));
    let mut plugin = harness.launch(request);
    let (said, errors, exit) = whole(&mut harness, &mut plugin);
    assert_eq!(exit, Exit::Code(0), "{said}{errors}");
    let found: Vec<&str> = said.lines().filter_map(|line| Some(line.split_once(' ')?.1)).collect();
    // Not there; not shown to it; nobody of that number; nothing there; refused by its own kernel; no more than it was
    // given; not its to change.
    assert_eq!(found[0], "2", "the secret: {said}");
    assert!(["2", "13"].contains(&found[1]), "the first process's root: {said}");
    assert!(["2", "13"].contains(&found[2]), "the environment of this process: {said}");
    assert_eq!(found[3], "3", "this process: {said}");
    assert_eq!(found[4], "2", "a socket of the host: {said}");
    assert_eq!(found[5], "111", "the host's loopback: {said}");
    assert_eq!(found[6], "0,1,2,3,4", "descriptors: {said}");
    assert_eq!(found[7..], ["13", "13", "13"], "what is its kernel's: {said}");
}

/// An interpreter, with what the administrator says that it needs.
#[test]
fn a_script_runs_in_its_machine_with_the_runtime_of_its_interpreter() {
    const PYTHON: &str = "/usr/bin/python3";
    let Some(guest) = guest::find() else { return };
    let asked = Command::new(PYTHON).args(["-c", "import os; print(os.path.dirname(os.__file__))"]).output();
    let Ok(asked) = asked else {
        println!("SKIP python-script: there is no {PYTHON}");
        return;
    };
    let library = String::from_utf8(asked.stdout).expect("a path").trim().to_owned();
    let settings = |place: &Path| Ok(format!("{}runtime = [{library:?}]\n", guest.settings(place)?));
    let mut harness = Harness::start_trusting_with_machines(As::possible()[0], settings);
    let bundle = harness.path("bundles/scripted");
    fs::create_dir_all(bundle.join("bin")).expect("the bundle");
    harness::write_manifest(&bundle, "walled", "bin/run");
    let script = format!(
        "#!{PYTHON}\nimport sys, threading, json, socket\nsys.dont_write_bytecode = True\nimport neighbour\n\
         t = threading.Thread(target=lambda: print('thread')); t.start(); t.join()\n\
         c, _ = socket.socket(fileno=3).accept(); c.sendall(json.dumps(neighbour.WORD).encode()); c.close()\n"
    );
    fs::write(bundle.join("bin/run"), script).expect("the script");
    fs::set_permissions(bundle.join("bin/run"), fs::Permissions::from_mode(0o755)).expect("chmod");
    fs::write(bundle.join("bin/neighbour.py"), "WORD = 'found'\n").expect("its neighbour");
    harness::open_to_all(&bundle);
    harness.import(&bundle).expect("imported");
    let mut request = harness.request_at(Level::Vm, &[]);
    request.bundle = harness::digest(&bundle);
    let mut plugin = harness.launch_stored(request).expect("launched");
    let worker = format!("/proc/self/fd/{}", plugin.worker.as_raw_fd());
    let mut answer = String::new();
    UnixStream::connect(worker).and_then(|mut worker| worker.read_to_string(&mut answer)).expect("an answer");
    let (said, errors, exit) = whole(&mut harness, &mut plugin);
    assert_eq!((answer.as_str(), said.as_str(), exit), ("\"found\"", "thread\n", Exit::Code(0)), "{errors}");
}

#[test]
fn it_reaches_the_egress_proxy_and_nothing_else() {
    let Some(mut harness) = start(As::possible()[0]) else { return };
    let mut request =
        in_machine(&harness, &Manner::of(&["tcp", "127.0.0.1:3128", "tcp", "192.0.2.1:80", "socket", "17", "3"]));
    request.grants = vec![Grant::Egress];
    let mut plugin = harness.launch(request);
    assert!(plugin.egress.is_some(), "the proxy's socket");
    let (said, errors, exit) = whole(&mut harness, &mut plugin);
    assert_eq!(exit, Exit::Code(0), "{said}{errors}");
    assert_eq!(said, "tcp ok\ntcp 101\nsocket 1\n", "{errors}");
}
