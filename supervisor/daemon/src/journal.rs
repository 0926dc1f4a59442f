//! A bounded, numbered ring that many may follow, each at its own speed.
//!
//! A writer never waits: what does not fit pushes the oldest out, and a follower that was too slow learns how many
//! entries it missed. What an entry is, is not known here.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

/// How much a journal keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalLimits {
    /// Entries.
    pub entries: usize,
    /// The weight of all entries together, as the journal's writer weighs them; one entry is always kept.
    pub weight: usize,
}

/// The ring. Entries are numbered from 1.
#[derive(Debug)]
pub struct Journal<T> {
    ring: Mutex<Ring<T>>,
    newest: watch::Sender<u64>,
    limits: JournalLimits,
}

#[derive(Debug)]
struct Ring<T> {
    entries: VecDeque<(usize, Arc<T>)>,
    weight: usize,
    /// The number that the next entry gets.
    next: u64,
}

/// What [`Journal::read`] found.
#[derive(Debug)]
pub struct Batch<T> {
    /// Entries after the place asked for that were pushed out before they were read.
    pub missed: u64,
    /// What follows, with each entry's number.
    pub entries: Vec<(u64, Arc<T>)>,
}

impl<T> Journal<T> {
    /// An empty journal.
    #[must_use]
    pub fn new(limits: JournalLimits) -> Self {
        let ring = Ring { entries: VecDeque::new(), weight: 0, next: 1 };
        Self { ring: Mutex::new(ring), newest: watch::Sender::new(0), limits }
    }

    /// Adds an entry of this weight; `make` gets the entry's number, which is returned.
    pub fn push(&self, weight: usize, make: impl FnOnce(u64) -> T) -> u64 {
        let mut ring = self.lock();
        let number = ring.next;
        ring.next += 1;
        ring.weight += weight;
        ring.entries.push_back((weight, Arc::new(make(number))));
        while ring.entries.len() > self.limits.entries.max(1)
            || (ring.weight > self.limits.weight && ring.entries.len() > 1)
        {
            let Some((weight, _)) = ring.entries.pop_front() else { break };
            ring.weight -= weight;
        }
        // Inside the lock, so that followers never see the numbers go back.
        self.newest.send_replace(number);
        number
    }

    /// Up to `most` entries whose numbers are greater than `after`.
    #[must_use]
    pub fn read(&self, after: u64, most: usize) -> Batch<T> {
        let ring = self.lock();
        let kept = ring.entries.len();
        let first = ring.next - kept as u64;
        let from = after.saturating_add(1).max(first);
        let missed = from.saturating_sub(after.saturating_add(1)).min(from);
        let skip = usize::try_from(from - first).unwrap_or(kept).min(kept);
        let numbered = ring.entries.iter().skip(skip).take(most).zip(from..);
        Batch { missed, entries: numbered.map(|((_, entry), number)| (number, Arc::clone(entry))).collect() }
    }

    /// The number of the newest entry; 0 when there was none. The receiver wakes on every new one.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// The number before the last `count` kept entries; a reader that begins there gets these.
    #[must_use]
    pub fn before_last(&self, count: usize) -> u64 {
        let ring = self.lock();
        ring.next - 1 - ring.entries.len().min(count) as u64
    }

    fn lock(&self) -> MutexGuard<'_, Ring<T>> {
        // No code that can panic runs while the ring is half changed.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(entries: usize, weight: usize) -> Journal<u64> {
        Journal::new(JournalLimits { entries, weight })
    }

    fn numbers(batch: &Batch<u64>) -> Vec<u64> {
        assert!(batch.entries.iter().all(|(number, entry)| number == &**entry), "entries and numbers agree");
        batch.entries.iter().map(|(number, _)| *number).collect()
    }

    #[test]
    fn the_oldest_go_first_and_are_counted_as_missed() {
        let journal = journal(3, usize::MAX);
        for expected in 1..=5 {
            assert_eq!(journal.push(1, |number| number), expected);
        }
        let all = journal.read(0, 10);
        assert_eq!((all.missed, numbers(&all)), (2, vec![3, 4, 5]));
        let some = journal.read(3, 1);
        assert_eq!((some.missed, numbers(&some)), (0, vec![4]));
        let none = journal.read(5, 10);
        assert_eq!((none.missed, numbers(&none)), (0, vec![]));
        let future = journal.read(u64::MAX, 10);
        assert_eq!((future.missed, numbers(&future)), (0, vec![]));
        assert_eq!(journal.before_last(2), 3);
        assert_eq!(journal.before_last(9), 2);
    }

    #[test]
    fn weight_is_bounded_but_one_entry_stays() {
        let journal = journal(100, 10);
        journal.push(4, |number| number);
        journal.push(4, |number| number);
        journal.push(4, |number| number);
        assert_eq!(numbers(&journal.read(0, 10)), vec![2, 3]);
        journal.push(99, |number| number);
        assert_eq!(numbers(&journal.read(0, 10)), vec![4]);
    }

    #[tokio::test]
    async fn followers_wake() {
        let journal = Arc::new(journal(10, 100));
        let mut newest = journal.newest();
        newest.mark_unchanged();
        let writer = Arc::clone(&journal);
        let task = tokio::spawn(async move { writer.push(1, |number| number) });
        newest.changed().await.unwrap();
        assert_eq!(*newest.borrow(), task.await.unwrap());
    }
}
