//! The attempts of the escape suite (`tests/escape`) that need more than one plain system call. Each gives `ok` when it
//! succeeded, else the errno's number or a text. Every bomb has a fuse: a bound in its arguments that the machine survives
//! when no wall stops it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{
            fs::{PermissionsExt, symlink},
            net::UnixStream,
            process::CommandExt,
        },
    },
    process::Command,
    ptr,
};

use super::{io as told, number, result, sys};

/// What the victim keeps in its memory.
static MARK: [u8; 8] = *b"victim's";

/// Makes the attempt of this name; `None` when there is none.
pub(crate) fn attempt(name: &str, next: &mut dyn FnMut() -> String) -> Option<String> {
    let told = match name {
        "open" => told(File::open(next())),
        "open-write" => told(OpenOptions::new().write(true).open(next())),
        "follow" => follow(&next(), &next()),
        "victim" => victim(number(&next())),
        "vm-read" => vm_read(number(&next()), number(&next())),
        "fchdir-leaked" => fchdir_leaked(),
        "udp-route" => {
            let to = next();
            told(UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect((to.as_str(), 80))))
        }
        "udp-send" => {
            let to = local(&next());
            told(UdpSocket::bind("127.0.0.1:0").and_then(|socket| socket.send_to(b"secret", to)))
        }
        "fast-open" => told(fast_open(local(&next()))),
        "listen-only" => told(listen_only()),
        "clone3-user" => clone3_user(),
        "setns-own" => told(
            File::open("/proc/self/ns/net")
                .and_then(|own| call(libc::SYS_setns, [own.as_raw_fd().into(), libc::CLONE_NEWNET.into(), 0, 0, 0, 0])),
        ),
        "private-mounts" => told(private_mounts()),
        "mount-tmpfs" => {
            let (kind, place) = (c"tmpfs", text(&next()));
            sys(libc::SYS_mount, [at(kind.as_ptr()), at(place.as_ptr()), at(kind.as_ptr()), 0, 0, 0])
        }
        "fsopen" => sys(libc::SYS_fsopen, [at(c"tmpfs".as_ptr()), 0, 0, 0, 0, 0]),
        "chroot" => sys(libc::SYS_chroot, [at(text(&next()).as_ptr()), 0, 0, 0, 0, 0]),
        "by-handle" => told(by_handle(&next())),
        "mknod" => {
            let path = text(&next());
            // The null device.
            sys(libc::SYS_mknod, [at(path.as_ptr()), i64::from(libc::S_IFCHR | 0o600), 0x103, 0, 0, 0])
        }
        "append-pid" => {
            let group = OpenOptions::new().append(true).open(next());
            told(group.and_then(|mut group| group.write_all(std::process::id().to_string().as_bytes())))
        }
        "io-uring" => {
            let mut parameters = [0_u8; 120];
            sys(libc::SYS_io_uring_setup, [1, at(parameters.as_mut_ptr()), 0, 0, 0, 0])
        }
        "bpf" => {
            // BPF_MAP_CREATE of an array of one number.
            let map: [u32; 32] = std::array::from_fn(|field| [2, 4, 4, 1].get(field).copied().unwrap_or(0));
            sys(libc::SYS_bpf, [0, at(map.as_ptr()), 128, 0, 0, 0])
        }
        "perf" => {
            // The kernel's own cycles, of this process.
            let mut event = [0_u8; 136];
            event[0] = 1;
            event[4] = 136;
            sys(libc::SYS_perf_event_open, [at(event.as_ptr()), 0, -1, -1, 0, 0])
        }
        "add-key" => sys(
            libc::SYS_add_key,
            [
                at(c"user".as_ptr()),
                at(c"plugvisor-escape".as_ptr()),
                at(MARK.as_ptr()),
                8,
                // The process's own keyring.
                -2,
                0,
            ],
        ),
        "shm-find" => sys(libc::SYS_shmget, [number(&next()), 0, 0, 0, 0, 0]),
        "message-queue" => message_queue(),
        "memfd-say" => told::<()>(Err(memfd_say(number(&next())))),
        "copy-say" => copy_say(&next()),
        "say" => next(),
        "exec-say" => told::<()>(Err(Command::new(next()).args(["say", "ok"]).exec())),
        // Executes a copy of this program that is set-uid root.
        "set-uid" => told::<()>(Err(Command::new(next()).arg("rules").exec())),
        "rules" => {
            // SAFETY: takes nothing.
            let uid = unsafe { libc::geteuid() };
            if uid == 0 { "ok".to_owned() } else { libc::EPERM.to_string() }
        }
        "type-into-terminal" => type_into_terminal(number(&next())),
        "memfd-fill" => memfd_fill(number(&next()), number(&next())),
        "fill-up-to" => fill_up_to(&next(), number(&next())),
        "spin" => spin(number(&next())),
        "sparse" => {
            let path = next();
            let grown = File::create(&path).and_then(|file| file.set_len(10 << 30));
            drop(fs::remove_file(path));
            told(grown)
        }
        "inodes" => inodes(&next(), number(&next())),
        "open-up-to" => open_up_to(number(&next())),
        "queue-descriptors" => queue_descriptors(number(&next())),
        "raise-limit" => raise_limit(),
        "set-limit" => set_limit(),
        // PRIO_PROCESS.
        "renice" => sys(libc::SYS_setpriority, [0, number(&next()), 19, 0, 0, 0]),
        "hurry" => sys(libc::SYS_setpriority, [0, 0, -5, 0, 0, 0]),
        "sees-socket" => {
            let name = next();
            match fs::read_to_string("/proc/self/net/unix") {
                Ok(sockets) if sockets.contains(&name) => "ok".to_owned(),
                Ok(_) => "not among its sockets".to_owned(),
                Err(error) => told::<()>(Err(error)),
            }
        }
        "sees-host-name" => compare(&super::host_name(), &next()),
        "sees-group" => {
            let name = next();
            let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
            if groups.contains(&name) { "ok".to_owned() } else { "its own group is the root".to_owned() }
        }
        "gate32" => {
            let told = super::int80();
            if told == std::process::id().to_string() { "ok".to_owned() } else { told }
        }
        "signal-child" => signal_child(&next()),
        "signal-self" => signal_self(&next()),
        "handle-signal" => handle_signal(),
        "daemon" => daemon(),
        "deaf" => {
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                // SAFETY: SIG_IGN is a valid disposition.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
            "ok".to_owned()
        }
        _ => return None,
    };
    Some(told)
}

