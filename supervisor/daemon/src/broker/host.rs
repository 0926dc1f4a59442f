//! The supervisor's own services: a tonic server on a thread of its own, which the broker calls as it calls a plugin.
//!
//! The caller's identity goes over that connection as a field that no caller can set, since the broker drops whatever
//! comes under its own prefix, and is handed to the service as a value.

use std::{
    collections::{HashMap, HashSet},
    convert::Infallible,
    fmt, io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    sync::Arc,
};

use http::{HeaderName, HeaderValue, Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use plugvisor_core::{Generation, route::HostModule};
use tokio::{net::UnixStream, sync::mpsc, task::JoinSet};
use tonic::body::Body;
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};

use super::{
    headers,
    identity::{CallerIdentity, PluginIdentity},
};

type Handler = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// A service that the supervisor itself offers on every plugin's broker socket.
///
/// All of them share a thread and must not block it. The request carries a [`super::CallerIdentity`] among its
/// extensions; whether the caller may reach it, the rules of `plugvisor-core` have decided before.
#[derive(Clone)]
pub struct HostService {
    module: HostModule,
    handler: Handler,
}

impl HostService {
    /// Serves every method of `module` by `handler`, a generated tonic server.
    pub fn new<S>(module: HostModule, handler: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
    {
        Self { module, handler: BoxCloneSyncService::new(handler) }
    }
}

impl fmt::Debug for HostService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostService").field("module", &self.module).finish_non_exhaustive()
    }
}

/// The thread that serves them. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct Host {
    modules: HashSet<HostModule>,
    connections: mpsc::UnboundedSender<StdUnixStream>,
}

impl Host {
    pub(super) fn start(services: Vec<HostService>) -> io::Result<Self> {
        let modules = services.iter().map(|service| service.module).collect();
        // The broker makes one connection, and another when that one ends.
        let (connections, accepted) = mpsc::unbounded_channel();
        if !services.is_empty() {
            let handlers: HashMap<&str, Handler> =
                services.into_iter().map(|service| (service.module.service(), service.handler)).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let serving = serve(Arc::new(handlers), accepted);
            std::thread::Builder::new().name("host-modules".into()).spawn(move || runtime.block_on(serving))?;
        }
        Ok(Self { modules, connections })
    }

    pub(super) fn modules(&self) -> HashSet<HostModule> {
        self.modules.clone()
    }

    /// A connection to the services.
    pub(super) fn connect(&self) -> io::Result<OwnedFd> {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        theirs.set_nonblocking(true)?;
        self.connections.send(theirs).map_err(|_| io::Error::other("their thread has ended"))?;
        Ok(ours.into())
    }
}

async fn serve(handlers: Arc<HashMap<&'static str, Handler>>, mut accepted: mpsc::UnboundedReceiver<StdUnixStream>) {
    let mut connections = JoinSet::new();
    loop {
        // Both branches are cancel-safe.
        let stream = tokio::select! {
            stream = accepted.recv() => stream,
            Some(_) = connections.join_next() => continue,
        };
        let Some(stream) = stream else { return };
        let handlers = Arc::clone(&handlers);
        connections.spawn(async move {
            let Ok(stream) = UnixStream::from_std(stream) else { return };
            let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let handlers = Arc::clone(&handlers);
                async move { answer(&handlers, request).await }
            });
            let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            if let Err(error) = http.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a connection to the supervisor's own services ended");
            }
        });
    }
}

async fn answer(
    handlers: &HashMap<&'static str, Handler>,
    request: Request<hyper::body::Incoming>,
) -> Result<Response<Body>, Infallible> {
    let mut request = request.map(Body::new);
    let service = headers::service_and_method(request.uri().path()).map_or("", |(service, _)| service);
    let handler = handlers.get(service).cloned();
    let identity = HeaderName::from_bytes(headers::IDENTITY).ok().and_then(|name| request.headers_mut().remove(name));
    let identity = identity.as_ref().and_then(|value: &HeaderValue| parse(value.to_str().ok()?));
    match (handler, identity) {
        (Some(handler), Some(identity)) => {
            request.extensions_mut().insert(identity);
            handler.oneshot(request).await
        }
        // The broker asks only for what is here, and says for whom.
        (None, _) | (_, None) => {
            Ok(tonic::Status::internal("the broker asked for what the host does not have").into_http())
        }
    }
}

/// A caller as it goes over the connection.
pub(super) fn written(identity: &CallerIdentity) -> String {
    match identity {
        CallerIdentity::Plugin(plugin) => format!("plugin:{}:{}", plugin.name, plugin.generation.0),
        CallerIdentity::Local { uid, pid } => format!("local:{uid}:{pid}"),
    }
}

fn parse(text: &str) -> Option<CallerIdentity> {
    let mut parts = text.split(':');
    let (kind, first, second) = (parts.next()?, parts.next()?, parts.next()?);
    match kind {
        "plugin" => Some(CallerIdentity::Plugin(PluginIdentity {
            name: first.parse().ok()?,
            generation: Generation(second.parse().ok()?),
        })),
        "local" => Some(CallerIdentity::Local { uid: first.parse().ok()?, pid: second.parse().ok()? }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use plugvisor_core::Generation;

    use super::{CallerIdentity, PluginIdentity, parse, written};

    #[test]
    fn an_identity_comes_over() {
        let plugin = PluginIdentity { name: "asker".parse().unwrap(), generation: Generation(7) };
        for identity in [CallerIdentity::Plugin(plugin), CallerIdentity::Local { uid: 1000, pid: 42 }] {
            assert_eq!(parse(&written(&identity)), Some(identity));
        }
        assert_eq!(parse("plugin:UPPER:1"), None);
        assert_eq!(parse("somebody"), None);
    }
}
