//! The life of the daemon and its launcher: how they end, what they keep, what they cost.

use anyhow::{Context, ensure};
use plugvisor_tests::{BundleBuilder, Lane, World, events, scenarios};
use rustix::process::Signal;

use crate::world;

/// What a debug build may keep resident; the release bound of 40 MiB is held by `cargo xtask demo --once`.
const SUPERVISOR_BYTES: u64 = if cfg!(debug_assertions) { 80 << 20 } else { 40 << 20 };
/// The same for the launcher, whose release bound is 4 MiB.
const LAUNCHER_BYTES: u64 = if cfg!(debug_assertions) { 8 << 20 } else { 4 << 20 };

/// Three plugins that serve, one of which is not polite.
fn three(lane: Lane) -> anyhow::Result<World> {
    Ok(world(lane)?
        .plugin(&BundleBuilder::hostile("second", &["echo"]))?
        .plugin(&BundleBuilder::hostile("third", &["ignores-sigterm"]))?
        .toml("[plugin.third.health]\nstop_timeout_ms = 300"))
}

/// SIGTERM with plugins running, one of them deaf: `stop` asserts that nothing is left.
async fn a_clean_stop_leaves_nothing(lane: Lane) -> anyhow::Result<()> {
    let daemon = three(lane)?.start().await?;
    for name in ["echo", "second", "third"] {
        daemon.loaded(name).await?;
    }
    let remains = daemon.remains();
    ensure!(remains.processes().len() >= 4, "launcher and three plugins expected: {remains:?}");
    if lane == Lane::Privileged {
        ensure!(!remains.cgroups().is_empty(), "no cgroup of ours: that the cgroups are gone would prove nothing");
    }
    daemon.stop().await
}

/// A second SIGTERM does not wait for calls or for the deaf.
async fn a_second_signal_means_now(lane: Lane) -> anyhow::Result<()> {
    let mut daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("deaf", &["ignores-sigterm"]))?
        .toml("[plugin.deaf.health]\nstop_timeout_ms = 600000\ndrain_timeout_ms = 100")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    daemon.loaded("deaf").await?;
    let remains = daemon.remains();
    daemon.process().signal(Signal::TERM)?;
    daemon.events().wait("the stop", |event| events::is(event, "plugin.stopping", "deaf")).await?;
    daemon.process().signal(Signal::TERM)?;
    daemon.ended().await?;
    // By its own log: the stream of events has a bounded time at the end, and a busy machine may need more.
    daemon.prints(&["plugin.unloaded", "deaf"]).await?;
    remains.gone().await?;
    remains.no_files()
}

/// The launcher is killed: every plugin dies with it, and the daemon says so and ends.
async fn plugins_die_with_their_launcher(lane: Lane) -> anyhow::Result<()> {
    let mut daemon = three(lane)?.start().await?;
    for name in ["echo", "second", "third"] {
        daemon.loaded(name).await?;
    }
    let remains = daemon.remains();
    daemon.launcher().signal(Signal::KILL)?;
    for process in remains.processes() {
        process.wait(events::patience()).await.context("after the launcher was killed")?;
    }
    let code = daemon.ended().await?;
    ensure!(code.is_some_and(|code| code != 0), "the daemon ended with {code:?}");
    // By its own log: the stream of events has a bounded time at the end, and a busy machine may need more.
    daemon.prints(&["supervisor.launcher_lost", "start plugvisord again"]).await?;
    daemon.prints(&["the launcher ended", "every plugin has ended with it"]).await?;
    // Killed, the launcher could not remove its own directory and its groups; the next one does.
    let again = three(lane)?.runtime_directory(&daemon.world().runtime()).start().await?;
    again.loaded("echo").await?;
    if !daemon.world().gives_each_a_group() {
        remains.gone().await?;
    }
    again.stop().await
}

/// The supervisor is killed: with no linger the launcher ends, and every plugin and cgroup with it.
async fn nothing_outlives_a_killed_supervisor(lane: Lane) -> anyhow::Result<()> {
    let mut daemon = three(lane)?.start().await?;
    for name in ["echo", "second", "third"] {
        daemon.loaded(name).await?;
    }
    let remains = daemon.remains();
    daemon.process().signal(Signal::KILL)?;
    daemon.ended().await?;
    remains.gone().await
}

