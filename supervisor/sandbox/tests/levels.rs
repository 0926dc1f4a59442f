//! What each level adds to the weaker one, tried from inside, as root and as an ordinary user. Each denial is beside the
//! same attempt at the level below, where it works. What PROCESS denies is in `walls.rs`.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{fs, os::fd::AsFd, path::Path, time::Instant};

use harness::{As, Harness, LEVELS, Manner, digest, is_root, make_bundle, patience, read_all, wait_readable};
use plugvisor_sandbox::protocol::{
    Control, Exit, Grant, Launch, Level, Limits, RefusalCode, Reply, Request, SocketMode,
};
use rustix::fs::{MemfdFlags, memfd_create};

const EPERM: &str = "1";
const EFAULT: &str = "14";
const EINVAL: &str = "22";
const ENOSYS: &str = "38";
const KILL: i32 = 9;

#[test]
fn each_level_has_its_controls_and_the_kernel_confirms_them() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        for level in LEVELS {
            let mut request = harness.request_at(level, &["pause"]);
            request.limits =
                Limits { memory_bytes: Some(64 << 20), cpu_percent: Some(50), pids: Some(8), ..Limits::default() };
            let plugin = harness.launch(request);
            let names: Vec<Control> = plugin.launched.controls.iter().map(|state| state.control).collect();
            assert_eq!(names, level.controls().collect::<Vec<_>>(), "{as_:?} {level:?}");
            for state in &plugin.launched.controls {
                println!(
                    "{as_:?} {level:?} {:18} {:?} from {}",
                    state.control.as_str(),
                    state.enforced,
                    state.read_from
                );
                let group = matches!(state.control, Control::MemoryLimit | Control::CpuLimit | Control::PidsLimit)
                    || level == Level::None;
                let may_lack = as_ == As::Ordinary && (group || state.control == Control::OwnUid);
                assert!(state.enforced.is_some() || may_lack, "{as_:?} {level:?} {state:?}");
                assert_eq!(state.unavailable.is_empty(), state.enforced.is_some(), "{state:?}");
            }
            let listed = harness.list();
            let known = listed.launches.iter().find(|known| known.launch == plugin.launched.launch).expect("listed");
            assert_eq!(known.level, level);
            let launch = plugin.launched.launch;
            assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
            assert_eq!(harness.exit_of(launch), (Exit::Signal(KILL), false), "{as_:?} {level:?}");
        }
    }
}

#[test]
fn every_level_serves_on_both_kinds_of_socket() {
    use std::io::{Read, Write};
    use std::os::{fd::AsRawFd, unix::net::UnixStream};
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        for level in LEVELS {
            let sockets = if level == Level::None { "/plugvisor" } else { "/run/plugvisor" };
            let bound = format!("{sockets}/worker/worker.sock");
            let broker = format!("{sockets}/broker.sock");
            for socket in [SocketMode::Inherit, SocketMode::Bind] {
                let args = match socket {
                    SocketMode::Inherit => vec!["unix", broker.as_str(), "accept"],
                    SocketMode::Bind => vec!["unix", broker.as_str(), "bind-accept", bound.as_str()],
                };
                let request = harness.request_at_in(level, &Manner { socket, ..Manner::of(&args) });
                let mut plugin = harness.launch(request);
                let path = match socket {
                    SocketMode::Inherit => format!("/proc/self/fd/{}", plugin.worker.as_raw_fd()),
                    SocketMode::Bind => {
                        let deadline = Instant::now() + patience();
                        let mut said = String::new();
                        while !said.contains("bound") {
                            assert!(wait_readable(plugin.stdout.as_fd(), deadline), "it says when it is bound");
                            let mut bytes = [0; 64];
                            let read = plugin.stdout.read(&mut bytes).expect("a line");
                            assert!(read > 0, "{as_:?} {level:?}: {said}");
                            said.push_str(&String::from_utf8_lossy(&bytes[..read]));
                        }
                        format!("/proc/self/fd/{}/worker.sock", plugin.worker.as_raw_fd())
                    }
                };
                let mut worker = UnixStream::connect(path).expect("the worker socket");
                worker.write_all(b"ping").expect("write");
                let mut answer = [0; 4];
                worker.read_exact(&mut answer).expect("read");
                assert_eq!(&answer, b"ping", "{as_:?} {level:?} {socket:?}");
                let rest = read_all(&mut plugin.stdout);
                assert!(rest.ends_with("accept ok\n"), "{as_:?} {level:?}: {rest}");
                assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
            }
        }
    }
}

