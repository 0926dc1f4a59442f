//! What a plugin at PROCESS cannot do, tried from inside, each with the exact errno, so that a missing file does not
//! count as a wall. As root and as an ordinary user.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener},
    },
    time::Instant,
};

use harness::{As, Harness, patience, read_all, wait_readable};
use plugvisor_sandbox::{
    options::Linger,
    protocol::{Exit, Grant},
};

const EPERM: &str = "1";
const ENOENT: &str = "2";
const EACCES: &str = "13";
const EINVAL: &str = "22";
const EROFS: &str = "30";
const ENOSYS: &str = "38";
const ENETUNREACH: &str = "101";
const ECONNREFUSED: &str = "111";
const SIGSYS: i32 = 31;

/// Runs each attempt and compares.
fn expect(harness: &mut Harness, grants: &[Grant], attempts: &[(&[&str], &str)]) {
    let args: Vec<&str> = attempts.iter().flat_map(|(args, _)| args.iter().copied()).collect();
    let lines = harness.attempt(|launch| launch.grants = grants.to_vec(), &args);
    assert_eq!(lines.len(), attempts.len());
    let wrong: Vec<String> = attempts
        .iter()
        .zip(&lines)
        .filter(|((_, expected), (_, got))| expected != got)
        .map(|((args, expected), (_, got))| format!("{args:?}: expected {expected}, got {got}"))
        .collect();
    assert!(wrong.is_empty(), "{:?}: {wrong:#?}", harness.as_);
}

#[test]
fn files_and_sockets_of_others() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let secret = harness.path("secret").display().to_string();
        let socket = harness.path("foreign.sock");
        let _listener = UnixListener::bind(&socket).expect("a foreign socket");
        let socket = socket.display().to_string();
        let name = format!("plugvisor-test-{}-{as_:?}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).expect("a name");
        let _abstract = UnixListener::bind_addr(&abstract_address).expect("an abstract socket");
        // Controls: all of these are there, and open to others from outside.
        assert!(fs::exists("/etc/shadow").unwrap_or(false) && fs::exists(&secret).unwrap_or(false));
        std::os::unix::net::UnixStream::connect(&socket).expect("reachable from outside");
        std::os::unix::net::UnixStream::connect_addr(&abstract_address).expect("reachable from outside");
        let launcher = format!("/proc/{}/environ", harness.process.id());
        expect(
            &mut harness,
            &[],
            &[
                (&["read", "/etc/shadow"], ENOENT),
                (&["read", &secret], ENOENT),
                (&["read", "/proc/1/environ"], ENOENT),
                (&["read", "/proc/1/mem"], ENOENT),
                (&["read", "/proc/1/root/etc/passwd"], ENOENT),
                (&["read", &launcher], ENOENT),
                (&["read", "/proc/sys/kernel/core_pattern"], ENOENT),
                (&["read", "/sys/fs/cgroup/cgroup.procs"], ENOENT),
                (&["list", "/"], EACCES),
                (&["list", "/dev"], EACCES),
                (&["list", "/run"], EACCES),
                (&["list", "/tmp"], EACCES),
                (&["list", "/plugin"], "bin,plugin.json"),
                (&["list", "/plugin/../plugin/bin"], "walled"),
                (&["list", "/run/plugvisor"], "broker.sock,worker.sock"),
                (&["list", "/proc/self/fd"], "0,1,2,3,4"),
                (&["unix", &socket], ENOENT),
                (&["abstract", &name], ECONNREFUSED),
                (&["unix", "/run/plugvisor/broker.sock"], "ok"),
                (&["append", "/plugin/plugin.json"], EROFS),
                (&["append", "/plugin/new"], EROFS),
                (&["append", "/usr/new"], EROFS),
                (&["append", "/tmp/new"], EROFS),
                (&["append", "/new"], EROFS),
                (&["append", "/dev/null"], "ok"),
                (&["kill", "1"], EPERM),
                (&["kill", "-1"], EPERM),
                (&["thread"], "ok"),
            ],
        );
    }
}

