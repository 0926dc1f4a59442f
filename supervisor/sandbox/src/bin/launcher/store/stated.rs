//! What a bundle's manifest fixes of every launch from it: what is executed and how, and the bounds of what may be asked
//! for. The child that parses the manifest tells it, the store keeps it with the bundle, and no supervisor is asked.

use std::collections::BTreeMap;

use plugvisor_package::{Capability, Manifest, SocketMode as Asked};
use plugvisor_sandbox::protocol::{Grant, Level, SocketMode, Tier};
use serde::{Deserialize, Serialize};

/// The most that it may take, in bytes: with what else a launch needs it fits into one message to a child.
pub(super) const MOST: usize = 56 << 10;

/// What a manifest fixes. What is added here makes bundles of an older store be imported anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stated {
    /// The path of the program in the bundle.
    pub(crate) exec: String,
    /// Arguments after `argv[0]`.
    pub(crate) args: Vec<String>,
    /// The plugin's own variables.
    pub(crate) env: BTreeMap<String, String>,
    /// Who makes the worker socket.
    pub(crate) socket: SocketMode,
    /// The weakest walls that it accepts.
    pub(crate) level: Option<Level>,
    /// The most trust that it claims.
    pub(crate) tier: Option<Tier>,
    /// What it asks for.
    pub(crate) capabilities: Vec<Capability>,
    /// The ports that it listens at in its own network namespace.
    pub(crate) listen: Vec<u16>,
}

impl Stated {
    pub(super) fn of(manifest: &Manifest) -> Self {
        let (runtime, security) = (&manifest.runtime, &manifest.security);
        Self {
            exec: runtime.exec.clone(),
            args: runtime.args.clone(),
            env: runtime.env.clone(),
            socket: match runtime.socket {
                Asked::Inherit => SocketMode::Inherit,
                Asked::Bind => SocketMode::Bind,
            },
            level: security.sandbox.isolation_level.filter(|_| security.sandbox.enabled).map(Level::from),
            tier: security.trust_level.map(Tier::from),
            capabilities: security.capabilities.clone(),
            listen: runtime.listen.clone(),
        }
    }

    /// What of that opens something in the kernel.
    pub(crate) fn grants(&self) -> Vec<Grant> {
        Grant::of_all(self.capabilities.iter().copied())
    }
}
