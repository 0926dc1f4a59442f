//! A plugin for the tests of the walls: it makes the attempts that its arguments name, in order, and prints one line
//! for each, `NAME RESULT`, where the result is `ok`, an errno's number, or what was asked for.
#![allow(unsafe_code, reason = "raw system calls are the point")]
#![allow(missing_docs, reason = "a test program")]

mod attack;
mod files;

use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{
        fd::{FromRawFd, OwnedFd},
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
};

fn main() {
    let mut words: Vec<String> = std::env::args().skip(1).collect();
    if words == ["obey"] {
        words = orders();
    }
    match words.split_first() {
        Some((first, rest)) if first == "each" => each(rest),
        _ => all(words),
    }
}

/// Makes several series of attempts, with `then` between them, each by a process of its own, so that none can end the next
/// one; after each comes a line with how its process ended.
fn each(words: &[String]) {
    for series in words.split(|word| word == "then") {
        // SAFETY: this program has one thread.
        let child = unsafe { libc::fork() };
        if child == 0 {
            all(series.to_vec());
            std::process::exit(0);
        }
        let mut status = 0_i32;
        // SAFETY: status is a valid int for the time of the call.
        let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(waited, child, "its child");
        if libc::WIFSIGNALED(status) {
            println!("ended signal {}", libc::WTERMSIG(status));
        } else {
            println!("ended code {}", libc::WEXITSTATUS(status));
        }
    }
}

fn all(words: Vec<String>) {
    let mut args = words.into_iter();
    while let Some(name) = args.next() {
        let mut next = || args.next().expect("an argument");
        let result = match name.as_str() {
            "read" => io(fs::read(next())),
            "append" => {
                io(fs::OpenOptions::new().append(true).create(true).open(next()).and_then(|mut f| f.write_all(b"x")))
            }
            "write" => {
                let (path, text) = (next(), next());
                io(fs::write(path, text))
            }
            "mkdir" => io(fs::create_dir(next())),
            "rename" => {
                let (from, to) = (next(), next());
                io(fs::rename(from, to))
            }
            "remove" => io(fs::remove_file(next())),
            "list" => list(&next()),
            "cat" => fs::read_to_string(next()).map_or_else(|e| e.to_string(), |text| text.trim().replace('\n', "|")),
            "unix" => io(UnixStream::connect(next())),
            "abstract" => {
                io(SocketAddr::from_abstract_name(next()).and_then(|address| UnixStream::connect_addr(&address)))
            }
            "env" => std::env::vars().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join("|"),
            "socket" => {
                let (family, kind) = (next(), next());
                sys(libc::SYS_socket, [number(&family), number(&kind), 0, 0, 0, 0])
            }
            "tcp" => io(TcpStream::connect(next())),
            "tcp-bind" => io(TcpListener::bind(next())),
            "tcp-say" => tcp_say(&next(), &next()),
            "tcp-serve" => tcp_serve(&next(), number(&next())),
            "inet-descriptors" => inet_descriptors(),
            "listen-unbound" => listen_unbound(),
            "fastopen" => fastopen(number(&next())),
            "kill" => sys(libc::SYS_kill, [number(&next()), 0, 0, 0, 0, 0]),
            "thread" => {
                std::thread::Builder::new().spawn(|| ()).map_or_else(|e| io::<()>(Err(e)), |t| io(Ok(t.join())))
            }
            "eat" => eat(number(&next())),
            "hold" => {
                std::mem::forget(vec![1_u8; usize::try_from(number(&next())).unwrap_or(0)]);
                "ok".to_owned()
            }
            "forks" => forks(number(&next())),
            "daemons" => daemons(),
            "accept" => accept(),
            "exit" => std::process::exit(i32::try_from(number(&next())).unwrap_or(1)),
            "abort" => std::process::abort(),
            "pause" => loop {
                sys(libc::SYS_pause, [0; 6]);
            },
            // Numbered lines, each as long as the second argument says, for as many as the first says.
            "lines" => {
                let (count, length) = (number(&next()), number(&next()));
                let width = usize::try_from(length).unwrap_or(0).saturating_sub(1);
                let mut out = std::io::stdout().lock();
                io((0..count).try_for_each(|line| writeln!(out, "{line:0>width$}")))
            }
            // A line on stderr for each byte that comes over the worker socket, in step with whoever asks.
            "steps" => steps(),
            "bind" => io(UnixListener::bind(next())),
            "bind-accept" => bind_accept(&next()),
            "keep" => files::keep(&next()),
            "copy-exec" => copy_exec(&next()),
            "fill" => fill(&next()),
            "open-many" => open_many(),
            "ignore-xfsz" => {
                // SAFETY: SIG_IGN is a valid disposition.
                unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
                "ok".to_owned()
            }
            "raw" => {
                let (call, arguments) = (next(), next());
                let mut values = [0; 6];
                for (value, text) in values.iter_mut().zip(arguments.split(',')) {
                    *value = number(text);
                }
                sys(number(&call), values)
            }
            // The same, with what it gives instead of "ok".
            "value" => {
                let (call, arguments) = (next(), next());
                let mut values = [0; 6];
                for (value, text) in values.iter_mut().zip(arguments.split(',')) {
                    *value = number(text);
                }
                result(number(&call), values).map_or_else(|error| io::<()>(Err(error)), |value| value.to_string())
            }
            // Another program in place of this one: a line only when that fails.
            "exec" => {
                use std::os::unix::process::CommandExt;
                io::<()>(Err(std::process::Command::new(next()).exec()))
            }
            "host-name" => host_name(),
            "leads-session" => {
                // SAFETY: getsid takes a number.
                let session = unsafe { libc::getsid(0) };
                (u32::try_from(session) == Ok(std::process::id())).to_string()
            }
            "int80" => int80(),
            other => attack::attempt(other, &mut next).unwrap_or_else(|| panic!("unknown attempt {other}")),
        };
        println!("{name} {result}");
    }
}