/// The host's network shows in /proc/self/net and to ioctls of a Unix socket, and an abstract name bound in it is one
/// that programs of the host may connect to: a plugin has an empty one instead.
#[test]
fn the_hosts_network_is_not_there() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let name = format!("plugvisor-seen-{}-{as_:?}", std::process::id());
        let _listener =
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name).expect("a name")).expect("binds");
        let shown = fs::read_to_string("/proc/self/net/unix").expect("the host's sockets");
        assert!(shown.contains(&name), "the control: it shows outside");
        let lines = harness.attempt(|_| (), &["cat", "/proc/self/net/unix", "cat", "/proc/self/net/dev"]);
        let [(_, sockets), (_, devices)] = lines.as_slice() else { panic!("{lines:?}") };
        assert!(sockets.starts_with("Num ") && !sockets.contains(&name), "{as_:?}: {sockets}");
        let devices: Vec<&str> =
            devices.split('|').filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim()).collect();
        assert_eq!(devices, ["lo"], "{as_:?}");
    }
}

#[test]
fn system_calls() {
    use libc_numbers::*;
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let raw = |call: i64, arguments: &str| vec!["raw".to_owned(), call.to_string(), arguments.to_owned()];
        let denied: Vec<(Vec<String>, &str)> = vec![
            (raw(MOUNT, "0,0,0,0,0"), EPERM),
            (raw(UNSHARE, "0x10000000"), EPERM),
            (raw(UNSHARE, "0x20000000"), EPERM),
            (raw(SETNS, "0,0"), EPERM),
            (raw(CHROOT, "0"), EPERM),
            (raw(PIVOT_ROOT, "0,0"), EPERM),
            (raw(FSOPEN, "0,0"), EPERM),
            (raw(CLONE, "0x10000011,0,0,0,0"), EPERM),
            (raw(CLONE, "0x20000011,0,0,0,0"), EPERM),
            (raw(CLONE, "17,0,0,0,0"), EPERM),
            (raw(CLONE3, "0,88"), ENOSYS),
            (raw(PTRACE, "0,0,0,0"), EPERM),
            (raw(PTRACE, "16,1,0,0"), EPERM),
            (raw(PROCESS_VM_READV, "1,0,0,0,0,0"), EPERM),
            (raw(BPF, "0,0,0"), EPERM),
            (raw(PERF_EVENT_OPEN, "0,0,0,0,0"), EPERM),
            (raw(USERFAULTFD, "0"), EPERM),
            (raw(ADD_KEY, "0,0,0,0,0"), EPERM),
            (raw(KEYCTL, "0,0,0,0,0"), EPERM),
            (raw(IO_URING_SETUP, "1,0"), EPERM),
            (raw(IO_SETUP, "1,0"), ENOSYS),
            (raw(OPEN_BY_HANDLE_AT, "0,0,0"), EPERM),
            (raw(FINIT_MODULE, "0,0,0"), EPERM),
            (raw(KEXEC_LOAD, "0,0,0,0"), EPERM),
            (raw(SHMGET, "0,4096,0x1ff"), EPERM),
            (raw(MQ_OPEN, "0,0,0,0"), EPERM),
            (raw(PERSONALITY, "0x0040000"), EPERM),
            (raw(PRLIMIT64, "0,7,1,0"), EPERM),
            (raw(PRLIMIT64, "0,7,0,0"), "ok"),
            (raw(PRCTL, "1,0,0,0,0"), EPERM),
            (raw(MEMFD_CREATE, "0,0"), EPERM),
            (raw(IOCTL, "0,0x5412,0"), EPERM),
            (raw(IOCTL, "0,0x100005412,0"), EPERM),
            (raw(IOCTL, "0,0x70000541c,0"), EPERM),
            (raw(SOCKETPAIR, "2,1,0,0"), EPERM),
            // The kernel's own rules: no capability, and rootless no such uid.
            (raw(SETUID, "0"), if as_ == As::Root { EPERM } else { EINVAL }),
        ];
        let families = [2, 10, 16, 17, 38, 40].map(|family: i32| family.to_string());
        let mut attempts: Vec<(Vec<&str>, &str)> =
            denied.iter().map(|(args, expected)| (args.iter().map(String::as_str).collect(), *expected)).collect();
        for family in &families {
            for kind in ["1", "2", "3"] {
                attempts.push((vec!["socket", family, kind], EPERM));
            }
        }
        attempts.push((vec!["socket", "1", "1"], "ok"));
        let attempts: Vec<(&[&str], &str)> =
            attempts.iter().map(|(args, expected)| (args.as_slice(), *expected)).collect();
        expect(&mut harness, &[], &attempts);
        // With the grant a process may be made, but still no namespace.
        let spawn = [
            (raw(CLONE, "0x10000011,0,0,0,0"), EPERM),
            (raw(UNSHARE, "0x10000000"), EPERM),
            (raw(CLONE3, "0,88"), ENOSYS),
        ];
        let spawn: Vec<(Vec<&str>, &str)> =
            spawn.iter().map(|(args, expected)| (args.iter().map(String::as_str).collect(), *expected)).collect();
        let mut spawn: Vec<(&[&str], &str)> =
            spawn.iter().map(|(args, expected)| (args.as_slice(), *expected)).collect();
        spawn.push((&["forks", "2"], "2 then ok"));
        expect(&mut harness, &[Grant::SpawnChild], &spawn);
    }
}

