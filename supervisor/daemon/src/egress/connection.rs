//! One connection of the plugin: request after request, each judged as if it were the first.

use std::sync::Arc;

use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use plugvisor_core::egress::{Framing, Target, absolute_form, head_end};
use plugvisor_package::{Capability, Host, host_and_port};
use tokio::net::TcpStream;

use super::{
    EgressLimits, Proxy,
    client::{Client, NoHead},
    forward, names,
    refusal::Refusal,
    tunnel,
};
use crate::meter::Activity;

/// The most fields that a parser is given room for.
const MOST_FIELDS: usize = 128;

/// A request, taken apart and not judged yet.
pub(super) struct Request<'h> {
    pub(super) method: &'h str,
    pub(super) aim: Aim,
    /// HTTP/1.0.
    pub(super) old: bool,
    pub(super) fields: &'h [httparse::Header<'h>],
    pub(super) framing: Framing,
}

/// What a request is for.
pub(super) enum Aim {
    /// CONNECT.
    Tunnel(Host, u16),
    /// Anything else.
    Plain(Target),
}

/// What follows an answer.
pub(super) enum After {
    Next,
    Close,
    /// The connection is a WebSocket from here on.
    Carry(TokioIo<Upgraded>, Arc<Activity>),
}

/// Serves a connection to its end.
pub(super) async fn serve(proxy: &Proxy, stream: TcpStream) {
    let mut client = Client::new(stream);
    let mut first = true;
    loop {
        let head = match client.reader.head(&proxy.host.limits, first).await {
            Ok(head) => head,
            Err(NoHead::Over) => return,
            Err(NoHead::Refused(refusal)) => {
                proxy.deny("", &refusal);
                return client.refuse(&refusal, false).await;
            }
        };
        first = false;
        let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
        let request = match read(&head, &mut fields) {
            Ok(request) => request,
            Err(refusal) => {
                proxy.deny("", &refusal);
                return client.refuse(&refusal, false).await;
            }
        };
        let (name, head_only) = (request.destination(), request.method == "HEAD");
        let refused = match &request.aim {
            Aim::Tunnel(host, port) => match proxy.open(host, *port).await {
                Ok(server) => return tunnel::run(proxy, client, server).await,
                Err(refusal) => refusal,
            },
            Aim::Plain(target) if target.host.to_string() == names::HOST => {
                match proxy.answer_name(&request, target).await {
                    Ok(answer) => return client.answer(&answer).await,
                    Err(refusal) => refusal,
                }
            }
            Aim::Plain(target) => match forward::run(proxy, &mut client, &request, target).await {
                Ok(After::Next) => continue,
                Ok(After::Close) => return,
                Ok(After::Carry(server, activity)) => return tunnel::carry(proxy, client, server, &activity).await,
                Err(refusal) => refusal,
            },
        };
        if refused.is_denial() {
            proxy.deny(&name, &refused);
        }
        return client.refuse(&refused, head_only).await;
    }
}

impl Request<'_> {
    /// Where it goes, for people.
    fn destination(&self) -> String {
        match &self.aim {
            Aim::Tunnel(host, port) => format!("{host}:{port}"),
            Aim::Plain(target) => format!("{}:{}", target.host, target.port),
        }
    }

    /// The values of all fields of this name.
    pub(super) fn values<'r>(&'r self, name: &'r str) -> impl Iterator<Item = &'r [u8]> {
        self.fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
    }

    /// Whether a list of tokens in these fields has this one.
    pub(super) fn has_token(&self, name: &str, token: &str) -> bool {
        let mut tokens = self.values(name).flat_map(|value| value.split(|byte| *byte == b',')).map(<[u8]>::trim_ascii);
        tokens.any(|found| found.eq_ignore_ascii_case(token.as_bytes()))
    }
}

/// Takes a head apart, whose lines were checked.
fn read<'h>(head: &'h [u8], fields: &'h mut [httparse::Header<'h>; MOST_FIELDS]) -> Result<Request<'h>, Refusal> {
    let mut parsed = httparse::Request::new(fields);
    match parsed.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(httparse::Status::Complete(_) | httparse::Status::Partial) => {
            return Err(Refusal::malformed("the request's head ends before its empty line"));
        }
        Err(httparse::Error::Version) => return Err(Refusal::version()),
        Err(error) => return Err(Refusal::malformed(&format!("the request's head is no HTTP: {error}"))),
    }
    let httparse::Request { method: Some(method), path: Some(path), version: Some(version), headers } = parsed else {
        return Err(Refusal::malformed("the request's first line is not whole"));
    };
    let old = version == 0;
    let fields: &'h [httparse::Header<'h>] = headers;
    let framing = Framing::of(fields.iter().map(|field| (field.name, field.value)), old).map_err(Refusal::framing)?;
    let aim = if method == "CONNECT" {
        if framing != Framing::None {
            return Err(Refusal::malformed("a CONNECT has no body"));
        }
        let (host, port) = host_and_port(path).map_err(Refusal::destination)?;
        Aim::Tunnel(host, port)
    } else {
        Aim::Plain(absolute_form(path).map_err(Refusal::target)?)
    };
    Ok(Request { method, aim, old, fields, framing })
}

/// A request as the proxy understands it before it judges it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Understood {
    /// How many bytes its head has.
    pub head: usize,
    /// Its method.
    pub method: String,
    /// Where it goes.
    pub host: Host,
    /// To which port.
    pub port: u16,
    /// How its body is framed.
    pub framing: Framing,
}

/// What the proxy makes of the first bytes of a connection; `None` when it waits for more.
///
/// # Errors
///
/// In words, when it refuses them.
pub fn understand(bytes: &[u8]) -> Result<Option<Understood>, String> {
    let said = |refusal: Refusal| format!("{} {}: {}", refusal.status, refusal.reason, refusal.message);
    let limits = EgressLimits::default().head;
    let Some(end) = head_end(bytes, limits).map_err(|error| said(Refusal::head(error)))? else { return Ok(None) };
    let mut fields = [httparse::EMPTY_HEADER; MOST_FIELDS];
    let Request { method, aim, old: _, fields: _, framing } = read(&bytes[..end], &mut fields).map_err(said)?;
    let (host, port) = match aim {
        Aim::Tunnel(host, port) => (host, port),
        Aim::Plain(target) => (target.host, target.port),
    };
    Ok(Some(Understood { head: end, method: method.to_owned(), host, port, framing }))
}

impl Proxy {
    /// Opens a tunnel's far end.
    async fn open(&self, host: &Host, port: u16) -> Result<TcpStream, Refusal> {
        let rights = &self.rules.rights;
        if !rights.hold(Capability::HttpClient) && !rights.hold(Capability::WebSocket) {
            return Err(self.lacks("a tunnel", Capability::HttpClient));
        }
        self.judge(host, port)?;
        self.dial(host, port).await
    }

    /// The refusal for want of a capability.
    pub(super) fn lacks(&self, what: &str, needed: Capability) -> Refusal {
        Refusal::capability(what, &self.rules.rights.lack(needed), self.plugin())
    }

    /// Whose proxy it is.
    pub(super) fn plugin(&self) -> &str {
        self.subject.plugin().unwrap_or_default()
    }

    /// Whether a destination is listed.
    pub(super) fn judge(&self, host: &Host, port: u16) -> Result<(), Refusal> {
        self.rules.allow.judge(host, port).map_err(|why| Refusal::not_listed(host, port, why, self.plugin()))
    }
}
