//! The harness: the real binaries, started in a temporary directory, watched through their own interfaces.
//!
//! A test makes a [`World`] (a lane, bundles, a configuration), starts it as a [`Daemon`], and waits for events; nothing
//! here sleeps. [`Daemon::stop`] asserts that nothing is left behind. The harness knows the daemon only from outside: its
//! sockets, its events, `/proc` and the cgroup tree.
#![forbid(unsafe_code)]

mod binaries;
mod bundle;
mod census;
mod cli;
mod daemon;
pub mod events;
mod external;
// As `place` below.
#[path = "../../supervisor/sandbox/tests/harness/guest.rs"]
pub mod guest;
mod held_up;
mod lane;
mod neighbour;
pub mod patience;
// The same file as the launcher's tests use: it knows the kernel and the standard library alone.
#[path = "../../supervisor/sandbox/tests/harness/place.rs"]
mod place;
mod process;
mod receiver;
mod scrape;
mod world;

use std::time::Duration;

pub use binaries::Binaries;
pub use bundle::BundleBuilder;
pub use census::{Census, Holdings};
pub use cli::CliOutput;
pub use daemon::{Daemon, Remains};
pub use events::EventLog;
pub use external::ExternalLauncher;
pub use held_up::HeldUp;
pub use lane::Lane;
pub use neighbour::{Neighbour, Quiet};
pub(crate) use patience::stretched;
pub use process::{Process, descendants};
pub use receiver::{Nobody, Receiver, attribute};
pub use scrape::{Sample, Scrape};
pub use world::{NotStarted, World};

/// The longest that a scenario may take: only for what never ends, so far more than the slowest takes on a busy machine.
const LONGEST: Duration = Duration::from_secs(400);

/// Runs a scenario to its end on a runtime of its own.
///
/// # Panics
/// When the scenario fails, with the whole chain of causes.
pub fn run<F: Future<Output = anyhow::Result<()>>>(scenario: F) {
    run_within(LONGEST, scenario);
}

/// Runs a scenario that may take longer than others.
///
/// # Panics
/// When the scenario fails, with the whole chain of causes.
pub fn run_within<F: Future<Output = anyhow::Result<()>>>(longest: Duration, scenario: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    let longest = stretched(longest);
    let bounded = async {
        // A stream that never ends must fail, not hang the whole run.
        tokio::time::timeout(longest, scenario).await.unwrap_or_else(|_| anyhow::bail!("not done in {longest:?}"))
    };
    if let Err(error) = runtime.block_on(bounded) {
        // Not its Debug: that adds a backtrace of the harness, which says nothing about the daemon.
        let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
        panic!("{}", causes.join("\ncaused by: "));
    }
}

/// Makes a test per lane out of each `async fn(Lane) -> anyhow::Result<()>`.
#[macro_export]
macro_rules! scenarios {
    ($($name:ident),+ $(,)?) => {
        $(mod $name {
            #[test]
            fn privileged() {
                if $crate::Lane::possible().contains(&$crate::Lane::Privileged) {
                    $crate::run(super::$name($crate::Lane::Privileged));
                }
            }
            #[test]
            fn rootless() {
                $crate::run(super::$name($crate::Lane::Rootless));
            }
        })+
    };
}

/// The contracts of the test plugins, from `tests/proto`.
#[allow(missing_docs, reason = "generated; the .proto file is the documentation")]
#[allow(clippy::all, unreachable_pub, unused_qualifications, reason = "generated")]
pub mod contract {
    tonic::include_proto!("plugvisor.test.v1");

    /// The contracts as a serialised `google.protobuf.FileDescriptorSet`.
    pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/test-descriptor.binpb"));
}
