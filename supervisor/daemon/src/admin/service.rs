//! The RPCs of `plugvisor.admin.v1.Admin`.

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use plugvisor_core::{
    Code, Error,
    breaker::Position,
    event::BreakerEvent,
    route::{self, Caller, Decision, PluginCaller},
};
use plugvisor_package::PluginName;
use plugvisor_proto::admin::v1::{
    DescribePluginRequest, DescribePluginResponse, ExamineHostRequest, ExamineHostResponse, ExplainCallRequest,
    ExplainCallResponse, GetStatusRequest, GetStatusResponse, ListBreakersRequest, ListBreakersResponse,
    LoadPluginRequest, LoadPluginResponse, PluginStatus, ReadLogsRequest, ReadLogsResponse, ResetBreakersRequest,
    ResetBreakersResponse, ResolveServiceRequest, ResolveServiceResponse, RestartPluginRequest, RestartPluginResponse,
    ShowConfigurationRequest, ShowConfigurationResponse, UnloadPluginRequest, UnloadPluginResponse, WatchEventsRequest,
    WatchEventsResponse, admin_server::Admin,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, transport::server::UdsConnectInfo};

use super::{
    convert,
    error::{refused, status},
    explain::{self, From, Question},
};
use crate::{
    broker::Snapshot,
    driver::{PluginView, rights},
    events::{Record, Subject},
    examine,
    fleet::{Cascade, Wish},
    journal::Batch,
    supervisor::Supervisor,
};

/// Entries handed to one consumer at a time; a consumer that does not read holds no more than these.
const BATCH: usize = 64;

/// Lines of stderr in a description.
const TAIL: usize = 20;

/// The longest name or path in a request.
const MAX_TEXT: usize = 4096;

/// The service. Clones share the state.
#[derive(Clone, Debug)]
pub struct AdminService {
    pub(super) state: Arc<Supervisor>,
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl AdminService {
    /// Over this state.
    #[must_use]
    pub fn new(state: Arc<Supervisor>) -> Self {
        Self { state }
    }

    async fn calls(&self) -> Snapshot {
        self.state.shared.calls.broker().snapshot().await.unwrap_or_default()
    }

    /// The plugin as a caller. What it would hold is judged when it has not been loaded yet.
    fn caller(&self, name: &str) -> Result<From, Status> {
        let handle = self.state.fleet.find(name).map_err(|error| status(&error))?;
        let view = Arc::clone(&handle.view.borrow());
        let Some(bundle) = &view.bundle else {
            let hint = format!("`plugvisor describe {name}` says what is wrong with it");
            return Err(status(&Error::new(
                Code::PluginNotLoaded,
                format!("{name} was rejected and calls nobody"),
                hint,
            )));
        };
        let manifest = &bundle.manifest;
        let config = self.state.config.plugin(&manifest.name);
        let rights = match &view.verdict {
            Some(verdict) => verdict.rights.clone(),
            None => rights(manifest, &handle.source, &config, &self.state.config.place()),
        };
        let about = if view.process.is_some() {
            Ok(format!("plugin {name}, generation {}", view.generation))
        } else {
            Err(format!("plugin {name} is {} and calls nobody now; judged as if it ran", view.state.name()))
        };
        let caller = PluginCaller {
            name: manifest.name.clone(),
            generation: view.generation,
            rights,
            dependencies: manifest.dependencies.iter().map(|dependency| dependency.name.clone()).collect(),
        };
        Ok(From::Plugin { caller, about })
    }

    async fn wish(&self, wish: Wish, name: &str) -> Result<PluginStatus, Status> {
        bounded(name)?;
        let view = self.state.fleet.wish(wish, name).await.map_err(|error| status(&error))?;
        Ok(convert::status(&view, &self.calls().await))
    }
}

/// The user who asks; the interceptor has let in nobody without one.
fn asker<T>(request: &Request<T>) -> u32 {
    request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred).map_or(0, |peer| peer.uid())
}

