//! How far a plugin is trusted.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Trust tiers, from least to most trusted. The order is the order of trust.
///
/// In a manifest a tier is only an upper bound: the tier that counts comes from a verified signature or from the
/// operator's setting for the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
pub enum TrustTier {
    /// Never runs.
    Quarantined,
    /// The tier of everything that nobody vouched for.
    Untrusted,
    /// Known author, not reviewed.
    Community,
    /// Reviewed and signed.
    Verified,
    /// The operator's own.
    Internal,
}

impl TrustTier {
    /// The tier as the manifest writes it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Quarantined => "quarantined",
            Self::Untrusted => "untrusted",
            Self::Community => "community",
            Self::Verified => "verified",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for TrustTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
