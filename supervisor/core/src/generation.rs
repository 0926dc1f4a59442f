//! Generations of a plugin.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Numbers the loads of one plugin, restarts included: the first is 1, each further one is one more, and none is
/// reused. A generation has at most one process.
///
/// Everything that an attempt reports carries its generation, so that a report of an earlier one is known as stale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation before the first load.
    pub const NONE: Self = Self(0);

    /// The one that follows.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