/// With the grant there is TCP to the proxy in a namespace of its own, and nothing else: no other protocol, no other port,
/// no other address, and nobody to serve.
#[test]
fn egress_is_tcp_to_the_proxy_alone() {
    use libc_numbers::*;
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        // The control: something listens on the host's loopback, and others reach it.
        let host = TcpListener::bind("127.0.0.1:0").expect("the host's port");
        let address = host.local_addr().expect("its address");
        TcpStream::connect(address).expect("reachable from outside");
        let landlock = harness.landlock_version();
        // Both as a child made ahead of the launch, where there are such, and as one that is made for it.
        for spared in [true, false] {
            if spared {
                harness.await_spares();
            }
            let raw = |call: i64, arguments: &str| vec!["raw".to_owned(), call.to_string(), arguments.to_owned()];
            let mut attempts: Vec<(Vec<String>, &str)> = vec![
                (raw(SOCKET, "2,1,0"), "ok"),
                (raw(SOCKET, "2,0x80801,6"), "ok"),
                (raw(SOCKET, "10,1,6"), "ok"),
                (raw(SOCKET, "1,2,0"), "ok"),
                // UDP, raw, MPTCP (262), SCTP (132), DCCP, and families with something in the high half.
                (raw(SOCKET, "2,2,0"), EPERM),
                (raw(SOCKET, "2,3,6"), EPERM),
                (raw(SOCKET, "10,3,58"), EPERM),
                (raw(SOCKET, "2,1,262"), EPERM),
                (raw(SOCKET, "0x100000002,1,262"), EPERM),
                (raw(SOCKET, "2,1,132"), EPERM),
                (raw(SOCKET, "2,5,132"), EPERM),
                (raw(SOCKET, "2,6,33"), EPERM),
                (raw(SOCKET, "2,0x100000002,0"), EPERM),
                (raw(SOCKETPAIR, "2,1,0,0"), EPERM),
                (raw(SENDTO, "0,0,0,0x20000000,0,0"), EPERM),
                (raw(SENDMSG, "0,0,0x20000000"), EPERM),
                (raw(SENDMMSG, "0,0,0,0x20000000"), EPERM),
            ];
            for family in [16, 17, 38, 40] {
                for kind in [1, 2, 3] {
                    attempts.push((raw(SOCKET, &format!("{family},{kind},0")), EPERM));
                }
            }
            let host = address.to_string();
            let attempts: Vec<(Vec<&str>, &str)> = attempts
                .iter()
                .map(|(args, expected)| (args.iter().map(String::as_str).collect(), *expected))
                .collect();
            let mut attempts: Vec<(&[&str], &str)> =
                attempts.iter().map(|(args, expected)| (args.as_slice(), *expected)).collect();
            // Landlock has rules for TCP from its version 4 on. Before it the namespace alone holds: nobody else is in it,
            // and there is no way out of it.
            let rules = landlock >= 4;
            let or = |with, without| if rules { with } else { without };
            let connects: [(&[&str], &str); 9] = [
                (&["fastopen", "3128"], EPERM),
                (&["tcp", "127.0.0.1:3128"], "ok"),
                (&["tcp", &host], or(EACCES, ECONNREFUSED)),
                (&["tcp", "169.254.169.254:80"], or(EACCES, ENETUNREACH)),
                (&["tcp", "192.0.2.1:443"], or(EACCES, ENETUNREACH)),
                // At the one port that Landlock lets through, there is no way to anywhere.
                (&["tcp", "192.0.2.1:3128"], ENETUNREACH),
                (&["tcp", "[2001:db8::1]:3128"], ENETUNREACH),
                (&["tcp-bind", "127.0.0.1:0"], or(EACCES, "ok")),
                // Landlock lets it listen where the kernel chooses, and nobody, itself included, connect to it.
                (&["listen-unbound"], or("ok then 13", "ok then ok")),
            ];
            attempts.extend(connects);
            expect(&mut harness, &[Grant::Egress], &attempts);
        }
    }
}

