//! `bench spawn`: what starting a plugin costs, on the real programs.
//!
//! A supervisor with one real plugin is started again and again, at each level that the launcher supports; in each, the
//! plugin is restarted. Launch to exec is the launcher's own measurement, which the event `plugin.starting` carries;
//! discovery to LOADED is the time between the events `plugin.discovered` and `plugin.ready`. Both are read from outside,
//! as an operator would. Every launch counts, the first ones of a name and those without a child made ahead too. What the
//! same costs elsewhere is measured in `outside`. At VM each launch takes seconds and a kernel, so there are few, and what
//! counts is not the exec of the emulator but when the plugin is ready.

use std::{collections::BTreeMap, fs, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::Context as _;
use serde_json::{Map, Value, json};

use super::{
    figures::{cores, kernel, median, number, quartiles},
    outside::{self, Outside, PEERS},
    reattach::{self, Restart},
};
use crate::{
    build::{self, Profile},
    demo::{
        place::{Place, configuration},
        supervisor::{Supervisor, is_about},
    },
    guest,
};

/// The plugin that is started: small, and as real as any.
pub(super) const PLUGIN: &str = "markdown";
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// The levels of the design. Those that this version cannot launch are named as missing.
const LEVELS: [&str; 5] = ["none", "process", "container", "sandbox", "vm"];
/// The level of what is not about levels.
const USUAL: &str = "process";
/// The level of which there are few launches.
const MACHINE: &str = "vm";
/// Restarts at that level, beside its one start.
const MACHINE_RESTARTS: usize = 2;
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
    /// Times that each level and each peer starts the same program.
    #[arg(long, default_value_t = 25)]
    rounds: usize,
}

/// What was measured at one level.
#[derive(Default)]
struct Figures {
    launch_exec_ms: Vec<f64>,
    /// Those of them that had a child made ahead, and those that began from nothing.
    ahead_ms: Vec<f64>,
    from_nothing_ms: Vec<f64>,
    discovery_loaded_ms: Vec<f64>,
    /// A restart: from the first phase of the new load to LOADED.
    reloaded_ms: Vec<f64>,
    /// Every load, the first one too: from its first phase to LOADED.
    start_ready_ms: Vec<f64>,
    /// What each part of a launch took, in the order in which they are done.
    parts_us: Vec<(String, Vec<f64>)>,
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
    let place = Place::new()?;
    let lacking = what_is_lacking(&binaries, &place)?;
    place.remove()?;
    let outside = outside::measure(&binaries, &LEVELS, options.rounds)?;
    let mut by_level = BTreeMap::new();
    for level in LEVELS.into_iter().filter(|level| outside.levels.contains_key(level)) {
        let mut figures = Figures::default();
        for start in 1..=options.starts {
            eprint!("\r{level}, start {start} of {}", options.starts);
            let place = Place::new()?;
            let bundle = place.bundles().join(PLUGIN);
            build::bundle(&build::workspace_root().join(build::BUNDLES).join(PLUGIN), &binaries.join(PLUGIN), &bundle)?;
            ask_for(level, &bundle)?;
            measure(&binaries, &place, None, &lacking, level, options.restarts, &mut figures)?;
            place.remove()?;
        }
        eprintln!();
        by_level.insert(level, figures);
    }
    if let Some(kernel) = guest::kernel() {
        eprintln!("{MACHINE}, {} launches", MACHINE_RESTARTS + 1);
        by_level.insert(MACHINE, machine(&binaries, &kernel, &lacking)?);
    }
    let mut reattached = Vec::new();
    for reattach in 1..=options.reattaches {
        eprint!("\rsupervisor with 50 plugins killed, {reattach} of {}", options.reattaches);
        reattached.push(reattach::measure(&binaries, &lacking)?);
    }
    eprintln!();
    report(&by_level, &outside, &reattached, &lacking, options);
    Ok(())
}

/// The level VM, with this kernel.
fn machine(binaries: &Path, kernel: &Path, lacking: &[String]) -> anyhow::Result<Figures> {
    let mut figures = Figures::default();
    let place = Place::new()?;
    let policy = place.path().join("launcher.toml");
    fs::write(&policy, guest::settings(kernel, place.path())?).context("cannot write the launcher's policy")?;
    // Root's alone to write, whatever our umask is.
    fs::set_permissions(&policy, fs::Permissions::from_mode(0o644)).context("cannot chmod the launcher's policy")?;
    let bundle = place.bundles().join(PLUGIN);
    build::bundle(&build::workspace_root().join(build::BUNDLES).join(PLUGIN), &binaries.join(PLUGIN), &bundle)?;
    ask_for(MACHINE, &bundle)?;
    measure(binaries, &place, Some(&policy), lacking, MACHINE, MACHINE_RESTARTS, &mut figures)?;
    place.remove()?;
    Ok(figures)
}

