//! Who is at either end of a call. It knows no policy: what an identity may do is `plugvisor-core`'s business.

use std::fmt;

use plugvisor_core::Generation;
use plugvisor_package::PluginName;

/// One generation of a plugin, as the supervisor numbered it.
///
/// The broker learns it from the connection alone: each generation has its own broker socket.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PluginIdentity {
    /// The plugin's name.
    pub name: PluginName,
    /// The generation.
    pub generation: Generation,
}

impl fmt::Display for PluginIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{}", self.name, self.generation)
    }
}

/// Who made a call. A host module finds it among the request's extensions.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CallerIdentity {
    /// A plugin, known by its own broker socket.
    Plugin(PluginIdentity),
    /// A local application on `calls.sock`, known by `SO_PEERCRED`.
    Local {
        /// The peer's user.
        uid: u32,
        /// The peer's process when it connected; informative only, since a number may be used again.
        pid: u32,
    },
}

impl CallerIdentity {
    /// The value of `plugvisor-caller`: the plugin's name, or `local:` and the user's number.
    #[must_use]
    pub fn label(&self) -> String {
        match self {
            Self::Plugin(plugin) => plugin.name.to_string(),
            Self::Local { uid, pid: _ } => format!("local:{uid}"),
        }
    }
}

impl fmt::Display for CallerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plugin(plugin) => plugin.fmt(f),
            Self::Local { uid, pid } => write!(f, "local application (user {uid}, process {pid})"),
        }
    }
}
