//! `plugvisor explain call`: what would become of a call, step by step, without making it.

use plugvisor_proto::admin::v1::{CallStep, ExplainCallRequest, ExplainCallResponse, StepOutcome};

use crate::admin::{Admin, QUESTION};
use crate::args::{ExplainCallArgs, Format};
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::{Line, Style, Table};

/// Prints the steps; [`Outcome::Failed`] when the call would be refused.
pub(crate) async fn call(admin: &Admin, output: &Output, arguments: &ExplainCallArgs) -> Result<(), Failure> {
    let ExplainCallArgs { from, method, token } = arguments;
    let (service, name) = method.trim_start_matches('/').split_once('/').unwrap_or((method, ""));
    let question = ExplainCallRequest {
        from: from.clone(),
        service: service.to_owned(),
        method: name.to_owned(),
        token: token.clone().unwrap_or_default(),
    };
    let answer =
        admin
            .ask("explain call", QUESTION, question, |mut client, question| async move {
                client.explain_call(question).await
            })
            .await?;
    match output.format {
        Format::Table | Format::Wide => print(output, from, method, &answer)?,
        Format::Json | Format::Jsonl => {
            output.json(&output.to_json("plugvisor.admin.v1.ExplainCallResponse", &answer)?)?;
        }
        Format::Name => output.line(&Line::new(&answer.provider))?,
    }
    if answer.allowed { Ok(()) } else { Err(Failure::silent(Outcome::Failed)) }
}

fn print(output: &Output, from: &str, method: &str, answer: &ExplainCallResponse) -> Result<(), Failure> {
    let mut table = Table::new(&[]);
    for step in &answer.steps {
        let CallStep { name, outcome: _, detail } = step;
        let (style, mark) = match step.outcome() {
            StepOutcome::Passes => (Style::Good, "passes"),
            StepOutcome::Refuses => (Style::Bad, "REFUSES"),
            StepOutcome::Skipped => (Style::Faint, "not concerned"),
            StepOutcome::NotReached => (Style::Faint, "not reached"),
            StepOutcome::Inactive => (Style::Faint, "inactive"),
            StepOutcome::Unspecified => (Style::Plain, "-"),
        };
        table.row(vec![Line::new(name), Line::default().add(style, mark), Line::new(detail)]);
    }
    output.lines(&table.lines()[1..])?;
    output.line(&Line::default())?;
    if answer.allowed {
        let to = if answer.provider == "host" { "the supervisor" } else { &answer.provider };
        return output.line(
            &Line::default()
                .add(Style::Good, "allowed")
                .add(Style::Plain, format!(": a call from {from} to {method} goes to {to}")),
        );
    }
    output.line(
        &Line::default()
            .add(Style::Bad, format!("refused, {}", answer.reason))
            .add(Style::Plain, format!(": {}", answer.message)),
    )?;
    output.line(&Line::default().add(Style::Title, "next: ").add(Style::Plain, &answer.hint))
}
