//! One task owns the connection: it numbers requests, matches replies and hands notices to whom they concern.
//!
//! A request never waits for another. A launch whose asker has gone away is killed, so that no process runs without an
//! owner. When the connection ends, everything that waits fails with [`Gone`] and every [`Process`]' notices end.

use std::{
    collections::HashMap,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use plugvisor_sandbox::{
    codec::{FromLauncher, decode_from_launcher, encode_request},
    protocol::{
        Control, ControlState, Exit, Hello, Host, Launch, LaunchId, Launched, Notice, PolicyFile, Refusal, Reply,
        Request, VERSION,
    },
    seqpacket::{Packet, Received, Seqpacket},
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::{
    io::unix::AsyncFd,
    sync::{Mutex, mpsc, oneshot, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::keep::Reattachment;
use crate::readiness::register;

/// Requests that may wait to be sent.
const QUEUE: usize = 64;

/// How long any request but a launch may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// How long a launch may take on a busy host.
const LAUNCH_PATIENCE: Duration = Duration::from_secs(30);

/// Asks the launcher. Clones ask the same one.
#[derive(Clone, Debug)]
pub struct Launcher {
    asks: mpsc::Sender<Ask>,
    /// Whoever holds it imports: the launcher takes one bundle at a time.
    pub(super) importing: Arc<Mutex<()>>,
    closing: CancellationToken,
    pid: u32,
    end: watch::Receiver<Option<LauncherEnd>>,
}

/// A launched process, as the supervisor holds it.
#[derive(Debug)]
pub struct Process {
    /// What the launcher says about it.
    pub launched: Launched,
    /// Becomes readable when its first process ends.
    pub pidfd: OwnedFd,
    /// Where the plugin dials the broker; listening.
    pub broker_listener: OwnedFd,
    /// `O_PATH` descriptor of the worker socket, or of its directory when the plugin binds it.
    pub worker: OwnedFd,
    /// The reading end.
    pub stdout: OwnedFd,
    /// The reading end.
    pub stderr: OwnedFd,
    /// Where it dials the egress proxy; listening. `None` without the grant.
    pub egress: Option<OwnedFd>,
    /// What the launcher tells about this launch; ends with the launcher.
    pub notices: mpsc::Receiver<Notice>,
}

impl Process {
    /// The controls that it runs without and that are not among those that may be missing. Of a process that has ended
    /// nothing can be read, and nothing runs.
    #[must_use]
    pub fn unallowed(&self, allowed: &[Control]) -> Vec<ControlState> {
        let lacks = |state: &&ControlState| state.enforced.is_none() && !allowed.contains(&state.control);
        let lacking: Vec<ControlState> = self.launched.controls.iter().filter(lacks).cloned().collect();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let mut over = || poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
        if lacking.is_empty() || over() { Vec::new() } else { lacking }
    }
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    /// The launcher refused it and changed nothing.
    #[error("{}", .0.message)]
    Refused(Refusal),
    /// There is no launcher any more.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// No answer in time.
    #[error("the launcher did not answer within {} s", .0.as_secs())]
    Late(Duration),
    /// The request cannot be sent.
    #[error("the request does not fit the launcher's protocol: {0}")]
    Request(String),
    /// An answer that fits no such request.
    #[error("the launcher gave an answer that does not fit the question")]
    Mismatch,
}

/// There is no launcher any more, and with it no plugin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the launcher is gone")]
pub struct Gone;

/// How the connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LauncherEnd {
    /// The supervisor closed it.
    Closed,
    /// The launcher ended, or broke the protocol.
    Lost(String),
}

#[derive(Debug)]
struct Ask {
    request: Request,
    descriptors: Vec<OwnedFd>,
    reply: oneshot::Sender<Result<Answer, LauncherError>>,
}

#[derive(Debug)]
pub(super) enum Answer {
    Plain(Reply),
    Launched(Box<Process>),
    Reattached(Box<Reattachment>),
    Socket(OwnedFd),
    /// How many there are in all, and some of them.
    Inward(u16, Vec<OwnedFd>),
}

impl Launcher {
    /// Takes the connection over, says Hello and starts the task that owns it. The task ends when every clone is
    /// dropped or the launcher is gone.
    pub async fn start(connection: Seqpacket) -> Result<Self, LauncherError> {
        let connection = register(connection).map_err(|error| LauncherError::Request(error.to_string()))?;
        let (asks, receiver) = mpsc::channel(QUEUE);
        let (end_sender, end) = watch::channel(None);
        let closing = CancellationToken::new();
        let closed = closing.clone();
        let task = Task { connection, waiting: HashMap::new(), processes: HashMap::new(), next: 1 };
        tokio::spawn(async move {
            let end = closed.run_until_cancelled(task.run(receiver)).await.unwrap_or(LauncherEnd::Closed);
            end_sender.send_replace(Some(end));
        });
        let mut this = Self { asks, importing: Arc::default(), closing, pid: 0, end };
        match this.ask(Request::Hello(Hello { version: VERSION }), Vec::new(), PATIENCE).await? {
            Answer::Plain(Reply::Hello { version: VERSION, pid }) => this.pid = pid,
            _ => return Err(LauncherError::Mismatch),
        }
        Ok(this)
    }

    /// Closes the connection: the launcher kills what still runs and ends.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Its pid, for people.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes `Some` when the connection has ended.
    #[must_use]
    pub fn end(&self) -> watch::Receiver<Option<LauncherEnd>> {
        self.end.clone()
    }

    /// Which controls and levels this host can enforce.
    pub async fn probe(&self) -> Result<Host, LauncherError> {
        match self.ask(Request::Probe, Vec::new(), LAUNCH_PATIENCE).await? {
            Answer::Plain(Reply::Probe(probed)) => Ok(probed),
            _ => Err(LauncherError::Mismatch),
        }
    }

    /// The launcher's policy file as it is now.
    pub async fn policy(&self) -> Result<PolicyFile, LauncherError> {
        match self.ask(Request::Policy, Vec::new(), PATIENCE).await? {
            Answer::Plain(Reply::Policy(file)) => Ok(file),
            _ => Err(LauncherError::Mismatch),
        }
    }

    /// Starts a plugin from a bundle in the launcher's store, see [`Launcher::import`].
    pub async fn launch(&self, launch: Launch) -> Result<Process, LauncherError> {
        let request = Request::Launch(Box::new(launch));
        match self.ask(request, Vec::new(), LAUNCH_PATIENCE).await? {
            Answer::Launched(process) => Ok(*process),
            Answer::Plain(_) | Answer::Reattached(_) | Answer::Socket(_) | Answer::Inward(..) => {
                Err(LauncherError::Mismatch)
            }
        }
    }

    /// Sends a signal to the launch's first process.
    pub async fn signal(&self, launch: LaunchId, signal: i32) -> Result<(), LauncherError> {
        self.done(Request::Signal { launch, signal }, Vec::new()).await
    }

    /// Kills every process of the launch.
    pub async fn kill(&self, launch: LaunchId) -> Result<(), LauncherError> {
        self.done(Request::Kill { launch }, Vec::new()).await
    }

    /// The launch's controls as the kernel shows them now.
    pub async fn inspect(&self, launch: LaunchId) -> Result<Vec<ControlState>, LauncherError> {
        match self.ask(Request::Inspect { launch }, Vec::new(), PATIENCE).await? {
            Answer::Plain(Reply::Inspected(controls)) => Ok(controls),
            _ => Err(LauncherError::Mismatch),
        }
    }

    pub(super) async fn done(&self, request: Request, descriptors: Vec<OwnedFd>) -> Result<(), LauncherError> {
        match self.ask(request, descriptors, PATIENCE).await? {
            Answer::Plain(Reply::Done) => Ok(()),
            _ => Err(LauncherError::Mismatch),
        }
    }

    pub(super) async fn ask(
        &self,
        request: Request,
        descriptors: Vec<OwnedFd>,
        patience: Duration,
    ) -> Result<Answer, LauncherError> {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            self.asks.send(Ask { request, descriptors, reply }).await.map_err(|_| Gone)?;
            answer.await.map_err(|_| Gone)?
        };
        timeout(patience, asked).await.unwrap_or(Err(LauncherError::Late(patience)))
    }
}

/// Owns the connection.
pub(super) struct Task {
    connection: AsyncFd<Seqpacket>,
    waiting: HashMap<u64, Waiting>,
    pub(super) processes: HashMap<LaunchId, mpsc::Sender<Notice>>,
    next: u64,
}

struct Waiting {
    /// `None`: nobody waits for the answer (a kill that this task asked for itself).
    reply: Option<oneshot::Sender<Result<Answer, LauncherError>>>,
    kind: Kind,
}

/// Which answers fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Launch,
    Reattach,
    Take,
    Inward,
    Plain,
}

impl Task {
    async fn run(mut self, mut asks: mpsc::Receiver<Ask>) -> LauncherEnd {
        loop {
            // Both branches are cancel-safe: `recv` by its documentation, `receive` because it takes a packet only in
            // the poll in which it returns it.
            let step = tokio::select! {
                ask = asks.recv() => match ask {
                    Some(ask) => self.send(ask).await,
                    None => return LauncherEnd::Closed,
                },
                received = receive(&self.connection) => match received {
                    Ok(Received::Packet(packet)) => self.handle(packet).await,
                    Ok(Received::Closed) => Err("it closed the connection".to_owned()),
                    Ok(Received::Truncated(_)) => Err("it sent a packet over the protocol's bounds".to_owned()),
                    Err(error) => Err(error.to_string()),
                },
            };
            if let Err(why) = step {
                return LauncherEnd::Lost(why);
            }
        }
    }

    async fn send(&mut self, ask: Ask) -> Result<(), String> {
        let Ask { request, descriptors, reply } = ask;
        let id = self.next;
        self.next += 1;
        let bytes = match encode_request(id, &request) {
            Ok(bytes) => bytes,
            Err(error) => {
                let _ = reply.send(Err(LauncherError::Request(error.to_string())));
                return Ok(());
            }
        };
        let kind = match request {
            Request::Launch(_) => Kind::Launch,
            Request::Reattach { .. } => Kind::Reattach,
            Request::TakeFd { .. } => Kind::Take,
            Request::Inward { .. } => Kind::Inward,
            _ => Kind::Plain,
        };
        self.waiting.insert(id, Waiting { reply: Some(reply), kind });
        self.transmit(&bytes, &descriptors).await
    }

    async fn transmit(&self, bytes: &[u8], descriptors: &[OwnedFd]) -> Result<(), String> {
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        loop {
            let mut ready = self.connection.writable().await.map_err(|error| error.to_string())?;
            match ready.try_io(|connection| connection.get_ref().try_send(bytes, &descriptors)) {
                Ok(sent) => return sent.map_err(|error| error.to_string()),
                Err(_would_block) => {}
            }
        }
    }

    async fn handle(&mut self, packet: Packet) -> Result<(), String> {
        let Packet { bytes, descriptors } = packet;
        match decode_from_launcher(&bytes).map_err(|error| error.to_string())? {
            FromLauncher::Notice(notice) => {
                self.notice(notice);
                Ok(())
            }
            FromLauncher::Reply { id, reply } => self.reply(id, reply, descriptors).await,
        }
    }

    fn notice(&mut self, notice: Notice) {
        let (launch, last) = match &notice {
            Notice::Exited { launch, .. } => (*launch, true),
            Notice::OutOfMemory { launch } => (*launch, false),
        };
        if let Some(process) = self.processes.get(&launch) {
            // The channel holds every notice that a launch can have; a full one means a launcher that repeats itself.
            let _ = process.try_send(notice);
        }
        if last {
            self.processes.remove(&launch);
        }
    }

    async fn reply(&mut self, id: u64, reply: Reply, descriptors: Vec<OwnedFd>) -> Result<(), String> {
        let waiting =
            self.waiting.remove(&id).ok_or_else(|| format!("it answered request {id}, which nobody asked"))?;
        let answer = match reply {
            Reply::Launched(launched) if waiting.kind == Kind::Launch => {
                // Registered before anything else is read, so that not even the first notice is lost.
                let (sender, notices) = mpsc::channel(4);
                let launch = launched.launch;
                let process = process(launched, descriptors, notices).ok_or("a launch came without its descriptors")?;
                self.processes.insert(launch, sender);
                Ok(Answer::Launched(Box::new(process)))
            }
            Reply::Reattached(reattached) if waiting.kind == Kind::Reattach => {
                let taken = self.reattached(reattached, descriptors);
                Ok(Answer::Reattached(Box::new(taken.ok_or("a launch was handed over without its descriptors")?)))
            }
            Reply::Taken if waiting.kind == Kind::Take => {
                let socket = descriptors.into_iter().next().ok_or("a held socket came without its descriptor")?;
                Ok(Answer::Socket(socket))
            }
            Reply::Inward { all } if waiting.kind == Kind::Inward => Ok(Answer::Inward(all, descriptors)),
            Reply::Refused(refusal) => Err(LauncherError::Refused(refusal)),
            other => Ok(Answer::Plain(other)),
        };
        let Some(sender) = waiting.reply else { return Ok(()) };
        match sender.send(answer) {
            // The asker gave up; what it asked for must not run on without an owner.
            Err(Ok(Answer::Launched(process))) => self.disown(process.launched.launch).await,
            _ => Ok(()),
        }
    }

    async fn disown(&mut self, launch: LaunchId) -> Result<(), String> {
        self.processes.remove(&launch);
        let id = self.next;
        self.next += 1;
        self.waiting.insert(id, Waiting { reply: None, kind: Kind::Plain });
        let bytes = encode_request(id, &Request::Kill { launch }).map_err(|error| error.to_string())?;
        self.transmit(&bytes, &[]).await
    }
}

async fn receive(connection: &AsyncFd<Seqpacket>) -> io::Result<Received> {
    loop {
        let mut ready = connection.readable().await?;
        match ready.try_io(|connection| connection.get_ref().try_recv()) {
            Ok(received) => return received,
            Err(_would_block) => {}
        }
    }
}

pub(super) fn process(
    launched: Launched,
    descriptors: Vec<OwnedFd>,
    notices: mpsc::Receiver<Notice>,
) -> Option<Process> {
    let mut descriptors = descriptors.into_iter();
    let process = Process {
        launched,
        pidfd: descriptors.next()?,
        broker_listener: descriptors.next()?,
        worker: descriptors.next()?,
        stdout: descriptors.next()?,
        stderr: descriptors.next()?,
        egress: descriptors.next(),
        notices,
    };
    descriptors.next().is_none().then_some(process)
}

/// How a process ended, in words such as "exit code 3" and "SIGKILL".
#[must_use]
pub fn describe_exit(exit: Exit) -> String {
    match exit {
        Exit::Code(code) => format!("exit code {code}"),
        Exit::Signal(signal) => signal_name(signal),
    }
}

/// The name of a signal, such as "SIGKILL".
#[must_use]
pub fn signal_name(signal: i32) -> String {
    nix::sys::signal::Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |known| known.to_string())
}

