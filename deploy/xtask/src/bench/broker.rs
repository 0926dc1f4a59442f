//! `bench broker`: the same calls directly, through a byte copier, through the broker and through its peers.
//!
//! One server process serves all sides; each side has a caller process with a connection of its own. Only one side
//! works at a time, all of them take turns in every round, and who begins moves on from round to round. A ratio is the
//! median over the rounds of that side divided by direct in the same round.

use std::{path::Path, process::Command};

use serde_json::{Map, Value, json};

use super::{
    echo::SERVICE,
    figures::{cores, kernel, median, number},
    load::{Measured, Order},
    peers::Peer,
    processes::Process,
};
use crate::build::{self, Profile};

/// How much to measure.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct Options {
    /// Rounds that count; one more goes before them to warm up.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// How long each side works on each load in each round, in milliseconds.
    #[arg(long, default_value_t = 400)]
    millis: u64,
}

/// The loads, with what is read from each.
const LOADS: [(&str, usize, usize); 3] =
    [("64 B, 1 in flight", 64, 1), ("64 B, 64 in flight", 64, 64), ("64 KiB, 8 in flight", 64 * 1024, 8)];

struct Side {
    name: &'static str,
    /// Killed when the measurement is over.
    _forwarder: Option<Process>,
    caller: Process,
    /// By load, then by round.
    measured: [Vec<Measured>; LOADS.len()],
}

pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let binaries = build::bench_binaries(Profile::Release)?;
    let directory = tempfile::Builder::new().prefix("plugvisor-bench-").tempdir()?;
    let (_server, mut sides, missing) = start(&binaries, directory.path())?;
    for round in 0..=options.rounds {
        eprint!("\rround {round} of {}", options.rounds);
        for turn in 0..sides.len() {
            let next = (round + turn) % sides.len();
            let side = &mut sides[next];
            for (load, (_, payload, in_flight)) in LOADS.into_iter().enumerate() {
                let order = Order { payload, in_flight, millis: options.millis };
                let measured = serde_json::from_str(&side.caller.ask(&serde_json::to_string(&order)?)?)?;
                // The first round warms caches, pools and branch predictors.
                if round > 0 {
                    side.measured[load].push(measured);
                }
            }
        }
    }
    eprintln!();
    report(&sides, &missing, options);
    Ok(())
}

fn start(binaries: &Path, directory: &Path) -> anyhow::Result<(Process, Vec<Side>, Vec<&'static str>)> {
    let ours = |role: &str| {
        let mut command = Command::new(binaries.join("xtask"));
        command.args(["bench", "part", role]);
        command
    };
    let caller = |socket: &Path| Process::ours("the caller", ours("load").arg("--connect").arg(socket));
    let served = directory.join("server.sock");
    let server = Process::ours("the server", ours("serve").arg("--listen").arg(&served))?;
    let side = |name, forwarder, socket: &Path| -> anyhow::Result<Side> {
        Ok(Side { name, _forwarder: forwarder, caller: caller(socket)?, measured: Default::default() })
    };

    let mut sides = vec![side("direct", None, &served)?];
    let copied = directory.join("copy.sock");
    let copier = Process::ours("the copier", ours("copy").arg("--listen").arg(&copied).arg("--upstream").arg(&served))?;
    sides.push(side("copy", Some(copier), &copied)?);
    let brokered = directory.join("broker.sock");
    let mut command = Command::new(binaries.join("broker-alone"));
    command.arg(format!("--caller=caller={}", brokered.display()));
    command.arg(format!("--provider=provider={SERVICE}={}", served.display()));
    sides.push(side("brokered", Some(Process::ours("the broker", &mut command)?), &brokered)?);
    let mut missing = Vec::new();
    for peer in Peer::ALL {
        match peer.start(&served, directory)? {
            Some((process, socket)) => sides.push(side(peer.name(), Some(process), &socket)?),
            None => missing.push(peer.name()),
        }
    }
    Ok((server, sides, missing))
}

/// One side's ratios to direct: the median call of the first load, the throughput of the others.
fn ratios(side: &Side, direct: &Side) -> [f64; LOADS.len()] {
    std::array::from_fn(|load| {
        let pairs = side.measured[load].iter().zip(&direct.measured[load]);
        let by_round: Vec<f64> =
            pairs.map(|(own, floor)| if load == 0 { own.p50_us / floor.p50_us } else { own.rps / floor.rps }).collect();
        median(&by_round)
    })
}

fn report(sides: &[Side], missing: &[&str], options: &Options) {
    const KEYS: [&str; LOADS.len()] = ["p50_ratio", "rps64_ratio", "rps_64k_ratio"];
    let Some(direct) = sides.first() else { return };
    let of = |side: &Side, load: usize, what: fn(&Measured) -> f64| {
        median(&side.measured[load].iter().map(what).collect::<Vec<_>>())
    };
    println!("Medians of {} rounds of {} ms each; ratios to direct in the same round.", options.rounds, options.millis);
    println!();
    println!("{:10} {:>30} {:>26} {:>26}", "", LOADS[0].0, LOADS[1].0, LOADS[2].0);
    println!(
        "{:10} {:>12} {:>8} {:>8} {:>15} {:>10} {:>15} {:>10}",
        "", "p50 µs", "p99 µs", "ratio", "calls/s", "ratio", "calls/s", "ratio"
    );
    let mut result = Map::new();
    let mut raw = Map::new();
    for side in sides {
        let [p50, rps64, rps_64k] = ratios(side, direct);
        println!(
            "{:10} {:>12.1} {:>8.1} {:>8.2} {:>15.0} {:>10.2} {:>15.0} {:>10.2}",
            side.name,
            of(side, 0, |measured| measured.p50_us),
            of(side, 0, |measured| measured.p99_us),
            p50,
            of(side, 1, |measured| measured.rps),
            rps64,
            of(side, 2, |measured| measured.rps),
            rps_64k,
        );
        for (key, ratio) in KEYS.into_iter().zip([p50, rps64, rps_64k]) {
            match side.name {
                "direct" => {}
                "brokered" => drop(result.insert(key.to_owned(), number(ratio))),
                name => drop(result.insert(format!("{name}_{key}"), number(ratio))),
            }
        }
        let by_load = LOADS.into_iter().enumerate().map(|(load, (_, payload, in_flight))| {
            json!({
                "payload": payload,
                "in_flight": in_flight,
                "p50_us": number(of(side, load, |measured| measured.p50_us)),
                "p99_us": number(of(side, load, |measured| measured.p99_us)),
                "rps": number(of(side, load, |measured| measured.rps)),
            })
        });
        raw.insert(side.name.to_owned(), Value::Array(by_load.collect()));
    }
    for name in missing {
        println!("{name:10} missing: not installed");
        for key in KEYS {
            result.insert(format!("{name}_{key}"), Value::Null);
        }
    }
    println!();
    result.insert("cores".into(), json!(cores()));
    result.insert("kernel".into(), json!(kernel()));
    result.insert("missing".into(), json!(missing));
    result.insert("rounds".into(), json!(options.rounds));
    result.insert("raw".into(), Value::Object(raw));
    println!("{}", Value::Object(result));
}
