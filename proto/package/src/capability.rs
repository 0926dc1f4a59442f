//! What a plugin may ask for.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

macro_rules! capabilities {
    ($($(#[$doc:meta])* $variant:ident = $text:literal),+ $(,)?) => {
        /// One capability, written `category:name`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        pub enum Capability {
            $($(#[$doc])* #[serde(rename = $text)] $variant),+
        }

        impl Capability {
            /// Every capability, in the order of their categories.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The names of all, in the same order.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The capability as the manifest writes it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text),+
                }
            }
        }
    };
}

capabilities! {
    /// Call listed hosts over HTTP, through the egress proxy.
    HttpClient = "network:http-client",
    /// Keep WebSocket connections to listed hosts, through the egress proxy.
    WebSocket = "network:websocket",
    /// Accept TCP connections that the supervisor forwards inward.
    TcpServer = "network:tcp-server",
    /// Resolve listed host names.
    DnsResolve = "network:dns-resolve",
    /// Read its configuration directory.
    ReadConfig = "filesystem:read-config",
    /// Read its data directory.
    ReadData = "filesystem:read-data",
    /// Write its data directory.
    WriteData = "filesystem:write-data",
    /// Write a sized, non-executable temporary directory.
    WriteTemp = "filesystem:write-temp",
    /// Start child processes.
    SpawnChild = "process:spawn-child",
    /// See the operator's environment for it, beyond `PLUGVISOR_*` and the locale.
    AccessEnv = "process:access-env",
    /// Send signals to its own children.
    SignalHandling = "process:signal-handling",
    /// Read the host's database module.
    DatabaseReadOnly = "database:read-only",
    /// Read and write the host's database module.
    DatabaseReadWrite = "database:read-write",
    /// Administer the host's database module.
    DatabaseAdmin = "database:admin",
    /// Call other plugins.
    InternalCalls = "api:internal-calls",
    /// Call services outside the host through a host module.
    ExternalApi = "api:external-api",
    /// Call the admin service.
    SystemAdmin = "api:system-admin",
    /// Publish the events that the manifest declares.
    PublishEvents = "api:publish-events",
    /// Receive events.
    SubscribeEvents = "api:subscribe-events",
    /// Use the host's cryptography module.
    CryptoOperations = "security:crypto-operations",
    /// Authenticate users.
    UserAuth = "security:user-auth",
    /// Issue and check tokens.
    TokenManagement = "security:token-management",
    /// Read the secrets granted to it.
    ReadSecrets = "security:read-secrets",
}

impl Capability {
    /// What may be written in place of a text that names none: every capability of its category, and never a guess, which
    /// could be another grant than the one that is meant.
    #[must_use]
    pub fn allowed_for(text: &str) -> String {
        let category = |name: &'static str| name.split_once(':').map_or(name, |(category, _)| category);
        let meant = text.split_once(':').map_or(text, |(category, _)| category);
        let beside: Vec<&str> = Self::NAMES.iter().copied().filter(|name| category(name) == meant).collect();
        if beside.is_empty() {
            let mut categories: Vec<&str> = Self::NAMES.iter().copied().map(category).collect();
            categories.dedup();
            return format!("written category:name, with one of {} as the category", categories.join(", "));
        }
        format!("one of {}", beside.join(", "))
    }
}

/// A text that names no capability.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a capability")]
pub struct CapabilityError(String);

impl FromStr for Capability {
    type Err = CapabilityError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let known = Self::ALL.iter().find(|capability| capability.as_str() == text);
        known.copied().ok_or_else(|| CapabilityError(text.chars().take(64).collect()))
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::Capability;

    #[test]
    fn what_may_be_written_is_listed_and_not_guessed() {
        let database = "one of database:read-only, database:read-write, database:admin";
        assert_eq!(Capability::allowed_for("database:write"), database);
        assert_eq!(Capability::allowed_for("database"), database);
        let categories = "network, filesystem, process, database, api, security";
        assert!(Capability::allowed_for("net:http").contains(categories));
    }
}
