//! A well-behaved plugin that is called all the while something else misbehaves.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use plugvisor_client::Client;
use tokio::{sync::oneshot, task::JoinHandle};

use crate::contract::{SayRequest, echo_service_client::EchoServiceClient};

/// Between two calls: often enough to meet a short outage, seldom enough to leave the machine to the test.
const PACE: Duration = Duration::from_millis(5);

/// The fewest calls that say something; a trouble that is over sooner is followed by calls that must be answered too.
const AT_LEAST: u64 = 20;

/// Calls the echo service without pause until it is finished.
#[derive(Debug)]
pub struct Neighbour {
    enough: oneshot::Sender<()>,
    task: JoinHandle<anyhow::Result<Quiet>>,
}

/// What a neighbour saw that saw nothing.
#[derive(Clone, Copy, Debug)]
pub struct Quiet {
    /// Answered calls.
    pub calls: u64,
    /// The slowest answer.
    pub slowest: Duration,
}

impl Neighbour {
    /// Begins to call.
    pub(crate) fn start(calls_socket: &Path) -> Self {
        let mut client = EchoServiceClient::new(Client::lazy(calls_socket).with_timeout(crate::events::patience()));
        let (enough, mut told) = oneshot::channel();
        let task = tokio::spawn(async move {
            let mut quiet = Quiet { calls: 0, slowest: Duration::ZERO };
            let mut generation = None;
            let mut pace = tokio::time::interval(PACE);
            pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    biased;
                    _ = &mut told, if quiet.calls >= AT_LEAST => return Ok(quiet),
                    _ = pace.tick() => {}
                }
                let text = format!("call {}", quiet.calls);
                let begun = Instant::now();
                let answer = client
                    .say(SayRequest { text: text.clone() })
                    .await
                    .with_context(|| format!("the neighbour's call {} failed", quiet.calls))?
                    .into_inner();
                quiet.slowest = quiet.slowest.max(begun.elapsed());
                quiet.calls += 1;
                ensure!(answer.text == text, "the neighbour answered {:?} to {text:?}", answer.text);
                let known = *generation.get_or_insert(answer.generation);
                ensure!(known == answer.generation, "the neighbour was restarted: generation {}", answer.generation);
            }
        });
        Self { enough, task }
    }

    /// Ends the calls and says how it was.
    ///
    /// # Errors
    /// When a call failed or the neighbour was restarted.
    pub async fn finish(self) -> anyhow::Result<Quiet> {
        // A task that ended early dropped its end; its own error says more than the failed send.
        let _ = self.enough.send(());
        self.task.await.context("the neighbour's task")?
    }
}
