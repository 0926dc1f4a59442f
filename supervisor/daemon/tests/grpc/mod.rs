//! Both ends of a call over bare HTTP/2, as the tests of the broker play them.

use std::{future::Future, path::Path, time::Duration};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, client::SendRequest, server::SendResponse};
use http::{HeaderMap, Request};
use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};

/// Nothing in these tests takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Fails the test instead of hanging it.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("nothing happened in time")
}

/// One gRPC message with its prefix.
pub(crate) fn message(payload: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(payload.len() + 5);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(payload.len()).unwrap());
    bytes.put_slice(payload);
    bytes.freeze()
}

/// A bare HTTP/2 client.
pub(crate) async fn client(path: &Path) -> SendRequest<Bytes> {
    let stream = UnixStream::connect(path).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    // Ends with its connection, which the test's end closes.
    tokio::spawn(async move { drop(connection.await) });
    sender
}

/// The whole answer to a call.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: HeaderMap,
}

impl Answer {
    /// A field of the trailers, or of the head when there is nothing else.
    pub(crate) fn end(&self, name: &str) -> Option<&str> {
        let value = self.trailers.get(name).or_else(|| self.headers.get(name));
        value.map(|value| value.to_str().unwrap())
    }

    pub(crate) fn status(&self) -> i32 {
        self.end("grpc-status").expect("a status").parse().unwrap()
    }

    pub(crate) fn reason(&self) -> Option<&str> {
        self.end("plugvisor-reason")
    }
}

/// Sends a whole call and waits for its whole answer.
pub(crate) async fn call(sender: &SendRequest<Bytes>, request: Request<()>, body: Bytes) -> Answer {
    within(async {
        let mut sender = sender.clone().ready().await.unwrap();
        let (response, mut stream) = sender.send_request(request, false).unwrap();
        // A call that is refused at once may be over before its body is sent.
        let _ = stream.send_data(body, true);
        answer(response.await.unwrap()).await
    })
    .await
}

pub(crate) async fn answer(response: http::Response<RecvStream>) -> Answer {
    let (head, mut from) = response.into_parts();
    let mut body = Vec::new();
    while let Some(chunk) = from.data().await {
        let chunk = chunk.unwrap();
        from.flow_control().release_capacity(chunk.len()).unwrap();
        body.extend_from_slice(&chunk);
    }
    let trailers = from.trailers().await.unwrap().unwrap_or_default();
    Answer { headers: head.headers, body, trailers }
}

/// Serves bare HTTP/2: `handle` gets every request on every connection.
pub(crate) fn serve<F>(
    listener: UnixListener,
    handle: impl Fn(Request<RecvStream>, SendResponse<Bytes>) -> F + Clone + Send + 'static,
) where
    F: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handle = handle.clone();
            tokio::spawn(async move {
                let Ok(mut connection) = h2::server::handshake(stream).await else { return };
                while let Some(Ok((request, respond))) = connection.accept().await {
                    tokio::spawn(handle(request, respond));
                }
            });
        }
    });
}
