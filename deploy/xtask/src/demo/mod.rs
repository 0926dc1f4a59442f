//! `cargo xtask demo`: everything at once, with no configuration and as any user, judged from outside.
//!
//! The supervisor is asked as an operator asks it, by the `plugvisor` command; what it says is then compared with what
//! the kernel shows to a stranger: `/proc`, pidfds, cgroup files, and the pixels of the page that the plugins made.

mod checks;
mod fault;
mod interrupt;
pub(crate) mod leftovers;
mod page;
pub(crate) mod place;
pub(crate) mod process;
pub(crate) mod supervisor;
mod walls;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::build::{self, Profile, workspace_root};
use crate::setup;
use crate::steps::step;
use checks::Checks;
use interrupt::Interrupt;
use leftovers::Belongings;
use page::Samples;
use place::{Place, configuration};
use supervisor::{Supervisor, http_get, is_about};

/// What `cargo xtask demo` was asked for.
#[derive(Debug, clap::Args)]
pub(crate) struct Demo {
    /// Also kill a plugin under load, check every step, clean up and end.
    #[arg(long)]
    once: bool,
    /// How to build.
    #[arg(long, value_enum, default_value_t = Profile::Release)]
    profile: Profile,
    /// Use the programs in this directory instead of building: plugvisor, plugvisord, plugvisor-launcher and the plugins.
    #[arg(long, value_name = "DIRECTORY")]
    binaries: Option<PathBuf>,
    /// The sources of the bundles and the samples.
    #[arg(long, value_name = "DIRECTORY", hide = true, default_value_os_t = workspace_root())]
    source: PathBuf,
}

/// What `--source` must hold.
pub(crate) const SOURCES: [&str; 2] = [SAMPLES, build::BUNDLES];
const SAMPLES: &str = "deploy/demo";

const PLUGINS: [&str; 3] = ["gallery", "markdown", "thumbnailer"];

const SUPERVISOR_MEMORY: u64 = 40 * 1024 * 1024;
/// What is promised holds for a release build; most of it is the program's own code, which unoptimised is twice as long.
const LAUNCHER_MEMORY: u64 = if cfg!(debug_assertions) { 8 } else { 4 } * 1024 * 1024;

/// Runs the demo.
///
/// # Errors
/// When a step cannot be done or a check fails.
pub(crate) fn run(demo: &Demo) -> anyhow::Result<()> {
    let binaries = match &demo.binaries {
        Some(directory) => directory.clone(),
        None => {
            step("tools", "run the command it names, then `cargo xtask demo` again", setup::for_build)?;
            step("build", "fix what the compiler shows", || build::binaries(demo.profile))?
        }
    };
    let interrupt = Interrupt::listen()?;
    let place = Place::new()?;
    build::bundle_examples(&demo.source, &binaries, &place.bundles())?;
    let mut checks = Checks::default();

    let found = probe(&binaries, &place, &mut checks)?;
    let lacking = &found.lacking;
    if !found.sandbox {
        weaken(&place.bundles().join(SANDBOXED))?;
    }
    let metrics = metrics_address(demo.once);
    let text = configuration(&place.runtime(), &place.state(), &metrics, Some(&place.bundles()), lacking);
    let file = place.configure(&text)?;
    println!("\nconfiguration, {}:\n{}", file.display(), indented(&text));
    let supervisor = Supervisor::start(&binaries, &file, &place.runtime(), &place.path().join("plugvisord.log"))?;
    let result = show(demo, &binaries, &supervisor, &place, lacking, &interrupt, &mut checks);
    if let Err(error) = result {
        if interrupt.requested() {
            bail!("interrupted; the supervisor and its plugins are stopped");
        }
        eprintln!("\nplugvisord said:\n{}", indented(&supervisor.log_text()));
        return Err(error);
    }
    end(supervisor, place, &mut checks)?;
    checks.verdict()
}

/// What this host can do.
struct Found {
    /// The controls that it cannot enforce.
    lacking: Vec<String>,
    /// It can run plugins at SANDBOX, when what may be missing is allowed to be.
    sandbox: bool,
}

/// The plugin that runs at SANDBOX where the host can: it decodes pictures of strangers.
const SANDBOXED: &str = "thumbnailer";

/// Has a bundle ask for PROCESS instead of SANDBOX.
fn weaken(bundle: &Path) -> anyhow::Result<()> {
    let manifest = bundle.join("plugin.json");
    let text = std::fs::read_to_string(&manifest).with_context(|| format!("cannot read {}", manifest.display()))?;
    let weaker = text.replace("\"isolationLevel\": \"sandbox\"", "\"isolationLevel\": \"process\"");
    std::fs::write(&manifest, weaker).with_context(|| format!("cannot write {}", manifest.display()))
}