/// What it is told to attempt over its worker socket, one word a line, so that one bundle makes every attempt.
fn orders() -> Vec<String> {
    // SAFETY: the launcher leaves the listener at descriptor 3, where it stays: it is not closed here.
    let listener = unsafe { UnixListener::from_raw_fd(3) };
    let mut text = String::new();
    listener.accept().and_then(|(mut told, _)| told.read_to_string(&mut text)).expect("orders");
    std::mem::forget(listener);
    text.lines().map(str::to_owned).collect()
}

fn number(text: &str) -> i64 {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).map(u64::cast_signed),
        None => text.parse(),
    };
    parsed.expect("a number")
}

fn io<T>(result: std::io::Result<T>) -> String {
    match result {
        Ok(_) => "ok".to_owned(),
        Err(error) => error.raw_os_error().map_or_else(|| error.to_string(), |errno| errno.to_string()),
    }
}

fn sys(call: i64, arguments: [i64; 6]) -> String {
    io(result(call, arguments))
}

fn result(call: i64, [a, b, c, d, e, f]: [i64; 6]) -> std::io::Result<i64> {
    // SAFETY: the arguments are plain numbers; where the kernel takes them for pointers they are null or invalid, which
    // it answers with an error.
    let result = unsafe { libc::syscall(call, a, b, c, d, e, f) };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(result) }
}

