//! What a plugin gets: its tier, its walls, its limits and its capabilities, each with the reason when it is less than
//! what was asked.
//!
//! Owns the operator's rules per tier and the decision. It does not know manifests or configuration files: what each
//! asks for comes in as values. What this version cannot enforce is refused here, before anything is launched.

mod capabilities;
mod decide;
mod limits;
mod rights;
#[cfg(test)]
mod tests;

use plugvisor_package::{Capability, IsolationLevel, TrustTier};

pub use self::{
    capabilities::CapabilitySet,
    decide::{Asked, CapabilityVerdict, Operator, Verdict, WhyNot},
    limits::{LimitNote, Limits},
    rights::{Lack, Rights},
};

/// The rules of one tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierRules {
    /// The weakest walls that a plugin of the tier may have; `None` means that the tier never runs.
    pub weakest: Option<IsolationLevel>,
    /// What a plugin of the tier may hold at most.
    pub capabilities: CapabilitySet,
    /// The highest limits.
    pub ceilings: Limits,
    /// The limits of a plugin that asks for none.
    pub defaults: Limits,
}

/// The rules of every tier. `Default` documents the values that hold without configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The operator's own plugins. Default: walls none, every capability, no ceilings.
    pub internal: TierRules,
    /// Reviewed plugins. Default: walls process, everything but administering the host and its database.
    pub verified: TierRules,
    /// Plugins of known authors. Default: walls container; no administration, secrets, users or tokens.
    pub community: TierRules,
    /// Everything else. Default: walls sandbox; temporary files, calls to plugins and events.
    pub untrusted: TierRules,
    /// Default: never runs.
    pub quarantined: TierRules,
}

const MIB: u64 = 1 << 20;

impl Default for Policy {
    fn default() -> Self {
        use Capability as C;
        let verified = CapabilitySet::ALL.minus(CapabilitySet::of(&[C::DatabaseAdmin, C::SystemAdmin]));
        let community = verified.minus(CapabilitySet::of(&[C::UserAuth, C::TokenManagement, C::ReadSecrets]));
        let untrusted = CapabilitySet::of(&[C::WriteTemp, C::InternalCalls, C::PublishEvents]);
        Self {
            internal: TierRules {
                weakest: Some(IsolationLevel::None),
                capabilities: CapabilitySet::ALL,
                ceilings: Limits::NONE,
                defaults: Limits::usual(512 * MIB, 200, 256),
            },
            verified: TierRules {
                weakest: Some(IsolationLevel::Process),
                capabilities: verified,
                ceilings: Limits::usual(2048 * MIB, 400, 1024),
                defaults: Limits::usual(256 * MIB, 100, 128),
            },
            community: TierRules {
                weakest: Some(IsolationLevel::Container),
                capabilities: community,
                ceilings: Limits::usual(512 * MIB, 100, 256),
                defaults: Limits::usual(128 * MIB, 50, 64),
            },
            untrusted: TierRules {
                weakest: Some(IsolationLevel::Sandbox),
                capabilities: untrusted,
                ceilings: Limits::usual(128 * MIB, 50, 64),
                defaults: Limits::usual(64 * MIB, 25, 32),
            },
            quarantined: TierRules {
                weakest: None,
                capabilities: CapabilitySet::EMPTY,
                ceilings: Limits::usual(0, 0, 0),
                defaults: Limits::usual(0, 0, 0),
            },
        }
    }
}

impl Policy {
    /// The rules of a tier.
    #[must_use]
    pub const fn rules(&self, tier: TrustTier) -> &TierRules {
        match tier {
            TrustTier::Internal => &self.internal,
            TrustTier::Verified => &self.verified,
            TrustTier::Community => &self.community,
            TrustTier::Untrusted => &self.untrusted,
            TrustTier::Quarantined => &self.quarantined,
        }
    }
}
