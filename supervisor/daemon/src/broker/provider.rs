//! One provider generation: whether it takes calls, its breaker, and its one HTTP/2 connection.
//!
//! The connection is made when the provider becomes ready, and again by the next call after it was lost. It knows
//! nothing of callers or routes.

use std::{
    cell::{Cell, RefCell},
    io,
    os::fd::{AsRawFd, OwnedFd},
    rc::Rc,
    time::Duration,
};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use plugvisor_core::{
    breaker::{Breaker, Outcome, Permit, Transition},
    route::{Reason, Refusal},
};
use tokio::{
    net::UnixStream,
    sync::Notify,
    time::{Instant, timeout},
};

use super::{
    config::CallLimits, event::BrokerEvent, handle::ProviderSpec, identity::PluginIdentity, metrics::ProviderMetrics,
    shared::Shared, snapshot::ProviderSnapshot,
};

/// A connection serves this many calls and is then replaced: an HTTP/2 client has 2³⁰ stream numbers.
const CALLS_PER_CONNECTION: u32 = 1 << 29;
/// Tries to connect while the provider's backlog is full, and the pause between them.
const BACKLOG_PAUSE: Duration = Duration::from_millis(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    NotReady,
    Ready,
    Draining,
    Removed,
}

#[derive(Debug)]
enum Link {
    Down { last_error: Option<String> },
    Connecting,
    Up { number: u64, sender: SendRequest<Bytes>, calls: u32 },
}

#[derive(Debug)]
pub(super) struct Provider {
    pub(super) identity: PluginIdentity,
    pub(super) limits: CallLimits,
    pub(super) metrics: Rc<ProviderMetrics>,
    socket: OwnedFd,
    breaker: RefCell<Breaker>,
    admission: Cell<Admission>,
    in_flight: Cell<usize>,
    emptied: Notify,
    link: RefCell<Link>,
    links: Cell<u64>,
    link_changed: Notify,
    /// Wakes the task that runs the connection, to close it.
    closing: Notify,
}

impl Provider {
    pub(super) fn new(spec: ProviderSpec, shared: &Shared) -> Self {
        let ProviderSpec { identity, socket, breaker, breaker_memory, limits } = spec;
        let seed = identity.name.as_str().bytes().fold(identity.generation.0, |seed, byte| {
            seed.rotate_left(7).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(byte)
        });
        Self {
            metrics: shared.metrics.provider(identity.name.as_str()),
            identity,
            limits,
            socket,
            breaker: RefCell::new(match breaker_memory {
                None => Breaker::new(breaker, seed),
                Some(memory) => Breaker::resume(breaker, seed, memory, shared.time(Instant::now())),
            }),
            admission: Cell::new(Admission::NotReady),
            in_flight: Cell::new(0),
            emptied: Notify::new(),
            link: RefCell::new(Link::Down { last_error: None }),
            links: Cell::new(0),
            link_changed: Notify::new(),
            closing: Notify::new(),
        }
    }

    /// Takes one of the provider's places, if it has one and its breaker agrees.
    pub(super) fn admit(self: &Rc<Self>, shared: &Rc<Shared>, now: Instant) -> Result<Admitted, Refusal> {
        let name = &self.identity.name;
        let unready = match self.admission.get() {
            Admission::Ready => None,
            Admission::NotReady => Some("it does not say that it is serving"),
            Admission::Draining => Some("it is draining"),
            Admission::Removed => Some("it has been stopped"),
        };
        if let Some(why) = unready {
            return Err(Refusal::new(
                Reason::ProviderNotReady,
                format!("plugin {name} is not ready: {why}"),
                format!("try again shortly; `plugvisor describe {name}` says what it waits for"),
            ));
        }
        if self.in_flight.get() >= self.limits.max_concurrent {
            return Err(Refusal::new(
                Reason::Overloaded,
                format!("plugin {name} has {} calls in flight, its limit", self.limits.max_concurrent),
                "try again later, make fewer calls at once, or raise the plugin's concurrency limit",
            ));
        }
        let permit = self.breaker.borrow_mut().admit(shared.time(now)).map_err(|refused| {
            Refusal::new(
                Reason::BreakerOpen,
                format!("calls to plugin {name} are refused after too many failures"),
                format!(
                    "try again in {:.1} s; `plugvisor events` says what failed",
                    refused.retry_after.as_secs_f64().max(0.1)
                ),
            )
        })?;
        self.tell_transition(shared, permit.transition());
        self.in_flight.set(self.in_flight.get() + 1);
        shared.call_began();
        Ok(Admitted { provider: Rc::clone(self), shared: Rc::clone(shared), permit: Some(permit), began: now })
    }

