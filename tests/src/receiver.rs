//! A receiver of traces: OTLP over gRPC on a loopback port, with the service and the messages of OpenTelemetry's own
//! crate. It keeps every span that it is sent.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::Context;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::watch,
    task::AbortHandle,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::events::patience;

/// A place for a receiver at which there is none: connections are refused for as long as this lives, because the port is
/// taken and nobody listens there. A port that was given back could be another test's the next moment.
#[derive(Debug)]
pub struct Nobody(TcpSocket);

impl Nobody {
    /// Takes a free port.
    ///
    /// # Errors
    /// When there is none.
    pub fn at_a_port() -> anyhow::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind("127.0.0.1:0".parse()?).context("cannot take a port of the loopback")?;
        Ok(Self(socket))
    }

    /// What `[traces] endpoint` must say.
    ///
    /// # Errors
    /// When the system does not tell the port.
    pub fn endpoint(&self) -> anyhow::Result<String> {
        Ok(format!("http://{}", self.0.local_addr()?))
    }
}

/// Receives until it is dropped.
#[derive(Debug)]
pub struct Receiver {
    address: SocketAddr,
    spans: Spans,
    serving: AbortHandle,
}

#[derive(Clone, Debug)]
struct Spans {
    all: Arc<Mutex<Vec<Span>>>,
    count: watch::Sender<usize>,
}

impl Receiver {
    /// Listens on a free port.
    ///
    /// # Errors
    /// When there is none.
    pub async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("cannot listen on the loopback")?;
        let address = listener.local_addr()?;
        let spans = Spans { all: Arc::default(), count: watch::Sender::new(0) };
        let server = Server::builder().add_service(TraceServiceServer::new(spans.clone()));
        let serving = tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener))).abort_handle();
        Ok(Self { address, spans, serving })
    }

    /// What `[traces] endpoint` must say.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Waits for a span; returns it.
    ///
    /// # Errors
    /// When none came; the message lists what did come.
    pub async fn span(&self, what: &str, wanted: impl Fn(&Span) -> bool) -> anyhow::Result<Span> {
        let mut count = self.spans.count.subscribe();
        let search = async {
            loop {
                let found = self.all().into_iter().find(&wanted);
                if found.is_some() || count.changed().await.is_err() {
                    return found;
                }
            }
        };
        let found = tokio::time::timeout(patience(), search).await.ok().flatten();
        found.with_context(|| format!("no span: {what}; there are {:#?}", self.all()))
    }

    /// Every span so far.
    #[must_use]
    pub fn all(&self) -> Vec<Span> {
        self.spans.all.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        for resource in request.into_inner().resource_spans {
            all.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
        self.count.send_replace(all.len());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// The text of an attribute; empty when there is none.
#[must_use]
pub fn attribute(span: &Span, key: &str) -> String {
    let found = span.attributes.iter().find(|attribute| attribute.key == key);
    match found.and_then(|attribute| attribute.value.as_ref()?.value.as_ref()) {
        Some(Value::StringValue(text)) => text.clone(),
        _ => String::new(),
    }
}
