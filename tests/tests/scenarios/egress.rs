//! The way out of a plugin's network namespace: through the egress proxy to what is listed, and nowhere else.

use std::{net::SocketAddr, time::Instant};

use anyhow::{Context, ensure};
use plugvisor_tests::{
    BundleBuilder, Daemon, Lane, World,
    contract::{Say, act_request::Deed},
    events, scenarios,
};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinSet,
};

use crate::{says, told};

const EPERM: &str = "errno 1";
const EACCES: &str = "errno 13";
const ENETUNREACH: &str = "errno 101";

/// Bytes of the server's answer beside its head.
const BODY: usize = 200_000;

/// A server on the host's loopback, which no plugin reaches but through the proxy.
struct Server {
    address: SocketAddr,
    _serving: JoinSet<()>,
}

impl Server {
    async fn start() -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    while !bytes.ends_with(b"\r\n\r\n") && stream.read_buf(&mut bytes).await.is_ok_and(|read| read > 0)
                    {
                    }
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {BODY}\r\nConnection: close\r\n\r\n");
                    let _ = stream.write_all(head.as_bytes()).await;
                    let _ = stream.write_all(&vec![b'x'; BODY]).await;
                    let _ = stream.shutdown().await;
                    let _ = stream.read_to_end(&mut bytes).await;
                });
            }
        });
        Ok(Self { address, _serving: serving })
    }
}

/// A plugin that asks for HTTP to the server, by its address and by a name, and to a metadata service of clouds.
fn asking(name: &str, server: &Server) -> BundleBuilder {
    let port = server.address.port();
    let egress = [format!("127.0.0.1:{port}"), format!("localhost:{port}"), "169.254.169.254:80".to_owned()];
    BundleBuilder::hostile(name, &["echo"])
        .capabilities(&["network:http-client"])
        .set("/runtime/network/egress", json!(egress))
}

fn world(lane: Lane) -> anyhow::Result<World> {
    Ok(World::new(lane)?.grants(&["network:http-client"]))
}

/// The operator lists the loopback address for the plugin `net`, and for no other.
const LISTED: &str = "[plugin.net.network]\naddresses = [\"127.0.0.1\"]";

/// What the plugin gets when it says this, to the proxy or somebody else.
async fn said(daemon: &Daemon, plugin: &str, to: &str, text: &str) -> anyhow::Result<String> {
    let deed = Deed::Say(Say { to: to.to_owned(), text: text.to_owned() });
    Ok(daemon.act(plugin, deed).await.with_context(|| daemon.account())?.text)
}

fn get(url: &str) -> String {
    format!("GET {url} HTTP/1.1\r\nHost: ignored\r\nConnection: close\r\n\r\n")
}

