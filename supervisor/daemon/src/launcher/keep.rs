//! What a launcher kept while no supervisor was there: launches, ends, output and listening sockets.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    time::Duration,
};

use plugvisor_sandbox::protocol::{
    Kept, Known, LaunchId, Listed, MAX_INWARD, Over, ReattachState, Reattached, RefusalCode, Reply, Request, Stats,
};
use tokio::sync::mpsc;

use super::client::{Answer, Launcher, LauncherError, PATIENCE, Process, Task, process};

/// The most launches that a launcher may claim to know. Its own bound is 1024 that run, and as many ends.
const MOST_KNOWN: usize = 4096;

/// The most output of one stream that is taken over, in bytes.
const MOST_OUTPUT: u64 = 4 * 1024 * 1024;

/// What a launcher says it has.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Launches that run, and ends that nobody acknowledged, in the order of their launch.
    pub launches: Vec<Known>,
    /// Names of the sockets that it holds.
    pub held: Vec<String>,
    /// Ends that it had to forget.
    pub ends_forgotten: u64,
    /// How long there was no supervisor; `None` when there was never one before.
    pub unattended: Option<Duration>,
}

/// A launch that was taken over.
#[derive(Debug)]
pub struct Reattachment {
    /// Whether it runs.
    pub state: Found,
    /// What it wrote on stdout while nobody read.
    pub stdout: Output,
    /// What it wrote on stderr while nobody read.
    pub stderr: Output,
}

/// What became of a launch while no supervisor was there.
#[derive(Debug)]
pub enum Found {
    /// It runs.
    Up(Box<Process>),
    /// It is over.
    Over(Over),
}

/// What was written to one pipe while nobody read it.
#[derive(Debug)]
pub struct Output {
    file: File,
    kept: Kept,
}

impl Output {
    /// The bytes that are left, and how many older ones are lost. Reads a file in memory.
    pub fn read(self) -> io::Result<(Vec<u8>, u64)> {
        let Self { file, kept } = self;
        // From offset 0, wherever the launcher's own descriptor of it stands.
        let mut bytes = vec![0; usize::try_from(kept.bytes.min(MOST_OUTPUT)).unwrap_or_default()];
        file.read_exact_at(&mut bytes, 0)?;
        Ok((bytes, kept.lost.saturating_add(kept.bytes.saturating_sub(MOST_OUTPUT))))
    }
}

impl Launcher {
    /// Everything that the launcher kept.
    pub async fn inventory(&self) -> Result<Inventory, LauncherError> {
        let mut all = Inventory::default();
        loop {
            let after = all.launches.last().map_or(LaunchId(0), |last| last.launch);
            let Answer::Plain(Reply::Listed(page)) = self.ask(Request::List { after }, Vec::new(), PATIENCE).await?
            else {
                return Err(LauncherError::Mismatch);
            };
            let Listed { launches, more, held, ends_forgotten, unattended_nanos } = page;
            let in_order = launches.is_sorted_by(|a, b| a.launch < b.launch)
                && launches.first().is_none_or(|first| first.launch > after);
            if !in_order || (more && launches.is_empty()) || all.launches.len() + launches.len() > MOST_KNOWN {
                return Err(LauncherError::Mismatch);
            }
            all.launches.extend(launches);
            all.held = held;
            all.ends_forgotten = ends_forgotten;
            all.unattended = unattended_nanos.map(Duration::from_nanos);
            if !more {
                return Ok(all);
            }
        }
    }

    /// Takes a launch over that another supervisor started.
    pub async fn reattach(&self, launch: LaunchId) -> Result<Reattachment, LauncherError> {
        match self.ask(Request::Reattach { launch }, Vec::new(), PATIENCE).await? {
            Answer::Reattached(reattachment) => Ok(*reattachment),
            Answer::Plain(_) | Answer::Launched(_) | Answer::Socket(_) | Answer::Inward(..) => {
                Err(LauncherError::Mismatch)
            }
        }
    }

