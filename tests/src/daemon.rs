//! A running plugvisord: its clients, what it prints, and its end with nothing left behind.

use std::{
    collections::{BTreeSet, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use plugvisor_client::Client;
use plugvisor_proto::admin::v1::{
    DescribePluginRequest, DescribePluginResponse, GetStatusRequest, GetStatusResponse, PluginState, PluginStatus,
    WatchEventsRequest, admin_client::AdminClient,
};
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixStream,
    process::{Child, ChildStderr},
    sync::watch,
    task::JoinHandle,
};

use crate::contract::{
    ActRequest, ActResponse, act_request::Deed, echo_service_client::EchoServiceClient,
    hostile_service_client::HostileServiceClient,
};
use crate::{
    CliOutput, EventLog, Lane, Neighbour, Process, Scrape, World, cli, descendants, events, scrape, stretched,
};

/// How long a start may take.
const START: Duration = Duration::from_secs(90);
/// How long a stop may take: a drain, a plugin that ignores SIGTERM, and the slowness of the machine.
const STOP: Duration = Duration::from_secs(90);
/// How many lines of the daemon's output are kept for messages.
const LINES: usize = 400;

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    world: World,
    child: Child,
    process: Process,
    launcher: Process,
    printed: Printed,
    events: EventLog,
    watching: JoinHandle<()>,
    metrics: String,
}

/// What belonged to a daemon at one moment and must be gone after its end.
#[derive(Debug)]
pub struct Remains {
    processes: Vec<Process>,
    cgroups: BTreeSet<PathBuf>,
    runtime: PathBuf,
}

impl Daemon {
    pub(crate) async fn start(world: World) -> anyhow::Result<Self> {
        let mut child = world.command()?.spawn().context("cannot start plugvisord")?;
        let pid = child.id().context("plugvisord has no pid")?;
        let stderr = child.stderr.take().context("plugvisord has no standard error")?;
        let printed = Printed::read(stderr);
        let admin = world.runtime().join("admin.sock");
        if let Err(error) = tokio::time::timeout(stretched(START), answers(&admin, &mut child, &printed))
            .await
            .unwrap_or_else(|_| Err(anyhow::anyhow!("no answer on {} in {START:?}", admin.display())))
        {
            // What it said last is what explains it, and comes through a pipe.
            let _ = tokio::time::timeout(Duration::from_secs(5), printed.end()).await;
            bail!("plugvisord ({}) did not start: {error:#}\n{}", world.lane(), printed.text());
        }
        let mut client = AdminClient::new(Client::lazy(&admin));
        let status = client.get_status(GetStatusRequest {}).await.context("GetStatus")?.into_inner();
        let supervisor = status.supervisor.context("the status has no supervisor")?;
        ensure!(supervisor.pid == pid, "the status says pid {}, plugvisord is {pid}", supervisor.pid);
        let process = Process::open(pid).context("plugvisord has ended")?;
        let launcher = Process::open(supervisor.launcher_pid)
            .with_context(|| format!("the launcher {} has ended", supervisor.launcher_pid))?;
        let events = EventLog::new();
        let request = WatchEventsRequest { after_sequence: Some(0), follow: true, ..WatchEventsRequest::default() };
        let mut stream = client.watch_events(request).await.context("WatchEvents")?.into_inner();
        let log = events.clone();
        let watching = tokio::spawn(async move {
            while let Ok(Some(answer)) = stream.message().await {
                if let Some(event) = answer.event {
                    log.push(event);
                }
            }
        });
        Ok(Self { world, child, process, launcher, printed, events, watching, metrics: supervisor.metrics_address })
    }

