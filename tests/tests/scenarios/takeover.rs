//! What a supervisor finds of one that was killed: everybody, in the state in which they were, and nobody else.

use std::{fs, process::Stdio, time::Duration};

use anyhow::{Context, ensure};
use plugvisor_client::{Reason, Refusal};
use plugvisor_tests::{
    BundleBuilder, Lane, Process, World,
    contract::{Nothing, SayRequest, act_request::Deed},
    events, run, scenarios,
};
use rustix::process::Signal;
use tonic::Code;

use crate::{says, told, world, written};

/// Long enough for the slowest machine to start another supervisor; nobody waits for it to pass.
const LINGER: &str = "[launcher]\nlinger = \"300s\"";

/// How many plugins a host is expected to have.
const MANY: usize = 50;

/// 50 plugins, kill -9 of the supervisor, and the next one finds every one of them: the same processes and generations,
/// none of them started anew. How long that takes is the bench's.
async fn many_are_found_again(lane: Lane) -> anyhow::Result<()> {
    let names: Vec<String> = (0..MANY).map(|number| format!("many-{number:02}")).collect();
    let mut world = World::new(lane)?.toml(LINGER);
    for name in &names {
        world = world.plugin(&BundleBuilder::hostile(name, &["echo"]))?;
    }
    let daemon = world.start().await?;
    let mut before = Vec::new();
    for name in &names {
        let plugin = daemon.loaded(name).await?;
        before.push((plugin.pid, plugin.generation));
    }
    let launcher = daemon.launcher().pid;
    let (world, _) = daemon.die().await?;
    let daemon = world.start().await?;
    ensure!(daemon.launcher().pid == launcher, "another launcher\n{}", daemon.account());
    daemon.events().wait("the start", |event| events::short_type(event) == "supervisor.ready").await?;
    for (name, before) in names.iter().zip(&before) {
        let after = daemon.loaded(name).await?;
        ensure!((after.pid, after.generation) == *before, "{name}: {before:?} became {after:?}");
        ensure!(after.restarts == 0, "{after:?}");
        let said = daemon.act(name, Deed::Nothing(Nothing {})).await.with_context(|| name.clone())?;
        ensure!(said.text.starts_with("local"), "{said:?}");
    }
    let status = daemon.status().await?.supervisor.context("no supervisor")?;
    ensure!(status.reattached_plugins == u32::try_from(MANY)?, "{status:?}");
    daemon.now().await?;
    let started = daemon.events().all().iter().filter(|event| events::short_type(event) == "plugin.starting").count();
    ensure!(started == 0, "{started} were started anew");
    daemon.stop().await
}

#[test]
fn many_are_found_again_by_the_next_supervisor() {
    // In one lane: who is found how does not differ between them, and 50 are many for a small machine.
    run(many_are_found_again(Lane::possible()[0]));
}

/// While a launcher lingers for the next supervisor, and when that has come: another one on the same runtime directory is
/// refused, and takes neither plugins nor sockets.
async fn a_second_supervisor_steals_nothing_of_a_lingering_launcher(lane: Lane) -> anyhow::Result<()> {
    let second = BundleBuilder::hostile("second", &["echo"]).set("/dependencies", serde_json::json!(["echo"]));
    let daemon = world(lane)?.plugin(&second)?.toml(LINGER).start().await?;
    let before = [daemon.loaded("echo").await?.pid, daemon.loaded("second").await?.pid];
    let launcher = daemon.launcher().pid;
    let (mut first, _) = daemon.die().await?;

    // Another user's supervisor has no business there; this one has another plugin directory and another state.
    for round in 0..2 {
        let daemon = first.start().await?;
        ensure!(daemon.launcher().pid == launcher, "another launcher\n{}", daemon.account());
        daemon.events().wait("the start", |event| events::short_type(event) == "supervisor.ready").await?;
        daemon.loaded("echo").await?;
        // Who was found again before what it depends on has not lost it.
        let lost = daemon.events().all().into_iter().find(|event| events::short_type(event) == "dependency.lost");
        ensure!(lost.is_none(), "{lost:?}\n{}", daemon.account());
        let neighbour = daemon.neighbour();
        let second = world(lane)?.toml(LINGER).runtime_directory(&daemon.world().runtime()).start_refused().await?;
        ensure!(second.code == Some(74), "{second:?}");
        says("the refusal", &second.stderr, &["another supervisor", &daemon.process().pid.to_string()])?;
        neighbour.finish().await?;
        let after = [daemon.loaded("echo").await?.pid, daemon.loaded("second").await?.pid];
        ensure!(after == before, "round {round}: {before:?} became {after:?}");
        daemon.echo().say(SayRequest::default()).await?;
        if round == 1 {
            return daemon.stop().await;
        }
        first = daemon.die().await?.0;
    }
    Ok(())
}

