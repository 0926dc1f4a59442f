//! Every setting that holds, as it would be written, and where it was set.
//!
//! Values come from the checked configuration, so that a path is shown as it is used; where a key stands comes from the
//! file's text. What a plugin's manifest says in place of a key that is not set is not known here.

use std::{collections::BTreeMap, fmt::Debug};

use plugvisor_sandbox::tables::join;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{Config, DirectoryConfig, LauncherConfig, LogsConfig, SupervisorConfig};

/// Where the keys that are set stand, by their full names: the line, and the value's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places(BTreeMap<String, (usize, String)>);

/// One setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Such as `supervisor.metrics_address`.
    pub key: String,
    /// As it would be written in TOML.
    pub value: String,
    /// Where it was set.
    pub origin: Origin,
}

/// Where a setting comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The program's own, or what follows from the environment.
    Default,
    /// A line of the file, counted from 1.
    Line(usize),
    /// A flag of the command line.
    Flag(&'static str),
}

/// Words in a key of a plugin's own configuration, or in the name of a variable, whose value nobody but the plugin shall see.
const SECRET: [&str; 6] = ["secret", "password", "passwd", "token", "credential", "key"];

impl Places {
    /// Those of a document that was read from `text`.
    pub(super) fn of(text: &str, document: &DeTable<'_>) -> Self {
        let mut places = Self::default();
        places.table(text, "", document);
        places
    }

    /// The line of a key, counted from 1.
    pub(super) fn line(&self, key: &str) -> Option<usize> {
        self.0.get(key).map(|(line, _)| *line)
    }

    fn table(&mut self, text: &str, path: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            self.value(text, &join(path, key.get_ref()), value);
        }
    }

    fn value(&mut self, text: &str, path: &str, value: &Spanned<DeValue<'_>>) {
        match value.get_ref() {
            DeValue::Table(table) => self.table(text, path, table),
            DeValue::Array(items) if items.iter().any(|item| matches!(item.get_ref(), DeValue::Table(_))) => {
                for (index, item) in items.iter().enumerate() {
                    self.value(text, &format!("{path}[{index}]"), item);
                }
            }
            DeValue::Array(_)
            | DeValue::String(_)
            | DeValue::Integer(_)
            | DeValue::Float(_)
            | DeValue::Boolean(_)
            | DeValue::Datetime(_) => {
                let span = value.span();
                let line = 1 + text.as_bytes()[..span.start.min(text.len())].iter().filter(|b| **b == b'\n').count();
                let written = text.get(span).unwrap_or_default();
                let written = written.split_whitespace().collect::<Vec<_>>().join(" ");
                self.0.insert(path.to_owned(), (line, written));
            }
        }
    }
}

impl Config {
    /// Every setting that holds. Settings of plugins that are not set are left to their manifests, and not listed.
    #[must_use]
    pub fn settings(&self) -> Vec<Setting> {
        let mut known = Vec::new();
        let mut add = |key: &str, value: String| known.push((key.to_owned(), value));
        let SupervisorConfig {
            runtime_directory,
            state_directory,
            metrics_address,
            user,
            parallel_starts,
            allow_degraded,
        } = &self.supervisor;
        add("supervisor.runtime_directory", quoted(runtime_directory));
        add("supervisor.state_directory", quoted(state_directory));
        add("supervisor.metrics_address", quoted(metrics_address.to_string()));
        add("supervisor.user", quoted(user));
        add("supervisor.parallel_starts", parallel_starts.to_string());
        add("supervisor.allow_degraded", list(allow_degraded.iter().map(|control| control.as_str())));
        match &self.launcher {
            LauncherConfig::Embedded { linger } => {
                add("launcher.linger", quoted(format!("{}s", linger.as_secs())));
                add("launcher.config_root", quoted(&self.config_root));
                add("launcher.data_root", quoted(self.data_root()));
            }
            LauncherConfig::External { socket } => add("launcher.socket", quoted(socket)),
        }
        let LogsConfig { directory: _, files, lines } = &self.logs;
        add("logs.directory", quoted(self.log_directory()));
        add("logs.file_bytes", files.file_bytes.to_string());
        add("logs.files", files.files.to_string());
        add("logs.total_bytes", files.total_bytes.to_string());
        add("logs.lines_per_second", lines.lines_per_second.to_string());
        add("logs.line_bytes", lines.line_bytes.to_string());
        for DirectoryConfig { index, path, tier, grants } in &self.directories {
            let table = format!("directory[{index}]");
            add(&join(&table, "path"), quoted(path));
            add(&join(&table, "tier"), quoted(tier.as_str()));
            add(&join(&table, "grants"), list(grants.iter().map(|capability| capability.as_str())));
        }
        // Keys that are set and whose effect is what is written.
        for (key, (_, written)) in &self.places.0 {
            if !known.iter().any(|(name, _)| name == key) {
                known.push((key.clone(), if is_secret(key) { "(hidden)".to_owned() } else { written.clone() }));
            }
        }
        known.into_iter().map(|(key, value)| Setting { origin: self.origin(&key), key, value }).collect()
    }

    fn origin(&self, key: &str) -> Origin {
        if let Some(flag) = self.flags.get(key) {
            return Origin::Flag(flag);
        }
        self.places.line(key).map_or(Origin::Default, Origin::Line)
    }
}

fn is_secret(key: &str) -> bool {
    let own = [".config.", ".env."].iter().find_map(|table| key.split_once(table));
    let own = own.map(|(_, own)| own.to_ascii_lowercase());
    own.is_some_and(|own| SECRET.iter().any(|word| own.contains(word)))
}

/// Debug text of a path or a name of ours is a TOML string.
fn quoted(value: impl Debug) -> String {
    format!("{value:?}")
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    format!("[{}]", names.map(quoted).collect::<Vec<_>>().join(", "))
}
