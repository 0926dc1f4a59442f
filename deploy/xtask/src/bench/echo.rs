//! The service that is measured: tonic, one unary method, the reply is the request.

use std::{convert::Infallible, future, path::Path, pin::Pin, task};

use bytes::Bytes;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
    server::{Grpc, NamedService, UnaryService},
    transport::Server,
};
use tonic_prost::ProstCodec;

/// The service's name.
pub(super) const SERVICE: &str = "bench.v1.Echo";
/// The path of its method.
pub(super) const METHOD: &str = "/bench.v1.Echo/Echo";
/// Messages are `google.protobuf.BytesValue`.
pub(super) type Codec = ProstCodec<Bytes, Bytes>;

/// Serves on `listen` until dropped.
pub(super) async fn serve(listen: &Path) -> anyhow::Result<()> {
    let listener = UnixListener::bind(listen)?;
    println!("ready");
    Server::builder().add_service(Echo).serve_with_incoming(UnixListenerStream::new(listener)).await?;
    Ok(())
}

#[derive(Clone)]
struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = SERVICE;
}

struct Reply;

impl UnaryService<Bytes> for Reply {
    type Response = Bytes;
    type Future = future::Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        future::ready(Ok(Response::new(request.into_inner())))
    }
}

impl Service<http::Request<Body>> for Echo {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut task::Context<'_>) -> task::Poll<Result<(), Infallible>> {
        task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move { Ok(Grpc::new(Codec::default()).unary(Reply, request).await) })
    }
}
