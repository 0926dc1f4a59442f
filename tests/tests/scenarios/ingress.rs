//! The way into a plugin's network namespace: who connects to an outer address reaches the plugin behind it, for as long as
//! there is one, and a plugin that takes no connections harms itself alone.

use std::{
    net::{SocketAddr, TcpListener as StdListener},
    time::Instant,
};

use anyhow::{Context, ensure};
use plugvisor_proto::admin::v1::PluginState;
use plugvisor_tests::{
    BundleBuilder, Daemon, Lane, World,
    contract::{Nothing, act_request::Deed},
    events, scenarios,
};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    time::timeout,
};

use crate::{says, told};

/// Where the plugins listen in their namespaces: all of them at the same port.
pub(super) const PORT: u16 = 8080;

/// A plugin that says that it listens, and does so in this way, or not at all.
fn serving(name: &str, how: Option<&str>) -> BundleBuilder {
    let port = PORT.to_string();
    let arguments = how.map_or_else(|| vec!["echo"], |how| vec!["serves-tcp", &port, how]);
    BundleBuilder::hostile(name, &arguments)
        .capabilities(&["network:tcp-server"])
        .set("/runtime/network/listen", json!([PORT]))
}

/// An address for it, and what else is said of that.
pub(super) fn reached(name: &str, more: &str) -> String {
    format!("[[plugin.{name}.network.listen]]\naddress = \"127.0.0.1:0\"\nport = {PORT}\n{more}\n")
}

fn world(lane: Lane) -> anyhow::Result<World> {
    Ok(World::new(lane)?.grants(&["network:tcp-server"]))
}

/// The outer address, which took a free port.
async fn address(daemon: &Daemon, plugin: &str) -> anyhow::Result<SocketAddr> {
    addresses(daemon, plugin).await?.into_iter().next().context("no address")
}

/// All of them, in the order of the configuration.
pub(super) async fn addresses(daemon: &Daemon, plugin: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let described = daemon.describe(plugin).await?;
    let control = described.controls.iter().find(|control| control.name == "ingress").context("no ingress")?;
    let found: Vec<SocketAddr> = control.enforced.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    ensure!(!found.is_empty(), "{control:?}");
    Ok(found)
}

/// A connection from outside.
pub(super) struct Client(BufReader<TcpStream>);

impl Client {
    pub(super) async fn to(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Self(BufReader::new(TcpStream::connect(address).await?)))
    }

    async fn write(&mut self, text: &str) -> anyhow::Result<()> {
        Ok(self.0.write_all(text.as_bytes()).await?)
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let reading = timeout(events::patience(), self.0.read_line(&mut line));
        reading.await.context("no answer")??;
        Ok(line)
    }

    /// Says a line and hears it back.
    pub(super) async fn says(&mut self, text: &str) -> anyhow::Result<()> {
        self.write(&format!("{text}\n")).await?;
        let line = self.line().await?;
        ensure!(line == format!("{text}\n"), "said {text:?}, heard {line:?}");
        Ok(())
    }

    /// Says that it has said everything, and hears the rest.
    pub(super) async fn rest(mut self) -> anyhow::Result<String> {
        self.0.get_mut().shutdown().await?;
        let mut rest = String::new();
        timeout(events::patience(), self.0.read_to_string(&mut rest)).await.context("no end")??;
        Ok(rest)
    }

    /// Waits until the other side has ended it, by an end or a reset.
    pub(super) async fn ends(mut self) -> anyhow::Result<bool> {
        let mut rest = Vec::new();
        Ok(timeout(events::patience(), self.0.read_to_end(&mut rest)).await.context("no end")?.is_err())
    }
}

async fn figure(daemon: &Daemon, name: &str, plugin: &str, label: &str, value: &str) -> anyhow::Result<f64> {
    let scrape = daemon.scrape().await?;
    let found = scrape.labelled("plugin", plugin).find(|sample| {
        sample.name == name && (label.is_empty() || sample.labels.get(label).is_some_and(|found| found == value))
    });
    found.map(|sample| sample.value).with_context(|| format!("no {name} of {plugin}: {scrape:?}"))
}

