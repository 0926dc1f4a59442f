//! Questions of an operator whose answers come from more than one place: why a call is refused, what was printed.

use anyhow::ensure;
use plugvisor_tests::{BundleBuilder, Lane, contract::act_request::Deed, events, scenarios};

use crate::{says, world};

const ECHO: &str = "plugvisor.test.v1.EchoService/Say";

/// Every kind of refusal, explained without a call, as the broker would then give it; and the breaker's own.
async fn calls_are_explained_before_they_are_made(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&BundleBuilder::hostile("fails", &["echo"]))?
        .toml("[plugin.fails.breaker]\nfailure_threshold = 2\nrecovery_timeout_ms = 3600000")
        .start()
        .await?;
    daemon.loaded("echo").await?;
    daemon.loaded("fails").await?;

    let local = daemon.cli(&["explain", "call", "local", ECHO]).await?;
    ensure!(local.code == Some(0), "{local:?}");
    says("local", &local.stdout, &["allowed", "goes to echo", "breaker", "closed", "guard", "inactive"])?;
    let plugin = daemon.cli(&["explain", "call", "fails", ECHO]).await?;
    ensure!(plugin.code == Some(1), "{plugin:?}");
    says("fails", &plugin.stdout, &["REFUSES", "caller_not_allowed", "api:internal-calls", "next: "])?;
    let typo = daemon.cli(&["explain", "call", "local", "plugvisor.test.v1.EchoServise/Say"]).await?;
    says("typo", &typo.stdout, &["unknown_service", "did you mean plugvisor.test.v1.EchoService?"])?;
    let nobody = daemon.cli(&["explain", "call", "ehco", ECHO]).await?;
    ensure!(nobody.code == Some(4), "{nobody:?}");

    // UNAVAILABLE twice, from the plugin itself.
    for _ in 0..2 {
        daemon.act("fails", Deed::Fail(14)).await.expect_err("it fails");
    }
    daemon.events().wait("an open breaker", |event| events::is(event, "breaker.opened", "fails")).await?;
    let hostile = ["explain", "call", "local", "plugvisor.test.v1.HostileService/Act", "--token", "fails"];
    let open = daemon.cli(&hostile).await?;
    ensure!(open.code == Some(1), "{open:?}");
    says("open", &open.stdout, &["breaker_open", "plugvisor breaker reset fails"])?;
    let list = daemon.cli(&["breaker", "list"]).await?;
    says("list", &list.stdout, &["fails", "open", "echo", "closed"])?;
    let reset = daemon.cli(&["breaker", "reset", "fails"]).await?;
    ensure!(reset.code == Some(0), "{reset:?}");
    says("reset", &reset.stdout, &["closed the breaker of fails, which was open"])?;
    let forced = daemon.events().wait("the reset", |event| events::is(event, "breaker.forced", "fails")).await?;
    says("the event", &events::data_text(&forced), &["uid ", "open"])?;
    let allowed = daemon.cli(&hostile).await?;
    ensure!(allowed.code == Some(0), "{allowed:?}");
    let refused = daemon.act("fails", Deed::Fail(14)).await.expect_err("it fails");
    ensure!(refused.metadata().get("plugvisor-reason").is_none(), "the plugin itself answers: {refused:?}");
    daemon.stop().await
}

/// What a plugin printed is there after a restart of everything, filtered as asked, and within its bounds.
async fn logs_outlive_the_supervisor(lane: Lane) -> anyhow::Result<()> {
    let world = world(lane)?
        .plugin(&BundleBuilder::hostile("floods-lines", &["floods-lines"]))?
        .toml("[logs]\nfile_bytes = 65536\nfiles = 2\nlines_per_second = 2000")
        .toml("[plugin.floods-lines]\nlimits = { cpu_percent = 40 }");
    let directory = world.log_directory();
    let daemon = world.start().await?;
    daemon.loaded("floods-lines").await?;
    let dropped = |event: &_| events::is(event, "resource.logs_dropped", "floods-lines");
    daemon.events().wait("dropped lines", dropped).await?;
    let over = |scrape: &plugvisor_tests::Scrape| {
        let mut all = scrape.labelled("plugin", "floods-lines").filter(|sample| {
            sample.name == "plugvisor_log_lines_dropped_total"
                && sample.labels.get("reason").is_some_and(|reason| reason == "rate")
        });
        all.next().is_some_and(|sample| sample.value > 0.0)
    };
    daemon.scraped("dropped lines in the metrics", over).await?;
    let stop = daemon.cli(&["unload", "floods-lines"]).await?;
    ensure!(stop.code == Some(0), "{stop:?}");
    let first = daemon.cli(&["logs", "floods-lines", "--generation", "1", "-n", "3", "-o", "name"]).await?;
    ensure!(first.stdout.lines().count() == 3, "{first:?}");
    let none = daemon.cli(&["logs", "floods-lines", "--grep", "no such words"]).await?;
    ensure!(none.code == Some(0) && none.stdout.is_empty(), "{none:?}");
    let wrong = daemon.cli(&["logs", "floods-lines", "--grep", "("]).await?;
    ensure!(wrong.code == Some(1), "{wrong:?}");
    says("a wrong pattern", &wrong.stderr, &["regular expression", "next: "])?;

    let world = daemon.stop_for_another().await?;
    let mut total = 0;
    for entry in std::fs::read_dir(&directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("floods-lines") {
            total += entry.metadata()?.len();
        }
    }
    ensure!(total > 0 && total <= 2 * 65_536, "the files have {total} bytes");
    let world = world.toml("load = \"manual\"");
    let daemon = world.start().await?;
    daemon.loaded("echo").await?;
    let kept = daemon.cli(&["logs", "floods-lines", "--grep", "work.*play", "-n", "5", "-o", "jsonl"]).await?;
    ensure!(kept.code == Some(0) && kept.stdout.lines().count() == 5, "{kept:?}");
    daemon.stop().await
}

scenarios!(calls_are_explained_before_they_are_made, logs_outlive_the_supervisor);