    pub(super) fn set_ready(self: &Rc<Self>, shared: &Rc<Shared>, ready: bool) {
        match (self.admission.get(), ready) {
            (Admission::NotReady | Admission::Ready, true) => {
                self.admission.set(Admission::Ready);
                self.connect_in_background(shared);
            }
            (Admission::NotReady | Admission::Ready, false) => self.admission.set(Admission::NotReady),
            // Draining and stopping are final for a generation.
            (Admission::Draining | Admission::Removed, _) => {}
        }
    }

    /// Refuses new calls and waits for those in flight.
    pub(super) async fn drain(&self, patience: Duration) -> usize {
        if self.admission.get() != Admission::Removed {
            self.admission.set(Admission::Draining);
        }
        let emptied = async {
            loop {
                let changed = self.emptied.notified();
                if self.in_flight.get() == 0 {
                    return;
                }
                changed.await;
            }
        };
        // Losing the race to the clock is an answer too.
        let _ = timeout(patience, emptied).await;
        self.in_flight.get()
    }

    /// Refuses new calls and ends those in flight.
    pub(super) fn remove(&self) {
        self.admission.set(Admission::Removed);
        *self.link.borrow_mut() = Link::Down { last_error: Some("it has been stopped".into()) };
        self.closing.notify_waiters();
        self.link_changed.notify_waiters();
    }

    pub(super) fn probe_ok(&self, shared: &Shared) {
        let transition = self.breaker.borrow_mut().probe(Outcome::Success, shared.time(Instant::now()));
        self.tell_transition(shared, transition);
    }

    pub(super) fn reset_breaker(&self, shared: &Shared) {
        let transition = self.breaker.borrow_mut().reset(shared.time(Instant::now()));
        self.tell_transition(shared, transition);
    }

    pub(super) fn tick(&self, shared: &Shared, now: Instant) {
        let transition = self.breaker.borrow_mut().tick(shared.time(now));
        self.tell_transition(shared, transition);
    }

