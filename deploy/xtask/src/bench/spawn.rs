//! `bench spawn`: what starting a plugin costs, on the real programs.
//!
//! A supervisor with one real plugin is started again and again; in each, the plugin is restarted. Launch to exec is the
//! launcher's own measurement, which the event `plugin.starting` carries; discovery to LOADED is the time between the
//! events `plugin.discovered` and `plugin.ready`. Both are read from outside, as an operator would.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use super::{
    figures::{cores, kernel, median, number, quartiles},
    reattach::{self, Restart},
};
use crate::{
    build::{self, Profile},
    demo::{
        place::{Place, configuration},
        supervisor::{Supervisor, is_about},
    },
};

/// The plugin that is started: small, and as real as any.
pub(super) const PLUGIN: &str = "markdown";
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The levels of the design. Those that this version cannot launch are named as missing.
const LEVELS: [&str; 5] = ["none", "process", "container", "sandbox", "vm"];
/// The part of a launch that one with a child made ahead does not have: the child is in its cgroups already.
const JOIN: &str = "join";

/// How much to measure.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Supervisors to start.
    #[arg(long, default_value_t = 5)]
    starts: usize,
    /// Restarts of the plugin in each.
    #[arg(long, default_value_t = 4)]
    restarts: usize,
    /// Times that a supervisor with 50 plugins is killed and started again.
    #[arg(long, default_value_t = 3)]
    reattaches: usize,
}

#[derive(Default)]
struct Figures {
    launch_exec_ms: Vec<f64>,
    /// Those of them that had a child made ahead, and those that began from nothing.
    ahead_ms: Vec<f64>,
    from_nothing_ms: Vec<f64>,
    discovery_loaded_ms: Vec<f64>,
    /// A restart: from the first phase of the new load to LOADED.
    reloaded_ms: Vec<f64>,
    reattached: Vec<Restart>,
    /// What each part of a launch took, in the order in which they are done.
    parts_us: Vec<(String, Vec<f64>)>,
    level: Option<String>,
}

impl Figures {
    fn add_parts(&mut self, parts: &Value) {
        for part in parts.as_array().into_iter().flatten() {
            let (Some(name), Some(took)) = (part[0].as_str(), part[1].as_f64()) else { continue };
            match self.parts_us.iter_mut().find(|(known, _)| known == name) {
                Some((_, times)) => times.push(took),
                None => self.parts_us.push((name.to_owned(), vec![took])),
            }
        }
    }
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let binaries = build::binaries(Profile::Release)?;
    let mut figures = Figures::default();
    let mut lacking = Vec::new();
    for start in 1..=options.starts {
        eprint!("\rstart {start} of {}", options.starts);
        let place = Place::new()?;
        let bundles = place.bundles();
        build::bundle(
            &build::workspace_root().join(build::BUNDLES).join(PLUGIN),
            &binaries.join(PLUGIN),
            &bundles.join(PLUGIN),
        )?;
        if start == 1 {
            lacking = what_is_lacking(&binaries, &place)?;
        }
        measure(&binaries, &place, &lacking, options.restarts, &mut figures)?;
        place.remove()?;
    }
    for reattach in 1..=options.reattaches {
        eprint!("\rsupervisor with 50 plugins killed, {reattach} of {}", options.reattaches);
        figures.reattached.push(reattach::measure(&binaries, &lacking)?);
    }
    eprintln!();
    report(&figures, &lacking, options);
    Ok(())
}

/// What this host cannot enforce; the plugin is then started without it, and the result says so.
fn what_is_lacking(binaries: &Path, place: &Place) -> anyhow::Result<Vec<String>> {
    let file = place.configure(&configuration(&place.runtime(), &place.state(), "127.0.0.1:0", None, &[]))?;
    let supervisor = Supervisor::start(binaries, &file, &place.runtime(), &place.path().join("probe.log"))?;
    let status = supervisor.ask(&["status"])?;
    let features = status["supervisor"]["features"].as_array().cloned().unwrap_or_default();
    supervisor.stop()?;
    let broken = features.iter().filter(|feature| feature["works"] != true);
    Ok(broken.filter_map(|feature| feature["name"].as_str()).map(str::to_owned).collect())
}

