//! What happened, as domain events: a closed enumeration, grouped as their CloudEvents types are.
//!
//! Each event knows its type, severity, reason, hint and data. The envelope (id, sequence, time, source, subject) is
//! the daemon's, and so is the wire form.

mod plugin;
mod system;
#[cfg(test)]
mod tests;

use std::borrow::Cow;

use serde::Serialize;
use serde_json::{Map, Value};

pub(crate) use self::system::millis;
pub use self::{
    plugin::{Exit, ExitKind, PluginEvent},
    system::{BreakerEvent, BrokerEvent, ConfigEvent, DependencyEvent, ResourceEvent, SecurityEvent, SupervisorEvent},
};
use crate::Severity;

/// Something that happened. Serialised externally tagged: `{"plugin": {"exited": {…}}}`.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// To a plugin's life.
    Plugin(PluginEvent),
    /// To the supervisor itself.
    Supervisor(SupervisorEvent),
    /// Between plugins that depend on one another.
    Dependency(DependencyEvent),
    /// Trust, capabilities and walls.
    Security(SecurityEvent),
    /// On the way of calls.
    Broker(BrokerEvent),
    /// To a breaker.
    Breaker(BreakerEvent),
    /// Memory, processes, CPU.
    Resource(ResourceEvent),
    /// To the configuration.
    Config(ConfigEvent),
    /// Published by a plugin.
    Custom(CustomEvent),
}

/// What a plugin published; the type is one that its manifest declares in `events.custom`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CustomEvent {
    /// The declared type, such as "gallery.page_made".
    pub name: String,
    /// The plugin's data.
    pub data: Map<String, Value>,
}

/// What every group of events says of itself.
trait Group {
    /// The group and name in the type: "plugin.exited".
    fn name(&self) -> &'static str;
    fn severity(&self) -> Severity;
    fn reason(&self) -> &'static str;
    fn hint(&self) -> Cow<'_, str>;
}

impl Event {
    /// The CloudEvents type, such as `io.plugvisor.plugin.exited.v1`. What a plugin publishes is always under
    /// `io.plugvisor.custom.`, so that no plugin can speak for the supervisor.
    #[must_use]
    pub fn type_name(&self) -> String {
        match self.group() {
            Ok(group) => format!("io.plugvisor.{}.v1", group.name()),
            Err(custom) => format!("io.plugvisor.custom.{}.v1", custom.name),
        }
    }

    /// How bad it is.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.group().map_or(Severity::Info, Group::severity)
    }

    /// Why it happened, in `snake_case`, one of a closed set per type.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        self.group().map_or("published", |group| group.reason())
    }

    /// What to do next; empty when there is nothing to do.
    #[must_use]
    pub fn hint(&self) -> Cow<'_, str> {
        self.group().map_or(Cow::Borrowed(""), |group| group.hint())
    }

    /// The type's own fields. Durations are milliseconds in fields that end in `_ms`.
    #[must_use]
    pub fn data(&self) -> Map<String, Value> {
        if let Self::Custom(custom) = self {
            return custom.data.clone();
        }
        // {"group": {"name": {…}}}; a variant without fields is {"group": "name"}.
        let mut value = serde_json::to_value(self).unwrap_or_default();
        for _ in 0..2 {
            value = match value {
                Value::Object(fields) => fields.into_iter().next().map_or(Value::Null, |(_, inner)| inner),
                _ => Value::Null,
            };
        }
        match value {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }

    fn group(&self) -> Result<&dyn Group, &CustomEvent> {
        Ok(match self {
            Self::Plugin(event) => event,
            Self::Supervisor(event) => event,
            Self::Dependency(event) => event,
            Self::Security(event) => event,
            Self::Broker(event) => event,
            Self::Breaker(event) => event,
            Self::Resource(event) => event,
            Self::Config(event) => event,
            Self::Custom(custom) => return Err(custom),
        })
    }
}
