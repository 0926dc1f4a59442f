//! How many names are looked up at once: of all plugins, and of each, whichever generation of it asks. What looking up is, is
//! not known here but that it may take any time.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::Semaphore;

use crate::aside::aside;

/// Those of all plugins.
#[derive(Debug)]
pub(super) struct Lookups {
    all: Arc<Semaphore>,
    each: usize,
    /// For as long as a generation of the plugin is there, or looks one up.
    of: Mutex<BTreeMap<String, Weak<Semaphore>>>,
}

/// Those of one plugin.
#[derive(Clone, Debug)]
pub(super) struct OwnLookups {
    all: Arc<Semaphore>,
    own: Arc<Semaphore>,
}

impl Lookups {
    /// So many of all plugins, and of each.
    pub(super) fn new(all: usize, each: usize) -> Self {
        Self { all: Arc::new(Semaphore::new(all)), each, of: Mutex::default() }
    }

    /// Those of a plugin. A new generation has no more than the last one left it.
    pub(super) fn of(&self, plugin: &str) -> OwnLookups {
        let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
        of.retain(|_, own| own.strong_count() > 0);
        let known = of.get(plugin).and_then(Weak::upgrade);
        let own = known.unwrap_or_else(|| {
            let own = Arc::new(Semaphore::new(self.each));
            of.insert(plugin.to_owned(), Arc::downgrade(&own));
            own
        });
        OwnLookups { all: Arc::clone(&self.all), own }
    }
}

impl OwnLookups {
    /// Does this when it may begin. Its place is taken until it is done, however long that takes and whoever waits for it.
    pub(super) async fn run<T: Send + 'static>(&self, ask: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        // Its own first: what waits for that is in nobody's way.
        let own = Arc::clone(&self.own).acquire_owned().await.map_err(io::Error::other)?;
        let all = Arc::clone(&self.all).acquire_owned().await.map_err(io::Error::other)?;
        let asked = aside("lookup", move || {
            let answer = ask();
            drop((own, all));
            answer
        })?;
        asked.await.map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use futures_util::FutureExt as _;
    use tokio::task::spawn_blocking;

    use super::*;

    /// As many threads for other work as there may be, and fewer than lookups.
    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap()
    }

    /// Begins as many as a plugin may have; they end when the answer does.
    async fn fill(own: &OwnLookups, count: usize) -> Vec<mpsc::Sender<()>> {
        let mut held = Vec::new();
        for _ in 0..count {
            let ((hold, held_up), (begins, begun)) = (mpsc::channel::<()>(), tokio::sync::oneshot::channel());
            let own = own.clone();
            tokio::spawn(async move {
                own.run(move || {
                    let _ = begins.send(());
                    let _ = held_up.recv();
                })
                .await
            });
            begun.await.unwrap();
            held.push(hold);
        }
        held
    }

    #[test]
    fn lookups_that_hang_hold_up_nothing_else_and_no_other_plugin() {
        let runtime = runtime();
        runtime.block_on(async {
            let all = Lookups::new(8, 3);
            let slow = all.of("slow");
            let held = fill(&slow, 3).await;
            assert_eq!(spawn_blocking(|| "done").await.unwrap(), "done");
            assert_eq!(all.of("other").run(|| "found").await.unwrap(), "found");
            // It has all that it may have, as its next generation finds.
            let next = all.of("slow");
            let mut waits = Box::pin(next.run(|| "found"));
            drop(slow);
            assert!((&mut waits).now_or_never().is_none());
            drop(held);
            assert_eq!(waits.await.unwrap(), "found");
        });
    }

    #[test]
    fn those_that_nobody_waits_for_keep_their_places_until_they_are_done() {
        let runtime = runtime();
        runtime.block_on(async {
            let all = Lookups::new(8, 1);
            let (hold, held_up) = mpsc::channel::<()>();
            let own = all.of("slow");
            let mut gives_up = Box::pin(own.run(move || {
                let _ = held_up.recv();
            }));
            assert!((&mut gives_up).now_or_never().is_none());
            drop(gives_up);
            // Nor does it help to be gone meanwhile.
            drop(own);
            let own = all.of("slow");
            let mut waits = Box::pin(own.run(|| ()));
            assert!((&mut waits).now_or_never().is_none());
            drop(hold);
            waits.await.unwrap();
        });
    }

    /// The runtime's end does not wait for them.
    #[test]
    fn one_that_hangs_does_not_hold_up_the_end() {
        let runtime = runtime();
        let held = runtime.block_on(async { fill(&Lookups::new(1, 1).of("slow"), 1).await });
        drop(runtime);
        drop(held);
    }
}
