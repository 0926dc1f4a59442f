//! How much slower than usual this machine is.

use std::{sync::OnceLock, time::Duration};

/// The time that an emulated machine gets for what may take `usual`: as many times as much as `PLUGVISOR_TEST_PATIENCE`
/// says, a whole number, and once without it. Only for waiting; what is measured is not stretched.
///
/// # Panics
/// When the variable is something else.
#[must_use]
pub fn stretched(usual: Duration) -> Duration {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    let read = || std::env::var("PLUGVISOR_TEST_PATIENCE").map_or(1, |times| times.parse().expect("a whole number"));
    usual * *SLOWNESS.get_or_init(read)
}
