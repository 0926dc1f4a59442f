//! `plugvisor status`: the truth about everything in one screen, and the next command.

use std::time::{Duration, SystemTime};

use plugvisor_proto::admin::v1::{GetStatusRequest, GetStatusResponse, PluginState, PluginStatus, SupervisorStatus};

use crate::admin::{Admin, QUESTION};
use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::quantity::{age, bytes, span};
use crate::text::{Line, Style, Table};

/// Prints the status; [`Outcome::Degraded`] when something does not work as it should.
pub(crate) async fn status(admin: &Admin, output: &Output) -> Result<(), Failure> {
    let answer = admin
        .ask("status", QUESTION, GetStatusRequest {}, |mut client, question| async move {
            client.get_status(question).await
        })
        .await?;
    match output.format {
        Format::Table | Format::Wide => print(output, &answer)?,
        Format::Json => output.json(&output.to_json("plugvisor.admin.v1.GetStatusResponse", &answer)?)?,
        Format::Jsonl => {
            for plugin in &answer.plugins {
                output.json(&output.to_json("plugvisor.admin.v1.PluginStatus", plugin)?)?;
            }
        }
        Format::Name => answer.plugins.iter().try_for_each(|plugin| output.line(&Line::new(&plugin.name)))?,
    }
    let ready = answer.supervisor.as_ref().is_some_and(|supervisor| supervisor.ready);
    if ready && answer.plugins.iter().all(is_well) { Ok(()) } else { Err(Failure::silent(Outcome::Degraded)) }
}

fn print(output: &Output, answer: &GetStatusResponse) -> Result<(), Failure> {
    let now = SystemTime::now();
    let wide = output.format == Format::Wide;
    if let Some(supervisor) = &answer.supervisor {
        output.lines(&supervisor_lines(supervisor, wide, now))?;
    }
    output.line(&Line::default())?;
    if answer.plugins.is_empty() {
        let file = answer.supervisor.as_ref().map_or("", |supervisor| supervisor.configuration_file.as_str());
        let why = match file {
            "" => "no configuration file was read, so that no directory of plugins is known. `plugvisor run --config FILE` \
                   reads one; each [[directory]] in it has a path"
                .to_owned(),
            file => format!(
                "no [[directory]] of {file} has a subdirectory with a plugin.json, or there is none. `plugvisor doctor` shows \
                 each; put a bundle there and `plugvisor load` it"
            ),
        };
        return output.line(&Line::new(format!("No plugins: {why}.")));
    }
    let mut titles =
        vec!["NAME", "VERSION", "STATE", "SINCE", "PID", "RESTARTS", "BREAKER", "CALLS", "FAILED", "MEMORY"];
    if wide {
        titles.extend(["GENERATION", "LEVEL", "TIER"]);
    }
    let mut table = Table::new(&titles);
    for plugin in &answer.plugins {
        let mut cells = vec![
            Line::new(&plugin.name),
            // No manifest that can be read, no version.
            Line::new(if plugin.version.is_empty() { "-" } else { &plugin.version }),
            state(plugin),
            Line::new(age(plugin.since, now)),
            Line::new(if plugin.pid == 0 { "-".to_owned() } else { plugin.pid.to_string() }),
            Line::new(plugin.restarts.to_string()),
            breaker(&plugin.breaker),
            Line::new(plugin.calls_total.to_string()),
            Line::new(plugin.calls_failed_total.to_string()),
            Line::new(bytes(plugin.memory_bytes)),
        ];
        if wide {
            cells.push(Line::new(plugin.generation.to_string()));
            cells.push(Line::new(&plugin.isolation_level));
            cells.push(Line::new(&plugin.tier));
        }
        table.row(cells);
    }
    output.lines(&table.lines())?;
    for plugin in answer.plugins.iter().filter(|plugin| !plugin.last_error.is_empty()) {
        output.line(&Line::default())?;
        output.lines(&trouble(plugin))?;
    }
    Ok(())
}

