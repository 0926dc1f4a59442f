//! A connection into a plugin's network namespace, by a socket that was made there and is used again.
//!
//! ```text
//!   unconnected ──connect──▶ under way ──▶ connected ──both sides ended──▶ settled ─┐
//!        ▲                       └─────────────┴── anything else ──▶ reset ─────────┤
//!        └───────────────────────────── connect(AF_UNSPEC) ◀────────────────────────┘
//! ```
//!
//! Disconnecting resets what is still under way (tcp_disconnect in net/ipv4/tcp.c), so that after a connection that both
//! sides have ended the last bytes are first waited for: the plugin may read slowly.

use std::{
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpStream as StdStream},
    os::fd::OwnedFd,
    time::Duration,
};

use plugvisor_sandbox::inward;
use rustix::{
    event::{Timespec, epoll},
    io::Errno,
};
use tokio::{
    net::TcpStream,
    time::{Instant, timeout, timeout_at},
};

use crate::readiness;

/// Takes a socket from the launcher, whatever an earlier supervisor did with it; or says why it cannot be used.
pub(super) fn take(socket: OwnedFd) -> Result<StdStream, String> {
    // It may be connected still.
    let socket = disconnect(socket.into()).map_err(|error| format!("disconnecting it failed: {error}"))?;
    inward::renew(&socket).map_err(|unfit| unfit.to_string())?;
    Ok(socket)
}

/// The socket, or why it cannot be used again; and why it was not connected.
pub(super) type NotConnected = (io::Result<StdStream>, io::Error);

/// Connects a socket to a port of the namespace that it was made in. The socket comes back when that does not work.
pub(super) async fn connect(socket: StdStream, port: u16, deadline: Instant) -> Result<TcpStream, NotConnected> {
    match rustix::net::connect(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)) {
        Ok(()) | Err(Errno::INPROGRESS) => {}
        Err(errno) => return Err((disconnect(socket), errno.into())),
    }
    // Registered only now: what is known of a registered socket's readiness would be that of its last connection.
    let stream = TcpStream::from_std(socket)
        .map_err(|error| (Err(io::Error::new(error.kind(), "it could not be waited for")), error))?;
    match timeout_at(deadline, until_connected(&stream)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into())) {
        Ok(()) => Ok(stream),
        Err(error) => Err((reset(stream), error)),
    }
}

async fn until_connected(stream: &TcpStream) -> io::Result<()> {
    stream.writable().await?;
    if let Some(error) = stream.take_error()? {
        return Err(error);
    }
    // Where nobody listens, a socket that happens to get the port itself connects to itself.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    stream.set_nodelay(true)
}

/// Ends a connection that both sides have ended, once the plugin has taken everything, or this much time has passed.
pub(super) async fn settle(stream: TcpStream, patience: Duration) -> io::Result<StdStream> {
    let socket = stream.into_std()?;
    if is_connected(&socket) && timeout(patience, until_settled(&socket)).await.is_err() {
        tracing::debug!("a plugin did not take the last bytes of a connection in time; it is reset");
    }
    disconnect(socket)
}

/// Ends a connection at once; the plugin is told by a reset.
pub(super) fn reset(stream: TcpStream) -> io::Result<StdStream> {
    disconnect(stream.into_std()?)
}

/// Makes a socket fit for another connection.
pub(super) fn disconnect(socket: StdStream) -> io::Result<StdStream> {
    rustix::net::connect_unspec(&socket)?;
    Ok(socket)
}

/// Whether the kernel has still something to do for its connection: a socket that is closed has no peer (inet_getname in
/// net/ipv4/af_inet.c).
fn is_connected(socket: &StdStream) -> bool {
    socket.peer_addr().is_ok()
}

