//! The benchmarks: what Plugvisor costs, as ratios against a peer or a floor measured in the same run.
//!
//! Each side of a measurement is a process of its own. Ours are this same binary, built for release, in the hidden
//! roles of [`part`].

mod broker;
mod copier;
mod echo;
mod egress;
mod figures;
mod load;
mod outside;
mod part;
mod peers;
mod processes;
mod reattach;
mod spawn;

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    /// Calls: direct, copied, brokered, through HAProxy and through nginx.
    Broker(broker::Options),
    /// The egress proxy: what it adds to a connection, and how exactly it holds a bandwidth.
    Egress(egress::Options),
    /// Starting plugins: launch to exec at each level and beside bwrap and runc, discovery to LOADED, and a restart of the
    /// supervisor with 50 of them.
    Spawn(spawn::Options),
    /// One of the processes of a measurement.
    #[command(hide = true, subcommand)]
    Part(part::Part),
}

/// Runs one benchmark.
///
/// # Errors
/// When a side cannot be started or answers wrongly.
pub(crate) fn run(bench: &Bench) -> anyhow::Result<()> {
    match bench {
        Bench::Broker(options) => broker::run(options),
        Bench::Egress(options) => egress::run(options),
        Bench::Spawn(options) => spawn::run(options),
        Bench::Part(part) => part::run(part),
    }
}