/// Writes the level into the bundle's manifest, and the trust that it needs.
fn ask_for(level: &str, bundle: &Path) -> anyhow::Result<()> {
    let file = bundle.join("plugin.json");
    let text = fs::read(&file).context("cannot read the plugin's manifest")?;
    let mut manifest: Value = serde_json::from_slice(&text).context("the plugin's manifest is no JSON")?;
    manifest["security"]["sandbox"]["isolationLevel"] = json!(level);
    if level == MACHINE {
        // An emulated machine needs some seconds before the program is executed.
        manifest["monitoring"]["performance"]["maxStartupTime"] = json!(PATIENCE.as_millis());
    }
    if level == "none" {
        // Only the operator's own plugins go without walls, and the example claims less trust than that.
        manifest["security"]["trustLevel"] = json!("internal");
    }
    fs::write(&file, manifest.to_string()).context("cannot write the plugin's manifest")
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
    policy: Option<&Path>,
    lacking: &[String],
    level: &str,
    restarts: usize,
    figures: &mut Figures,
) -> anyhow::Result<()> {
    let text = configuration(&place.runtime(), &place.state(), "127.0.0.1:0", Some(&place.bundles()), lacking);
    // No other tier may go without walls.
    let text = if level == "none" { text.replace("tier = \"verified\"", "tier = \"internal\"") } else { text };
    let file = place.configure(&text)?;
    let log = place.path().join("plugvisord.log");
    let supervisor = Supervisor::start_with(binaries, &file, &place.runtime(), &log, policy)?;
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
        let (_, first) = events.wait_for("plugin.loading_progress", PATIENCE, |event| {
            is_about(event, "plugin.loading_progress", PLUGIN) && sequence(event) > seen
        })?;
        figures.start_ready_ms.push(moment(&ready)? - moment(&first)?);
        if restart == 0 {
            let (_, found) =
                events.wait_for("plugin.discovered", PATIENCE, |event| is_about(event, "plugin.discovered", PLUGIN))?;
            figures.discovery_loaded_ms.push(moment(&ready)? - moment(&found)?);
        } else {
            figures.reloaded_ms.push(moment(&ready)? - moment(&first)?);
        }
        seen = sequence(&ready);
        let micros = starting["data"]["launch_exec_us"].as_f64().context("the event says no launch_exec_us")?;
        figures.launch_exec_ms.push(micros / 1_000.0);
        let parts = &starting["data"]["launch_parts_us"];
        let from_nothing = parts.as_array().into_iter().flatten().any(|part| part[0] == JOIN);
        if from_nothing { &mut figures.from_nothing_ms } else { &mut figures.ahead_ms }.push(micros / 1_000.0);
        figures.add_parts(parts);
        let got = &starting["data"]["level"];
        anyhow::ensure!(got == level, "{PLUGIN} was started at {got}, not at {level}");
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

fn report(
    by_level: &BTreeMap<&str, Figures>,
    outside: &Outside,
    reattached: &[Restart],
    lacking: &[String],
    options: &Options,
) {
    let usual = by_level.get(USUAL);
    println!(
        "Medians of {} starts of plugvisord with {} restarts of {PLUGIN} in each, at each level; of one start with {} restarts \
         at {MACHINE}; of {} starts of a program that tells the time.",
        options.starts, options.restarts, MACHINE_RESTARTS, options.rounds
    );
    println!();
    println!("{:36} {:>10} {:>10} {:>10}", "ms", "quarter", "median", "3 quarters");
    let row = |name: &str, values: &[f64], digits: usize| {
        let (low, high) = quartiles(values);
        println!("{name:36} {low:>10.digits$} {:>10.digits$} {high:>10.digits$}", median(values));
    };
    for level in LEVELS {
        let Some(figures) = by_level.get(level) else {
            println!("{:36} {:>10} {:>10}", format!("launch to exec, {level}"), "", "missing");
            continue;
        };
        row(&format!("launch to exec, {level}"), &figures.launch_exec_ms, 2);
        row(&format!("  {} with a child made ahead", figures.ahead_ms.len()), &figures.ahead_ms, 2);
        row(&format!("  {} from nothing", figures.from_nothing_ms.len()), &figures.from_nothing_ms, 2);
        let starts = figures.start_ready_ms.len();
        row(&format!("  {starts} from start to ready"), &figures.start_ready_ms, 1);
    }
    if let Some(figures) = usual {
        row("discovery to LOADED", &figures.discovery_loaded_ms, 1);
        row("restart: first phase to LOADED", &figures.reloaded_ms, 1);
    }
    let taken_over = reattached.iter().map(|restart| restart.reattached_ms).collect::<Vec<_>>();
    let back = reattached.iter().map(|restart| restart.wall_ms).collect::<Vec<_>>();
    row("50 plugins taken over", &taken_over, 1);
    row("start to ready, with these", &back, 1);
    println!();
    println!("{:36} {:>10} {:>10} {:>10}", "ms, order to the program's first act", "quarter", "median", "3 quarters");
    for (level, ours) in &outside.levels {
        row(&format!("{level} ({} of {} made ahead)", ours.ahead, ours.seen.len()), &ours.seen, 2);
    }
    for name in PEERS {
        match outside.peers.get(name) {
            Some(seen) => row(name, seen, 2),
            None => println!("{name:36} {:>10} {:>10}", "", "missing"),
        }
    }
    let mut parts = Vec::new();
    for (name, times) in usual.iter().flat_map(|figures| &figures.parts_us) {
        if parts.is_empty() {
            println!();
            println!("{:36} {:>10} {:>10} {:>10}", "us, parts of launch to exec", "quarter", "median", "3 quarters");
        }
        row(name, times, 0);
        parts.push(json!({ "part": name, "median_us": number(median(times)), "launches": times.len() }));
    }
    if !lacking.is_empty() {
        println!("without what this host cannot enforce: {}", lacking.join(", "));
    }
    println!();
    let of = |what: fn(&Figures) -> &Vec<f64>| {
        let all = by_level.iter().map(|(level, figures)| ((*level).to_owned(), number(median(what(figures)))));
        Value::Object(all.collect())
    };
    let usual_of = |what: fn(&Figures) -> &Vec<f64>| usual.map_or(&[][..], |figures| what(figures));
    let missing: Vec<&str> = LEVELS.into_iter().filter(|each| !by_level.contains_key(each)).collect();
    let mut result = json!({
        "launch_exec_ms": of(|figures| &figures.launch_exec_ms),
        "start_ready_ms": of(|figures| &figures.start_ready_ms),
        "launch_exec_quartiles_ms": spread(usual_of(|figures| &figures.launch_exec_ms)),
        "launch_exec_ahead_ms": number(median(usual_of(|figures| &figures.ahead_ms))),
        "launch_exec_from_nothing_ms": number(median(usual_of(|figures| &figures.from_nothing_ms))),
        "launches": by_level.iter().map(|(level, figures)| ((*level).to_owned(), json!({
            "ahead": figures.ahead_ms.len(),
            "from_nothing": figures.from_nothing_ms.len(),
            "quartiles_ms": spread(&figures.launch_exec_ms),
            "start_ready_quartiles_ms": spread(&figures.start_ready_ms),
        }))).collect::<Map<_, _>>(),
        "discovery_loaded_ms": number(median(usual_of(|figures| &figures.discovery_loaded_ms))),
        "discovery_loaded_quartiles_ms": spread(usual_of(|figures| &figures.discovery_loaded_ms)),
        "restart_loaded_ms": number(median(usual_of(|figures| &figures.reloaded_ms))),
        "reattach_50_ms": number(median(&taken_over)),
        "reattach_50_wall_ms": number(median(&back)),
        "parts": parts,
        "cores": cores(),
        "kernel": kernel(),
        "missing": missing,
        "not_enforced": lacking,
        "raw": {
            "launch_exec_ms": by_level.iter().map(|(level, figures)| ((*level).to_owned(), json!({
                "ahead": figures.ahead_ms, "from_nothing": figures.from_nothing_ms,
            }))).collect::<Map<_, _>>(),
            "start_ready_ms": by_level.iter().map(|(level, figures)| {
                ((*level).to_owned(), json!(figures.start_ready_ms))
            }).collect::<Map<_, _>>(),
            "discovery_loaded_ms": usual_of(|figures| &figures.discovery_loaded_ms),
            "restart_loaded_ms": usual_of(|figures| &figures.reloaded_ms),
            "reattach_50_ms": taken_over,
            "reattach_50_wall_ms": back,
        },
    });
    if let Value::Object(result) = &mut result {
        compare(outside, result);
    }
    println!("{result}");
}

/// What was seen from outside, and how many times as long the others took as each level.
fn compare(outside: &Outside, result: &mut Map<String, Value>) {
    let peer = |name: &str| outside.peers.get(name).map_or(f64::NAN, |seen| median(seen));
    let mut seen = Map::new();
    let mut ratios = Map::new();
    for (level, ours) in &outside.levels {
        let own = median(&ours.seen);
        seen.insert(
            (*level).to_owned(),
            json!({
                "median_ms": number(own),
                "quartiles_ms": spread(&ours.seen),
                "launcher_ms": number(median(&ours.launcher)),
                "ahead": ours.ahead,
                "from_nothing": ours.seen.len() - ours.ahead,
            }),
        );
        let by_peer = PEERS.map(|name| (name.to_owned(), number(peer(name) / own)));
        ratios.insert((*level).to_owned(), Value::Object(by_peer.into_iter().collect()));
    }
    result.insert("seen".to_owned(), Value::Object(seen));
    result.insert("ratios".to_owned(), Value::Object(ratios));
    for name in PEERS {
        result.insert(format!("{name}_ms"), number(peer(name)));
        let (low, high) = quartiles(outside.peers.get(name).map_or(&[][..], Vec::as_slice));
        result.insert(format!("{name}_quartiles_ms"), json!([number(low), number(high)]));
        if !outside.peers.contains_key(name)
            && let Some(Value::Array(missing)) = result.get_mut("missing")
        {
            missing.push(json!(name));
        }
    }
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
