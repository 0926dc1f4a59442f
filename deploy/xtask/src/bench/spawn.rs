//! `bench spawn`: what starting a plugin costs.

/// How much to measure.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {}

pub(super) fn run(_options: &Options) -> anyhow::Result<()> {
    anyhow::bail!("bench spawn has not landed yet")
}