    /// The lane.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.world.lane()
    }

    /// The temporary directory and what is in it.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// plugvisord's process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// The launcher's process.
    #[must_use]
    pub fn launcher(&self) -> &Process {
        &self.launcher
    }

    /// What the daemon said since its start.
    #[must_use]
    pub fn events(&self) -> &EventLog {
        &self.events
    }

    /// The address of `/metrics`, as the status gives it.
    #[must_use]
    pub fn metrics_address(&self) -> &str {
        &self.metrics
    }

    /// What plugvisord printed on standard error, the last lines; for messages. What was printed comes through a pipe:
    /// that it printed something is awaited by [`Self::prints`].
    #[must_use]
    pub fn printed(&self) -> String {
        self.printed.text()
    }

    /// Waits until plugvisord has printed a line with all of these words, and returns it; events are among the lines.
    ///
    /// # Errors
    /// When none came in [`events::patience()`].
    pub async fn prints(&self, words: &[&str]) -> anyhow::Result<String> {
        let found = tokio::time::timeout(events::patience(), self.printed.line(words)).await.ok().flatten();
        found.with_context(|| format!("plugvisord did not print {words:?}\n{}", self.account()))
    }

    /// A place in the log of events after everything that the daemon has said by now: what comes after it is new.
    ///
    /// # Errors
    /// When the daemon does not tell its last event, or that event does not come.
    pub async fn now(&self) -> anyhow::Result<usize> {
        let mut last = self.events.all().last().map_or(0, |event| event.sequence);
        let request = WatchEventsRequest { after_sequence: Some(last), ..WatchEventsRequest::default() };
        let mut said = self.admin().watch_events(request).await.context("WatchEvents")?.into_inner();
        while let Some(answer) = said.message().await.context("WatchEvents")? {
            last = answer.event.map_or(last, |event| event.sequence);
        }
        if last > 0 {
            self.events.wait("the last event so far", |event| event.sequence >= last).await?;
        }
        Ok(self.events.mark())
    }

    /// Waits until what a plugin printed has come through its pipe, and returns all lines with these words. `what` are
    /// further arguments of `plugvisor logs`.
    ///
    /// # Errors
    /// When there are fewer than `at_least` after [`events::patience()`].
    pub async fn logged(
        &self,
        plugin: &str,
        what: &[&str],
        words: &str,
        at_least: usize,
    ) -> anyhow::Result<Vec<String>> {
        let deadline = tokio::time::Instant::now() + events::patience();
        let arguments = [&["logs", plugin], what].concat();
        loop {
            let logs = self.cli(&arguments).await?;
            ensure!(logs.code == Some(0), "{logs:?}");
            let found: Vec<String> =
                logs.stdout.lines().filter(|line| line.contains(words)).map(str::to_owned).collect();
            if found.len() >= at_least {
                return Ok(found);
            }
            ensure!(tokio::time::Instant::now() < deadline, "{plugin} did not print {words:?}: {logs:?}");
            // Nothing tells a stranger that a line was taken out of a pipe.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A client of the admin socket.
    #[must_use]
    pub fn admin(&self) -> AdminClient<Client> {
        AdminClient::new(Client::lazy(self.world.runtime().join("admin.sock")))
    }

    /// A connection to `calls.sock`, for any generated client. Its calls have more time than the broker's default gives:
    /// a machine that stands still for some seconds is no failure of the daemon's.
    #[must_use]
    pub fn calls(&self) -> Client {
        Client::lazy(self.calls_socket()).with_timeout(events::patience())
    }

    /// A client of the good citizen.
    #[must_use]
    pub fn echo(&self) -> EchoServiceClient<Client> {
        EchoServiceClient::new(self.calls())
    }

    /// A client of the hostile plugin with this name. It accepts answers of any size.
    #[must_use]
    pub fn hostile(&self, name: &str) -> HostileServiceClient<Client> {
        let calls = self.calls().with_token(name).expect("a plugin's name can be metadata");
        HostileServiceClient::new(calls).max_decoding_message_size(usize::MAX).max_encoding_message_size(usize::MAX)
    }

    /// Has a hostile plugin do a deed and returns its answer.
    ///
    /// # Errors
    /// The status that the call ended with.
    pub async fn act(&self, name: &str, deed: Deed) -> Result<ActResponse, tonic::Status> {
        let request = ActRequest { ballast: Vec::new(), deed: Some(deed) };
        Ok(self.hostile(name).act(request).await?.into_inner())
    }

    /// The path of `calls.sock`.
    #[must_use]
    pub fn calls_socket(&self) -> PathBuf {
        self.world.runtime().join("calls.sock")
    }

    /// Begins to call the echo service, which must not notice anything.
    #[must_use]
    pub fn neighbour(&self) -> Neighbour {
        Neighbour::start(&self.calls_socket())
    }

    /// The whole status.
    ///
    /// # Errors
    /// When the admin socket does not answer.
    pub async fn status(&self) -> anyhow::Result<GetStatusResponse> {
        Ok(self.admin().get_status(GetStatusRequest {}).await.context("GetStatus")?.into_inner())
    }

    /// One plugin's line of the status.
    ///
    /// # Errors
    /// When there is no such plugin.
    pub async fn plugin(&self, name: &str) -> anyhow::Result<PluginStatus> {
        let status = self.status().await?;
        let names: Vec<String> = status.plugins.iter().map(|plugin| plugin.name.clone()).collect();
        status
            .plugins
            .into_iter()
            .find(|plugin| plugin.name == name)
            .with_context(|| format!("no plugin {name} in the status, only {names:?}\n{}", self.account()))
    }

    /// Everything about one plugin.
    ///
    /// # Errors
    /// When there is no such plugin.
    pub async fn describe(&self, name: &str) -> anyhow::Result<DescribePluginResponse> {
        let request = DescribePluginRequest { name: name.to_owned() };
        Ok(self.admin().describe_plugin(request).await.with_context(|| format!("DescribePlugin {name}"))?.into_inner())
    }

    /// Waits until the plugin is LOADED and returns its status. Driven by the events: each may have changed it.
    ///
    /// # Errors
    /// When it is not in [`events::patience`].
    pub async fn loaded(&self, name: &str) -> anyhow::Result<PluginStatus> {
        self.in_state(name, PluginState::Loaded).await
    }

    /// Waits until the plugin is in this state and returns its status.
    ///
    /// # Errors
    /// When it is not in [`events::patience`].
    pub async fn in_state(&self, name: &str, state: PluginState) -> anyhow::Result<PluginStatus> {
        self.until(name, state.as_str_name(), |plugin| plugin.state() == state).await
    }

    /// Waits until the plugin's status is as wanted and returns it.
    ///
    /// # Errors
    /// When it is not in [`events::patience`].
    pub async fn until(
        &self,
        name: &str,
        what: &str,
        wanted: impl Fn(&PluginStatus) -> bool,
    ) -> anyhow::Result<PluginStatus> {
        let deadline = tokio::time::Instant::now() + events::patience();
        loop {
            let mark = self.events.mark();
            // It may not have been discovered yet.
            let plugin = self.status().await?.plugins.into_iter().find(|plugin| plugin.name == name);
            if let Some(plugin) = plugin.clone().filter(&wanted) {
                return Ok(plugin);
            }
            let next = self.events.wait_after(mark, "any event", |_| true);
            if !matches!(tokio::time::timeout_at(deadline, next).await, Ok(Ok(_))) {
                bail!("{name} is not {what} but {plugin:?}\n{}", self.account());
            }
        }
    }

    /// Runs the command line tool against this daemon.
    ///
    /// # Errors
    /// When it cannot be run or does not end.
    pub async fn cli(&self, arguments: &[&str]) -> anyhow::Result<CliOutput> {
        let program = self.world.binaries().path("plugvisor")?;
        cli::run(&program, &self.world.runtime().join("admin.sock"), arguments).await
    }

    /// Reads `/metrics`.
    ///
    /// # Errors
    /// When it does not answer 200 in the text format.
    pub async fn scrape(&self) -> anyhow::Result<Scrape> {
        let (status, body) = self.http("/metrics").await?;
        ensure!(status == 200, "/metrics answered {status}: {body}");
        Scrape::parse(&body)
    }

    /// Scrapes until the page is as wanted: what is counted may come to the page a moment after it has happened.
    ///
    /// # Errors
    /// When it is not in [`events::patience()`].
    pub async fn scraped(&self, what: &str, wanted: impl Fn(&Scrape) -> bool) -> anyhow::Result<Scrape> {
        let deadline = tokio::time::Instant::now() + events::patience();
        loop {
            let scrape = self.scrape().await?;
            if wanted(&scrape) {
                return Ok(scrape);
            }
            ensure!(tokio::time::Instant::now() < deadline, "not in the metrics: {what}\n{}", self.account());
            // A page does not tell that it has changed.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// GETs a path at the metrics address: the status and the body.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn http(&self, path: &str) -> anyhow::Result<(u16, String)> {
        scrape::get(&self.metrics, path).await
    }

    /// Events and output so far, for messages.
    #[must_use]
    pub fn account(&self) -> String {
        format!("{}{}", self.events.listing(), self.printed.text())
    }

    /// What belongs to the daemon now.
    #[must_use]
    pub fn remains(&self) -> Remains {
        // A launcher that was found, or started elsewhere, is nobody's child here.
        let mut processes = descendants(self.process.pid);
        let mut others = descendants(self.launcher.pid);
        others.extend(Process::open(self.launcher.pid));
        others.retain(|other| processes.iter().all(|process| process.pid != other.pid));
        processes.append(&mut others);
        let cgroups = processes.iter().flat_map(Process::own_cgroups).collect();
        Remains { processes, cgroups, runtime: self.world.runtime() }
    }

    /// Ends the daemon with SIGTERM and asserts that it ended well and left nothing.
    ///
    /// # Errors
    /// Names what is left, or how it ended.
    pub async fn stop(self) -> anyhow::Result<()> {
        self.stop_for_another().await.map(drop)
    }

    /// As [`Self::stop`], and hands back the world with what the daemon remembers, for another to be started in.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub async fn stop_for_another(mut self) -> anyhow::Result<World> {
        let remains = self.remains();
        self.process.signal(Signal::TERM).context("SIGTERM to plugvisord")?;
        let ended = tokio::time::timeout(stretched(STOP), self.child.wait()).await;
        self.watching.abort();
        let printed = self.printed.text();
        let status = ended.with_context(|| format!("plugvisord runs {STOP:?} after SIGTERM\n{printed}"))??;
        ensure!(status.success(), "plugvisord ended with {status} after SIGTERM\n{printed}");
        remains.gone().await.with_context(|| format!("after a clean stop\n{printed}"))?;
        remains.no_files().with_context(|| format!("after a clean stop\n{printed}"))?;
        Ok(self.world)
    }

    /// Ends the daemon with SIGKILL, waits until nothing of it runs, and hands back the world.
    ///
    /// # Errors
    /// Names what is left.
    pub async fn kill_for_another(mut self) -> anyhow::Result<World> {
        let remains = self.remains();
        self.process.signal(Signal::KILL).context("SIGKILL to plugvisord")?;
        self.ended().await?;
        self.watching.abort();
        remains.gone().await?;
        Ok(self.world)
    }

    /// Ends the daemon with SIGKILL and leaves what outlives it: the world, and what belonged to the daemon.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn die(mut self) -> anyhow::Result<(World, Remains)> {
        let remains = self.remains();
        self.process.signal(Signal::KILL).context("SIGKILL to plugvisord")?;
        self.ended().await?;
        self.watching.abort();
        Ok((self.world, remains))
    }

    /// Ends a daemon with SIGTERM whose launcher goes on, and leaves the world.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub async fn leave(mut self) -> anyhow::Result<World> {
        self.process.signal(Signal::TERM).context("SIGTERM to plugvisord")?;
        let code = self.ended().await?;
        self.watching.abort();
        ensure!(code == Some(0), "plugvisord ended with {code:?} after SIGTERM\n{}", self.printed.text());
        Ok(self.world)
    }

    /// Waits for the daemon's own end and returns its exit code, `None` when a signal ended it.
    ///
    /// # Errors
    /// When it goes on running.
    pub async fn ended(&mut self) -> anyhow::Result<Option<i32>> {
        let status = tokio::time::timeout(stretched(STOP), self.child.wait())
            .await
            .with_context(|| format!("plugvisord goes on running\n{}", self.printed.text()))??;
        Ok(status.code())
    }
}

