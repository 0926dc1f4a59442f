//! Descriptors under tokio's readiness: the one place that registers them.

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use tokio::io::unix::AsyncFd;

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When the runtime's event queue refuses it, such as a regular file.
#[expect(
    deprecated,
    reason = "the replacement is `unsafe`, which this crate forbids; its contract (a descriptor that stays open and the \
              same) is what the owning types passed here hold, as their `AsFd` says"
)]
pub(crate) fn register<T: AsFd + AsRawFd>(descriptor: T) -> io::Result<AsyncFd<T>> {
    AsyncFd::new(descriptor)
}
