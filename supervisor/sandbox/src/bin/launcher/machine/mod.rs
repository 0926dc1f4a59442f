//! The level VM: a kernel of the plugin's own, in a machine that QEMU makes behind the walls of SANDBOX.
//!
//! ```text
//! launcher ── init ── monitor (this program, behind the walls) ── QEMU ┊ kernel ── guest's init ── plugin
//!                       │ broker, worker, egress, ports: its own        ┊
//!                       └────────────── frames over virtio-serial ─────┊──────────┘
//! ```
//!
//! What the launcher does for it is what it does for any level: it starts one program behind walls. That program is the
//! `monitor`. It packs the bundle into an archive (`archive`, `libraries`), starts the emulator (`emulator`) with it, and
//! carries the plugin's connections between the guest and the sockets that a plugin of any level has, so that the
//! supervisor, the broker and the egress proxy see no difference. Kernel and emulator are named by the administrator's
//! policy file (`settings`) and by nobody else. The guest's side is in `guest/`.

mod accelerator;
mod archive;
mod emulator;
mod files;
mod libraries;
mod monitor;
mod ours;
mod pace;
mod prepare;
mod settings;
mod size;

// The same files as in the guest.
#[path = "../../../../guest/link.rs"]
#[allow(dead_code, reason = "each side uses its half")]
mod link;
#[path = "../../../../guest/plan.rs"]
#[allow(dead_code, reason = "each side uses its half")]
mod plan;
#[path = "../../../../guest/relay/mod.rs"]
#[allow(dead_code, reason = "each side uses its half")]
mod relay;

#[cfg(test)]
pub(crate) use self::settings::RawSettings;
pub(crate) use self::{
    accelerator::{Accelerator, Kvm},
    monitor::{MONITOR, run as run_monitor},
    ours::Part,
    prepare::Machines,
    relay::Poll,
    settings::Settings,
};

/// The guest's first process; empty where it could not be built.
pub(crate) const GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest"));

/// Where the monitor finds the kernel and, by their numbers from 1 on, its modules.
pub(crate) const PLACE: &str = "/machine";

/// The number of the descriptor whose closing shows the launcher that the emulator is executed.
pub(crate) const EXECUTED: i32 = 6;

/// The number of the pipe over which the monitor tells the launcher, by any byte, that the plugin was killed for memory: how
/// a process ends has no room for that.
pub(crate) const TOLD: i32 = 7;

/// Execs of a launch: the monitor's and the emulator's.
pub(crate) const EXECS: u8 = 2;

#[cfg(test)]
mod tests;
