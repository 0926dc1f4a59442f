//! Counts the calls in flight, so that draining knows when it is done.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use tokio::sync::Notify;

/// The number of calls in flight; clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inflight(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    count: AtomicU32,
    idle: Notify,
}

/// One call; its end is its drop.
#[derive(Debug)]
pub(crate) struct InflightGuard(Arc<Shared>);

impl Inflight {
    pub(crate) fn enter(&self) -> InflightGuard {
        self.0.count.fetch_add(1, Ordering::AcqRel);
        InflightGuard(Arc::clone(&self.0))
    }

    pub(crate) fn count(&self) -> u32 {
        self.0.count.load(Ordering::Acquire)
    }

    /// Returns once nothing is in flight. Safe to cancel.
    pub(crate) async fn idle(&self) {
        loop {
            // Registered before the count is read, so that an end in between is not missed.
            let mut notified = std::pin::pin!(self.0.idle.notified());
            notified.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            notified.await;
        }
    }
}

impl Drop for InflightGuard {
    fn drop(&mut self) {
        if self.0.count.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn idle_waits_for_the_last_call() {
        let inflight = Inflight::default();
        inflight.idle().await;
        let first = inflight.enter();
        let second = inflight.enter();
        assert_eq!(inflight.count(), 2);
        let waiter = tokio::spawn({
            let inflight = inflight.clone();
            async move { inflight.idle().await }
        });
        drop(first);
        tokio::task::yield_now().await;
        assert!(!waiter.is_finished());
        drop(second);
        waiter.await.unwrap();
    }
}