#[test]
fn none_is_clean_and_claims_nothing() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let mut request = harness.request_at(
            Level::None,
            &[
                "leads-session",
                "list",
                "/proc/self/fd",
                "cat",
                "/proc/self/status",
                "list",
                "/plugin",
                "exec",
                "/none",
                "env",
                "cat",
                "/proc/self/stat",
            ],
        );
        request.limits.open_files = Some(64);
        let mut plugin = harness.launch(request);
        let text = read_all(&mut plugin.stdout);
        assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false), "{text}");
        let said: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once(' ')?.1)).collect();
        assert_eq!(said[..2], ["true", "0,1,2,3,4"], "{as_:?}");
        let uid = format!("Uid:\t{0}\t{0}\t{0}\t{0}", plugin.launched.uid);
        assert!(said[2].contains(&uid) && said[2].contains("CapEff:\t0000000000000000"), "{as_:?}: {}", said[2]);
        assert_eq!(as_ == As::Root, plugin.launched.uid > 1_000_000_000);
        assert_eq!(said[3], "bin,plugin.json");
        assert_eq!(said[4], "2");
        let environment: Vec<&str> = said[5].split('|').collect();
        let names: Vec<&str> = environment.iter().filter_map(|entry| Some(entry.split_once('=')?.0)).collect();
        let own = ["COLOUR", "LANG", "LISTEN_FDS", "LISTEN_PID", "PATH"];
        assert!(names.iter().all(|name| own.contains(name) || name.starts_with("PLUGVISOR_")), "{names:?}");
        // sd_listen_fds(3) takes the socket only from who names its own process.
        let number = said[6].split(' ').next().expect("its number");
        assert!(environment.contains(&format!("LISTEN_PID={number}").as_str()), "{environment:?}");
        // The control for what the other levels deny: it works here.
        let open = harness.attempt_at(
            Level::None,
            &[],
            &[
                "forks",
                "1",
                "raw",
                &libc::SYS_socket.to_string(),
                "2,2,0",
                "value",
                &libc::SYS_prctl.to_string(),
                "39,0,0,0,0",
            ],
        );
        assert_eq!(open, ["1 then ok", "ok", "0"], "{as_:?}");
    }
}

#[test]
fn none_dies_as_a_whole_and_with_its_launcher() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        // Of an ordinary user the guard ends what is its own: its daemons have come to it.
        assert_eq!(harness.attempt_at(Level::None, &[], &["daemons"]), ["ok"], "{as_:?}");
        let request = harness.request_at(Level::None, &["daemons", "pause"]);
        let mut plugin = harness.launch(request.clone());
        assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()));
        if as_ == As::Root {
            assert_eq!(harness.ask(&Request::Kill { launch: plugin.launched.launch }, &[]).0, Reply::Done);
        } else {
            let launch = plugin.launched.launch;
            assert_eq!(harness.ask(&Request::Signal { launch, signal: KILL }, &[]).0, Reply::Done);
        }
        assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Signal(KILL), false));
        // The daemon holds the pipe.
        read_all(&mut plugin.stdout);

        let mut plugin = harness.launch(request);
        assert!(wait_readable(plugin.stdout.as_fd(), Instant::now() + patience()));
        harness.process.kill().expect("SIGKILL");
        assert!(wait_readable(plugin.pidfd.as_fd(), Instant::now() + patience()), "the plugin died with the launcher");
        read_all(&mut plugin.stdout);
    }
}

