//! The sockets by which supervisors connect into a plugin's network namespace: one uses them after another, and what one set
//! on a socket stays. Here each is made as a new one is, or it is said why it cannot be.
//!
//! A supervisor that was taken over could otherwise leave filters that drop or cut what the next one sends and receives, or
//! options that delay it or break it off. What is looked at is what such a one may set without privileges, and what with; an
//! option that a kernel does not know cannot have been set there. What no one can see or take back is in ADR 15: above all
//! copies of a socket that such a one gave to processes that outlive it, which read and write on what the next one connects.
#![allow(unsafe_code, reason = "raw system calls, one operation per block, each with its reasons")]

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd},
};

use rustix::{fs::OFlags, net::sockopt};

/// Why a socket is not to be used any more.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// A filter of somebody's stands between it and what it is sent, for good.
    #[error("it has a locked filter (SO_LOCK_FILTER)")]
    Filtered,
    /// It has an address of somebody's choice.
    #[error("it is bound to {0}")]
    Bound(SocketAddr),
    /// An option stays as it is.
    #[error("its option {0} is not as a new socket has it, and stays so")]
    Set(&'static str),
    /// The kernel refused something else.
    #[error("{0}: {1}")]
    Refused(&'static str, #[source] io::Error),
}

/// An option that is a number.
struct Setting {
    level: i32,
    option: i32,
    name: &'static str,
    /// As a new socket has it.
    new: i32,
    /// Whether what is read is what was set.
    told: Told,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Told {
    Yes,
    /// It reads as what the kernel makes of it, which differs between connections; setting it is enough.
    No,
}

macro_rules! settings {
    ($($told:ident $level:ident $option:ident $(= $number:literal)? : $new:expr;)+) => {
        [$(Setting {
            level: libc::$level,
            option: settings!(@number $option $($number)?),
            name: stringify!($option),
            new: $new,
            told: Told::$told,
        }),+]
    };
    (@number $option:ident) => { libc::$option };
    // What the libc crate does not have.
    (@number $option:ident $number:literal) => { $number };
}

const SETTINGS: [Setting; 31] = settings! {
    Yes SOL_SOCKET SO_BINDTOIFINDEX: 0;
    Yes SOL_SOCKET SO_BROADCAST: 0;
    Yes SOL_SOCKET SO_DONTROUTE: 0;
    Yes SOL_SOCKET SO_KEEPALIVE: 0;
    Yes SOL_SOCKET SO_MARK: 0;
    // Read and set as 32 bits, all ones are no limit.
    Yes SOL_SOCKET SO_MAX_PACING_RATE: -1;
    Yes SOL_SOCKET SO_OOBINLINE: 0;
    Yes SOL_SOCKET SO_PEEK_OFF: -1;
    Yes SOL_SOCKET SO_PRIORITY: 0;
    Yes SOL_SOCKET SO_RCVLOWAT: 1;
    Yes SOL_SOCKET SO_RESERVE_MEM: 0;
    Yes SOL_SOCKET SO_REUSEADDR: 0;
    Yes SOL_SOCKET SO_REUSEPORT: 0;
    Yes SOL_SOCKET SO_TIMESTAMPING: 0;
    Yes SOL_SOCKET SO_ZEROCOPY: 0;
    Yes IPPROTO_IP IP_FREEBIND: 0;
    Yes IPPROTO_IP IP_LOCAL_PORT_RANGE = 51: 0;
    Yes IPPROTO_IP IP_MINTTL: 0;
    No IPPROTO_IP IP_MTU_DISCOVER: libc::IP_PMTUDISC_WANT;
    Yes IPPROTO_IP IP_RECVERR: 0;
    Yes IPPROTO_IP IP_TOS: 0;
    Yes IPPROTO_IP IP_TRANSPARENT: 0;
    // The namespace's own.
    No IPPROTO_IP IP_TTL: -1;
    Yes IPPROTO_TCP TCP_CORK: 0;
    Yes IPPROTO_TCP TCP_FASTOPEN_CONNECT: 0;
    // The next connection's own.
    No IPPROTO_TCP TCP_MAXSEG: 0;
    Yes IPPROTO_TCP TCP_NOTSENT_LOWAT: 0;
    Yes IPPROTO_TCP TCP_REPAIR: 0;
    Yes IPPROTO_TCP TCP_TX_DELAY = 37: 0;
    Yes IPPROTO_TCP TCP_USER_TIMEOUT: 0;
    No IPPROTO_TCP TCP_WINDOW_CLAMP: 0;
};

/// What each of the two buffers of a socket is set to, in bytes. The kernel gives it twice that (socket(7), `SO_RCVBUF`), less
/// where `net.core.rmem_max` or `wmem_max` say so, and lets it grow no more: on cgroup v2 it counts for the plugin's memory, and
/// who connects decides what lies in it.
pub const BUFFER: usize = 64 << 10;

/// Sets the buffers of a socket that is not connected yet.
///
/// # Errors
/// What the kernel says.
pub fn bound_buffers(socket: impl AsFd) -> rustix::io::Result<()> {
    let socket = socket.as_fd();
    sockopt::set_socket_recv_buffer_size(socket, BUFFER)?;
    sockopt::set_socket_send_buffer_size(socket, BUFFER)
}

/// Makes a socket that is not connected as it was when it was made: as a new one that does not wait, with buffers of
/// [`BUFFER`] that do not grow.
///
/// # Errors
/// Why it must not be used.
pub fn renew(socket: impl AsFd) -> Result<(), Unfit> {
    let socket = socket.as_fd();
    unfilter(socket)?;
    let local = rustix::net::getsockname(socket).map_err(|errno| Unfit::Refused("getsockname", errno.into()))?;
    if let Ok(local) = SocketAddr::try_from(local)
        && !local.ip().is_unspecified()
    {
        return Err(Unfit::Bound(local));
    }
    sockopt::set_socket_linger(socket, None).map_err(|errno| Unfit::Refused("SO_LINGER", errno.into()))?;
    without_options(socket)?;
    for setting in &SETTINGS {
        put(socket, setting)?;
    }
    // Whatever they were, and whether or not they were unlocked (`SO_BUF_LOCK`): who sets them locks them.
    bound_buffers(socket).map_err(|errno| Unfit::Refused("SO_RCVBUF or SO_SNDBUF", errno.into()))?;
    // An upper layer such as TLS, which no call takes away.
    if has_upper_layer(socket) {
        return Err(Unfit::Set("TCP_ULP"));
    }
    // Neither O_ASYNC nor anybody to send signals to.
    rustix::fs::fcntl_setfl(socket, OFlags::NONBLOCK).map_err(|errno| Unfit::Refused("F_SETFL", errno.into()))?;
    // SAFETY: F_SETOWN takes a number; 0 is nobody.
    let disowned = unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETOWN, 0) };
    if disowned < 0 { Err(Unfit::Refused("F_SETOWN", io::Error::last_os_error())) } else { Ok(()) }
}

