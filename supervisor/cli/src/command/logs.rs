//! `plugvisor logs`: what plugins printed, line by line.

use plugvisor_proto::admin::v1::admin_client::AdminClient;
use plugvisor_proto::admin::v1::{LogStream, ReadLogsRequest, ReadLogsResponse};
use tonic::transport::Channel;

use crate::admin::Admin;
use crate::args::{Format, LogFilter, Stream};
use crate::command::follow::{Follower, report_missed};
use crate::failure::Failure;
use crate::output::Output;
use crate::quantity::moment;
use crate::text::{Line, Style};

/// Prints lines until the stream ends or the user interrupts.
pub(crate) async fn logs(
    admin: &Admin,
    output: &Output,
    plugin: Option<&str>,
    tail: u32,
    follow: bool,
    filter: LogFilter,
) -> Result<(), Failure> {
    let LogFilter { since, until, stream, grep, generation } = filter;
    let stream = match stream {
        None => LogStream::Unspecified,
        Some(Stream::Stdout) => LogStream::Stdout,
        Some(Stream::Stderr) => LogStream::Stderr,
    };
    let question = ReadLogsRequest {
        plugin: plugin.unwrap_or_default().to_owned(),
        follow,
        tail,
        since,
        until,
        stream: stream.into(),
        pattern: grep.unwrap_or_default(),
        generation: generation.unwrap_or(0),
    };
    let call = |mut client: AdminClient<Channel>, question| async move { client.read_logs(question).await };
    let mut follower = Follower::start(admin, output, "logs", follow, question, call).await?;
    while let Some(entry) = follower.next().await? {
        report_missed(entry.missed, "log lines");
        match output.format {
            Format::Table | Format::Wide => {
                output.line(&line(&entry, plugin.is_none() || output.format == Format::Wide))?;
            }
            Format::Json | Format::Jsonl => {
                follower.json(output.to_json("plugvisor.admin.v1.ReadLogsResponse", &entry)?)?;
            }
            Format::Name => output.line(&Line::new(&entry.line))?,
        }
    }
    follower.end()
}

fn line(entry: &ReadLogsResponse, with_plugin: bool) -> Line {
    let (style, stream) = match entry.stream() {
        LogStream::Stdout => (Style::Plain, "out"),
        LogStream::Stderr => (Style::Warning, "err"),
        LogStream::Unspecified => (Style::Plain, "-"),
    };
    let mut line = Line::default().add(Style::Faint, format!("{} ", moment(entry.at)));
    if with_plugin {
        line = line.add(Style::Title, format!("{}/{} ", entry.plugin, entry.generation));
    }
    line = line.add(style, stream).add(Style::Plain, format!(" {}", entry.line));
    if entry.continues { line.add(Style::Warning, " [the line goes on]") } else { line }
}
