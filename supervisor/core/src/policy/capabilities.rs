//! Sets of capabilities.

use plugvisor_package::Capability;

/// A set of capabilities, small enough to be copied.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CapabilitySet(u32);

impl CapabilitySet {
    /// No capability.
    pub const EMPTY: Self = Self(0);

    /// Every capability.
    pub const ALL: Self = Self::of(Capability::ALL);

    /// These capabilities.
    #[must_use]
    pub const fn of(capabilities: &[Capability]) -> Self {
        let mut bits = 0;
        let mut index = 0;
        while index < capabilities.len() {
            bits |= bit(capabilities[index]);
            index += 1;
        }
        Self(bits)
    }

    /// Whether the capability is in it.
    #[must_use]
    pub const fn contains(self, capability: Capability) -> bool {
        self.0 & bit(capability) != 0
    }

    /// Whether nothing is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// What is in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// What is in either.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What is in this one alone.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// Its members, in the order of [`Capability::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Capability> {
        Capability::ALL.iter().copied().filter(move |capability| self.contains(*capability))
    }
}

const fn bit(capability: Capability) -> u32 {
    1 << capability as u32
}

const _: () = assert!(Capability::ALL.len() <= 32, "the set has one bit for each capability");

impl FromIterator<Capability> for CapabilitySet {
    fn from_iter<I: IntoIterator<Item = Capability>>(capabilities: I) -> Self {
        capabilities.into_iter().fold(Self::EMPTY, |set, capability| set.or(Self::of(&[capability])))
    }
}

#[cfg(test)]
mod tests {
    use plugvisor_package::Capability;

    use super::CapabilitySet;

    #[test]
    fn every_capability_has_its_own_bit() {
        assert_eq!(CapabilitySet::ALL.iter().collect::<Vec<_>>(), Capability::ALL);
        for capability in Capability::ALL {
            let alone = CapabilitySet::of(&[*capability]);
            assert_eq!(alone.iter().collect::<Vec<_>>(), [*capability]);
            assert!(!CapabilitySet::ALL.minus(alone).contains(*capability));
            assert!(CapabilitySet::ALL.minus(alone).and(alone).is_empty());
        }
    }
}
