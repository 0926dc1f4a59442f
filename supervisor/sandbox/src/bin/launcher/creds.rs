//! Who the plugin is to the kernel: its uid, no groups, no capability, and no way back.

use std::{ops::RangeInclusive, os::fd::AsFd};

use plugvisor_sandbox::protocol::Control;
use rustix::{
    fs::{Mode, OFlags},
    io::Errno,
    process::{DumpableBehavior, getgid, getuid, set_dumpable_behavior},
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, Gid, Uid, capabilities, clear_ambient_capability_set,
        configure_capability_in_ambient_set, set_capabilities, set_capabilities_secure_bits, set_keep_capabilities,
        set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use serde::{Deserialize, Serialize};

use crate::{child::Failure, kernel, level::Without, step::Step, uids::Uids};

/// How the plugin gets its identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Identity {
    /// The launcher is root: a uid, and the gid of the same number, that only this plugin has.
    Own {
        /// Never 0.
        uid: u32,
    },
    /// The launcher is an ordinary user: its own uid and gid, alone in a new user namespace. Supplementary groups stay,
    /// as nothing unprivileged can drop them; the mount tree shows nothing that they would open.
    Mapped {
        /// The launcher's uid.
        uid: u32,
        /// The launcher's gid.
        gid: u32,
    },
}

impl Identity {
    /// Who copies into the store and tries the walls: as root the last uid of the range, which no plugin gets.
    pub(crate) fn copier(range: &RangeInclusive<u32>) -> Self {
        let (uid, gid) = (getuid(), getgid());
        if uid.is_root() {
            Self::Own { uid: Uids::copier(range) }
        } else {
            Self::Mapped { uid: uid.as_raw(), gid: gid.as_raw() }
        }
    }

    /// The uid, as the launcher's user namespace numbers it.
    pub(crate) const fn uid(self) -> u32 {
        match self {
            Self::Own { uid } | Self::Mapped { uid, .. } => uid,
        }
    }
}

/// In a new user namespace: maps the launcher's ids to themselves. They are all that an unprivileged user may map.
pub(crate) fn map_user(identity: &Identity) -> Result<(), Failure> {
    let Identity::Mapped { uid, gid } = *identity else { return Ok(()) };
    let map = || {
        // The launcher is not dumpable, which makes /proc/self root's; its child is again, for these three writes.
        set_dumpable_behavior(DumpableBehavior::Dumpable)?;
        write("/proc/self/setgroups", "deny")?;
        write("/proc/self/uid_map", &format!("{uid} {uid} 1"))?;
        write("/proc/self/gid_map", &format!("{gid} {gid} 1"))?;
        set_dumpable_behavior(DumpableBehavior::NotDumpable)
    };
    map().map_err(|errno| Failure::new(Step::UserNamespace, errno))
}

/// Becomes the plugin's user without its privileges, in the order in which each step still has the privilege it needs. With
/// `for_good` nothing can give any back; without, a set-uid program of the host can.
pub(crate) fn drop_privileges(identity: &Identity, for_good: bool, without: Without) -> Result<(), Failure> {
    if let Identity::Own { .. } = identity {
        set_thread_groups(&[]).map_err(|errno| Failure::new(Step::Groups, errno))?;
    }
    let keep = for_good && without.has(Control::NoCapabilities);
    if keep {
        set_keep_capabilities(true).map_err(|errno| Failure::new(Step::Capabilities, errno))?;
    } else if for_good {
        lose_capabilities()?;
    }
    if let Identity::Own { uid } = *identity
        && !without.has(Control::OwnUid)
    {
        let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
        set_thread_res_gid(group, group, group).map_err(|errno| Failure::new(Step::Identity, errno))?;
        set_thread_res_uid(user, user, user).map_err(|errno| Failure::new(Step::Identity, errno))?;
    }
    if keep {
        return hand_on_capabilities().map_err(|errno| Failure::new(Step::Capabilities, errno));
    }
    let none = CapabilitySet::empty();
    clear_ambient_capability_set().map_err(|errno| Failure::new(Step::Capabilities, errno))?;
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(|errno| Failure::new(Step::Capabilities, errno))
}

/// Has the program keep all capabilities that this process holds, for a launch from which `no-capabilities` is left out.
fn hand_on_capabilities() -> Result<(), Errno> {
    let held = capabilities(None)?.permitted;
    set_capabilities(None, CapabilitySets { effective: held, permitted: held, inheritable: held })?;
    held.iter().try_for_each(|capability| configure_capability_in_ambient_set(capability, true))
}

/// The ways by which an exec or another uid could give capabilities.
fn lose_capabilities() -> Result<(), Failure> {
    kernel::drop_bounding_set().map_err(|error| Failure::io(Step::BoundingSet, &error))?;
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(|errno| Failure::new(Step::Securebits, errno))
}

fn write(path: &str, text: &str) -> Result<(), Errno> {
    let file = rustix::fs::open(path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(file.as_fd(), text.as_bytes()).map(drop)
}