/// Neither memory nor descriptors grow with loads, crashes and unloads.
async fn nothing_leaks(lane: Lane) -> anyhow::Result<()> {
    let daemon = three(lane)?.toml("[plugin.second.restart]\ninitial_delay_ms = 10").start().await?;
    for name in ["echo", "second", "third"] {
        daemon.loaded(name).await?;
    }
    let counts = || {
        let supervisor = daemon.process().descriptors().context("the daemon's descriptors")?;
        // An ordinary user may not look into a process of another user namespace; the privileged lane does.
        anyhow::Ok((supervisor, daemon.launcher().descriptors().unwrap_or_default()))
    };
    let mut baseline = None;
    for round in 0..4 {
        let before = daemon.loaded("second").await?;
        let mark = daemon.now().await?;
        plugvisor_tests::Process::open(before.pid).context("second does not run")?.signal(Signal::KILL)?;
        daemon.events().wait_after(mark, "ready again", |event| events::is(event, "plugin.ready", "second")).await?;
        for command in ["unload", "load"] {
            let done = daemon.cli(&[command, "second"]).await?;
            ensure!(done.code == Some(0), "{done:?}\n{}", daemon.account());
        }
        daemon.loaded("second").await?;
        // The first round opens what stays open: connections, buffers, the admin client's own. What is closed after an
        // answer is closed a moment later, by the launcher in a child of its own; nothing tells when.
        let deadline = tokio::time::Instant::now() + events::patience();
        let now = loop {
            let now = still(&counts).await?;
            match baseline {
                Some((supervisor, launcher)) if now.0 > supervisor + 1 || now.1 > launcher => ensure!(
                    tokio::time::Instant::now() < deadline,
                    "descriptors grow: {now:?} after round {round}, {:?} after the first",
                    (supervisor, launcher)
                ),
                _ => break now,
            }
        };
        baseline.get_or_insert(now);
    }
    let supervisor = daemon.process().resident_bytes().context("no RSS")?;
    ensure!(supervisor <= SUPERVISOR_BYTES, "the supervisor has {supervisor} bytes resident");
    let launcher = daemon.launcher().resident_bytes().context("no RSS")?;
    ensure!(launcher <= LAUNCHER_BYTES, "the launcher has {launcher} bytes resident");
    let shown = daemon.status().await?.supervisor.context("no supervisor in the status")?;
    ensure!(shown.resident_bytes.abs_diff(supervisor) < 16 << 20, "the status shows {shown:?}, /proc {supervisor}");
    daemon.stop().await
}

/// A count that has not changed for a while: what is still being opened or closed has been.
async fn still<T: PartialEq>(count: impl Fn() -> anyhow::Result<T>) -> anyhow::Result<T> {
    const STILL: usize = 5;
    let (mut last, mut same) = (count()?, 0);
    while same < STILL {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        let now = count()?;
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

/// Started by root, only the launcher stays root; each plugin has a user of its own.
async fn who_runs_as_whom(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.plugin(&BundleBuilder::hostile("second", &["echo"]))?.start().await?;
    let mut uids = Vec::new();
    for name in ["echo", "second"] {
        let pid = daemon.loaded(name).await?.pid;
        uids.push(plugvisor_tests::Process::open(pid).and_then(|process| process.uid()).context("no uid")?);
    }
    let supervisor = daemon.process().uid().context("no uid")?;
    let launcher = daemon.launcher().uid().context("no uid")?;
    match lane {
        Lane::Privileged => {
            ensure!(supervisor != 0, "the supervisor stayed root");
            ensure!(launcher == 0, "the launcher is uid {launcher}");
            ensure!(uids[0] != uids[1], "both plugins are uid {}", uids[0]);
            for uid in &uids {
                ensure!(*uid != 0 && *uid != supervisor, "a plugin is uid {uid}, the supervisor {supervisor}");
            }
        }
        Lane::Rootless => {
            ensure!(
                uids.iter().all(|uid| *uid == supervisor) && launcher == supervisor,
                "{supervisor} {launcher} {uids:?}"
            );
        }
    }
    daemon.stop().await
}

scenarios!(
    a_clean_stop_leaves_nothing,
    a_second_signal_means_now,
    plugins_die_with_their_launcher,
    nothing_outlives_a_killed_supervisor,
    nothing_leaks,
    who_runs_as_whom,
);
