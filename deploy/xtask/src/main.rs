//! The commands of the project itself: `cargo xtask demo|test|bench|fuzz|bundle|schema|setup`.
//!
//! It builds and drives the real binaries from outside; it knows nothing of their insides.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod fuzz;
mod guest;
mod schema;
mod setup;
mod skips;
mod steps;
mod test;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The commands of the Plugvisor project.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start everything, show it, and check it from outside.
    Demo(demo::Demo),
    /// Check everything that continuous integration checks.
    Test {
        /// The long suites too: more rounds, more cases.
        #[arg(long)]
        full: bool,
        /// Only these checks; may be given several times.
        #[arg(long, value_enum, value_name = "CHECK")]
        only: Vec<test::Check>,
        #[command(subcommand)]
        lane: Option<Lane>,
    },
    /// The virtual machine's own side of `test vm`.
    #[command(hide = true)]
    VmGuest {
        /// What the host wrote down.
        plan: std::path::PathBuf,
    },
    /// Measure; the last line on standard output is one JSON object.
    Bench {
        #[command(subcommand)]
        what: bench::Bench,
    },
    /// Try changed inputs on what reads strangers' bytes, until one breaks a property; `fuzz --help` says how many.
    #[command(disable_help_flag = true)]
    Fuzz {
        /// TARGET, `--runs N`, `--seed S`, `--input FILE`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Put the example plugins' bundles into a directory.
    Bundle {
        /// Where to put them, one directory each.
        into: std::path::PathBuf,
        /// How to build them.
        #[arg(long, value_enum, default_value_t = build::Profile::Release)]
        profile: build::Profile,
    },
    /// Write the generated JSON Schemas into the checked-in files.
    Schema,
    /// Install what the other commands need: on Debian as root by apt-get, otherwise it names the command.
    Setup,
}

/// Lanes that are asked for by name.
#[derive(Debug, Subcommand)]
enum Lane {
    /// The tests in a virtual machine: Debian 12 with systemd as PID 1 and cgroup v2 alone. As root, on Debian 12. Its
    /// quick part is among the tests too, with `--full` all of it.
    Vm {
        /// Only the parts whose name holds this word; may be given several times.
        #[arg(long, value_name = "WORD")]
        part: Vec<String>,
        /// The fixed part that is quick, instead of everything.
        #[arg(long)]
        quick: bool,
    },
    /// What a hostile plugin attempts, at every level: expected and seen. The last line of the table is one JSON object. It
    /// is among the tests too.
    Escape,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Demo(demo) => demo::run(&demo),
        Command::Test { full, only, lane: None } => test::run_checks(full, &only),
        Command::Test { lane: Some(Lane::Vm { part, quick }), .. } => vm::run(!quick, &part),
        Command::VmGuest { plan } => vm::run_guest(&plan),
        Command::Test { lane: Some(Lane::Escape), .. } => test::escape(),
        Command::Bench { what } => {
            // A peer that is missing is named in the result; our own figures need none.
            if matches!(what, bench::Bench::Broker(_) | bench::Bench::Spawn(_))
                && let Err(error) = setup::for_bench()
            {
                eprintln!("note: {error:#}");
            }
            bench::run(&what)
        }
        Command::Fuzz { arguments } => fuzz::fuzz(&arguments),
        Command::Bundle { into, profile } => build::binaries(profile)
            .and_then(|binaries| build::bundle_examples(&build::workspace_root(), &binaries, &into)),
        Command::Schema => schema::write(),
        Command::Setup => setup::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
