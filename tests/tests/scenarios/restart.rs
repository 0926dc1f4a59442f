//! A supervisor that dies or is replaced, and plugins that go on.

use std::time::Duration;

use anyhow::{Context, ensure};
use plugvisor_tests::{BundleBuilder, Daemon, Lane, Process, Remains, World, contract::SayRequest, events, scenarios};
use rustix::process::Signal;

use crate::{says, told, world};

/// Long enough for the slowest machine to start another supervisor; nobody waits for it to pass.
const LINGER: &str = "[launcher]\nlinger = \"100s\"";

/// Three that serve, one of which calls another without pause.
fn three(lane: Lane) -> anyhow::Result<World> {
    let caller = BundleBuilder::hostile("caller", &["keeps-calling"]).capabilities(&["api:internal-calls"]);
    world(lane)?.grants(&["api:internal-calls"]).plugin(&BundleBuilder::hostile("second", &["echo"]))?.plugin(&caller)
}

async fn all_loaded(daemon: &Daemon) -> anyhow::Result<Vec<u32>> {
    let mut pids = Vec::new();
    for name in ["echo", "second", "caller"] {
        pids.push(daemon.loaded(name).await?.pid);
    }
    Ok(pids)
}

/// Waits until the plugin's calls are answered.
async fn calls_pass(daemon: &Daemon, caller: &str) -> anyhow::Result<()> {
    let passed = |scrape: &plugvisor_tests::Scrape| {
        let ok = scrape.labelled("caller", caller).filter(|sample| {
            sample.name == "plugvisor_rpc_calls_total" && sample.labels.get("code").is_some_and(|code| code == "OK")
        });
        ok.map(|sample| sample.value).sum::<f64>() >= 10.0
    };
    let deadline = tokio::time::Instant::now() + events::patience();
    while !passed(&daemon.scrape().await?) {
        ensure!(tokio::time::Instant::now() < deadline, "the calls of {caller} do not pass\n{}", daemon.account());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// What the caller printed of calls that failed, up to the first that was answered and as far as it has come since.
async fn failures(daemon: &Daemon) -> anyhow::Result<Vec<String>> {
    daemon.logged("caller", &[], "answered", 1).await?;
    daemon.logged("caller", &[], "failed", 0).await
}

/// Asserts that these processes run. Others of a daemon come and go, such as those in which its launcher closes
/// descriptors.
fn run_on(remains: &Remains, pids: &[u32]) -> anyhow::Result<()> {
    for pid in pids {
        let process = remains.processes().iter().find(|process| process.pid == *pid);
        let process = process.with_context(|| format!("{pid} was not among {remains:?}"))?;
        ensure!(!process.ended(), "{process:?} ended with the supervisor");
    }
    Ok(())
}

/// kill -9 of the supervisor under load: the same processes serve on, who died meanwhile is reported, calls that were
/// begun in the gap are answered, and a stop leaves nothing.
async fn a_killed_supervisor_comes_back_to_living_plugins(lane: Lane) -> anyhow::Result<()> {
    let daemon = three(lane)?.toml(LINGER).toml("[plugin.second.restart]\ninitial_delay_ms = 10").start().await?;
    let before = all_loaded(&daemon).await?;
    calls_pass(&daemon, "caller").await?;
    let launcher = daemon.launcher().pid;
    let generation = daemon.plugin("echo").await?.generation;
    // Before the one that it calls was loaded.
    let failed_before = failures(&daemon).await?.len();
    let (world, remains) = daemon.die().await?;
    run_on(&remains, &[&before[..], &[launcher]].concat())?;
    let second = Process::open(before[1]).context("second does not run")?;
    second.signal(Signal::KILL)?;
    second.wait(events::patience()).await?;

    let daemon = world.start().await?;
    ensure!(daemon.launcher().pid == launcher, "another launcher: {}", daemon.account());
    for name in ["echo", "caller"] {
        let event = daemon.events().wait(name, |event| events::is(event, "plugin.reattached", name)).await?;
        ensure!(events::number(&event, "gap_ms").is_some_and(|gap| gap > 0.0), "{event:?}");
    }
    let exited = told(&daemon, "plugin.exited", "second").await?;
    says("its end", &events::data_text(&exited), &["SIGKILL"])?;
    let after = all_loaded(&daemon).await?;
    ensure!((after[0], after[2]) == (before[0], before[2]), "{before:?} became {after:?}\n{}", daemon.account());
    ensure!(after[1] != before[1]);
    let echo = daemon.plugin("echo").await?;
    ensure!((echo.generation, echo.restarts) == (generation, 0), "{echo:?}");
    let second = daemon.plugin("second").await?;
    ensure!(second.restarts == 1, "{second:?}");
    let said = daemon.echo().say(SayRequest { text: "still there".to_owned() }).await?.into_inner();
    ensure!(said.text == "still there" && said.generation == generation, "{said:?}");
    calls_pass(&daemon, "caller").await?;
    // One call at a time: at most the one that was in flight failed. Those that were begun in the gap waited.
    let failed = failures(&daemon).await?;
    ensure!(failed.len() <= failed_before + 1, "{failed_before} before, and now {failed:?}");

    daemon.events().wait("the start", |event| events::short_type(event) == "supervisor.ready").await?;
    let status = daemon.status().await?.supervisor.context("no supervisor")?;
    ensure!(status.reattached_plugins == 2, "{status:?}");
    let took = Duration::try_from(status.reattached_in.context("no time")?)?;
    // Only what never comes takes this long; the bench holds the real bound.
    ensure!(took < events::patience(), "found again in {took:?}");
    let remains = daemon.remains();
    daemon.stop().await?;
    remains.gone().await
}

/// A launcher of its own, as systemd would start it: a stop of the supervisor stops no plugin.
async fn a_stop_leaves_the_plugins_of_an_external_launcher(lane: Lane) -> anyhow::Result<()> {
    let world = three(lane)?;
    let mut launcher = world.launcher().await?;
    // The usual one, nobody, is what unmapped users look like; a launcher lets nobody in who may be anybody.
    let world = if lane == Lane::Privileged { world.supervisor("user = \"daemon\"") } else { world };
    let daemon = world.launcher_socket(launcher.socket()).start().await?;
    let before = all_loaded(&daemon).await?;
    let (remains, launcher_pid) = (daemon.remains(), daemon.launcher().pid);
    let world = daemon.leave().await?;
    run_on(&remains, &[&before[..], &[launcher_pid]].concat())?;
    let daemon = world.start().await?;
    ensure!(all_loaded(&daemon).await? == before, "{}", daemon.account());
    calls_pass(&daemon, "caller").await?;
    let unloaded = daemon.cli(&["unload", "second"]).await?;
    ensure!(unloaded.code == Some(0), "{unloaded:?}");
    let world = daemon.leave().await?;
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    ensure!(daemon.plugin("second").await?.pid == 0, "what was unloaded by hand came back\n{}", daemon.account());
    let remains = daemon.remains();
    let world = daemon.leave().await?;
    launcher.stop().await?;
    remains.gone().await?;
    drop(world);
    Ok(())
}

/// Nobody comes back in time: the launcher kills everything and ends.
async fn when_nobody_comes_back_nothing_is_left(lane: Lane) -> anyhow::Result<()> {
    let daemon = three(lane)?.toml("[launcher]\nlinger = \"1s\"").start().await?;
    all_loaded(&daemon).await?;
    let (world, remains) = daemon.die().await?;
    for process in remains.processes() {
        process.wait(events::patience()).await.context("after the linger")?;
    }
    remains.gone().await?;
    for name in ["launcher", "reattach"] {
        ensure!(!world.runtime().join(name).exists(), "{name} is left in the runtime directory");
    }
    // The sockets of the killed one are dead and in nobody's way.
    let daemon = world.start().await?;
    all_loaded(&daemon).await?;
    daemon.stop().await
}

/// A linger is for a supervisor that died. One that is told to stop takes everything with it.
async fn a_stop_does_not_linger(lane: Lane) -> anyhow::Result<()> {
    let daemon = three(lane)?.toml(LINGER).start().await?;
    all_loaded(&daemon).await?;
    daemon.stop().await
}

/// What lives and is not what lies in the plugin directory now is replaced; what has no bundle any more is ended.
async fn what_changed_meanwhile_is_loaded_anew(lane: Lane) -> anyhow::Result<()> {
    let daemon = three(lane)?.toml(LINGER).start().await?;
    let before = all_loaded(&daemon).await?;
    let (world, _) = daemon.die().await?;
    let entry = world.plugins().join("echo/bin/echo");
    let mut bytes = std::fs::read(&entry)?;
    // Behind the end of an ELF file nothing is looked at.
    bytes.extend_from_slice(b"another build");
    // It may be a hard link to the built one.
    std::fs::remove_file(&entry)?;
    let world = world.plugin(&BundleBuilder::echo("echo").entry_bytes(bytes, 0o755))?;
    std::fs::remove_dir_all(world.plugins().join("second"))?;
    let second = Process::open(before[1]).context("second does not run")?;

    let daemon = world.start().await?;
    let reaped = told(&daemon, "plugin.orphan_reaped", "echo").await?;
    says("the event", &events::data_text(&reaped), &["its bundle changed"])?;
    let reaped = told(&daemon, "plugin.orphan_reaped", "second").await?;
    says("the event", &events::data_text(&reaped), &["no valid bundle"])?;
    second.wait(events::patience()).await.context("it has no bundle")?;
    let echo = daemon.loaded("echo").await?;
    ensure!(echo.pid != before[0] && echo.restarts == 0, "{echo:?}");
    daemon.events().wait("caller", |event| events::is(event, "plugin.reattached", "caller")).await?;
    ensure!(daemon.loaded("caller").await?.pid == before[2], "{}", daemon.account());
    calls_pass(&daemon, "caller").await?;
    daemon.stop().await
}

scenarios!(
    a_killed_supervisor_comes_back_to_living_plugins,
    a_stop_leaves_the_plugins_of_an_external_launcher,
    when_nobody_comes_back_nothing_is_left,
    a_stop_does_not_linger,
    what_changed_meanwhile_is_loaded_anew,
);
