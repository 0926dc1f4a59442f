//! The way of the spans to the receiver: collected for a moment, sent in one request, counted when they are lost.

use std::time::Duration;

use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig as _};
use opentelemetry_sdk::{Resource, trace::SpanExporter as _};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use super::{CallTrace, TraceSettings, TracedCall, Tracer, span};

/// How long the last spans may take when the supervisor stops.
const LAST: Duration = Duration::from_millis(800);

/// An endpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("traces cannot be sent to {endpoint}: {source}; write [traces] endpoint as http://HOST:PORT")]
pub struct ExportError {
    endpoint: String,
    #[source]
    source: ExporterBuildError,
}

/// Sends what a [`Tracer`] collects. Owned by one task.
#[derive(Debug)]
pub struct Exporter {
    tracer: Tracer,
    calls: mpsc::Receiver<(CallTrace, TracedCall)>,
    /// Taken out of the queue and not sent yet.
    pending: Vec<(CallTrace, TracedCall)>,
    exporter: SpanExporter,
    settings: TraceSettings,
}

impl Exporter {
    /// A tracer, and the exporter that must run for it. Nothing is connected yet. Must be called inside a tokio runtime.
    pub fn new(settings: TraceSettings) -> Result<(Tracer, Self), ExportError> {
        let mut exporter = SpanExporter::builder()
            .with_tonic()
            .with_endpoint(settings.endpoint.clone())
            .with_timeout(settings.timeout)
            .build()
            .map_err(|source| ExportError { endpoint: settings.endpoint.clone(), source })?;
        let resource =
            [KeyValue::new("service.name", "plugvisord"), KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))];
        exporter.set_resource(&Resource::builder_empty().with_attributes(resource).build());
        let (tracer, calls) = Tracer::new(&settings);
        Ok((tracer.clone(), Self { tracer, calls, pending: Vec::new(), exporter, settings }))
    }

    /// Runs until `end`, then sends what is left, for 0.8 s at most.
    pub async fn run(mut self, end: CancellationToken) {
        let mut said = false;
        loop {
            // Cancel-safe: what was taken out of the queue waits in `pending`.
            tokio::select! {
                open = self.collect() => if !open { break },
                () = end.cancelled() => break,
            }
            let calls = std::mem::take(&mut self.pending);
            self.send(calls, &mut said).await;
        }
        self.calls.close();
        let mut left = std::mem::take(&mut self.pending);
        while let Ok(call) = self.calls.try_recv() {
            left.push(call);
        }
        let count = left.len();
        if count > 0 && timeout(LAST, self.send(left, &mut said)).await.is_err() {
            self.tracer.count_dropped(count);
        }
    }

    /// Waits for a call, and then a moment for more. False when no more will come.
    async fn collect(&mut self) -> bool {
        if self.pending.is_empty() {
            let Some(call) = self.calls.recv().await else { return false };
            self.pending.push(call);
        }
        let until = Instant::now() + self.settings.delay;
        // A call has up to two spans.
        let most = (self.settings.batch / 2).max(1);
        while self.pending.len() < most
            && let Ok(Some(call)) = timeout_at(until, self.calls.recv()).await
        {
            self.pending.push(call);
        }
        true
    }

    async fn send(&self, calls: Vec<(CallTrace, TracedCall)>, said: &mut bool) {
        let scope = InstrumentationScope::builder("plugvisor").with_version(env!("CARGO_PKG_VERSION")).build();
        let count = calls.len();
        let spans = calls.into_iter().flat_map(|(trace, call)| span::of_call(&trace, call, &scope)).collect();
        match timeout(self.settings.timeout, self.exporter.export(spans)).await {
            Ok(Ok(())) => {
                if std::mem::take(said) {
                    tracing::info!(endpoint = self.settings.endpoint, "traces are received again");
                }
            }
            Ok(Err(_)) | Err(_) => {
                self.tracer.count_dropped(count);
                // Once, not for each batch: the metric counts.
                if !std::mem::replace(said, true) {
                    tracing::warn!(
                        endpoint = self.settings.endpoint,
                        "traces are not received and are dropped; plugvisor_otlp_dropped_total counts them"
                    );
                }
            }
        }
    }
}