/// Sends SIGTERM to a child of its own in one of several ways; `ok` when the child ended by it.
fn signal_child(way: &str) -> String {
    // SAFETY: this program has one thread.
    let child = unsafe { libc::fork() };
    match child {
        0 => loop {
            sys(libc::SYS_pause, [0; 6]);
        },
        -1 => return told::<()>(Err(io::Error::last_os_error())),
        _ => {}
    }
    let (pid, signal) = (i64::from(child), i64::from(libc::SIGTERM));
    // siginfo_t with SI_QUEUE, which one may send to others.
    let mut info = [0_i32; 32];
    (info[0], info[2]) = (libc::SIGTERM, -1);
    let info = at(info.as_ptr());
    let sent = match way {
        "kill" => call(libc::SYS_kill, [pid, signal, 0, 0, 0, 0]),
        "tgkill" => call(libc::SYS_tgkill, [pid, pid, signal, 0, 0, 0]),
        "tkill" => call(libc::SYS_tkill, [pid, signal, 0, 0, 0, 0]),
        "queue" => call(libc::SYS_rt_sigqueueinfo, [pid, signal, info, 0, 0, 0]),
        "queue-thread" => call(libc::SYS_rt_tgsigqueueinfo, [pid, pid, signal, info, 0, 0]),
        "pidfd" => call(libc::SYS_pidfd_open, [pid, 0, 0, 0, 0, 0])
            .and_then(|process| call(libc::SYS_pidfd_send_signal, [process, signal, 0, 0, 0, 0])),
        "owner" => owner_signal(pid, signal),
        other => panic!("no way {other}"),
    };
    if sent.is_err() {
        return told(sent);
    }
    let mut status = 0_i32;
    let waited = call(libc::SYS_wait4, [pid, at(&raw mut status), 0, 0, 0, 0]);
    match waited {
        Ok(_) if libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGTERM => "ok".to_owned(),
        Ok(_) => format!("the child ended with {status}"),
        Err(_) => told(waited),
    }
}

/// Has a socket's readiness send the signal.
fn owner_signal(pid: i64, signal: i64) -> io::Result<i64> {
    let (ours, mut theirs) = UnixStream::pair()?;
    let fd = i64::from(ours.as_raw_fd());
    let control = |command: i32, value: i64| call(libc::SYS_fcntl, [fd, command.into(), value, 0, 0, 0]);
    // F_SETSIG.
    control(10, signal)?;
    control(libc::F_SETOWN, pid)?;
    control(libc::F_SETFL, (libc::O_ASYNC | libc::O_NONBLOCK).into())?;
    theirs.write_all(b"x")?;
    Ok(0)
}

