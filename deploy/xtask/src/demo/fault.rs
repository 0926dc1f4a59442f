//! A plugin dies under load: what its callers see, what the supervisor says, how long it takes, who else notices.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use plugvisor_client::{Client, Refusal};
use plugvisor_examples::markdown::v1::RenderRequest;
use plugvisor_examples::markdown::v1::markdown_service_client::MarkdownServiceClient;
use plugvisor_examples::thumbnailer::v1::ThumbnailRequest;
use plugvisor_examples::thumbnailer::v1::thumbnailer_service_client::ThumbnailerServiceClient;
use tokio::sync::watch;
use tonic::Code;

use super::checks::Checks;
use super::process::{Process, cgroups};
use super::supervisor::{EventStream, Supervisor, is_about};

const VICTIM: &str = "thumbnailer";

/// Callers at the same time: more than the failures in a row that open a breaker by default (5).
const CALLERS: usize = 16;

/// The kernel tells everybody at the same time that a process died; the rest is ours.
const NOTICED_WITHIN: Duration = Duration::from_millis(100);

/// The longest wait for anything that must happen.
const PATIENCE: Duration = Duration::from_secs(60);

/// Kills the thumbnailer while it is being called and checks everything that must follow.
///
/// # Errors
/// When something that the checks need cannot be done.
pub(crate) fn kill_under_load(
    supervisor: &Supervisor,
    events: &mut EventStream,
    calls_socket: &Path,
    picture: Vec<u8>,
    checks: &mut Checks,
) -> anyhow::Result<()> {
    println!("\nSIGKILL to {VICTIM} with {CALLERS} callers at work:");
    let before = supervisor.plugin(VICTIM)?;
    let bystanders =
        ["markdown", "gallery"].map(|name| (name, supervisor.plugin(name).map(|plugin| plugin["pid"].clone())));
    let generation = before["generation"].as_u64().context("the plugin has no generation")?;
    let pid = before["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()).context("the plugin has no pid")?;
    let process = Process::open(pid)?;
    let own = cgroups(std::process::id())?;
    let groups: Vec<_> =
        cgroups(pid)?.into_iter().filter(|(controller, group)| own.get(controller) != Some(group)).collect();

    let load = Load::start(calls_socket, picture)?;
    load.wait_until("every caller had an answer", |seen| seen.answered.len() == CALLERS && seen.rendered > 0)?;
    let killed = Instant::now();
    load.mark();
    process.kill()?;
    let ended = process.ended_within(PATIENCE)?;
    let known = Instant::now();
    checks.check("the process ended", ended, format!("pid {pid} is gone"), "gone", "who keeps it alive?");

    let subject = format!("{VICTIM}/{generation}");
    let (noticed, exited) = events.wait_for("plugin.exited", PATIENCE, |event| {
        is_about(event, "plugin.exited", VICTIM) && event["subject"] == subject.as_str()
    })?;
    // The control: how long the kernel and this machine took to tell us, who only wait for it.
    let told_us = known.saturating_duration_since(killed);
    let took = noticed.saturating_duration_since(known);
    checks.check(
        "SIGKILL noticed, seen by a follower of the events",
        took <= NOTICED_WITHIN + told_us * 4,
        format!(
            "{:.1} ms after the process had ended (which took {:.1} ms)",
            took.as_secs_f64() * 1000.0,
            told_us.as_secs_f64() * 1000.0
        ),
        format!("at most {} ms", NOTICED_WITHIN.as_millis()),
        "is the machine overloaded? see `plugvisor events`",
    );
    let signal = &exited["data"]["signal"];
    checks.check(
        "the event names the signal",
        signal == "SIGKILL" || signal == 9,
        signal,
        "SIGKILL",
        "see `plugvisor events`",
    );

    let failed = load.wait_until("a call failed", |seen| !seen.failed.is_empty())?;
    let lost = failed.failed.iter().find(|((code, _), _)| *code == Code::Unavailable as i32);
    checks.check(
        "calls in flight failed",
        lost.is_some(),
        reasons(&failed.failed).join(", "),
        "UNAVAILABLE",
        "see `plugvisor describe thumbnailer`",
    );
    let (_, opened) = events.wait_for("breaker.opened", PATIENCE, |event| is_about(event, "breaker.opened", VICTIM))?;
    checks.check("the breaker opened", true, &opened["reason"], "", "");
    let (_, scheduled) = events
        .wait_for("plugin.restart_scheduled", PATIENCE, |event| is_about(event, "plugin.restart_scheduled", VICTIM))?;
    checks.check("a restart was scheduled", true, &scheduled["data"], "", "");
    let (ready, _) = events.wait_for("plugin.ready of the next generation", PATIENCE, |event| {
        is_about(event, "plugin.ready", VICTIM) && event["subject"] != subject.as_str()
    })?;
    println!(
        "       ready again {:.0} ms after the kill",
        ready.saturating_duration_since(killed).as_secs_f64() * 1000.0
    );
    load.mark();
    load.wait_until("every caller is served again", |seen| seen.answered.len() == CALLERS)?;
    checks.check("the callers are served again", true, format!("all {CALLERS}"), "", "");

    let after = supervisor.plugin(VICTIM)?;
    let new = after["pid"].as_u64().unwrap_or_default();
    let next = "see `plugvisor describe thumbnailer`";
    checks.check("another process serves", new != 0 && new != u64::from(pid), format!("pid {new}"), "a new pid", next);
    checks.check("restarts", after["restarts"] == 1, &after["restarts"], 1, next);
    for (controller, group) in groups {
        let gone = !group.exists();
        let what =
            format!("the dead process's cgroup is gone ({})", if controller.is_empty() { "v2" } else { &controller });
        checks.check(&what, gone, group.display(), "removed", "remove it, and report it");
    }
    for (name, pid) in bystanders {
        let (before, after) = (pid?, supervisor.plugin(name)?["pid"].clone());
        checks.check(&format!("{name} ran on"), before == after, format!("pid {after}"), format!("pid {before}"), next);
    }
    let seen = load.stop();
    let refused = seen.render_failures;
    let next = "a dead plugin must not disturb others: see `plugvisor events`";
    checks.check(
        "calls to markdown meanwhile",
        refused == 0,
        format!("{} answered, {refused} failed", seen.rendered),
        "none failed",
        next,
    );
    Ok(())
}

/// Failed calls by their gRPC code and the broker's reason.
type Failures = BTreeMap<(i32, String), usize>;

fn reasons(failures: &Failures) -> Vec<String> {
    failures.iter().map(|((code, reason), count)| format!("{count} x {:?} {reason}", Code::from_i32(*code))).collect()
}

/// What the callers met.
#[derive(Clone, Debug, Default)]
struct Seen {
    /// Answers by caller, since the last mark.
    answered: BTreeMap<usize, usize>,
    failed: Failures,
    /// Answers of markdown, over the whole time.
    rendered: usize,
    render_failures: usize,
}

/// Callers that go on until they are stopped.
struct Load {
    runtime: tokio::runtime::Runtime,
    seen: Arc<Mutex<Seen>>,
    changed: watch::Sender<()>,
}

impl Load {
    fn start(calls_socket: &Path, picture: Vec<u8>) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("cannot start the callers")?;
        let load = Self { runtime, seen: Arc::default(), changed: watch::Sender::new(()) };
        let client = load
            .runtime
            .block_on(Client::connect(calls_socket))
            .with_context(|| format!("cannot connect to {}", calls_socket.display()))?
            .with_timeout(PATIENCE);
        let picture = bytes::Bytes::from(picture);
        for caller in 0..CALLERS {
            let mut thumbnailer = ThumbnailerServiceClient::new(client.clone());
            let request = ThumbnailRequest { image: picture.clone(), max_edge: 64, format: 0 };
            let (seen, changed) = (Arc::clone(&load.seen), load.changed.clone());
            load.runtime.spawn(async move {
                loop {
                    let result = thumbnailer.thumbnail(request.clone()).await;
                    let refused = result.is_err();
                    note(&seen, |seen| match result {
                        Ok(_) => *seen.answered.entry(caller).or_default() += 1,
                        Err(status) => {
                            let reason = Refusal::from_status(&status).map(|refusal| format!("{:?}", refusal.reason));
                            let key = (status.code() as i32, reason.unwrap_or_else(|| status.message().to_owned()));
                            *seen.failed.entry(key).or_default() += 1;
                        }
                    });
                    changed.send_replace(());
                    if refused {
                        // A refusal comes at once; without a pause the callers would only heat the machine.
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            });
        }
        let mut markdown = MarkdownServiceClient::new(client);
        let (seen, changed) = (Arc::clone(&load.seen), load.changed.clone());
        load.runtime.spawn(async move {
            loop {
                let result = markdown.render(RenderRequest { markdown: "# still here".to_owned() }).await;
                note(&seen, |seen| match result {
                    Ok(_) => seen.rendered += 1,
                    Err(_) => seen.render_failures += 1,
                });
                changed.send_replace(());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        Ok(load)
    }

    /// Forgets the callers' answers and failures up to now.
    fn mark(&self) {
        note(&self.seen, |seen| {
            seen.answered.clear();
            seen.failed.clear();
        });
    }

    fn wait_until(&self, what: &str, reached: impl Fn(&Seen) -> bool) -> anyhow::Result<Seen> {
        let mut changed = self.changed.subscribe();
        let waiting = async {
            loop {
                let seen = note(&self.seen, |seen| seen.clone());
                if reached(&seen) {
                    return Some(seen);
                }
                changed.changed().await.ok()?;
            }
        };
        let found = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, waiting).await });
        found.ok().flatten().with_context(|| {
            let seen = note(&self.seen, |seen| seen.clone());
            format!(
                "waited {PATIENCE:?} until {what}: {} callers were answered, failures {:?}, markdown {} answered and {} failed",
                seen.answered.len(),
                reasons(&seen.failed),
                seen.rendered,
                seen.render_failures
            )
        })
    }

    fn stop(self) -> Seen {
        let Self { runtime, seen, changed: _ } = self;
        runtime.shutdown_timeout(Duration::from_secs(5));
        note(&seen, |seen| seen.clone())
    }
}

fn note<T>(seen: &Mutex<Seen>, change: impl FnOnce(&mut Seen) -> T) -> T {
    change(&mut seen.lock().unwrap_or_else(PoisonError::into_inner))
}
