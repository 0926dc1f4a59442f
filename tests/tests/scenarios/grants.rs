//! What grants open that is of a plugin's name, and what a refusal says of those that it lacks.

use std::os::unix::fs::PermissionsExt as _;

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{
    BundleBuilder, Daemon, Lane, World,
    contract::{File, act_request::Deed},
    scenarios,
};

use crate::{says, told};

const ENVIRONMENT: &str =
    "[plugin.sees]\nenv = { GREETING = \"hello\", TZ = \"UTC\" }\npass_env = [\"NOT_SET_HERE\"]\n";

async fn variable(daemon: &Daemon, plugin: &str, name: &str) -> anyhow::Result<String> {
    let deed = Deed::Variable(name.to_owned());
    Ok(daemon.act(plugin, deed).await.with_context(|| daemon.account())?.text)
}

async fn file(daemon: &Daemon, plugin: &str, path: &str, text: &str) -> anyhow::Result<String> {
    let deed = Deed::File(File { path: path.to_owned(), text: text.to_owned() });
    Ok(daemon.act(plugin, deed).await.with_context(|| daemon.account())?.text)
}

async fn the_operators_variables_reach_who_may_see_them(lane: Lane) -> anyhow::Result<()> {
    let sees = BundleBuilder::hostile("sees", &["echo"]).capabilities(&["process:access-env"]);
    let daemon = World::new(lane)?
        .grants(&["process:access-env"])
        .plugin(&sees)?
        .plugin(&BundleBuilder::hostile("plain", &["echo"]))?
        // Set for it, and it does not ask.
        .plugin(&BundleBuilder::hostile("blind", &["echo"]))?
        .toml(ENVIRONMENT)
        .toml("[plugin.blind]\nenv = { GREETING = \"hello\" }\n")
        .toml("[launcher]\nlinger = \"100s\"")
        .start()
        .await?;
    for name in ["sees", "plain"] {
        daemon.loaded(name).await?;
    }
    ensure!(variable(&daemon, "sees", "GREETING").await? == "hello");
    ensure!(variable(&daemon, "sees", "TZ").await? == "UTC");
    ensure!(variable(&daemon, "sees", "NOT_SET_HERE").await? == "unset");
    ensure!(variable(&daemon, "plain", "GREETING").await? == "unset");
    let event = told(&daemon, "plugin.rejected", "blind").await?;
    ensure!(event.reason == "config.invalid", "{event:?}");
    let status = daemon.in_state("blind", PluginState::Failed).await?;
    let words = ["GREETING", "process:access-env", "its manifest does not ask for it"];
    says("the error", &status.last_error, &words)?;
    ensure!(!status.last_error.contains("the operator did not"), "{}", status.last_error);
    let described = daemon.describe("sees").await?;
    let shown = described.controls.iter().find(|control| control.name == "environment");
    ensure!(shown.is_some_and(|shown| shown.requested == "GREETING, TZ"), "{:?}", described.controls);
    ensure!(!format!("{described:?}").contains("hello"), "values are shown to nobody");

    // The next supervisor keeps it while nothing is changed, and starts it anew with what was.
    let before = daemon.plugin("sees").await?.pid;
    let (world, _) = daemon.die().await?;
    let daemon = world.start().await?;
    ensure!(daemon.loaded("sees").await?.pid == before, "{}", daemon.account());
    daemon.stop().await
}