async fn only_the_proxy_and_only_what_is_listed(lane: Lane) -> anyhow::Result<()> {
    let server = Server::start().await?;
    let address = server.address;
    let port = address.port();
    let daemon = world(lane)?
        .plugin(&asking("net", &server))?
        .plugin(&asking("alone", &server))?
        .plugin(&BundleBuilder::hostile("without", &["echo"]))?
        .toml(LISTED)
        .start()
        .await?;
    for name in ["net", "alone", "without"] {
        daemon.loaded(name).await?;
    }
    // The control: outside of the walls the server is reached.
    tokio::net::TcpStream::connect(address).await.context("the server")?;

    // Without the grant there is neither a proxy nor a socket.
    ensure!(said(&daemon, "without", "", "").await? == "no HTTP_PROXY");
    for to in [&address.to_string(), "127.0.0.1:3128"] {
        let got = said(&daemon, "without", to, "").await?;
        ensure!(got == EPERM, "{to}: {got}");
    }
    // With it, there is the proxy alone.
    for (to, errno) in
        [(address.to_string().as_str(), EACCES), ("169.254.169.254:80", EACCES), ("192.0.2.1:3128", ENETUNREACH)]
    {
        let got = said(&daemon, "net", to, "").await?;
        ensure!(got == errno, "{to}: {got}");
    }
    for url in [format!("http://{address}/"), format!("http://localhost:{port}/")] {
        let got = said(&daemon, "net", "", &get(&url)).await?;
        ensure!(got.starts_with("HTTP/1.1 200") && got.len() > BODY, "{url}: {}", &got[..got.len().min(400)]);
    }
    let refused = [
        ("net", "http://169.254.169.254/".to_owned(), "address_refused", "link-local"),
        ("net", "http://other.example/".to_owned(), "not_listed", "runtime.network.egress"),
        ("net", format!("http://127.0.0.2:{port}/"), "not_listed", "127.0.0.2"),
        // What its author lists and the operator does not.
        ("alone", format!("http://localhost:{port}/"), "address_refused", "[plugin.alone.network]"),
        ("alone", format!("http://127.0.0.1:{port}/"), "address_refused", "loopback"),
    ];
    for (plugin, url, reason, fix) in &refused {
        let got = said(&daemon, plugin, "", &get(url)).await?;
        ensure!(got.starts_with("HTTP/1.1 403 Forbidden"), "{url}: {got}");
        says(url, &got, &[&format!("plugvisor-reason: {reason}"), fix])?;
    }
    let denied = told(&daemon, "broker.egress_denied", "alone").await?;
    ensure!(denied.reason == "address_refused", "{denied:?}");
    says("the event", &events::data_text(&denied), &["localhost"])?;

    let scrape = daemon.scrape().await?;
    let figure = |name: &str, plugin: &str, label: &str, value: &str| {
        let found = scrape
            .labelled("plugin", plugin)
            .find(|sample| sample.name == name && sample.labels.get(label).is_some_and(|found| found == value));
        found.map(|sample| sample.value)
    };
    let bytes = "plugvisor_egress_bytes_total";
    ensure!(figure(bytes, "net", "direction", "in").is_some_and(|bytes| bytes > 2.0 * 200_000.0), "{scrape:?}");
    ensure!(figure(bytes, "net", "direction", "out").is_some_and(|bytes| bytes > 0.0), "{scrape:?}");
    ensure!(figure(bytes, "alone", "direction", "out") == Some(0.0), "{scrape:?}");
    ensure!(figure("plugvisor_security_denials_total", "net", "kind", "egress") == Some(3.0), "{scrape:?}");
    ensure!(figure("plugvisor_security_denials_total", "alone", "kind", "egress") == Some(2.0), "{scrape:?}");
    daemon.stop().await
}

/// A manifest's bandwidth is the most that passes, and the operator may set another.
async fn bandwidth_is_a_limit_of_the_manifest(lane: Lane) -> anyhow::Result<()> {
    let server = Server::start().await?;
    let bundle = asking("net", &server).set("/security/sandbox/resourceLimits/maxNetworkBandwidth", 100_000);
    let daemon = world(lane)?.plugin(&bundle)?.toml(LISTED).start().await?;
    daemon.loaded("net").await?;
    let began = Instant::now();
    let got = said(&daemon, "net", "", &get(&format!("http://{}/", server.address))).await?;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(got.starts_with("HTTP/1.1 200") && got.len() > BODY, "{}", &got[..got.len().min(400)]);
    ensure!(seconds >= 2.0 * 0.95, "200 kB at 100 kB/s took {seconds} s");
    daemon.stop().await
}

/// Who dials the proxy while there is no supervisor waits, and the next one serves the same plugin.
async fn the_next_supervisor_serves_on(lane: Lane) -> anyhow::Result<()> {
    let server = Server::start().await?;
    let daemon = world(lane)?
        .plugin(&asking("net", &server))?
        .toml(LISTED)
        .toml("[launcher]\nlinger = \"100s\"")
        .start()
        .await?;
    let before = daemon.loaded("net").await?.pid;
    let request = get(&format!("http://{}/", server.address));
    let got = said(&daemon, "net", "", &request).await?;
    ensure!(got.starts_with("HTTP/1.1 200"), "{got}");
    let (world, _) = daemon.die().await?;
    let daemon = world.start().await?;
    ensure!(daemon.loaded("net").await?.pid == before, "{}", daemon.account());
    let got = said(&daemon, "net", "", &request).await?;
    ensure!(got.starts_with("HTTP/1.1 200"), "{got}");
    let got = said(&daemon, "net", "", &get("http://other.example/")).await?;
    ensure!(got.starts_with("HTTP/1.1 403"), "{got}");
    daemon.stop().await
}

scenarios!(only_the_proxy_and_only_what_is_listed, bandwidth_is_a_limit_of_the_manifest, the_next_supervisor_serves_on);