#[cfg(test)]
mod tests {
    use plugvisor_sandbox::{
        codec::{decode_request, encode_notice, encode_reply},
        protocol::{Level, Limits, RefusalCode, Tier},
    };

    use super::*;

    /// The other end, speaking the real protocol over a real socket.
    struct Peer(AsyncFd<Seqpacket>);

    impl Peer {
        async fn request(&self) -> (u64, Request, usize) {
            let Received::Packet(packet) = receive(&self.0).await.unwrap() else { panic!("no packet") };
            let (id, request) = decode_request(&packet.bytes).unwrap();
            (id, request, packet.descriptors.len())
        }

        fn reply(&self, id: u64, reply: &Reply, descriptors: &[BorrowedFd<'_>]) {
            self.0.get_ref().try_send(&encode_reply(id, reply).unwrap(), descriptors).unwrap();
        }
    }

    async fn connected() -> (Launcher, Peer) {
        let (ours, theirs) = Seqpacket::pair().unwrap();
        let peer = Peer(register(theirs).unwrap());
        let hello = async {
            let (id, request, _) = peer.request().await;
            assert_eq!(request, Request::Hello(Hello { version: VERSION }));
            peer.reply(id, &Reply::Hello { version: VERSION, pid: 7 }, &[]);
        };
        let (launcher, ()) = tokio::join!(Launcher::start(ours), hello);
        (launcher.unwrap(), peer)
    }

