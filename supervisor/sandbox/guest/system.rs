//! The system calls that the guest's init makes beside those of the standard library, and all of its `unsafe`.
//!
//! By their declarations in the C library: this program is built by itself, without any crate.

use std::{
    ffi::{CStr, CString, c_char, c_int, c_ulong, c_void},
    fs::File,
    io,
    net::TcpStream,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use super::relay::{BUFFER, Poll};

/// Flags of mount(2).
pub(crate) const NO_SUID: u64 = 2;
pub(crate) const NO_DEVICES: u64 = 4;
pub(crate) const NO_EXEC: u64 = 8;

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn poll(fds: *mut Poll, count: c_ulong, timeout: c_int) -> c_int;
    fn fork() -> c_int;
    fn execve(path: *const c_char, argv: *const *const c_char, envp: *const *const c_char) -> c_int;
    fn _exit(status: c_int) -> !;
    fn dup2(from: c_int, to: c_int) -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn setresgid(real: u32, effective: u32, saved: u32) -> c_int;
    fn setresuid(real: u32, effective: u32, saved: u32) -> c_int;
    fn setsid() -> c_int;
    fn prctl(option: c_int, a: c_ulong, b: c_ulong, c: c_ulong, d: c_ulong) -> c_int;
    fn setrlimit(resource: c_int, limit: *const Limit) -> c_int;
    fn sigprocmask(how: c_int, set: *const Signals, old: *mut Signals) -> c_int;
    fn signalfd(fd: c_int, set: *const Signals, flags: c_int) -> c_int;
    fn signal(number: c_int, handler: usize) -> usize;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn kill(pid: c_int, number: c_int) -> c_int;
    fn reboot(how: c_int) -> c_int;
    fn syscall(number: c_ulong, ...) -> c_ulong;
    fn inotify_init1(flags: c_int) -> c_int;
    fn inotify_add_watch(fd: c_int, path: *const c_char, mask: u32) -> c_int;
    fn socket(family: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn connect(fd: c_int, address: *const Address, length: u32) -> c_int;
    fn setsockopt(fd: c_int, level: c_int, option: c_int, value: *const c_void, length: u32) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, ...) -> c_int;
    fn umask(mask: u32) -> u32;
}

/// `SOL_SOCKET`.
const SOCKET: c_int = 1;

#[repr(C)]
struct Limit {
    current: u64,
    most: u64,
}

/// `struct sockaddr_in`: port and address have their highest byte first.
#[repr(C)]
struct Address {
    family: u16,
    port: [u8; 2],
    address: [u8; 4],
    zero: [u8; 8],
}

impl Address {
    const LENGTH: u32 = 16;
}

const _: () = assert!(size_of::<Address>() == 16 && size_of::<Linger>() == 8);

/// `struct linger`.
#[repr(C)]
struct Linger {
    on: c_int,
    seconds: c_int,
}

impl Linger {
    const LENGTH: u32 = 8;
}

/// `sigset_t`: 1024 bits, the first signal is bit 0.
#[repr(C)]
struct Signals([u64; 16]);

fn done(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass only numbers that a system call has just returned as a new descriptor, owned by nothing else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Mounts a file system of this kind.
pub(crate) fn mounted(kind: &CStr, target: &CStr, flags: c_ulong, data: &CStr) -> io::Result<()> {
    // SAFETY: all are C strings that outlive the call.
    done(unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), flags, data.as_ptr().cast()) }).map(drop)
}

