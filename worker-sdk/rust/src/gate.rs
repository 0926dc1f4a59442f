//! The way in: every call passes here on its way to a service.
//!
//! ```text
//!  connection ──► Gate ──► health, Worker              (from the first moment)
//!                   └────► the plugin's own services   (once started: counted, and inside a CallContext)
//! ```
//!
//! It keeps a panic of a handler from ending more than its own call, and ends a call at its deadline: tonic's own server
//! would answer CANCELLED, which a breaker rightly takes for the caller's doing. It knows no service by name.

use std::{
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
};

use http::{HeaderMap, Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use plugvisor_client::CallContext;
use tokio::time::{Sleep, sleep_until};
use tonic::{Status, body::Body};
use tower::Service;

use crate::{
    inflight::{Inflight, InflightGuard},
    services::Services,
};

type BoxedAnswer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

/// The plugin's own services, once it has started.
pub(crate) type OwnServices = Arc<OnceLock<Services>>;

/// The root service of a plugin's server; clones share everything.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    fixed: Arc<Services>,
    own: OwnServices,
    inflight: Inflight,
}

impl Gate {
    /// A gate with `fixed` open from the first moment and `own` once it is set.
    pub(crate) fn new(fixed: Services, own: OwnServices, inflight: Inflight) -> Self {
        Self { fixed: Arc::new(fixed), own, inflight }
    }

    fn answer(&self, mut request: Request<Body>) -> GateFuture {
        let context = CallContext::from_headers(request.headers());
        let path = request.uri().path();
        let (service, guard) = if let Some(service) = self.fixed.find(path) {
            (service, None)
        } else {
            let Some(own) = self.own.get() else {
                return GateFuture::refused(&Status::unavailable("the plugin has not been initialised yet"));
            };
            let Some(service) = own.find(path) else {
                let served: Vec<_> = own.names().collect();
                return GateFuture::refused(&Status::unimplemented(format!(
                    "this plugin does not serve {path}; it serves {}",
                    served.join(", ")
                )));
            };
            (service, Some(self.inflight.enter()))
        };
        let mut service = service.clone();
        request.extensions_mut().insert(context.clone());
        let late = context.deadline().map(|deadline| Box::pin(sleep_until(deadline)));
        // Generated servers do their work in the future, not in `call`, so the context need not surround this.
        GateFuture::Called { answer: service.call(request), call: Some(Call { context, late, _guard: guard }) }
    }
}

impl Service<Request<Body>> for Gate {
    type Response = Response<GateBody>;
    type Error = Infallible;
    type Future = GateFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> GateFuture {
        self.answer(request)
    }
}

/// One call that is being served: what its code sees as its context, when it is over, and its place in the count.
#[derive(Debug)]
pub(crate) struct Call {
    context: CallContext,
    late: Option<Pin<Box<Sleep>>>,
    _guard: Option<InflightGuard>,
}

impl Call {
    /// Runs one step of a handler inside its context. Fails when the handler panics, or does not finish in time.
    fn step<R>(
        &mut self,
        task: &mut Context<'_>,
        step: impl FnOnce(&mut Context<'_>) -> Poll<R>,
    ) -> Poll<Result<R, Status>> {
        let context = self.context.clone();
        // A handler that panicked is never polled again, so nothing of it is seen in a broken state.
        match catch_unwind(AssertUnwindSafe(|| context.sync_scope(|| step(task)))) {
            Ok(Poll::Ready(value)) => return Poll::Ready(Ok(value)),
            Ok(Poll::Pending) => {}
            // The panic hook has logged where it was.
            Err(_) => return Poll::Ready(Err(Status::internal("the plugin's handler panicked; see its log"))),
        }
        match &mut self.late {
            Some(late) => {
                late.as_mut().poll(task).map(|()| Err(Status::deadline_exceeded("the plugin did not answer in time")))
            }
            None => Poll::Pending,
        }
    }
}

pub(crate) enum GateFuture {
    Called { answer: BoxedAnswer, call: Option<Call> },
    Ended(Option<Response<GateBody>>),
}

impl GateFuture {
    fn refused(status: &Status) -> Self {
        Self::Ended(Some(response_of(status)))
    }
}

impl Future for GateFuture {
    type Output = Result<Response<GateBody>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Self::Output> {
        let response = match &mut *self {
            Self::Called { answer, call } => {
                let mut running = call.take().expect("a future is not polled after its end");
                match running.step(task, |task| answer.as_mut().poll(task)) {
                    Poll::Pending => {
                        *call = Some(running);
                        return Poll::Pending;
                    }
                    Poll::Ready(Ok(Ok(response))) => response.map(|inner| GateBody::Running { inner, call: running }),
                    Poll::Ready(Err(status)) => response_of(&status),
                }
            }
            Self::Ended(response) => response.take().expect("a future is not polled after its end"),
        };
        *self = Self::Ended(None);
        Poll::Ready(Ok(response))
    }
}

/// The body of an answer. The handler of a streaming call runs while this is read, so it carries the call on; the call
/// has ended when the body is dropped.
#[expect(clippy::large_enum_variant, reason = "made once for each call and then only read; a box would cost each call")]
pub(crate) enum GateBody {
    Running { inner: Body, call: Call },
    Ended,
}

impl HttpBody for GateBody {
    type Data = <Body as HttpBody>::Data;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Self::Running { inner, call } = &mut *self else { return Poll::Ready(None) };
        let frame = match ready!(call.step(task, |task| Pin::new(inner).poll_frame(task))) {
            Ok(frame) => frame,
            // A stream that has begun can only end with trailers.
            Err(status) => {
                *self = Self::Ended;
                return Poll::Ready(Some(Ok(Frame::trailers(trailers_of(&status)))));
            }
        };
        if frame.is_none() {
            *self = Self::Ended;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Running { inner, .. } => inner.is_end_stream(),
            Self::Ended => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Running { inner, .. } => inner.size_hint(),
            Self::Ended => SizeHint::with_exact(0),
        }
    }
}

