//! What the egress proxy adds to a plugin's connections, against direct ones in the same run, and how exactly it holds a
//! bandwidth.
//!
//! The proxy is a process of its own (`egress-alone`), the server a thread of this one, everything on the loopback; direct
//! and proxied exchanges alternate, so that both meet the same machine. Three kinds of exchange are measured: a request on
//! a connection that is open (through a tunnel), a connection with its first request (CONNECT, then the request), and a plain
//! request, which the proxy sends on a connection of its own, judged anew.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::Command,
    time::Instant,
};

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::json;

use super::{
    figures::{cores, kernel, median, number},
    processes::Process,
};
use crate::build::{self, Profile};

/// What to measure.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Options {
    /// Exchanges of each kind, direct and through the proxy.
    #[arg(long, default_value_t = 2000)]
    exchanges: usize,
    /// The limit on bandwidth, in bytes per second.
    #[arg(long, default_value_t = 5_000_000)]
    rate: u32,
    /// For how long it is measured, in seconds, in each direction.
    #[arg(long, default_value_t = 5)]
    seconds: u32,
}

const BODY: &str = "0123456789";

/// Measures and prints one JSON object as the last line.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let binaries = build::bench_binaries(Profile::Release)?;
    let server = serve()?;
    let mut proxy = start(&binaries, server, None)?;
    let through: SocketAddr = proxy.ask("address")?.parse()?;
    let [open, whole, plain] = exchanges(options.exchanges, server, through)?;
    drop(proxy);
    let mut worst: f64 = 0.0;
    let mut held = Vec::new();
    for direction in [Direction::In, Direction::Out] {
        let rate = bandwidth(&binaries, options, direction)?;
        let error = (rate / f64::from(options.rate) - 1.0) * 100.0;
        eprintln!("{direction:?}: {rate:.0} bytes a second at a limit of {}: {error:+.2} %", options.rate);
        held.push(number(rate));
        worst = worst.max(error.abs());
    }
    for (name, Pair { direct, proxied }) in
        [("request on an open connection", &open), ("connection and request", &whole), ("plain request", &plain)]
    {
        eprintln!("{name}: direct {direct:.4} ms, through the proxy {proxied:.4} ms (medians)");
    }
    println!(
        "{}",
        json!({
            "p50_added_ms": number(whole.added()),
            "p50_added_open_ms": number(open.added()),
            "p50_added_plain_ms": number(plain.added()),
            "p50_direct_ms": number(whole.direct),
            "bandwidth_error_percent": number(worst),
            "bandwidth_held": held,
            "bandwidth_limit": options.rate,
            "cores": cores(),
            "kernel": kernel(),
        })
    );
    Ok(())
}

/// Medians in milliseconds.
#[derive(Debug)]
struct Pair {
    direct: f64,
    proxied: f64,
}

impl Pair {
    fn of(samples: &[(f64, f64)]) -> Self {
        let (direct, proxied): (Vec<f64>, Vec<f64>) = samples.iter().copied().unzip();
        Self { direct: median(&direct), proxied: median(&proxied) }
    }

    fn added(&self) -> f64 {
        self.proxied - self.direct
    }
}

#[derive(Clone, Copy, Debug)]
enum Direction {
    /// To the plugin.
    In,
    /// From it.
    Out,
}

fn start(binaries: &Path, server: SocketAddr, rate: Option<u32>) -> anyhow::Result<Process> {
    let mut command = Command::new(binaries.join("egress-alone"));
    command.arg("--destination").arg(server.to_string());
    if let Some(rate) = rate {
        command.arg("--bytes-per-second").arg(rate.to_string());
    }
    Process::ours("egress-alone", &mut command)
}

/// A server that answers every request of a connection with [`BODY`].
fn serve() -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || drop(answer(stream)));
        }
    });
    Ok(address)
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 0 {
        if line.ends_with("\n\r\n") {
            write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{BODY}", BODY.len())?;
            line.clear();
        }
    }
    Ok(())
}

