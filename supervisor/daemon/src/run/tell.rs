//! What the broker and the state directory notice becomes events.

use std::sync::Arc;

use plugvisor_core::{
    Time,
    event::{BreakerEvent, BrokerEvent as DomainEvent, SupervisorEvent},
    route::{Reason, Refusal},
};
use tokio::sync::{mpsc, watch};

use crate::{
    broker::{BrokerEvent, CallerIdentity, PluginIdentity, Sender},
    events::{Events, Subject},
    state::{self, BreakerRecord, Note},
    supervisor::Supervisor,
};

/// What becomes of the state directory becomes events.
pub(super) async fn tell_of_state(events: Arc<Events>, mut health: watch::Receiver<state::Health>) {
    let (mut rebuilt, mut works) = (None, true);
    loop {
        let now = health.borrow_and_update().clone();
        if now.rebuilt != rebuilt {
            if let Some(state::Rebuilt { moved_to, why }) = &now.rebuilt {
                let (moved_to, why) = (moved_to.display().to_string(), why.clone());
                events.publish(Subject::Supervisor, SupervisorEvent::StateRebuilt { moved_to, why });
            }
            rebuilt = now.rebuilt;
        }
        match now.writing {
            state::Writing::Fails { cause, why, since: _ } => {
                events.publish(Subject::Supervisor, SupervisorEvent::StateReadOnly { why, cause });
                works = false;
            }
            state::Writing::Works if !works => {
                events.publish(Subject::Supervisor, SupervisorEvent::StateRecovered {});
                works = true;
            }
            state::Writing::Works => {}
        }
        if health.changed().await.is_err() {
            return;
        }
    }
}

/// What the broker noticed becomes events.
pub(super) async fn pump(state: Arc<Supervisor>, mut noticed: mpsc::Receiver<BrokerEvent>) {
    let of = |identity: &PluginIdentity| Subject::Generation(identity.name.clone(), identity.generation);
    let events = &state.shared.events;
    while let Some(event) = noticed.recv().await {
        match event {
            BrokerEvent::BreakerChanged { provider, transition, memory } => {
                let now = Time::after_start(state.shared.began.elapsed());
                let record = BreakerRecord::of(provider.generation, memory, now);
                state.shared.state.note(&provider.name, Note::Breaker(record));
                state.note_breaker(&provider.name, &transition);
                events.publish(of(&provider), BreakerEvent::from(transition));
            }
            BrokerEvent::ProviderLost { provider, detail, in_flight } => {
                tracing::warn!(plugin = %provider, %detail, in_flight, "the broker lost its connection to a plugin");
            }
            BrokerEvent::ProviderProtocolError { provider, detail } => {
                let peer = provider.name.to_string();
                events.publish(of(&provider), DomainEvent::ProtocolError { peer, detail });
            }
            BrokerEvent::CallerRejected { caller, detail } => {
                events.publish(Subject::Supervisor, DomainEvent::ProtocolError { peer: caller, detail });
            }
            BrokerEvent::CallDenied { caller, service, refusal } => {
                let subject = match &caller {
                    CallerIdentity::Plugin(plugin) => of(plugin),
                    CallerIdentity::Local { .. } => Subject::Supervisor,
                };
                let Refusal { reason, message, hint, hint_for_caller: _ } = refusal;
                let event = if reason == Reason::Loop {
                    DomainEvent::LoopRejected { path: message }
                } else {
                    DomainEvent::CallDenied { caller: caller.label(), service, denial: reason.as_str(), message, hint }
                };
                events.publish(subject, event);
            }
            BrokerEvent::MessageTooLarge { provider, caller, sender, size: _, limit } => {
                let sender = match sender {
                    Sender::Caller => caller,
                    Sender::Provider => provider.name.to_string(),
                };
                events.publish(of(&provider), DomainEvent::PayloadRejected { sender, limit_bytes: limit.into() });
            }
        }
    }
}
