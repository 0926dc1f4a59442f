//! A broker in a process of its own, a pair of plugins whose calls must go on, and places for those who attack.

use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use h2::server::SendResponse;
use http::{HeaderMap, Request};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    net::UnixListener,
    process::{Child, Command},
    sync::watch,
    task::JoinHandle,
    time::timeout,
};

use super::grpc::{PATIENCE, call, client, message, serve, within};

/// What the broker's process may grow by under any attack of one peer that no window explains: buffers of connections,
/// the allocator's slack, and pages of code that had not run yet.
pub(crate) const GROWTH: u64 = 16 * 1024 * 1024;

/// The service of a provider with this name.
pub(crate) fn service(name: &str) -> String {
    format!("t.{name}")
}

/// Who is there beside the pair.
#[derive(Default)]
pub(crate) struct Setup {
    pub(crate) callers: Vec<String>,
    pub(crate) providers: Vec<String>,
    /// How long the broker waits for a peer's beginning and its pings; its default when `None`.
    pub(crate) patience: Option<Duration>,
}

pub(crate) struct World {
    broker: Child,
    directory: tempfile::TempDir,
    listeners: HashMap<String, UnixListener>,
    lines: watch::Receiver<Vec<String>>,
    victim: Victim,
    before: u64,
}

impl World {
    /// A caller `attacker`, and a provider `target` that serves well and is theirs to call; see [`serve_target`].
    pub(crate) async fn with_attacker() -> Self {
        Self::start(Setup { callers: vec!["attacker".into()], ..Setup::default() }).await
    }

    pub(crate) async fn start(setup: Setup) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str, kind: &str| directory.path().join(format!("{name}.{kind}"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_broker-alone"));
        command.arg("--no-breakers");
        if let Some(patience) = setup.patience {
            command.arg(format!("--patience-ms={}", patience.as_millis()));
        }
        for name in setup.callers.iter().map(String::as_str).chain(["victim"]) {
            command.arg(format!("--caller={name}={}", path(name, "broker").display()));
        }
        let mut listeners = HashMap::new();
        for name in setup.providers.iter().map(String::as_str).chain(["good", "target"]) {
            let socket = path(name, "worker");
            command.arg(format!("--provider={name}={}={}", service(name), socket.display()));
            listeners.insert(name.to_owned(), UnixListener::bind(socket).unwrap());
        }
        serve(listeners.remove("good").unwrap(), |_asked, respond| async move { answer_ok(respond, b"pong") });
        serve_target(listeners.remove("target").unwrap());
        let mut broker = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let (told, lines) = watch::channel(Vec::new());
        let mut errors = BufReader::new(broker.stderr.take().unwrap()).lines();
        tokio::spawn(async move {
            while let Ok(Some(line)) = errors.next_line().await {
                told.send_modify(|lines: &mut Vec<String>| lines.push(line));
            }
        });
        let mut ready = BufReader::new(broker.stdout.take().unwrap()).lines();
        let said = within(ready.next_line()).await.unwrap();
        assert_eq!(said.as_deref(), Some("ready"), "{:?}", *lines.borrow());
        let victim = Victim::start(path("victim", "broker"), "good").await;
        let before = peak(&broker);
        Self { broker, directory, listeners, lines, victim, before }
    }

    pub(crate) fn caller(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.broker"))
    }

    pub(crate) fn provider(&mut self, name: &str) -> UnixListener {
        self.listeners.remove(name).expect("a provider of the setup, asked for once")
    }

    /// Waits for an event that has all of these words in it.
    pub(crate) async fn told(&self, words: &[&str]) {
        let mut lines = self.lines.clone();
        let found = timeout(PATIENCE, async {
            loop {
                if lines.borrow_and_update().iter().any(|line| words.iter().all(|word| line.contains(word))) {
                    return;
                }
                lines.changed().await.expect("the broker has ended");
            }
        });
        if found.await.is_err() {
            panic!("no event says {words:?}: {:#?}", *self.lines.borrow());
        }
    }

    /// The pair noticed nothing, the broker runs, and its memory grew by less than `growth` at its highest.
    pub(crate) async fn unharmed(mut self, growth: u64) {
        let grown = peak(&self.broker).saturating_sub(self.before);
        println!("the broker grew by {} KiB at most", grown / 1024);
        self.victim.finish().await;
        assert!(self.broker.try_wait().unwrap().is_none(), "the broker ended");
        assert!(grown < growth, "the broker grew by {} KiB, over {} KiB", grown / 1024, growth / 1024);
    }
}

/// The most memory that the process ever had resident (`VmHWM`, proc_pid_status(5)), in bytes.
fn peak(broker: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", broker.id().expect("the broker runs"))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a kernel that counts");
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() * 1024
}

