//! Plain requests: judged, sent on without what is for this hop alone, on a connection of their own, and answered.
//!
//! What a server may answer is hyper's to judge; how the answer is framed for the plugin follows from the body that hyper
//! hands out, never from what the server said of it.

use std::{
    io,
    sync::atomic::{AtomicBool, Ordering},
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt as _, Either, Empty, StreamBody};
use hyper::{
    body::Incoming,
    client::conn::http1::{Builder, SendRequest},
};
use hyper_util::rt::TokioIo;
use plugvisor_core::egress::{Framing, FramingError, Target, chunk_size, is_hop_by_hop};
use plugvisor_package::Capability;
use tokio::{io::AsyncWriteExt as _, net::tcp::OwnedWriteHalf, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;

use super::{
    Proxy,
    client::{Client, Reader},
    connection::{After, Request},
    refusal::Refusal,
};
use crate::meter::Activity;

/// Pieces of a request's body that wait to be sent on.
const AHEAD: usize = 4;
/// The longest piece.
const PIECE: u64 = 64 * 1024;
/// The longest line of a chunked body: a size, or a trailer, which is dropped.
const LINE: usize = 1024;
/// The most trailers.
const TRAILERS: usize = 32;
/// What is read of a server's head.
const SERVER_HEAD: usize = 64 * 1024;

type RequestBody = Either<Empty<Bytes>, StreamBody<ReceiverStream<io::Result<Frame<Bytes>>>>>;

/// The task that drives a connection to a server; it ends with the request.
struct Driven(JoinHandle<()>);

impl Drop for Driven {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Carries a request out. A refusal is still to be answered.
pub(super) async fn run(
    proxy: &Proxy,
    client: &mut Client,
    request: &Request<'_>,
    target: &Target,
) -> Result<After, Refusal> {
    let upgrade = request.has_token("connection", "upgrade") && request.has_token("upgrade", "websocket");
    let needed = if upgrade { Capability::WebSocket } else { Capability::HttpClient };
    if !proxy.rules.rights.hold(needed) {
        let what = if upgrade { "a WebSocket" } else { "a plain request" };
        return Err(proxy.lacks(what, needed));
    }
    proxy.judge(&target.host, target.port)?;
    let (mut outward, framing) = outward(request, target, upgrade)?;
    let activity = Activity::new();
    let server = proxy.metered(proxy.dial(&target.host, target.port).await?, &activity);
    let failed = |error: hyper::Error| Refusal::server(&target.host, &error.to_string());
    let (mut sender, connection): (SendRequest<RequestBody>, _) =
        Builder::new().max_buf_size(SERVER_HEAD).handshake(TokioIo::new(server)).await.map_err(failed)?;
    let _driven = Driven(tokio::spawn(async move {
        // What goes wrong is told to whoever waits for the answer.
        let _ = connection.with_upgrades().await;
    }));

    if request.has_token("expect", "100-continue") && framing != Framing::None {
        // Everything that could refuse it has been asked; the server's own word would come too late to be of use.
        let _ = client.writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await;
    }
    let (pieces, body) = mpsc::channel(AHEAD);
    *outward.body_mut() = match framing {
        Framing::None => Either::Left(Empty::new()),
        Framing::Length(_) | Framing::Chunked => Either::Right(StreamBody::new(ReceiverStream::new(body))),
    };
    let begun = AtomicBool::new(false);
    let shape = Shape { old: request.old, head_only: request.method == "HEAD", upgrade };
    let keep = !request.old
        && !request.has_token("connection", "close")
        && !request.has_token("proxy-connection", "close")
        && !upgrade;
    let outcome = {
        let Client { reader, writer } = client;
        let pumped = pump(reader, framing, pieces);
        let exchanged = async {
            let response = sender.send_request(outward).await.map_err(failed)?;
            answer(writer, response, shape, keep, &begun).await.map_err(|why| Refusal::server(&target.host, &why))
        };
        tokio::pin!(pumped, exchanged);
        let mut whole = false;
        loop {
            // A pump or an exchange that was not ready goes on where it was.
            tokio::select! {
                biased;
                result = &mut exchanged => break result.map(|answered| (answered, whole)),
                result = &mut pumped, if !whole => match result {
                    Ok(()) => whole = true,
                    Err(refusal) => break Err(refusal),
                },
                () = activity.idle(proxy.host.limits.idle) => {
                    break Err(Refusal::server_late(&target.host, proxy.host.limits.idle));
                }
            }
        }
    };
    match outcome {
        Ok((Answered::Upgraded(upgraded), _)) => {
            let Ok(upgraded) = upgraded.await else { return Ok(After::Close) };
            Ok(After::Carry(TokioIo::new(upgraded), activity))
        }
        Ok((Answered::Whole { delimited: true }, true)) if keep => Ok(After::Next),
        Ok((Answered::Whole { .. }, _)) => Ok(After::Close),
        // Too late for an answer of the proxy's own: the plugin sees that this one is not whole.
        Err(_) if begun.load(Ordering::Relaxed) => Ok(After::Close),
        Err(refusal) => Err(refusal),
    }
}

/// The request as the server gets it, and how its body comes.
fn outward(
    request: &Request<'_>,
    target: &Target,
    upgrade: bool,
) -> Result<(http::Request<RequestBody>, Framing), Refusal> {
    let method = Method::from_bytes(request.method.as_bytes());
    let method = method.map_err(|_| Refusal::malformed("the request's method is none"))?;
    let mut outward = http::Request::new(Either::Left(Empty::new()));
    *outward.method_mut() = method;
    *outward.uri_mut() = target.path.parse().map_err(|_| Refusal::malformed("the request's path is none"))?;
    let headers = outward.headers_mut();
    let host = HeaderValue::from_str(&target.authority());
    headers.insert(header::HOST, host.map_err(|_| Refusal::malformed("the request's host is none"))?);
    for field in request.fields {
        let here = is_hop_by_hop(field.name, request.values("connection"));
        // The host is the target's, whatever the request says of it; the proxy has answered what was expected.
        if here || ["host", "expect", "content-length"].iter().any(|own| field.name.eq_ignore_ascii_case(own)) {
            continue;
        }
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(field.value)) else {
            return Err(Refusal::malformed("a header field has a name or value that is none"));
        };
        headers.append(name, value);
    }
    headers.append(header::VIA, HeaderValue::from_static("1.1 plugvisor"));
    if upgrade {
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    } else {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    match request.framing {
        Framing::Length(length) => drop(headers.insert(header::CONTENT_LENGTH, length.into())),
        Framing::Chunked => {
            headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        Framing::None if request.values("content-length").next().is_some() => {
            headers.insert(header::CONTENT_LENGTH, 0.into());
        }
        Framing::None => {}
    }
    Ok((outward, request.framing))
}

/// Takes a request's body and hands it on. A server that answers early and hears no more ends it; what is left is not read
/// then, and the connection not used again.
async fn pump(
    reader: &mut Reader,
    framing: Framing,
    pieces: mpsc::Sender<io::Result<Frame<Bytes>>>,
) -> Result<(), Refusal> {
    let broken = |error: io::Error| Refusal::malformed(&format!("the request's body ended early: {error}"));
    let result = match framing {
        Framing::None => Ok(()),
        Framing::Length(length) => pump_length(reader, length, &pieces).await.map_err(broken),
        Framing::Chunked => pump_chunks(reader, &pieces).await,
    };
    if result.is_err() {
        // So that the server does not take it for whole.
        let _ = pieces.send(Err(io::ErrorKind::UnexpectedEof.into())).await;
    }
    result
}

async fn pump_length(
    reader: &mut Reader,
    length: u64,
    pieces: &mpsc::Sender<io::Result<Frame<Bytes>>>,
) -> io::Result<()> {
    let mut left = length;
    while left > 0 {
        let piece = reader.some(left.min(PIECE)).await?;
        left = left.saturating_sub(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        if pieces.send(Ok(Frame::data(piece))).await.is_err() {
            // Never whole: whoever waits for this is told by the answer.
            std::future::pending::<()>().await;
        }
    }
    Ok(())
}

async fn pump_chunks(reader: &mut Reader, pieces: &mpsc::Sender<io::Result<Frame<Bytes>>>) -> Result<(), Refusal> {
    let broken = |error: io::Error| Refusal::malformed(&format!("the request's body ended early: {error}"));
    let ambiguous = || Refusal::framing(FramingError::Chunk);
    loop {
        let line = reader.line(LINE).await.map_err(broken)?.ok_or_else(ambiguous)?;
        let size = chunk_size(&line).map_err(Refusal::framing)?;
        if size == 0 {
            break;
        }
        pump_length(reader, size, pieces).await.map_err(broken)?;
        if !reader.line(0).await.map_err(broken)?.is_some_and(|line| line.is_empty()) {
            return Err(ambiguous());
        }
    }
    for _ in 0..TRAILERS {
        if reader.line(LINE).await.map_err(broken)?.ok_or_else(ambiguous)?.is_empty() {
            return Ok(());
        }
    }
    Err(ambiguous())
}

/// What the plugin can be answered.
#[derive(Clone, Copy)]
struct Shape {
    old: bool,
    head_only: bool,
    upgrade: bool,
}

enum Answered {
    /// With everything; `delimited` when the plugin sees its end without the connection's.
    Whole { delimited: bool },
    /// From here on it is a WebSocket.
    Upgraded(hyper::upgrade::OnUpgrade),
}

/// Hands the server's answer on.
async fn answer(
    writer: &mut OwnedWriteHalf,
    mut response: Response<Incoming>,
    shape: Shape,
    keep: bool,
    begun: &AtomicBool,
) -> Result<Answered, String> {
    let switching = response.status() == StatusCode::SWITCHING_PROTOCOLS;
    if switching && !shape.upgrade {
        return Err("it switched to a protocol that nobody asked for".to_owned());
    }
    let upgraded = switching.then(|| hyper::upgrade::on(&mut response));
    let status = response.status();
    let none = shape.head_only || switching || status == StatusCode::NO_CONTENT || status == StatusCode::NOT_MODIFIED;
    let length = response.body().size_hint().exact();
    let delimited = none || length.is_some() || !shape.old;
    let chunked = !none && length.is_none() && !shape.old;
    let mut head = Vec::with_capacity(512);
    let reason = status.canonical_reason().unwrap_or("Other");
    head.extend_from_slice(format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).as_bytes());
    let connection: Vec<Vec<u8>> =
        response.headers().get_all(header::CONNECTION).iter().map(|value| value.as_bytes().to_vec()).collect();
    for (name, value) in response.headers() {
        let here = is_hop_by_hop(name.as_str(), connection.iter().map(Vec::as_slice));
        // Of an answer without a body it says how long one would be, and stays.
        if here || (name == header::CONTENT_LENGTH && !none) {
            continue;
        }
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    match length {
        _ if none => {}
        Some(length) => head.extend_from_slice(format!("content-length: {length}\r\n").as_bytes()),
        None if chunked => head.extend_from_slice(b"transfer-encoding: chunked\r\n"),
        None => {}
    }
    head.extend_from_slice(if switching {
        b"connection: Upgrade\r\nupgrade: websocket\r\n\r\n".as_slice()
    } else if keep && delimited {
        b"\r\n"
    } else {
        b"connection: close\r\n\r\n"
    });
    begun.store(true, Ordering::Relaxed);
    let text = |error: io::Error| error.to_string();
    writer.write_all(&head).await.map_err(text)?;
    if let Some(upgraded) = upgraded {
        return Ok(Answered::Upgraded(upgraded));
    }
    let mut body = response.into_body();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| error.to_string())?;
        // Trailers are dropped.
        let Ok(data) = frame.into_data() else { continue };
        if data.is_empty() || none {
            continue;
        }
        if chunked {
            writer.write_all(format!("{:x}\r\n", data.len()).as_bytes()).await.map_err(text)?;
            writer.write_all(&data).await.map_err(text)?;
            writer.write_all(b"\r\n").await.map_err(text)?;
        } else {
            writer.write_all(&data).await.map_err(text)?;
        }
    }
    if chunked {
        writer.write_all(b"0\r\n\r\n").await.map_err(text)?;
    }
    Ok(Answered::Whole { delimited })
}