    fn launch() -> Launch {
        Launch {
            plugin: "gallery".into(),
            generation: 1,
            level: Level::Process,
            bundle: [0; 32],
            tier: Tier::Untrusted,
            approval: None,
            limits: Limits::default(),
            grants: Vec::new(),
            environment: Vec::new(),
            inward: 0,
            allow_degraded: Vec::new(),
        }
    }

    fn launched(id: u64) -> Reply {
        let (controls, cgroups) = (Vec::new(), Vec::new());
        Reply::Launched(Launched {
            launch: LaunchId(id),
            pid: 1,
            uid: 2,
            controls,
            directories: Vec::new(),
            cgroups,
            launch_exec_nanos: 3,
            parts: Vec::new(),
        })
    }

    fn null() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[tokio::test]
    async fn an_exit_right_behind_the_launch_is_not_lost() {
        let (launcher, peer) = connected().await;
        assert_eq!(launcher.pid(), 7);
        let answer = async {
            let (id, _, descriptors) = peer.request().await;
            assert_eq!(descriptors, 0);
            peer.reply(id, &launched(5), &[null().as_fd(); 5]);
            let exited = Notice::Exited { launch: LaunchId(5), exit: Exit::Signal(9), oom_killed: false };
            peer.0.get_ref().try_send(&encode_notice(&exited).unwrap(), &[]).unwrap();
            exited
        };
        let (process, exited) = tokio::join!(launcher.launch(launch()), answer);
        let mut process = process.unwrap();
        assert_eq!(process.notices.recv().await, Some(exited));
        assert_eq!(process.notices.recv().await, None, "an exit is the last notice");
    }

