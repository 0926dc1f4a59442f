//! The system calls that no safe crate wraps. Each function does one call and has no policy.
#![allow(unsafe_code, reason = "raw system calls, one operation per block, each with its reasons")]

use std::{
    ffi::{CStr, CString, c_char, c_void},
    io,
    marker::PhantomData,
    mem::size_of,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
    time::Duration,
};

use seccompiler::sock_filter;

use crate::machine;

/// Which side of [`clone3`] this is.
pub(crate) enum Cloned {
    /// The new process.
    Child,
    /// The old one.
    Parent {
        /// The new process.
        pidfd: OwnedFd,
        /// Its number in the caller's PID namespace.
        pid: i32,
    },
}

/// Forks with `CLONE_PIDFD` and these flags (`CLONE_NEW*`, `CLONE_FILES`), into this v2 cgroup directory if one is given.
///
/// The child has a copy of the caller's memory and of its one thread, as after fork(2). The launcher never has a second
/// thread, so no lock is held by a thread that the child lacks, and the child may allocate.
pub(crate) fn clone3(flags: u64, group: Option<BorrowedFd<'_>>) -> io::Result<Cloned> {
    const INTO_CGROUP: u64 = 0x2_0000_0000;
    let into = if group.is_some() { INTO_CGROUP } else { 0 };
    let mut pidfd: RawFd = -1;
    let mut args = libc::clone_args {
        flags: flags | into | u64::from(libc::CLONE_PIDFD.unsigned_abs()),
        pidfd: (&raw mut pidfd) as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: group.map_or(0, |group| group.as_raw_fd().unsigned_abs().into()),
    };
    // SAFETY: args is a valid clone_args that outlives the call; without CLONE_VM and with no stack the child runs on
    // its own copy of this one, as after fork(2); pidfd is written by the kernel before the call returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
    match pid {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Cloned::Child),
        pid => Ok(Cloned::Parent { pidfd: own(pidfd), pid: i32::try_from(pid).unwrap_or(-1) }),
    }
}

/// Starts a process that shares the caller's memory, which waits meanwhile, until the process executes a program or ends
/// (vfork(2)): no page is copied, and none is torn down by the exec. Gives its number in the caller's PID namespace.
///
/// What the process does must not take anything from the memory that the caller relies on; it may be killed at any point.
pub(crate) fn vfork(mut process: impl FnMut() -> i32) -> io::Result<i32> {
    const STACK: usize = 256 << 10;
    extern "C" fn enter<P: FnMut() -> i32>(process: *mut c_void) -> i32 {
        // SAFETY: clone passes on the pointer to `process` below, whose owner waits until this process no longer runs on
        // its memory.
        let process = unsafe { &mut *process.cast::<P>() };
        process()
    }
    fn share<P: FnMut() -> i32>(process: &mut P, stack: *mut c_void) -> i32 {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: the stack is a mapping of its own, given by its upper end, which is aligned to a page, and it and
        // `process` live until the process has executed a program or ended: only then does clone return. What `enter`
        // returns ends it.
        unsafe { libc::clone(enter::<P>, stack, flags, ptr::from_mut(process).cast()) }
    }
    let (read_write, anonymous) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
    let stack = unsafe { libc::mmap(ptr::null_mut(), STACK, read_write, anonymous | libc::MAP_STACK, -1, 0) };
    if stack == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // A stack that is too small must not run into something else.
    // SAFETY: the lowest page of the mapping made above, which nothing uses yet.
    if unsafe { libc::mprotect(stack, 4096, libc::PROT_NONE) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // The mapping is left to the end of the process: an init needs it once.
    match share(&mut process, stack.wrapping_byte_add(STACK)) {
        -1 => Err(io::Error::last_os_error()),
        pid => Ok(pid),
    }
}

/// Leaves the namespaces of these kinds for new ones (`CLONE_NEW*`).
pub(crate) fn unshare(namespaces: i32) -> io::Result<()> {
    // SAFETY: unshare takes a number; namespaces hold no memory of the process.
    if unsafe { libc::unshare(namespaces) } == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Owns a descriptor that the kernel has just made for this process.
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: callers pass only numbers that a system call returned as a new descriptor, owned by nothing else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Takes the descriptor that the starter left open for the launcher under this number.
pub(crate) fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD reads a flag of a number and touches no memory; a closed number is EBADF.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if fd <= 2 {
        // Standard input: the next opened file must not get its number, and readers of it see an end.
        let lifted = lift(fd, 3)?;
        let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
        place(null.as_raw_fd(), fd, true)?;
        return Ok(own(lifted));
    }
    // SAFETY: F_SETFD sets a flag and touches no memory.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(own(fd))
}

/// A signalfd for these signals, which are blocked for the process.
pub(crate) fn signalfd(signals: &[i32]) -> io::Result<OwnedFd> {
    let set = signal_set(signals);
    change_mask(libc::SIG_BLOCK, &set)?;
    // SAFETY: set is an initialised signal set that outlives the call.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(own(fd)) }
}

/// Unblocks every signal and gives each its default action: what a program expects when it starts.
pub(crate) fn reset_signals() -> io::Result<()> {
    // The kernel's struct sigaction: handler SIG_DFL (0), no flags, no restorer, an empty mask. By the raw call, because
    // the C library keeps two signals for itself, and whoever started the launcher may have left them ignored.
    let default = [0_usize; 4];
    for signal in 1..=64 {
        // SAFETY: default is a valid struct of that layout and outlives the call; the old one is not asked for; the mask
        // has 8 bytes. SIGKILL and SIGSTOP are refused by the kernel, which changes nothing.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), ptr::null::<usize>(), 8_usize) };
    }
    change_mask(libc::SIG_SETMASK, &signal_set(&[]))
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the set it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: the set was initialised above.
        unsafe { libc::sigaddset(set.as_mut_ptr(), *signal) };
    }
    // SAFETY: sigemptyset initialised it.
    unsafe { set.assume_init() }
}

