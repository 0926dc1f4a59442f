//! Reading a stream of the supervisor's, to its end or for ever.

use std::future::Future;
use std::time::Duration;

use plugvisor_proto::admin::v1::admin_client::AdminClient;
use serde_json::Value;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, Streaming};

use crate::admin::{Admin, QUESTION};
use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::clean;

/// A stream that is being read.
pub(crate) struct Follower<'a, M> {
    admin: &'a Admin,
    output: &'a Output,
    what: &'static str,
    stream: Streaming<M>,
    /// The longest wait for one message; `None` while following.
    limit: Option<Duration>,
    /// What `-o json` prints at the end as one document.
    collected: Vec<Value>,
}

impl<'a, M> Follower<'a, M> {
    /// Opens the stream.
    pub(crate) async fn start<Q, F>(
        admin: &'a Admin,
        output: &'a Output,
        what: &'static str,
        follow: bool,
        question: Q,
        call: impl FnOnce(AdminClient<Channel>, Request<Q>) -> F,
    ) -> Result<Self, Failure>
    where
        F: Future<Output = Result<Response<Streaming<M>>, Status>>,
    {
        if follow && output.format == Format::Json {
            return Err(Failure::new(
                Outcome::Usage,
                format!("`{what} --follow` never ends, so it cannot be one JSON document"),
                "use -o jsonl, one document per line",
            ));
        }
        let limit = admin.timeout.unwrap_or(QUESTION);
        let opened = tokio::time::timeout(limit, call(admin.client.clone(), Request::new(question))).await;
        let stream = match opened {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => return Err(admin.refused(what, &status)),
            Err(_) => return Err(Failure::timeout(what)),
        };
        Ok(Self { admin, output, what, stream, limit: (!follow).then_some(limit), collected: Vec::new() })
    }

    /// The next message; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<M>, Failure> {
        let message = match self.limit {
            None => self.stream.message().await,
            Some(limit) => {
                tokio::time::timeout(limit, self.stream.message()).await.map_err(|_| Failure::timeout(self.what))?
            }
        };
        message.map_err(|status| self.admin.refused(self.what, &status))
    }

    /// Takes one member of the stream for `-o json` or `-o jsonl`.
    pub(crate) fn json(&mut self, value: Value) -> Result<(), Failure> {
        if self.output.format == Format::Jsonl {
            return self.output.json(&value);
        }
        self.collected.push(value);
        Ok(())
    }

    /// Prints what was collected.
    pub(crate) fn end(self) -> Result<(), Failure> {
        if self.output.format == Format::Json { self.output.json(&Value::Array(self.collected)) } else { Ok(()) }
    }
}

/// Says on standard error, away from the data, that there is a gap.
pub(crate) fn report_missed(missed: u64, what: &str) {
    if missed > 0 {
        eprintln!(
            "{}",
            clean(&format!(
                "warning: {missed} {what} are missing here: this reader was too slow, or they are no longer kept"
            ))
        );
    }
}
