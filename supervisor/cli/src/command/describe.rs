//! `plugvisor describe NAME`: everything about one plugin.

use std::time::SystemTime;

use plugvisor_proto::admin::v1::{DescribePluginRequest, DescribePluginResponse, LastExit, PluginStatus};

use crate::admin::{Admin, QUESTION};
use crate::args::Format;
use crate::command::status;
use crate::failure::Failure;
use crate::output::Output;
use crate::quantity::{age, bytes, moment, span};
use crate::text::{Line, Style, Table};

/// Prints the plugin.
pub(crate) async fn describe(admin: &Admin, output: &Output, name: &str) -> Result<(), Failure> {
    let question = DescribePluginRequest { name: name.to_owned() };
    let answer = admin
        .ask(&format!("describe {name}"), QUESTION, question, |mut client, question| async move {
            client.describe_plugin(question).await
        })
        .await?;
    match output.format {
        Format::Table | Format::Wide => print(output, &answer),
        Format::Json | Format::Jsonl => {
            output.json(&output.to_json("plugvisor.admin.v1.DescribePluginResponse", &answer)?)
        }
        Format::Name => output.line(&Line::new(answer.status.map(|status| status.name).unwrap_or_default())),
    }
}

fn print(output: &Output, answer: &DescribePluginResponse) -> Result<(), Failure> {
    let now = SystemTime::now();
    let plugin = answer.status.clone().unwrap_or_default();
    output.lines(&facts(answer, &plugin, now))?;
    if !plugin.last_error.is_empty() {
        output.title("Trouble")?;
        let lines = status::trouble(&plugin);
        // Its last line names this very command.
        output.lines(&lines[..lines.len() - 1])?;
    }
    if !answer.controls.is_empty() {
        output.title("Walls, as the kernel says")?;
        let mut table = Table::new(&["  CONTROL", "ASKED", "ENFORCED", "READ FROM"]);
        for control in &answer.controls {
            let enforced = if control.enforced.is_empty() {
                Line::default().add(Style::Warning, "no")
            } else {
                Line::default().add(Style::Good, &control.enforced)
            };
            table.row(vec![
                Line::new(format!("  {}", control.name)),
                Line::new(&control.requested),
                enforced,
                Line::default().add(Style::Faint, &control.read_from),
            ]);
        }
        output.lines(&table.lines())?;
        for control in answer.controls.iter().filter(|control| !control.unavailable.is_empty()) {
            output.line(
                &Line::new("  ")
                    .add(Style::Warning, format!("not enforced: {}", control.name))
                    .add(Style::Plain, format!(": {}", control.unavailable)),
            )?;
        }
    }
    if !answer.capabilities.is_empty() {
        output.title("Capabilities")?;
        let mut table = Table::new(&[]);
        for capability in &answer.capabilities {
            let granted = if capability.granted { (Style::Good, "granted") } else { (Style::Warning, "not granted") };
            table.row(vec![
                Line::new(format!("  {}", capability.name)),
                Line::default().add(granted.0, granted.1),
                Line::new(&capability.reason),
            ]);
        }
        output.lines(&table.lines()[1..])?;
    }
    if !answer.services.is_empty() {
        output.title("Services")?;
        let mut table = Table::new(&[]);
        for service in &answer.services {
            let token = if service.token.is_empty() { String::new() } else { format!("token {}", service.token) };
            table.row(vec![
                Line::new(format!("  {}", service.name)),
                Line::new(if service.exported { "exported" } else { "internal" }),
                Line::new(token),
            ]);
        }
        output.lines(&table.lines()[1..])?;
    }
    if !answer.inactive_fields.is_empty() {
        output.title("Inactive manifest fields (accepted, without effect in this version)")?;
        output
            .lines(&answer.inactive_fields.iter().map(|field| Line::new(format!("  {field}"))).collect::<Vec<_>>())?;
    }
    if !answer.transitions.is_empty() {
        output.title("History")?;
        let mut table = Table::new(&[]);
        for transition in &answer.transitions {
            table.row(vec![
                Line::default().add(Style::Faint, format!("  {}", moment(transition.at))),
                Line::new(format!("{} -> {}", transition.from, transition.to)),
                Line::new(&transition.cause),
            ]);
        }
        output.lines(&table.lines()[1..])?;
    }
    if !answer.stderr_tail.is_empty() {
        output.title("Last lines on stderr")?;
        output.lines(
            &answer.stderr_tail.iter().map(|line| Line::new("  ").add(Style::Plain, line)).collect::<Vec<_>>(),
        )?;
    }
    output.line(&Line::default())?;
    output.line(&Line::default().add(
        Style::Faint,
        format!("more: `plugvisor logs {name}`, `plugvisor events --plugin {name}`", name = plugin.name),
    ))
}

fn facts(answer: &DescribePluginResponse, plugin: &PluginStatus, now: SystemTime) -> Vec<Line> {
    let mut table = Table::new(&[]);
    let mut fact = |name: &str, value: Line| {
        table.row(vec![Line::default().add(Style::Title, name), value]);
    };
    fact("Name", Line::new(format!("{} {}", plugin.name, plugin.version).trim_end()));
    let since = age(plugin.since, now);
    fact(
        "State",
        status::state(plugin).add(Style::Plain, if since == "-" { String::new() } else { format!(" for {since}") }),
    );
    if plugin.critical {
        fact("Critical", Line::new("yes: the host is not ready while it does not serve"));
    }
    fact("Bundle", Line::new(&answer.bundle_directory));
    fact("Digest", Line::new(if answer.content_digest.is_empty() { "-" } else { &answer.content_digest }));
    let because = |what: &str, why: &str| {
        if why.is_empty() { Line::new(what) } else { Line::new(format!("{what}: {why}")) }
    };
    fact("Tier", because(&plugin.tier, &answer.tier_reason));
    fact("Isolation", because(&plugin.isolation_level, &answer.isolation_reason));
    fact(
        "Process",
        Line::new(match plugin.pid {
            0 => "none".to_owned(),
            pid => format!("pid {pid}, generation {}, memory {}", plugin.generation, bytes(plugin.memory_bytes)),
        }),
    );
    if !answer.sdk.is_empty() {
        fact("SDK", Line::new(&answer.sdk));
    }
    fact("Breaker", status::breaker(&plugin.breaker));
    let calls = format!("{}, {} failed, since the supervisor started", plugin.calls_total, plugin.calls_failed_total);
    fact("Calls", Line::new(calls));
    fact("Restarts", Line::new(format!("{} after failures, in all of its life", plugin.restarts)));
    if let Some(exit) = &answer.last_exit {
        fact("Last exit", Line::new(last_exit(exit, now)));
    }
    table.lines().split_off(1)
}

/// Such as "SIGKILL (out of memory) after 3.2 s, 4m ago".
fn last_exit(exit: &LastExit, now: SystemTime) -> String {
    let mut text = match (exit.code, exit.signal.as_str()) {
        (_, signal) if !signal.is_empty() => signal.to_owned(),
        (Some(code), _) => format!("code {code}"),
        (None, _) => "unknown".to_owned(),
    };
    if exit.oom {
        text.push_str(" (out of memory)");
    }
    if let Some(uptime) = exit.uptime {
        text.push_str(&format!(" after {}", span(uptime)));
    }
    if exit.at.is_some() {
        text.push_str(&format!(", {} ago", age(exit.at, now)));
    }
    text
}