fn supervisor_lines(supervisor: &SupervisorStatus, wide: bool, now: SystemTime) -> Vec<Line> {
    let ready = if supervisor.ready { (Style::Good, "ready") } else { (Style::Bad, "not ready") };
    let mut lines = vec![
        Line::new(format!("plugvisord {}, ", supervisor.version))
            .add(ready.0, ready.1)
            .add(Style::Plain, format!(", up {}", age(supervisor.started_at, now))),
        Line::new(format!(
            "pid {} ({}), launcher pid {} ({})",
            supervisor.pid,
            bytes(supervisor.resident_bytes),
            supervisor.launcher_pid,
            bytes(supervisor.launcher_resident_bytes)
        )),
    ];
    if let Some(took) = supervisor.reattached_in {
        let took = Duration::try_from(took).unwrap_or_default();
        let plugins = supervisor.reattached_plugins;
        lines.push(Line::new(format!("took over {plugins} running plugins in {} ms at its start", took.as_millis())));
    }
    if !supervisor.metrics_address.is_empty() {
        lines.push(Line::new(format!("metrics http://{}/metrics", supervisor.metrics_address)));
    }
    for reason in &supervisor.not_ready {
        lines.push(Line::default().add(Style::Bad, "not ready: ").add(Style::Plain, reason));
    }
    if !supervisor.state_trouble.is_empty() {
        let what = format!("state in {}: ", supervisor.state_directory);
        lines.push(Line::default().add(Style::Bad, what).add(Style::Plain, &supervisor.state_trouble));
    }
    if !supervisor.degraded.is_empty() {
        lines.push(
            Line::default()
                .add(Style::Warning, "not enforced on this host, as you allowed: ")
                .add(Style::Plain, format!("{} (`plugvisor status -o wide` says why)", supervisor.degraded.join(", "))),
        );
    }
    if wide {
        lines.push(Line::new(format!("calls {}", supervisor.calls_socket)));
        let file = &supervisor.configuration_file;
        lines.push(Line::new(format!("configuration {}", if file.is_empty() { "none, defaults" } else { file })));
        for feature in &supervisor.features {
            let mark = if feature.works { (Style::Good, "works ") } else { (Style::Warning, "lacks ") };
            lines.push(
                Line::new("  ").add(mark.0, mark.1).add(Style::Plain, format!("{}: {}", feature.name, feature.detail)),
            );
        }
    }
    lines
}

/// The state's name, with its phase or conditions.
pub(crate) fn state(plugin: &PluginStatus) -> Line {
    let state = plugin.state();
    let style = match state {
        PluginState::Loaded if is_well(plugin) => Style::Good,
        PluginState::Loaded | PluginState::Loading => Style::Warning,
        PluginState::Failed | PluginState::Quarantined => Style::Bad,
        PluginState::Unspecified | PluginState::Unknown | PluginState::Discovered | PluginState::Unloaded => {
            Style::Plain
        }
    };
    let name = state.as_str_name();
    let mut text = name.strip_prefix("PLUGIN_STATE_").unwrap_or(name).to_owned();
    let details: Vec<&str> = match state {
        PluginState::Loading if !plugin.phase.is_empty() => vec![&plugin.phase],
        PluginState::Failed if plugin.crash_loop => vec!["crash loop"],
        // Serving is what LOADED means to everyone; only what deviates is worth the room.
        PluginState::Loaded => plugin.conditions.iter().map(String::as_str).filter(|c| *c != "serving").collect(),
        _ => vec![],
    };
    if !details.is_empty() {
        text.push_str(&format!(" ({})", details.join(", ")));
    }
    Line::default().add(style, text)
}

/// The breaker's state; nothing but closed is normal.
pub(crate) fn breaker(state: &str) -> Line {
    let style = match state {
        "" | "closed" => Style::Plain,
        "open" => Style::Bad,
        _ => Style::Warning,
    };
    Line::default().add(style, if state.is_empty() { "-" } else { state })
}

/// What last went wrong, what happens now, and the next command.
pub(crate) fn trouble(plugin: &PluginStatus) -> Vec<Line> {
    // A list of problems has a line for each. They stand deeper than our own lines, so that none can pass for one.
    let mut error = plugin.last_error.lines();
    let first = error.next().unwrap_or_default();
    let mut line = Line::default().add(Style::Bad, &plugin.name).add(Style::Plain, format!(": {first}"));
    if let Some(time) = plugin.restart_in {
        // The one that is scheduled is counted when it is made.
        line = line.add(Style::Plain, format!(", restart {} in {}", plugin.restarts.saturating_add(1), span(time)));
    }
    if plugin.calls_failed_total > 0 {
        let calls = if plugin.calls_failed_total == 1 { "call" } else { "calls" };
        line = line.add(Style::Plain, format!(", {} {calls} failed", plugin.calls_failed_total));
    }
    let mut lines = vec![line];
    lines.extend(error.map(|problem| Line::new(format!("    {}", problem.trim_start()))));
    if !plugin.hint.is_empty() {
        lines.push(Line::new(format!("  {}", plugin.hint)));
    }
    lines.push(Line::new(format!("  see `plugvisor describe {}`", plugin.name)));
    lines
}

/// Loaded without a deviating condition, or not wanted.
fn is_well(plugin: &PluginStatus) -> bool {
    match plugin.state() {
        PluginState::Loaded => !plugin.conditions.iter().any(|condition| condition == "degraded"),
        PluginState::Discovered | PluginState::Loading | PluginState::Unloaded => true,
        PluginState::Unspecified | PluginState::Unknown | PluginState::Failed | PluginState::Quarantined => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_problem_of_a_list_has_a_line_and_none_passes_for_ours() {
        let plugin = PluginStatus {
            name: "a".into(),
            last_error: "2 problems in the manifest\n  versoin: not known\nb: forged\x1b[0m".into(),
            hint: "correct the manifest".into(),
            ..PluginStatus::default()
        };
        let lines: Vec<String> = trouble(&plugin).iter().map(|line| line.render(false)).collect();
        assert_eq!(
            lines,
            [
                "a: 2 problems in the manifest",
                "    versoin: not known",
                "    b: forged\\x1b[0m",
                "  correct the manifest",
                "  see `plugvisor describe a`",
            ]
        );
    }
}
