//! What a request to a proxy is for: `http://host:port/path`, the absolute form of RFC 9112, section 3.2.2.

use std::fmt;

use plugvisor_package::Host;

/// The target of a plain request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The host.
    pub host: Host,
    /// The port.
    pub port: u16,
    /// The path and query, as the server gets it; begins with `/`.
    pub path: String,
}

/// Why a target is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetError {
    /// No scheme: a request as for a server.
    NotAbsolute,
    /// `https://`, for which a client opens a tunnel.
    Https,
    /// Another scheme.
    Scheme,
    /// No host, or one that does not fit the grammar.
    Host,
    /// A name and password before the host.
    UserInfo,
}

impl fmt::Display for TargetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotAbsolute => {
                "the request does not say to which host it goes; a proxy is asked for http://host/path"
            }
            Self::Https => "https:// goes through a tunnel; ask the proxy with CONNECT host:port",
            Self::Scheme => "only http:// and, through CONNECT, any protocol over TCP are proxied",
            Self::Host => "the request's host is no host name or address",
            Self::UserInfo => "the request has a user's name in its target; send it as Authorization",
        })
    }
}

impl std::error::Error for TargetError {}

/// Reads the absolute form.
///
/// # Errors
///
/// When it is not exactly that.
pub fn absolute_form(text: &str) -> Result<Target, TargetError> {
    let Some((scheme, rest)) = text.split_once("://").filter(|(scheme, _)| !scheme.contains(['/', '?', '#'])) else {
        return Err(TargetError::NotAbsolute);
    };
    if scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("wss") {
        return Err(TargetError::Https);
    }
    if !scheme.eq_ignore_ascii_case("http") && !scheme.eq_ignore_ascii_case("ws") {
        return Err(TargetError::Scheme);
    }
    let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(end);
    if authority.contains('@') {
        return Err(TargetError::UserInfo);
    }
    let after_address = authority.rfind(']').map_or(0, |at| at + 1);
    let (host, port) = match authority[after_address..].split_once(':') {
        Some((name, port)) => (&authority[..after_address + name.len()], port),
        None => (authority, "80"),
    };
    let digits = (1..=5).contains(&port.len()) && port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|port| *port > 0 && digits).ok_or(TargetError::Host)?;
    let host = host.parse().map_err(|_| TargetError::Host)?;
    let path = path.split_once('#').map_or(path, |(path, _)| path);
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
    Ok(Target { host, port, path })
}

impl Target {
    /// As a Host field says it.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.port == 80 { self.host.to_string() } else { format!("{}:{}", self.host, self.port) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_taken_apart() {
        for (text, authority, path) in [
            ("http://example.com", "example.com", "/"),
            ("HTTP://Example.com:80/a?b#c", "example.com", "/a?b"),
            ("http://example.com:8080?x=://y", "example.com:8080", "/?x=://y"),
            ("http://[2001:db8::1]/x", "[2001:db8::1]", "/x"),
            ("http://[2001:db8::1]:81/x", "[2001:db8::1]:81", "/x"),
            ("ws://a.example/chat", "a.example", "/chat"),
        ] {
            let target = absolute_form(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!((target.authority().as_str(), target.path.as_str()), (authority, path), "{text}");
        }
        for (text, error) in [
            ("/path", TargetError::NotAbsolute),
            ("*", TargetError::NotAbsolute),
            ("example.com:80", TargetError::NotAbsolute),
            ("/x?http://a/", TargetError::NotAbsolute),
            ("https://example.com/", TargetError::Https),
            ("ftp://example.com/", TargetError::Scheme),
            ("http://user:pass@example.com/", TargetError::UserInfo),
            ("http://listed.example@evil.example/", TargetError::UserInfo),
            ("http://", TargetError::Host),
            ("http:///x", TargetError::Host),
            ("http://a:0/", TargetError::Host),
            ("http://a:/", TargetError::Host),
            ("http://a:80:80/", TargetError::Host),
            ("http://127.1/", TargetError::Host),
            ("http://a\\@b/", TargetError::UserInfo),
            ("http://a\\b/", TargetError::Host),
            ("http://[::1/", TargetError::Host),
            ("http://[::1]x/", TargetError::Host),
            ("http://a%2eb/", TargetError::Host),
        ] {
            assert_eq!(absolute_form(text), Err(error), "{text}");
        }
    }
}
