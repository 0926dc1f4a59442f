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

/// The supervisor cuts lines that are too long, and a cut line is no JSON: one value is kept below this many bytes.
const MOST_VALUE: usize = 4096;

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
            "message": fields.message,
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
        writeln!(writer, "{line}")
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
        self.put(field, Value::String(shortened(format!("{value:?}"))));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, Value::String(shortened(value.to_owned())));
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

fn shortened(mut text: String) -> String {
    if text.len() > MOST_VALUE {
        text.truncate(text.floor_char_boundary(MOST_VALUE));
        text.push('…');
    }
    text
}