async fn directories_are_of_the_name(lane: Lane) -> anyhow::Result<()> {
    let capabilities = ["filesystem:read-config", "filesystem:read-data", "filesystem:write-data"];
    let world = World::new(lane)?;
    let config = world.path().join("config");
    for directory in [&config, &config.join("keeps")] {
        std::fs::create_dir(directory)?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
    }
    let greeting = config.join("keeps/greeting");
    std::fs::write(&greeting, "from the operator")?;
    std::fs::set_permissions(&greeting, std::fs::Permissions::from_mode(0o644))?;
    let daemon = world
        .grants(&capabilities)
        .plugin(&BundleBuilder::hostile("keeps", &["echo"]).capabilities(&capabilities))?
        .plugin(&BundleBuilder::hostile("plain", &["echo"]))?
        .plugin(&BundleBuilder::hostile("lost", &["echo"]).capabilities(&capabilities))?
        .toml(&format!("[launcher]\nconfig_root = {config:?}\n"))
        .start()
        .await?;
    for name in ["keeps", "plain"] {
        daemon.loaded(name).await?;
    }
    ensure!(file(&daemon, "keeps", "/plugvisor/config/greeting", "").await? == "from the operator");
    ensure!(file(&daemon, "keeps", "/plugvisor/config/new", "no").await? == "errno 30");
    ensure!(variable(&daemon, "keeps", "PLUGVISOR_CONFIG_DIR").await? == "/plugvisor/config");
    ensure!(variable(&daemon, "keeps", "PLUGVISOR_DATA_DIR").await? == "/plugvisor/data");
    ensure!(file(&daemon, "keeps", "/plugvisor/data/kept", "for later").await? == "for later");
    let got = file(&daemon, "plain", "/plugvisor/data/kept", "").await?;
    ensure!(got.starts_with("errno "), "{got}");
    let described = daemon.describe("keeps").await?;
    for (name, words) in [
        ("plugvisor-config", ["ro,nosuid,nodev,noexec", "/config/keeps"]),
        ("plugvisor-data", ["sets no quota", "/state-data/keeps"]),
    ] {
        let shown = described.controls.iter().find(|control| control.name == name).context(name)?;
        says(name, &format!("{} {}", shown.requested, shown.enforced), &words)?;
    }
    // It has no configuration directory, and the error says which one to make.
    let status = daemon.in_state("lost", PluginState::Failed).await?;
    says("the error", &status.last_error, &["mkdir", "config/lost"])?;

    // Data outlive the process and the supervisor.
    let cli = daemon.cli(&["restart", "keeps"]).await?;
    ensure!(cli.code == Some(0), "{cli:?}");
    daemon.loaded("keeps").await?;
    ensure!(file(&daemon, "keeps", "/plugvisor/data/kept", "").await? == "for later");
    daemon.stop().await
}

/// Host modules: who lacks the capability is told which half is missing, and who has it that the module is not there yet.
async fn calls_to_the_host_are_decided_by_grants(lane: Lane) -> anyhow::Result<()> {
    let secrets = ["security:read-secrets"];
    let daemon = World::new(lane)?
        .grants(&secrets)
        .plugin(&BundleBuilder::hostile("may", &["echo"]).capabilities(&secrets))?
        .plugin(&BundleBuilder::hostile("never-asked", &["echo"]))?
        .plugin(&BundleBuilder::hostile("not-granted", &["echo"]).capabilities(&["security:crypto-operations"]))?
        .start()
        .await?;
    let call = async |plugin: &str, path: &str| -> anyhow::Result<String> {
        daemon.loaded(plugin).await?;
        Ok(daemon.act(plugin, Deed::Call(path.to_owned())).await.with_context(|| daemon.account())?.text)
    };
    let got = call("may", "/plugvisor.host.v1.Secrets/Read").await?;
    says("what may be called", &got, &["Unimplemented ModuleNotAvailable", "plugvisor.host.v1.Secrets"])?;
    let got = call("never-asked", "/plugvisor.host.v1.Secrets/Read").await?;
    let words = ["PermissionDenied CallerNotAllowed", "security:read-secrets", "its manifest does not ask for it"];
    says("what was never asked for", &got, &words)?;
    ensure!(!got.contains("the operator did not grant it"), "it was granted: {got}");
    let got = call("not-granted", "/plugvisor.host.v1.Crypto/Sign").await?;
    let words = ["PermissionDenied CallerNotAllowed", "crypto-operations", "the operator did not grant it"];
    says("what was not granted", &got, &words)?;
    ensure!(!got.contains("its manifest does not ask"), "it asks: {got}");
    let got = call("may", "/plugvisor.admin.v1.Admin/GetStatus").await?;
    says("administering", &got, &["CallerNotAllowed", "api:system-admin"])?;
    let described = daemon.describe("may").await?;
    let shown = described.capabilities.iter().find(|shown| shown.name == "security:read-secrets");
    ensure!(shown.is_some_and(|shown| shown.granted && shown.reason.contains("not available")), "{shown:?}");
    daemon.stop().await
}

scenarios!(
    the_operators_variables_reach_who_may_see_them,
    directories_are_of_the_name,
    calls_to_the_host_are_decided_by_grants,
);
