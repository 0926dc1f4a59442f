//! What goes on beside the plugins until all of them have stopped: the pages and sockets of operators, the doors of
//! plugins, and what tells others of what happens.

use std::{collections::BTreeSet, net::TcpListener, os::unix::net::UnixListener, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::tell;
use crate::{
    admin,
    broker::BrokerEvent,
    observe::{self, ServerLimits},
    service, state,
    supervisor::Supervisor,
    traces::Exporter,
};

/// How long answers under way may take once everything has stopped.
const PATIENCE: Duration = Duration::from_secs(1);

/// The tasks, and what ends them.
#[derive(Debug)]
pub(super) struct Edges {
    tasks: TaskTracker,
    end: CancellationToken,
}

impl Edges {
    /// None yet.
    pub(super) fn new() -> Self {
        Self { tasks: TaskTracker::new(), end: CancellationToken::new() }
    }

    /// Sends traces.
    pub(super) fn export(&self, exporter: Exporter) {
        self.tasks.spawn(exporter.run(self.end.clone()));
    }

    /// Tells of what the broker and the state directory notice.
    pub(super) fn tell(
        &self,
        state: &Arc<Supervisor>,
        noticed: mpsc::Receiver<BrokerEvent>,
        health: watch::Receiver<state::Health>,
    ) {
        self.tasks.spawn(tell::pump(Arc::clone(state), noticed));
        self.until_end(tell::tell_of_state(Arc::clone(&state.shared.events), health));
    }

    /// Serves those who come from outside, and tells the service manager that the supervisor lives.
    pub(super) fn serve(
        &self,
        state: &Arc<Supervisor>,
        admin: UnixListener,
        allowed: BTreeSet<u32>,
        metrics: TcpListener,
    ) {
        self.until_end(service::lives());
        self.until_end(Arc::clone(&state.shared.ingress).serve());
        self.tasks.spawn({
            let serving = admin::serve(admin, Arc::clone(state), allowed, self.end.clone());
            async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the admin socket is no longer served");
                }
            }
        });
        self.tasks.spawn({
            let serving = observe::serve(metrics, Arc::clone(state), ServerLimits::default(), self.end.clone());
            async move {
                if let Err(error) = serving.await {
                    tracing::error!(%error, "the metrics page is no longer served");
                }
            }
        });
    }

    /// Ends all of it, answers under way in their time.
    pub(super) async fn end(&self) {
        self.end.cancel();
        self.tasks.close();
        if timeout(PATIENCE, self.tasks.wait()).await.is_err() {
            tracing::debug!("a client kept an answer open; its connection is closed");
        }
    }

    /// One that is cut off at the end.
    fn until_end(&self, work: impl Future<Output = ()> + Send + 'static) {
        let end = self.end.clone();
        self.tasks.spawn(async move { end.run_until_cancelled(work).await.unwrap_or(()) });
    }
}
