//! Plugins that are killed, hang, eat memory or will not go.

use std::time::{Duration, SystemTime};

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::ListBreakersRequest;
use plugvisor_tests::{
    BundleBuilder, Daemon, HeldUp, Lane, Process,
    contract::{Nothing, act_request::Deed},
    descendants, events, scenarios,
};
use rustix::process::Signal;
use tonic::Code;

use crate::{says, told, world};

/// How soon a plugin's death must be told once its process has ended.
const NOTICED: Duration = Duration::from_millis(100);

/// The event's time.
fn time(event: &plugvisor_proto::event::v1::Event) -> anyhow::Result<SystemTime> {
    let time = event.time.context("an event without a time")?;
    Ok(SystemTime::try_from(time)?)
}

/// kill -9: noticed at once, the call in flight fails, a restart with back-off, a new process, and no neighbour notices.
async fn a_killed_plugin_comes_back(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.plugin(&BundleBuilder::hostile("victim", &["echo"]))?.start().await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("victim").await?;
    let neighbour = daemon.neighbour();
    let process = Process::open(before.pid).context("the pid of the status does not run")?;
    let mut inflight = {
        let mut client = daemon.hostile("victim");
        tokio::spawn(async move {
            let request =
                plugvisor_tests::contract::ActRequest { deed: Some(Deed::Hang(Nothing {})), ..Default::default() };
            client.act(request).await
        })
    };
    call_is_in_flight(&daemon, "victim").await?;
    ensure!(futures(&mut inflight).await.is_none(), "the hanging call has ended");

    let held_up = HeldUp::watch(&[daemon.process().pid, daemon.launcher().pid]);
    process.signal(Signal::KILL)?;
    // The control: when anybody could have known.
    process.wait(events::patience()).await?;
    let ended = SystemTime::now();
    let exited = told(&daemon, "plugin.exited", "victim").await?;
    let held_up = held_up.end();
    let noticed = time(&exited)?.duration_since(ended).unwrap_or_default();
    println!("{lane}: told {noticed:?} after the end, while the machine held things up for {held_up:?}");
    ensure!(noticed <= NOTICED + held_up, "the exit was told after {noticed:?}; held up for {held_up:?}");
    says("the event", &events::data_text(&exited), &["SIGKILL"])?;
    let status = inflight.await?.expect_err("the plugin was killed during the call");
    ensure!(status.code() == Code::Unavailable, "{status:?}");

    let scheduled =
        daemon.events().wait("the restart", |event| events::is(event, "plugin.restart_scheduled", "victim")).await?;
    let delay = events::number(&scheduled, "delay_ms").context("no delay")?;
    ensure!((250.0..=500.0).contains(&delay), "the first restart comes after {delay} ms");
    let after =
        daemon.until("victim", "loaded again", |status| status.generation > before.generation && status.pid != 0);
    let after = after.await?;
    ensure!(after.pid != before.pid, "{after:?}");
    daemon.loaded("victim").await?;
    let after = daemon.plugin("victim").await?;
    ensure!(after.restarts == 1, "{after:?}");
    daemon.act("victim", Deed::Nothing(Nothing {})).await?;
    let exit = daemon.describe("victim").await?.last_exit.context("no last exit")?;
    ensure!(exit.signal == "SIGKILL" && exit.code.is_none() && !exit.oom, "{exit:?}");
    neighbour.finish().await?;
    daemon.stop().await
}