fn change_mask(how: i32, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: set is a valid signal set; a null old set is allowed.
    let result = unsafe { libc::sigprocmask(how, set, ptr::null_mut()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Sets attributes on a mount or a whole mount tree, `MOUNT_ATTR_*`, and lets nothing propagate to it or from it; Linux
/// 5.12.
pub(crate) fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, set: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: libc::MS_PRIVATE, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and attributes a valid mount_attr; both outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Drops every capability from the bounding set.
pub(crate) fn drop_bounding_set() -> io::Result<()> {
    for capability in 0..64_u64 {
        // SAFETY: PR_CAPBSET_DROP takes numbers only.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
        if result < 0 {
            let error = io::Error::last_os_error();
            // The first number that this kernel does not know ends the list.
            return if error.raw_os_error() == Some(libc::EINVAL) { Ok(()) } else { Err(error) };
        }
    }
    Ok(())
}

/// Puts a copy of the descriptor at this number, open across exec or not.
pub(crate) fn place(fd: RawFd, at: RawFd, keep_across_exec: bool) -> io::Result<()> {
    let flags = if keep_across_exec { 0 } else { libc::O_CLOEXEC };
    // SAFETY: dup3 takes numbers only; callers give numbers below those that any owner in this process holds.
    let result = unsafe { libc::dup3(fd, at, flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A copy of the descriptor above this number, close-on-exec.
pub(crate) fn lift(fd: RawFd, above: RawFd) -> io::Result<RawFd> {
    // SAFETY: F_DUPFD_CLOEXEC takes numbers only.
    let result = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, above) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Closes every descriptor from this number on; Linux 5.9.
pub(crate) fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: close_range takes numbers only. The child calls it when it no longer uses what it inherited, and leaves
    // by exec or _exit, so that no owner is dropped afterwards.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Closes a number, open or not.
pub(crate) fn close(fd: RawFd) {
    // SAFETY: the init closes the numbers that it placed itself, the closer those whose owners were given up for it; no
    // owner in this process or in one that shares its table holds them.
    unsafe { libc::close(fd) };
}

/// A borrowed view of a number that this process keeps open until its end.
pub(crate) fn fixed(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: used by the child for the numbers that it placed itself and closes only by exec or _exit.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// Arguments or variables as the kernel takes them.
pub(crate) struct Strings<'a> {
    pointers: Vec<*const c_char>,
    _strings: PhantomData<&'a [CString]>,
}

impl<'a> Strings<'a> {
    pub(crate) fn new(strings: &'a [CString]) -> Self {
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Self { pointers, _strings: PhantomData }
    }
}

/// Replaces the program by the file behind the descriptor. Returns only when that failed.
pub(crate) fn execveat(file: RawFd, argv: &Strings<'_>, envp: &Strings<'_>) -> io::Error {
    let (argv, envp) = (argv.pointers.as_ptr(), envp.pointers.as_ptr());
    // SAFETY: the path is an empty C string; both arrays end in a null pointer and point at C strings that outlive the
    // call.
    unsafe { libc::syscall(libc::SYS_execveat, file, c"".as_ptr(), argv, envp, libc::AT_EMPTY_PATH) };
    io::Error::last_os_error()
}

/// Replaces the program by the file at this path. Returns only when that failed.
pub(crate) fn execve(path: &CStr, argv: &Strings<'_>, envp: &Strings<'_>) -> io::Error {
    let (argv, envp) = (argv.pointers.as_ptr(), envp.pointers.as_ptr());
    // SAFETY: the path is a C string; both arrays end in a null pointer and point at C strings that outlive the call.
    unsafe { libc::syscall(libc::SYS_execve, path.as_ptr(), argv, envp) };
    io::Error::last_os_error()
}

/// Brings the loopback interface of the calling process's network namespace up, through any socket of that namespace.
pub(crate) fn raise_loopback(socket: BorrowedFd<'_>) -> io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(c"lo".to_bytes()) {
        *to = c_char::from_ne_bytes([*from]);
    }
    let up = libc::__c_anonymous_ifr_ifru { ifru_flags: 1 };
    let request = libc::ifreq { ifr_name: name, ifr_ifru: up };
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq, with a name that ends in a zero; request is one and outlives the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Ends the process without running anything that the launcher registered for its own end.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: _exit takes a number and does not return.
    unsafe { libc::_exit(status) }
}

/// The Landlock version of the running kernel; 0 when it has none.
pub(crate) fn landlock_abi() -> i32 {
    const VERSION: u32 = 1;
    // SAFETY: with a null attribute, size 0 and this flag the call only returns a number.
    let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, ptr::null::<u8>(), 0_usize, VERSION) };
    i32::try_from(abi).unwrap_or(0).max(0)
}

/// A program for the kernel, as seccomp(2) takes it.
#[repr(C)]
struct FilterProgram {
    length: u16,
    instructions: *const sock_filter,
}

const SET_MODE_FILTER: u32 = 1;
const NEW_LISTENER: u64 = 1 << 3;
const WAIT_KILLABLE: u64 = 1 << 5;

fn install(program: &[sock_filter], flags: u64) -> io::Result<i64> {
    let length = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = FilterProgram { length, instructions: program.as_ptr() };
    // SAFETY: the program and its instructions are valid and outlive the call, which copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Filters the calling thread's system calls from here on, and those of everything that it starts.
pub(crate) fn filter_calls(program: &[sock_filter]) -> io::Result<()> {
    install(program, 0).map(drop)
}

/// The same, and gives the listener that answers for the calls of which the filter says "notify"; Linux 5.0.
pub(crate) fn filter_calls_with_listener(program: &[sock_filter]) -> io::Result<OwnedFd> {
    let listener = install(program, NEW_LISTENER)?;
    // The kernel makes it close-on-exec.
    RawFd::try_from(listener).map(own).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The same, and a call that was received waits for its answer whatever signals come (Linux 5.19), so that none is made
/// twice.
pub(crate) fn filter_calls_with_patient_listener(program: &[sock_filter]) -> io::Result<OwnedFd> {
    match install(program, NEW_LISTENER | WAIT_KILLABLE) {
        Ok(listener) => RawFd::try_from(listener).map(own).map_err(|_| io::ErrorKind::InvalidData.into()),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => filter_calls_with_listener(program),
        Err(error) => Err(error),
    }
}

/// Whether the process has called [`refuse_exec_gain`]; `None` where the kernel does not know it (Linux 6.3).
pub(crate) fn refuses_exec_gain() -> Option<bool> {
    // SAFETY: PR_GET_MDWE takes numbers only.
    match unsafe { libc::prctl(GET_MDWE, 0, 0, 0, 0) } {
        refused if refused >= 0 => Some(refused & 1 == 1),
        _ => None,
    }
}

const SET_MDWE: i32 = 65;
const GET_MDWE: i32 = 66;

/// Refuses the calling process, and what it starts or executes, memory that is written and executed, or that becomes
/// executable. EINVAL where the kernel does not know it.
pub(crate) fn refuse_exec_gain() -> io::Result<()> {
    // SAFETY: PR_SET_MDWE takes numbers only; no mapping changes.
    let result = unsafe { libc::prctl(SET_MDWE, 1, 0, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Names the process in `ps`.
pub(crate) fn set_name(name: &CStr) {
    // SAFETY: PR_SET_NAME reads at most 16 bytes of a C string. A name is only for people: failure changes nothing.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Waits for one of these descriptors, or for so long. A signal ends the waiting too.
pub(crate) fn wait(polls: &mut [machine::Poll], most: Option<Duration>) -> io::Result<()> {
    // The next whole millisecond, so that nobody asks in vain.
    let most = most.map_or(-1, |most| libc::c_int::try_from(most.as_millis() + 1).unwrap_or(libc::c_int::MAX));
    let count = libc::nfds_t::try_from(polls.len()).map_err(io::Error::other)?;
    // SAFETY: polls is an array of that many structs of the layout of pollfd, valid for the time of the call.
    let result = unsafe { libc::poll(polls.as_mut_ptr().cast::<libc::pollfd>(), count, most) };
    match result {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
    }
}

/// The signals that wait at a signalfd.
pub(crate) fn signals_of(signals: &OwnedFd) -> Vec<u32> {
    const SIZE: usize = size_of::<libc::signalfd_siginfo>();
    let mut all = Vec::new();
    let mut information = [0; SIZE];
    while rustix::io::read(signals, &mut information) == Ok(SIZE) {
        // The number is the first field.
        all.extend(information.first_chunk().copied().map(u32::from_ne_bytes));
    }
    all
}

/// Ends the process by this signal, as if nobody had ever handled it.
pub(crate) fn end_by(signal: i32) -> ! {
    // Without it, the process ends by the status below.
    drop(reset_signals());
    // SAFETY: kill and getpid take numbers only.
    let own = unsafe { libc::getpid() };
    // SAFETY: as above.
    unsafe { libc::kill(own, signal) };
    exit_now(128 + signal)
}

/// Runs a loop in a virtual machine of one page, and tells whether it was run. It may never return.
#[cfg(target_arch = "x86_64")]
pub(crate) fn runs_guest(device: RawFd) -> io::Result<()> {
    const CREATE_VM: u64 = 0xAE01;
    const GET_VCPU_MMAP_SIZE: u64 = 0xAE04;
    const CREATE_VCPU: u64 = 0xAE41;
    const RUN: u64 = 0xAE80;
    const SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
    const EXIT_HLT: u32 = 5;
    /// Where real mode begins: the last 16 bytes below 4 GiB, which the page covers.
    const PAGE: u64 = 0xFFFF_F000;
    const SIZE: usize = 4096;
    /// mov ecx, 1 << 26; dec ecx; jnz to the last; hlt. Some hosts carry out single instructions and never a guest: this many
    /// take them longer than anybody waits.
    const LOOP: [u8; 11] = [0x66, 0xB9, 0, 0, 0, 4, 0x66, 0x49, 0x75, 0xFC, 0xF4];
    #[repr(C)]
    struct Region {
        slot: u32,
        flags: u32,
        guest: u64,
        size: u64,
        host: u64,
    }
    fn ask(fd: RawFd, request: u64, argument: u64) -> io::Result<i32> {
        // SAFETY: the requests here take a number, or a pointer to a struct that outlives the call.
        let result = unsafe { libc::ioctl(fd, request as _, argument) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }
    fn map(size: usize, fd: RawFd) -> io::Result<*mut u8> {
        let flags = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
        // SAFETY: a new mapping at an address of the kernel's choice touches no other one.
        let address = unsafe { libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, fd, 0) };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
    }
    let vm = ask(device, CREATE_VM, 0)?;
    let page = map(SIZE, -1)?;
    // SAFETY: the mapping has SIZE bytes.
    let entry = unsafe { page.add(SIZE - 16) };
    // SAFETY: 16 bytes are left from there on, and the mapping is used by nobody else.
    unsafe { ptr::copy_nonoverlapping(LOOP.as_ptr(), entry, LOOP.len()) };
    let region = Region { slot: 0, flags: 0, guest: PAGE, size: SIZE as u64, host: page as u64 };
    ask(vm, SET_USER_MEMORY_REGION, &raw const region as u64)?;
    let vcpu = ask(vm, CREATE_VCPU, 0)?;
    let size = usize::try_from(ask(device, GET_VCPU_MMAP_SIZE, 0)?).map_err(io::Error::other)?;
    let shared = map(size.max(SIZE), vcpu)?;
    ask(vcpu, RUN, 0)?;
    // Behind eight bytes of requests stands why it returned.
    // SAFETY: the mapping is longer than that.
    let reason = unsafe { shared.add(8) }.cast::<u32>();
    // SAFETY: it lies in the mapping, which begins with a page, and is a number that the kernel wrote.
    let reason = unsafe { ptr::read_volatile(reason) };
    if reason == EXIT_HLT { Ok(()) } else { Err(io::Error::other(format!("it ended with {reason}"))) }
}

/// The processor's time-stamp counter, which an emulated machine has as its own.
#[cfg(target_arch = "x86_64")]
pub(crate) fn ticks() -> u64 {
    // SAFETY: reading the counter touches no memory; every processor of this architecture has it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Guests are of x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) const fn ticks() -> u64 {
    0
}

/// Guests are of x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn runs_guest(_device: RawFd) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read as _, os::fd::AsFd, path::Path};

    use rustix::process::{WaitId, WaitIdOptions, waitid};

    use super::*;

    /// Forks a child that ends with 0 if its v2 group has this name, and tells how it ended.
    fn forked_into(directory: &Path, name: &str) -> Option<i32> {
        let group = fs::File::open(directory).expect("the group");
        match clone3(0, Some(group.as_fd())).expect("clone3") {
            Cloned::Child => {
                // Without memory: another test may have held the allocator's lock when this child was forked.
                let mut text = [0; 4096];
                let read = fs::File::open("/proc/self/cgroup").and_then(|mut file| file.read(&mut text));
                let mut lines = text.get(..read.unwrap_or(0)).unwrap_or_default().split(|byte| *byte == b'\n');
                let born_there = lines.any(|line| line.starts_with(b"0::") && line.ends_with(name.as_bytes()));
                exit_now(i32::from(!born_there))
            }
            Cloned::Parent { pidfd, .. } => {
                let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).expect("waitid");
                status.and_then(|status| status.exit_status())
            }
        }
    }

    #[test]
    fn a_child_is_born_in_its_v2_group() {
        let roots = ["/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let Some(root) = roots.into_iter().find(|root| root.join("cgroup.procs").exists()) else {
            println!("SKIP cgroup-v2-birth: no cgroup v2 hierarchy");
            return;
        };
        // Below this program's own group: that may be one that was delegated to an ordinary user.
        let groups = fs::read_to_string("/proc/self/cgroup").expect("its groups");
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/")).expect("its group of v2");
        let name = format!("plugvisor-test-into-{}", std::process::id());
        let directory = root.join(own).join(&name);
        if let Err(error) = fs::create_dir(&directory) {
            println!("SKIP cgroup-v2-birth: {} cannot be made: {error}", directory.display());
            return;
        }
        let ended = forked_into(&directory, &name);
        fs::remove_dir(&directory).expect("an empty group");
        assert_eq!(ended, Some(0));
    }
}
