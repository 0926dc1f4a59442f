//! `plugvisor load`, `unload` and `restart`.

use std::fs;
use std::io;

use plugvisor_proto::admin::v1::{
    LoadPluginRequest, PluginState, PluginStatus, RestartPluginRequest, UnloadPluginRequest,
};

use crate::admin::{Admin, LIFE};
use crate::args::Format;
use crate::command::status;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::Line;

/// Loads a plugin by its name or its bundle directory.
pub(crate) async fn load(admin: &Admin, output: &Output, plugin: &str) -> Result<(), Failure> {
    let question = LoadPluginRequest { name_or_path: name_or_path(plugin)? };
    let answer = admin
        .ask(&format!("load {plugin}"), LIFE, question, |mut client, question| async move {
            client.load_plugin(question).await
        })
        .await?;
    report(output, "loaded", PluginState::Loaded, answer.plugin.unwrap_or_default())
}

/// Stops a plugin and keeps it stopped.
pub(crate) async fn unload(admin: &Admin, output: &Output, name: &str, cascade: bool) -> Result<(), Failure> {
    let question = UnloadPluginRequest { name: name.to_owned(), cascade };
    let answer = admin
        .ask(&format!("unload {name}"), LIFE, question, |mut client, question| async move {
            client.unload_plugin(question).await
        })
        .await?;
    if let Format::Table | Format::Wide = output.format {
        for dependent in &answer.dependents {
            output.line(&Line::new(format!("unloaded {dependent}, which depends on {name}")))?;
        }
    }
    report(output, "unloaded", PluginState::Unloaded, answer.plugin.unwrap_or_default())
}

/// Stops a plugin and starts it again.
pub(crate) async fn restart(admin: &Admin, output: &Output, name: &str) -> Result<(), Failure> {
    let question = RestartPluginRequest { name: name.to_owned() };
    let answer = admin
        .ask(&format!("restart {name}"), LIFE, question, |mut client, question| async move {
            client.restart_plugin(question).await
        })
        .await?;
    report(output, "restarted", PluginState::Loaded, answer.plugin.unwrap_or_default())
}

/// The supervisor has another working directory, so a path must be whole. A name has no slash.
fn name_or_path(text: &str) -> Result<String, Failure> {
    if !text.contains('/') && text != "." && text != ".." {
        return Ok(text.to_owned());
    }
    let path = fs::canonicalize(text).map_err(|error| {
        let outcome = match error.kind() {
            io::ErrorKind::NotFound => Outcome::NotFound,
            io::ErrorKind::PermissionDenied => Outcome::Denied,
            _ => Outcome::Failed,
        };
        Failure::new(
            outcome,
            format!("load {text}: {error}"),
            "give the path of a bundle directory, the one with plugin.json",
        )
    })?;
    path.into_os_string().into_string().map_err(|path| {
        Failure::new(Outcome::Usage, format!("load {}: the path is not UTF-8", path.display()), "rename the directory")
    })
}

/// Prints what the plugin is now; a failure when that is not what was asked for.
fn report(output: &Output, done: &str, wanted: PluginState, plugin: PluginStatus) -> Result<(), Failure> {
    let reached = plugin.state() == wanted;
    match output.format {
        Format::Json | Format::Jsonl => output.json(&output.to_json("plugvisor.admin.v1.PluginStatus", &plugin)?)?,
        Format::Name => output.line(&Line::new(&plugin.name))?,
        Format::Table | Format::Wide if reached => {
            let process = match plugin.pid {
                0 => String::new(),
                pid => format!(" (pid {pid}, generation {})", plugin.generation),
            };
            output.line(&Line::new(format!("{done} {} {}{process}", plugin.name, plugin.version)))?;
        }
        Format::Table | Format::Wide => {}
    }
    if reached {
        return Ok(());
    }
    let state = status::state(&plugin).render(false);
    let why = if plugin.last_error.is_empty() { String::new() } else { format!(": {}", plugin.last_error) };
    let hint = if plugin.hint.is_empty() { format!("see `plugvisor describe {}`", plugin.name) } else { plugin.hint };
    Err(Failure::new(Outcome::Failed, format!("{} is {state}, not {done}{why}", plugin.name), hint))
}