/// Waits for one of these, or for so long.
pub(crate) fn wait(polls: &mut [Poll], most: Option<Duration>) -> io::Result<()> {
    // The next whole millisecond, so that nobody asks in vain.
    let most = most.map_or(-1, |most| c_int::try_from(most.as_millis() + 1).unwrap_or(c_int::MAX));
    // SAFETY: polls is a valid array of struct pollfd of that length, for the time of the call.
    match done(unsafe { poll(polls.as_mut_ptr(), polls.len() as c_ulong, most) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// A descriptor that is readable when a child has ended.
pub(crate) fn children() -> io::Result<OwnedFd> {
    const BLOCK: c_int = 0;
    const CHILD: u32 = 17;
    const CLOSE_ON_EXEC: c_int = 0o2_000_000;
    const NOT_WAITING: c_int = 0o4000;
    let mut set = Signals([0; 16]);
    set.0[0] = 1 << (CHILD - 1);
    // SAFETY: set is a valid signal set; a null old set is allowed.
    done(unsafe { sigprocmask(BLOCK, &raw const set, ptr::null_mut()) })?;
    // SAFETY: set is a valid signal set that outlives the call.
    done(unsafe { signalfd(-1, &raw const set, CLOSE_ON_EXEC | NOT_WAITING) }).map(owned)
}

/// How a child ended: its number, whether by a signal, and the status or signal. `None` when none has.
pub(crate) fn reap() -> Option<(i32, bool, i32)> {
    const NOT_WAITING: c_int = 1;
    let mut status = 0;
    // SAFETY: status is a valid int for the time of the call.
    let pid = unsafe { waitpid(-1, &raw mut status, NOT_WAITING) };
    let by_signal = status & 0x7f != 0;
    (pid > 0).then_some((pid, by_signal, if by_signal { status & 0x7f } else { (status >> 8) & 0xff }))
}

/// Sends a signal; -1 is everybody but this process.
pub(crate) fn send_signal(pid: i32, number: i32) {
    // SAFETY: kill takes numbers only. It fails when nobody is left, which is as well.
    unsafe { kill(pid, number) };
}

/// Ends the machine.
pub(crate) fn power_off() -> ! {
    const RESTART: c_int = 0x0123_4567;
    // SAFETY: reboot takes a number. QEMU is told not to start again, so that this ends it.
    unsafe { reboot(RESTART) };
    // SAFETY: the end of the first process is a panic of the kernel, which ends the machine as well.
    unsafe { _exit(1) }
}

/// Loads a module of the kernel.
pub(crate) fn load_module(file: &File) -> io::Result<()> {
    const FINIT_MODULE: c_ulong = 313;
    // SAFETY: the call takes a descriptor, a C string and a number.
    let result = unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A descriptor that is readable when a file was made in this directory.
pub(crate) fn watch(directory: &CStr) -> io::Result<File> {
    const CLOSE_ON_EXEC: c_int = 0o2_000_000;
    const CREATED: u32 = 0x100;
    // SAFETY: the call takes a number.
    let watcher = owned(done(unsafe { inotify_init1(CLOSE_ON_EXEC) })?);
    // SAFETY: the path is a C string that outlives the call.
    done(unsafe { inotify_add_watch(watcher.as_raw_fd(), directory.as_ptr(), CREATED) })?;
    Ok(watcher.into())
}

/// Brings the loopback interface up.
pub(crate) fn raise_loopback() -> io::Result<()> {
    /// `struct ifreq`: a name, and as the first of its union the flags.
    #[repr(C)]
    struct Request {
        name: [u8; 16],
        flags: i16,
        rest: [u8; 22],
    }
    const UP: i16 = 1;
    const SET_FLAGS: c_ulong = 0x8914;
    // SAFETY: socket takes numbers: AF_INET, SOCK_DGRAM.
    let socket = owned(done(unsafe { socket(2, 2, 0) })?);
    let mut request = Request { name: [0; 16], flags: UP, rest: [0; 22] };
    request.name[..2].copy_from_slice(b"lo");
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq, which request is, and outlives the call.
    done(unsafe { ioctl(socket.as_raw_fd(), SET_FLAGS, &raw const request) }).map(drop)
}

/// To a port of 127.0.0.1. Never waits: until it is connected, nothing can be read or written, and where nobody listens it is
/// broken off. Its buffers do not grow: they are in the memory of the guest's kernel, and who connects decides what lies there.
pub(crate) fn connect_inside(port: u16) -> io::Result<TcpStream> {
    const INTERNET: c_int = 2;
    /// `SOCK_STREAM`, `SOCK_CLOEXEC` and `SOCK_NONBLOCK`.
    const KIND: c_int = 1 | 0o2_000_000 | 0o4000;
    const IN_PROGRESS: i32 = 115;
    const SEND_BUFFER: c_int = 7;
    const RECEIVE_BUFFER: c_int = 8;
    let address = Address { family: 2, port: port.to_be_bytes(), address: [127, 0, 0, 1], zero: [0; 8] };
    // SAFETY: socket takes numbers.
    let socket = owned(done(unsafe { socket(INTERNET, KIND, 0) })?);
    let bytes: u32 = BUFFER;
    for buffer in [SEND_BUFFER, RECEIVE_BUFFER] {
        let (fd, value) = (socket.as_raw_fd(), (&raw const bytes).cast());
        // SAFETY: value is an int of four bytes, and outlives the call.
        done(unsafe { setsockopt(fd, SOCKET, buffer, value, 4) })?;
    }
    // SAFETY: address is a struct sockaddr_in of that length, and outlives the call.
    match done(unsafe { connect(socket.as_raw_fd(), &raw const address, Address::LENGTH) }) {
        Err(error) if error.raw_os_error() != Some(IN_PROGRESS) => return Err(error),
        _ => {}
    }
    let socket = TcpStream::from(socket);
    // The kernel chose its own port when it was asked to connect. Where nobody listens that may be this very port, and then it is
    // connected to itself.
    if socket.local_addr()?.port() == port { Err(io::ErrorKind::ConnectionRefused.into()) } else { Ok(socket) }
}

/// Has the other end told by a reset when this one is closed.
pub(crate) fn break_off(socket: &TcpStream) {
    const LINGER: c_int = 13;
    let at_once = Linger { on: 1, seconds: 0 };
    let value = (&raw const at_once).cast();
    // SAFETY: value is a struct linger of that length, and outlives the call. One that it fails for is closed without.
    unsafe { setsockopt(socket.as_raw_fd(), SOCKET, LINGER, value, Linger::LENGTH) };
}

/// What becomes a program.
pub(crate) struct Program<'a> {
    pub(crate) argv: &'a [CString],
    pub(crate) envp: &'a [CString],
    pub(crate) user: u32,
    /// `RLIMIT_NOFILE` and, where there is one, `RLIMIT_FSIZE`.
    pub(crate) open_files: u64,
    pub(crate) file_size: Option<u64>,
    pub(crate) stdin: RawFd,
    pub(crate) stdout: RawFd,
    pub(crate) stderr: RawFd,
    /// The worker socket that it inherits as descriptor 3.
    pub(crate) worker: Option<RawFd>,
    /// Where it begins.
    pub(crate) directory: &'a str,
    /// Its cgroup's member list.
    pub(crate) group: &'a str,
}

/// Starts a program; its number. Called while there is one thread, so that the child may do what it likes.
pub(crate) fn start(program: &Program<'_>) -> io::Result<i32> {
    // SAFETY: this process has one thread, so that nothing that the child uses is locked by another one.
    match done(unsafe { fork() })? {
        0 => {
            let error = become_program(program);
            eprintln!("plugvisor: the guest cannot execute {:?}: {error}", program.argv.first());
            // SAFETY: the child ends without running what its parent registered.
            unsafe { _exit(127) }
        }
        pid => Ok(pid),
    }
}

/// Returns why it could not.
fn become_program(program: &Program<'_>) -> io::Error {
    match prepare(program) {
        Err(error) => error,
        Ok(envp) => {
            let pointers = |strings: &[CString]| -> Vec<*const c_char> {
                strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect()
            };
            let (argv, envp_pointers) = (pointers(program.argv), pointers(&envp));
            let Some(path) = program.argv.first() else { return io::ErrorKind::InvalidInput.into() };
            // SAFETY: path is a C string; both arrays end in a null pointer and point at C strings that outlive the call.
            unsafe { execve(path.as_ptr(), argv.as_ptr(), envp_pointers.as_ptr()) };
            io::Error::last_os_error()
        }
    }
}

fn prepare(program: &Program<'_>) -> io::Result<Vec<CString>> {
    const NOFILE: c_int = 7;
    const FSIZE: c_int = 1;
    const CORE: c_int = 4;
    const NO_NEW_PRIVS: c_int = 38;
    const SET_MASK: c_int = 2;
    const LIFTED: RawFd = 100;
    const CLOSE_RANGE: c_ulong = 436;
    std::fs::write(program.group, "0")?;
    std::env::set_current_dir(program.directory)?;
    // SAFETY: setsid takes nothing.
    done(unsafe { setsid() })?;
    // Lifted first, so that placing one cannot close another.
    let ends = [Some(program.stdin), Some(program.stdout), Some(program.stderr), program.worker];
    for (from, lifted) in ends.iter().zip(LIFTED..) {
        if let Some(from) = from {
            // SAFETY: dup2 takes numbers; nothing of this process is above 100.
            done(unsafe { dup2(*from, lifted) })?;
        }
    }
    for ((from, lifted), to) in ends.iter().zip(LIFTED..).zip(0..) {
        if from.is_some() {
            // SAFETY: dup2 takes numbers; what they stood for in the parent is not used here any more.
            done(unsafe { dup2(lifted, to) })?;
        }
    }
    let first = if program.worker.is_some() { 4_u32 } else { 3 };
    // SAFETY: close_range takes numbers; nothing above is used any more.
    unsafe { syscall(CLOSE_RANGE, first, u32::MAX, 0) };
    for (resource, limit) in [(NOFILE, Some(program.open_files)), (FSIZE, program.file_size), (CORE, Some(0))] {
        let Some(most) = limit else { continue };
        let limit = Limit { current: most, most };
        // SAFETY: limit is a struct rlimit that outlives the call.
        done(unsafe { setrlimit(resource, &raw const limit) })?;
    }
    // SAFETY: no groups are read for a count of 0.
    done(unsafe { setgroups(0, ptr::null()) })?;
    // SAFETY: setresgid takes numbers.
    done(unsafe { setresgid(program.user, program.user, program.user) })?;
    // SAFETY: setresuid takes numbers. Capabilities go with it.
    done(unsafe { setresuid(program.user, program.user, program.user) })?;
    // SAFETY: PR_SET_NO_NEW_PRIVS takes numbers.
    done(unsafe { prctl(NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: umask takes a number.
    unsafe { umask(if program.worker.is_some() { 0o022 } else { 0 }) };
    // SAFETY: signal takes a number and SIG_DFL: the standard library has left SIGPIPE ignored.
    unsafe { signal(13, 0) };
    let none = Signals([0; 16]);
    // SAFETY: none is a valid signal set; a null old set is allowed.
    done(unsafe { sigprocmask(SET_MASK, &raw const none, ptr::null_mut()) })?;
    let mut envp = program.envp.to_vec();
    if program.worker.is_some() {
        // sd_listen_fds(3) compares it with its own number.
        envp.extend(CString::new(format!("LISTEN_PID={}", std::process::id())));
    }
    Ok(envp)
}