/// Sends signal 0 to itself in one of several ways.
fn signal_self(way: &str) -> String {
    let pid = i64::from(std::process::id());
    let thread = call(libc::SYS_gettid, [0; 6]).expect("its number");
    match way {
        "kill" => sys(libc::SYS_kill, [pid, 0, 0, 0, 0, 0]),
        "tgkill" => sys(libc::SYS_tgkill, [pid, thread, 0, 0, 0, 0]),
        "tkill" => sys(libc::SYS_tkill, [thread, 0, 0, 0, 0, 0]),
        "owner" => told(UnixStream::pair().and_then(|(ours, _)| {
            call(libc::SYS_fcntl, [ours.as_raw_fd().into(), libc::F_SETOWN.into(), pid, 0, 0, 0])
        })),
        other => panic!("no way {other}"),
    }
}

/// Raises a signal that it handles, as every runtime does.
fn handle_signal() -> String {
    static HANDLED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    extern "C" fn handler(_: i32) {
        HANDLED.store(true, std::sync::atomic::Ordering::SeqCst);
    }
    // SAFETY: the handler only stores to an atomic.
    unsafe { libc::signal(libc::SIGUSR1, handler as *const () as libc::sighandler_t) };
    // SAFETY: raise takes a number.
    let raised = unsafe { libc::raise(libc::SIGUSR1) };
    let handled = HANDLED.load(std::sync::atomic::Ordering::SeqCst);
    if raised == 0 && handled { "ok".to_owned() } else { format!("raised {raised}, handled {handled}") }
}

/// Leaves a daemon behind that says its number: forked twice, in a session of its own.
fn daemon() -> String {
    // SAFETY: this program has one thread.
    match unsafe { libc::fork() } {
        0 => {
            sys(libc::SYS_setsid, [0; 6]);
            // SAFETY: as above.
            if unsafe { libc::fork() } == 0 {
                println!("daemon-is {}", std::process::id());
                loop {
                    sys(libc::SYS_pause, [0; 6]);
                }
            }
            std::process::exit(0);
        }
        -1 => told::<()>(Err(io::Error::last_os_error())),
        _ => "ok".to_owned(),
    }
}

fn compare(seen: &str, host: &str) -> String {
    if seen == host { "ok".to_owned() } else { "its own".to_owned() }
}

fn local(port: &str) -> SocketAddr {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port.parse().expect("a port")).into()
}

fn text(path: &str) -> std::ffi::CString {
    std::ffi::CString::new(path).expect("no NUL")
}

/// A pointer as a system call's argument. What it points to must outlive the call.
fn at<T>(pointer: *const T) -> i64 {
    (pointer as u64).cast_signed()
}

fn call(number: i64, arguments: [i64; 6]) -> io::Result<i64> {
    result(number, arguments)
}

fn opened(number: i64) -> OwnedFd {
    // SAFETY: the kernel has just given this number to the caller, who gives it to nobody else.
    unsafe { OwnedFd::from_raw_fd(RawFd::try_from(number).expect("a descriptor")) }
}

/// A symlink in a directory that it may write, to a file that it may not read.
fn follow(link: &str, target: &str) -> String {
    drop(fs::remove_file(link));
    match symlink(target, link) {
        Ok(()) => {
            let read = told(fs::read(link));
            drop(fs::remove_file(link));
            read
        }
        Err(error) => format!("no link: {error}"),
    }
}

/// Says where its secret is, makes shared memory under this key, and waits for the end of its input.
fn victim(key: i64) -> String {
    let shared = result(libc::SYS_shmget, [key, 4096, i64::from(libc::IPC_CREAT | libc::IPC_EXCL | 0o666), 0, 0, 0]);
    println!("victim {} {}", at(MARK.as_ptr()), shared.is_ok());
    drop(io::stdin().read_to_end(&mut Vec::new()));
    if let Ok(shared) = shared {
        sys(libc::SYS_shmctl, [shared, libc::IPC_RMID.into(), 0, 0, 0, 0]);
    }
    // Nobody reads what it would say.
    std::process::exit(0)
}

fn vm_read(pid: i64, address: i64) -> String {
    let mut read = [0_u8; 8];
    let local = libc::iovec { iov_base: read.as_mut_ptr().cast(), iov_len: 8 };
    let there =
        libc::iovec { iov_base: ptr::without_provenance_mut(usize::try_from(address).unwrap_or(0)), iov_len: 8 };
    let told = sys(libc::SYS_process_vm_readv, [pid, at(&raw const local), 1, at(&raw const there), 1, 0]);
    if told == "ok" && read != MARK { "other bytes".to_owned() } else { told }
}