/// The machine's name as uname(2) gives it.
fn host_name() -> String {
    let mut name = std::mem::MaybeUninit::<libc::utsname>::zeroed();
    // SAFETY: uname fills the struct that it is given.
    unsafe { libc::uname(name.as_mut_ptr()) };
    // SAFETY: it was zeroed, and every field is an array of numbers.
    let name = unsafe { name.assume_init() };
    let bytes: Vec<u8> =
        name.nodename.iter().take_while(|byte| **byte != 0).map(|byte| byte.to_ne_bytes()[0]).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Says something over TCP and gives what is answered until the end.
fn tcp_say(to: &str, text: &str) -> String {
    let answer = TcpStream::connect(to).and_then(|mut stream| {
        stream.write_all(text.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    answer.unwrap_or_else(|error| io::<()>(Err(error)))
}

/// Listens, says so, and serves so many connections one after the other: what each says to its end is said back. A line for
/// each of them.
fn tcp_serve(to: &str, count: i64) -> String {
    let listener = match TcpListener::bind(to) {
        Ok(listener) => listener,
        Err(error) => return io::<()>(Err(error)),
    };
    println!("listening");
    for _ in 0..count {
        let served = listener.accept().and_then(|(mut stream, _)| {
            println!("accepted");
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            stream.write_all(format!("heard {text}").as_bytes())?;
            Ok(text)
        });
        println!("served {}", served.unwrap_or_else(|error| io::<()>(Err(error))));
    }
    "ok".to_owned()
}

/// How many of its descriptors are sockets of IPv4 or IPv6.
fn inet_descriptors() -> String {
    let inet = |fd: &i32| {
        let (mut domain, mut size) = (0_i32, libc::socklen_t::try_from(size_of::<i32>()).unwrap_or(0));
        // SAFETY: the buffer is an int, as SO_DOMAIN asks for, and as large as it is said to be.
        let result = unsafe {
            libc::getsockopt(*fd, libc::SOL_SOCKET, libc::SO_DOMAIN, (&raw mut domain).cast(), &raw mut size)
        };
        result == 0 && [libc::AF_INET, libc::AF_INET6].contains(&domain)
    };
    (0..1024).filter(inet).count().to_string()
}

/// Listens at no address of its own choice, and connects to what the kernel chose.
fn listen_unbound() -> String {
    // SAFETY: the arguments are plain numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
    if fd < 0 {
        return io::<()>(Err(std::io::Error::last_os_error()));
    }
    // SAFETY: fd is a new socket that nothing else owns.
    let listener = TcpListener::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let listened = sys(libc::SYS_listen, [fd.into(), 1, 0, 0, 0, 0]);
    let port = listener.local_addr().map_or(0, |address| address.port());
    format!("{listened} then {}", io(TcpStream::connect(("127.0.0.1", port))))
}

/// Connects with the first bytes, to this port of 127.0.0.1.
fn fastopen(port: i64) -> String {
    // SAFETY: the arguments are plain numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
    let address = libc::sockaddr_in {
        sin_family: 2,
        sin_port: u16::try_from(port).expect("a port").to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from_be_bytes([127, 0, 0, 1]).to_be() },
        sin_zero: [0; 8],
    };
    // SAFETY: the text and the address are valid for the lengths given and outlive the call.
    let sent = unsafe {
        let address = (&raw const address).cast();
        libc::sendto(fd, c"x".as_ptr().cast(), 1, libc::MSG_FASTOPEN, address, 16)
    };
    if sent < 0 { io::<()>(Err(std::io::Error::last_os_error())) } else { "ok".to_owned() }
}

fn list(path: &str) -> String {
    let names = fs::read_dir(path).map(|entries| {
        let mut names: Vec<String> =
            entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names.join(",")
    });
    names.unwrap_or_else(|error| io::<()>(Err(error)))
}

/// Answers each byte on one connection to its worker socket after it has written it to both streams.
fn steps() -> String {
    // SAFETY: the launcher leaves the listener at descriptor 3.
    let listener = unsafe { UnixListener::from_raw_fd(3) };
    for connection in listener.incoming() {
        let Ok(mut connection) = connection else { break };
        let mut byte = [0];
        while connection.read_exact(&mut byte).is_ok() {
            let text = char::from(byte[0]);
            println!("out {text}");
            eprintln!("err {text}");
            if connection.write_all(&byte).is_err() {
                break;
            }
        }
    }
    "over".to_owned()
}

/// Touches this many bytes.
fn eat(bytes: i64) -> String {
    let mut all = Vec::new();
    for _ in 0..bytes >> 20 {
        all.push(vec![1_u8; 1 << 20]);
    }
    format!("{} MiB", std::hint::black_box(&all).len())
}

/// Forks children that wait, until it fails or there are this many.
fn forks(most: i64) -> String {
    for made in 0..most {
        // SAFETY: the child only pauses.
        let pid = unsafe { libc::fork() };
        match pid {
            0 => loop {
                sys(libc::SYS_pause, [0; 6]);
            },
            -1 => return format!("{made} then {}", io::<()>(Err(std::io::Error::last_os_error()))),
            _ => {}
        }
    }
    format!("{most} then ok")
}

/// Leaves a daemon behind: forked twice, in a session of its own, deaf to SIGTERM and SIGHUP.
fn daemons() -> String {
    // SAFETY: the child makes only system calls.
    let first = unsafe { libc::fork() };
    if first == 0 {
        sys(libc::SYS_setsid, [0; 6]);
        // SAFETY: as above.
        let second = unsafe { libc::fork() };
        if second == 0 {
            for signal in [libc::SIGTERM, libc::SIGHUP, libc::SIGINT] {
                // SAFETY: SIG_IGN is a valid disposition.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
            loop {
                sys(libc::SYS_pause, [0; 6]);
            }
        }
        std::process::exit(0);
    }
    if first < 0 { io::<()>(Err(std::io::Error::last_os_error())) } else { "ok".to_owned() }
}

/// Serves one connection on the inherited listener: answers with what it got.
fn accept() -> String {
    // SAFETY: descriptor 3 is the inherited listener, and nothing else in this program owns it.
    let listener = unsafe { UnixListener::from_raw_fd(3) };
    let served = listener.accept().and_then(|(mut stream, _)| {
        let mut bytes = [0; 16];
        let read = stream.read(&mut bytes)?;
        stream.write_all(&bytes[..read])
    });
    io(served)
}

/// Binds a socket itself, says so, and serves one connection.
fn bind_accept(path: &str) -> String {
    let served = UnixListener::bind(path).and_then(|listener| {
        println!("bound");
        let (mut stream, _) = listener.accept()?;
        let mut bytes = [0; 16];
        let read = stream.read(&mut bytes)?;
        stream.write_all(&bytes[..read])
    });
    io(served)
}

/// Copies a program and executes the copy in place of this one; execve needs no new process.
fn copy_exec(path: &str) -> String {
    use std::os::unix::{fs::PermissionsExt, process::CommandExt};
    let made = fs::read("/usr/bin/true")
        .and_then(|bytes| fs::write(path, bytes))
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)));
    match made {
        Ok(()) => io::<()>(Err(std::process::Command::new(path).exec())),
        Err(error) => format!("not made: {error}"),
    }
}

/// Writes until it fails.
fn fill(path: &str) -> String {
    let mut file = fs::File::create(path).expect("the file");
    let chunk = vec![1; 64 << 10];
    let mut written = 0;
    loop {
        match file.write(&chunk) {
            Ok(bytes) => written += bytes,
            Err(error) => return format!("{} MiB then {}", written >> 20, io::<()>(Err(error))),
        }
    }
}

/// Opens files until it fails.
fn open_many() -> String {
    let mut all = Vec::new();
    loop {
        match fs::File::open("/dev/null") {
            Ok(file) => all.push(file),
            Err(error) => return format!("{} then {}", all.len(), io::<()>(Err(error))),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn int80() -> String {
    let result: i64;
    // SAFETY: getpid by the 32-bit gate takes no arguments and touches no memory.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("rax") 20_i64 => result, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    result.to_string()
}

#[cfg(not(target_arch = "x86_64"))]
fn int80() -> String {
    "no such gate".to_owned()
}
