//! Why the proxy did not do what it was asked, as an HTTP answer: a status, a stable reason for programs, and for people
//! what, why and the fix.

use std::time::Duration;

use plugvisor_core::{
    egress::{AddressKind, FramingError, HeadError, NotListed, TargetError},
    policy::Lack,
};
use plugvisor_package::{DestinationError, Host};

/// An answer of the proxy's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: u16,
    /// In `snake_case`; one of a closed set.
    pub(super) reason: &'static str,
    pub(super) message: String,
    /// Empty when there is nothing to do. For operators; for the plugin too, unless there is another one for it.
    pub(super) hint: String,
    /// What the plugin is told in its place: without what only operators may know.
    pub(super) hint_for_plugin: Option<String>,
}

impl Refusal {
    fn new(status: u16, reason: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { status, reason, message: message.into(), hint: hint.into(), hint_for_plugin: None }
    }

    /// Whether it is the plugin's doing or the operator's will, and not a server's failure.
    pub(super) const fn is_denial(&self) -> bool {
        !matches!(self.status, 502 | 504)
    }

    pub(super) fn not_listed(host: &Host, port: u16, why: NotListed, plugin: &str) -> Self {
        let (by, hint) = match why {
            NotListed::ByManifest => (
                "its manifest does not list it",
                format!("add \"{host}:{port}\" to runtime.network.egress in its plugin.json"),
            ),
            NotListed::ByOperator => (
                "the operator's list lacks it",
                format!("the operator may add \"{host}:{port}\" to egress in [plugin.{plugin}.network]"),
            ),
        };
        Self::new(403, "not_listed", format!("the plugin may not reach {host}:{port}: {by}"), hint)
    }

    pub(super) fn name_not_listed(host: &Host) -> Self {
        let message = format!("the plugin may not ask for {host}: no destination of its list has this host");
        Self::new(403, "not_listed", message, format!("list {host} with a port in runtime.network.egress"))
    }

    pub(super) fn address(host: &Host, address: std::net::IpAddr, kind: AddressKind, plugin: &str) -> Self {
        let message = match host {
            Host::Address(_) => format!("{address} is {}, which plugins may not reach", kind.describe()),
            Host::Name(_) => format!("{host} is {address}, {}, which plugins may not reach", kind.describe()),
        };
        let hint = format!("if it is meant, the operator adds \"{address}\" to addresses in [plugin.{plugin}.network]");
        Self::new(403, "address_refused", message, hint)
    }

    pub(super) fn capability(what: &str, lack: &Lack, plugin: &str) -> Self {
        let (needed, why) = (lack.capability, lack.why());
        let message = format!("the plugin may not do this: {what} needs the capability {needed}, and {why}");
        let hint_for_plugin = Some(lack.hint_for_plugin(plugin));
        Self { hint_for_plugin, ..Self::new(403, "capability_missing", message, lack.hint(plugin)) }
    }

    pub(super) fn head(error: HeadError) -> Self {
        match error {
            HeadError::TooLong | HeadError::TooManyFields => {
                Self::new(431, "head_too_large", error.to_string(), "send fewer and shorter header fields")
            }
            HeadError::LineEnd | HeadError::Folded | HeadError::Control | HeadError::Empty => {
                Self::new(400, "malformed", error.to_string(), "use an HTTP library that follows RFC 9112")
            }
        }
    }

    pub(super) fn malformed(why: &str) -> Self {
        Self::new(400, "malformed", why, "use an HTTP library that follows RFC 9112")
    }

    pub(super) fn version() -> Self {
        Self::new(
            505,
            "version",
            "only HTTP/1.0 and HTTP/1.1 are spoken to the proxy",
            "any version passes in a tunnel",
        )
    }

    pub(super) fn head_late(after: Duration) -> Self {
        let message = format!("the request's head was not complete after {} ms", after.as_millis());
        Self::new(408, "head_timeout", message, "send a head at once")
    }

    pub(super) fn framing(error: FramingError) -> Self {
        let message = format!("{error}: where it ends could be understood in two ways");
        Self::new(400, "ambiguous_body", message, "use an HTTP library that follows RFC 9112")
    }

    pub(super) fn destination(error: DestinationError) -> Self {
        Self::new(400, "malformed", format!("the request's target {error}"), "ask with CONNECT host:port")
    }

    pub(super) fn target(error: TargetError) -> Self {
        Self::new(400, "malformed", error.to_string(), "use the proxy as HTTP_PROXY and HTTPS_PROXY say")
    }

    pub(super) fn too_many_connections(most: usize) -> Self {
        let message = format!("the plugin has {most} connections, or all plugins together have too many");
        Self::new(503, "too_many_connections", message, "reuse connections, and close those that are done")
    }

    pub(super) fn lookup(host: &Host, why: &str) -> Self {
        Self::new(
            502,
            "lookup_failed",
            format!("{host} was not found: {why}"),
            "check the name and the host's resolver",
        )
    }

    pub(super) fn lookup_late(host: &Host, after: Duration) -> Self {
        let message = format!("{host} was not found within {} ms", after.as_millis());
        Self::new(504, "lookup_timeout", message, "check the host's resolver")
    }

    pub(super) fn connect(host: &Host, port: u16, why: &str) -> Self {
        Self::new(502, "connect_failed", format!("{host}:{port} could not be reached: {why}"), "check the destination")
    }

    pub(super) fn connect_late(host: &Host, port: u16, after: Duration) -> Self {
        let message = format!("{host}:{port} did not answer within {} ms", after.as_millis());
        Self::new(504, "connect_timeout", message, "check the destination")
    }

    pub(super) fn server(host: &Host, why: &str) -> Self {
        Self::new(
            502,
            "server_failed",
            format!("{host} did not answer as HTTP demands: {why}"),
            "check the destination",
        )
    }

    pub(super) fn server_late(host: &Host, after: Duration) -> Self {
        let message = format!("nothing came from or went to {host} for {} ms", after.as_millis());
        Self::new(504, "idle", message, "check the destination")
    }

    /// The answer; to a HEAD without its body.
    pub(super) fn to_bytes(&self, head_only: bool) -> Vec<u8> {
        let Self { status, reason, message, hint, hint_for_plugin } = self;
        let hint = hint_for_plugin.as_ref().unwrap_or(hint);
        let name = http::StatusCode::from_u16(*status).ok().and_then(|status| status.canonical_reason()).unwrap_or("");
        let mut body = format!("plugvisor egress proxy: {message}");
        if !hint.is_empty() {
            body.push_str(": ");
            body.push_str(hint);
        }
        body.push('\n');
        let length = body.len();
        if head_only {
            body.clear();
        }
        format!(
            "HTTP/1.1 {status} {name}\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: {length}\r\n\
             plugvisor-reason: {reason}\r\nconnection: close\r\n\r\n{body}"
        )
        .into_bytes()
    }
}
