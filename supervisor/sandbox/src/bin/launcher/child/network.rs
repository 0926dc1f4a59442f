//! What a plugin's network namespace has when its first program begins: sockets that lead out of it and into it, and how much
//! memory a connection in it may take.
//!
//! On cgroup v2 what lies in a socket's buffers counts for the group of whoever made or accepted it: here the plugin's, for both
//! ends of a connection into it. How much lies there is for who connects to say, who sends and does not read. So all four
//! buffers are bounded, each to twice [`BUFFER`]; by itself the kernel lets one grow to megabytes.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
};

use plugvisor_sandbox::{
    inward::{self, BUFFER},
    protocol::{EGRESS, Grant},
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with};

use super::{Failure, Kit, Order, at};
use crate::{
    kernel,
    report::{self, Message},
    step::Step,
};

/// Connections that may wait for the egress proxy, such as while no supervisor is there.
const EGRESS_BACKLOG: i32 = 1024;

/// Makes the sockets that lead out of its network namespace and into it: the one that listens for the egress proxy, when the
/// plugin may use it, and those that the supervisor connects to it by, when it may serve. Only here: a launcher without
/// privileges cannot enter this network namespace later, and a socket made outside of it would give the plugin the network
/// that it was made in. It keeps none of them.
pub(super) fn make(kit: &Kit<'_>, order: &Order) -> Result<(), Failure> {
    let (egress, serves) = (order.grants.contains(&Grant::Egress), order.grants.contains(&Grant::TcpServer));
    if !egress && !serves {
        return Ok(());
    }
    let failed = |error: io::Error| Failure::io(Step::Network, &error);
    let socket = tcp()?;
    // Until then there is no 127.0.0.1 in it.
    kernel::raise_loopback(socket.as_fd()).map_err(failed)?;
    if egress {
        bind(&socket, &EGRESS).and_then(|()| listen(&socket, EGRESS_BACKLOG)).map_err(at(Step::Network))?;
        report::send(kit.report, &Message::Listening, Some(socket.as_fd())).map_err(failed)?;
    }
    if serves {
        for _ in 0..order.inward {
            let socket = tcp()?;
            inward::bound_buffers(&socket).map_err(at(Step::Network))?;
            report::send(kit.report, &Message::Inward, Some(socket.as_fd())).map_err(failed)?;
        }
    }
    Ok(())
}

fn tcp() -> Result<OwnedFd, Failure> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).map_err(at(Step::Network))
}

/// How far the kernel lets the buffers of sockets grow in this network namespace: for the ends that the plugin accepts, on which
/// it need set nothing, and for those that the proxy does, which count for the supervisor. More than that makes nothing faster on
/// a loopback interface. Where `/proc/sys` cannot be written, as in most containers, they grow as the host lets them, as ADR 15
/// says: no wall depends on it. For a process in a network namespace of its own, which still sees the host's tree.
pub(super) fn bound_buffers() {
    // The least, what a socket begins with, as the kernel has them (net/ipv4/tcp.c, tcp_init); and the most.
    let most = 2 * BUFFER;
    for (name, first) in [("tcp_rmem", most), ("tcp_wmem", 16 << 10)] {
        drop(fs::write(format!("/proc/sys/net/ipv4/{name}"), format!("4096 {first} {most}")));
    }
}