/// Whether any descriptor beside the standard ones leads to a directory; else how they refuse.
fn fchdir_leaked() -> String {
    let mut refused = libc::EBADF.to_string();
    for fd in 3..1024 {
        match sys(libc::SYS_fchdir, [fd, 0, 0, 0, 0, 0]) {
            told if told == "ok" => return told,
            told if told == libc::EBADF.to_string() => {}
            told => refused = told,
        }
    }
    refused
}

fn fast_open(to: SocketAddr) -> io::Result<i64> {
    let socket = opened(call(libc::SYS_socket, [2, 1, 0, 0, 0, 0])?);
    let mut address = [0_u8; 16];
    address[0] = 2;
    address[2..4].copy_from_slice(&to.port().to_be_bytes());
    address[4..8].copy_from_slice(&[127, 0, 0, 1]);
    let arguments =
        [socket.as_raw_fd().into(), at(MARK.as_ptr()), 8, libc::MSG_FASTOPEN.into(), at(address.as_ptr()), 16];
    call(libc::SYS_sendto, arguments)
}

fn listen_only() -> io::Result<i64> {
    let socket = opened(call(libc::SYS_socket, [2, 1, 0, 0, 0, 0])?);
    call(libc::SYS_listen, [socket.as_raw_fd().into(), 1, 0, 0, 0, 0])
}

fn clone3_user() -> String {
    let arguments: [u64; 11] = std::array::from_fn(|field| match field {
        0 => libc::CLONE_NEWUSER.unsigned_abs().into(),
        4 => libc::SIGCHLD.unsigned_abs().into(),
        _ => 0,
    });
    match result(libc::SYS_clone3, [at(arguments.as_ptr()), 88, 0, 0, 0, 0]) {
        Ok(0) => std::process::exit(0),
        made => told(made),
    }
}

fn private_mounts() -> io::Result<i64> {
    call(libc::SYS_unshare, [libc::CLONE_NEWNS.into(), 0, 0, 0, 0, 0])?;
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    call(libc::SYS_mount, [0, at(c"/".as_ptr()), 0, flags.cast_signed(), 0, 0])
}

fn by_handle(path: &str) -> io::Result<i64> {
    // struct file_handle: the room for the handle, its type, the handle.
    let mut handle = [0_u8; 136];
    handle[0] = 128;
    let (path, mut mount) = (text(path), 0_i32);
    let here = i64::from(libc::AT_FDCWD);
    let name = [here, at(path.as_ptr()), at(handle.as_mut_ptr()), at(&raw mut mount), 0, 0];
    call(libc::SYS_name_to_handle_at, name)?;
    call(libc::SYS_open_by_handle_at, [here, at(handle.as_ptr()), libc::O_RDONLY.into(), 0, 0, 0])
}

fn message_queue() -> String {
    let name = text(&format!("plugvisor-escape-{}", std::process::id()));
    let flags = i64::from(libc::O_CREAT | libc::O_RDWR);
    let made = sys(libc::SYS_mq_open, [at(name.as_ptr()), flags, 0o600, 0, 0, 0]);
    if made == "ok" {
        sys(libc::SYS_mq_unlink, [at(name.as_ptr()), 0, 0, 0, 0, 0]);
    }
    made
}

/// A copy of this program, in a memory file with these flags, takes its place and says so. Gives why not.
fn memfd_say(flags: i64) -> io::Error {
    let made = || {
        let mut file = File::from(opened(call(libc::SYS_memfd_create, [at(c"x".as_ptr()), flags, 0, 0, 0, 0])?));
        file.write_all(&fs::read("/proc/self/exe")?)?;
        // Executing what is open for writing is ETXTBSY, so it is opened anew and the first one closed.
        let again = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        drop(file);
        let words = [c"walled", c"say", c"ok"];
        let argv: Vec<*const libc::c_char> = words.iter().map(|word| word.as_ptr()).chain([ptr::null()]).collect();
        let none: [*const libc::c_char; 1] = [ptr::null()];
        let empty = libc::AT_EMPTY_PATH.into();
        let here = [again.as_raw_fd().into(), at(c"".as_ptr()), at(argv.as_ptr()), at(none.as_ptr()), empty, 0];
        call(libc::SYS_execveat, here)
    };
    made().map_or_else(|error| error, |_| io::ErrorKind::Other.into())
}

/// The same with a file at this path.
fn copy_say(path: &str) -> String {
    let made = fs::read("/proc/self/exe")
        .and_then(|bytes| fs::write(path, bytes))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)));
    match made {
        Ok(()) => told::<()>(Err(Command::new(path).args(["say", "ok"]).exec())),
        Err(error) => format!("not made: {error}"),
    }
}

