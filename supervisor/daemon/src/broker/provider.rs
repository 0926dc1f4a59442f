//! One provider generation: whether it takes calls, and its breaker.
//!
//! It knows nothing of callers, routes or connections; its connection is a [`super::link`].

use std::{
    cell::{Cell, RefCell},
    os::fd::OwnedFd,
    rc::Rc,
    time::Instant,
};

use plugvisor_core::{
    breaker::{Breaker, Outcome, Permit, Transition},
    route::{Reason, Refusal},
};

use super::{
    config::CallLimits, event::BrokerEvent, handle::ProviderSpec, identity::PluginIdentity, link::LinkKey,
    metrics::ProviderMetrics, shared::Shared, snapshot::ProviderSnapshot,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Admission {
    NotReady,
    Ready,
    Draining,
    Removed,
}

#[derive(Debug)]
pub(super) struct Provider {
    pub(super) identity: PluginIdentity,
    pub(super) limits: CallLimits,
    pub(super) metrics: Rc<ProviderMetrics>,
    pub(super) socket: OwnedFd,
    /// Its connection.
    pub(super) link: LinkKey,
    pub(super) connected: Cell<bool>,
    breaker: RefCell<Breaker>,
    admission: Cell<Admission>,
    in_flight: Cell<usize>,
}

impl Provider {
    pub(super) fn new(spec: ProviderSpec, link: LinkKey, shared: &Shared) -> Self {
        let ProviderSpec { identity, socket, breaker, breaker_memory, limits } = spec;
        let seed = identity.name.as_str().bytes().fold(identity.generation.0, |seed, byte| {
            seed.rotate_left(7).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ u64::from(byte)
        });
        Self {
            metrics: shared.metrics.provider(identity.name.as_str()),
            identity,
            limits,
            socket,
            link,
            connected: Cell::new(false),
            breaker: RefCell::new(match breaker_memory {
                None => Breaker::new(breaker, seed),
                Some(memory) => Breaker::resume(breaker, seed, memory, shared.time(Instant::now())),
            }),
            admission: Cell::new(Admission::NotReady),
            in_flight: Cell::new(0),
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

    /// Whether it takes calls now.
    pub(super) fn set_ready(&self, ready: bool) -> bool {
        match (self.admission.get(), ready) {
            (Admission::NotReady | Admission::Ready, true) => self.admission.set(Admission::Ready),
            (Admission::NotReady | Admission::Ready, false) => self.admission.set(Admission::NotReady),
            // Draining and stopping are final for a generation.
            (Admission::Draining | Admission::Removed, _) => {}
        }
        self.admission.get() == Admission::Ready
    }

    /// Refuses new calls.
    pub(super) fn drain(&self) {
        if !self.is_removed() {
            self.admission.set(Admission::Draining);
        }
    }

    /// Refuses new calls, and expects its connection to end.
    pub(super) fn remove(&self) {
        self.admission.set(Admission::Removed);
    }

    pub(super) fn is_removed(&self) -> bool {
        self.admission.get() == Admission::Removed
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.get()
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
            connected: self.connected.get(),
        }
    }

    fn tell_transition(&self, shared: &Shared, transition: Option<Transition>) {
        if let Some(transition) = transition {
            let memory = self.breaker.borrow().memory(shared.time(Instant::now()));
            shared.tell(BrokerEvent::BreakerChanged { provider: self.identity.clone(), transition, memory });
        }
    }

    pub(super) fn tell_protocol(&self, shared: &Shared, detail: String) {
        let provider = self.identity.clone();
        shared.tell_once(&provider.to_string(), BrokerEvent::ProviderProtocolError { provider, detail });
    }

    pub(super) fn tell_lost(&self, shared: &Shared, detail: String) {
        let provider = self.identity.clone();
        let in_flight = self.in_flight.get();
        shared.tell_once(&provider.to_string(), BrokerEvent::ProviderLost { provider, detail, in_flight });
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
        self.shared.call_ended(provider.in_flight.get() == 0);
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.give_back(Outcome::Ignored, None, Instant::now());
    }
}
