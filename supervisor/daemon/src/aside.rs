//! Work that waits for as long as somebody else likes: each piece on a thread of its own.
//!
//! The runtime has few threads for work that blocks, and its end waits for them: work that a plugin, a resolver or a process of
//! another user can hold up would hold up imports, logs and `/metrics`, and the supervisor's end. Whoever begins some bounds
//! how much of it there is.

use std::{io, thread};

use tokio::sync::oneshot;

/// Begins a piece; what it gives, or nothing after a panic. Nobody need wait for it.
///
/// # Errors
/// When there is no thread to be had.
pub(crate) fn aside<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (gives, given) = oneshot::channel();
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        // Who waited may have given up.
        let _ = gives.send(work());
    })?;
    Ok(given)
}
