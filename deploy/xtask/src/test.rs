//! `cargo xtask test`: everything that continuous integration holds, in one command.

use std::collections::BTreeMap;
use std::fs;
use std::io::BufReader;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use crate::build::{Profile, binaries, cargo, target_directory, workspace_root};
use crate::demo::SOURCES;
use crate::steps::{run, step};
use crate::{guest, setup, skips, vm};

/// The version that the project's deny.toml is written for.
const CARGO_DENY: &str = "0.20.2";

/// Makes the long suites run; tests read it.
const FULL: &str = "PLUGVISOR_FULL";

/// What `--full` asks of `tests/tests/memory.rs`: loads and unloads, and calls. Without it both are short.
const MEMORY: [(&str, &str); 2] = [("PLUGVISOR_TEST_ROUNDS", "200"), ("PLUGVISOR_TEST_CALLS", "10000000")];

/// The name under which the virtual machine is skipped.
const MACHINE: &str = "virtual-machine";

/// A uid without an account, so that nothing belongs to it.
const STRANGER: u32 = 61_235;

/// The checks, in the order in which they run: cheap ones first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Check {
    /// rustfmt.
    Format,
    /// clippy with every warning denied.
    Clippy,
    /// cargo-deny: bans, licences and sources.
    Dependencies,
    /// Every test of the workspace, and which of them may be skipped.
    Tests,
    /// `cargo xtask demo --once`; as root also as an ordinary user.
    Demo,
    /// rustdoc with every warning denied.
    Documentation,
    /// The quick part of `cargo xtask test vm`; with `--full` all of it.
    Vm,
}

/// The escape suite alone, with its table.
///
/// # Errors
/// When a cell of the table is not as expected.
pub(crate) fn escape() -> anyhow::Result<()> {
    step("tools", "run the command it names, then try again", setup::for_build)?;
    step("escape", "see the lines that begin with WRONG; docs/escape.md says how to read the table", || {
        let mut command = cargo();
        command.args(["test", "--locked", "--workspace", "--all-features", "--test", "escape"]).args([
            "--",
            "--nocapture",
            "--test-threads",
            "1",
        ]);
        if let Some(kernel) = guest::kernel() {
            command.env(guest::VARIABLE, kernel);
        }
        run(&mut command)
    })
}

/// Runs the checks, all of them when `only` is empty, and stops at the first that fails.
///
/// # Errors
/// The step that failed and what to do next.
pub(crate) fn run_checks(full: bool, only: &[Check]) -> anyhow::Result<()> {
    let wanted = |check| only.is_empty() || only.contains(&check);
    step("tools", "run the command it names, then `cargo xtask test` again", setup::for_build)?;
    if wanted(Check::Format) {
        step("format", "`cargo fmt --all`", || run(cargo().args(["fmt", "--all", "--check"])))?;
    }
    if wanted(Check::Clippy) {
        step("clippy", "fix what it shows; `cargo xtask test --only clippy` repeats it", || {
            run(cargo()
                .args(["clippy", "--locked", "--workspace", "--all-targets", "--all-features"])
                .args(["--", "-D", "warnings"]))
        })?;
    }
    if wanted(Check::Dependencies) {
        step("dependencies", "see deny.toml: remove the dependency, or state there why it may stay", deny)?;
    }
    if wanted(Check::Tests) || wanted(Check::Demo) {
        let programs = step("binaries", "fix what the compiler shows", || binaries(Profile::Dev))?;
        if wanted(Check::Tests) {
            step("what the tests use", "run the command it names, then `cargo xtask test` again", setup::for_tests)?;
            step("tests", "repeat one with `cargo test -p CRATE NAME`", || tests(full))?;
            if full {
                step("memory", "`cargo test -p plugvisor-tests --test memory` is the short one", memory)?;
            }
        }
        if wanted(Check::Demo) {
            demos(&programs, "demo")?;
            if full {
                // As it is shipped: how much memory the two may have differs by profile.
                let release =
                    step("binaries for release", "fix what the compiler shows", || binaries(Profile::Release))?;
                demos(&release, "demo of the release build")?;
            }
        }
    }
    if wanted(Check::Documentation) {
        step("documentation", "fix what rustdoc shows", || {
            run(cargo()
                .args(["doc", "--locked", "--workspace", "--all-features", "--no-deps", "--quiet"])
                .env("RUSTDOCFLAGS", "-D warnings"))
        })?;
    }
    if wanted(Check::Vm) {
        machine(full)?;
    }
    match (only.is_empty(), full) {
        (false, _) => eprintln!("what was asked for passed"),
        (true, true) => eprintln!("everything passed, long suites too"),
        (true, false) => eprintln!("everything passed; `--full` adds the long suites"),
    }
    Ok(())
}