/// A well-behaved caller whose every call must succeed.
pub(crate) struct Victim {
    calls: Arc<AtomicU64>,
    enough: Arc<AtomicBool>,
    calling: JoinHandle<()>,
}

impl Victim {
    /// Begins to call `provider`, and returns after the first calls were answered.
    pub(crate) async fn start(socket: PathBuf, provider: &str) -> Self {
        /// Between two calls: often enough to meet a short outage, seldom enough to leave the machine to the attack.
        const PACE: Duration = Duration::from_millis(3);
        let (calls, enough) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let path = format!("/{}/Ok", service(provider));
        let (counted, told) = (Arc::clone(&calls), Arc::clone(&enough));
        let sender = client(&socket).await;
        let calling = tokio::spawn(async move {
            while !told.load(Ordering::Relaxed) {
                let answer = call(&sender, asked(&path), message(b"ping")).await;
                let calls = counted.fetch_add(1, Ordering::Relaxed);
                assert_eq!((answer.status(), answer.reason()), (0, None), "the victim's call {calls}: {answer:?}");
                assert_eq!(answer.body, message(b"pong"), "the victim's call {calls}");
                tokio::time::sleep(PACE).await;
            }
        });
        let victim = Self { calls, enough, calling };
        victim.more().await;
        victim
    }

    /// Waits for a few calls more.
    async fn more(&self) {
        const MORE: u64 = 10;
        let goal = self.calls.load(Ordering::Relaxed) + MORE;
        within(async {
            while self.calls.load(Ordering::Relaxed) < goal && !self.calling.is_finished() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }

    pub(crate) async fn finish(self) {
        self.more().await;
        self.enough.store(true, Ordering::Relaxed);
        within(self.calling).await.expect("the victim was harmed");
    }
}

/// The prefix of a message of this size, and nothing of the message.
pub(crate) fn prefix(size: u32) -> Vec<u8> {
    [&[0], &size.to_be_bytes()[..]].concat()
}

/// A gRPC request with time enough for a slow machine.
pub(crate) fn asked(path: &str) -> Request<()> {
    asked_within(path, "55S")
}

pub(crate) fn asked_within(path: &str, time: &str) -> Request<()> {
    let request = Request::post(format!("http://x{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", time);
    request.body(()).unwrap()
}

/// What `target` serves: `Ok` answers at once, `Read` after the whole request, `Hang` never and reads nothing, `Flood`
/// answers without end, any other method echoes its metadata as a message of `name: value` lines.
fn serve_target(listener: UnixListener) {
    serve(listener, |mut asked, mut respond| async move {
        match asked.uri().path() {
            "/t.target/Ok" => answer_ok(respond, b"pong"),
            "/t.target/Read" => {
                while let Some(Ok(chunk)) = asked.body_mut().data().await {
                    let _ = asked.body_mut().flow_control().release_capacity(chunk.len());
                }
                answer_ok(respond, b"read");
            }
            "/t.target/Hang" => drop(std::future::poll_fn(|cx| respond.poll_reset(cx)).await),
            "/t.target/Flood" => {
                let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
                let Ok(mut to) = respond.send_response(head, false) else { return };
                let piece = message(&[7; 32 * 1024]);
                loop {
                    to.reserve_capacity(piece.len());
                    while to.capacity() < piece.len() {
                        let Some(Ok(_)) = std::future::poll_fn(|cx| to.poll_capacity(cx)).await else { return };
                    }
                    if to.send_data(piece.clone(), false).is_err() {
                        return;
                    }
                }
            }
            _ => {
                let lines: Vec<String> = asked
                    .headers()
                    .iter()
                    .map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap_or("?")))
                    .collect();
                answer_ok(respond, lines.concat().as_bytes());
            }
        }
    });
}

/// Answers with one message and status 0.
pub(crate) fn answer_ok(mut respond: SendResponse<Bytes>, payload: &[u8]) {
    let head = http::Response::builder().header("content-type", "application/grpc").body(()).unwrap();
    // Errors mean that the caller has gone, which callers here do.
    let Ok(mut to) = respond.send_response(head, false) else { return };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", "0".parse().unwrap());
    if to.send_data(message(payload), false).is_ok() {
        let _ = to.send_trailers(trailers);
    }
}
