//! Logs as JSON lines on standard error, the form that the supervisor reads.
//!
//! ```json
//! {"timestamp":"…","level":"INFO","target":"thumbnailer","message":"scaled","fields":{"edge":256},
//!  "plugin":"thumbnailer","generation":3,"trace_id":"0af7651916cd43dd8448eb211c80319c"}
//! ```
//!
//! `spans` (outermost first, each with `name` and `fields`) appears inside spans, `trace_id` while a call that has one
//! is served. Without a supervisor, lines are for people instead.

use std::{fmt, io, panic};

use plugvisor_client::CallContext;
use serde_json::{Map, Value, json};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormattedFields,
        format::{JsonFields, Writer},
        time::{FormatTime as _, SystemTime},
    },
    registry::{LookupSpan, Scope},
};

use crate::listen::Environment;

/// The supervisor cuts lines of more than 8 KiB, and a cut line is no JSON. So one value is kept below this many bytes,
const MOST_VALUE: usize = 4096;
/// and of a line that is longer than this in spite of it, only the beginning of the message is kept.
const MOST_LINE: usize = 8000;
/// Short enough that escaping every letter (six bytes each) leaves the line below the limit.
const MOST_CUT_MESSAGE: usize = 1000;

/// Installs the subscriber and the panic hook. Does nothing where a program has installed its own subscriber before.
pub(crate) fn install(environment: &Environment) {
    // RUST_LOG as everywhere in Rust; an unreadable one counts as none.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let installed = if environment.supervised {
        let lines = JsonLines { plugin: environment.plugin.clone(), generation: environment.generation };
        builder.fmt_fields(JsonFields::new()).event_format(lines).try_init()
    } else {
        builder.with_ansi(io::IsTerminal::is_terminal(&io::stderr())).try_init()
    };
    if installed.is_ok() {
        panic::set_hook(Box::new(|panicked| {
            let place = panicked.location().map(ToString::to_string).unwrap_or_default();
            tracing::error!(place, "panic: {}", panicked.payload_as_str().unwrap_or("(no text)"));
        }));
    }
}

struct JsonLines {
    plugin: String,
    generation: u64,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, JsonFields> for JsonLines {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let mut line = json!({
            "timestamp": timestamp,
            "level": metadata.level().as_str(),
            "target": metadata.target(),
            "message": &fields.message,
            "plugin": self.plugin,
            "generation": self.generation,
        });
        if !fields.others.is_empty() {
            line["fields"] = Value::Object(fields.others);
        }
        let spans = context.event_scope().into_iter().flat_map(Scope::from_root).map(|span| {
            let extensions = span.extensions();
            let recorded = extensions.get::<FormattedFields<JsonFields>>().map_or("", |fields| fields.as_str());
            json!({"name": span.name(), "fields": serde_json::from_str(recorded).unwrap_or(Value::Null)})
        });
        let spans: Vec<Value> = spans.collect();
        if !spans.is_empty() {
            line["spans"] = Value::Array(spans);
        }
        if let Some(trace_id) = CallContext::current().as_ref().and_then(CallContext::trace_id) {
            line["trace_id"] = trace_id.into();
        }
        let mut text = line.to_string();
        if text.len() > MOST_LINE {
            line["message"] = shortened(fields.message, MOST_CUT_MESSAGE).into();
            line["fields"] = json!({"cut": true});
            line["spans"] = Value::Null;
            text = line.to_string();
        }
        writeln!(writer, "{text}")
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => {
                self.others.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, Value::String(shortened(format!("{value:?}"), MOST_VALUE)));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::String(shortened(value.to_owned(), MOST_VALUE)));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
}

fn shortened(mut text: String, most: usize) -> String {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(work: impl FnOnce()) -> Vec<Value> {
        let captured = Captured::default();
        let writer = captured.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || writer.clone())
            .fmt_fields(JsonFields::new())
            .event_format(JsonLines { plugin: "sample".into(), generation: 2 })
            .finish();
        tracing::subscriber::with_default(subscriber, work);
        let text = String::from_utf8(captured.0.lock().unwrap().clone()).unwrap();
        assert!(text.lines().all(|line| line.len() <= 8192), "{text}");
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_line_says_who_what_and_for_which_trace() {
        let traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let call = CallContext::default().with_traceparent(traceparent).unwrap();
        let lines = logged(|| {
            let _span = tracing::info_span!("batch", id = 7).entered();
            call.sync_scope(|| tracing::warn!(edge = 256, name = "a\nb", "scaled {}", 1));
            tracing::info!("outside");
        });
        assert_eq!(lines[0]["level"], "WARN");
        assert_eq!(lines[0]["message"], "scaled 1");
        assert_eq!(lines[0]["fields"], json!({"edge": 256, "name": "a\nb"}));
        assert_eq!(lines[0]["spans"], json!([{"name": "batch", "fields": {"id": 7}}]));
        assert_eq!((&lines[0]["plugin"], &lines[0]["generation"]), (&json!("sample"), &json!(2)));
        assert_eq!(lines[0]["trace_id"], "0af7651916cd43dd8448eb211c80319c");
        assert!(lines[1].get("trace_id").is_none() && lines[1].get("fields").is_none(), "{}", lines[1]);
    }

    #[test]
    fn a_long_line_stays_json() {
        let long = "\u{1}".repeat(100_000);
        let lines = logged(|| {
            tracing::info!(a = long, b = long, "short");
            tracing::info!("{long}");
            tracing::info!(a = "x".repeat(5000), "fits once cut");
        });
        assert_eq!(lines[0]["message"], "short");
        assert_eq!(lines[0]["fields"], json!({"cut": true}));
        assert!(lines[1]["message"].as_str().unwrap().ends_with('…'));
        assert_eq!(lines[2]["fields"]["a"].as_str().unwrap().len(), MOST_VALUE + '…'.len_utf8());
    }
}
