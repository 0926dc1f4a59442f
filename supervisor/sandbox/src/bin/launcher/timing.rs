//! When each part of a launch was done, so that a slow one can be seen where it happens. It decides nothing.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

macro_rules! parts {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// A part of a launch, in the order in which they are done.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Part { $($(#[$doc])* $name,)* }

        impl Part {
            const ALL: &[Self] = &[$(Self::$name,)*];

            /// The name in a report.
            const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

parts! {
    /// Checking the request.
    Checked = "check";
    /// Making the sockets and pipes.
    Sockets = "sockets";
    /// Making the cgroups. Their limits are written while the child sets itself up.
    Groups = "groups";
    /// Copying the mounts that a spare will attach.
    Attached = "mounts";
    /// Making the process, or waking a spare, until it runs.
    Started = "start";
    /// Joining the cgroups.
    Joined = "join";
    /// Making the other namespaces.
    Namespaces = "namespaces";
    /// The mount tree.
    Tree = "tree";
    /// Limits, uid, capabilities.
    Identity = "identity";
    /// Descriptors.
    Descriptors = "descriptors";
    /// Landlock.
    Landlock = "landlock";
    /// Forking the program from its init.
    Forked = "fork";
    /// Waiting for the launcher to say that the limits hold and the uid is on the disk.
    Released = "wait";
    /// Seccomp and exec, until the launcher sees it.
    Executed = "seccomp and exec";
}

const COUNT: usize = Part::ALL.len();

/// When each part was done, by the monotonic clock, which is one for all processes; 0 for what has not been done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Marks([u64; COUNT]);

impl Marks {
    /// The size of [`Marks::to_bytes`].
    pub(crate) const SIZE: usize = COUNT * 8;

    /// This part is done now.
    pub(crate) fn done(&mut self, part: Part) {
        self.0[part as usize] = now();
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        for (to, at) in bytes.chunks_exact_mut(8).zip(self.0) {
            to.copy_from_slice(&at.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Self::SIZE]) -> Self {
        let mut marks = Self::default();
        for (at, from) in marks.0.iter_mut().zip(bytes.chunks_exact(8)) {
            *at = from.try_into().map_or(0, u64::from_le_bytes);
        }
        marks
    }

    /// What each part that was done took, counted from `begin`.
    pub(crate) fn since(&self, begin: u64) -> Vec<(String, u64)> {
        let mut last = begin;
        let done = Part::ALL.iter().zip(self.0).filter(|(_, at)| *at > 0);
        done.map(|(part, at)| {
            let took = at.saturating_sub(last);
            last = last.max(at);
            (part.as_str().to_owned(), took)
        })
        .collect()
    }
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}
