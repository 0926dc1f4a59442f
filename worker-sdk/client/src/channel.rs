//! The connection to the broker, and what it adds to each call.
//!
//! A [`Client`] is a [`tower::Service`] that any generated tonic client takes. It connects when first used, connects
//! again after the supervisor came back, and turns a missing socket into an error that says what to start.

use std::{
    error::Error,
    io,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderValue, Request, Response, Uri};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::{
    Status, TimeoutExpired,
    body::Body,
    transport::{Channel, Endpoint, channel::ResponseFuture},
};
use tower::Service;

use crate::{
    CallContext, PlaceError,
    context::{TOKEN_METADATA, apply_timeout},
    default_calls_socket,
};

/// Why a [`Client`] could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens on the socket.
    #[error("{}", absent(path))]
    NotRunning {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The socket is there and this user may not use it.
    #[error("{}", denied(path))]
    NotAllowed {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Anything else that connecting can end in.
    #[error("cannot connect to {}: {source}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Where the socket should be is not to be trusted.
    #[error(transparent)]
    Place(#[from] PlaceError),
}

/// A connection to the broker for any number of clients and tasks; clones share it.
#[derive(Debug, Clone)]
pub struct Client {
    route: Route,
    token: Option<HeaderValue>,
    timeout: Option<Duration>,
}

#[derive(Debug, Clone)]
enum Route {
    Socket {
        channel: Channel,
        path: Arc<Path>,
    },
    /// There is no broker: each call fails with this text.
    Nowhere(Arc<str>),
}

impl Client {
    /// Connects to the socket at `path`, to learn at once whether somebody listens there.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, ConnectError> {
        let path = path.as_ref();
        match UnixStream::connect(path).await {
            Ok(_) => Ok(Self::lazy(path)),
            Err(source) => Err(classify(path, source)),
        }
    }

    /// Connects to the supervisor of this user, found by [`default_calls_socket`].
    pub async fn from_default() -> Result<Self, ConnectError> {
        Self::connect(default_calls_socket()?).await
    }

    /// A client that connects at the first call. Must be made inside a tokio runtime.
    pub fn lazy(path: impl AsRef<Path>) -> Self {
        let path: Arc<Path> = path.as_ref().into();
        let target = Arc::clone(&path);
        let connector = tower::service_fn(move |_: Uri| {
            let target = Arc::clone(&target);
            async move { UnixStream::connect(&target).await.map(TokioIo::new) }
        });
        // The authority is a name for the other side's logs: the connector dials the path whatever it says.
        let channel = Channel::new(connector, Endpoint::from_static("http://plugvisor"));
        Self { route: Route::Socket { channel, path }, token: None, timeout: None }
    }

    /// A client whose calls all fail with UNAVAILABLE and `reason`: for programs that run without a broker.
    pub fn unavailable(reason: impl Into<Arc<str>>) -> Self {
        Self { route: Route::Nowhere(reason.into()), token: None, timeout: None }
    }

    /// A client of the same connection that selects the provider by token. `None` when the text cannot be metadata.
    pub fn with_token(&self, token: &str) -> Option<Self> {
        let token = HeaderValue::from_str(token).ok()?;
        Some(Self { token: Some(token), ..self.clone() })
    }

    /// A client of the same connection that gives each call at most this time. The time left of the call being served,
    /// and a `grpc-timeout` set on the request, still count: the shortest wins.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { timeout: Some(timeout), ..self.clone() }
    }
}

impl Service<Request<Body>> for Client {
    type Response = Response<Body>;
    type Error = Status;
    type Future = CallFuture;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        match &mut self.route {
            Route::Socket { channel, path } => {
                let path = Arc::clone(path);
                channel.poll_ready(context).map_err(|error| status_of(&path, error))
            }
            Route::Nowhere(_) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, mut request: Request<Body>) -> CallFuture {
        let serving = CallContext::current();
        let headers = request.headers_mut();
        if let Some(serving) = &serving {
            serving.apply(headers);
        }
        if let Some(token) = &self.token {
            headers.entry(TOKEN_METADATA).or_insert_with(|| token.clone());
        }
        let limits = [self.timeout, serving.as_ref().and_then(CallContext::remaining)];
        if apply_timeout(headers, limits) == Some(Duration::ZERO) {
            return CallFuture::failed(Status::deadline_exceeded(format!(
                "no time was left to call {}: the deadline of the call being served has passed",
                request.uri().path()
            )));
        }
        match &mut self.route {
            Route::Socket { channel, path } => {
                CallFuture(State::Sent { future: channel.call(request), path: Arc::clone(path) })
            }
            Route::Nowhere(reason) => CallFuture::failed(Status::unavailable(&**reason)),
        }
    }
}

/// The answer to a call of a [`Client`]. Dropping it cancels the call.
#[derive(Debug)]
pub struct CallFuture(State);

#[derive(Debug)]
enum State {
    Sent { future: ResponseFuture, path: Arc<Path> },
    Failed(Option<Box<Status>>),
}

impl CallFuture {
    fn failed(status: Status) -> Self {
        Self(State::Failed(Some(Box::new(status))))
    }
}

impl Future for CallFuture {
    type Output = Result<Response<Body>, Status>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            State::Sent { future, path } => Pin::new(future).poll(context).map_err(|error| status_of(path, error)),
            State::Failed(status) => Poll::Ready(Err(*status.take().expect("a future is not polled after its end"))),
        }
    }
}

fn classify(path: &Path, source: io::Error) -> ConnectError {
    let path = path.to_path_buf();
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ConnectError::NotRunning { path, source },
        io::ErrorKind::PermissionDenied => ConnectError::NotAllowed { path, source },
        _ => ConnectError::Io { path, source },
    }
}

/// tonic wraps the cause several times over; what a person needs is at the bottom.
fn status_of(path: &Path, error: tonic::transport::Error) -> Status {
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(current) = cause {
        if current.is::<TimeoutExpired>() {
            return Status::deadline_exceeded("the deadline passed before the answer came");
        }
        match current.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Status::unavailable(absent(path));
            }
            Some(io::ErrorKind::PermissionDenied) => return Status::permission_denied(denied(path)),
            _ => cause = current.source(),
        }
    }
    Status::from_error(Box::new(error))
}

fn absent(path: &Path) -> String {
    format!(
        "plugvisord is not running or listens elsewhere: nobody listens on {}; start it with `plugvisor run`, \
         or name its socket in PLUGVISOR_CALLS",
        path.display()
    )
}

fn denied(path: &Path) -> String {
    format!("this user may not connect to {}; call as the user that runs plugvisord, or as root", path.display())
}