/// Waits until the broker has a call to this plugin in flight. There is no event for it.
async fn call_is_in_flight(daemon: &Daemon, plugin: &str) -> anyhow::Result<()> {
    let deadline = tokio::time::Instant::now() + events::patience();
    loop {
        let all = daemon.admin().list_breakers(ListBreakersRequest {}).await?.into_inner().breakers;
        if all.iter().any(|breaker| breaker.plugin == plugin && breaker.in_flight > 0) {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "no call to {plugin} is in flight: {all:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// What a task has returned so far, without waiting.
async fn futures<T>(task: &mut tokio::task::JoinHandle<T>) -> Option<T> {
    tokio::select! {
        biased;
        done = task => done.ok(),
        () = std::future::ready(()) => None,
    }
}

/// A plugin whose health service does not answer any more is hung: killed and restarted.
async fn a_hung_plugin_is_replaced(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("hangs", &["echo"]))?
        .toml(
            // Long enough that a machine that stands still for some seconds does not hang it before the test does.
            "[plugin.hangs.health]\nliveness_interval_ms = 200\nliveness_timeout_ms = 5000\nliveness_misses = 3\n\
             readiness_interval_ms = 200\ndrain_timeout_ms = 200\nstop_timeout_ms = 200",
        )
        .start()
        .await?;
    daemon.loaded("echo").await?;
    let before = daemon.loaded("hangs").await?;
    let neighbour = daemon.neighbour();
    daemon.act("hangs", Deed::HangHealth(Nothing {})).await?;
    let hung = told(&daemon, "plugin.hung", "hangs").await?;
    says("the event", &events::data_text(&hung), &["missed=3"])?;
    let ready = |event: &_| events::is(event, "plugin.ready", "hangs") && event_generation(event) > before.generation;
    daemon.events().wait("ready again", ready).await?;
    let after = daemon.loaded("hangs").await?;
    ensure!(after.pid != before.pid, "{after:?}");
    neighbour.finish().await?;
    daemon.stop().await
}

/// The generation in a subject "plugin/generation"; 0 without one.
fn event_generation(event: &plugvisor_proto::event::v1::Event) -> u64 {
    event.subject.split_once('/').and_then(|(_, number)| number.parse().ok()).unwrap_or_default()
}

/// Over its memory limit: the kernel kills it, everybody says that it was memory, and the neighbour lives.
async fn a_memory_hog_is_killed_alone(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("hog", &["echo"]).set("/security/sandbox/resourceLimits/maxMemory", 96 << 20))?
        .start()
        .await?;
    daemon.loaded("echo").await?;
    daemon.loaded("hog").await?;
    let limited = controlled(&daemon, "hog", "memory-limit").await?;
    if !limited {
        println!("SKIP memory-hog-{lane}: this host lends an ordinary user no memory cgroup");
        return daemon.stop().await;
    }
    let neighbour = daemon.neighbour();
    let status = daemon.act("hog", Deed::TakeMemoryBytes(512 << 20)).await.expect_err("it took more than its limit");
    ensure!(status.code() == Code::Unavailable, "{status:?}");
    let exited = told(&daemon, "plugin.exited", "hog").await?;
    ensure!(exited.reason.contains("oom") || exited.reason.contains("memory"), "{exited:?}");
    says("the event", &events::data_text(&exited), &["oom=true"])?;
    told(&daemon, "resource.oom_killed", "hog").await?;
    let exit = daemon.describe("hog").await?.last_exit.context("no last exit")?;
    ensure!(exit.oom, "{exit:?}");
    neighbour.finish().await?;
    daemon.stop().await
}

/// Whether a control of a plugin is enforced, as read from the kernel.
async fn controlled(daemon: &Daemon, plugin: &str, control: &str) -> anyhow::Result<bool> {
    let described = daemon.describe(plugin).await?;
    let found = described.controls.iter().find(|found| found.name == control);
    Ok(!found.with_context(|| format!("no control {control}: {:?}", described.controls))?.enforced.is_empty())
}

/// It opens descriptors until the kernel refuses; nobody else runs out.
async fn a_descriptor_hog_hurts_itself(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("hoards", &["echo"]))?
        .toml("[plugin.hoards]\nlimits = { open_files = 128 }")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    daemon.loaded("hoards").await?;
    let neighbour = daemon.neighbour();
    let taken: u32 = daemon.act("hoards", Deed::TakeDescriptors(Nothing {})).await?.text.parse()?;
    ensure!((32..128).contains(&taken), "{taken} descriptors beyond the limit of 128");
    neighbour.finish().await?;
    daemon.stop().await
}

/// One that ignores SIGTERM and one whose grandchild left its session: both are gone when the unload is.
async fn nobody_outlives_an_unload(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("stays", &["ignores-sigterm"]))?
        .plugin(&BundleBuilder::hostile("escapes", &["echo"]).capabilities(&["process:spawn-child"]))?
        .grants(&["process:spawn-child"])
        .toml("[plugin.stays.health]\nstop_timeout_ms = 300\n[plugin.escapes.health]\nstop_timeout_ms = 2000")
        .start()
        .await?;
    for name in ["echo", "stays", "escapes"] {
        daemon.loaded(name).await?;
    }
    let neighbour = daemon.neighbour();
    let before: Vec<u32> = descendants(daemon.launcher().pid).iter().map(|process| process.pid).collect();
    daemon.act("escapes", Deed::Escape(Nothing {})).await.context("the escape")?;
    let escaped: Vec<Process> =
        descendants(daemon.launcher().pid).into_iter().filter(|process| !before.contains(&process.pid)).collect();
    ensure!(!escaped.is_empty(), "nothing escaped: there is nothing to be tested");
    for name in ["stays", "escapes"] {
        let pid = daemon.plugin(name).await?.pid;
        let process = Process::open(pid).with_context(|| format!("{name} does not run"))?;
        let cgroups = process.own_cgroups();
        let unload = daemon.cli(&["unload", name]).await?;
        ensure!(unload.code == Some(0), "{unload:?}\n{}", daemon.account());
        ensure!(process.ended(), "{name} ({pid}) runs after its unload");
        let left: Vec<_> = cgroups.iter().filter(|path| path.exists()).collect();
        ensure!(left.is_empty(), "cgroups are left after the unload of {name}: {left:?}");
    }
    for process in &escaped {
        ensure!(process.ended(), "{} ({}) escaped", process.pid, process.name);
    }
    told(&daemon, "plugin.killed", "stays").await?;
    neighbour.finish().await?;
    daemon.stop().await
}

scenarios!(
    a_killed_plugin_comes_back,
    a_hung_plugin_is_replaced,
    a_memory_hog_is_killed_alone,
    a_descriptor_hog_hurts_itself,
    nobody_outlives_an_unload,
);