impl Remains {
    /// The processes that were found.
    #[must_use]
    pub fn processes(&self) -> &[Process] {
        &self.processes
    }

    /// The cgroup directories that were found.
    #[must_use]
    pub fn cgroups(&self) -> &BTreeSet<PathBuf> {
        &self.cgroups
    }

    /// Asserts that every process has ended and every cgroup was removed.
    ///
    /// # Errors
    /// Names those that are left.
    pub async fn gone(&self) -> anyhow::Result<()> {
        for process in &self.processes {
            process.wait(events::patience()).await.context("a process is left")?;
        }
        let left: Vec<&PathBuf> = self.cgroups.iter().filter(|path| path.exists()).collect();
        ensure!(left.is_empty(), "cgroups are left: {left:?}");
        Ok(())
    }

    /// Asserts that the runtime directory is empty or gone.
    ///
    /// # Errors
    /// Names the files that are left.
    pub fn no_files(&self) -> anyhow::Result<()> {
        let left: Vec<_> = fs::read_dir(&self.runtime)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok().map(|entry| entry.file_name()))
            .collect();
        ensure!(left.is_empty(), "{} still has {left:?}", self.runtime.display());
        Ok(())
    }
}

/// Waits until somebody answers on the socket: tried again whenever the daemon printed something.
async fn answers(socket: &Path, child: &mut Child, printed: &Printed) -> anyhow::Result<()> {
    let mut lines = printed.all.subscribe();
    loop {
        if UnixStream::connect(socket).await.is_ok() {
            return Ok(());
        }
        tokio::select! {
            status = child.wait() => bail!("it ended with {}", status?),
            changed = lines.changed() => {
                if changed.is_err() {
                    // Standard error was closed: only its end can follow.
                    bail!("it ended with {}", child.wait().await?);
                }
            }
        }
    }
}

