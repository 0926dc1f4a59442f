//! Names without connections (`network:dns-resolve`): `GET http://resolver.plugvisor/?name=HOST` answers with the addresses
//! that the host's resolver gives, for listed names, and only those that the plugin's rules let through.

use plugvisor_core::egress::{Framing, Target};
use plugvisor_package::{Capability, Host};

use super::{Proxy, connection::Request, refusal::Refusal};

/// The host that the proxy answers for itself; there is no such domain.
pub(super) const HOST: &str = "resolver.plugvisor";

impl Proxy {
    /// The whole answer.
    pub(super) async fn answer_name(&self, request: &Request<'_>, target: &Target) -> Result<Vec<u8>, Refusal> {
        if !self.rules.rights.hold(Capability::DnsResolve) {
            return Err(self.lacks("resolving a name", Capability::DnsResolve));
        }
        let name = target.path.strip_prefix("/?name=").filter(|_| target.port == 80);
        let (Some(name), "GET", Framing::None) = (name, request.method, request.framing) else {
            return Err(Refusal::malformed("names are asked for by GET http://resolver.plugvisor/?name=HOST"));
        };
        let host: Host = name.parse().map_err(Refusal::destination)?;
        if !self.rules.allow.names(&host) {
            return Err(Refusal::name_not_listed(&host));
        }
        let addresses = self.addresses(&host).await?;
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        let body = serde_json::json!({ "name": host.to_string(), "addresses": addresses }).to_string();
        let length = body.len();
        Ok(format!(
            "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
        )
        .into_bytes())
    }
}
