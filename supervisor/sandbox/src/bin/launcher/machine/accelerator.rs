//! Whether the host's processor runs guests, found by running one: a device that opens proves nothing, and a guest that is
//! never run neither.
//!
//! The trial is made by a child with a time limit, because where it fails it may as well hang. It runs a
//! loop that ends in `hlt` in a machine with one page of memory, and expects to be told of that in time.

use std::{
    fmt, fs, io,
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::PermissionsExt,
    },
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid},
};
use serde::{Deserialize, Serialize};

use crate::kernel::{self, Cloned};

/// The device.
pub(crate) const DEVICE: &str = "/dev/kvm";

/// How long the loop may take: a processor needs a small part of it.
const PATIENCE: Duration = Duration::from_secs(1);

/// What makes a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Accelerator {
    Kvm,
    Emulation,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "KVM",
            Self::Emulation => "emulation",
        })
    }
}

/// KVM if a guest runs and plugins' users may open the device; otherwise why not.
pub(crate) fn find() -> Result<(), String> {
    let found = fs::metadata(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
    if found.permissions().mode() & 0o006 != 0o006 {
        return Err(format!(
            "{DEVICE} may not be opened by everybody (chmod 666 {DEVICE}), and plugins have users of their own"
        ));
    }
    try_device()
}

/// Whether a guest runs, whoever may open the device.
fn try_device() -> Result<(), String> {
    let device =
        fs::File::options().read(true).write(true).open(DEVICE).map_err(|error| format!("{DEVICE}: {error}"))?;
    match kernel::clone3(0, None).map_err(|error| format!("no process could be made to try it: {error}"))? {
        Cloned::Child => kernel::exit_now(match kernel::runs_guest(device.as_raw_fd()) {
            Ok(()) => 0,
            Err(_) => 1,
        }),
        Cloned::Parent { pidfd, .. } => {
            let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
            let patience = Timespec { tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(1), tv_nsec: 0 };
            let ended = poll(&mut fds, Some(&patience)).map_err(io::Error::from);
            let late = !matches!(ended, Ok(1..));
            if late {
                let _ = pidfd_send_signal(&pidfd, Signal::KILL);
                // One that the kernel does not let go of is left to it.
                let _ = poll(&mut fds, Some(&patience));
            }
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            let status = waitid(WaitId::PidFd(pidfd.as_fd()), options);
            match status.ok().flatten().and_then(|status| status.exit_status()) {
                Some(0) => Ok(()),
                _ if late => Err(format!("{DEVICE} opens, and a guest does not run: it did nothing for {PATIENCE:?}")),
                _ => Err(format!("{DEVICE} opens, and a guest does not run")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Whatever this host has: it is known in time, and said.
    #[test]
    fn a_guest_runs_or_it_is_said_why_not() {
        let begun = Instant::now();
        let found = try_device();
        println!("{found:?} after {:?}", begun.elapsed());
        assert!(begun.elapsed() < PATIENCE * 10);
        assert!(found.err().is_none_or(|why| why.contains(DEVICE)));
    }
}