/// TIOCSTI or TIOCLINUX to a terminal of its own where it can have one, else to its standard input.
fn type_into_terminal(request: i64) -> String {
    let terminal = OpenOptions::new().read(true).write(true).open("/dev/ptmx");
    let fd = terminal.as_ref().map_or(0, AsRawFd::as_raw_fd);
    sys(libc::SYS_ioctl, [fd.into(), request, at(c"x".as_ptr()), 0, 0, 0])
}

fn memfd_fill(mebibytes: i64, flags: i64) -> String {
    match call(libc::SYS_memfd_create, [at(c"x".as_ptr()), flags, 0, 0, 0, 0]) {
        Ok(file) => fill(&mut File::from(opened(file)), mebibytes),
        Err(error) => told::<()>(Err(error)),
    }
}

fn fill_up_to(path: &str, mebibytes: i64) -> String {
    let filled = match File::create(path) {
        Ok(mut file) => fill(&mut file, mebibytes),
        Err(error) => format!("not made: {error}"),
    };
    drop(fs::remove_file(path));
    filled
}

fn fill(file: &mut File, mebibytes: i64) -> String {
    let chunk = vec![1; 1 << 20];
    told((0..mebibytes).try_for_each(|_| file.write_all(&chunk)))
}

/// Keeps this many threads busy until it is killed. Says when they run.
fn spin(threads: i64) -> String {
    let mut running = Vec::new();
    for _ in 0..threads {
        match std::thread::Builder::new().spawn(forever) {
            Ok(thread) => running.push(thread),
            Err(error) => return told::<()>(Err(error)),
        }
    }
    println!("spin {}", running.len());
    for thread in running {
        drop(thread.join());
    }
    "over".to_owned()
}

fn forever() {
    loop {
        std::hint::spin_loop();
    }
}

/// Makes empty files until it fails or there are this many; removes them.
fn inodes(directory: &str, most: i64) -> String {
    let path = |number| format!("{directory}/plugvisor-escape-{number}");
    let mut failed = None;
    let mut made = 0;
    while made < most && failed.is_none() {
        match File::create(path(made)) {
            Ok(_) => made += 1,
            Err(error) => failed = Some(error),
        }
    }
    for number in 0..made {
        drop(fs::remove_file(path(number)));
    }
    failed.map_or_else(|| "ok".to_owned(), |error| told::<()>(Err(error)))
}

fn open_up_to(most: i64) -> String {
    let mut all = Vec::new();
    for _ in 0..most {
        match File::open("/dev/null") {
            Ok(file) => all.push(file),
            Err(error) => return told::<()>(Err(error)),
        }
    }
    "ok".to_owned()
}

/// Sends descriptors over a socket that nobody reads: they count for its user until they are read.
fn queue_descriptors(most: i64) -> String {
    let Ok((near, far)) = UnixStream::pair() else { return "no sockets".to_owned() };
    told((0..most).try_for_each(|_| send_descriptor(&near, far.as_raw_fd())))
}

fn send_descriptor(over: &UnixStream, fd: RawFd) -> io::Result<()> {
    // cmsghdr with one descriptor, by hand: its length, SOL_SOCKET, SCM_RIGHTS, the number, and padding.
    #[repr(C)]
    struct Control {
        length: usize,
        level: i32,
        kind: i32,
        fd: i32,
        padding: i32,
    }
    let mut control = Control { length: size_of::<Control>() - 4, level: 1, kind: 1, fd, padding: 0 };
    let mut byte = [0_u8];
    let mut data = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let message = libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: &raw mut data,
        msg_iovlen: 1,
        msg_control: (&raw mut control).cast(),
        msg_controllen: size_of::<Control>(),
        msg_flags: 0,
    };
    call(libc::SYS_sendmsg, [over.as_raw_fd().into(), at(&raw const message), libc::MSG_NOSIGNAL.into(), 0, 0, 0])
        .map(drop)
}

fn descriptors_limit() -> libc::rlimit64 {
    let mut limit = libc::rlimit64 { rlim_cur: 0, rlim_max: 0 };
    sys(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE.into(), 0, at(&raw mut limit), 0, 0]);
    limit
}

/// Above the hard limit, by the older call, which takes no process.
fn raise_limit() -> String {
    let mut limit = descriptors_limit();
    limit.rlim_max += 1;
    sys(libc::SYS_setrlimit, [libc::RLIMIT_NOFILE.into(), at(&raw const limit), 0, 0, 0, 0])
}

/// Within the limit, by the call that could also name another process.
fn set_limit() -> String {
    let limit = descriptors_limit();
    sys(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE.into(), at(&raw const limit), 0, 0, 0])
}
