//! Noticing that a process has ended, and how.
//!
//! The pidfd tells within milliseconds that the first process is gone; the launcher tells how it ended, once every
//! process of the launch is gone. The lifecycle hears of it then, because only then nothing of the plugin runs.

use std::{os::fd::OwnedFd, time::Duration};

use plugvisor_core::{
    Generation,
    event::{Exit, ExitKind, ResourceEvent},
    lifecycle::Event,
};
use plugvisor_package::PluginName;
use plugvisor_sandbox::protocol::{self, LaunchId, Notice};
use tokio::{
    io::unix::AsyncFd,
    sync::mpsc,
    task::JoinHandle,
    time::{Instant, sleep_until, timeout},
};

use super::{Driver, ExitView, Inward};
use crate::{
    events::{Events, Subject},
    launcher::{Launcher, signal_name},
    logs::Logs,
    readiness::register,
};

/// Lines of stderr that an exit keeps.
pub(super) const TAIL: usize = 20;

/// How long the launcher may take to see every process gone before it is told to kill them.
const PATIENCE: Duration = Duration::from_secs(2);

/// Between further attempts, and before the first when no pidfd could be watched.
const LATE: Duration = Duration::from_secs(30);

/// How long the last lines may take through the pipes. The pipes end with the last process that writes to them, so this is
/// only for a machine that is too busy to read; it must not cost the line that says why a plugin ended.
const LAST_LINES: Duration = Duration::from_secs(2);

pub(super) struct Watcher {
    pub(super) plugin: PluginName,
    pub(super) generation: Generation,
    pub(super) launch: LaunchId,
    pub(super) pidfd: OwnedFd,
    pub(super) notices: mpsc::Receiver<Notice>,
    pub(super) launched_at: Instant,
    pub(super) memory_limit: Option<u64>,
    pub(super) readers: Vec<JoinHandle<()>>,
    pub(super) launcher: Launcher,
    pub(super) logs: std::sync::Arc<Logs>,
    pub(super) events: std::sync::Arc<Events>,
}

impl Watcher {
    /// Waits for the end.
    pub(super) async fn run(mut self) -> Option<Inward> {
        let (kind, oom) = self.end().await;
        let uptime = self.launched_at.elapsed();
        // What it printed last says why it ended. Nothing writes any more, so the readers are about to finish.
        let readers = std::mem::take(&mut self.readers);
        let _ = timeout(LAST_LINES, futures_util::future::join_all(readers)).await;
        let exit = Exit {
            kind,
            oom,
            uptime_ms: super::millis(uptime),
            stderr_tail: self.logs.stderr_tail(&self.plugin, self.generation.0, TAIL),
        };
        Some(Inward::Life(Event::Exited { generation: self.generation, exit }))
    }

    async fn end(&mut self) -> (ExitKind, bool) {
        let pidfd = self.pidfd.try_clone().and_then(register);
        let (mut gone_noticed, mut kill_at) = (false, Instant::now() + LATE);
        let mut oom_noticed = false;
        loop {
            tokio::select! {
                notice = self.notices.recv() => match notice {
                    None => return (ExitKind::Unknown, oom_noticed),
                    Some(notice) => {
                        if let Some(end) = self.end_in(&notice, &mut oom_noticed) {
                            return end;
                        }
                    }
                },
                () = sleep_until(kill_at), if gone_noticed => {
                    kill_at += LATE;
                    if let Err(error) = self.launcher.kill(self.launch).await {
                        tracing::warn!(%error, "its remaining processes could not be killed");
                    }
                }
                () = first_process_gone(pidfd.as_ref().ok()), if !gone_noticed => {
                    gone_noticed = true;
                    kill_at = Instant::now() + PATIENCE;
                    tracing::debug!("its first process is gone");
                }
            }
        }
    }

    fn end_in(&self, notice: &Notice, oom_noticed: &mut bool) -> Option<(ExitKind, bool)> {
        match notice {
            Notice::OutOfMemory { .. } => {
                self.out_of_memory(oom_noticed);
                None
            }
            Notice::Exited { exit, oom_killed, launch: _ } => {
                if *oom_killed {
                    self.out_of_memory(oom_noticed);
                }
                let kind = match *exit {
                    protocol::Exit::Code(code) => ExitKind::Code(code),
                    protocol::Exit::Signal(signal) => ExitKind::Signal(signal_name(signal)),
                };
                Some((kind, *oom_noticed))
            }
        }
    }

    fn out_of_memory(&self, noticed: &mut bool) {
        if !std::mem::replace(noticed, true) {
            let subject = Subject::Generation(self.plugin.clone(), self.generation);
            self.events.publish(subject, ResourceEvent::OomKilled { limit_bytes: self.memory_limit });
        }
    }
}

async fn first_process_gone(pidfd: Option<&AsyncFd<OwnedFd>>) {
    match pidfd {
        // Readable means ended (pidfd_open(2)); an error of the event queue would say nothing, so wait for the notice.
        Some(pidfd) if pidfd.readable().await.is_ok() => {}
        _ => std::future::pending().await,
    }
}

impl Driver {
    /// Keeps how a process ended, before the lifecycle moves on.
    pub(super) fn note_exit(&mut self, event: &Event) {
        let Event::Exited { generation, exit } = event else { return };
        let Some(run) = self.of(*generation).filter(|run| run.process.is_some() || run.adopted.is_some()) else {
            return;
        };
        if let Some(running) = &run.process {
            let launch = running.view.launch;
            self.spawn_acknowledgement(launch);
        }
        let cause = match &exit.kind {
            _ if exit.oom => "oom",
            ExitKind::Code(_) => "code",
            ExitKind::Signal(_) => "signal",
            ExitKind::Unknown => "unknown",
        };
        let exit = ExitView { at: std::time::SystemTime::now(), exit: exit.clone() };
        self.view.send_modify(|view| {
            let view = std::sync::Arc::make_mut(view);
            *view.figures.exits.entry(cause).or_insert(0) += 1;
            view.last_exit = Some(exit);
        });
    }
}