fn unfilter(socket: BorrowedFd<'_>) -> Result<(), Unfit> {
    match set(socket, libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0) {
        Ok(()) => Ok(()),
        Err(error) => match error.raw_os_error() {
            // It has none.
            Some(libc::ENOENT) => Ok(()),
            Some(libc::EPERM) => Err(Unfit::Filtered),
            _ => Err(Unfit::Refused("SO_DETACH_FILTER", error)),
        },
    }
}

fn put(socket: BorrowedFd<'_>, setting: &Setting) -> Result<(), Unfit> {
    let Setting { level, option, name, new, told } = setting;
    let unknown = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP));
    let found = match get(socket, *level, *option) {
        Err(error) if unknown(&error) => return Ok(()),
        found => found.map_err(|error| Unfit::Refused(name, error))?,
    };
    match told {
        Told::Yes if found == *new => return Ok(()),
        // What may not be set back is seen by what it is then.
        Told::Yes => drop(set(socket, *level, *option, *new)),
        Told::No => set(socket, *level, *option, *new).map_err(|error| Unfit::Refused(name, error))?,
    }
    let now = get(socket, *level, *option).map_err(|error| Unfit::Refused(name, error))?;
    if *told == Told::Yes && now != *new { Err(Unfit::Set(name)) } else { Ok(()) }
}

/// No options in IP's heads, such as a route.
fn without_options(socket: BorrowedFd<'_>) -> Result<(), Unfit> {
    let (fd, nothing) = (socket.as_raw_fd(), std::ptr::null());
    // SAFETY: no byte is read where the length is nothing.
    let set = unsafe { libc::setsockopt(fd, libc::IPPROTO_IP, libc::IP_OPTIONS, nothing, 0) };
    if set < 0 { Err(Unfit::Refused("IP_OPTIONS", io::Error::last_os_error())) } else { Ok(()) }
}

fn has_upper_layer(socket: BorrowedFd<'_>) -> bool {
    let mut name = [0_u8; 16];
    let mut length: libc::socklen_t = 16;
    let (fd, to) = (socket.as_raw_fd(), name.as_mut_ptr().cast());
    // SAFETY: the kernel writes as many bytes as the length says, which the array has, and how many there are.
    let got = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_ULP, to, &raw mut length) };
    got == 0 && length > 0
}