fn response_of(status: &Status) -> Response<GateBody> {
    let response = status.clone().into_http::<Body>();
    response.map(|_| GateBody::Ended)
}

fn trailers_of(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        trailers.insert("grpc-status", http::HeaderValue::from_static("13"));
    }
    trailers
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        future::{poll_fn, ready},
    };

    use tonic::server::NamedService;

    use super::*;

    /// Answers with the given steps as the frames of its body, each run when the frame is asked for.
    #[derive(Clone)]
    struct Scripted(Vec<fn() -> String>);

    impl NamedService for Scripted {
        const NAME: &'static str = "test.Scripted";
    }

    impl Service<Request<Body>> for Scripted {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Self::Future {
            ready(Ok(Response::new(Body::new(ScriptedBody(self.0.clone().into())))))
        }
    }

    struct ScriptedBody(VecDeque<fn() -> String>);

    impl HttpBody for ScriptedBody {
        type Data = <Body as HttpBody>::Data;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
            let step = self.0.pop_front();
            Poll::Ready(step.map(|step| Ok(Frame::data(step().into_bytes().into()))))
        }
    }

    /// Never answers, or never goes on after its headers.
    #[derive(Clone)]
    struct Hanging {
        headers: bool,
    }

    impl NamedService for Hanging {
        const NAME: &'static str = "test.Hanging";
    }

    impl Service<Request<Body>> for Hanging {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = BoxedAnswer;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> BoxedAnswer {
            if self.headers {
                return Box::pin(ready(Ok(Response::new(Body::new(HangingBody)))));
            }
            Box::pin(std::future::pending())
        }
    }

    struct HangingBody;

    impl HttpBody for HangingBody {
        type Data = <Body as HttpBody>::Data;
        type Error = Status;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Status>>> {
            Poll::Pending
        }
    }

    async fn call_service<S>(service: S) -> (Response<GateBody>, Inflight)
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
        S: Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
    {
        let (mut services, inflight) = (Services::default(), Inflight::default());
        services.add(service);
        let own = OwnServices::default();
        own.set(services).unwrap();
        let mut gate = Gate::new(Services::default(), own, inflight.clone());
        let request = Request::builder().uri(format!("/{}/Run", S::NAME)).header("traceparent", "carried");
        let request = request.header("grpc-timeout", "3S").body(Body::empty()).unwrap();
        let Ok(response) = gate.call(request).await;
        (response, inflight)
    }

    async fn call(script: Vec<fn() -> String>) -> (GateBody, Inflight) {
        let (response, inflight) = call_service(Scripted(script)).await;
        (response.into_body(), inflight)
    }

    #[tokio::test(start_paused = true)]
    async fn a_late_answer_is_deadline_exceeded_before_and_after_its_headers() {
        let begun = tokio::time::Instant::now();
        let (response, inflight) = call_service(Hanging { headers: false }).await;
        assert_eq!(response.headers()["grpc-status"], "4");
        assert_eq!(begun.elapsed().as_secs(), 3);
        assert_eq!(inflight.count(), 0);
        let begun = tokio::time::Instant::now();
        let (response, inflight) = call_service(Hanging { headers: true }).await;
        let mut body = response.into_body();
        assert_eq!(inflight.count(), 1);
        let trailers = next(&mut body).await.unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "4");
        assert_eq!(begun.elapsed().as_secs(), 3);
        assert_eq!(inflight.count(), 0);
    }

    async fn next(body: &mut GateBody) -> Option<Frame<<Body as HttpBody>::Data>> {
        poll_fn(|task| Pin::new(&mut *body).poll_frame(task)).await.map(Result::unwrap)
    }

    #[tokio::test]
    async fn a_streaming_handler_has_its_context_and_counts_until_its_end() {
        let traced = || CallContext::current().unwrap().traceparent().unwrap().to_owned();
        let (mut body, inflight) = call(vec![traced, traced]).await;
        assert_eq!(next(&mut body).await.unwrap().into_data().unwrap(), "carried");
        assert_eq!(inflight.count(), 1);
        assert_eq!(next(&mut body).await.unwrap().into_data().unwrap(), "carried");
        assert!(next(&mut body).await.is_none());
        assert_eq!(inflight.count(), 0);
    }

    #[tokio::test]
    async fn a_stream_that_is_dropped_no_longer_counts() {
        let (mut body, inflight) = call(vec![String::new, String::new]).await;
        next(&mut body).await.unwrap();
        assert_eq!(inflight.count(), 1);
        drop(body);
        assert_eq!(inflight.count(), 0);
    }

    #[tokio::test]
    async fn a_panic_in_a_stream_ends_it_with_trailers() {
        let (mut body, inflight) = call(vec![|| "begun".to_owned(), || panic!("as the test asked")]).await;
        assert_eq!(next(&mut body).await.unwrap().into_data().unwrap(), "begun");
        let trailers = next(&mut body).await.unwrap().into_trailers().unwrap();
        assert_eq!(trailers["grpc-status"], "13");
        assert!(next(&mut body).await.is_none());
        assert_eq!(inflight.count(), 0);
    }
}
