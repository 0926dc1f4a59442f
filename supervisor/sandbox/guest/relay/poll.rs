//! What is waited for, in the form of poll(2).

use std::os::fd::{AsRawFd, RawFd};

/// As poll(2) takes it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Poll {
    pub(crate) fd: RawFd,
    pub(crate) events: i16,
    pub(crate) found: i16,
}

pub(crate) const IN: i16 = 1;
pub(crate) const OUT: i16 = 4;
pub(super) const ERROR: i16 = 8;

impl Poll {
    pub(crate) fn new(fd: &impl AsRawFd, events: i16) -> Self {
        Self { fd: fd.as_raw_fd(), events, found: 0 }
    }

    /// Something came, or nothing will any more.
    pub(crate) fn is_readable(&self) -> bool {
        self.found & !OUT != 0
    }

    pub(super) fn is_writable(&self) -> bool {
        self.found & !IN != 0
    }
}
