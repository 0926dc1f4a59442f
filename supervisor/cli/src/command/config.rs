//! `plugvisor config validate` and `show`.

use std::path::Path;

use plugvisor_proto::admin::v1::{
    ConfigurationCheck, ConfigurationProblem, Setting, ShowConfigurationRequest, ShowConfigurationResponse,
};

use crate::admin::{Admin, QUESTION};
use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::inspect;
use crate::output::Output;
use crate::text::{Line, Style, Table};

/// Checks a file, or the default one, without a supervisor; every problem is listed.
pub(crate) fn validate(output: &Output, file: Option<&Path>) -> Result<(), Failure> {
    let check = check(file)?;
    match output.format {
        Format::Json | Format::Jsonl => {
            output.json(&output.to_json("plugvisor.admin.v1.ConfigurationCheck", &check)?)?;
        }
        Format::Table | Format::Wide | Format::Name if check.problems.is_empty() => {
            let what = if check.file.is_empty() { "no file: the defaults hold" } else { &check.file };
            output.line(&Line::default().add(Style::Good, "valid").add(Style::Plain, format!(": {what}")))?;
            check.warnings.iter().try_for_each(|warning| output.line(&line(warning)))?;
        }
        Format::Table | Format::Wide | Format::Name => {
            for problem in &check.problems {
                output.line(&line(problem))?;
            }
        }
    }
    if check.problems.is_empty() { Ok(()) } else { Err(invalid(&check)) }
}

/// What the running supervisor goes by.
pub(crate) async fn ask(admin: &Admin) -> Result<ShowConfigurationResponse, Failure> {
    admin
        .ask("config show", QUESTION, ShowConfigurationRequest {}, |mut client, question| async move {
            client.show_configuration(question).await
        })
        .await
}

/// What a supervisor would go by that was started with this file.
pub(crate) fn would_hold(file: Option<&Path>) -> Result<ShowConfigurationResponse, Failure> {
    let check = check(file)?;
    check.configuration.clone().ok_or_else(|| {
        let lines: Vec<String> = check.problems.iter().map(|problem| line(problem).render(false)).collect();
        let Failure { outcome, message, hint } = invalid(&check);
        Failure { outcome, message: format!("{message}\n{}", lines.join("\n")), hint }
    })
}

/// Prints settings, as TOML keys or with their origins.
pub(crate) fn show(output: &Output, answer: &ShowConfigurationResponse, origin: bool) -> Result<(), Failure> {
    match output.format {
        Format::Json => return output.json(&output.to_json("plugvisor.admin.v1.ShowConfigurationResponse", answer)?),
        Format::Jsonl => {
            return answer
                .settings
                .iter()
                .try_for_each(|setting| output.json(&output.to_json("plugvisor.admin.v1.Setting", setting)?));
        }
        Format::Name => return answer.settings.iter().try_for_each(|setting| output.line(&Line::new(&setting.key))),
        Format::Table | Format::Wide => {}
    }
    let mut table = Table::new(&if origin { vec!["SETTING", "VALUE", "ORIGIN"] } else { vec!["SETTING", "VALUE"] });
    for Setting { key, value, origin: from } in &answer.settings {
        let mut cells = vec![Line::new(key), Line::new(value)];
        if origin {
            let style = if from == "default" { Style::Faint } else { Style::Plain };
            cells.push(Line::default().add(style, from));
        }
        table.row(cells);
    }
    output.lines(&table.lines())
}

fn check(file: Option<&Path>) -> Result<ConfigurationCheck, Failure> {
    inspect::ask("check-config", &[("--config", file)])
}

fn invalid(check: &ConfigurationCheck) -> Failure {
    let count = check.problems.len();
    let plural = if count == 1 { "" } else { "s" };
    Failure::new(
        Outcome::InvalidConfiguration,
        format!("the configuration {} has {count} problem{plural}", check.file),
        "correct the file; a supervisor that runs goes on with what it read at its start",
    )
}

fn line(problem: &ConfigurationProblem) -> Line {
    let ConfigurationProblem { line, key, message, suggestion } = problem;
    let at = if *line == 0 { String::new() } else { format!("line {line}: ") };
    let key = if key.is_empty() { String::new() } else { format!("{key}: ") };
    let meant = if suggestion.is_empty() { String::new() } else { format!("; did you mean {suggestion:?}?") };
    Line::default().add(Style::Faint, at).add(Style::Title, key).add(Style::Plain, format!("{message}{meant}"))
}
