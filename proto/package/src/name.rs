//! Names of plugins.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A plugin's name: 1 to 63 bytes of `a-z`, `0-9` and `-`, beginning with a letter and not ending with `-`.
///
/// The grammar is that of a DNS label (RFC 1035, section 2.3.1) in lower case, so that a name can stand in a path, a
/// cgroup, a metric label and a host name without being escaped.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PluginName(String);

/// Why a text is not a plugin name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a plugin name: {why}")]
pub struct PluginNameError {
    text: String,
    why: &'static str,
}

impl PluginName {
    /// The longest name, in bytes.
    pub const MAX_LEN: usize = 63;

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for PluginName {
    type Err = PluginNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes = text.as_bytes();
        let why = if bytes.is_empty() {
            "it is empty"
        } else if bytes.len() > Self::MAX_LEN {
            "it is longer than 63 bytes"
        } else if !bytes[0].is_ascii_lowercase() {
            "it must begin with a letter a-z"
        } else if bytes.ends_with(b"-") {
            "it must not end with '-'"
        } else if !bytes.iter().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-') {
            "only a-z, 0-9 and '-' are allowed"
        } else {
            return Ok(Self(text.to_owned()));
        };
        let text = text.chars().take(Self::MAX_LEN + 1).collect();
        Err(PluginNameError { text, why })
    }
}

impl TryFrom<String> for PluginName {
    type Error = PluginNameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<PluginName> for String {
    fn from(name: PluginName) -> Self {
        name.0
    }
}

impl AsRef<str> for PluginName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PluginName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::PluginName;

    #[test]
    fn the_grammar_is_held() {
        for good in ["a", "gallery", "a-1", &"a".repeat(63)] {
            assert_eq!(good.parse::<PluginName>().unwrap().as_str(), good);
        }
        for bad in ["", "A", "1a", "-a", "a-", "a_b", "a/b", "..", "a\0", "ä", &"a".repeat(64)] {
            assert!(bad.parse::<PluginName>().is_err(), "{bad:?} was accepted");
        }
    }
}