#[test]
fn none_needs_a_cgroup_or_the_operators_word() {
    if !is_root() {
        println!("SKIP privileged-lane: what an ordinary user lacks is known for certain only when root made it one");
        return;
    }
    let mut harness = Harness::start_trusting(As::Ordinary);
    let mut request = harness.request_at(Level::None, &["pause"]);
    request.allow_degraded = vec![Control::OwnUid];
    if harness.place.has_limits() {
        harness.launch(request);
    } else {
        let refusal = harness.try_launch(request).map(drop).expect_err("nothing would end it as a whole");
        assert_eq!(refusal.code, RefusalCode::ControlUnavailable);
        for word in ["whole-kill", "dies-with-launcher", "level none", "delegated cgroup"] {
            assert!(refusal.message.contains(word), "{word} in {}", refusal.message);
        }
    }
    // From PROCESS up nothing rests on a cgroup for that, and nobody may leave it out.
    let mut request = harness.request_at(Level::Process, &["thread"]);
    request.allow_degraded = vec![Control::OwnUid];
    harness.launch(request);
}

#[test]
fn container_has_its_own_name_and_cgroup() {
    let ours = fs::read_to_string("/proc/sys/kernel/hostname").expect("the host's name").trim().to_owned();
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let probes = ["host-name", "cat", "/proc/self/cgroup"];
        let weaker = harness.attempt_at(Level::Process, &[], &probes);
        assert_eq!(weaker[0], ours);
        // v2 knows no renaming: there a spare's group keeps the name that it was made with.
        let is_named = ["walled", "/spare-"].iter().any(|name| weaker[1].contains(name));
        assert!(as_ == As::Ordinary || is_named, "{}", weaker[1]);
        for level in [Level::Container, Level::Sandbox] {
            let seen = harness.attempt_at(level, &[], &probes);
            assert_eq!(seen[0], "walled", "{as_:?} {level:?}");
            let groups: Vec<&str> =
                seen[1].split('|').filter_map(|line| line.rsplit_once(':')).map(|(_, group)| group).collect();
            assert!(!groups.is_empty() && groups.iter().all(|group| *group == "/"), "{as_:?} {level:?}: {}", seen[1]);
        }
    }
}

#[test]
fn sandbox_executes_once() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        // The control: at CONTAINER the other program takes its place, and prints nothing.
        assert_eq!(harness.attempt_at(Level::Container, &[], &["exec", "/usr/bin/true"]), Vec::<String>::new());
        let execveat = libc::SYS_execveat.to_string();
        assert_eq!(harness.attempt_at(Level::Container, &[], &["raw", &execveat, "-1,0,0,0,0x1000"]), [EFAULT]);
        let again = ["exec", "/usr/bin/true", "exec", "/usr/bin/true", "raw", &execveat, "-1,0,0,0,0x1000"];
        assert_eq!(harness.attempt_at(Level::Sandbox, &[], &again), [ENOSYS; 3], "{as_:?}");
        // A listener of its own could let it execute: of two filters that answer alike, the newer one counts.
        let seccomp = libc::SYS_seccomp.to_string();
        let prctl = libc::SYS_prctl.to_string();
        let listen = ["raw", &seccomp, "1,8,0", "raw", &prctl, "22,2,0,0,0"];
        assert_eq!(harness.attempt_at(Level::Container, &[], &listen), [EFAULT; 2]);
        assert_eq!(harness.attempt_at(Level::Sandbox, &[], &listen), [EPERM; 2], "{as_:?}");
        // With the grant it may fork; what it forks may not execute either.
        let spawned =
            harness.attempt_at(Level::Sandbox, &[Grant::SpawnChild], &["forks", "2", "exec", "/usr/bin/true"]);
        assert_eq!(spawned, ["2 then ok", ENOSYS], "{as_:?}");
    }
}