    pub(super) fn snapshot(&self, shared: &Shared) -> ProviderSnapshot {
        ProviderSnapshot {
            identity: self.identity.clone(),
            ready: self.admission.get() == Admission::Ready,
            breaker: self.breaker.borrow().snapshot(shared.time(Instant::now())),
            in_flight: self.in_flight.get(),
            limits: self.limits.clone(),
            connected: self.is_connected(),
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        matches!(*self.link.borrow(), Link::Up { .. })
    }

    fn tell_transition(&self, shared: &Shared, transition: Option<Transition>) {
        if let Some(transition) = transition {
            let memory = self.breaker.borrow().memory(shared.time(Instant::now()));
            shared.tell(BrokerEvent::BreakerChanged { provider: self.identity.clone(), transition, memory });
        }
    }

    /// A sender on the open connection; makes the connection when there is none.
    pub(super) async fn sender(self: &Rc<Self>, shared: &Rc<Shared>) -> Result<SendRequest<Bytes>, String> {
        loop {
            let changed = self.link_changed.notified();
            if let Some((number, mut sender)) = self.open_sender() {
                // Waits while the provider allows no further stream; fails when the connection is on its way out.
                match std::future::poll_fn(|cx| sender.poll_ready(cx)).await {
                    Ok(()) => return Ok(sender),
                    Err(_) => {
                        self.link_ended(number, "it closed the connection");
                        continue;
                    }
                }
            }
            if self.admission.get() == Admission::Removed {
                return Err("it has been stopped".into());
            }
            self.connect_in_background(shared);
            changed.await;
            if let Link::Down { last_error: Some(error) } = &*self.link.borrow() {
                return Err(error.clone());
            }
        }
    }

    fn open_sender(&self) -> Option<(u64, SendRequest<Bytes>)> {
        let mut link = self.link.borrow_mut();
        let Link::Up { number, sender, calls } = &mut *link else { return None };
        *calls += 1;
        let found = (*number, sender.clone());
        if *calls >= CALLS_PER_CONNECTION {
            // The connection lives on until its calls have ended; the next call makes a new one.
            *link = Link::Down { last_error: None };
        }
        Some(found)
    }

    fn connect_in_background(self: &Rc<Self>, shared: &Rc<Shared>) {
        let mut link = self.link.borrow_mut();
        if !matches!(*link, Link::Down { .. }) {
            return;
        }
        *link = Link::Connecting;
        // The task ends with the connection, which `remove` closes.
        tokio::task::spawn_local(Rc::clone(self).run_link(Rc::clone(shared)));
    }

    async fn run_link(self: Rc<Self>, shared: Rc<Shared>) {
        let number = self.links.get() + 1;
        self.links.set(number);
        let connection = match self.dial(&shared).await {
            Ok((sender, connection)) => {
                let mut link = self.link.borrow_mut();
                if self.admission.get() == Admission::Removed {
                    return;
                }
                *link = Link::Up { number, sender, calls: 0 };
                self.link_changed.notify_waiters();
                connection
            }
            Err(error) => {
                let detail = format!("cannot connect to its worker socket: {error}");
                if self.admission.get() != Admission::Removed {
                    *self.link.borrow_mut() = Link::Down { last_error: Some(detail.clone()) };
                    self.tell_lost(&shared, detail);
                }
                self.link_changed.notify_waiters();
                return;
            }
        };
        let ended = self.drive(connection, shared.config.connect_timeout).await;
        self.link_ended(number, "the connection ended");
        if self.admission.get() == Admission::Removed {
            return;
        }
        match ended {
            // h2 says so of an end without GOAWAY too.
            Ended::Cleanly if self.in_flight.get() > 0 => {
                self.tell_lost(&shared, "it closed the connection in the middle of calls".into());
            }
            Ended::Cleanly => {}
            Ended::Lost(detail) => self.tell_lost(&shared, detail),
            Ended::Protocol(detail) => self.tell_protocol(&shared, detail),
        }
    }

    fn link_ended(&self, number: u64, why: &str) {
        let mut link = self.link.borrow_mut();
        if matches!(*link, Link::Up { number: current, .. } if current == number) {
            *link = Link::Down { last_error: Some(why.into()) };
            self.link_changed.notify_waiters();
        }
    }

    async fn dial(&self, shared: &Shared) -> io::Result<(SendRequest<Bytes>, Connection<UnixStream>)> {
        let attempt = async {
            // An O_PATH descriptor names the socket itself, whatever has happened to its path since.
            let path = format!("/proc/self/fd/{}", self.socket.as_raw_fd());
            loop {
                match UnixStream::connect(&path).await {
                    // unix(7): a full backlog makes a non-blocking connect fail with EAGAIN, and nothing tells when it
                    // has room again.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(BACKLOG_PAUSE).await,
                    other => break other,
                }
            }
        };
        let stream = timeout(shared.config.connect_timeout, attempt)
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it accepts no connection"))??;
        let window = shared.config.provider_stream_window;
        let all = u64::from(window) * u64::try_from(self.limits.max_concurrent).unwrap_or(u64::MAX).clamp(1, 8191);
        // RFC 9113, section 6.9.1: windows end at 2^31 - 1.
        let all = u32::try_from(all).unwrap_or(u32::MAX).min((1 << 31) - 1);
        h2::client::Builder::new()
            .initial_window_size(window)
            .initial_connection_window_size(all)
            .max_frame_size(shared.config.provider_max_frame_size)
            .max_header_list_size(shared.config.plugin_connections.max_header_list_size)
            .max_concurrent_reset_streams(1024)
            .enable_push(false)
            .handshake::<_, Bytes>(stream)
            .await
            .map_err(io::Error::other)
    }

    /// Runs the connection until it ends; closes it when the provider does not answer HTTP/2 in time.
    async fn drive(&self, mut connection: Connection<UnixStream>, patience: Duration) -> Ended {
        let mut pings = connection.ping_pong();
        let answered = async {
            if let Some(pings) = &mut pings
                && timeout(patience, pings.ping(h2::Ping::opaque())).await.is_err()
            {
                return Some(Ended::Protocol(format!("it did not answer HTTP/2 within {patience:?}")));
            }
            None
        };
        let closing = self.closing.notified();
        tokio::pin!(answered, closing);
        let mut checked = false;
        loop {
            // All branches are polled in place and kept, so none loses anything.
            tokio::select! {
                biased;
                ended = &mut connection => {
                    return match ended {
                        Ok(()) => Ended::Cleanly,
                        Err(error) => Ended::of(&error),
                    };
                }
                () = &mut closing => return Ended::Cleanly,
                silent = &mut answered, if !checked => {
                    checked = true;
                    if let Some(ended) = silent {
                        return ended;
                    }
                }
            }
        }
    }

    pub(super) fn tell_protocol(&self, shared: &Shared, detail: String) {
        let provider = self.identity.clone();
        shared.tell_once(&provider.to_string(), BrokerEvent::ProviderProtocolError { provider, detail });
    }

    fn tell_lost(&self, shared: &Shared, detail: String) {
        let provider = self.identity.clone();
        let in_flight = self.in_flight.get();
        shared.tell_once(&provider.to_string(), BrokerEvent::ProviderLost { provider, detail, in_flight });
    }
}

enum Ended {
    Cleanly,
    Lost(String),
    Protocol(String),
}

impl Ended {
    fn of(error: &h2::Error) -> Self {
        // An error that h2 found itself is the provider's breach; anything else is a connection that went away.
        if error.is_go_away() && error.is_library() {
            Self::Protocol(error.to_string())
        } else {
            Self::Lost(error.to_string())
        }
    }
}

/// A place at a provider. Given back with a result; dropped without one, it says nothing about the provider.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) provider: Rc<Provider>,
    pub(super) shared: Rc<Shared>,
    permit: Option<Permit>,
    pub(super) began: Instant,
}

impl Admitted {
    /// Gives the place back. `answered`: when the first of the response came.
    pub(super) fn record(mut self, outcome: Outcome, answered: Option<Instant>, now: Instant) {
        self.give_back(outcome, answered, now);
    }

    fn give_back(&mut self, outcome: Outcome, answered: Option<Instant>, now: Instant) {
        let Some(permit) = self.permit.take() else { return };
        let latency = answered.unwrap_or(now).duration_since(self.began);
        let provider = &self.provider;
        let transition = provider.breaker.borrow_mut().record(permit, outcome, latency, self.shared.time(now));
        provider.tell_transition(&self.shared, transition);
        provider.in_flight.set(provider.in_flight.get() - 1);
        if provider.in_flight.get() == 0 {
            provider.emptied.notify_waiters();
        }
        self.shared.call_ended();
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.give_back(Outcome::Ignored, None, Instant::now());
    }
}
