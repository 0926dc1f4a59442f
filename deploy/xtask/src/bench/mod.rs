//! The benchmarks: what Plugvisor costs, as ratios against a peer or a floor measured in the same run.

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Calls: direct, copied, brokered, through HAProxy and through nginx.
    Broker,
    /// Starting plugins: launch to exec, discovery to LOADED.
    Spawn,
}

/// Runs one benchmark.
///
/// # Errors
/// When a side cannot be started or answers wrongly.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    anyhow::bail!("bench {bench:?} has not landed yet")
}
