//! Seccomp user notification (seccomp_unotify(2)): calls that wait until the holder of a filter's listener has answered.
//!
//! The launcher lets a program's one exec pass by it, and a trace sees every call by it. Here is no policy.
#![allow(unsafe_code, reason = "raw system calls, one operation per block, each with its reasons")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
};

/// A call that waits: `struct seccomp_notif`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Waiting {
    id: u64,
    thread: u32,
    flags: u32,
    number: i32,
    architecture: u32,
    instruction: u64,
    arguments: [u64; 6],
}

impl Waiting {
    /// The number of the thread that makes it, in the reader's PID namespace; it may be another's as soon as
    /// [`still_waits`] says no.
    #[must_use]
    pub const fn thread(&self) -> u32 {
        self.thread
    }

    /// The call's number.
    #[must_use]
    pub const fn number(&self) -> i32 {
        self.number
    }

    /// Its arguments, as the kernel takes them: nobody changes them while it waits. What they point at, others may.
    #[must_use]
    pub const fn arguments(&self) -> [u64; 6] {
        self.arguments
    }
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The kernel carries it out.
    Pass,
    /// It fails with this error number.
    Fail(i32),
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// The requests are `_IOWR('!', 0, ...)`, `_IOWR('!', 1, ...)`, and `_IOW('!', 2 and 4, __u64)`.
const RECEIVE: libc::c_ulong = 0xC000_0000 | (size_of::<Waiting>() as libc::c_ulong) << 16 | 0x21 << 8;
const SEND: libc::c_ulong = 0xC000_0000 | (size_of::<Response>() as libc::c_ulong) << 16 | 0x21 << 8 | 1;
const ID_VALID: libc::c_ulong = 0x4000_0000 | (size_of::<u64>() as libc::c_ulong) << 16 | 0x21 << 8 | 2;
const SET_FLAGS: libc::c_ulong = 0x4000_0000 | (size_of::<u64>() as libc::c_ulong) << 16 | 0x21 << 8 | 4;
/// `SECCOMP_USER_NOTIF_FLAG_CONTINUE`.
const CONTINUE: u32 = 1;
/// `SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP`.
const SYNC_WAKE_UP: u64 = 1;

/// Takes the next call. The listener must be readable: then nothing here waits, also when the caller died meanwhile, which
/// is ENOENT.
///
/// # Errors
/// What the kernel says.
pub fn receive(listener: BorrowedFd<'_>) -> io::Result<Waiting> {
    let mut asked = Waiting::default();
    // SAFETY: the kernel writes a struct of this size, which is zeroed as it demands.
    if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE as _, &raw mut asked) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(asked)
}

/// Answers a call.
///
/// # Errors
/// ENOENT when the caller died meanwhile.
pub fn answer(listener: BorrowedFd<'_>, waiting: &Waiting, answer: Answer) -> io::Result<()> {
    let (error, flags) = match answer {
        Answer::Pass => (0, CONTINUE),
        Answer::Fail(errno) => (-errno, 0),
    };
    let response = Response { id: waiting.id, value: 0, error, flags };
    // SAFETY: the kernel reads a struct of this size.
    if unsafe { libc::ioctl(listener.as_raw_fd(), SEND as _, &raw const response) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whether the call waits still: only then was what was read about its thread meanwhile that thread's.
#[must_use]
pub fn still_waits(listener: BorrowedFd<'_>, waiting: &Waiting) -> bool {
    // SAFETY: the kernel reads a number of this size.
    unsafe { libc::ioctl(listener.as_raw_fd(), ID_VALID as _, &raw const waiting.id) == 0 }
}

/// Has both sides of the listener wake each other on one processor, which halves what a call costs; Linux 6.6. Older ones
/// refuse, and nothing else differs.
pub fn wake_up_in_step(listener: impl AsFd) {
    // SAFETY: it takes a number.
    unsafe { libc::ioctl(listener.as_fd().as_raw_fd(), SET_FLAGS as _, SYNC_WAKE_UP) };
}

/// Lets one call pass that waits at the listener, under the conditions of [`receive`].
///
/// # Errors
/// As [`receive`] and [`answer`].
pub fn let_pass(listener: BorrowedFd<'_>) -> io::Result<()> {
    answer(listener, &receive(listener)?, Answer::Pass)
}
