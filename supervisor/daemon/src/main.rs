//! plugvisord: prepares everything as one thread, gives up privileges, then runs.
#![forbid(unsafe_code)]

use std::{io::IsTerminal as _, process::ExitCode};

use clap::{Parser, Subcommand};
use plugvisor_daemon::{
    examine::{self, Look},
    run,
    start::{self, Args},
};
use tracing_subscriber::EnvFilter;

/// EX_SOFTWARE and EX_IOERR of sysexits.h.
const BUG: u8 = 70;
const HOST: u8 = 74;

/// Starts plugins as walled processes and routes their calls.
#[derive(Debug, Parser)]
#[command(name = "plugvisord", version)]
struct Program {
    #[command(flatten)]
    args: Args,
    #[command(subcommand)]
    look: Option<LookCommand>,
}

/// For `plugvisor`, in place of a start. Each writes a message of `plugvisor.admin.v1` in protobuf's binary form.
#[derive(Clone, Copy, Debug, Subcommand)]
enum LookCommand {
    /// What this host can do; `plugvisor doctor` shows it.
    #[command(hide = true)]
    ExamineHost,
    /// Whether the configuration holds; `plugvisor config validate` shows it.
    #[command(hide = true)]
    CheckConfig,
}

fn main() -> ExitCode {
    let Program { args, look } = Program::parse();
    if let Some(look) = look {
        let look = match look {
            LookCommand::ExamineHost => Look::Host,
            LookCommand::CheckConfig => Look::Configuration,
        };
        return examine::run(look, args);
    }
    log_to_stderr();
    std::panic::catch_unwind(|| supervise(args)).unwrap_or_else(|_| {
        eprintln!("plugvisord: this is a bug; please report the message above");
        ExitCode::from(BUG)
    })
}

fn supervise(args: Args) -> ExitCode {
    let prepared = match start::prepare(args) {
        Ok(prepared) => prepared,
        Err(error) => {
            eprintln!("plugvisord: {error}");
            return ExitCode::from(error.exit_code());
        }
    };
    // One thread for the supervisor and one for the broker; blocking work (hashing bundles, reading cgroups) is rare.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(std::time::Duration::from_secs(1))
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("plugvisord: the runtime cannot be started: {error}; check the limits on threads and open files");
            return ExitCode::from(HOST);
        }
    };
    match runtime.block_on(run::run(prepared)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plugvisord: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("PLUGVISOR_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}