/// The last lines of the daemon's standard error.
#[derive(Clone, Debug)]
struct Printed {
    lines: Arc<Mutex<VecDeque<String>>>,
    /// Every line from the start on, events too.
    all: watch::Sender<Vec<String>>,
    /// Whether standard error has ended.
    over: watch::Receiver<bool>,
}

impl Printed {
    fn read(stderr: ChildStderr) -> Self {
        let lines = Arc::new(Mutex::new(VecDeque::new()));
        let all = watch::Sender::new(Vec::new());
        let (kept, every) = (Arc::clone(&lines), all.clone());
        let (ends, over) = watch::channel(false);
        tokio::spawn(async move {
            let mut reader = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = reader.next_line().await {
                every.send_modify(|all| all.push(line.clone()));
                // The events come by the admin stream already, and in full.
                if line.contains(" event: ") {
                    continue;
                }
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.len() == LINES {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
            ends.send_replace(true);
        });
        Self { lines, all, over }
    }

    /// Waits until standard error has ended, which somebody who inherited it may hold up.
    async fn end(&self) {
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    /// The first line with all of these words, once it has come; `None` when standard error has ended without it.
    async fn line(&self, words: &[&str]) -> Option<String> {
        let wanted = |line: &&String| words.iter().all(|word| line.contains(word));
        let mut all = self.all.subscribe();
        loop {
            let over = *self.over.borrow();
            if let Some(found) = all.borrow_and_update().iter().find(wanted) {
                return Some(found.clone());
            }
            if over {
                return None;
            }
            tokio::select! {
                changed = all.changed() => changed.ok()?,
                () = self.end() => {}
            }
        }
    }

    fn text(&self) -> String {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::from("plugvisord printed:\n");
        for line in lines.iter() {
            text.push_str("  ");
            text.push_str(line);
            text.push('\n');
        }
        text
    }
}
