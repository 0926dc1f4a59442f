//! `/metrics`, `/healthz` and `/readyz` over HTTP/1.1 on the loopback, with bounded connections, headers and time.
//!
//! Reads what [`Observed`] shows and changes nothing; what a figure means is not known here.

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{sync::Semaphore, time::timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// What is served.
pub trait Observed: Send + Sync + 'static {
    /// The metrics page.
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// Whether the host is ready, and if not, why.
    fn readiness(&self) -> Readiness;
}

/// Whether every plugin that should be loaded is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// It is.
    Ready,
    /// It is not; one line for each reason.
    NotReady(Vec<String>),
}

/// Bounds of the server.
#[derive(Clone, Copy, Debug)]
pub struct ServerLimits {
    /// Connections at once; one more waits in the backlog.
    pub connections: usize,
    /// Time for a request's headers.
    pub header_time: Duration,
    /// Time for a whole connection.
    pub connection_time: Duration,
    /// Bytes of a request's headers.
    pub header_bytes: usize,
}

impl Default for ServerLimits {
    fn default() -> Self {
        Self {
            connections: 16,
            header_time: Duration::from_secs(5),
            connection_time: Duration::from_secs(60),
            header_bytes: 16 * 1024,
        }
    }
}

/// Why the address cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process has it.
    #[error(
        "the metrics address {0} is taken by another process; stop that process, or set [supervisor] metrics_address to \
         another port (0 takes a free one)"
    )]
    Taken(SocketAddr),
    /// The system refused it.
    #[error(
        "cannot listen on the metrics address {0}: {1}; set [supervisor] metrics_address to one that this host has"
    )]
    Io(SocketAddr, #[source] io::Error),
}

/// Listens on the address, non-blocking. Returns the address with its real port too.
pub fn bind(address: SocketAddr) -> Result<(TcpListener, SocketAddr), BindError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => BindError::Taken(address),
        _ => BindError::Io(address, error),
    };
    let listener = TcpListener::bind(address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let real = listener.local_addr().map_err(failed)?;
    Ok((listener, real))
}

/// Serves until cancelled; connections then open end with it.
pub async fn serve<O: Observed>(
    listener: TcpListener,
    observed: Arc<O>,
    limits: ServerLimits,
    cancelled: CancellationToken,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(limits.connections));
    let tasks = TaskTracker::new();
    let accept = async {
        loop {
            // The place is taken before the connection, so that the backlog holds what is too much.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = connection(TokioIo::new(stream), Arc::clone(&observed), limits);
                    let cancelled = cancelled.clone();
                    tasks.spawn(async move {
                        cancelled.run_until_cancelled(connection).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Out of descriptors, mostly: give them time to come back instead of spinning.
                    tracing::warn!(%error, "cannot accept a connection on the metrics address");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    cancelled.run_until_cancelled(accept).await;
    tasks.close();
    tasks.wait().await;
    Ok(())
}

async fn connection<O: Observed>(io: TokioIo<tokio::net::TcpStream>, observed: Arc<O>, limits: ServerLimits) {
    let service = service_fn(move |request| {
        let observed = Arc::clone(&observed);
        async move { Ok::<_, Infallible>(answer(&request, &*observed).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_time)
        .max_buf_size(limits.header_bytes)
        .serve_connection(io, service);
    // A client that breaks HTTP or is too slow is its own problem; there is nothing to tell an operator.
    let _ = timeout(limits.connection_time, connection).await;
}

async fn answer<O: Observed>(request: &Request<Incoming>, observed: &O) -> Response<Full<Bytes>> {
    let plain = "text/plain; charset=utf-8";
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return page(StatusCode::METHOD_NOT_ALLOWED, plain, "only GET is answered here\n".into());
    }
    match request.uri().path() {
        "/metrics" => page(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", observed.metrics().await),
        "/healthz" => page(StatusCode::OK, plain, "ok\n".into()),
        "/readyz" => match observed.readiness() {
            Readiness::Ready => page(StatusCode::OK, plain, "ready\n".into()),
            Readiness::NotReady(reasons) => {
                page(StatusCode::SERVICE_UNAVAILABLE, plain, format!("not ready\n{}\n", reasons.join("\n")))
            }
        },
        _ => page(StatusCode::NOT_FOUND, plain, "there are /metrics, /healthz and /readyz\n".into()),
    }
}

fn page(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    use super::*;

    struct Fixed(Readiness);

    impl Observed for Fixed {
        async fn metrics(&self) -> String {
            "plugvisor_build_info 1\n".into()
        }

        fn readiness(&self) -> Readiness {
            self.0.clone()
        }
    }

    async fn started(readiness: Readiness, limits: ServerLimits) -> (SocketAddr, CancellationToken) {
        let (listener, address) = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let cancelled = CancellationToken::new();
        tokio::spawn(serve(listener, Arc::new(Fixed(readiness)), limits, cancelled.clone()));
        (address, cancelled)
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        ask(address, &format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).await
    }

    #[tokio::test]
    async fn the_pages_are_served() {
        let not_ready = Readiness::NotReady(vec!["plugin a is LOADING".into()]);
        let (address, cancelled) = started(not_ready, ServerLimits::default()).await;
        let metrics = get(address, "/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200") && metrics.ends_with("plugvisor_build_info 1\n"), "{metrics}");
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
        let ready = get(address, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 503") && ready.ends_with("plugin a is LOADING\n"), "{ready}");
        assert!(get(address, "/admin").await.starts_with("HTTP/1.1 404"));
        let post = ask(address, "POST /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        assert!(post.starts_with("HTTP/1.1 405"), "{post}");
        cancelled.cancel();
    }

    #[tokio::test]
    async fn slow_and_long_headers_are_cut() {
        let limits = ServerLimits { connections: 1, header_time: Duration::from_secs(1), ..Default::default() };
        let (address, cancelled) = started(Readiness::Ready, limits).await;
        // The only place is held by a client that never finishes; the next one is answered once that one is cut.
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
        assert!(get(address, "/healthz").await.ends_with("ok\n"));
        let long = format!("GET /healthz HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(64 * 1024));
        let mut stream = TcpStream::connect(address).await.unwrap();
        let _ = stream.write_all(long.as_bytes()).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431"), "{answer:?}");
        cancelled.cancel();
    }

    #[test]
    fn a_taken_port_is_named_with_the_fix() {
        let (_listener, address) = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let error = bind(address).unwrap_err().to_string();
        assert!(error.contains(&address.to_string()) && error.contains("metrics_address"), "{error}");
    }
}