/// The supervisor accepts, in the plugin's namespace, what the plugin dials; the next supervisor gets the same socket.
#[test]
fn who_dials_the_proxy_is_the_plugin() {
    for as_ in As::possible() {
        let mut harness = Harness::start_listening(as_, Linger::Forever);
        let mut request =
            harness.request(&["env", "tcp-say", "127.0.0.1:3128", "hello", "tcp-say", "127.0.0.1:3128", "again"]);
        request.grants = vec![Grant::Egress];
        let plugin = harness.launch(request);
        let serve = |socket: OwnedFd, wanted: &[u8]| {
            assert!(wait_readable(socket.as_fd(), Instant::now() + patience()), "it dials");
            let listener = TcpListener::from(socket);
            let (mut stream, from) = listener.accept().expect("a connection");
            assert!(from.ip().is_loopback());
            stream.set_nonblocking(false).expect("waits");
            let mut bytes = vec![0; wanted.len()];
            stream.read_exact(&mut bytes).expect("what it says");
            assert_eq!(bytes, wanted);
            stream.write_all(b"heard").expect("answers");
        };
        let launch = plugin.launched.launch;
        serve(plugin.egress.expect("its socket"), b"hello");
        let mut stdout = plugin.stdout;
        drop((plugin.pidfd, plugin.broker, plugin.worker, plugin.stderr));
        harness.disconnect();
        harness.connect();
        let (_, [text, _], again) = harness.reattach(launch);
        serve(again.expect("it is up").egress.expect("the same socket"), b"again");
        let text = text + &read_all(&mut stdout);
        assert!(text.ends_with("tcp-say heard\ntcp-say heard\n"), "{text}");
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            assert!(text.contains(&format!("{variable}=http://127.0.0.1:3128")), "{variable}: {text}");
        }
        assert_eq!(harness.exit_of(launch), (Exit::Code(0), false));
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn other_gates_into_the_kernel_kill() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        // getpid by its x32 number, and by the 32-bit gate.
        for args in [&["raw", "0x40000027", "0"][..], &["int80"][..]] {
            let request = harness.request(args);
            let plugin = harness.launch(request);
            assert_eq!(harness.exit_of(plugin.launched.launch).0, Exit::Signal(SIGSYS), "{args:?}");
        }
    }
}

