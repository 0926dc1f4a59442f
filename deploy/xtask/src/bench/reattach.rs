//! The part of `bench spawn` about a supervisor that dies: 50 small plugins under a launcher that lingers, kill -9 of the
//! supervisor, another one in its place.
//!
//! The figure is the new supervisor's own, `SupervisorStatus.reattached_in`: from its connection to the launcher until
//! each plugin that was found has answered. Beside it is the time from starting the program to the event
//! `supervisor.ready`, which also counts its own start and the probe of the host. Each plugin must be the same process
//! as before, and nothing may be left at the end, or there is no figure.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::spawn::{PATIENCE, PLUGIN, moment};
use crate::{
    build,
    demo::{
        leftovers::Belongings,
        place::{Place, configuration},
        process::Process,
        supervisor::{Supervisor, is_about},
    },
};

/// As many as the goal names.
const PLUGINS: usize = 50;
/// Long enough for the slowest machine to start another supervisor.
const LINGER: &str = "\n[launcher]\nlinger = \"60s\"\n";
const DAY_MS: f64 = 24.0 * 3_600_000.0;

/// One restart.
#[derive(Debug)]
pub(super) struct Restart {
    /// What the supervisor says.
    pub(super) reattached_ms: f64,
    /// From its start to the event that it is ready.
    pub(super) wall_ms: f64,
}

/// Restarts a supervisor once.
pub(super) fn measure(binaries: &Path, lacking: &[String]) -> anyhow::Result<Restart> {
    let place = Place::new()?;
    bundles(binaries, &place)?;
    let text = configuration(&place.runtime(), &place.state(), "127.0.0.1:0", Some(&place.bundles()), lacking);
    let file = place.configure(&(text + LINGER))?;
    let start = |log: &str| Supervisor::start(binaries, &file, &place.runtime(), &place.path().join(log));

    let first = start("first.log")?;
    let mut events = first.follow_events()?;
    for name in names() {
        events
            .wait_for("plugin.ready", PATIENCE, |event| is_about(event, "plugin.ready", &name))
            .with_context(|| format!("{name} did not start; the supervisor said:\n{}", first.log_text()))?;
    }
    drop(events);
    let status = first.ask(&["status"])?;
    let before = pids(&status)?;
    ensure!(before.len() == PLUGINS, "{} of {PLUGINS} plugins run", before.len());
    let belongings = Belongings::of(first.pid())?;
    let launcher = launcher(&status)?;
    first.kill()?;
    let abandoned = Abandoned(launcher);

    let started = milliseconds_of_day()?;
    let second = start("second.log")?;
    let mut events = second.follow_events()?;
    let ready = events
        .wait_for("supervisor.ready", PATIENCE, |event| event["type"] == "io.plugvisor.supervisor.ready.v1")
        .with_context(|| format!("it does not become ready; it said:\n{}", second.log_text()))?
        .1;
    drop(events);
    let wall_ms = (moment(&ready)? - started).rem_euclid(DAY_MS);
    let status = second.ask(&["status"])?;
    let own = &status["supervisor"];
    ensure!(
        own["reattached_plugins"] == PLUGINS && pids(&status)? == before,
        "{} of {PLUGINS} plugins were taken over; the supervisor said:\n{}",
        own["reattached_plugins"],
        second.log_text()
    );
    let reattached_ms = own["reattached_in"].as_str().and_then(milliseconds);
    let reattached_ms = reattached_ms.with_context(|| format!("reattached_in is {}", own["reattached_in"]))?;
    second.stop()?;
    let left = belongings.left()?;
    ensure!(left.is_empty(), "left after the stop: {}", left.join(", "));
    drop(abandoned);
    place.remove()?;
    Ok(Restart { reattached_ms, wall_ms })
}

/// A launcher whose supervisor was killed. Whatever fails from then on, it ends, and every plugin with it.
#[derive(Debug)]
struct Abandoned(Process);

impl Drop for Abandoned {
    fn drop(&mut self) {
        let ended = |limit| self.0.ended_within(limit).unwrap_or(true);
        if !ended(Duration::ZERO) && self.0.terminate().is_ok() && !ended(Duration::from_secs(25)) {
            let _ = self.0.kill();
        }
    }
}

fn names() -> impl Iterator<Item = String> {
    (1..=PLUGINS).map(|number| format!("{PLUGIN}-{number:02}"))
}

/// The same plugin under many names. It exports nothing: one name cannot be served by many.
fn bundles(binaries: &Path, place: &Place) -> anyhow::Result<()> {
    let model = place.path().join("model").join(PLUGIN);
    build::bundle(&build::workspace_root().join(build::BUNDLES).join(PLUGIN), &binaries.join(PLUGIN), &model)?;
    let text = fs::read(model.join("plugin.json")).context("cannot read the plugin's manifest")?;
    let mut manifest: Value = serde_json::from_slice(&text).context("the plugin's manifest is no JSON")?;
    manifest["module"]["exports"] = json!([]);
    for name in names() {
        let bundle = place.bundles().join(&name);
        build::copy_bundle(&model, &bundle)?;
        manifest["name"] = json!(name);
        fs::write(bundle.join("plugin.json"), manifest.to_string()).context("cannot write a manifest")?;
    }
    Ok(())
}

/// The processes of the plugins that run.
fn pids(status: &Value) -> anyhow::Result<BTreeMap<String, u64>> {
    let plugins = status["plugins"].as_array().context("the status names no plugins")?;
    let running = plugins.iter().filter_map(|plugin| Some((plugin["name"].as_str()?, plugin["pid"].as_u64()?)));
    Ok(running.filter(|(_, pid)| *pid > 0).map(|(name, pid)| (name.to_owned(), pid)).collect())
}

fn launcher(status: &Value) -> anyhow::Result<Process> {
    let pid = status["supervisor"]["launcher_pid"].as_u64().context("the status names no launcher")?;
    Process::open(u32::try_from(pid).context("the launcher's pid is none")?)
}

/// The moment in UTC, as an event tells its own.
fn milliseconds_of_day() -> anyhow::Result<f64> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).context("the clock is before 1970")?;
    Ok((now.as_secs_f64() * 1_000.0).rem_euclid(DAY_MS))
}

/// A duration as JSON writes it, such as `0.123456s`.
fn milliseconds(text: &str) -> Option<f64> {
    Some(text.strip_suffix('s')?.parse::<f64>().ok()? * 1_000.0)
}

#[cfg(test)]
mod tests {
    use super::{milliseconds, names, pids};
    use serde_json::json;

    #[test]
    fn a_duration_is_read() {
        assert!((milliseconds("0.125s").unwrap() - 125.0).abs() < 1e-9);
        assert_eq!(milliseconds("125"), None);
    }

    #[test]
    fn each_plugin_has_its_name() {
        let names: std::collections::BTreeSet<String> = names().collect();
        assert_eq!(names.len(), 50);
        assert!(names.contains("markdown-01"));
    }

    #[test]
    fn what_does_not_run_has_no_process() {
        let status = json!({ "plugins": [{ "name": "a", "pid": 7 }, { "name": "b", "pid": 0 }, { "name": "c" }] });
        let pids = pids(&status).unwrap();
        assert_eq!(pids.into_iter().collect::<Vec<_>>(), [("a".to_owned(), 7)]);
    }
}
