//! How long the tests wait, and for what.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    sync::OnceLock,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long what is awaited may take: only what never comes takes this long; a machine may stand still for many
/// seconds. `PLUGVISOR_TEST_PATIENCE`, a whole number, says how many times slower than usual
/// this machine is: one that is emulated.
pub fn patience() -> Duration {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    let read = || std::env::var("PLUGVISOR_TEST_PATIENCE").map_or(1, |times| times.parse().expect("a whole number"));
    Duration::from_secs(60) * *SLOWNESS.get_or_init(read)
}

pub fn wait_readable(fd: BorrowedFd<'_>, deadline: Instant) -> bool {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs().try_into().expect("fits"), tv_nsec: left.subsec_nanos().into() };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    poll(&mut fds, Some(&timeout)).expect("poll") > 0
}

/// Reads a pipe to its end, waiting for what is not there yet.
pub fn read_all(pipe: &mut File) -> String {
    let deadline = Instant::now() + patience();
    let mut text = Vec::new();
    let mut bytes = [0; 4096];
    loop {
        match pipe.read(&mut bytes) {
            Ok(0) => return String::from_utf8_lossy(&text).into_owned(),
            Ok(read) => text.extend_from_slice(&bytes[..read]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                assert!(
                    wait_readable(pipe.as_fd(), deadline),
                    "the pipe stays open: {}",
                    String::from_utf8_lossy(&text)
                );
            }
            Err(error) => panic!("read: {error}"),
        }
    }
}
