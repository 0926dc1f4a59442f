//! The broker's thread: one loop over everything that can be read, written, or is due.
//!
//! It owns all connections, calls and links, by place in tables; what happens to them is in the modules of their
//! names. Each turn of the loop looks at the clock once.

use std::{
    rc::Rc,
    time::{Duration, Instant},
};

use slab::Slab;
use tokio::sync::{mpsc, oneshot};

use super::{
    call::Call,
    command::{Command, Commands},
    config::BrokerConfig,
    event::BrokerEvent,
    handle::Drained,
    host::Host,
    http2::{Fields, Moved},
    link::Link,
    listen::Listener,
    peer::{Gone, Peer},
    poll::{Poll, Ready, Token},
    provider::Provider,
    shared::Shared,
    timer::{Alarm, Timers},
};

/// Breakers that nobody calls change by time alone; this often is looked.
const TICK: Duration = Duration::from_millis(500);
/// What is read at once.
const BUFFER: usize = 256 * 1024;
/// Deadlines are looked at no more often than this, however many calls have one of their own.
const DEADLINES: Duration = Duration::from_micros(500);

/// Somebody waits for a provider's calls to end.
#[derive(Debug)]
pub(super) struct Drain {
    pub(super) provider: Rc<Provider>,
    pub(super) until: Instant,
    pub(super) reply: oneshot::Sender<Drained>,
}

/// The broker's end, when all calls have ended or its time has come.
#[derive(Debug)]
pub(super) struct Stop {
    pub(super) until: Instant,
    pub(super) reply: oneshot::Sender<usize>,
}

#[derive(Debug)]
pub(super) struct Exchange {
    pub(super) shared: Rc<Shared>,
    pub(super) now: Instant,
    pub(super) poll: Poll,
    pub(super) timers: Timers,
    pub(super) listeners: Slab<Listener>,
    pub(super) peers: Slab<Peer>,
    pub(super) peer_number: u32,
    pub(super) links: Slab<Link>,
    pub(super) calls: Slab<Call>,
    pub(super) host: Host,
    pub(super) host_link: usize,
    pub(super) commands: Commands,
    pub(super) drains: Vec<Drain>,
    pub(super) stop: Option<Stop>,
    /// No call has an earlier deadline.
    pub(super) deadline: Option<Instant>,
    /// Peers with something to write.
    pub(super) marked: Vec<usize>,
    // Memory that is used again and again.
    pub(super) buffer: Vec<u8>,
    pub(super) fields: Fields,
    pub(super) passing: Fields,
    pub(super) moved: Vec<Moved>,
}

impl Exchange {
    pub(super) fn new(
        config: BrokerConfig,
        host: Host,
        poll: Poll,
        commands: mpsc::Receiver<Command>,
        events: mpsc::Sender<BrokerEvent>,
    ) -> Self {
        let mut links = Slab::new();
        let host_link = links.insert(Link::new(super::link::Server::Host));
        let now = Instant::now();
        let mut timers = Timers::default();
        timers.at(now + TICK, Alarm::Tick);
        Self {
            shared: Rc::new(Shared::new(config, host.modules(), events)),
            now,
            poll,
            timers,
            listeners: Slab::new(),
            peers: Slab::new(),
            peer_number: 0,
            links,
            calls: Slab::new(),
            host,
            host_link,
            commands: Commands::new(commands),
            drains: Vec::new(),
            stop: None,
            deadline: None,
            marked: Vec::new(),
            buffer: vec![0; BUFFER],
            fields: Fields::new(),
            passing: Fields::new(),
            moved: Vec::new(),
        }
    }

    /// Runs until it is told to stop, or until every handle is gone.
    pub(super) fn run(mut self) {
        let mut ready: Vec<Ready> = Vec::new();
        loop {
            let due = match (self.timers.next(), self.deadline) {
                (Some(timer), Some(deadline)) => Some(timer.min(deadline)),
                (timer, deadline) => timer.or(deadline),
            };
            if let Some(due) = due {
                self.poll.ring(due, self.now);
            }
            self.poll.wait(&mut ready);
            self.now = Instant::now();
            for Ready { token, read, write } in ready.iter().copied() {
                match token {
                    Token::Commands => self.carry_out_all(),
                    Token::Timer => self.alarms(),
                    Token::Listener(place) => self.accept(place),
                    Token::Peer { place, number } => {
                        if write {
                            self.mark(place);
                            self.flush_marked(&[]);
                        }
                        if read {
                            self.read(place, number);
                        }
                    }
                }
                self.flush_marked(&[]);
            }
            if self.shared.was_emptied() || self.stop.is_some() {
                self.end_drains();
            }
            if self.is_over() {
                return self.end();
            }
        }
    }

    fn alarms(&mut self) {
        while let Some(alarm) = self.timers.due(self.now) {
            match alarm {
                Alarm::Tick => {
                    self.timers.at(self.now + TICK, Alarm::Tick);
                    for provider in self.shared.providers() {
                        provider.tick(&self.shared, self.now);
                    }
                }
                Alarm::Check { place, number } => self.check(place, number),
                Alarm::Accept(listener) => self.accept_again(listener),
                Alarm::Connect(link) => self.connect_again(link),
                Alarm::Patience => self.end_drains(),
            }
        }
        if self.deadline.is_some_and(|deadline| deadline <= self.now) {
            self.end_overdue();
        }
    }

    /// Ends calls whose time is over. Calls are not sorted by deadline: most end long before theirs, and this looks at
    /// all of them only when the earliest that there ever was has come.
    fn end_overdue(&mut self) {
        let now = self.now;
        let overdue: Vec<usize> =
            self.calls.iter().filter(|(_, call)| call.deadline <= now).map(|(number, _)| number).collect();
        for number in overdue {
            // One may have ended because of another.
            let Some(call) = self.calls.get(number).filter(|call| call.deadline <= now) else { continue };
            let end = call.out_of_time(&self.shared);
            self.finish(number, end);
        }
        self.deadline = self.calls.iter().map(|(_, call)| call.deadline).min().map(|next| next.max(now + DEADLINES));
    }

    /// Answers those who wait for a provider's last call.
    fn end_drains(&mut self) {
        let now = self.now;
        let (ended, waiting) =
            self.drains.drain(..).partition(|drain| drain.provider.in_flight() == 0 || drain.until <= now);
        self.drains = waiting;
        let ended: Vec<Drain> = ended;
        for drain in ended {
            // A reply that nobody waits for any more is no error.
            let _ = drain.reply.send(Drained { in_flight: drain.provider.in_flight() });
        }
    }

    fn is_over(&self) -> bool {
        match &self.stop {
            Some(stop) => self.shared.in_flight() == 0 || stop.until <= self.now,
            None => self.commands.are_over(),
        }
    }

    fn end(mut self) {
        let left = self.shared.in_flight();
        for provider in self.shared.providers() {
            provider.remove();
        }
        let peers: Vec<usize> = self.peers.iter().map(|(place, _)| place).collect();
        for place in peers {
            self.peer_gone(place, &Gone::Closed);
        }
        self.end_drains();
        let stop = self.stop.take();
        // Everything is closed before anybody is told that it is.
        drop(self);
        if let Some(stop) = stop {
            // Whoever asked may have gone; the broker stops all the same.
            let _ = stop.reply.send(left);
        }
    }
}