async fn who_connects_reaches_the_plugin_behind_the_address(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&serving("serves", Some("echo")))?
        .plugin(&serving("stubborn", Some("never-accepts")))?
        .plugin(&serving("rude", Some("resets")))?
        .plugin(&serving("silent", None))?
        .toml(&reached("serves", "max_connections = 4"))
        .toml(&reached("stubborn", "max_connections = 2\nidle_timeout_ms = 500"))
        .toml(&reached("rude", ""))
        .toml(&reached("silent", ""))
        .start()
        .await?;
    for name in ["serves", "stubborn", "rude", "silent"] {
        daemon.loaded(name).await.with_context(|| daemon.account())?;
    }
    let serves = address(&daemon, "serves").await?;
    // Nothing of the plugin is reached but by its address.
    ensure!(TcpStream::connect(("127.0.0.1", PORT)).await.is_err(), "the port is the namespace's, not the host's");

    // Those that harm only themselves.
    let rude = Client::to(address(&daemon, "rude").await?).await?;
    let mut rude_one = rude;
    rude_one.write("hello\n").await?;
    ensure!(rude_one.ends().await?, "a reset is passed on as one");
    ensure!(Client::to(address(&daemon, "silent").await?).await?.ends().await?, "a reset, not the end of an answer");
    let refused = told(&daemon, "broker.ingress_failed", "silent").await?;
    ensure!(refused.reason == "refused", "{refused:?}");
    says("the event", &events::data_text(&refused), &["does not listen", &PORT.to_string()])?;
    let stubborn = address(&daemon, "stubborn").await?;
    let (one, two, three) = tokio::try_join!(Client::to(stubborn), Client::to(stubborn), Client::to(stubborn))?;

    // Far more connections than there are sockets, each with both sides ended in order: the client first, then the plugin.
    for round in 0..20 {
        let mut client = Client::to(serves).await?;
        client.says(&format!("round {round}")).await?;
        let said = format!("round {round}\n").len();
        let rest = client.rest().await?;
        ensure!(rest == format!("generation 1 heard {said} bytes\n"), "{rest:?}\n{}", daemon.account());
    }
    for client in [one, two, three] {
        ensure!(client.ends().await?, "nothing passed for too long");
    }
    let over = "plugvisor_ingress_connections_total";
    daemon
        .scraped("the connections' ends", |scrape| {
            let count = |plugin: &str, outcome: &str| {
                let mut samples = scrape.labelled("plugin", plugin).filter(|sample| sample.name == over);
                samples
                    .find(|sample| sample.labels.get("outcome").is_some_and(|found| found == outcome))
                    .map(|s| s.value)
            };
            count("serves", "ended") == Some(20.0)
                && count("stubborn", "idle") == Some(3.0)
                && count("rude", "broken") == Some(1.0)
                && count("silent", "refused") == Some(1.0)
        })
        .await?;
    ensure!(figure(&daemon, "plugvisor_ingress_sockets_lost_total", "serves", "", "").await? == 0.0);
    ensure!(figure(&daemon, "plugvisor_ingress_bytes_total", "serves", "direction", "in").await? > 0.0);
    daemon.stop().await
}

/// Those beyond the limit wait in the queue of the address, and come to their turn.
async fn more_connections_than_allowed_wait(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&serving("serves", Some("echo")))?
        .toml(&reached("serves", "max_connections = 2"))
        .start()
        .await?;
    daemon.loaded("serves").await?;
    let to = address(&daemon, "serves").await?;
    let (mut one, mut two) = (Client::to(to).await?, Client::to(to).await?);
    one.says("one").await?;
    two.says("two").await?;
    let mut three = Client::to(to).await?;
    three.write("three\n").await?;
    for round in 0..10 {
        one.says(&format!("one {round}")).await?;
    }
    ensure!(figure(&daemon, "plugvisor_ingress_connections", "serves", "", "").await? == 2.0);
    let early = three.0.get_ref().try_read(&mut [0; 16]);
    ensure!(early.is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock), "the third was served");
    two.rest().await?;
    ensure!(three.line().await? == "three\n");
    three.says("at last").await?;
    one.says("still there").await?;
    daemon.stop().await
}

