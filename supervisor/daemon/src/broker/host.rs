//! Calls to the supervisor's own services: handed to a tonic server as HTTP requests, with the caller's identity.

use std::{
    convert::Infallible,
    fmt,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{RecvStream, SendStream, server::SendResponse};
use http::{Request, Response, request::Parts};
use http_body::{Body as _, Frame};
use plugvisor_core::route::HostModule;
use tokio::time::{Instant, sleep_until};
use tonic::body::Body;
use tower::{Service, ServiceExt as _, util::BoxCloneSyncService};

use super::{admit::CallTime, caller::Caller, refusal, shared::Shared};

/// The provider under which calls to host modules are counted; no plugin can have a name with a dot.
const COUNTED_AS: &str = "plugvisor.host";
const CANCELLED: i32 = 1;
const UNKNOWN: i32 = 2;

/// A service that the supervisor itself offers on every plugin's broker socket.
///
/// It runs on the broker's thread and must not block it. The request carries a [`super::CallerIdentity`] among its
/// extensions; whether the caller may reach it, the rules of `plugvisor-core` have decided before.
#[derive(Clone)]
pub struct HostService {
    pub(super) module: HostModule,
    handler: BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>,
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

/// One call to a host module.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) shared: Rc<Shared>,
    pub(super) caller: Rc<Caller>,
    pub(super) time: CallTime,
    pub(super) respond: SendResponse<Bytes>,
}

impl Call {
    pub(super) async fn run(mut self, service: HostService, head: Parts, body: RecvStream) {
        let path = head.uri.path().to_owned();
        let mut request = Request::from_parts(head, Body::new(Incoming { body, over: false }));
        request.extensions_mut().insert(self.caller.identity.clone());
        let mut to_caller = None;
        let code = {
            let mut serving = std::pin::pin!(serve(service, request, &mut self.respond, &mut to_caller));
            let mut timer = std::pin::pin!(sleep_until(self.time.deadline()));
            poll_fn(|cx| {
                if let Poll::Ready(code) = serving.as_mut().poll(cx) {
                    return Poll::Ready(Some(code));
                }
                timer.as_mut().poll(cx).map(|()| None)
            })
            .await
        };
        let code = code.unwrap_or_else(|| {
            let refusal = self.time.over("the supervisor");
            self.shared.metrics.rejected(self.caller.key, refusal.reason);
            // Errors here mean that the caller is gone; there is nobody to tell.
            match &mut to_caller {
                Some(begun) => drop(begun.send_trailers(refusal::trailers(&refusal))),
                None => drop(self.respond.send_response(refusal::response(&refusal), true)),
            }
            refusal.reason.grpc_status()
        });
        let figures = self.shared.metrics.provider(COUNTED_AS);
        let method = path.strip_prefix('/').unwrap_or(&path);
        let duration = Instant::now().duration_since(self.time.began);
        self.shared.metrics.finished(&figures, self.caller.key, method, code, duration);
    }
}

async fn serve(
    service: HostService,
    request: Request<Body>,
    respond: &mut SendResponse<Bytes>,
    to_caller: &mut Option<SendStream<Bytes>>,
) -> i32 {
    let response = {
        let mut answer = std::pin::pin!(service.handler.oneshot(request));
        let answered = poll_fn(|cx| {
            if respond.poll_reset(cx).is_ready() {
                return Poll::Ready(None);
            }
            answer.as_mut().poll(cx).map(Some)
        });
        match answered.await {
            Some(Ok(response)) => response,
            None => return CANCELLED,
        }
    };
    let (head, mut body) = response.into_parts();
    let early = refusal::status_of(&head.headers);
    let over = body.is_end_stream();
    match respond.send_response(Response::from_parts(head, ()), over) {
        Err(_) => CANCELLED,
        Ok(_) if over => early.unwrap_or(UNKNOWN),
        Ok(begun) => {
            let to = to_caller.insert(begun);
            while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                let Ok(frame) = frame else { return UNKNOWN };
                match frame.into_data() {
                    Ok(data) => {
                        if send(to, data).await.is_err() {
                            return CANCELLED;
                        }
                    }
                    Err(frame) => {
                        let Ok(trailers) = frame.into_trailers() else { continue };
                        let code = refusal::status_of(&trailers).unwrap_or(UNKNOWN);
                        return if to.send_trailers(trailers).is_ok() { code } else { CANCELLED };
                    }
                }
            }
            drop(to.send_data(Bytes::new(), true));
            early.unwrap_or(UNKNOWN)
        }
    }
}

/// Sends as the caller has room.
async fn send(to: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), ()> {
    while !data.is_empty() {
        to.reserve_capacity(data.len());
        if to.capacity() == 0 {
            match poll_fn(|cx| to.poll_capacity(cx)).await {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Err(()),
            }
        }
        let piece = data.split_to(to.capacity().min(data.len()));
        if !piece.is_empty() {
            to.send_data(piece, false).map_err(|_| ())?;
        }
    }
    Ok(())
}

/// A request's body as `http-body` knows it.
struct Incoming {
    body: RecvStream,
    over: bool,
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if self.over {
            return Poll::Ready(None);
        }
        if let Some(data) = ready!(self.body.poll_data(cx)) {
            let data = data?;
            // The handler holds at most one message of bounded size, so its bytes count as taken.
            let _ = self.body.flow_control().release_capacity(data.len());
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let trailers = ready!(self.body.poll_trailers(cx))?;
        self.over = true;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }
}