#[test]
fn temp_is_there_only_when_granted() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        expect(&mut harness, &[], &[(&["append", "/tmp/x"], EROFS)]);
        expect(
            &mut harness,
            &[Grant::WriteTemp],
            &[
                (&["append", "/tmp/x"], "ok"),
                (&["list", "/tmp"], "x"),
                (&["copy-exec", "/tmp/program"], EACCES),
                (&["bind", "/tmp/socket"], EACCES),
                (&["fill", "/tmp/big"], "63 MiB then 28"),
            ],
        );
        // Another launch has another one.
        expect(&mut harness, &[Grant::WriteTemp], &[(&["list", "/tmp"], "")]);
    }
}

#[test]
fn rlimits_hold() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let lines = harness.attempt(
            |launch| {
                launch.grants = vec![Grant::WriteTemp];
                launch.limits.file_size_bytes = Some(1 << 20);
                launch.limits.open_files = Some(64);
            },
            &["ignore-xfsz", "fill", "/tmp/big", "open-many"],
        );
        let results: Vec<&str> = lines.iter().map(|(_, result)| result.as_str()).collect();
        // EFBIG, and EMFILE with the 64th number.
        assert_eq!(results, ["ok", "1 MiB then 27", "60 then 24"], "{as_:?}");
        // The least that may be asked for, also when the launcher itself has many more open.
        for _ in 0..8 {
            let request = harness.request(&["pause"]);
            harness.launch(request);
        }
        let lines =
            harness.attempt(|launch| launch.limits.open_files = Some(8), &["open-many", "cat", "/proc/self/limits"]);
        assert_eq!(lines[0].1, "4 then 24", "{as_:?}");
        // 1 and not 0, which a core handler of the host would not heed.
        let core = lines[1].1.split('|').find(|line| line.starts_with("Max core file size")).expect("the line");
        assert_eq!(core.split_whitespace().skip(4).collect::<Vec<_>>(), ["1", "1", "bytes"], "{as_:?}");
    }
}

mod libc_numbers {
    //! Numbers of system calls; a test program gets them as text.
    macro_rules! numbers {
        ($($name:ident $number:ident;)*) => { $(pub(super) const $name: i64 = libc::$number;)* };
    }
    numbers! {
        MOUNT SYS_mount; UNSHARE SYS_unshare; SETNS SYS_setns; CHROOT SYS_chroot; PIVOT_ROOT SYS_pivot_root;
        FSOPEN SYS_fsopen; CLONE SYS_clone; CLONE3 SYS_clone3; PTRACE SYS_ptrace; BPF SYS_bpf;
        PROCESS_VM_READV SYS_process_vm_readv; PERF_EVENT_OPEN SYS_perf_event_open; USERFAULTFD SYS_userfaultfd;
        ADD_KEY SYS_add_key; KEYCTL SYS_keyctl; IO_URING_SETUP SYS_io_uring_setup; IO_SETUP SYS_io_setup; SETUID SYS_setuid;
        OPEN_BY_HANDLE_AT SYS_open_by_handle_at; FINIT_MODULE SYS_finit_module; KEXEC_LOAD SYS_kexec_load;
        SOCKET SYS_socket; SENDTO SYS_sendto; SENDMSG SYS_sendmsg; SENDMMSG SYS_sendmmsg; SHMGET SYS_shmget; MQ_OPEN SYS_mq_open; PERSONALITY SYS_personality; PRLIMIT64 SYS_prlimit64;
        PRCTL SYS_prctl; MEMFD_CREATE SYS_memfd_create; IOCTL SYS_ioctl; SOCKETPAIR SYS_socketpair;
    }
}
