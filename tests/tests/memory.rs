//! Nothing is held on to: many loads, crashes and unloads, and many calls, leave everything at the count of before.
//!
//! Short unless it is told otherwise: `cargo xtask test --full` says how much in [`ROUNDS`] and [`CALLS`], and runs it in
//! a build for release.

use std::{fmt::Debug, str::FromStr, time::Duration};

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::{LoadPluginRequest, UnloadPluginRequest};
use plugvisor_tests::{BundleBuilder, Census, Daemon, Lane, Process, World, contract::SayRequest, events, run_within};
use rustix::process::Signal;

/// How many times a plugin is loaded and unloaded.
const ROUNDS: &str = "PLUGVISOR_TEST_ROUNDS";
/// How many calls are made.
const CALLS: &str = "PLUGVISOR_TEST_CALLS";

/// A crash ends every such round.
const CRASHES: u64 = 5;
/// Calls in flight at once.
const IN_FLIGHT: u64 = 32;

/// What an allocator keeps of what was freed, and rings that are not full yet (of lines, of connections) fill by.
const SLACK: u64 = 3 << 20;
/// What one more event costs until the host's log of 4096 is full.
const EVENT: u64 = 2048;
const EVENTS_KEPT: usize = 4096;

fn number<T: FromStr<Err: Debug>>(name: &str, otherwise: T) -> T {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

/// The heap may grow by what the log of events has to keep more than before.
fn allowed(before: usize, after: usize) -> u64 {
    SLACK + EVENT * after.min(EVENTS_KEPT).saturating_sub(before) as u64
}

async fn daemon(lane: Lane) -> anyhow::Result<Daemon> {
    let second = "[plugin.second.restart]\ninitial_delay_ms = 10\nmax_delay_ms = 20\ncrash_loop_exits = 1000000";
    let world = World::new(lane)?
        .plugin(&BundleBuilder::echo("echo"))?
        .plugin(&BundleBuilder::hostile("second", &["echo"]))?
        .toml(second);
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    daemon.loaded("second").await?;
    Ok(daemon)
}

/// Unloads and loads, and now and then a crash before it.
async fn round(daemon: &Daemon, number: u64) -> anyhow::Result<()> {
    if number.is_multiple_of(CRASHES) {
        let pid = daemon.loaded("second").await?.pid;
        let mark = daemon.now().await?;
        Process::open(pid).context("second does not run")?.signal(Signal::KILL)?;
        daemon.events().wait_after(mark, "ready again", |event| events::is(event, "plugin.ready", "second")).await?;
        daemon.loaded("second").await?;
    }
    let mut admin = daemon.admin();
    let unload = UnloadPluginRequest { name: "second".into(), ..UnloadPluginRequest::default() };
    admin.unload_plugin(unload).await.with_context(|| format!("unload, round {number}"))?;
    let load = LoadPluginRequest { name_or_path: "second".into() };
    admin.load_plugin(load).await.with_context(|| format!("load, round {number}"))?;
    daemon.loaded("second").await.map(drop)
}

async fn loads_and_unloads(lane: Lane) -> anyhow::Result<()> {
    /// The first rounds open what stays open, and fill what fills.
    const WARM: u64 = 4;
    let rounds = number(ROUNDS, 10);
    let daemon = daemon(lane).await?;
    for number in 0..WARM {
        round(&daemon, number).await?;
    }
    // Whatever the last round left for others to close is closed once it does not shrink any more.
    let warm = Census::take(&daemon)?.settles(&daemon, SLACK).await?;
    let said = daemon.events().mark();
    for number in 0..rounds {
        round(&daemon, number).await?;
    }
    let after = warm.settles(&daemon, allowed(said, daemon.events().mark())).await?;
    println!("{rounds} rounds ({lane}):\nbefore {warm:?}\nafter  {after:?}");
    daemon.stop().await
}

async fn calls(lane: Lane) -> anyhow::Result<()> {
    let count: u64 = number(CALLS, 20_000);
    let daemon = daemon(lane).await?;
    make_calls(&daemon, 2000).await?;
    let warm = Census::take(&daemon)?.settles(&daemon, SLACK).await?;
    let said = daemon.events().mark();
    make_calls(&daemon, count).await?;
    let after = warm.settles(&daemon, allowed(said, daemon.events().mark())).await?;
    println!("{count} calls ({lane}):\nbefore {warm:?}\nafter  {after:?}");
    daemon.stop().await
}

/// Makes calls, many at once, each of which must be answered.
async fn make_calls(daemon: &Daemon, count: u64) -> anyhow::Result<()> {
    let mut callers = tokio::task::JoinSet::new();
    let calls = daemon.calls();
    for caller in 0..IN_FLIGHT {
        let mut echo = plugvisor_tests::contract::echo_service_client::EchoServiceClient::new(calls.clone());
        callers.spawn(async move {
            for call in 0..count / IN_FLIGHT {
                let text = "x".repeat(64);
                let answer = echo.say(SayRequest { text }).await;
                let answer = answer.with_context(|| format!("call {call} of caller {caller}"))?.into_inner();
                ensure!(answer.text.len() == 64, "{answer:?}");
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = callers.join_next().await {
        ended.context("a caller's task")??;
    }
    Ok(())
}

/// Time for all of it on a slow machine, beyond what a scenario has anyway.
fn longest() -> Duration {
    let rounds = Duration::from_millis(1000 * number::<u64>(ROUNDS, 10));
    let calls = Duration::from_millis(2 * number::<u64>(CALLS, 20_000));
    Duration::from_secs(600) + rounds + calls
}

#[test]
fn loads_and_unloads_leave_nothing() {
    for lane in Lane::possible() {
        run_within(longest(), loads_and_unloads(lane));
    }
}

/// In one lane: a call passes through nothing that differs between them.
#[test]
fn calls_leave_nothing() {
    run_within(longest(), calls(Lane::possible()[0]));
}