fn connect(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn tunnel(proxy: SocketAddr, server: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = connect(proxy)?;
    stream.write_all(format!("CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let answer = read_until(&mut stream, b"\r\n\r\n")?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "the proxy said {}", String::from_utf8_lossy(&answer));
    Ok(stream)
}

fn read_until(stream: &mut TcpStream, end: &[u8]) -> anyhow::Result<Vec<u8>> {
    let (mut bytes, mut piece) = (Vec::new(), [0; 4096]);
    while !bytes.ends_with(end) {
        let read = stream.read(&mut piece)?;
        ensure!(read > 0, "it ended after {:?}", String::from_utf8_lossy(&bytes));
        bytes.extend_from_slice(&piece[..read]);
    }
    Ok(bytes)
}

fn exchange(stream: &mut TcpStream, target: &str, server: SocketAddr) -> anyhow::Result<()> {
    stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: {server}\r\n\r\n").as_bytes())?;
    let answer = read_until(stream, BODY.as_bytes())?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "the answer is {}", String::from_utf8_lossy(&answer));
    Ok(())
}

fn took(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64() * 1000.0)
}

/// What both took, in milliseconds; `direct_first` says in which order.
fn pair(
    direct_first: bool,
    direct: impl FnOnce() -> anyhow::Result<()>,
    proxied: impl FnOnce() -> anyhow::Result<()>,
) -> anyhow::Result<(f64, f64)> {
    if direct_first {
        let direct = took(direct)?;
        return Ok((direct, took(proxied)?));
    }
    let proxied = took(proxied)?;
    Ok((took(direct)?, proxied))
}

/// Each kind, direct and through the proxy in turn.
fn exchanges(count: usize, server: SocketAddr, proxy: SocketAddr) -> anyhow::Result<[Pair; 3]> {
    let mut direct = connect(server)?;
    let mut tunnelled = tunnel(proxy, server)?;
    let mut plainly = connect(proxy)?;
    let url = format!("http://{server}/");
    let (mut open, mut whole, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    // The first tenth warms up both sides.
    for round in 0..count + count / 10 {
        // Who is first finds another machine than who is second: they take turns in that too.
        let first = round % 2 == 0;
        let pairs = [
            pair(first, || exchange(&mut direct, "/", server), || exchange(&mut tunnelled, "/", server))?,
            pair(
                first,
                || exchange(&mut connect(server)?, "/", server),
                || exchange(&mut tunnel(proxy, server)?, "/", server),
            )?,
            pair(first, || exchange(&mut direct, "/", server), || exchange(&mut plainly, &url, server))?,
        ];
        if round >= count / 10 {
            let [first, second, third] = pairs;
            open.push(first);
            whole.push(second);
            plain.push(third);
        }
    }
    Ok([Pair::of(&open), Pair::of(&whole), Pair::of(&plain)])
}

/// Bytes per second that passed a proxy with a limit, in one direction.
fn bandwidth(binaries: &Path, options: &Options, direction: Direction) -> anyhow::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let server = listener.local_addr()?;
    let mut process = start(binaries, server, Some(options.rate))?;
    let proxy = process.ask("address")?.parse()?;
    let mut near = tunnel(proxy, server)?;
    let (mut far, _) = listener.accept()?;
    let bytes = usize::try_from(u64::from(options.rate) * u64::from(options.seconds)).context("too much")?;
    let (sender, receiver) = match direction {
        Direction::In => (&mut far, &mut near),
        Direction::Out => (&mut near, &mut far),
    };
    std::thread::scope(|scope| {
        let began = Instant::now();
        let sending = scope.spawn(move || sender.write_all(&vec![7; bytes]));
        let mut left = bytes;
        let mut piece = vec![0; 64 * 1024];
        while left > 0 {
            let read = receiver.read(&mut piece)?;
            ensure!(read > 0, "it ended {left} bytes early");
            left -= read;
        }
        let seconds = began.elapsed().as_secs_f64();
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        Ok(bytes as f64 / seconds)
    })
}