fn get(socket: BorrowedFd<'_>, level: i32, option: i32) -> io::Result<i32> {
    let mut value = 0_i32;
    let mut length: libc::socklen_t = 4;
    let (fd, to) = (socket.as_raw_fd(), (&raw mut value).cast());
    // SAFETY: the kernel writes as many bytes as the length says, which an i32 has, and how many there are.
    let got = unsafe { libc::getsockopt(fd, level, option, to, &raw mut length) };
    if got < 0 { Err(io::Error::last_os_error()) } else { Ok(value) }
}

fn set(socket: BorrowedFd<'_>, level: i32, option: i32, value: i32) -> io::Result<()> {
    let (fd, from) = (socket.as_raw_fd(), (&raw const value).cast());
    // SAFETY: the kernel reads as many bytes as the length says, which an i32 has.
    let set = unsafe { libc::setsockopt(fd, level, option, from, 4) };
    if set < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read as _, Write as _},
        mem::size_of,
        net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream},
        time::Duration,
    };

    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with};

    use super::*;

    const BUFFERS: [i32; 2] = [libc::SO_RCVBUF, libc::SO_SNDBUF];
    /// `SOCK_SNDBUF_LOCK` and `SOCK_RCVBUF_LOCK`.
    const LOCKED: i32 = 3;

    /// As the child makes them, but that it waits.
    fn socket() -> TcpStream {
        let socket =
            socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("a socket");
        bound_buffers(&socket).expect("sets");
        socket.into()
    }

    fn value(socket: &TcpStream, level: i32, option: i32) -> i32 {
        get(socket.as_fd(), level, option).expect("an option")
    }

    /// A filter whose one instruction is `return bytes`.
    fn filter(socket: &TcpStream, bytes: u32) {
        let mut returns = libc::sock_filter { code: 6, jt: 0, jf: 0, k: bytes };
        let program = libc::sock_fprog { len: 1, filter: &raw mut returns };
        let (fd, from) = (socket.as_raw_fd(), (&raw const program).cast());
        let length = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).expect("small");
        // SAFETY: the program and its one instruction outlive the call.
        let set = unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, from, length) };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn a_new_socket_is_left_as_it_is() {
        let new = socket();
        renew(&new).expect("fit");
        for Setting { level, option, name, new: wanted, told } in SETTINGS {
            if let (Ok(found), Told::Yes) = (get(new.as_fd(), level, option), told) {
                assert_eq!(found, wanted, "{name}");
            }
        }
        // And serves.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let SocketAddr::V4(to) = listener.local_addr().expect("its address") else { panic!("IPv4") };
        match connect(&new, &to) {
            Ok(()) | Err(rustix::io::Errno::INPROGRESS) => {}
            Err(errno) => panic!("{errno}"),
        }
    }

    #[test]
    fn what_an_earlier_owner_set_is_set_back() {
        let used = socket();
        let changed = [
            (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1, 0),
            (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 10, -1),
            (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 5000, 1),
            (libc::SOL_SOCKET, libc::SO_OOBINLINE, 1, 0),
            (libc::IPPROTO_IP, libc::IP_MINTTL, 200, 0),
            (libc::IPPROTO_IP, libc::IP_TOS, 8, 0),
            (libc::IPPROTO_TCP, libc::TCP_CORK, 1, 0),
            (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 10, 0),
            (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 1, 0),
        ];
        for (level, option, wrong, _) in changed {
            set(used.as_fd(), level, option, wrong).expect("sets");
            assert_eq!(value(&used, level, option), wrong, "{level} {option}");
        }
        let not_told = [(libc::IPPROTO_IP, libc::IP_TTL, 1), (libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, 5000)];
        let usual = not_told.map(|(level, option, _)| value(&socket(), level, option));
        for (level, option, wrong) in not_told {
            set(used.as_fd(), level, option, wrong).expect("sets");
        }
        sockopt::set_socket_linger(&used, Some(Duration::ZERO)).expect("sets");
        let made = BUFFERS.map(|option| value(&socket(), libc::SOL_SOCKET, option));
        for (option, wrong) in BUFFERS.into_iter().zip([1, 1 << 20]) {
            set(used.as_fd(), libc::SOL_SOCKET, option, wrong).expect("sets");
        }
        // Linux before 5.16 does not know it.
        drop(set(used.as_fd(), libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0));
        let own = std::process::id().cast_signed();
        // SAFETY: F_SETOWN takes a number.
        let owned = unsafe { libc::fcntl(used.as_raw_fd(), libc::F_SETOWN, own) };
        assert_eq!(owned, 0);
        rustix::fs::fcntl_setfl(&used, OFlags::from_bits_retain(libc::O_ASYNC.unsigned_abs())).expect("sets");

        renew(&used).expect("fit");
        for (level, option, _, right) in changed {
            assert_eq!(value(&used, level, option), right, "{level} {option}");
        }
        assert_eq!(not_told.map(|(level, option, _)| value(&used, level, option)), usual);
        assert_eq!(sockopt::socket_linger(&used).expect("reads"), None);
        assert_eq!(BUFFERS.map(|option| value(&used, libc::SOL_SOCKET, option)), made);
        if let Ok(locks) = get(used.as_fd(), libc::SOL_SOCKET, libc::SO_BUF_LOCK) {
            assert_eq!(locks, LOCKED);
        }
        // SAFETY: F_GETOWN takes nothing.
        assert_eq!(unsafe { libc::fcntl(used.as_raw_fd(), libc::F_GETOWN) }, 0);
        let flags = rustix::fs::fcntl_getfl(&used).expect("reads");
        assert_eq!(
            flags & (OFlags::NONBLOCK | OFlags::from_bits_retain(libc::O_ASYNC.unsigned_abs())),
            OFlags::NONBLOCK
        );
    }

    #[test]
    fn a_filter_goes_and_one_that_is_locked_takes_the_socket_with_it() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let SocketAddr::V4(to) = listener.local_addr().expect("its address") else { panic!("IPv4") };
        let mut used = socket();
        // Everything beyond the head of the shortest segment is cut off.
        filter(&used, 20);
        set(used.as_fd(), libc::IPPROTO_TCP, libc::TCP_MAXSEG, 100).expect("sets");
        renew(&used).expect("fit");
        used.set_nonblocking(false).expect("sets");
        connect(&used, &to).expect("connects");
        let (mut other, _) = listener.accept().expect("a connection");
        other.write_all(b"whole").expect("writes");
        drop(other);
        let mut text = String::new();
        used.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "whole");
        let segment = value(&used, libc::IPPROTO_TCP, libc::TCP_MAXSEG);
        assert!(segment > 1000, "{segment}");

        let locked = socket();
        filter(&locked, 20);
        set(locked.as_fd(), libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1).expect("locks");
        // Who has CAP_NET_ADMIN over the network namespace could unlock it; nobody of those who use these sockets has.
        let unfit = renew(&locked).expect_err("it stays").to_string();
        assert!(unfit.contains("SO_LOCK_FILTER"), "{unfit}");
    }

    /// Sends until nothing more is taken for a while; how much was.
    fn fill(mut from: &TcpStream) -> usize {
        let mut sent = 0;
        from.set_write_timeout(Some(Duration::from_millis(200))).expect("sets");
        while let Ok(count) = from.write(&[b'x'; 16 << 10]) {
            sent += count;
        }
        sent
    }

    /// What lies in the buffers of one counts for the memory of the plugin that it leads into, and is for who connects to say.
    #[test]
    fn what_nobody_reads_takes_bounded_room_in_its_buffers() {
        const MOST: usize = 512 << 10;
        for used in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let SocketAddr::V4(to) = listener.local_addr().expect("its address") else { panic!("IPv4") };
            let mut inner = socket();
            if used {
                drop(set(inner.as_fd(), libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0));
                renew(&inner).expect("fit");
                inner.set_nonblocking(false).expect("waits");
            }
            connect(&inner, &to).expect("connects");
            // All that is taken while the other end reads nothing: its buffer begins small and grows by reading.
            let sent = fill(&inner);
            assert!(sent < MOST, "{used}: {sent}");

            // A reader's buffer grows with what it reads, and stays.
            let (mut plugin, _) = listener.accept().expect("a connection");
            let bytes = 8 << 20;
            let saying = std::thread::spawn(move || {
                plugin.write_all(&vec![b'x'; bytes]).expect("it is read");
                plugin
            });
            inner.read_exact(&mut vec![0; bytes]).expect("all of it");
            let plugin = saying.join().expect("it says all");
            fill(&plugin);
            let waiting = rustix::io::ioctl_fionread(&inner).expect("what waits");
            assert!(waiting > 0 && waiting < 256 << 10, "{used}: {waiting}");
            let room =
                value(&inner, libc::SOL_SOCKET, libc::SO_RCVBUF) + value(&inner, libc::SOL_SOCKET, libc::SO_SNDBUF);
            assert!(room <= 256 << 10, "{used}: {room}");
        }
    }

    #[test]
    fn what_cannot_be_set_back_is_named() {
        let bound = socket();
        bind(&bound, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0)).expect("binds");
        assert!(matches!(renew(&bound), Err(Unfit::Bound(_))));
    }
}
