//! What a plugin may be granted in the kernel.

use std::net::{Ipv4Addr, SocketAddrV4};

use plugvisor_package::Capability;
use serde::{Deserialize, Serialize};

/// Capabilities that open something in the kernel; the others are held by the broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grant {
    /// A sized, non-executable `/tmp`.
    WriteTemp,
    /// fork, vfork and clone without namespace flags.
    SpawnChild,
    /// TCP sockets in its own network namespace, where somebody listens at [`EGRESS`] and nothing else is: the supervisor,
    /// as a proxy.
    Egress,
    /// TCP sockets in its own network namespace, where it may listen at the ports of its manifest; the supervisor connects
    /// there with sockets that were made inside.
    TcpServer,
    /// The operator's variables.
    AccessEnv,
    /// Signals to others in its own PID namespace: its children.
    SignalHandling,
    /// Its configuration directory, read-only.
    ReadConfig,
    /// Its data directory, read-only.
    ReadData,
    /// Its data directory.
    WriteData,
}

impl Grant {
    /// Every grant.
    pub const ALL: [Self; 9] = [
        Self::WriteTemp,
        Self::SpawnChild,
        Self::Egress,
        Self::TcpServer,
        Self::AccessEnv,
        Self::SignalHandling,
        Self::ReadConfig,
        Self::ReadData,
        Self::WriteData,
    ];

    /// What a capability opens in the kernel; `None` for those that the supervisor holds alone.
    #[must_use]
    pub const fn of(capability: Capability) -> Option<Self> {
        match capability {
            Capability::WriteTemp => Some(Self::WriteTemp),
            Capability::SpawnChild => Some(Self::SpawnChild),
            Capability::HttpClient | Capability::WebSocket | Capability::DnsResolve => Some(Self::Egress),
            Capability::TcpServer => Some(Self::TcpServer),
            Capability::AccessEnv => Some(Self::AccessEnv),
            Capability::SignalHandling => Some(Self::SignalHandling),
            Capability::ReadConfig => Some(Self::ReadConfig),
            Capability::ReadData => Some(Self::ReadData),
            Capability::WriteData => Some(Self::WriteData),
            _ => None,
        }
    }

    /// Whether it opens something that belongs to a plugin's name, and so only to a bundle that an administrator approved
    /// under that name.
    #[must_use]
    pub const fn is_of_name(self) -> bool {
        match self {
            Self::AccessEnv | Self::ReadConfig | Self::ReadData | Self::WriteData => true,
            Self::WriteTemp | Self::SpawnChild | Self::Egress | Self::TcpServer | Self::SignalHandling => false,
        }
    }

    /// What these capabilities open, each once: several of them open the way to the proxy.
    #[must_use]
    pub fn of_all(capabilities: impl IntoIterator<Item = Capability>) -> Vec<Self> {
        let mut grants = Vec::new();
        for grant in capabilities.into_iter().filter_map(Self::of) {
            if !grants.contains(&grant) {
                grants.push(grant);
            }
        }
        grants
    }
}

/// Where the egress proxy is reached inside the network namespace of a launch with [`Grant::Egress`].
pub const EGRESS: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 3128);

/// The most sockets by which one plugin is connected to.
pub const MAX_INWARD: u16 = 256;
