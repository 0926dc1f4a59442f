//! Bundles that are wrong before anything of them runs.

use std::{os::unix::fs::PermissionsExt as _, path::Path};

use anyhow::{Context, ensure};
use plugvisor_package::{Bundle, BundleLimits};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{Binaries, BundleBuilder, Lane, World, events, scenarios};
use serde_json::json;

use crate::{says, told, world};

/// Long enough for the next supervisor.
const LINGER: &str = "[launcher]\nlinger = \"100s\"";

/// A bundle, the error's code, and words that its message must have.
type Wrong = (BundleBuilder, &'static str, &'static [&'static str]);

/// Any machine but this one, as elf(5) numbers them.
const OTHER_MACHINE: u16 = if cfg!(target_arch = "x86_64") { 183 } else { 62 };

fn corpus() -> Vec<Wrong> {
    let named = |name: &str, rest: &str| BundleBuilder::echo(name).raw_manifest(format!("{{\"name\":{name:?},{rest}"));
    let hostile = |name: &str| BundleBuilder::hostile(name, &["echo"]);
    vec![
        (BundleBuilder::echo("not-json").raw_manifest("{ this is not JSON"), "manifest.invalid", &["plugin.json"]),
        (BundleBuilder::echo("empty-manifest").raw_manifest(""), "manifest.invalid", &["plugin.json"]),
        (named("two-names", "\"name\":\"other\",\"version\":\"1.0.0\"}"), "manifest.invalid", &["plugin.json", "name"]),
        (
            named("unknown-key", "\"version\":\"1.0.0\",\"licence\":\"MIT\"}"),
            "manifest.invalid",
            // The typing error and what was meant.
            &["licence", "license"],
        ),
        (
            named("many-problems", "\"version\":\"one\",\"runtime\":{\"exec\":\"../../bin/sh\",\"sokcet\":1}}"),
            "manifest.invalid",
            &["version", "exec", "sokcet"],
        ),
        (hostile("entry-missing").without_entry(), "bundle.entry_missing", &["bin/entry-missing"]),
        (hostile("not-executable").entry_mode(0o644), "bundle.entry_not_executable", &["bin/not-executable"]),
        (hostile("other-machine").entry_machine(OTHER_MACHINE), "bundle.entry_wrong_format", &["bin/other-machine"]),
        (
            hostile("not-a-program").entry_bytes("just text\n", 0o755),
            "bundle.entry_wrong_format",
            &["bin/not-a-program"],
        ),
        (hostile("bad-descriptor").descriptor(b"\xff\xff\xff"), "bundle.descriptor_invalid", &["descriptor.binpb"]),
        (
            hostile("unknown-service").set("/module/providers", json!(["plugvisor.test.v1.NoSuchService"])),
            "manifest.invalid",
            &["NoSuchService"],
        ),
        (
            hostile("guarded").set("/module/guards", json!([{ "name": "members", "class": "Members" }])),
            "manifest.unsupported",
            &["guards"],
        ),
    ]
}

/// Each is refused with its code, its words and a hint; in the status, as an event and on the command line. The good
/// citizen beside them is loaded and answers.
async fn each_wrong_bundle_is_named(lane: Lane) -> anyhow::Result<()> {
    let mut world = world(lane)?;
    for (bundle, ..) in corpus() {
        world = world.plugin(&bundle)?;
    }
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    let neighbour = daemon.neighbour();
    for (bundle, code, words) in corpus() {
        let name = bundle.name();
        let event = told(&daemon, "plugin.rejected", name).await?;
        ensure!(event.reason == code, "{name} was rejected with {}, not {code}\n{}", event.reason, daemon.account());
        let status = daemon.in_state(name, PluginState::Failed).await?;
        says(&format!("the error of {name}"), &status.last_error, words)?;
        ensure!(!status.hint.is_empty(), "{name} has no hint: {status:?}");
        ensure!(status.pid == 0, "{name} runs: {status:?}");
        let load = daemon.cli(&["load", name]).await?;
        ensure!(load.code == Some(1), "`load {name}` ended with {load:?}");
        says(&format!("`load {name}`"), &load.stderr, words)?;
        says(&format!("`load {name}`"), &load.stderr, &["next: "])?;
    }
    let status = daemon.cli(&["status"]).await?;
    ensure!(status.code == Some(3), "a status with failed plugins is degraded: {status:?}");
    neighbour.finish().await?;
    daemon.stop().await
}

/// A directory whose tier never runs.
async fn a_tier_that_never_runs_is_refused(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?.tier("quarantined").start().await?;
    let event = told(&daemon, "plugin.rejected", "echo").await?;
    let status = daemon.in_state("echo", PluginState::Failed).await?;
    says("the error", &format!("{} {}", status.last_error, status.hint), &["quarantined", "tier"])?;
    ensure!(event.reason.starts_with("security."), "{event:?}");
    daemon.stop().await
}

/// Two bundles of one name: neither may silently win.
async fn a_name_that_is_taken_is_refused(lane: Lane) -> anyhow::Result<()> {
    let world = world(lane)?;
    let twin = world.path().join("twin");
    std::fs::create_dir(&twin)?;
    let bundle = BundleBuilder::echo("echo").write(&twin, world.binaries())?;
    std::fs::rename(bundle, world.plugins().join("echo-again"))?;
    let daemon = world.start().await?;
    let event = daemon
        .events()
        .wait("a rejection of the second echo", |event| event.reason == "manifest.duplicate_name")
        .await
        .with_context(|| daemon.printed())?;
    ensure!(!event.hint.is_empty(), "{event:?}");
    let text = events::data_text(&event);
    says("the event", &text, &["plugins/echo", "echo-again"])?;
    daemon.stop().await
}

/// Whoever can write a plugin directory decides what runs with its tier: a root launcher gives it none. An ordinary user's
/// launcher is that user's, and nothing is claimed.
async fn a_directory_that_others_can_write_gives_no_tier(lane: Lane) -> anyhow::Result<()> {
    let world = world(lane)?;
    let plugins = world.plugins();
    let mode = |mode| std::fs::set_permissions(&plugins, std::fs::Permissions::from_mode(mode));
    mode(0o775)?;
    let daemon = world.start().await?;
    if lane == Lane::Rootless {
        daemon.loaded("echo").await?;
        return daemon.stop().await;
    }
    let status = daemon.in_state("echo", PluginState::Failed).await?;
    let fix = format!("`chmod go-w \"{}\"`", plugins.display());
    says("the error", &status.last_error, &["gives no tier", "mode 0775", "owner uid 0", &fix])?;
    ensure!(!status.hint.is_empty(), "{status:?}");
    mode(0o755)?;
    let load = daemon.cli(&["load", "echo"]).await?;
    ensure!(load.code == Some(0), "`load echo` ended with {load:?}");
    daemon.loaded("echo").await?;
    daemon.stop().await
}

/// From the key to the call: an administrator signs, the daemon finds it beside the bundle, the launcher verifies it.
async fn a_signed_approval_gives_a_bundle_its_tier(lane: Lane) -> anyhow::Result<()> {
    let approve = |world: &World, key: &Path| -> anyhow::Result<()> {
        let (bundle, key) = (world.plugins().join("echo"), key.to_owned());
        let (bundle, key) = (bundle.to_str().context("a path")?, key.to_str().context("a path")?);
        let said = world.administer(&["approve", bundle, "--tier", "verified", "--key", key])?;
        ensure!(said.status.success(), "{said:?}");
        Ok(())
    };
    let first = world(lane)?.tier("untrusted").toml(LINGER);
    let keys = tempfile::tempdir()?;
    let (ops, other) = (keys.path().join("ops.key"), keys.path().join("other.key"));
    let mut policy = "version = 1\n".to_owned();
    for key in [&ops, &other] {
        let made = first.administer(&["approve", "--new-key", key.to_str().context("a path")?])?;
        ensure!(made.status.success(), "{made:?}");
        if key == &ops {
            policy.push_str(std::str::from_utf8(&made.stdout)?);
        }
    }
    approve(&first, &ops)?;
    let daemon = first.launcher_policy(&policy)?.start().await?;
    let status = daemon.loaded("echo").await?;
    ensure!(status.isolation_level == "process", "the level of verified: {status:?}");
    let neighbour = daemon.neighbour();
    neighbour.finish().await?;
    // The launcher has verified it, and the next supervisor takes over what was verified.
    let daemon = daemon.die().await?.0.start().await?;
    daemon.events().wait("the start", |event| events::short_type(event) == "supervisor.ready").await?;
    let after = daemon.loaded("echo").await?;
    ensure!((after.pid, after.tier.as_str()) == (status.pid, "verified"), "{status:?} became {after:?}");
    daemon.stop().await?;
    // Keys are never overwritten, and are their owner's.
    let before = std::fs::read(&ops)?;
    let second = world(lane)?.tier("untrusted");
    let again = second.administer(&["approve", "--new-key", ops.to_str().context("a path")?])?;
    ensure!(!again.status.success() && std::fs::read(&ops)? == before, "{again:?}");
    ensure!(std::fs::metadata(&ops)?.permissions().mode() & 0o777 == 0o600, "others may read the key");
    // By a key that the policy does not have; and for a content that is another now.
    approve(&second, &other)?;
    let daemon = second.launcher_policy(&policy)?.start().await?;
    let status = daemon.in_state("echo", PluginState::Failed).await?;
    says("the error", &status.last_error, &["names no such key", "other"])?;
    daemon.stop().await?;
    let third = world(lane)?.tier("untrusted").toml(LINGER);
    approve(&third, &ops)?;
    std::fs::write(third.plugins().join("echo/later"), "added")?;
    let daemon = third.launcher_policy(&policy)?.start().await?;
    let status = daemon.loaded("echo").await?;
    ensure!(status.isolation_level == "sandbox", "the level of untrusted: {status:?}");
    // What is put there while nobody supervises has been verified by nobody: it is launched anew, not taken over.
    let (third, _) = daemon.die().await?;
    approve(&third, &ops)?;
    let daemon = third.start().await?;
    daemon.events().wait("the start", |event| events::short_type(event) == "supervisor.ready").await?;
    let after = daemon.loaded("echo").await?;
    ensure!(after.pid != status.pid && after.isolation_level == "process", "{status:?} became {after:?}");
    daemon.stop().await
}

/// What is wrong with the launcher's policy file is the operator's to correct, and no bug.
async fn a_policy_file_that_does_not_hold_is_named(lane: Lane) -> anyhow::Result<()> {
    let many = "[[key]]\nid = 5\n[[directory]]\ntier = \"verified\"\n";
    for (policy, words) in [
        ("version = 2\n", vec!["launcher.toml has 1 problem", "line 1: version: is 2"]),
        (
            many,
            vec![
                "launcher.toml has 5 problems",
                "line 1: version: is required",
                "line 1: key[0].public_key: is required",
                "line 1: key[0].tier: is required",
                "line 2: key[0].id: is the number 5; it takes",
                "line 3: directory[0].path: is required",
            ],
        ),
    ] {
        let refused = world(lane)?.launcher_policy(policy)?.start_refused().await?;
        ensure!(refused.code == Some(78), "{refused:?}");
        says("the refusal", &refused.stderr, &words)?;
        says("the refusal", &refused.stderr, &["plugvisor-launcher: ", "the launcher refused how it was started"])?;
        ensure!(!refused.stderr.contains("bug"), "{refused:?}");
    }
    Ok(())
}

/// A bundle that may not be read is shown with the reason; a directory without a manifest is told.
async fn what_cannot_be_looked_into_is_shown(lane: Lane) -> anyhow::Result<()> {
    let world = world(lane)?.plugin(&BundleBuilder::hostile("closed", &[]))?;
    std::fs::create_dir(world.plugins().join("stray"))?;
    let closed = world.plugins().join("closed");
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o000))?;
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    let status = daemon.in_state("closed", PluginState::Failed).await?;
    says("the error", &status.last_error, &["closed", "ermission"])?;
    daemon.prints(&["stray", "no plugin.json"]).await?;
    std::fs::set_permissions(&closed, std::fs::Permissions::from_mode(0o755))?;
    daemon.stop().await
}

scenarios!(
    a_policy_file_that_does_not_hold_is_named,
    what_cannot_be_looked_into_is_shown,
    each_wrong_bundle_is_named,
    a_tier_that_never_runs_is_refused,
    a_name_that_is_taken_is_refused,
    a_directory_that_others_can_write_gives_no_tier,
    a_signed_approval_gives_a_bundle_its_tier
);

/// What the scenarios take for good is good, and nothing but the damage makes the corpus bad.
#[test]
fn the_good_citizen_is_a_valid_bundle() {
    let directory = tempfile::tempdir().unwrap();
    let built = Binaries::find().unwrap();
    for bundle in [BundleBuilder::echo("echo"), BundleBuilder::hostile("hostile", &["echo"])] {
        let path = bundle.write(directory.path(), &built).unwrap();
        let opened = Bundle::open(&path, &BundleLimits::default()).unwrap();
        assert_eq!(opened.manifest.name.as_str(), bundle.name());
        assert_eq!(opened.services.provided.len(), 1);
        assert!(opened.manifest.unsupported().is_empty());
    }
    let _ = World::new(Lane::Rootless).unwrap();
}
