//! `plugvisor`: the command of operators and authors.
//!
//! It asks the supervisor over its admin socket and prints the answers. It knows the contracts and nothing of how the
//! supervisor works; what plugins say is printed only after control characters are taken out.
#![forbid(unsafe_code)]

mod admin;
mod args;
mod codec;
mod command;
mod failure;
mod inspect;
mod output;
mod quantity;
mod text;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::admin::Admin;
use crate::args::{BreakerCommand, Cli, Command, ConfigCommand, ExplainCommand, PluginCommand};
use crate::command::{
    approve, breaker, call, config, describe, doctor, events, explain, life, logs, run, status, trace, validate,
};
use crate::failure::{Failure, Outcome};
use crate::output::Output;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let no_color = cli.global.no_color;
    match dispatch(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.print(no_color);
            failure.outcome.into()
        }
    }
}

/// Commands without a supervisor are done here; all others need a runtime and a connection.
fn dispatch(cli: Cli) -> Result<(), Failure> {
    match cli.command {
        Command::Run { arguments } => Err(run::run(&arguments)),
        Command::Approve { new_key: Some(path), .. } => approve::new_key(&Output::new(&cli.global)?, &path),
        Command::Approve { bundle: Some(bundle), tier: Some(tier), digest, key: Some(key), new_key: None } => {
            let asked = approve::Asked { bundle, tier: tier.into(), digest };
            approve::approve(&Output::new(&cli.global)?, &asked, &key)
        }
        Command::Plugin { command: PluginCommand::Validate { path } } => {
            validate::validate(&Output::new(&cli.global)?, &path)
        }
        Command::Plugin { command: PluginCommand::Trace(arguments) } => {
            trace::trace(&Output::new(&cli.global)?, &arguments)
        }
        Command::Completion { shell } => {
            // By way of memory: generate panics when the reader is gone.
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "plugvisor", &mut script);
            Output::new(&cli.global)?.script(&script)
        }
        Command::Config { command: ConfigCommand::Validate { file } } => {
            config::validate(&Output::new(&cli.global)?, file.as_deref())
        }
        Command::Config { command: ConfigCommand::Show { origin, file: Some(file) } } => {
            config::show(&Output::new(&cli.global)?, &config::would_hold(Some(&file))?, origin)
        }
        // Files that are named are those of a start to come, whatever runs.
        Command::Doctor { offline, config, launcher_policy }
            if offline || config.is_some() || launcher_policy.is_some() =>
        {
            let files = [("--config", config.as_deref()), ("--launcher-policy", launcher_policy.as_deref())];
            doctor::report(&Output::new(&cli.global)?, &inspect::ask("examine-host", &files)?)
        }
        command => {
            let output = Output::new(&cli.global)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| {
                Failure::new(Outcome::Failed, format!("cannot start: {error}"), "is the system out of descriptors?")
            })?;
            runtime.block_on(async {
                let admin = Admin::connect(cli.global.socket.as_deref(), cli.global.timeout).await;
                // These two have an answer without a supervisor; a socket that was named is meant, though.
                let down = |failure: &Failure| failure.outcome == Outcome::DaemonDown && cli.global.socket.is_none();
                match (&command, admin) {
                    (Command::Doctor { .. }, Err(failure)) if down(&failure) => {
                        doctor::report(&output, &inspect::ask("examine-host", &[])?)
                    }
                    (Command::Config { command: ConfigCommand::Show { origin, .. } }, Err(failure))
                        if down(&failure) =>
                    {
                        eprintln!("no supervisor runs; this is what one would go by that is started now");
                        config::show(&output, &config::would_hold(None)?, *origin)
                    }
                    (_, admin) => ask(command, &admin?, &output, cli.global.timeout).await,
                }
            })
        }
    }
}

async fn ask(
    command: Command,
    admin: &Admin,
    output: &Output,
    timeout: Option<std::time::Duration>,
) -> Result<(), Failure> {
    match command {
        Command::Run { .. }
        | Command::Plugin { .. }
        | Command::Approve { .. }
        | Command::Completion { .. }
        | Command::Config { command: ConfigCommand::Validate { .. } } => unreachable!("done without a supervisor"),
        Command::Doctor { .. } => doctor::report(output, &doctor::ask(admin).await?),
        Command::Config { command: ConfigCommand::Show { origin, .. } } => {
            config::show(output, &config::ask(admin).await?, origin)
        }
        Command::Status => status::status(admin, output).await,
        Command::Describe { name } => describe::describe(admin, output, &name).await,
        Command::Events { follow, plugin, type_prefix, after } => {
            events::events(admin, output, events::Filter { follow, plugin, type_prefix, after }).await
        }
        Command::Logs { follow, tail, filter, name } => {
            logs::logs(admin, output, name.as_deref(), tail, follow, filter).await
        }
        Command::Load { plugin } => life::load(admin, output, &plugin).await,
        Command::Unload { name, cascade } => life::unload(admin, output, &name, cascade).await,
        Command::Restart { name } => life::restart(admin, output, &name).await,
        Command::Call(arguments) => call::call(admin, output, &arguments, timeout).await,
        Command::Explain { command: ExplainCommand::Call(arguments) } => explain::call(admin, output, &arguments).await,
        Command::Breaker { command: BreakerCommand::List } => breaker::list(admin, output).await,
        Command::Breaker { command: BreakerCommand::Reset { plugin } } => {
            breaker::reset(admin, output, plugin.as_deref()).await
        }
    }
}