pub(super) fn bounded(text: &str) -> Result<(), Status> {
    if text.len() <= MAX_TEXT {
        return Ok(());
    }
    let message = format!("a name or path of {} bytes is longer than {MAX_TEXT}", text.len());
    Err(status(&Error::new(Code::RequestInvalid, message, "name a plugin, or a bundle's directory")))
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let calls = self.calls().await;
        let plugins = self.state.fleet.plugins();
        let plugins = plugins.values().map(|handle| convert::status(&handle.view.borrow(), &calls)).collect();
        let supervisor = Some(convert::supervisor(&self.state));
        Ok(Response::new(GetStatusResponse { supervisor, plugins }))
    }

    async fn describe_plugin(
        &self,
        request: Request<DescribePluginRequest>,
    ) -> Result<Response<DescribePluginResponse>, Status> {
        let DescribePluginRequest { name } = request.into_inner();
        let handle = self.state.fleet.find(&name).map_err(|error| status(&error))?;
        let view: Arc<PluginView> = Arc::clone(&handle.view.borrow());
        let controls = match &view.process {
            // What the kernel says now; as it was at the launch only when it cannot be asked.
            Some(process) => match self.state.shared.launcher.inspect(process.launch).await {
                Ok(controls) => controls,
                Err(error) => {
                    tracing::warn!(plugin = name, %error, "the controls cannot be read again");
                    process.controls.clone()
                }
            },
            None => Vec::new(),
        };
        let tail = match view.name.parse::<PluginName>() {
            Ok(plugin) => self.state.shared.logs.stderr_tail(&plugin, view.generation.0, TAIL),
            Err(_) => Vec::new(),
        };
        let config = view.name.parse().map(|plugin| self.state.config.plugin(&plugin)).unwrap_or_default();
        let front = view.name.parse().ok().and_then(|plugin| self.state.shared.ingress.front(&plugin));
        Ok(Response::new(convert::describe(&view, &config, front.as_deref(), &self.calls().await, &controls, tail)))
    }

    async fn load_plugin(&self, request: Request<LoadPluginRequest>) -> Result<Response<LoadPluginResponse>, Status> {
        let LoadPluginRequest { name_or_path } = request.into_inner();
        let plugin = Some(self.wish(Wish::Load, &name_or_path).await?);
        Ok(Response::new(LoadPluginResponse { plugin }))
    }

    async fn unload_plugin(
        &self,
        request: Request<UnloadPluginRequest>,
    ) -> Result<Response<UnloadPluginResponse>, Status> {
        let UnloadPluginRequest { name, cascade } = request.into_inner();
        bounded(&name)?;
        let cascade = if cascade { Cascade::Dependents } else { Cascade::Refuse };
        let unloaded = self.state.fleet.unload(&name, cascade).await;
        let (view, dependents) = unloaded.map_err(|error| status(&error))?;
        let plugin = Some(convert::status(&view, &self.calls().await));
        Ok(Response::new(UnloadPluginResponse { plugin, dependents }))
    }

    async fn restart_plugin(
        &self,
        request: Request<RestartPluginRequest>,
    ) -> Result<Response<RestartPluginResponse>, Status> {
        let RestartPluginRequest { name } = request.into_inner();
        let plugin = Some(self.wish(Wish::Restart, &name).await?);
        Ok(Response::new(RestartPluginResponse { plugin }))
    }

    type WatchEventsStream = Answers<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let WatchEventsRequest { plugin, type_prefix, after_sequence, follow } = request.into_inner();
        bounded(&plugin)?;
        bounded(&type_prefix)?;
        let events = Arc::clone(&self.state.shared.events);
        // One that is gone may still have events; a name that nobody ever had is a slip.
        let told = |(_, record): &(u64, Arc<Record>)| record.subject.plugin() == Some(plugin.as_str());
        if !plugin.is_empty() && !events.read(0, usize::MAX).entries.iter().any(told) {
            self.state.fleet.find(&plugin).map_err(|error| status(&error))?;
        }
        let mut newest = events.newest();
        // Without a sequence a follower begins now; 0 begins with the oldest kept.
        let mut after = after_sequence.unwrap_or(if follow { *newest.borrow() } else { 0 });
        let mut gap_counts = after_sequence.is_some_and(|after| after > 0);
        let (sender, receiver) = mpsc::channel(1);
        let stopped = self.state.stopped.clone();
        tokio::spawn(async move {
            loop {
                // Looked at before the events are read: what was said until the stop is still sent.
                let last = !follow || stopped.is_cancelled();
                newest.mark_unchanged();
                let Batch { missed, entries } = events.read(after, BATCH);
                let more = entries.len() == BATCH;
                // What fell out before this consumer began is not missed by it.
                let mut missed = if std::mem::replace(&mut gap_counts, true) { missed } else { 0 };
                for (sequence, record) in entries {
                    after = sequence;
                    let wanted = (plugin.is_empty() || record.subject.plugin() == Some(plugin.as_str()))
                        && record.type_name.starts_with(&type_prefix);
                    if wanted {
                        let event = Some(convert::event(&record, events.source()));
                        let answer = WatchEventsResponse { event, missed: std::mem::take(&mut missed) };
                        if sender.send(Ok(answer)).await.is_err() {
                            return;
                        }
                    }
                }
                if missed > 0 && sender.send(Ok(WatchEventsResponse { event: None, missed })).await.is_err() {
                    return;
                }
                if more {
                    continue;
                }
                if last {
                    return;
                }
                tokio::select! {
                    changed = newest.changed() => if changed.is_err() { return },
                    () = stopped.cancelled() => {}
                    () = sender.closed() => return,
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type ReadLogsStream = Answers<ReadLogsResponse>;

    async fn read_logs(&self, request: Request<ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        let answers = self.log_lines(request.into_inner())?;
        Ok(Response::new(Box::pin(answers)))
    }

    async fn resolve_service(
        &self,
        request: Request<ResolveServiceRequest>,
    ) -> Result<Response<ResolveServiceResponse>, Status> {
        let uid = asker(&request);
        let ResolveServiceRequest { service, token } = request.into_inner();
        bounded(&service)?;
        bounded(&token)?;
        // Whoever asks while plugins are being taken over waits as callers do, and finds everybody who was there before.
        // An error means that the supervisor ends, and the table says so.
        let _ = self.state.shared.reattached.clone().wait_for(|all| *all).await;
        let table = self.state.shared.calls.table();
        let token = (!token.is_empty()).then_some(token.as_str());
        match route::route(&table, Caller::Local { uid }, &service, token, None) {
            Ok(Decision::Provider(provider)) => {
                let name = provider.name().as_str();
                let handle = self.state.fleet.find(name).map_err(|error| status(&error))?;
                let set = handle.view.borrow().bundle.as_ref().and_then(|bundle| bundle.descriptor_set.clone());
                Ok(Response::new(ResolveServiceResponse {
                    plugin: name.to_owned(),
                    descriptor_set: set.unwrap_or_default(),
                }))
            }
            Ok(Decision::Host(module)) => Err(status(&Error::new(
                Code::RequestDenied,
                format!("{} is the supervisor's own and answers plugins only", module.service()),
                "call it from a plugin",
            ))),
            Err(refusal) => Err(refused(&refusal)),
        }
    }

    async fn explain_call(
        &self,
        request: Request<ExplainCallRequest>,
    ) -> Result<Response<ExplainCallResponse>, Status> {
        let uid = asker(&request);
        let ExplainCallRequest { from, service, method, token } = request.into_inner();
        for text in [&from, &service, &method, &token] {
            bounded(text)?;
        }
        let from = if from == "local" { From::Local { uid } } else { self.caller(&from)? };
        let token = (!token.is_empty()).then_some(token.as_str());
        let question = Question { from, service: &service, method: &method, token };
        let plugins = self.state.fleet.plugins();
        let calls = self.calls().await;
        let table = self.state.shared.calls.table();
        let view = |name: &str| plugins.get(name).map(|handle| Arc::clone(&handle.view.borrow()));
        Ok(Response::new(explain::answer(&question, &table, &calls, view)))
    }

    async fn list_breakers(&self, _: Request<ListBreakersRequest>) -> Result<Response<ListBreakersResponse>, Status> {
        let breakers = self.calls().await.providers.iter().map(convert::breaker).collect();
        Ok(Response::new(ListBreakersResponse { breakers }))
    }

    async fn reset_breakers(
        &self,
        request: Request<ResetBreakersRequest>,
    ) -> Result<Response<ResetBreakersResponse>, Status> {
        let actor = format!("uid {}", asker(&request));
        let ResetBreakersRequest { plugin } = request.into_inner();
        bounded(&plugin)?;
        let only = if plugin.is_empty() {
            None
        } else {
            self.state.fleet.find(&plugin).map_err(|error| status(&error))?;
            plugin.parse::<PluginName>().ok()
        };
        let stopped = |_| status(&Error::new(Code::Stopping, "the supervisor is stopping", "start it again"));
        let before = self.state.shared.calls.broker().reset_breakers(only.clone()).await.map_err(stopped)?;
        if before.is_empty() && only.is_some() {
            let message = format!("{plugin} has no breaker, since it is not loaded");
            let hint = format!("`plugvisor load {plugin}`; a new generation begins with a closed breaker");
            return Err(status(&Error::new(Code::PluginNotLoaded, message, hint)));
        }
        for provider in before.iter().filter(|provider| provider.breaker.position != Position::Closed) {
            let subject = Subject::Generation(provider.identity.name.clone(), provider.identity.generation);
            let from = provider.breaker.position.as_str();
            self.state.shared.events.publish(subject, BreakerEvent::Forced { actor: actor.clone(), from });
        }
        Ok(Response::new(ResetBreakersResponse { before: before.iter().map(convert::breaker).collect() }))
    }

    async fn show_configuration(
        &self,
        _: Request<ShowConfigurationRequest>,
    ) -> Result<Response<ShowConfigurationResponse>, Status> {
        Ok(Response::new(examine::shown(&self.state.config)))
    }

    async fn examine_host(&self, _: Request<ExamineHostRequest>) -> Result<Response<ExamineHostResponse>, Status> {
        let Supervisor { config, shared, fleet, features, .. } = &*self.state;
        let held = fleet.directories().to_vec();
        let report = examine::running(Arc::clone(config), &shared.launcher, features, held).await;
        report.map(Response::new).map_err(|error| status(&error))
    }
}
