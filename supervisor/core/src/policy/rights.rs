//! What a plugin may do, and which half of a grant is missing for what it may not.

use std::sync::Arc;

use plugvisor_package::{Capability, TrustTier};

use super::CapabilitySet;

/// What a plugin may do: what its manifest asks for, its tier may hold, and the operator granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    asked: CapabilitySet,
    by_tier: CapabilitySet,
    by_operator: CapabilitySet,
    tier: TrustTier,
    place: Arc<str>,
}

impl Rights {
    /// The rights that follow from the three. `place` is where the operator writes his: the path of the configuration, for
    /// whoever reads what is missing.
    #[must_use]
    pub const fn new(
        asked: CapabilitySet,
        tier: TrustTier,
        by_tier: CapabilitySet,
        by_operator: CapabilitySet,
        place: Arc<str>,
    ) -> Self {
        Self { asked, by_tier, by_operator, tier, place }
    }

    /// The rights of a plugin of the operator's own that asks for these and is granted them.
    #[must_use]
    pub fn of(granted: CapabilitySet) -> Self {
        Self::new(granted, TrustTier::Internal, CapabilitySet::ALL, granted, "plugvisor.toml".into())
    }

    /// What it may do.
    #[must_use]
    pub const fn granted(&self) -> CapabilitySet {
        self.asked.and(self.by_tier).and(self.by_operator)
    }

    /// Whether it holds the capability.
    #[must_use]
    pub const fn hold(&self, capability: Capability) -> bool {
        self.granted().contains(capability)
    }

    /// What is missing for the capability; nothing when it is held.
    #[must_use]
    pub fn lack(&self, capability: Capability) -> Lack {
        Lack {
            capability,
            not_asked: !self.asked.contains(capability),
            tier_forbids: if self.by_tier.contains(capability) { None } else { Some(self.tier) },
            not_granted: !self.by_operator.contains(capability),
            place: Arc::clone(&self.place),
        }
    }
}

/// What is missing for one capability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lack {
    /// Which one.
    pub capability: Capability,
    /// The manifest does not ask for it.
    pub not_asked: bool,
    /// Plugins of this tier may not hold it.
    pub tier_forbids: Option<TrustTier>,
    /// The operator did not grant it.
    pub not_granted: bool,
    /// Where the operator would grant it.
    pub place: Arc<str>,
}

impl Lack {
    /// Each missing half, in words.
    #[must_use]
    pub fn why(&self) -> String {
        let tier = self.tier_forbids.map(|tier| format!("plugins of the tier {tier} may not hold it"));
        let halves = [
            self.not_asked.then(|| "its manifest does not ask for it".to_owned()),
            tier,
            self.not_granted.then(|| "the operator did not grant it".to_owned()),
        ];
        joined(halves)
    }

    /// What to do about each, for the plugin of this name: for operators, with where it is to be done.
    #[must_use]
    pub fn hint(&self, plugin: &str) -> String {
        self.hint_in(plugin, &self.place)
    }

    /// The same as the plugin itself is told it. Where the host has its files is nothing for it to know.
    #[must_use]
    pub fn hint_for_plugin(&self, plugin: &str) -> String {
        self.hint_in(plugin, "the configuration")
    }

    fn hint_in(&self, plugin: &str, place: &str) -> String {
        let capability = self.capability;
        let tier = self
            .tier_forbids
            .map(|_| format!("set a higher tier for the directory of {plugin} in {place}, if you trust it so far"));
        let halves = [
            self.not_asked.then(|| format!("add {capability} to security.capabilities in the plugin.json of {plugin}")),
            tier,
            self.not_granted.then(|| {
                format!(
                    "add {capability} to the grants of its [[directory]] in {place}, or of [plugin.{plugin}], which \
                     stand in place of the directory's"
                )
            }),
        ];
        joined(halves)
    }
}

fn joined(parts: [Option<String>; 3]) -> String {
    parts.into_iter().flatten().collect::<Vec<_>>().join(", and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lack_names_each_half_that_is_missing_and_no_other() {
        let secrets = Capability::ReadSecrets;
        let some = CapabilitySet::of(&[secrets]);
        let none = CapabilitySet::EMPTY;
        for asked in [none, some] {
            for by_tier in [none, some] {
                for by_operator in [none, some] {
                    let rights = Rights::new(asked, TrustTier::Community, by_tier, by_operator, "/srv/own.toml".into());
                    let lack = rights.lack(secrets);
                    let (why, hint) = (lack.why(), lack.hint("gallery"));
                    assert_eq!(rights.hold(secrets), why.is_empty(), "{rights:?}");
                    assert_eq!(why.is_empty(), hint.is_empty(), "{rights:?}");
                    assert_eq!(lack.hint_for_plugin("gallery"), hint.replace("/srv/own.toml", "the configuration"));
                    for (missing, word, fix) in [
                        (asked.is_empty(), "manifest", "plugin.json"),
                        (by_tier.is_empty(), "community", "in /srv/own.toml, if you trust it"),
                        (by_operator.is_empty(), "operator", "in /srv/own.toml, or of [plugin.gallery]"),
                    ] {
                        assert_eq!(why.contains(word), missing, "{why}");
                        assert_eq!(hint.contains(fix), missing, "{hint}");
                    }
                }
            }
        }
    }
}