/// Starts the supervisor without plugins to learn what this host can enforce, and stops it.
fn probe(binaries: &Path, place: &Place, checks: &mut Checks) -> anyhow::Result<Found> {
    let file = place.configure(&configuration(&place.runtime(), &place.state(), "127.0.0.1:0", None, &[]))?;
    let supervisor = Supervisor::start(binaries, &file, &place.runtime(), &place.path().join("probe.log"))?;
    let status = supervisor.ask(&["status"])?;
    let features = status["supervisor"]["features"].as_array().cloned().unwrap_or_default();
    if features.is_empty() {
        bail!("the supervisor does not tell what this host can enforce");
    }
    println!("this host can enforce, found by trying:");
    let mut lacking = Vec::new();
    for feature in &features {
        let text = |field: &str| feature[field].as_str().unwrap_or_default().to_owned();
        let works = feature["works"] == true;
        println!("  {} {:<20} {}", if works { "+" } else { "-" }, text("name"), text("detail"));
        if !works {
            lacking.push(text("name"));
        }
    }
    let doctor = supervisor.ask(&["doctor"])?;
    println!("and plugins can run at the levels");
    let mut sandbox = false;
    for level in doctor["levels"].as_array().into_iter().flatten() {
        let name = level["name"].as_str().unwrap_or_default();
        let gaps: Vec<&Value> = level["gaps"].as_array().into_iter().flatten().collect();
        let possible = gaps.iter().all(|gap| gap["may_be_allowed"] == true);
        sandbox |= possible && name == "sandbox";
        let text = |gap: &&Value| match gap["control"].as_str() {
            None | Some("") => gap["why"].as_str().unwrap_or_default().to_owned(),
            Some(control) => format!("without {control}"),
        };
        let gaps: Vec<String> = gaps.iter().map(text).collect();
        println!("  {} {name:<20} {}", if possible { "+" } else { "-" }, gaps.join(", "));
    }
    let status = supervisor.stop()?;
    checks.check("a supervisor without plugins stops cleanly", status.success(), status, "status 0", "see probe.log");
    Ok(Found { lacking, sandbox })
}

/// The address of the design when it is free. `--once` runs beside others, so it takes any.
fn metrics_address(once: bool) -> String {
    const USUAL: &str = "127.0.0.1:4001";
    let free = !once && std::net::TcpListener::bind(USUAL).is_ok();
    if free { USUAL } else { "127.0.0.1:0" }.to_owned()
}

/// Everything between start and stop.
fn show(
    demo: &Demo,
    binaries: &Path,
    supervisor: &Supervisor,
    place: &Place,
    lacking: &[String],
    interrupt: &Interrupt,
    checks: &mut Checks,
) -> anyhow::Result<()> {
    let mut events = supervisor.follow_events()?;
    for name in PLUGINS {
        events
            .wait_for(&format!("plugin.ready of {name}"), Duration::from_secs(60), |event| {
                is_about(event, "plugin.ready", name)
            })
            .with_context(|| trouble(supervisor, name))?;
    }
    let status = supervisor.ask(&["status"])?;
    let supervisor_pid = pid(&status["supervisor"]["pid"])?;
    let launcher_pid = pid(&status["supervisor"]["launcher_pid"])?;
    let matches = supervisor_pid == supervisor.pid();
    checks.check("the supervisor is the process we started", matches, supervisor_pid, supervisor.pid(), "report it");
    let below: BTreeSet<u32> = process::tree(supervisor.pid())?.into_iter().map(|(_, pid)| pid).collect();
    let degraded: BTreeSet<String> = lacking.iter().cloned().collect();
    for name in PLUGINS {
        let plugin = supervisor.plugin(name)?;
        let loaded = plugin["state"] == "PLUGIN_STATE_LOADED";
        checks.check(&format!("{name} is loaded"), loaded, &plugin["state"], "LOADED", "see `plugvisor describe`");
        let pid = pid(&plugin["pid"])?;
        let next = "see the process tree";
        checks.check(&format!("{name} runs below the supervisor"), below.contains(&pid), pid, "in the tree", next);
        walls::judge(supervisor, name, pid, &degraded, checks)?;
    }

    println!("\nthe page:");
    let samples = Samples::read(&demo.source.join(SAMPLES))?;
    page::make(supervisor, &samples, &place.page(), checks)?;
    walls::print_tree(supervisor.pid())?;
    println!("\nstate:");
    print!("{}", indented(&String::from_utf8_lossy(&supervisor.command(&["status"]).output()?.stdout)));

    if demo.once {
        let calls = PathBuf::from(status["supervisor"]["calls_socket"].as_str().unwrap_or_default());
        fault::kill_under_load(supervisor, &mut events, &calls, samples.picture("rings.png")?, checks)?;
    }
    println!();
    watch_from_outside(supervisor, &status, checks)?;
    memory("supervisor", supervisor_pid, SUPERVISOR_MEMORY, checks)?;
    memory("launcher", launcher_pid, LAUNCHER_MEMORY, checks)?;

    // With --once all three are gone before anyone could look.
    if !demo.once {
        println!("\npage     {}", place.page().display());
        println!("metrics  http://{}/metrics", status["supervisor"]["metrics_address"].as_str().unwrap_or_default());
        println!("socket   {}", place.runtime().join("admin.sock").display());
    }
    if !lacking.is_empty() {
        println!("degraded {} (allowed in the configuration above)", lacking.join(", "));
    }
    if !demo.once {
        let plugvisor = binaries.join("plugvisor");
        let socket = place.runtime().join("admin.sock");
        println!("\nIt runs until Ctrl-C. Try: {} --socket {} status", plugvisor.display(), socket.display());
        interrupt.wait();
    }
    Ok(())
}