fn measure(
    binaries: &Path,
    place: &Place,
    lacking: &[String],
    restarts: usize,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let text = configuration(&place.runtime(), &place.state(), "127.0.0.1:0", Some(&place.bundles()), lacking);
    let file = place.configure(&text)?;
    let supervisor = Supervisor::start(binaries, &file, &place.runtime(), &place.path().join("plugvisord.log"))?;
    let mut events = supervisor.follow_events()?;
    let mut seen = 0;
    for restart in 0..=restarts {
        if restart > 0 {
            supervisor.ask(&["restart", PLUGIN])?;
        }
        let (_, ready) = events
            .wait_for("plugin.ready", PATIENCE, |event| {
                is_about(event, "plugin.ready", PLUGIN) && sequence(event) > seen
            })
            .with_context(|| format!("{PLUGIN} did not start; the supervisor said:\n{}", supervisor.log_text()))?;
        let (_, starting) = events.wait_for("plugin.starting", PATIENCE, |event| {
            is_about(event, "plugin.starting", PLUGIN) && sequence(event) > seen
        })?;
        if restart == 0 {
            let (_, found) =
                events.wait_for("plugin.discovered", PATIENCE, |event| is_about(event, "plugin.discovered", PLUGIN))?;
            figures.discovery_loaded_ms.push(moment(&ready)? - moment(&found)?);
        } else {
            let (_, first) = events.wait_for("plugin.loading_progress", PATIENCE, |event| {
                is_about(event, "plugin.loading_progress", PLUGIN) && sequence(event) > seen
            })?;
            figures.reloaded_ms.push(moment(&ready)? - moment(&first)?);
        }
        seen = sequence(&ready);
        let micros = starting["data"]["launch_exec_us"].as_f64().context("the event says no launch_exec_us")?;
        figures.launch_exec_ms.push(micros / 1_000.0);
        let parts = &starting["data"]["launch_parts_us"];
        let from_nothing = parts.as_array().into_iter().flatten().any(|part| part[0] == JOIN);
        if from_nothing { &mut figures.from_nothing_ms } else { &mut figures.ahead_ms }.push(micros / 1_000.0);
        figures.add_parts(parts);
        figures.level = starting["data"]["level"].as_str().map(str::to_owned);
    }
    drop(events);
    supervisor.stop()?;
    Ok(())
}

/// When an event happened, in milliseconds of its day; the two that are compared are a moment apart.
pub(super) fn moment(event: &Value) -> anyhow::Result<f64> {
    let text = event["time"].as_str().context("an event without time")?;
    let clock = text.split_once('T').and_then(|(_, clock)| clock.strip_suffix('Z'));
    let mut parts = clock.context("an event's time is not RFC 3339 in UTC")?.splitn(3, ':').map(str::parse::<f64>);
    let mut next = || parts.next().context("an event's time is cut short")?.context("an event's time is no number");
    let (hours, minutes, seconds) = (next()?, next()?, next()?);
    Ok(((hours * 60.0 + minutes) * 60.0 + seconds) * 1_000.0)
}

fn sequence(event: &Value) -> u64 {
    let sequence = &event["sequence"];
    // 64-bit numbers may be text in JSON.
    sequence.as_u64().or_else(|| sequence.as_str()?.parse().ok()).unwrap_or_default()
}

