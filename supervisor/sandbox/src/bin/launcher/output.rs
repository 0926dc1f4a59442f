//! A plugin's output while no supervisor reads it: a bounded ring for each stream.
//!
//! The launcher reads a pipe by an open description of its own, made anew through `/proc/self/fd`. `O_NONBLOCK` belongs
//! to the open description, so whatever the supervisor does to the one that it was given, a read here never waits.
//!
//! While a supervisor is attached it alone reads. When it goes, what it left in the pipe is drained into the ring; when
//! the next one is attached, it gets the ring first and then the pipe. So no byte is lost or seen twice in the kernel's
//! hands: what was in the pipe stays there, and only one side reads at a time. The ring is forgotten when the supervisor
//! says that it has it.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use plugvisor_sandbox::protocol::Kept;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
};

use crate::sealing;

/// How much is kept of each stream.
pub(crate) const ROOM: usize = 64 << 10;
/// How much is read in one turn of the loop.
const TURN: usize = 64 << 10;

/// One stream of a launch.
#[derive(Debug)]
pub(crate) struct Output {
    reader: Option<OwnedFd>,
    ended: bool,
    ring: VecDeque<u8>,
    room: usize,
    lost: u64,
    /// The ring as it is, once it was handed over.
    sealed: Option<OwnedFd>,
}

/// What a turn of reading found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drained {
    /// There may be more.
    Some,
    /// Nothing more for now.
    Empty,
    /// Every writer is gone.
    Ended,
}

impl Output {
    /// The stream behind a pipe's reading end, which may be given away; at most `room` bytes are kept.
    pub(crate) fn of(end: BorrowedFd<'_>, room: usize) -> io::Result<Self> {
        let reader = anew(end)?;
        Ok(Self { reader: Some(reader), ended: false, ring: VecDeque::new(), room, lost: 0, sealed: None })
    }

    /// For waiting until there is something to drain.
    pub(crate) fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.reader.as_ref().map(AsFd::as_fd)
    }

    /// Whether there is something left to wait for.
    pub(crate) const fn ended(&self) -> bool {
        self.ended || self.reader.is_none()
    }

    /// A reading end for a supervisor.
    pub(crate) fn reading_end(&self) -> io::Result<OwnedFd> {
        self.as_fd().map_or_else(|| Err(io::ErrorKind::BrokenPipe.into()), anew)
    }

    /// Closes the pipe if every writer is gone and nothing is in it: its launch is over.
    pub(crate) fn close_if_over(&mut self) {
        let Some(reader) = &self.reader else { return };
        let mut fds = [PollFd::new(reader, PollFlags::IN)];
        let polled = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }));
        let found = fds[0].revents();
        if polled.is_ok() && found.contains(PollFlags::HUP) && !found.contains(PollFlags::IN) {
            self.reader = None;
        }
    }

    /// Moves what is in the pipe to the ring, a bounded part at a time.
    pub(crate) fn drain(&mut self) -> Drained {
        let mut bytes = [0; 16 << 10];
        let mut left = TURN;
        while left > 0
            && !self.ended
            && let Some(reader) = &self.reader
        {
            match rustix::io::read(reader, &mut bytes) {
                Ok(0) => self.ended = true,
                Ok(count) => {
                    left = left.saturating_sub(count);
                    self.push(&bytes[..count]);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Drained::Empty,
                // A pipe has no other errors; whatever it is, reading again would not mend it.
                Err(_) => self.ended = true,
            }
        }
        if self.ended() { Drained::Ended } else { Drained::Some }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.sealed = None;
        let newest = &bytes[bytes.len().saturating_sub(self.room)..];
        let over = (self.ring.len() + newest.len()).saturating_sub(self.room);
        self.ring.drain(..over);
        self.ring.extend(newest);
        self.lost += (over + bytes.len() - newest.len()) as u64;
    }

    /// What is kept, in a sealed memory file of its own: whoever gets it can change nothing for anybody else. Asked again
    /// it is the same file, so that asking often costs nothing.
    pub(crate) fn kept(&mut self) -> io::Result<(Kept, OwnedFd)> {
        let kept = Kept { bytes: self.ring.len() as u64, lost: self.lost };
        if let Some(sealed) = &self.sealed {
            return Ok((kept, sealed.try_clone()?));
        }
        let sealed = sealing::sealed(|| self.copy())?;
        let copy = sealed.try_clone()?;
        self.sealed = Some(sealed);
        Ok((kept, copy))
    }

    fn copy(&self) -> io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        // Kernels before 6.3 do not know the flag that says "never to be executed".
        let memory = memfd_create("plugvisor-output", flags | MemfdFlags::NOEXEC_SEAL)
            .or_else(|_| memfd_create("plugvisor-output", flags))?;
        let mut memory = File::from(memory);
        let (first, second) = self.ring.as_slices();
        memory.write_all(first)?;
        memory.write_all(second)?;
        fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(memory.into())
    }

    /// The supervisor has what was kept.
    pub(crate) fn forget(&mut self) {
        (self.ring, self.lost, self.sealed) = (VecDeque::new(), 0, None);
    }
}

/// A new open description of the same pipe.
fn anew(end: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", end.as_raw_fd());
    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    fn read(output: &mut Output) -> (Kept, String) {
        let (kept, file) = output.kept().expect("a memory file");
        let mut text = String::new();
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .expect("opens")
            .read_to_string(&mut text)
            .expect("reads");
        (kept, text)
    }

    #[test]
    fn the_newest_is_kept_and_the_rest_counted() {
        let (end, write) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let mut output = Output::of(end.as_fd(), 8).expect("opens anew");
        assert_eq!(output.drain(), Drained::Empty, "the shared end blocks, this one does not");
        rustix::io::write(&write, b"abcdef").expect("write");
        assert_eq!(output.drain(), Drained::Empty);
        assert_eq!(read(&mut output), (Kept { bytes: 6, lost: 0 }, "abcdef".into()));
        rustix::io::write(&write, b"ghij").expect("write");
        assert_eq!(output.drain(), Drained::Empty);
        assert_eq!(read(&mut output), (Kept { bytes: 8, lost: 2 }, "cdefghij".into()));
        assert_eq!(read(&mut output), (Kept { bytes: 8, lost: 2 }, "cdefghij".into()), "told until it is acknowledged");
        rustix::io::write(&write, b"0123456789").expect("write");
        drop(write);
        assert_eq!(output.drain(), Drained::Ended);
        assert_eq!(read(&mut output), (Kept { bytes: 8, lost: 12 }, "23456789".into()));
        output.forget();
        assert_eq!(read(&mut output), (Kept::default(), String::new()));
        assert!(output.ended());
    }

    #[test]
    fn what_was_handed_over_cannot_be_changed() {
        let (end, write) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let mut output = Output::of(end.as_fd(), 64).expect("opens anew");
        rustix::io::write(&write, b"line").expect("write");
        output.drain();
        let (_, file) = output.kept().expect("a memory file");
        assert_eq!(rustix::io::pwrite(&file, b"LINE", 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(&file, 0), Err(Errno::PERM));
        // What was not read stays in the pipe for whoever reads next.
        rustix::io::write(&write, b"next").expect("write");
        let again = output.reading_end().expect("opens anew");
        let mut bytes = [0; 8];
        assert_eq!(rustix::io::read(&again, &mut bytes), Ok(4));
        assert_eq!(&bytes[..4], b"next");
    }
}
