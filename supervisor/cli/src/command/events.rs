//! `plugvisor events`: what happened, and what is happening.

use plugvisor_proto::admin::v1::admin_client::AdminClient;
use plugvisor_proto::admin::v1::{WatchEventsRequest, WatchEventsResponse};
use plugvisor_proto::event::v1::{Event, Severity};
use prost_types::Value;
use prost_types::value::Kind;
use tonic::transport::Channel;

use crate::admin::Admin;
use crate::args::Format;
use crate::command::follow::{Follower, report_missed};
use crate::failure::Failure;
use crate::output::Output;
use crate::quantity::moment;
use crate::text::{Line, Style};

/// Which events.
#[derive(Debug)]
pub(crate) struct Filter {
    pub(crate) follow: bool,
    pub(crate) plugin: Option<String>,
    pub(crate) type_prefix: Option<String>,
    pub(crate) after: Option<u64>,
}

/// Prints events until the stream ends or the user interrupts.
pub(crate) async fn events(admin: &Admin, output: &Output, filter: Filter) -> Result<(), Failure> {
    let question = WatchEventsRequest {
        plugin: filter.plugin.unwrap_or_default(),
        type_prefix: filter.type_prefix.map(|prefix| full_type(&prefix)).unwrap_or_default(),
        after_sequence: Some(filter.after.unwrap_or(0)),
        follow: filter.follow,
    };
    let call = |mut client: AdminClient<Channel>, question| async move { client.watch_events(question).await };
    let mut follower = Follower::start(admin, output, "events", filter.follow, question, call).await?;
    while let Some(WatchEventsResponse { event, missed }) = follower.next().await? {
        report_missed(missed, "events");
        let Some(event) = event else { continue };
        match output.format {
            Format::Table | Format::Wide => output.line(&line(&event, output.format == Format::Wide))?,
            Format::Json | Format::Jsonl => follower.json(output.to_json("plugvisor.event.v1.Event", &event)?)?,
            Format::Name => output.line(&Line::new(&event.r#type))?,
        }
    }
    follower.end()
}

const PREFIX: &str = "io.plugvisor.";

/// People write `breaker.`; the wire has `io.plugvisor.breaker.`.
fn full_type(prefix: &str) -> String {
    if prefix.starts_with(PREFIX) || PREFIX.starts_with(prefix) {
        prefix.to_owned()
    } else {
        format!("{PREFIX}{prefix}")
    }
}

/// `io.plugvisor.plugin.exited.v1` as `plugin.exited`.
fn short_type(full: &str) -> &str {
    let short = full.strip_prefix(PREFIX).unwrap_or(full);
    match short.rsplit_once(".v") {
        Some((name, version)) if !version.is_empty() && version.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => short,
    }
}

fn line(event: &Event, wide: bool) -> Line {
    let (style, severity) = match event.severity() {
        Severity::Critical => (Style::Bad, "CRITICAL"),
        Severity::Error => (Style::Bad, "ERROR"),
        Severity::Warning => (Style::Warning, "WARNING"),
        Severity::Info => (Style::Plain, "info"),
        Severity::Unspecified => (Style::Plain, "-"),
    };
    let mut line = Line::default()
        .add(Style::Faint, moment(event.time))
        .add(Style::Plain, format!(" #{} ", event.sequence))
        .add(style, format!("{severity:<8}"))
        .add(Style::Plain, format!(" {}", short_type(&event.r#type)));
    if !event.subject.is_empty() {
        line = line.add(Style::Title, format!(" {}", event.subject));
    }
    if !event.reason.is_empty() {
        line = line.add(Style::Plain, format!(" {}", event.reason));
    }
    let data = event.data.iter().flat_map(|data| &data.fields);
    // The reason and the hint stand in the event's data too.
    for (key, value) in data.filter(|(key, _)| !matches!(key.as_str(), "reason" | "hint")) {
        line = line.add(Style::Faint, format!(" {key}=")).add(Style::Plain, short_value(value));
    }
    if !event.hint.is_empty() {
        line = line.add(Style::Plain, format!(" ({})", event.hint));
    }
    if wide {
        line = line.add(Style::Faint, format!(" {}", event.id));
    }
    line
}

/// Whole numbers without a point, text bare when that is clear, everything else as JSON.
fn short_value(value: &Value) -> String {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => "null".to_owned(),
        Some(Kind::BoolValue(value)) => value.to_string(),
        Some(Kind::NumberValue(number)) => number.to_string(),
        Some(Kind::StringValue(text)) if !text.is_empty() && !text.contains([' ', '"', '=']) => text.clone(),
        Some(Kind::StringValue(text)) => format!("{text:?}"),
        Some(Kind::ListValue(list)) => {
            format!("[{}]", list.values.iter().map(short_value).collect::<Vec<_>>().join(","))
        }
        Some(Kind::StructValue(fields)) => {
            let fields: Vec<String> =
                fields.fields.iter().map(|(key, value)| format!("{key}={}", short_value(value))).collect();
            format!("{{{}}}", fields.join(","))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_short_for_people_and_full_on_the_wire() {
        assert_eq!(full_type("breaker."), "io.plugvisor.breaker.");
        assert_eq!(full_type("io.plugvisor.breaker."), "io.plugvisor.breaker.");
        assert_eq!(full_type(""), "");
        assert_eq!(short_type("io.plugvisor.plugin.exited.v1"), "plugin.exited");
        assert_eq!(short_type("acme.thing.very"), "acme.thing.very");
    }
}
