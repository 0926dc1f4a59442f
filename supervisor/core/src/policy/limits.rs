//! Limits on what a plugin may use.

use std::{fmt, time::Duration};

use plugvisor_package::TrustTier;

/// Limits; `None` means that nothing is said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory of all its processes together (`maxMemory`).
    pub memory_bytes: Option<u64>,
    /// Percent of one CPU (`maxCPU`).
    pub cpu_percent: Option<u32>,
    /// Processes and threads together.
    pub pids: Option<u32>,
    /// Bytes of the largest file that it may write (`maxFileSize`).
    pub file_size_bytes: Option<u64>,
    /// Open descriptors of one process.
    pub open_files: Option<u32>,
    /// The longest time of one call (`maxExecutionTime`).
    pub call_time: Option<Duration>,
    /// Bytes per second through the egress proxy, both directions together (`maxNetworkBandwidth`).
    pub network_bytes: Option<u64>,
}

/// Why a limit is not the one that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LimitNote {
    /// The limit's name in the manifest, such as `maxMemory`.
    pub limit: &'static str,
    /// In words: "asked for 4294967296, capped at 2147483648 by the tier verified".
    pub why: String,
}

impl Limits {
    /// Nothing said.
    pub const NONE: Self = Self {
        memory_bytes: None,
        cpu_percent: None,
        pids: None,
        file_size_bytes: None,
        open_files: None,
        call_time: None,
        network_bytes: None,
    };

    pub(super) const fn usual(memory_bytes: u64, cpu_percent: u32, pids: u32) -> Self {
        Self {
            memory_bytes: Some(memory_bytes),
            cpu_percent: Some(cpu_percent),
            pids: Some(pids),
            file_size_bytes: Some(memory_bytes),
            open_files: Some(1024),
            call_time: Some(Duration::from_secs(60)),
            network_bytes: None,
        }
    }

    /// The limits that hold: the operator's in place of the manifest's, the tier's defaults where both are silent, and
    /// never above the tier's ceilings.
    pub(super) fn effective(
        asked: &Self,
        operator: &Self,
        defaults: &Self,
        ceilings: &Self,
        tier: TrustTier,
    ) -> (Self, Vec<LimitNote>) {
        let mut notes = Vec::new();
        let mut rule = Rule { tier, notes: &mut notes };
        // Destructured, so that a new limit cannot be forgotten here.
        let Self { memory_bytes, cpu_percent, pids, file_size_bytes, open_files, call_time, network_bytes } = asked;
        let limits = Self {
            memory_bytes: rule.pick(
                "maxMemory",
                *memory_bytes,
                operator.memory_bytes,
                defaults.memory_bytes,
                ceilings.memory_bytes,
            ),
            cpu_percent: rule.pick(
                "maxCPU",
                *cpu_percent,
                operator.cpu_percent,
                defaults.cpu_percent,
                ceilings.cpu_percent,
            ),
            pids: rule.pick("pids", *pids, operator.pids, defaults.pids, ceilings.pids),
            file_size_bytes: rule.pick(
                "maxFileSize",
                *file_size_bytes,
                operator.file_size_bytes,
                defaults.file_size_bytes,
                ceilings.file_size_bytes,
            ),
            open_files: rule.pick(
                "open_files",
                *open_files,
                operator.open_files,
                defaults.open_files,
                ceilings.open_files,
            ),
            call_time: rule.pick(
                "maxExecutionTime",
                *call_time,
                operator.call_time,
                defaults.call_time,
                ceilings.call_time,
            ),
            network_bytes: rule.pick(
                "maxNetworkBandwidth",
                *network_bytes,
                operator.network_bytes,
                defaults.network_bytes,
                ceilings.network_bytes,
            ),
        };
        (limits, notes)
    }
}

struct Rule<'a> {
    tier: TrustTier,
    notes: &'a mut Vec<LimitNote>,
}

impl Rule<'_> {
    fn pick<T: Copy + Ord + fmt::Debug>(
        &mut self,
        limit: &'static str,
        asked: Option<T>,
        operator: Option<T>,
        default: Option<T>,
        ceiling: Option<T>,
    ) -> Option<T> {
        let wanted = operator.or(asked);
        let chosen = match (wanted.or(default), ceiling) {
            (Some(value), Some(ceiling)) => Some(value.min(ceiling)),
            (value, ceiling) => value.or(ceiling),
        };
        if chosen != wanted
            && let (Some(wanted), Some(chosen)) = (wanted, chosen)
        {
            let tier = self.tier;
            self.note(limit, format!("asked for {wanted:?}, capped at {chosen:?} by the tier {tier}"));
        } else if let (Some(asked), Some(operator)) = (asked, operator)
            && asked != operator
        {
            self.note(limit, format!("the manifest asks for {asked:?}, the operator set {operator:?}"));
        }
        chosen
    }

    fn note(&mut self, limit: &'static str, why: String) {
        self.notes.push(LimitNote { limit, why });
    }
}

#[cfg(test)]
mod tests {
    use plugvisor_package::TrustTier;

    use super::Limits;

    #[test]
    fn the_operator_replaces_and_the_ceiling_caps() {
        let memory = |bytes| Limits { memory_bytes: bytes, ..Limits::NONE };
        // asked, operator, default, ceiling, what holds, notes
        let table = [
            (None, None, None, None, None, 0),
            (None, None, Some(5), None, Some(5), 0),
            (None, None, Some(5), Some(3), Some(3), 0),
            (None, None, None, Some(3), Some(3), 0),
            (Some(2), None, Some(5), Some(3), Some(2), 0),
            (Some(9), None, Some(5), Some(3), Some(3), 1),
            (Some(2), Some(3), Some(5), Some(3), Some(3), 1),
            (Some(2), Some(1), Some(5), None, Some(1), 1),
            (Some(2), Some(9), Some(5), Some(3), Some(3), 1),
        ];
        for (asked, operator, default, ceiling, holds, noted) in table {
            let (limits, notes) = Limits::effective(
                &memory(asked),
                &memory(operator),
                &memory(default),
                &memory(ceiling),
                TrustTier::Verified,
            );
            let case = format!("asked {asked:?} operator {operator:?} default {default:?} ceiling {ceiling:?}");
            assert_eq!(limits, memory(holds), "{case}");
            assert_eq!(notes.len(), noted, "{case}: {notes:?}");
        }
    }
}
