//! Named steps with their time, stopping at the first that fails.

use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail};

/// Runs one named step and prints how long it took.
///
/// # Errors
/// What the step failed with, with its name and what to do next in front.
pub(crate) fn step<T>(name: &str, what_to_do: &str, run: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    eprintln!("==> {name}");
    let started = Instant::now();
    let result = run();
    let seconds = started.elapsed().as_secs_f64();
    match result {
        Ok(value) => {
            eprintln!("    ok {name} ({seconds:.1} s)");
            Ok(value)
        }
        Err(error) => {
            eprintln!("    FAILED {name} ({seconds:.1} s)");
            Err(error.context(format!("step {name:?} failed; next: {what_to_do}")))
        }
    }
}

/// Runs a command with the terminal's streams and fails when it does.
///
/// # Errors
/// When the command cannot be started or does not end with status 0; the message holds the command line.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let line = command_line(command);
    let status = command.status().with_context(|| format!("cannot start `{line}`"))?;
    if !status.success() {
        bail!("`{line}` ended with {status}");
    }
    Ok(())
}

/// The command as a person would type it.
fn command_line(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_named_with_its_arguments() {
        let error = run(Command::new("false").arg("--please")).unwrap_err();
        assert!(error.to_string().starts_with("`false --please` ended with"), "{error}");
    }

    #[test]
    fn a_failed_step_says_what_to_do() {
        let error = step("lint", "cargo fmt", || -> anyhow::Result<()> { bail!("ugly") }).unwrap_err();
        assert_eq!(format!("{error:#}"), r#"step "lint" failed; next: cargo fmt: ugly"#);
    }
}
