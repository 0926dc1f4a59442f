//! The roles that this binary plays as a process of a measurement. Each says `ready` on its standard output and ends
//! with its standard input.

use std::path::PathBuf;

use clap::Subcommand;
use tokio::io::AsyncReadExt as _;

use super::{copier, echo, load};

/// One role.
#[derive(Debug, Subcommand)]
pub(crate) enum Part {
    /// Serve echoes.
    Serve {
        /// The socket to make.
        #[arg(long)]
        listen: PathBuf,
    },
    /// Copy bytes.
    Copy {
        /// The socket to make.
        #[arg(long)]
        listen: PathBuf,
        /// The socket to copy to and from.
        #[arg(long)]
        upstream: PathBuf,
    },
    /// Make calls, as standard input asks.
    Load {
        /// The socket to call.
        #[arg(long)]
        connect: PathBuf,
    },
}

pub(super) fn run(part: &Part) -> anyhow::Result<()> {
    anyhow::ensure!(!cfg!(debug_assertions), "a benchmark of a debug build says nothing; use `cargo xtask bench`");
    // One thread each, as the floors in the design were measured.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match part {
            Part::Serve { listen } => until_told(echo::serve(listen)).await,
            Part::Copy { listen, upstream } => until_told(copier::copy(listen, upstream)).await,
            Part::Load { connect } => load::obey(connect).await,
        }
    })
}

/// Runs until standard input ends.
async fn until_told(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let mut stdin = tokio::io::stdin();
    let mut rest = Vec::new();
    tokio::select! {
        ended = work => ended,
        read = stdin.read_to_end(&mut rest) => Ok(read.map(drop)?),
    }
}
