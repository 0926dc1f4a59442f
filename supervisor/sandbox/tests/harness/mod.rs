//! Starts a real launcher as root or as an ordinary user, talks to it over its socket, and cleans up.
//!
//! [`Harness`] is such a launcher with its one supervisor, the test. What it can do is by subject: it is started (`start`)
//! in its own group (`place`), spoken to (`supervisor`), given bundles (`bundle`) and launches (`launch`), and looked at
//! from outside (`look`).
#![allow(unreachable_pub, dead_code, missing_docs, reason = "a module of tests, each of which uses a part")]

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Child,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use plugvisor_sandbox::{protocol::Notice, seqpacket::Seqpacket};

mod bundle;
mod launch;
mod look;
mod place;
mod start;
mod supervisor;
mod wait;

#[allow(unused_imports, reason = "a module of tests, each of which uses a part")]
pub use self::{
    bundle::{Manner, PORTS, announce, described, digest, listed, make_bundle, open_to_all, write_manifest},
    launch::{LEVELS, Plugin},
    place::Place,
    start::with_directories,
    wait::{patience, read_all, wait_readable},
};

/// Stops a scoped thread, also when the test fails: the scope would wait for it for ever.
pub struct Stopping<'a>(pub &'a AtomicBool);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// An ordinary user that needs no entry anywhere.
pub const ORDINARY: u32 = 54_321;

/// Who runs the launcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum As {
    Root,
    Ordinary,
}

impl As {
    /// Both when this process is root, else only the ordinary one; what is left out is printed.
    pub fn possible() -> Vec<Self> {
        if is_root() {
            return vec![Self::Root, Self::Ordinary];
        }
        println!("SKIP privileged-lane: this user is not root");
        vec![Self::Ordinary]
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Who may connect to a launcher that listens.
pub fn supervisor_uid() -> u32 {
    if is_root() { ORDINARY } else { rustix::process::geteuid().as_raw() }
}

pub struct Harness {
    pub process: Child,
    pub connection: Seqpacket,
    pub as_: As,
    pub directory: tempfile::TempDir,
    pub cgroup: String,
    /// How many spares it makes: none without privileges.
    pub spares: usize,
    notices: Vec<Notice>,
    last: u64,
    args: Vec<OsString>,
    /// The bundles that were made for launches: how they run, and where they are.
    made: Mutex<BTreeMap<[u8; 32], (Manner, PathBuf)>>,
    /// Let go of last, when the launcher has ended.
    pub place: Place,
}

impl Harness {
    pub fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join(inside)
    }

    /// What the administrator approves from now on.
    pub fn write_policy(&self, text: &str) {
        let new = self.path("policy.new");
        fs::write(&new, text).expect("the policy");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).expect("chmod");
        if self.as_ == As::Ordinary && is_root() {
            std::os::unix::fs::chown(&new, Some(ORDINARY), Some(ORDINARY)).expect("chown");
        }
        fs::rename(new, self.path("policy.toml")).expect("the policy");
    }

    /// Signals the launcher.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, signal).expect("the launcher lives");
    }

    /// Stops the launcher, and waits until it stands still: a signal alone lets it read on for a moment.
    pub fn stop(&self) {
        use rustix::process::{Signal, WaitId, WaitIdOptions, waitid};
        self.signal(Signal::STOP);
        let pid = rustix::process::Pid::from_child(&self.process);
        let stopped = waitid(WaitId::Pid(pid), WaitIdOptions::STOPPED).expect("waitid");
        assert!(stopped.is_some_and(|status| status.stopped()), "it stands still");
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        // One that lingers must be told.
        if let Some(pid) = rustix::process::Pid::from_raw(self.process.id().cast_signed()) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        // Gone, so that the launcher ends by itself and cleans up; one that was killed has left its groups.
        if let Ok((unused, _)) = Seqpacket::pair() {
            self.connection = unused;
        }
        let deadline = Instant::now() + patience();
        while matches!(self.process.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                drop(self.process.kill());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        // A launcher without one of its walls, or one that was killed, may have left processes.
        while Instant::now() < deadline && !self.cgroups().is_empty() {
            for directory in self.cgroups().iter().rev() {
                end_all(directory);
                drop(fs::remove_dir(directory));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Kills what is in this group, which is the test's own: known by its pidfd, and still there when it was opened.
fn end_all(group: &Path) {
    let members = || fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    for member in members().lines() {
        let Some(pid) = member.parse().ok().and_then(rustix::process::Pid::from_raw) else { continue };
        let Ok(process) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) else { continue };
        if members().lines().any(|still| still == member) {
            let _ = rustix::process::pidfd_send_signal(process, rustix::process::Signal::KILL);
        }
    }
}