/// A manifest's bandwidth holds for what comes from outside too.
async fn bandwidth_holds_for_both_directions(lane: Lane) -> anyhow::Result<()> {
    let bundle = serving("serves", Some("echo")).set("/security/sandbox/resourceLimits/maxNetworkBandwidth", 100_000);
    let daemon = world(lane)?.plugin(&bundle)?.toml(&reached("serves", "")).start().await?;
    daemon.loaded("serves").await?;
    let mut client = Client::to(address(&daemon, "serves").await?).await?;
    let began = Instant::now();
    client.says(&"x".repeat(100_000)).await?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(seconds >= 2.0 * 0.95, "100 kB in and out at 100 kB/s took {seconds} s");
    daemon.stop().await
}

/// The address is the name's: generations and supervisors come and go behind it, and who connects meanwhile waits.
async fn the_address_outlives_plugins_and_supervisors(lane: Lane) -> anyhow::Result<()> {
    let daemon = world(lane)?
        .plugin(&serving("serves", Some("echo")))?
        .toml(&reached("serves", "max_connections = 3\nconnect_timeout_ms = 60000"))
        .toml("[launcher]\nlinger = \"100s\"")
        .start()
        .await?;
    daemon.loaded("serves").await?;
    let to = address(&daemon, "serves").await?;
    let mut old = Client::to(to).await?;
    old.says("first generation").await?;

    // A plugin that ends by itself: its connections end with it, and the next one takes those that come meanwhile.
    daemon.act("serves", Deed::Exit(1)).await.expect_err("it ends");
    old.ends().await?;
    // The kernel closes what a process had open one by one: before its end is told, its queue may still take a connection, which
    // then ends with it.
    told(&daemon, "plugin.exited", "serves").await?;
    let mut waiting = Client::to(to).await?;
    waiting.says("to whoever comes").await?;
    ensure!(waiting.rest().await?.starts_with("generation 2 "), "{}", daemon.account());
    let restarted = daemon.cli(&["restart", "serves"]).await?;
    ensure!(restarted.code == Some(0), "{restarted:?}");
    let mut third = Client::to(to).await?;
    third.says("third generation").await?;
    let before = daemon.loaded("serves").await?;

    let (world, _) = daemon.die().await?;
    ensure!(third.ends().await?, "who spoke by the supervisor that was killed is told");
    let mut waiting = Client::to(to).await.context("the launcher holds the address")?;
    waiting.write("to whoever comes\n").await?;
    let daemon = world.start().await?;
    ensure!(waiting.line().await? == "to whoever comes\n", "{}", daemon.account());
    let after = daemon.loaded("serves").await?;
    ensure!((after.pid, after.generation) == (before.pid, before.generation), "{before:?} {after:?}");
    ensure!(address(&daemon, "serves").await? == to);
    let rest = waiting.rest().await?;
    ensure!(rest.starts_with(&format!("generation {} ", after.generation)), "{rest:?}");
    // All of its sockets are there, the one that was in use too.
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Client::to(to).await?;
        client.says("again").await?;
        clients.push(client);
    }
    daemon.act("serves", Deed::Nothing(Nothing {})).await?;
    let world = daemon.stop_for_another().await?;
    ensure!(TcpStream::connect(to).await.is_err(), "the address ends with the last supervisor");
    drop((clients, world));
    Ok(())
}

