//! Plugins at the level VM, through the whole product: they serve, call each other, are restarted, and leave nothing.

use std::time::Instant;

use anyhow::{Context, bail, ensure};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{
    BundleBuilder, Daemon, Lane, World,
    contract::{SayRequest, act_request::Deed},
    events, guest, scenarios,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::{
    ingress::{self, Client},
    says,
};

const ECHO: &str = "/plugvisor.test.v1.EchoService/Say";

/// A plugin in a machine beside one that is in none; `None` where there is no kernel for one.
fn inside(lane: Lane) -> anyhow::Result<Option<World>> {
    let Some(guest) = guest::find() else { return Ok(None) };
    let bundle = BundleBuilder::hostile("inside", &["echo"]).capabilities(&["api:internal-calls"]);
    let bundle = bundle.set("/security/sandbox/resourceLimits/maxMemory", 96 << 20);
    let world = World::new(lane)?.tier("internal").grants(&["api:internal-calls"]);
    let world = world.plugin(&BundleBuilder::echo("echo"))?;
    let world = world.plugin(&bundle.set("/security/sandbox/isolationLevel", "vm"))?;
    Ok(Some(world.machines(&guest)?))
}

async fn calls(daemon: &Daemon) -> anyhow::Result<()> {
    let said = daemon.act("inside", Deed::Call(ECHO.to_owned())).await?.text;
    ensure!(said == "ok caller=inside", "{said}\n{}", daemon.account());
    Ok(())
}

/// It is called through the broker and calls through it; what it is in is shown; killed, or over its memory, it comes again; unloaded, nothing
/// of it is left.
async fn a_plugin_in_a_machine_is_like_any_other(lane: Lane) -> anyhow::Result<()> {
    let Some(world) = inside(lane)? else { return Ok(()) };
    let daemon = world.start().await?;
    let begun = Instant::now();
    daemon.loaded("inside").await?;
    println!("{lane:?}: in a machine, loaded {:?} after the daemon answered", begun.elapsed());
    daemon.loaded("echo").await?;
    calls(&daemon).await?;
    let shown = daemon.describe("inside").await?;
    ensure!(shown.status.clone().unwrap_or_default().isolation_level == "vm", "{:?}", shown.status);
    let own = shown.controls.iter().find(|control| control.name == "own-kernel").context("no own kernel")?;
    ensure!(own.enforced.contains("qemu"), "{own:?}");
    let doctor = daemon.cli(&["doctor"]).await?;
    says("doctor", &doctor.stdout, &["own-kernel", "qemu-system-x86_64"])?;

    // Many windows of its connection.
    let answer = daemon.act("inside", Deed::AnswerBytes(3 << 20)).await?;
    ensure!(answer.ballast.len() == 3 << 20, "{} bytes", answer.ballast.len());

    // Its guest's kernel kills it, and everybody says that it was memory.
    let status = daemon.act("inside", Deed::TakeMemoryBytes(512 << 20)).await.expect_err("it took more than its limit");
    ensure!(status.code() == tonic::Code::Unavailable, "{status:?}");
    let ended = |event: &plugvisor_proto::event::v1::Event| events::is(event, "plugin.exited", "inside");
    let exited = daemon.events().wait("the end of its plugin", ended).await.with_context(|| daemon.printed())?;
    says("the event", &events::data_text(&exited), &["oom=true"])?;
    ensure!(exited.reason == "oom", "{exited:?}");
    let killed = |event: &plugvisor_proto::event::v1::Event| events::is(event, "resource.oom_killed", "inside");
    daemon.events().wait("memory as the cause", killed).await.with_context(|| daemon.printed())?;
    let ready = |event: &plugvisor_proto::event::v1::Event| {
        events::is(event, "plugin.ready", "inside") && event.sequence > exited.sequence
    };
    daemon.events().wait("ready again", ready).await.with_context(|| daemon.printed())?;
    let first = daemon.loaded("inside").await?;

    let pid = i32::try_from(first.pid).ok().and_then(Pid::from_raw).context("a number")?;
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_send_signal(&process, Signal::KILL)?;
    let again = |event: &plugvisor_proto::event::v1::Event| ended(event) && event.sequence > exited.sequence;
    daemon.events().wait("the end of its machine", again).await.with_context(|| daemon.printed())?;
    let again = daemon.loaded("inside").await?;
    ensure!(again.pid != first.pid, "{again:?}");
    calls(&daemon).await?;
    let unload = daemon.cli(&["unload", "inside"]).await?;
    ensure!(unload.code == Some(0), "{unload:?}");
    let said = daemon.echo().say(SayRequest { text: "still here".to_owned() }).await?.into_inner();
    ensure!(said.text == "still here", "{said:?}");
    daemon.stop().await
}

/// Who connects to its outer address reaches it in its guest, beside its health checks; a plugin that does not listen is told
/// of by a reset, and one that comes again is reached again.
async fn a_plugin_in_a_machine_serves_tcp(lane: Lane) -> anyhow::Result<()> {
    let Some(guest) = guest::find() else { return Ok(()) };
    let port = ingress::PORT.to_string();
    let bundle = BundleBuilder::hostile("inside", &["serves-tcp", &port, "echo"])
        .capabilities(&["network:tcp-server"])
        .set("/runtime/network/listen", json!([ingress::PORT, 9090]))
        .set("/security/sandbox/isolationLevel", "vm");
    let silent = "[[plugin.inside.network.listen]]\naddress = \"127.0.0.1:0\"\nport = 9090\nmax_connections = 4\n";
    let daemon = World::new(lane)?
        .tier("internal")
        .grants(&["network:tcp-server"])
        .plugin(&bundle)?
        .toml(&ingress::reached("inside", "max_connections = 4\nconnect_timeout_ms = 60000"))
        .toml(silent)
        .machines(&guest)?
        .start()
        .await?;
    daemon.loaded("inside").await.with_context(|| daemon.account())?;
    let addresses = ingress::addresses(&daemon, "inside").await?;
    let [to, nobody] = addresses[..] else { bail!("{addresses:?}") };
    for round in 0..8 {
        let mut client = Client::to(to).await?;
        client.says(&format!("round {round}")).await.context("a round")?;
        let rest = client.rest().await?;
        ensure!(rest.starts_with("generation 1 heard "), "{rest:?}\n{}", daemon.account());
    }
    ensure!(Client::to(nobody).await?.ends().await?, "a reset, not the end of an answer");
    // As many as may be, all of them talking.
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(Client::to(to).await?);
    }
    for client in &mut clients {
        client.says(&"x".repeat(200_000)).await.context("a long line")?;
    }
    daemon.loaded("inside").await.context("its health is asked all the while")?;

    daemon.act("inside", Deed::Exit(1)).await.expect_err("it ends");
    for client in clients {
        client.ends().await?;
    }
    // Until its machine has ended, connections are taken for it.
    let ended = |event: &plugvisor_proto::event::v1::Event| events::is(event, "plugin.exited", "inside");
    daemon.events().wait("its end", ended).await.with_context(|| daemon.printed())?;
    let mut client = Client::to(to).await?;
    client.says("to whoever comes").await.context("the next generation")?;
    ensure!(client.rest().await?.starts_with("generation 2 "), "{}", daemon.account());
    daemon.stop().await
}

/// Without a kernel nothing is started, and the error says what to install and what to write.
async fn without_a_kernel_it_is_refused(lane: Lane) -> anyhow::Result<()> {
    let bundle = BundleBuilder::hostile("inside", &["echo"]).set("/security/sandbox/isolationLevel", "vm");
    let daemon = World::new(lane)?.plugin(&bundle)?.launcher_policy("version = 1\n")?.start().await?;
    let status = daemon.in_state("inside", PluginState::Failed).await?;
    says("the error", &status.last_error, &["own-kernel", "[vm]", "linux-image-cloud-amd64"])?;
    ensure!(status.pid == 0, "{status:?}");
    let doctor = daemon.cli(&["doctor"]).await?;
    says("doctor", &doctor.stdout, &["vm", "qemu-system-x86", "kernel ="])?;
    daemon.stop().await
}

scenarios!(a_plugin_in_a_machine_is_like_any_other, a_plugin_in_a_machine_serves_tcp, without_a_kernel_it_is_refused);
