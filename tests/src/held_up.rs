//! How much a machine held things up while something was measured: what others took is nobody's slowness.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(1);
/// A timer may ring so late on an idle machine.
const USUAL: Duration = Duration::from_millis(1);

/// Watches until it is ended.
#[derive(Debug)]
pub struct HeldUp {
    processes: Vec<(u32, Duration)>,
    enough: Arc<AtomicBool>,
    late: Arc<AtomicU64>,
    watching: JoinHandle<()>,
}

impl HeldUp {
    /// Begins to watch the machine, and these processes on it.
    ///
    /// # Panics
    /// When the system has no thread left.
    #[must_use]
    pub fn watch(processes: &[u32]) -> Self {
        let (enough, late) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, counted) = (Arc::clone(&enough), Arc::clone(&late));
        let watch = move || {
            while !told.load(Ordering::Relaxed) {
                let begun = Instant::now();
                std::thread::sleep(TICK);
                let over = begun.elapsed().saturating_sub(TICK + USUAL);
                counted.fetch_add(u64::try_from(over.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
            }
        };
        let watching = std::thread::Builder::new().name("held-up".to_owned()).spawn(watch).expect("a thread");
        Self { processes: processes.iter().map(|pid| (*pid, waited(*pid))).collect(), enough, late, watching }
    }

    /// For how long, at the most, the machine has held things up since: a sleeping thread that was woken too late, as when
    /// all of it stands still, or threads of the processes that were ready to run and did not.
    #[must_use]
    pub fn end(self) -> Duration {
        self.enough.store(true, Ordering::Relaxed);
        // It cannot panic.
        let _ = self.watching.join();
        let waiting = self.processes.iter().map(|(pid, before)| waited(*pid).saturating_sub(*before)).sum();
        Duration::from_nanos(self.late.load(Ordering::Relaxed)).max(waiting)
    }
}

/// For how long the threads of a process have been ready to run and were not running
/// (`Documentation/scheduler/sched-stats.rst`).
fn waited(pid: u32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let times = threads.filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse().ok().map(Duration::from_nanos)
    });
    times.sum()
}