/// The tests in the virtual machine, on a host that can run it; on any other that is a skip like those of tests.
fn machine(full: bool) -> anyhow::Result<()> {
    let why = vm::cannot().or_else(|| setup::for_vm().err().map(|error| format!("{error:#}")));
    let Some(why) = why else { return vm::run(full, &[]) };
    eprintln!("    skipped {MACHINE}: {why}");
    expect_skips(&BTreeMap::from([(MACHINE.to_owned(), why)]))
}

fn demos(binaries: &Path, name: &str) -> anyhow::Result<()> {
    let next = "see which line says FAILED; `cargo xtask test --only demo` repeats it";
    step(name, next, || run(&mut demo(&binaries.join("xtask"), binaries)))?;
    if rustix::process::geteuid().is_root() {
        step(&format!("{name} as an ordinary user"), next, || demo_as_stranger(binaries))?;
    }
    Ok(())
}

/// cargo-deny, fetched once into the target directory; advisories need a database that may not be reachable.
fn deny() -> anyhow::Result<()> {
    let tools = target_directory()?.join("tools");
    let program = tools.join("bin/cargo-deny");
    if !program.exists() {
        eprintln!("    installing cargo-deny {CARGO_DENY} into {} (once, about two minutes)", tools.display());
        run(cargo()
            .args(["install", "cargo-deny", "--version", CARGO_DENY, "--locked", "--no-default-features", "--debug"])
            .arg("--root")
            .arg(&tools))?;
    }
    run(Command::new(program).current_dir(workspace_root()).args(["check", "bans", "licenses", "sources"]))
}

/// The command line of a demo that ends by itself.
fn demo(xtask: &Path, binaries: &Path) -> Command {
    let mut command = Command::new(xtask);
    command.args(["demo", "--once", "--binaries"]).arg(binaries);
    command
}

/// A demo by a user who owns nothing here and cannot even read the clone: a directory of copies is all there is.
fn demo_as_stranger(binaries: &Path) -> anyhow::Result<()> {
    let place = tempfile::Builder::new().prefix("plugvisor-stranger-").tempdir().context("cannot make a directory")?;
    let (source, programs) = (place.path().join("source"), place.path().join("bin"));
    for directory in SOURCES {
        copy_directory(&workspace_root().join(directory), &source.join(directory))?;
    }
    fs::create_dir(&programs).with_context(|| format!("cannot make {}", programs.display()))?;
    for name in ["xtask", "plugvisor", "plugvisord", "plugvisor-launcher", "gallery", "markdown", "thumbnailer"] {
        let (from, to) = (binaries.join(name), programs.join(name));
        // Programs with debug information are large; a second name costs nothing on the same file system.
        if fs::hard_link(&from, &to).is_err() {
            fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        }
    }
    // Our umask may be strict; the stranger must be able to read.
    run(Command::new("chmod").args(["-R", "a+rX"]).arg(place.path()))?;
    let mut command = demo(&programs.join("xtask"), &programs);
    command.arg("--source").arg(&source).uid(STRANGER).gid(STRANGER).current_dir("/").env_remove("XDG_RUNTIME_DIR");
    run(&mut command)
}

fn copy_directory(from: &Path, to: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))? {
        let path = entry.with_context(|| format!("cannot read {}", from.display()))?.path();
        let to = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_directory(&path, &to)?;
        } else {
            fs::copy(&path, &to).with_context(|| format!("cannot copy {}", path.display()))?;
        }
    }
    Ok(())
}

/// The long count of what is held on to, in a build for release: so many calls take an hour in one for development.
fn memory() -> anyhow::Result<()> {
    binaries(Profile::Release)?;
    let mut command = cargo();
    command
        .args(["test", "--locked", "--workspace", "--all-features", "--release", "--test", "memory"])
        .args(["--", "--test-threads", "1", "--show-output"])
        .envs(MEMORY);
    run(&mut command)
}

/// Runs the tests and holds what they say they skipped against the checked-in list.
fn tests(full: bool) -> anyhow::Result<()> {
    let mut command = cargo();
    command.args(["test", "--locked", "--workspace", "--all-features", "--no-fail-fast", "--", "--show-output"]);
    command.stdout(Stdio::piped());
    if full {
        command.env(FULL, "1");
    }
    if let Some(kernel) = guest::kernel() {
        command.env(guest::VARIABLE, kernel);
    }
    let mut running = command.spawn().context("cannot start cargo test")?;
    let output = running.stdout.take().context("cargo test has no standard output")?;
    let skips = skips::collect(BufReader::new(output), |line| println!("{line}"))?;
    let status = running.wait().context("cannot wait for cargo test")?;
    if !status.success() {
        bail!("`cargo test --workspace` ended with {status}");
    }
    for (name, why) in &skips {
        eprintln!("    skipped {name}: {why}");
    }
    expect_skips(&skips)
}

/// Holds skips against the checked-in list.
fn expect_skips(skips: &BTreeMap<String, String>) -> anyhow::Result<()> {
    const LIST: &str = "tests/expected-skips.txt";
    let list = workspace_root().join(LIST);
    let expected = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    skips::check(skips, &expected, LIST)
}
