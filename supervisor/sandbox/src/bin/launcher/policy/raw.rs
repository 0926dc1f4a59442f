//! The file's tables as they are written. Every key is optional here; what is missing is told by `rules`.

use std::path::PathBuf;

use ed25519_dalek::VerifyingKey;
use plugvisor_package::{Digest, PluginName, TrustTier};
use plugvisor_sandbox::tables::Table;
use serde::{Deserialize, de::IgnoredAny};

use super::Wall;
use crate::expiry::Expiry;

/// Directories.
const PATH: &str = "a whole path in text, such as \"/srv/plugins\"";
/// Tiers. No word is suggested for another: these decide over trust.
const TIER: &str = "\"internal\", \"verified\", \"community\", \"untrusted\" or \"quarantined\"";
/// Walls.
const WALL: &str = "a level: \"none\", \"process\", \"container\", \"sandbox\" or \"vm\"";
/// Plugins.
const NAME: &str = "a plugin's name in text, with lower-case letters, digits and dashes, such as \"gallery\"";
/// Ends.
const EXPIRES: &str = "a date, or a moment with its offset, without quotes, such as 2027-01-31 or 2027-01-31T12:00:00Z";

/// What stands in no table, and the names of the tables, which are read by themselves.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    /// 1. Required.
    pub(super) version: Option<u32>,
    /// Replaces `--uid-range`; read at the start only.
    pub(super) uid_range: Option<String>,
    /// Replaces `--cgroup-root`; read at the start only.
    pub(super) cgroup_root: Option<String>,
    /// Replaces `--config-root`; read at the start only.
    pub(super) config_root: Option<PathBuf>,
    /// Replaces `--data-root`; read at the start only.
    pub(super) data_root: Option<PathBuf>,
    pub(super) weakest: Option<IgnoredAny>,
    pub(super) directory: Option<IgnoredAny>,
    pub(super) approved: Option<IgnoredAny>,
    pub(super) key: Option<IgnoredAny>,
    pub(super) environment: Option<IgnoredAny>,
    pub(super) vm: Option<IgnoredAny>,
}

impl Table for File {
    fn takes(key: &str) -> &'static str {
        match key {
            "version" => "the number 1",
            "uid_range" => "two numbers in text, without 0 and 65534 between them, such as \"1879048192-1879113727\"",
            "cgroup_root" => "one name in text of letters, digits, '-', '_' and '.', such as \"plugvisor\"",
            "config_root" => "a whole path in text, such as \"/etc/plugvisor/plugins\"",
            "data_root" => "a whole path in text, such as \"/var/lib/plugvisor/data\"",
            _ => "",
        }
    }
}

/// `[weakest]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Weakest {
    pub(super) internal: Option<Wall>,
    pub(super) verified: Option<Wall>,
    pub(super) community: Option<Wall>,
    pub(super) untrusted: Option<Wall>,
}

impl Table for Weakest {
    fn takes(_: &str) -> &'static str {
        WALL
    }
}

/// `[[directory]]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Directory {
    pub(super) path: Option<PathBuf>,
    pub(super) tier: Option<TrustTier>,
}

impl Table for Directory {
    fn takes(key: &str) -> &'static str {
        match key {
            "path" => PATH,
            "tier" => TIER,
            _ => "",
        }
    }
}

/// `[[approved]]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Approved {
    pub(super) name: Option<PluginName>,
    pub(super) tier: Option<TrustTier>,
    pub(super) digest: Option<Digest>,
    pub(super) expires: Option<Expiry>,
}

impl Table for Approved {
    fn takes(key: &str) -> &'static str {
        match key {
            "name" => NAME,
            "tier" => TIER,
            "digest" => {
                "a bundle's digest in text, \"sha256:\" and 64 lower-case hexadecimal digits, such as \
                 `plugvisor plugin validate BUNDLE` prints"
            }
            "expires" => EXPIRES,
            _ => "",
        }
    }
}

/// `[[key]]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Key {
    pub(super) id: Option<String>,
    #[serde(deserialize_with = "public_key")]
    pub(super) public_key: Option<VerifyingKey>,
    pub(super) tier: Option<TrustTier>,
    pub(super) expires: Option<Expiry>,
}

impl Table for Key {
    fn takes(key: &str) -> &'static str {
        match key {
            "id" => "the key's name in text, such as \"ops\"",
            "public_key" => {
                "an Ed25519 public key in text, 64 lower-case hexadecimal digits, such as `plugvisor approve --new-key FILE` \
                 prints"
            }
            "tier" => TIER,
            "expires" => EXPIRES,
            _ => "",
        }
    }
}

/// `[[environment]]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Environment {
    pub(super) plugin: Option<PluginName>,
    pub(super) variables: Option<Vec<String>>,
}

impl Table for Environment {
    fn takes(key: &str) -> &'static str {
        match key {
            "plugin" => NAME,
            "variables" => "a list of names of variables, such as [\"TZ\"]",
            _ => "",
        }
    }
}

fn public_key<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<VerifyingKey>, D::Error> {
    let text = String::deserialize(deserializer)?;
    // The grammar of a digest is that of 32 bytes in hexadecimal.
    let bytes: Result<Digest, _> = format!("sha256:{text}").parse();
    let key = bytes.ok().and_then(|bytes| VerifyingKey::from_bytes(bytes.as_bytes()).ok());
    key.filter(|key| !key.is_weak()).map(Some).ok_or_else(|| serde::de::Error::custom("no point that signs"))
}

#[cfg(test)]
mod tests {
    use plugvisor_sandbox::tables::silent_keys;

    use super::*;
    use crate::machine::RawSettings;

    /// They are read by themselves.
    const TABLES: [&str; 6] = ["weakest", "directory", "approved", "key", "environment", "vm"];

    #[test]
    fn every_key_says_what_it_takes() {
        let silent = [
            silent_keys::<File>(&TABLES),
            silent_keys::<Weakest>(&TABLES),
            silent_keys::<Directory>(&TABLES),
            silent_keys::<Approved>(&TABLES),
            silent_keys::<Key>(&TABLES),
            silent_keys::<Environment>(&TABLES),
            silent_keys::<RawSettings>(&TABLES),
        ];
        assert_eq!(silent.concat(), Vec::<&str>::new());
    }
}
