//! The events of this host: numbered, kept in a bounded log, logged and followed.
//!
//! What an event says is the core's (`plugvisor_core::event`); this module adds the envelope of CloudEvents. A consumer
//! never slows a publisher: one that is too slow finds a gap in the sequence.

use std::time::SystemTime;

use plugvisor_core::{Generation, Severity, event::Event};
use plugvisor_package::PluginName;
use tokio::sync::watch;
use uuid::Uuid;

use crate::{
    journal::{Batch, Journal, JournalLimits},
    logs::visible,
    observe::Counters,
};

/// What is kept.
pub const KEPT: JournalLimits = JournalLimits { entries: 4096, weight: 4 * 1024 * 1024 };

/// What an event weighs without its data, in bytes.
const ENVELOPE: usize = 512;

/// Whom an event is about.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// The supervisor itself.
    Supervisor,
    /// A plugin, or a bundle that gives no valid name; then the name of its directory.
    Plugin(String),
    /// One generation of a plugin.
    Generation(PluginName, Generation),
}

impl Subject {
    /// The `subject` of CloudEvents: empty, `name` or `name/generation`.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Supervisor => String::new(),
            Self::Plugin(name) => name.clone(),
            Self::Generation(name, generation) => format!("{name}/{generation}"),
        }
    }

    /// The plugin's name.
    #[must_use]
    pub fn plugin(&self) -> Option<&str> {
        match self {
            Self::Supervisor => None,
            Self::Plugin(name) => Some(name),
            Self::Generation(name, _) => Some(name.as_str()),
        }
    }
}

/// An event in its envelope.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Unique, and ordered by time (UUIDv7).
    pub id: Uuid,
    /// Rises by one per event since the supervisor started.
    pub sequence: u64,
    /// When it was published.
    pub time: SystemTime,
    /// Whom it is about.
    pub subject: Subject,
    /// Such as `io.plugvisor.plugin.exited.v1`.
    pub type_name: String,
    /// What happened.
    pub event: Event,
}

/// The hub. Shared by reference; nobody owns more than a place to read from.
#[derive(Debug)]
pub struct Events {
    journal: Journal<Record>,
    source: String,
    counters: Counters,
}

impl Events {
    /// An empty log of this host and boot.
    #[must_use]
    pub fn new() -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { journal: Journal::new(KEPT), source: format!("/{host}/{}", boot.trim()), counters: Counters::new() }
    }

    /// The `source` of every event: `/host/boot-id`.
    #[must_use]
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Publishes an event and returns its sequence number.
    pub fn publish(&self, subject: Subject, event: impl Into<Event>) -> u64 {
        let event = event.into();
        let type_name = event.type_name();
        log(&subject, &type_name, &event);
        self.counters.event(&type_name);
        // Lists of problems, lines of stderr and a plugin's own data may all be long.
        let weight = ENVELOPE + size(&event.data());
        self.journal.push(weight, |sequence| Record {
            id: Uuid::now_v7(),
            sequence,
            time: SystemTime::now(),
            subject,
            type_name,
            event,
        })
    }

    /// Up to `most` events after the one numbered `after`.
    #[must_use]
    pub fn read(&self, after: u64, most: usize) -> Batch<Record> {
        self.journal.read(after, most)
    }

    /// Wakes on every event; its value is the newest sequence number.
    #[must_use]
    pub fn newest(&self) -> watch::Receiver<u64> {
        self.journal.newest()
    }

    /// How many events there were, by type, in the text format of Prometheus.
    #[must_use]
    pub fn render_counters(&self) -> String {
        self.counters.render()
    }
}

impl Default for Events {
    fn default() -> Self {
        Self::new()
    }
}

/// As JSON, in bytes.
fn size(data: &serde_json::Map<String, serde_json::Value>) -> usize {
    serde_json::to_vec(data).map_or(0, |bytes| bytes.len())
}

/// What the supervisor's own log says of an event. Of a plugin's own data only the size: there may be much of it, and
/// what is in it is for those who may follow events.
fn logged(event: &Event) -> String {
    let data = match event {
        Event::Custom(custom) => serde_json::json!({ "bytes": size(&custom.data) }),
        _ => serde_json::Value::Object(event.data()),
    };
    // JSON escapes only the control characters of ASCII.
    visible(&data.to_string()).into_owned()
}

/// Steps on the way of a load that goes well: for `plugvisor events`, and too much for a journal.
const STEPS: [&str; 9] = [
    ".plugin.discovered.",
    ".plugin.validated.",
    ".plugin.loading_progress.",
    ".plugin.starting.",
    ".plugin.handshake_ok.",
    ".security.trust_assessed.",
    ".security.capability_granted.",
    ".broker.service_registered.",
    ".broker.service_withdrawn.",
];

fn log(subject: &Subject, type_name: &str, event: &Event) {
    // The name of a directory may be anything.
    let (subject, reason, hint) = (subject.text(), event.reason(), event.hint());
    let (subject, hint) = (visible(&subject), visible(&hint));
    let data = logged(event);
    macro_rules! at {
        ($level:ident) => {
            tracing::$level!(target: "event", r#type = type_name, %subject, reason, %hint, %data)
        };
    }
    match event.severity() {
        Severity::Info if STEPS.iter().any(|step| type_name.contains(step)) => at!(debug),
        Severity::Info => at!(info),
        Severity::Warning => at!(warn),
        Severity::Error | Severity::Critical => at!(error),
    }
}

#[cfg(test)]
mod tests {
    use plugvisor_core::event::{ConfigEvent, CustomEvent, PluginEvent};

    use super::*;

    #[test]
    fn events_are_numbered_counted_and_addressed() {
        let events = Events::new();
        let name: PluginName = "gallery".parse().unwrap();
        assert_eq!(events.publish(Subject::Supervisor, ConfigEvent::Loaded { file: String::new() }), 1);
        let subject = Subject::Generation(name, Generation(3));
        assert_eq!(events.publish(subject, PluginEvent::Ready { ms: 5 }), 2);
        let batch = events.read(1, 10);
        let [(2, ready)] = batch.entries.as_slice() else { panic!("{batch:?}") };
        assert_eq!((ready.sequence, ready.subject.text()), (2, "gallery/3".to_owned()));
        assert_eq!(ready.type_name, "io.plugvisor.plugin.ready.v1");
        assert_eq!(ready.id.get_version_num(), 7);
        assert!(events.render_counters().contains("{type=\"io.plugvisor.plugin.ready.v1\"} 1\n"));
        assert!(events.source().starts_with('/'));
    }

    #[test]
    fn the_log_says_of_a_plugins_data_only_its_size() {
        let data = serde_json::json!({"note": "private"}).as_object().cloned().unwrap();
        let custom = Event::Custom(CustomEvent { name: "note".into(), data });
        assert_eq!(logged(&custom), r#"{"bytes":18}"#);
        let own = Event::from(PluginEvent::Ready { ms: 5 });
        assert_eq!(logged(&own), r#"{"ms":5}"#);
        let hostile = Event::from(ConfigEvent::Loaded { file: "a\u{9b}2J\n".into() });
        assert_eq!(logged(&hostile), r#"{"file":"a\u{9b}2J\n"}"#);
    }

    #[test]
    fn every_event_weighs_what_it_holds() {
        let events = Events::new();
        let file = "x".repeat(KEPT.weight / 8);
        for _ in 0..20 {
            events.publish(Subject::Supervisor, ConfigEvent::Loaded { file: file.clone() });
        }
        let kept = events.read(0, usize::MAX).entries.len();
        assert_eq!(kept, 7, "events within the weight of the log");
    }
}
