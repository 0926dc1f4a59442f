//! Ctrl-C and SIGTERM: the demo must not die of them, because it has to stop what it started.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};

/// Takes the two signals from its making on. While the demo is busy a Ctrl-C ends its helpers (they share our process
/// group), so the step that needs them fails and everything is stopped in order.
#[derive(Debug)]
pub(crate) struct Interrupt {
    requested: Arc<AtomicBool>,
    arrivals: Receiver<()>,
}

impl Interrupt {
    /// Starts listening.
    ///
    /// # Errors
    /// When signals cannot be caught.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot catch signals")?;
        let (mut interrupt, mut terminate) = {
            let _inside = runtime.enter();
            let caught = |kind| signal(kind).context("cannot catch signals");
            (caught(SignalKind::interrupt())?, caught(SignalKind::terminate())?)
        };
        let requested = Arc::new(AtomicBool::new(false));
        let (sender, arrivals) = mpsc::channel();
        let flag = Arc::clone(&requested);
        thread::spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                    flag.store(true, Ordering::Relaxed);
                    if sender.send(()).is_err() {
                        break;
                    }
                }
            });
        });
        Ok(Self { requested, arrivals })
    }

    /// Whether one has arrived.
    pub(crate) fn requested(&self) -> bool {
        self.requested.load(Ordering::Relaxed)
    }

    /// Waits for the first, past or coming.
    pub(crate) fn wait(&self) {
        // An error means that the listener is gone, and waiting on would be for ever.
        let _ = self.arrivals.recv();
    }
}