fn report(figures: &Figures, lacking: &[String], options: &Options) {
    let level = figures.level.as_deref().unwrap_or("process");
    let launch = median(&figures.launch_exec_ms);
    let loaded = median(&figures.discovery_loaded_ms);
    println!(
        "Medians of {} starts of plugvisord with {} restarts of {PLUGIN} in each.",
        options.starts, options.restarts
    );
    println!();
    println!("{:32} {:>10} {:>10} {:>10}", "ms", "quarter", "median", "3 quarters");
    let row = |name: &str, values: &[f64], digits: usize| {
        let (low, high) = quartiles(values);
        println!("{name:32} {low:>10.digits$} {:>10.digits$} {high:>10.digits$}", median(values));
    };
    let mut by_level = Map::new();
    for each in LEVELS {
        if each == level {
            row(&format!("launch to exec, {each}"), &figures.launch_exec_ms, 2);
            by_level.insert(each.to_owned(), number(launch));
        } else {
            println!("{:32} {:>10} {:>10}", format!("launch to exec, {each}"), "", "missing");
        }
    }
    row("  with a child made ahead", &figures.ahead_ms, 2);
    row("  from nothing", &figures.from_nothing_ms, 2);
    row("discovery to LOADED", &figures.discovery_loaded_ms, 1);
    let reattached = figures.reattached.iter().map(|restart| restart.reattached_ms).collect::<Vec<_>>();
    let back = figures.reattached.iter().map(|restart| restart.wall_ms).collect::<Vec<_>>();
    row("restart: first phase to LOADED", &figures.reloaded_ms, 1);
    row("50 plugins taken over", &reattached, 1);
    row("start to ready, with these", &back, 1);
    if !figures.parts_us.is_empty() {
        println!();
        println!("{:32} {:>10} {:>10} {:>10}", "us, parts of launch to exec", "quarter", "median", "3 quarters");
    }
    let mut parts = Vec::new();
    for (name, times) in &figures.parts_us {
        row(name, times, 0);
        parts.push(json!({ "part": name, "median_us": number(median(times)), "launches": times.len() }));
    }
    if !lacking.is_empty() {
        println!("without what this host cannot enforce: {}", lacking.join(", "));
    }
    println!();
    let missing: Vec<&str> = LEVELS.into_iter().filter(|each| *each != level).collect();
    let result = json!({
        "launch_exec_ms": by_level,
        "launch_exec_quartiles_ms": spread(&figures.launch_exec_ms),
        "launch_exec_ahead_ms": number(median(&figures.ahead_ms)),
        "launch_exec_from_nothing_ms": number(median(&figures.from_nothing_ms)),
        "discovery_loaded_ms": number(loaded),
        "discovery_loaded_quartiles_ms": spread(&figures.discovery_loaded_ms),
        "restart_loaded_ms": number(median(&figures.reloaded_ms)),
        "reattach_50_ms": number(median(&reattached)),
        "reattach_50_wall_ms": number(median(&back)),
        "parts": parts,
        "cores": cores(),
        "kernel": kernel(),
        "missing": missing,
        "not_enforced": lacking,
        "raw": {
            "launch_exec_ms": figures.launch_exec_ms,
            "launch_exec_ahead_ms": figures.ahead_ms,
            "launch_exec_from_nothing_ms": figures.from_nothing_ms,
            "discovery_loaded_ms": figures.discovery_loaded_ms,
            "restart_loaded_ms": figures.reloaded_ms,
            "reattach_50_ms": reattached,
            "reattach_50_wall_ms": back,
        },
    });
    println!("{result}");
}

fn spread(values: &[f64]) -> Value {
    let (low, high) = quartiles(values);
    json!([number(low), number(high)])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{moment, sequence};

    #[test]
    fn an_event_tells_its_moment_and_number() {
        let event = json!({ "time": "2026-11-23T01:00:02.345Z", "sequence": "7" });
        assert!((moment(&event).unwrap() - 3_602_345.0).abs() < 1e-6);
        assert_eq!(sequence(&event), 7);
        assert!(moment(&json!({ "time": "yesterday" })).is_err());
    }
}
