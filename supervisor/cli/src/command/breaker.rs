//! `plugvisor breaker list` and `reset`.

use plugvisor_proto::admin::v1::{BreakerStatus, ListBreakersRequest, ResetBreakersRequest};

use crate::admin::{Admin, QUESTION};
use crate::args::Format;
use crate::command::status;
use crate::failure::Failure;
use crate::output::Output;
use crate::quantity::span;
use crate::text::{Line, Table};

/// Prints every breaker.
pub(crate) async fn list(admin: &Admin, output: &Output) -> Result<(), Failure> {
    let answer = admin
        .ask("breaker list", QUESTION, ListBreakersRequest {}, |mut client, question| async move {
            client.list_breakers(question).await
        })
        .await?;
    match output.format {
        Format::Table | Format::Wide if answer.breakers.is_empty() => {
            output.line(&Line::new("No breakers: no plugin is loaded."))
        }
        Format::Table | Format::Wide => print(output, &answer.breakers),
        Format::Json => output.json(&output.to_json("plugvisor.admin.v1.ListBreakersResponse", &answer)?),
        Format::Jsonl => answer
            .breakers
            .iter()
            .try_for_each(|breaker| output.json(&output.to_json("plugvisor.admin.v1.BreakerStatus", breaker)?)),
        Format::Name => answer.breakers.iter().try_for_each(|breaker| output.line(&Line::new(&breaker.plugin))),
    }
}

/// Closes one breaker, or every one, and says which were not closed before.
pub(crate) async fn reset(admin: &Admin, output: &Output, plugin: Option<&str>) -> Result<(), Failure> {
    let question = ResetBreakersRequest { plugin: plugin.unwrap_or_default().to_owned() };
    let answer = admin
        .ask("breaker reset", QUESTION, question, |mut client, question| async move {
            client.reset_breakers(question).await
        })
        .await?;
    if let Format::Json | Format::Jsonl = output.format {
        return output.json(&output.to_json("plugvisor.admin.v1.ResetBreakersResponse", &answer)?);
    }
    let opened: Vec<&BreakerStatus> = answer.before.iter().filter(|breaker| breaker.state != "closed").collect();
    if output.format == Format::Name {
        return opened.iter().try_for_each(|breaker| output.line(&Line::new(&breaker.plugin)));
    }
    if opened.is_empty() {
        return output.line(&Line::new(match plugin {
            Some(plugin) => format!("the breaker of {plugin} was closed already; its counts begin anew"),
            None => "every breaker was closed already; their counts begin anew".to_owned(),
        }));
    }
    opened.iter().try_for_each(|breaker| {
        output.line(&Line::new(format!("closed the breaker of {}, which was {}", breaker.plugin, breaker.state)))
    })
}

fn print(output: &Output, breakers: &[BreakerStatus]) -> Result<(), Failure> {
    let mut table = Table::new(&["PLUGIN", "STATE", "RETRY IN", "IN A ROW", "CALLS", "FAILED", "SLOW", "IN FLIGHT"]);
    for breaker in breakers {
        table.row(vec![
            Line::new(&breaker.plugin),
            status::breaker(&breaker.state),
            Line::new(breaker.retry_after.map_or_else(|| "-".to_owned(), span)),
            Line::new(breaker.consecutive_failures.to_string()),
            Line::new(breaker.calls.to_string()),
            Line::new(breaker.failed.to_string()),
            Line::new(breaker.slow.to_string()),
            Line::new(breaker.in_flight.to_string()),
        ]);
    }
    output.lines(&table.lines())
}