/// Waits for the last acknowledgement. An epoll of its own, because tokio takes a side that has ended for the last that there
/// is to know of a socket.
async fn until_settled(socket: &StdStream) -> io::Result<()> {
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
    epoll::add(&events, socket, epoll::EventData::new_u64(0), interest)?;
    let events = readiness::register(events)?;
    while is_connected(socket) {
        let mut ready = events.readable().await?;
        let mut told = [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        epoll::wait(events.get_ref(), &mut told, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        ready.clear_ready();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        net::{Shutdown, TcpListener},
        time::Duration,
    };

    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// As the launcher's are: not connected and not blocking.
    fn socket() -> StdStream {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap().into()
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn port(listener: &TcpListener) -> u16 {
        listener.local_addr().unwrap().port()
    }

    async fn connected(socket: StdStream, to: &TcpListener) -> TcpStream {
        connect(socket, port(to), soon()).await.unwrap()
    }

    #[tokio::test]
    async fn one_socket_serves_connection_after_connection_whoever_ends_first() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut socket = socket();
        for round in 0..20 {
            let mut stream = connected(socket, &listener).await;
            let (mut plugin, _) = listener.accept().unwrap();
            let mut text = String::new();
            if round % 2 == 0 {
                stream.shutdown().await.unwrap();
                plugin.read_to_string(&mut text).unwrap();
                drop(plugin);
                stream.read_to_string(&mut text).await.unwrap();
            } else {
                drop(plugin);
                stream.read_to_string(&mut text).await.unwrap();
                stream.shutdown().await.unwrap();
            }
            socket = settle(stream, Duration::from_secs(30)).await.unwrap();
            assert!(!is_connected(&socket));
        }
    }

    #[tokio::test]
    async fn what_a_plugin_has_not_read_yet_is_not_lost() {
        const BYTES: usize = 400_000;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = connected(socket(), &listener).await;
        let (mut plugin, _) = listener.accept().unwrap();
        // It has said everything and reads when it likes.
        plugin.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        let writing = tokio::spawn(async move {
            stream.write_all(&[b'x'; BYTES]).await.unwrap();
            stream.shutdown().await.unwrap();
            settle(stream, Duration::from_secs(30)).await.unwrap()
        });
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            plugin.read_to_end(&mut all).unwrap();
            all.len()
        });
        assert_eq!(reading.await.unwrap(), BYTES);
        assert!(!is_connected(&writing.await.unwrap()));
    }

    #[tokio::test]
    async fn who_never_reads_is_not_waited_for_without_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = connected(socket(), &listener).await;
        let (mut plugin, _) = listener.accept().unwrap();
        plugin.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        while stream.try_write(&[b'x'; 64 * 1024]).is_ok() {}
        stream.shutdown().await.unwrap();
        let socket = settle(stream, Duration::from_millis(50)).await.unwrap();
        assert!(!is_connected(&socket));
        let mut all = Vec::new();
        assert_eq!(plugin.read_to_end(&mut all).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_connection_that_is_broken_off_is_reset_and_the_socket_is_good() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = connected(socket(), &listener).await;
        let (mut plugin, _) = listener.accept().unwrap();
        let socket = reset(stream).unwrap();
        assert_eq!(plugin.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let mut stream = connected(socket, &listener).await;
        let (mut plugin, _) = listener.accept().unwrap();
        plugin.write_all(b"again").unwrap();
        drop(plugin);
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "again");
    }

    #[tokio::test]
    async fn where_nobody_listens_or_accepts_the_socket_comes_back() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let nobody = port(&listener);
        drop(listener);
        let (back, error) = connect(socket(), nobody, soon()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let mut socket = back.unwrap();

        // A queue of one place; the kernel lets one more in.
        let full = socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
        bind(&full, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        listen(&full, 0).unwrap();
        let full = TcpListener::from(full);
        let mut waiting = Vec::new();
        let error = loop {
            match connect(socket, port(&full), Instant::now() + Duration::from_millis(100)).await {
                Ok(stream) => waiting.push(stream),
                Err((back, error)) => {
                    socket = back.unwrap();
                    break error;
                }
            }
            assert!(waiting.len() < 8, "the queue has no end");
            socket = self::socket();
        };
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);

        let good = TcpListener::bind("127.0.0.1:0").unwrap();
        drop(connected(socket, &good).await);
    }

    /// It set the socket to be reset at its end, and was killed while it used it.
    #[tokio::test]
    async fn what_an_earlier_supervisor_set_does_not_outlive_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = connected(socket(), &listener).await.into_std().unwrap();
        let (mut plugin, _) = listener.accept().unwrap();
        sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
        sockopt::set_socket_oobinline(&stream, true).unwrap();
        let socket = take(stream.into()).unwrap();
        assert_eq!(plugin.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!((sockopt::socket_linger(&socket), sockopt::socket_oobinline(&socket)), (Ok(None), Ok(false)));
        drop(connected(socket, &listener).await);

        let bound = self::socket();
        bind(&bound, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let unfit = take(bound.into()).unwrap_err();
        assert!(unfit.contains("bound to 127.0.0.1"), "{unfit}");
    }

    #[tokio::test]
    async fn a_socket_that_is_connected_to_itself_is_connected_to_nobody() {
        let socket = socket();
        bind(&socket, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).unwrap();
        let own = socket.local_addr().unwrap().port();
        let (_, error) = connect(socket, own, soon()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