    /// The sockets by which a running launch is connected to.
    pub async fn inward(&self, launch: LaunchId) -> Result<Vec<OwnedFd>, LauncherError> {
        let mut sockets = Vec::new();
        loop {
            let from = u16::try_from(sockets.len()).map_err(|_| LauncherError::Mismatch)?;
            let answer = self.ask(Request::Inward { launch, from }, Vec::new(), PATIENCE).await?;
            let Answer::Inward(all, mut some) = answer else { return Err(LauncherError::Mismatch) };
            let over = usize::from(all) > usize::from(MAX_INWARD) || sockets.len() + some.len() > usize::from(all);
            if over || (some.is_empty() && sockets.len() < usize::from(all)) {
                return Err(LauncherError::Mismatch);
            }
            sockets.append(&mut some);
            if sockets.len() == usize::from(all) {
                return Ok(sockets);
            }
        }
    }

    /// What the launch uses now.
    pub async fn stats(&self, launch: LaunchId) -> Result<Stats, LauncherError> {
        match self.ask(Request::Stats { launch }, Vec::new(), PATIENCE).await? {
            Answer::Plain(Reply::Stats(stats)) => Ok(stats),
            _ => Err(LauncherError::Mismatch),
        }
    }

    /// What was kept of the launch has arrived: its end, and its output.
    pub async fn acknowledge(&self, launch: LaunchId) -> Result<(), LauncherError> {
        self.done(Request::Acknowledge { launch }, Vec::new()).await
    }

    /// Says that no supervisor is expected after this one: when the connection closes, the launcher ends.
    pub async fn end_with_us(&self) -> Result<(), LauncherError> {
        self.done(Request::End, Vec::new()).await
    }

    /// Has the launcher hold a listening socket, so that who connects waits while no supervisor is there.
    pub async fn hold(&self, name: &str, socket: OwnedFd) -> Result<(), LauncherError> {
        self.done(Request::HoldFd { name: name.to_owned() }, vec![socket]).await
    }

    /// A held socket, which the launcher goes on holding; `None` when it holds none of this name.
    pub async fn held(&self, name: &str) -> Result<Option<OwnedFd>, LauncherError> {
        self.take(name, true).await
    }

    /// Has the launcher let go of a held socket.
    pub async fn let_go(&self, name: &str) -> Result<(), LauncherError> {
        self.take(name, false).await.map(drop)
    }

    async fn take(&self, name: &str, keep: bool) -> Result<Option<OwnedFd>, LauncherError> {
        let request = Request::TakeFd { name: name.to_owned(), keep };
        match self.ask(request, Vec::new(), PATIENCE).await {
            Ok(Answer::Socket(socket)) => Ok(Some(socket)),
            Ok(Answer::Plain(_) | Answer::Launched(_) | Answer::Reattached(_) | Answer::Inward(..)) => {
                Err(LauncherError::Mismatch)
            }
            Err(LauncherError::Refused(refusal)) if refusal.code == RefusalCode::NotHeld => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Task {
    /// Makes a launch of an answer, and registers it before anything else is read.
    pub(super) fn reattached(&mut self, reattached: Reattached, descriptors: Vec<OwnedFd>) -> Option<Reattachment> {
        let Reattached { state, stdout, stderr } = reattached;
        let mut descriptors = descriptors.into_iter();
        let mut output = |kept| Some(Output { file: File::from(descriptors.next()?), kept });
        let (stdout, stderr) = (output(stdout)?, output(stderr)?);
        let state = match state {
            ReattachState::Over(over) => Found::Over(over),
            ReattachState::Up(launched) => {
                let (sender, notices) = mpsc::channel(4);
                let launch = launched.launch;
                let process = process(launched, descriptors.collect(), notices)?;
                self.processes.insert(launch, sender);
                Found::Up(Box::new(process))
            }
        };
        Some(Reattachment { state, stdout, stderr })
    }
}