/// What the operator and the author say must fit, and is told before anybody connects in vain.
async fn an_address_that_leads_nowhere_is_refused(lane: Lane) -> anyhow::Result<()> {
    let other = serving("other", Some("echo")).set("/runtime/network/listen", json!([9090, 9091]));
    let daemon = world(lane)?
        .plugin(&serving("unasked", None).capabilities(&[]))?
        .plugin(&other)?
        .plugin(&serving("portless", None).set("/runtime/network/listen", json!([])))?
        .plugin(&serving("unreached", None))?
        .plugin(&serving("ungranted", None))?
        .toml("[plugin.ungranted]\ngrants = []")
        .toml(&reached("unasked", ""))
        .toml(&reached("other", ""))
        .start()
        .await?;
    for (name, words) in [("unasked", ["network:tcp-server", "127.0.0.1:0"]), ("other", ["port 8080", "9090, 9091"])] {
        let status = daemon.in_state(name, PluginState::Failed).await?;
        says(name, &status.last_error, &words)?;
        says(name, &status.hint, &["network.listen"])?;
    }
    let file = daemon.world().path().join("plugvisor.toml");
    let file = file.to_str().context("the path is text")?;
    says("the error", &daemon.in_state("unasked", PluginState::Failed).await?.last_error, &[file])?;
    let checked = daemon.cli(&["config", "validate", file]).await?;
    ensure!(checked.code == Some(8), "plugins that are not started are an error: {checked:?}");
    says("config validate", &checked.stdout, &["plugin.other.network.listen[0].port", "9090, 9091"])?;
    let words =
        ["plugin.unasked.network.listen[0].address", "network:tcp-server", "its manifest does not ask for it", file];
    says("config validate", &checked.stdout, &words)?;
    // What was started all the same is warned of beside a file that is right.
    let idle = daemon.world().path().join("idle.toml");
    let whole = std::fs::read_to_string(file)?;
    let right = whole.replace(&reached("unasked", ""), "").replace(&reached("other", ""), "");
    std::fs::write(&idle, right)?;
    let warned = daemon.cli(&["config", "validate", idle.to_str().context("the path is text")?]).await?;
    ensure!(warned.code == Some(0), "{warned:?}");
    for words in [
        ["plugin.portless: ", "can listen at no port before runtime.network.listen"],
        ["plugin.unreached: ", "no [[plugin.unreached.network.listen]] leads there"],
        ["plugin.ungranted: ", "cannot listen at 8080 without network:tcp-server: the operator did not grant it"],
    ] {
        says("config validate", &warned.stdout, &words)?;
    }
    daemon.loaded("unreached").await?;
    let unreached = daemon.describe("unreached").await?;
    let control = unreached.controls.iter().find(|control| control.name == "ingress").context("no ingress")?;
    says("describe", &control.enforced, &["[[plugin.unreached.network.listen]] has no address"])?;
    let doctor = daemon.cli(&["doctor"]).await?;
    let words =
        ["127.0.0.1:0", "port 8080 of plugin other", "9090, 9091", "plugin unasked, which may serve nobody without"];
    says("doctor", &doctor.stdout, &words)?;
    // Said with the same words, by the same code, whether a supervisor runs or not.
    let offline = daemon.cli(&["doctor", "--config", file]).await?;
    says("doctor --config", &offline.stdout, &words)?;
    daemon.stop().await?;

    let taken = StdListener::bind("127.0.0.1:0")?;
    let at = taken.local_addr()?;
    let listen = reached("serves", "").replace("127.0.0.1:0", &at.to_string());
    let world = world(lane)?.plugin(&serving("serves", Some("echo")))?.toml(&listen);
    let refused = world.start_refused().await?;
    ensure!(refused.code == Some(74), "{refused:?}");
    says("the refusal", &refused.stderr, &["serves", &at.to_string(), "network.listen"])
}

scenarios!(
    who_connects_reaches_the_plugin_behind_the_address,
    more_connections_than_allowed_wait,
    bandwidth_holds_for_both_directions,
    the_address_outlives_plugins_and_supervisors,
    an_address_that_leads_nowhere_is_refused,
);