#[test]
fn sandbox_executes_nothing_that_it_wrote() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let [mmap, mprotect, memfd, prctl] =
            [libc::SYS_mmap, libc::SYS_mprotect, libc::SYS_memfd_create, libc::SYS_prctl].map(|call| call.to_string());
        // Anonymous memory with read, write and execute; with read and write; nothing made executable; a memory file.
        let probes = [
            "raw",
            &mmap,
            "0,4096,7,0x22,-1,0",
            "raw",
            &mmap,
            "0,4096,3,0x22,-1,0",
            "raw",
            &mprotect,
            "0,0,5",
            "raw",
            &memfd,
            "0,8",
        ];
        // Before 6.3 there is no such seal, and the kernel says so before it looks at the name.
        let has_seal = memfd_create("control", MemfdFlags::NOEXEC_SEAL).is_ok();
        let past_the_walls = if has_seal { EFAULT } else { EINVAL };
        assert_eq!(harness.attempt_at(Level::Container, &[], &probes), ["ok", "ok", "ok", past_the_walls]);
        assert_eq!(harness.attempt_at(Level::Sandbox, &[], &probes), [EPERM, "ok", EPERM, EPERM], "{as_:?}");
        // The kernel's own word, where it has one.
        let asked = ["value", &prctl, "66,0,0,0,0"];
        let held = harness.attempt_at(Level::Sandbox, &[], &asked);
        assert!(held == ["1"] || held == [EINVAL], "{as_:?}: {held:?}");
        assert_eq!(harness.attempt_at(Level::Container, &[], &asked)[0], if held == ["1"] { "0" } else { EINVAL });
    }
}

/// How a program asks for memory that the kernel makes writable and executable when it is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    /// As `-z execstack` does.
    Stack,
    /// By a segment of code with more pages in memory than in the file.
    Segment,
}

/// Lets the program at this path ask.
fn ask_for_writable_code(path: &Path, asks: Asks) {
    const PT_LOAD: u32 = 1;
    const PT_GNU_STACK: u32 = 0x6474_e551;
    const PF_X: u8 = 1;
    let mut file = fs::read(path).expect("the program");
    let short = |file: &[u8], at: usize| u16::from_ne_bytes([file[at], file[at + 1]]);
    let long = |file: &[u8], at: usize| u64::from_ne_bytes(file[at..at + 8].try_into().expect("eight bytes"));
    let table = usize::try_from(long(&file, 32)).expect("in it");
    let (size, count) = (usize::from(short(&file, 54)), usize::from(short(&file, 56)));
    let is = |file: &[u8], at: usize, kind: u32| file[at..at + 4] == kind.to_ne_bytes();
    let mut headers = (0..count).map(|index| table + index * size);
    match asks {
        Asks::Stack => {
            let stack = headers.find(|at| is(&file, *at, PT_GNU_STACK)).expect("it says what its stack is");
            // Read, write, execute.
            file[stack + 4] = 7;
        }
        Asks::Segment => {
            let segment = headers.find(|at| is(&file, *at, PT_LOAD) && file[at + 4] & PF_X != 0).expect("it has code");
            let longer = long(&file, segment + 40) + 1;
            file[segment + 40..segment + 48].copy_from_slice(&longer.to_ne_bytes());
        }
    }
    fs::write(path, file).expect("the program");
}

