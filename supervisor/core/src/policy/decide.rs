//! The decision for one plugin.

use std::sync::Arc;

use plugvisor_package::{Capability, IsolationLevel, PluginName, TrustTier};

use super::{CapabilitySet, LimitNote, Limits, Policy, Rights};
use crate::{Code, Error};

/// What a manifest asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// `security.trustLevel`: an upper bound; `None` when it is silent.
    pub tier: Option<TrustTier>,
    /// `security.capabilities`.
    pub capabilities: CapabilitySet,
    /// `security.sandbox.isolationLevel`, or NONE for `sandbox.enabled: false`; `None` when it is silent.
    pub level: Option<IsolationLevel>,
    /// `security.sandbox.resourceLimits`.
    pub limits: Limits,
}

/// What the operator set for the plugin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// The tier of the directory that it was found in.
    pub tier: TrustTier,
    /// The grants of the directory and of the plugin together.
    pub grants: CapabilitySet,
    /// Limits in place of the manifest's; the tier's ceilings hold all the same.
    pub limits: Limits,
    /// Where all this is written: the path of the configuration, for whoever reads what is missing.
    pub place: Arc<str>,
}

/// What the plugin gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The tier that counts.
    pub tier: TrustTier,
    /// The walls.
    pub level: IsolationLevel,
    /// What it may do, and why not more.
    pub rights: Rights,
    /// Every capability asked for or granted by the operator, and what became of it; in the order of
    /// [`Capability::ALL`].
    pub capabilities: Vec<CapabilityVerdict>,
    /// The limits that hold.
    pub limits: Limits,
    /// Where limits differ from what was asked.
    pub limit_notes: Vec<LimitNote>,
}

impl Verdict {
    /// The capabilities granted.
    #[must_use]
    pub const fn granted(&self) -> CapabilitySet {
        self.rights.granted()
    }
}

/// What became of one capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CapabilityVerdict {
    /// Which one.
    pub capability: Capability,
    /// `None` when it is granted.
    pub why_not: Option<WhyNot>,
}

/// Why a capability is not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyNot {
    /// The manifest does not ask for it.
    NotAsked,
    /// The tier may not hold it.
    TierForbids(TrustTier),
    /// The operator did not grant it.
    NotGranted,
}

impl WhyNot {
    /// In words, for `describe`.
    #[must_use]
    pub fn describe(self) -> String {
        match self {
            Self::NotAsked => "granted by the operator, but the manifest does not ask for it".to_owned(),
            Self::TierForbids(tier) => format!("plugins of the tier {tier} may not hold it"),
            Self::NotGranted => "not in the operator's grants".to_owned(),
        }
    }
}

impl Policy {
    /// What a plugin may do, whether it may run at all or not.
    #[must_use]
    pub fn rights(&self, asked: &Asked, operator: &Operator) -> Rights {
        let tier = tier(asked, operator);
        Rights::new(
            asked.capabilities,
            tier,
            self.rules(tier).capabilities,
            operator.grants,
            Arc::clone(&operator.place),
        )
    }

    /// What the plugin called `name` gets.
    ///
    /// # Errors
    ///
    /// Why it may not run at all: its tier never runs.
    pub fn decide(&self, name: &PluginName, asked: &Asked, operator: &Operator) -> Result<Verdict, Error> {
        let tier = tier(asked, operator);
        let rules = self.rules(tier);
        let Some(weakest) = rules.weakest else {
            let hint = if operator.tier == tier {
                format!("set another tier for its directory in {}, if you trust it", operator.place)
            } else {
                "its plugin.json limits it to this tier with security.trustLevel".to_owned()
            };
            return Err(Error::new(
                Code::TierNeverRuns,
                format!("plugin {name} is of the tier {tier}, which never runs"),
                hint,
            ));
        };

        let level = asked.level.unwrap_or(IsolationLevel::Process).max(weakest);

        let rights = self.rights(asked, operator);
        let mut capabilities = Vec::new();
        for capability in asked.capabilities.or(operator.grants).iter() {
            let why_not = if !asked.capabilities.contains(capability) {
                Some(WhyNot::NotAsked)
            } else if !rules.capabilities.contains(capability) {
                Some(WhyNot::TierForbids(tier))
            } else if !operator.grants.contains(capability) {
                Some(WhyNot::NotGranted)
            } else {
                None
            };
            capabilities.push(CapabilityVerdict { capability, why_not });
        }
        let (limits, limit_notes) =
            Limits::effective(&asked.limits, &operator.limits, &rules.defaults, &rules.ceilings, tier);
        Ok(Verdict { tier, level, rights, capabilities, limits, limit_notes })
    }
}

/// The tier that counts: the manifest's is only a bound.
fn tier(asked: &Asked, operator: &Operator) -> TrustTier {
    asked.tier.map_or(operator.tier, |bound| bound.min(operator.tier))
}