/// An open breaker is no fresh start for the next supervisor: it refuses from the first call on, for what is left of its
/// time, and an operator can still close it.
async fn an_open_breaker_stays_open(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("fails", &["echo"]))?
        .toml(LINGER)
        .toml("[plugin.fails.breaker]\nfailure_threshold = 2\nrecovery_timeout_ms = 3600000")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("fails").await?;
    for _ in 0..2 {
        daemon.act("fails", Deed::Fail(14)).await.expect_err("it fails");
    }
    told(&daemon, "breaker.opened", "fails").await?;
    written(daemon.world(), "SELECT count(*) FROM breaker WHERE plugin = 'fails' AND position = 'open'", 1).await?;
    let (world, _) = daemon.die().await?;
    let daemon = world.start().await?;
    let after = daemon.loaded("fails").await?;
    ensure!((after.pid, after.generation) == (before.pid, before.generation), "{before:?} {after:?}");
    ensure!(after.breaker == "open", "{after:?}");
    let refused = daemon.act("fails", Deed::Nothing(Nothing {})).await.expect_err("it is open");
    let refusal = Refusal::from_status(&refused).with_context(|| format!("not a refusal: {refused:?}"))?;
    ensure!(refusal.code == Code::Unavailable && refusal.reason == Reason::BreakerOpen, "{refusal:?}");
    let reset = daemon.cli(&["breaker", "reset", "fails"]).await?;
    ensure!(reset.code == Some(0), "{reset:?}");
    daemon.act("fails", Deed::Nothing(Nothing {})).await.context("after the reset")?;
    daemon.stop().await
}

/// A plugin dies while there is no supervisor, and its number becomes another program's. The next supervisor is told of the
/// end, starts the plugin anew and unloads it; the stranger is never signalled.
async fn a_number_that_was_used_again_is_nobodys(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("victim", &["echo"]))?
        .toml(LINGER)
        .toml("[plugin.victim.restart]\ninitial_delay_ms = 10")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("victim").await?;
    let (world, _) = daemon.die().await?;
    let process = Process::open(before.pid).context("victim does not run")?;
    process.signal(Signal::KILL)?;
    process.wait(events::patience()).await?;
    let Some(mut stranger) = stranger(before.pid).await? else {
        println!("SKIP pid-reuse: this user may not choose the next process number");
        return world.start().await?.stop().await;
    };

    let daemon = world.start().await?;
    let exited = told(&daemon, "plugin.exited", "victim").await?;
    says("its end", &events::data_text(&exited), &["SIGKILL"])?;
    let after = daemon.loaded("victim").await?;
    ensure!(after.pid != before.pid && after.restarts == 1, "{after:?}");
    for words in [["restart", "victim"], ["unload", "victim"]] {
        let done = daemon.cli(&words).await?;
        ensure!(done.code == Some(0), "{done:?}\n{}", daemon.account());
    }
    ensure!(stranger.try_wait()?.is_none(), "the stranger was ended");
    daemon.stop().await?;
    ensure!(stranger.try_wait()?.is_none(), "the stranger was ended by the stop");
    stranger.kill()?;
    stranger.wait()?;
    Ok(())
}

/// A program with this process number, which must be free or about to be; `None` where the kernel does not let this user
/// choose (`/proc/sys/kernel/ns_last_pid`, proc_sys_kernel(5)).
async fn stranger(pid: u32) -> anyhow::Result<Option<std::process::Child>> {
    let deadline = tokio::time::Instant::now() + events::patience();
    loop {
        ensure!(tokio::time::Instant::now() < deadline, "the number {pid} is never free");
        // Whoever else forks in between takes the number; then it is tried again.
        if fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).is_err() {
            return Ok(None);
        }
        let mut sleeper = std::process::Command::new("sleep");
        let mut child = sleeper.arg("100000").stdin(Stdio::null()).spawn().context("sleep")?;
        if child.id() == pid {
            return Ok(Some(child));
        }
        child.kill()?;
        child.wait()?;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

scenarios!(
    a_second_supervisor_steals_nothing_of_a_lingering_launcher,
    an_open_breaker_stays_open,
    a_number_that_was_used_again_is_nobodys,
);