    #[tokio::test]
    async fn answers_find_their_questions_in_any_order() {
        let (launcher, peer) = connected().await;
        let answers = async {
            let (first, one, _) = peer.request().await;
            let (second, two, _) = peer.request().await;
            assert_ne!(one, two);
            let refusal = Refusal { code: RefusalCode::UnknownLaunch, message: "no such launch".into() };
            let (kill, signal) = if matches!(one, Request::Kill { .. }) { (first, second) } else { (second, first) };
            peer.reply(signal, &Reply::Done, &[]);
            peer.reply(kill, &Reply::Refused(refusal), &[]);
        };
        let (kill, signal, ()) = tokio::join!(launcher.kill(LaunchId(1)), launcher.signal(LaunchId(2), 15), answers);
        assert!(matches!(kill, Err(LauncherError::Refused(refusal)) if refusal.code == RefusalCode::UnknownLaunch));
        signal.unwrap();
    }

    #[tokio::test]
    async fn a_launch_that_nobody_waits_for_is_killed() {
        let (launcher, peer) = connected().await;
        let asked = tokio::spawn({
            let launcher = launcher.clone();
            async move { launcher.launch(launch()).await }
        });
        let (id, _, _) = peer.request().await;
        asked.abort();
        assert!(asked.await.unwrap_err().is_cancelled());
        peer.reply(id, &launched(6), &[null().as_fd(); 5]);
        let (_, request, _) = peer.request().await;
        assert_eq!(request, Request::Kill { launch: LaunchId(6) });
    }

    #[tokio::test]
    async fn when_it_dies_everyone_learns() {
        let (launcher, peer) = connected().await;
        let mut end = launcher.end();
        let (probed, ()) = tokio::join!(launcher.probe(), async {
            peer.request().await;
            drop(peer);
        });
        assert!(matches!(probed, Err(LauncherError::Gone(Gone))));
        let end = end.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(end, Some(LauncherEnd::Lost("it closed the connection".into())));
        assert!(matches!(launcher.probe().await, Err(LauncherError::Gone(Gone))));
    }

    #[tokio::test]
    async fn garbage_ends_the_connection() {
        let (launcher, peer) = connected().await;
        let mut end = launcher.end();
        peer.0.get_ref().try_send(b"garbage", &[]).unwrap();
        let end = end.wait_for(Option::is_some).await.unwrap().clone();
        assert!(matches!(end, Some(LauncherEnd::Lost(why)) if why.contains("header")));
    }
}
