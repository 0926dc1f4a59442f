//! How large a machine is. Pure.
//!
//! The plugin's limit is held by its guest's kernel, as a cgroup's. Around it the guest has memory for its kernel and for
//! the archive, once packed and once unpacked; and around that a cgroup of the host holds what the emulator may take
//! altogether: measured, see ADR 13.

use plugvisor_sandbox::{inward::BUFFER, protocol::Limits};

const MIB: u64 = 1 << 20;

/// What a plugin may use that has no limit.
const PLUGIN: u64 = 256 * MIB;
/// What a guest's kernel and first process take.
const KERNEL: u64 = 96 * MIB;
/// What the libraries of the host may take in an archive, and a guest's first process and modules.
const LIBRARIES: u64 = 48 * MIB;
/// What a plugin's configuration may take in an archive, when it was granted: files that an administrator wrote.
pub(super) const CONFIGURATION: u64 = 4 * MIB;
/// What the emulator and the monitor take beside the guest's memory, translated code included.
const EMULATOR: u64 = 192 * MIB;
/// Threads of the emulator, the monitor, and its init.
const THREADS: u32 = 64;

/// What a connection to a port takes at most: two ends are in the machine's cgroup, that by which the supervisor connects and
/// the monitor's, with two buffers each, and the kernel gives each buffer twice what was asked for (socket(7), `SO_RCVBUF`).
const CONNECTION: u64 = 2 * 2 * 2 * BUFFER as u64;

const _: () = assert!(super::relay::BUFFER as usize == BUFFER, "both sides bound them alike");

/// The size of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// The most that the archive may have.
    pub(crate) archive: u64,
    /// The guest's memory: whole MiB.
    pub(crate) guest: u64,
    /// What its connections to ports may take.
    pub(crate) connections: u64,
}

impl Size {
    /// Of a machine for a bundle of so many bytes, with so many connections to its ports.
    pub(crate) fn of(limits: &Limits, bundle: u64, runtime: u64, inward: u16) -> Self {
        let archive = bundle.saturating_add(runtime).saturating_add(LIBRARIES);
        let plugin = limits.memory_bytes.unwrap_or(PLUGIN);
        let guest = plugin.saturating_add(KERNEL).saturating_add(archive.saturating_mul(2));
        let connections = u64::from(inward) * CONNECTION;
        Self { archive, guest: guest.div_ceil(MIB).saturating_mul(MIB), connections }
    }

    /// What of the host's memory it may take altogether, in bytes.
    pub(crate) fn whole(&self) -> u64 {
        self.guest.saturating_add(self.archive).saturating_add(self.connections).saturating_add(EMULATOR)
    }

    /// What the host holds of a launch whose plugin has these limits.
    pub(crate) fn outside(&self, limits: &Limits) -> Limits {
        let Limits { memory_bytes, cpu_percent, pids, file_size_bytes: _, open_files: _ } = limits;
        Limits {
            memory_bytes: memory_bytes.map(|_| self.whole()),
            cpu_percent: *cpu_percent,
            pids: pids.map(|_| THREADS),
            // Of files and of descriptors the plugin's limits are its guest's: the archive is a file, too.
            file_size_bytes: None,
            open_files: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_holds_its_plugin_its_kernel_and_its_archive_twice() {
        let limits = Limits { memory_bytes: Some(64 * MIB), pids: Some(8), ..Limits::default() };
        let size = Size::of(&limits, 10 * MIB, 0, 0);
        assert_eq!(size.guest, 64 * MIB + KERNEL + 2 * (10 * MIB + LIBRARIES));
        let outside = size.outside(&limits);
        assert_eq!(outside.memory_bytes, Some(size.guest + size.archive + EMULATOR));
        assert_eq!((outside.pids, outside.file_size_bytes), (Some(THREADS), None));
        assert_eq!(size.outside(&Limits::default()), Limits::default());
        assert_eq!(Size::of(&limits, 10 * MIB, 0, 8).whole(), size.whole() + 4 * MIB);
        assert_eq!(Size::of(&Limits::default(), 1, 1, 0).guest % MIB, 0);
        // Whatever is asked for.
        let most = Limits { memory_bytes: Some(u64::MAX), ..Limits::default() };
        assert!(Size::of(&most, u64::MAX, u64::MAX, u16::MAX).guest > 1 << 60);
    }
}
