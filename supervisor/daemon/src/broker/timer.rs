//! What the broker does at a time: few things, so a heap is enough. Deadlines of calls are not among them.

use std::{cmp::Reverse, collections::BinaryHeap, time::Instant};

use super::link::LinkKey;

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Alarm {
    /// Let breakers change that nobody calls.
    Tick,
    /// See whether a peer is still there.
    Check { place: usize, number: u32 },
    /// Accept again, after an accept that failed.
    Accept(usize),
    /// Connect again, to a backlog that was full.
    Connect(LinkKey),
    /// See whether a drain, or the end, has taken too long.
    Patience,
}

#[derive(Debug, Default)]
pub(super) struct Timers {
    heap: BinaryHeap<Reverse<(Instant, Alarm)>>,
}

impl Timers {
    pub(super) fn at(&mut self, when: Instant, alarm: Alarm) {
        self.heap.push(Reverse((when, alarm)));
    }

    pub(super) fn next(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((when, _))| *when)
    }

    /// An alarm whose time has come.
    pub(super) fn due(&mut self, now: Instant) -> Option<Alarm> {
        if self.next()? > now {
            return None;
        }
        self.heap.pop().map(|Reverse((_, alarm))| alarm)
    }
}
