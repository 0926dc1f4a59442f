//! Everything the daemon said, in order, and waiting for what it says next.

use std::{
    fmt::Write as _,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use plugvisor_proto::event::v1::Event;
use prost_types::value::Kind;
use tokio::sync::watch;

use crate::stretched;

/// How long an awaited event may take: far more than any bound that a test measures, so that a slow machine does not
/// fail a correct daemon.
#[must_use]
pub fn patience() -> Duration {
    stretched(Duration::from_secs(60))
}

/// The events of one daemon since its start.
#[derive(Clone, Debug)]
pub struct EventLog {
    events: Arc<Mutex<Vec<Event>>>,
    count: watch::Sender<usize>,
}

impl EventLog {
    pub(crate) fn new() -> Self {
        Self { events: Arc::default(), count: watch::Sender::new(0) }
    }

    pub(crate) fn push(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(event);
        self.count.send_replace(events.len());
    }

    /// A place in the log: what comes after it has not been seen here yet. It may have been said long ago, for events come
    /// by a stream of their own; [`crate::Daemon::now`] is a place that nothing older comes after.
    #[must_use]
    pub fn mark(&self) -> usize {
        *self.count.borrow()
    }

    /// Every event so far.
    #[must_use]
    pub fn all(&self) -> Vec<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for an event anywhere in the log.
    ///
    /// # Errors
    /// When none came in [`patience`]; the message lists what did come.
    pub async fn wait(&self, what: &str, wanted: impl FnMut(&Event) -> bool) -> anyhow::Result<Event> {
        self.wait_after(0, what, wanted).await
    }

    /// Waits for an event after a mark.
    ///
    /// # Errors
    /// When none came in [`patience`]; the message lists what did come.
    pub async fn wait_after(
        &self,
        mark: usize,
        what: &str,
        mut wanted: impl FnMut(&Event) -> bool,
    ) -> anyhow::Result<Event> {
        let mut count = self.count.subscribe();
        let mut next = mark;
        let search = async {
            loop {
                {
                    let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
                    if let Some(found) = events.iter().skip(next).find(|event| wanted(event)) {
                        return Some(found.clone());
                    }
                    next = next.max(events.len());
                }
                if count.changed().await.is_err() {
                    return None;
                }
            }
        };
        match tokio::time::timeout(patience(), search).await {
            Ok(Some(event)) => Ok(event),
            Ok(None) => anyhow::bail!("the event stream ended before: {what}\n{}", self.listing()),
            Err(_) => anyhow::bail!("not seen in {:?}: {what}\n{}", patience(), self.listing()),
        }
    }

    /// One line per event, for messages.
    #[must_use]
    pub fn listing(&self) -> String {
        let mut text = String::from("events:\n");
        for event in self.all() {
            let _ = writeln!(
                text,
                "  {:>4} {} {} reason={} hint={:?} {}",
                event.sequence,
                event.r#type,
                event.subject,
                event.reason,
                event.hint,
                data_text(&event)
            );
        }
        text
    }
}

/// Whether the event is about this plugin, any generation of it.
#[must_use]
pub fn subject_is(event: &Event, plugin: &str) -> bool {
    event.subject.split('/').next() == Some(plugin)
}

/// A number in the event's data.
#[must_use]
pub fn number(event: &Event, field: &str) -> Option<f64> {
    match event.data.as_ref()?.fields.get(field)?.kind {
        Some(Kind::NumberValue(value)) => Some(value),
        _ => None,
    }
}

/// Whether the event is of this type (without `io.plugvisor.` and the version) and about this plugin.
#[must_use]
pub fn is(event: &Event, kind: &str, plugin: &str) -> bool {
    short_type(event) == kind && subject_is(event, plugin)
}

/// The type without `io.plugvisor.` and the version, such as `plugin.exited`.
#[must_use]
pub fn short_type(event: &Event) -> &str {
    let text = event.r#type.strip_prefix("io.plugvisor.").unwrap_or(&event.r#type);
    text.rsplit_once(".v").map_or(text, |(kind, _)| kind)
}

/// The event's data as compact text, for messages and for searching.
#[must_use]
pub fn data_text(event: &Event) -> String {
    event.data.as_ref().map(|data| struct_text(&data.fields)).unwrap_or_default()
}

fn struct_text(fields: &std::collections::BTreeMap<String, prost_types::Value>) -> String {
    let parts: Vec<String> = fields.iter().map(|(key, value)| format!("{key}={}", value_text(value))).collect();
    format!("{{{}}}", parts.join(" "))
}

fn value_text(value: &prost_types::Value) -> String {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => "null".to_owned(),
        Some(Kind::BoolValue(value)) => value.to_string(),
        Some(Kind::NumberValue(value)) => value.to_string(),
        Some(Kind::StringValue(value)) => format!("{value:?}"),
        Some(Kind::StructValue(value)) => struct_text(&value.fields),
        Some(Kind::ListValue(list)) => {
            let parts: Vec<String> = list.values.iter().map(value_text).collect();
            format!("[{}]", parts.join(", "))
        }
    }
}
