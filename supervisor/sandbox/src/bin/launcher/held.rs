//! Listening sockets that the supervisor leaves with the launcher, so that they outlive it: new connections wait in
//! their backlog while there is none. The launcher never accepts on them.
//!
//! Only listening Unix and TCP sockets, a few, under names. Anything else could be a way to keep something open that its
//! owner wanted closed, or take room without bound. What is let go is handed back, because closing a listening socket
//! closes what waits in it and may take time.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use plugvisor_sandbox::protocol::{MAX_HELD, MAX_HELD_NAME, Refusal, RefusalCode};
use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};

use crate::check::refuse;

/// The held sockets.
#[derive(Debug, Default)]
pub(crate) struct Held {
    sockets: BTreeMap<String, OwnedFd>,
}

impl Held {
    /// Holds a copy of the one descriptor; what was held under the name before is returned, to be closed.
    pub(crate) fn hold(&mut self, name: String, descriptors: &[OwnedFd]) -> Result<Option<OwnedFd>, Refusal> {
        let [descriptor] = descriptors else {
            return refuse(
                RefusalCode::Policy,
                format!("one listening socket comes with HoldFd, not {} descriptors", descriptors.len()),
            );
        };
        check_name(&name)?;
        check_listening(descriptor.as_fd())?;
        let full = self.sockets.len() >= MAX_HELD;
        match self.sockets.entry(name) {
            Entry::Vacant(entry) if full => refuse(
                RefusalCode::Exhausted,
                format!(
                    "{:?} is not held: {MAX_HELD} sockets are held already; take one of them back first",
                    entry.key()
                ),
            ),
            Entry::Vacant(entry) => {
                entry.insert(copy(descriptor)?);
                Ok(None)
            }
            Entry::Occupied(mut entry) => Ok(Some(entry.insert(copy(descriptor)?))),
        }
    }

    /// A held socket, or a copy of it.
    pub(crate) fn take(&mut self, name: &str, keep: bool) -> Result<OwnedFd, Refusal> {
        let held = if keep { self.sockets.get(name).map(copy).transpose()? } else { self.sockets.remove(name) };
        held.map_or_else(
            || {
                let name: String = name.chars().take(MAX_HELD_NAME).collect();
                refuse(RefusalCode::NotHeld, format!("no socket is held under {name:?}; List tells the names"))
            },
            Ok,
        )
    }

    /// The names, in order.
    pub(crate) fn names(&self) -> Vec<String> {
        self.sockets.keys().cloned().collect()
    }
}

fn copy(descriptor: &OwnedFd) -> Result<OwnedFd, Refusal> {
    descriptor
        .try_clone()
        .or_else(|error| refuse(RefusalCode::Exhausted, format!("the socket cannot be kept: {error}")))
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-".contains(&byte);
    if (1..=MAX_HELD_NAME).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    let shown: String = name.chars().take(MAX_HELD_NAME).collect();
    refuse(
        RefusalCode::Policy,
        format!("{shown:?} is not a name for a socket: 1 to {MAX_HELD_NAME} of a-z, 0-9, '.' and '-'"),
    )
}

/// None of these asks anything but the socket layer: a descriptor that is no socket is ENOTSOCK before its filesystem is
/// asked.
fn check_listening(socket: BorrowedFd<'_>) -> Result<(), Refusal> {
    let no = |what: &str| refuse(RefusalCode::Policy, format!("only listening Unix and TCP sockets are held: {what}"));
    match sockopt::socket_acceptconn(socket) {
        Ok(true) => {}
        Ok(false) => return no("this one does not listen"),
        Err(error) => return no(&format!("this is no socket ({})", io::Error::from(error))),
    }
    let kind = (sockopt::socket_domain(socket), sockopt::socket_type(socket), sockopt::socket_protocol(socket));
    match kind {
        (Ok(AddressFamily::UNIX), _, _) => {
            // Of a listening socket these are the credentials of whoever called listen(2).
            let own = rustix::process::getpid();
            match sockopt::socket_peercred(socket) {
                Ok(listener) if listener.pid == own => no("this one is the launcher's own"),
                Ok(_) => Ok(()),
                Err(error) => no(&format!("nobody knows who made it ({})", io::Error::from(error))),
            }
        }
        // The protocol too: MPTCP and SMC listen on streams of the same families.
        (Ok(AddressFamily::INET | AddressFamily::INET6), Ok(SocketType::STREAM), Ok(None | Some(ipproto::TCP))) => {
            Ok(())
        }
        _ => no("this one is of another family"),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, os::unix::net::UnixStream};

    use super::*;

    fn listening() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").expect("a listener").into()
    }

    #[test]
    fn what_listens_is_held_replaced_and_given_back() {
        let mut held = Held::default();
        assert!(held.hold("calls".into(), &[listening()]).expect("held").is_none());
        assert!(held.hold("calls".into(), &[listening()]).expect("held").is_some(), "the old one is handed back");
        held.take("calls", true).expect("a copy");
        assert_eq!(held.names(), ["calls"]);
        held.take("calls", false).expect("the socket");
        assert_eq!(held.take("calls", true).expect_err("gone").code, RefusalCode::NotHeld);
    }

    #[test]
    fn a_wrong_name_number_or_descriptor_changes_nothing() {
        let mut held = Held::default();
        for name in ["", "A", "a/b", "a b", "é", &"a".repeat(MAX_HELD_NAME + 1)] {
            assert_eq!(held.hold(name.into(), &[listening()]).expect_err(name).code, RefusalCode::Policy);
        }
        let (connected, _other) = UnixStream::pair().expect("a pair");
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        for wrong in [vec![], vec![listening(), listening()], vec![connected.into()], vec![file.into()]] {
            assert_eq!(held.hold("a".into(), &wrong).expect_err("wrong").code, RefusalCode::Policy);
        }
        for number in 0..MAX_HELD {
            held.hold(format!("n{number}"), &[listening()]).expect("held");
        }
        assert_eq!(held.hold("more".into(), &[listening()]).expect_err("full").code, RefusalCode::Exhausted);
        assert!(held.hold("n0".into(), &[listening()]).expect("replaced").is_some());
        assert_eq!(held.names().len(), MAX_HELD);
    }
}
