//! Telling the service manager how a service is: the datagrams of sd_notify(3), for the launcher and the supervisor.
//!
//! Without `NOTIFY_SOCKET` in the environment there is nobody to tell, and nothing happens.

use std::{
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt as _,
        unix::{
            ffi::OsStrExt as _,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

/// Says it to the service manager, if one started this process and asked to be told: `READY=1`, `STOPPING=1`,
/// `WATCHDOG=1`, `STATUS=...`, one on a line.
///
/// # Errors
/// When there is one and it cannot be told. The service goes on: the service manager decides what its silence means.
pub fn tell(state: &str) -> io::Result<()> {
    match std::env::var_os("NOTIFY_SOCKET") {
        Some(name) => tell_at(&name, state),
        None => Ok(()),
    }
}

fn tell_at(name: &OsStr, state: &str) -> io::Result<()> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "NOTIFY_SOCKET begins with neither / nor @")),
    };
    let socket = UnixDatagram::unbound()?;
    // Its queue may be full, and nobody here waits for it.
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), &address).map(drop)
}

/// How often the service manager wants to hear `WATCHDOG=1`: half of what it waits for (sd_watchdog_enabled(3)); `None`
/// when it does not watch this process.
#[must_use]
pub fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    number("WATCHDOG_USEC").filter(|micros| ours && *micros > 1).map(|micros| Duration::from_micros(micros / 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_at_a_path_and_at_an_abstract_name() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("notify");
        let abstract_name = format!("plugvisor-notify-{}", std::process::id());
        let listeners = [
            (path.clone().into_os_string(), UnixDatagram::bind(&path)),
            (
                format!("@{abstract_name}").into(),
                SocketAddr::from_abstract_name(&abstract_name).and_then(|address| UnixDatagram::bind_addr(&address)),
            ),
        ];
        for (name, listener) in listeners {
            let listener = listener.expect("binds");
            tell_at(&name, "READY=1\nSTATUS=well").expect("tells");
            let mut bytes = [0; 64];
            let read = listener.recv(&mut bytes).expect("it came");
            assert_eq!(&bytes[..read], b"READY=1\nSTATUS=well");
        }
        assert!(tell_at("relative".as_ref(), "READY=1").is_err());
        assert!(tell_at(directory.path().join("nobody").as_os_str(), "READY=1").is_err());
    }
}
