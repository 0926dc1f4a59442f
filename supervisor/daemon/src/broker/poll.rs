//! The broker's one waiting point: sockets, a timer, and commands from other threads.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    event::{
        EventfdFlags,
        epoll::{self, CreateFlags, EventData, EventFlags},
        eventfd,
    },
    time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime},
};

/// Sockets that one look may find ready; the others come with the next.
const EVENTS: usize = 64;

/// What is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// Commands wait.
    Commands,
    /// The time has come that was asked for.
    Timer,
    /// Somebody connects to a listener.
    Listener(usize),
    /// A peer's socket. The number tells it from an earlier one in the same place.
    Peer { place: usize, number: u32 },
}

impl Token {
    const fn pack(self) -> u64 {
        match self {
            Self::Commands => 0,
            Self::Timer => 1 << 62,
            Self::Listener(place) => 2 << 62 | place as u64,
            Self::Peer { place, number } => 3 << 62 | ((number & 0x3fff_ffff) as u64) << 32 | place as u64,
        }
    }

    fn unpack(packed: u64) -> Self {
        // Places are far below 2³².
        let place = (packed & 0xffff_ffff) as usize;
        match packed >> 62 {
            0 => Self::Commands,
            1 => Self::Timer,
            2 => Self::Listener(place),
            _ => Self::Peer { place, number: u32::try_from(packed >> 32 & 0x3fff_ffff).unwrap_or_default() },
        }
    }
}

/// One thing that is ready.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub(super) token: Token,
    pub(super) read: bool,
    pub(super) write: bool,
}

/// Wakes the broker's thread.
#[derive(Debug)]
pub(super) struct Wake(OwnedFd);

impl Wake {
    pub(super) fn wake(&self) {
        // It fails only when it is set already.
        let _ = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }
}

#[derive(Debug)]
pub(super) struct Poll {
    epoll: OwnedFd,
    timer: OwnedFd,
    wake: Arc<Wake>,
    /// When the timer will ring.
    armed: Option<Instant>,
}

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let poll = Self { epoll, timer, wake: Arc::new(Wake(wake)), armed: None };
        poll.add(poll.timer.as_fd(), Token::Timer)?;
        poll.add(poll.wake.0.as_fd(), Token::Commands)?;
        Ok(poll)
    }

    pub(super) fn waker(&self) -> Arc<Wake> {
        Arc::clone(&self.wake)
    }

    /// Looks for what can be read.
    pub(super) fn add(&self, source: BorrowedFd<'_>, token: Token) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, source, EventData::new_u64(token.pack()), EventFlags::IN)?)
    }

    /// Looks for something else.
    pub(super) fn change(&self, source: BorrowedFd<'_>, token: Token, read: bool, write: bool) -> io::Result<()> {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, read);
        flags.set(EventFlags::OUT, write);
        Ok(epoll::modify(&self.epoll, source, EventData::new_u64(token.pack()), flags)?)
    }

    /// Rings no later than `at`. A timer that rings too early is only looked at once more, so it is never put off:
    /// setting it costs more than a call.
    pub(super) fn ring(&mut self, at: Instant, now: Instant) {
        if self.armed.is_some_and(|armed| armed <= at) {
            return;
        }
        self.armed = Some(at);
        // Zero would disarm it.
        let delay = at.saturating_duration_since(now).max(Duration::from_micros(1));
        let value = Timespec {
            tv_sec: i64::try_from(delay.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(delay.subsec_nanos()),
        };
        let timer = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &timer) {
            tracing::error!(%error, "cannot set the broker's timer");
        }
    }

    /// Waits until something is ready.
    pub(super) fn wait(&mut self, ready: &mut Vec<Ready>) {
        ready.clear();
        let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; EVENTS];
        // EINTR; nothing else can come of these arguments.
        let found = epoll::wait(&self.epoll, &mut events[..], None).unwrap_or_default();
        for event in &events[..found] {
            let (flags, data) = (event.flags, event.data);
            let token = Token::unpack(data.u64());
            let mut count = [0; 8];
            match token {
                Token::Timer => {
                    self.armed = None;
                    let _ = rustix::io::read(&self.timer, &mut count);
                }
                Token::Commands => drop(rustix::io::read(&self.wake.0, &mut count)),
                Token::Listener(_) | Token::Peer { .. } => {}
            }
            // An end or an error shows to whoever reads.
            let read = flags.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR | EventFlags::RDHUP);
            ready.push(Ready { token, read, write: flags.contains(EventFlags::OUT) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Token;

    #[test]
    fn tokens_are_themselves_again() {
        for token in [
            Token::Commands,
            Token::Timer,
            Token::Listener(7),
            Token::Peer { place: 0, number: 0 },
            Token::Peer { place: 0xffff_ffff, number: 0x3fff_ffff },
        ] {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
