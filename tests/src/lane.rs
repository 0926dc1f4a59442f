//! Who starts the supervisor.

use std::fmt;

/// Who starts the supervisor. Scenarios run in every lane that is possible here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// root starts it; the daemon drops to `nobody`, each plugin has its own uid.
    Privileged,
    /// An ordinary user starts it: user namespaces, and cgroups only where they were delegated.
    Rootless,
}

/// The user that a privileged test run starts the rootless lane as: no account, so nothing else belongs to it.
pub(crate) const ROOTLESS_UID: u32 = 61_234;

impl Lane {
    /// The lanes that this test run can take. A run without root says that it skips the privileged one.
    #[must_use]
    pub fn possible() -> Vec<Self> {
        if is_root() {
            return vec![Self::Privileged, Self::Rootless];
        }
        println!("SKIP privileged-lane: this user is not root");
        vec![Self::Rootless]
    }

    /// The uid that owns the daemon's files before it drops privileges.
    pub(crate) fn uid(self) -> u32 {
        match self {
            Self::Privileged => 0,
            Self::Rootless if is_root() => ROOTLESS_UID,
            Self::Rootless => rustix::process::getuid().as_raw(),
        }
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Privileged => "privileged",
            Self::Rootless => "rootless",
        })
    }
}

/// Whether this test run is root's.
pub(crate) fn is_root() -> bool {
    rustix::process::getuid().is_root()
}
