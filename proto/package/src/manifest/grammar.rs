//! The texts of a manifest that have a grammar, each parsed into a type of its own.
//!
//! This module judges one text at a time; it does not know the manifest around it.

use std::str::FromStr;

use semver::VersionReq;

use super::Dependency;
use crate::{DestinationError, Digest, PluginName, json::Excerpt};

/// Why a text does not fit its grammar.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

fn refuse<T>(text: &str, why: &str) -> Result<T, GrammarError> {
    Err(GrammarError(format!("{} {why}", Excerpt(text))))
}

macro_rules! grammar {
    ($($(#[doc = $doc:literal])+ $name:ident($text:ident) $check:block)+) => {$(
        $(#[doc = $doc])+
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) struct $name(pub(crate) String);

        impl FromStr for $name {
            type Err = GrammarError;

            fn from_str($text: &str) -> Result<Self, GrammarError> {
                match $check {
                    Some(why) => refuse($text, why),
                    None => Ok(Self($text.to_owned())),
                }
            }
        }
    )+};
}

grammar! {
    /// A text that a table or a log line can show: not empty, no control characters.
    SingleLine(text) {
        if text.trim().is_empty() {
            Some("is empty")
        } else if text.chars().any(char::is_control) {
            Some("has a control character or a line break")
        } else {
            None
        }
    }

    /// A file's path below the bundle: no root, no empty, `.` or `..` component.
    BundlePath(text) {
        if text.is_empty() {
            Some("is empty")
        } else if text.starts_with('/') {
            Some("is absolute; paths are relative to the bundle")
        } else if text.chars().any(char::is_control) {
            Some("has a control character")
        } else if text.split('/').any(|part| matches!(part, "" | "." | "..")) {
            Some("has an empty, \".\" or \"..\" component")
        } else {
            None
        }
    }

    /// A service's name, `package.Service` or `Service` (protobuf's grammar).
    ServiceName(text) {
        let part = |part: &str| {
            let mut bytes = part.bytes();
            bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
                && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        if text.len() > 255 {
            Some("is longer than 255 bytes")
        } else if text.contains('/') {
            Some("is not a service; a service is written without a method, as package.Service")
        } else if !text.split('.').all(part) {
            Some("is not the name of a service, such as package.Service")
        } else {
            None
        }
    }

    /// A host module's name.
    HostModule(text) {
        let head = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic());
        let fits = head && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        (!fits).then_some("is not the name of a host module, such as DatabaseModule")
    }

    /// A token: it travels as metadata, so visible ASCII without separators.
    Token(text) {
        let head = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        let fits = head && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte));
        if text.len() > 128 {
            Some("is longer than 128 bytes")
        } else if !fits {
            Some("is not a token: letters, digits and . _ : - after a letter or digit")
        } else {
            None
        }
    }

    /// A CloudEvents type in the author's own domain.
    EventType(text) {
        let part = |part: &str| {
            let letters = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
            !part.is_empty() && part.bytes().all(letters)
        };
        let head = text.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
        if text.len() > 128 {
            Some("is longer than 128 bytes")
        } else if !head || !text.contains('.') || !text.split('.').all(part) {
            Some("is not an event type, such as com.example.page.made")
        } else if text == "io.plugvisor" || text.starts_with("io.plugvisor.") {
            Some("is reserved for the host's own events")
        } else {
            None
        }
    }
}

impl FromStr for Destination {
    type Err = GrammarError;

    fn from_str(text: &str) -> Result<Self, GrammarError> {
        text.parse().map(Self).or_else(|why: DestinationError| refuse(text, &why.to_string()))
    }
}

/// A destination, `host:port`, whose grammar requests share.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Destination(pub(crate) crate::Destination);

/// The hash of the content digest, without its algorithm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChecksumHash(pub(crate) Digest);

impl FromStr for ChecksumHash {
    type Err = GrammarError;

    fn from_str(text: &str) -> Result<Self, GrammarError> {
        match format!("sha256:{text}").parse() {
            Ok(digest) => Ok(Self(digest)),
            Err(_) => refuse(text, "is not a SHA-256 hash: 64 lower-case hexadecimal digits"),
        }
    }
}

impl FromStr for Dependency {
    type Err = GrammarError;

    fn from_str(text: &str) -> Result<Self, GrammarError> {
        let (name, range) = match text.split_once('@') {
            Some((name, range)) => (name, Some(range)),
            None => (text, None),
        };
        let name = name.parse::<PluginName>().map_err(|error| GrammarError(error.to_string()))?;
        let range = match range {
            None => VersionReq::STAR,
            Some(range) => match range.parse() {
                Ok(range) => range,
                Err(error) => return refuse(range, &format!("is not a range of versions: {error}")),
            },
        };
        Ok(Self { name, range })
    }
}