/// What machines read: metrics with every plugin's state, the events, and readiness.
fn watch_from_outside(supervisor: &Supervisor, status: &Value, checks: &mut Checks) -> anyhow::Result<()> {
    let address = status["supervisor"]["metrics_address"].as_str().context("no metrics address")?;
    let metrics = http_get(address, "/metrics")?;
    for name in PLUGINS {
        let loaded = metrics.lines().any(|line| {
            line.starts_with("plugvisor_plugin_state{")
                && line.contains(&format!("plugin=\"{name}\""))
                && line.to_ascii_lowercase().contains("state=\"loaded\"")
                && line.ends_with(" 1")
        });
        let seen = if loaded { "loaded" } else { "not so" };
        checks.check(&format!("/metrics: {name}"), loaded, seen, "loaded", &format!("open http://{address}/metrics"));
    }
    let ready = http_get(address, "/readyz");
    let seen = ready.as_ref().map_or_else(ToString::to_string, |_| "200".to_owned());
    // Read to the end: the events that are kept, numbered without a gap.
    let events = supervisor.ask(&["events"])?;
    let numbers: Vec<u64> =
        events.as_array().into_iter().flatten().filter_map(|event| event["sequence"].as_u64()).collect();
    let gapless = numbers.windows(2).all(|pair| pair[1] == pair[0] + 1) && numbers.len() > PLUGINS.len();
    let ends = [numbers.first(), numbers.last()].map(|number| number.map_or("none".to_owned(), ToString::to_string));
    let range = format!("{} of them, {}", numbers.len(), ends.join(" to "));
    checks.check("the events have no gap", gapless, range, "consecutive numbers", "see `plugvisor events`");
    checks.check("/readyz", ready.is_ok(), seen, "200", "see `plugvisor status`");
    Ok(())
}

fn memory(what: &str, pid: u32, most: u64, checks: &mut Checks) -> anyhow::Result<()> {
    #[allow(clippy::cast_precision_loss, reason = "one decimal is shown")]
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / 1024.0 / 1024.0);
    let seen = process::resident_bytes(pid)?;
    let next = "what grew? compare with the last release";
    checks.check(
        &format!("{what}'s memory"),
        seen <= most,
        mebibytes(seen),
        format!("at most {}", mebibytes(most)),
        next,
    );
    Ok(())
}

/// Stops the supervisor and looks for what it left.
fn end(supervisor: Supervisor, place: Place, checks: &mut Checks) -> anyhow::Result<()> {
    println!("\nstopping:");
    let belongings = Belongings::of(supervisor.pid())?;
    let status = supervisor.stop()?;
    checks.check("plugvisord stops cleanly on SIGTERM", status.success(), status, "status 0", "see its log");
    belongings.are_gone(&place.runtime(), checks)?;
    let path = place.path().to_path_buf();
    place.remove()?;
    checks.check("no file is left", !path.exists(), path.display(), "removed", "remove it");
    Ok(())
}

/// Why a plugin did not come up, in the supervisor's words.
fn trouble(supervisor: &Supervisor, name: &str) -> String {
    match supervisor.plugin(name) {
        Ok(plugin) => format!("{name} is {}: {} ({})", plugin["state"], plugin["last_error"], plugin["hint"]),
        Err(error) => format!("{error:#}"),
    }
}

fn pid(value: &Value) -> anyhow::Result<u32> {
    let pid = value.as_u64().and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid > 0);
    pid.with_context(|| format!("{value} is no pid"))
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
