//! `ReadLogs`: what is kept of plugins' lines, and then, for whoever follows, what comes.

use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

use plugvisor_core::{Code, Error};
use plugvisor_package::PluginName;
use plugvisor_proto::admin::v1::{LogStream as WireStream, ReadLogsRequest, ReadLogsResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{
    convert,
    error::status,
    service::{AdminService, bounded},
};
use crate::{
    journal::{Batch, Journal},
    logs::{Filter, LogLine, LogStream},
};

impl AdminService {
    pub(super) fn log_lines(
        &self,
        request: ReadLogsRequest,
    ) -> Result<ReceiverStream<Result<ReadLogsResponse, Status>>, Status> {
        let ReadLogsRequest { plugin, follow, tail, since, until, stream, pattern, generation } = request;
        bounded(&plugin)?;
        let only = if plugin.is_empty() {
            None
        } else {
            let handle = self.state.fleet.find(&plugin).map_err(|error| status(&error))?;
            let name = handle.view.borrow().name.parse::<PluginName>();
            Some(name.map_err(|error| {
                status(&Error::new(Code::RequestInvalid, error.to_string(), "a rejected bundle has no log"))
            })?)
        };
        let filter = Filter {
            since: since.map(time).transpose()?,
            until: until.map(time).transpose()?,
            stream: stream_of(stream),
            generation: (generation != 0).then_some(generation),
            pattern: if pattern.is_empty() { None } else { Some(Filter::pattern(&pattern).map_err(|e| status(&e))?) },
        };
        let logs = Arc::clone(&self.state.shared.logs);
        let (sender, receiver) = mpsc::channel(1);
        let stopped = self.state.stopped.clone();
        tokio::spawn(stopped.run_until_cancelled_owned(async move {
            let count = if tail == 0 { usize::MAX } else { usize::try_from(tail).unwrap_or(usize::MAX) };
            let mut changed = logs.changed();
            let mut places: BTreeMap<PluginName, (Arc<Journal<LogLine>>, u64)> = BTreeMap::new();
            let mut first = true;
            loop {
                changed.mark_unchanged();
                for name in only.clone().map_or_else(|| logs.plugins(), |name| vec![name]) {
                    let journal = logs.journal(&name);
                    places.entry(name).or_insert((journal, 0));
                }
                let mut lines: Vec<(u64, Arc<LogLine>)> = Vec::new();
                for (journal, after) in places.values_mut() {
                    let Batch { missed, entries } = journal.read(*after, usize::MAX);
                    // What fell out before this reader began is not missed by it.
                    let mut missed = if *after == 0 { 0 } else { missed };
                    for (number, line) in entries {
                        *after = number;
                        if filter.admits(&line) {
                            lines.push((std::mem::take(&mut missed), line));
                        }
                    }
                }
                lines.sort_by_key(|(_, line)| line.at);
                if std::mem::take(&mut first) {
                    // The tail is of all plugins together.
                    lines.drain(..lines.len().saturating_sub(count));
                }
                for (missed, line) in lines {
                    if sender.send(Ok(convert::log_line(&line, missed))).await.is_err() {
                        return;
                    }
                }
                if !follow || filter.is_over(SystemTime::now()) {
                    return;
                }
                tokio::select! {
                    changed = changed.changed() => if changed.is_err() { return },
                    () = sender.closed() => return,
                }
            }
        }));
        Ok(ReceiverStream::new(receiver))
    }
}

fn time(at: prost_types::Timestamp) -> Result<SystemTime, Status> {
    SystemTime::try_from(at).map_err(|error| {
        status(&Error::new(Code::RequestInvalid, format!("a time cannot be read: {error}"), "name a later time"))
    })
}

fn stream_of(stream: i32) -> Option<LogStream> {
    match WireStream::try_from(stream) {
        Ok(WireStream::Stdout) => Some(LogStream::Stdout),
        Ok(WireStream::Stderr) => Some(LogStream::Stderr),
        Ok(WireStream::Unspecified) | Err(_) => None,
    }
}
