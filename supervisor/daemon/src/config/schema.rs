//! The JSON Schema of `plugvisor.toml`, for editors. Checked in as `schema/plugvisor.schema.json`; a test holds the two
//! equal.

use std::collections::BTreeMap;

use schemars::JsonSchema;

use super::raw;

/// Configuration of the Plugvisor supervisor.
#[derive(JsonSchema)]
#[schemars(title = "plugvisor.toml", deny_unknown_fields)]
#[allow(dead_code, reason = "read by the derive only")]
struct File {
    /// The supervisor's own settings.
    supervisor: Option<raw::Supervisor>,
    /// The plugins' parent.
    launcher: Option<raw::Launcher>,
    /// What plugins print: how much is kept, and where.
    logs: Option<raw::Logs>,
    /// Where traces of calls are sent.
    traces: Option<raw::Traces>,
    /// Where bundles are looked for.
    directory: Option<Vec<raw::Directory>>,
    /// Settings of single plugins, by name.
    plugin: Option<BTreeMap<String, raw::Plugin>>,
}

/// The schema (JSON Schema draft 2020-12).
#[must_use]
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(File).to_value()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_checked_in_schema_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/schema/plugvisor.schema.json");
        let current = format!("{:#}\n", super::schema());
        if std::env::var_os("PLUGVISOR_WRITE_SCHEMA").is_some() {
            std::fs::write(path, &current).unwrap();
        }
        let checked_in = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            checked_in == current,
            "run PLUGVISOR_WRITE_SCHEMA=1 cargo test -p plugvisor-daemon --features schema schema_is_current"
        );
    }
}