#[test]
fn sandbox_has_no_writable_code_of_the_kernel_s_making() {
    let of_stack = |maps: &str| {
        let line = maps.split('|').find(|line| line.ends_with("[stack]")).expect("a stack");
        line.split(' ').nth(1).expect("its rights").to_owned()
    };
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        // As the program itself, and as a file beside it, which may be the interpreter of a script.
        for (file, asks) in [("bin/walled", Asks::Stack), ("bin/other", Asks::Stack), ("bin/other", Asks::Segment)] {
            let args = ["cat", "/proc/self/maps"];
            let name = format!("{}-{asks:?}", file.replace('/', "-"));
            make_bundle(&harness.path("bundles"), &name);
            let bundle = harness.path("bundles").join(name);
            fs::write(bundle.join("plugin.json"), Manner::of(&args).manifest("walled", "bin/walled")).expect("it");
            fs::copy(bundle.join("bin/walled"), bundle.join("bin/other")).expect("a second program");
            ask_for_writable_code(&bundle.join(file), asks);
            harness.import(&bundle).expect("imported");
            for level in [Level::Process, Level::Container] {
                let request = Launch { bundle: digest(&bundle), ..harness.request_at(level, &args) };
                let mut plugin = harness.launch_stored(request).expect("launched");
                let maps = read_all(&mut plugin.stdout);
                assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
                let rights = if (file, asks) == ("bin/walled", Asks::Stack) { "rwxp" } else { "rw-p" };
                assert_eq!(of_stack(maps.trim_end()), rights, "{as_:?} {level:?} {file}");
            }
            let request = Launch { bundle: digest(&bundle), ..harness.request_at(Level::Sandbox, &args) };
            let refusal = harness.launch_stored(request).map(drop).expect_err("it would have writable code");
            assert_eq!(refusal.code, RefusalCode::Policy, "{}", refusal.message);
            let fix = match asks {
                Asks::Stack => "-z noexecstack",
                Asks::Segment => "-z separate-code",
            };
            for word in [file, fix, "sandbox"] {
                assert!(refusal.message.contains(word), "{word} in {}", refusal.message);
            }
        }
        // The control: without that it runs there.
        let maps = harness.attempt_at(Level::Sandbox, &[], &["cat", "/proc/self/maps"]);
        assert_eq!(of_stack(&maps[0]), "rw-p", "{as_:?}");
    }
}

#[test]
fn sandbox_calls_only_what_is_listed() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let [setpriority, socket, ioctl, kexec] =
            [libc::SYS_setpriority, libc::SYS_socket, libc::SYS_ioctl, libc::SYS_kexec_load]
                .map(|call| call.to_string());
        // Its own priority; a datagram socket; SIOCGIFCONF without a place for it; a call that does not exist.
        let probes = [
            "raw",
            &setpriority,
            "0,0,19",
            "socket",
            "1",
            "2",
            "raw",
            &ioctl,
            "3,0x8912,0",
            "raw",
            "1000",
            "0",
            "raw",
            &kexec,
            "0",
            "socket",
            "1",
            "1",
            "thread",
        ];
        let weaker = harness.attempt_at(Level::Container, &[], &probes);
        assert_eq!(weaker, ["ok", "ok", EFAULT, ENOSYS, EPERM, "ok", "ok"], "{as_:?}");
        let seen = harness.attempt_at(Level::Sandbox, &[], &probes);
        assert_eq!(seen, [EPERM, EPERM, EPERM, ENOSYS, EPERM, "ok", "ok"], "{as_:?}");
        let _ = socket;
    }
}

#[test]
fn sandbox_launches_are_quick_and_leave_nothing() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        let mut baseline = None;
        let mut times = Vec::new();
        for round in 0..60 {
            harness.await_spares();
            let request = harness.request_at(Level::Sandbox, &["exit", "0"]);
            let plugin = harness.launch(request);
            times.push(plugin.launched.launch_exec_nanos);
            assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
            // The listener among them.
            let most = *baseline.get_or_insert_with(|| harness.descriptors());
            harness.await_descriptors(most, &format!("after launch {round}"));
        }
        times.sort_unstable();
        let [fastest, median, slow] = [0, 30, 54].map(|at| times[at] / 1000);
        println!(
            "{as_:?}: launch to exec at sandbox, fastest {fastest} us, median {median} us, 90th percentile {slow} us"
        );
    }
}
