//! The socket that the plugin was given: inherited as descriptor 3, or bound at the path it was told.

use std::os::unix::net::UnixListener;

use anyhow::Context;

/// Takes or binds the worker socket.
pub(crate) fn listener() -> anyhow::Result<UnixListener> {
    let inherited = listenfd::ListenFd::from_env().take_unix_listener(0).context("LISTEN_FDS")?;
    if let Some(listener) = inherited {
        return Ok(listener);
    }
    let path = std::env::var_os("PLUGVISOR_LISTEN").context("neither LISTEN_FDS nor PLUGVISOR_LISTEN is set")?;
    UnixListener::bind(&path).with_context(|| format!("cannot bind {}", path.display()))
}
