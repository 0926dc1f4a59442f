//! `plugvisor`: the command of operators and authors.
//!
//! It asks the supervisor over its admin socket and prints the answers. It knows the contracts and nothing of how the
//! supervisor works; what plugins say is printed only after control characters are taken out.
#![forbid(unsafe_code)]

mod args;
mod failure;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::failure::{Failure, Outcome};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("error: {failure}");
            failure.outcome.into()
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let Command::Status = cli.command else {
        return Err(Failure::new(Outcome::Failed, "this command has not landed yet", ""));
    };
    Err(Failure::silent(Outcome::DaemonDown))
}
