//! A proxy on the host's loopback, and servers to be reached through it. The proxy does not know that the plugin is this
//! test: which namespace its listener is in makes no difference to it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use plugvisor_core::{
    CapabilitySet, Rights,
    egress::{AddressRules, AllowList},
};
use plugvisor_daemon::{
    egress::{EgressHost, EgressLimits, Figures, Proxy, Rules},
    events::{Events, Subject},
    meter::Meter,
};
use plugvisor_package::Capability;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::timeout,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct World {
    pub(crate) proxy: SocketAddr,
    pub(crate) figures: Arc<Figures>,
    pub(crate) events: Arc<Events>,
    pub(crate) serving: JoinHandle<()>,
}

/// What a proxy may do, to be changed by a test.
pub(crate) struct Setting {
    pub(crate) egress: Vec<String>,
    pub(crate) addresses: Vec<&'static str>,
    pub(crate) granted: CapabilitySet,
    pub(crate) bandwidth: Option<u64>,
    pub(crate) limits: EgressLimits,
}

impl Setting {
    /// These destinations, on this host's loopback.
    pub(crate) fn reaching(egress: &[String]) -> Self {
        Self {
            egress: egress.to_vec(),
            addresses: vec!["127.0.0.1"],
            granted: CapabilitySet::of(&[Capability::HttpClient, Capability::WebSocket]),
            bandwidth: None,
            limits: EgressLimits::default(),
        }
    }

    pub(crate) async fn start(self) -> World {
        let Self { egress, addresses, granted, bandwidth, limits } = self;
        let egress = egress.iter().map(|text| text.parse().expect("a destination")).collect();
        let listed = addresses.iter().map(|text| text.parse().expect("a network")).collect();
        let rules = Rules {
            allow: AllowList::new(egress, None),
            addresses: AddressRules { listed },
            rights: Rights::of(granted),
            bandwidth: bandwidth.map(|rate| Arc::new(Meter::new(rate))),
        };
        let (figures, events) = (Arc::new(Figures::default()), Arc::new(Events::new()));
        let subject = Subject::Plugin("sample".to_owned());
        let host = Arc::new(EgressHost::new(limits));
        let proxy = Proxy::new(subject, rules, host, Arc::clone(&figures), Arc::clone(&events));
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let serving = tokio::spawn(async move { proxy.serve(listener.into()).await.expect("serves") });
        World { proxy: address, figures, events, serving }
    }
}

impl World {
    pub(crate) async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.proxy).await.expect("the proxy listens")
    }

    /// Says this on a connection of its own and gives all that is answered.
    pub(crate) async fn say(&self, text: &str) -> String {
        let mut stream = self.connect().await;
        stream.write_all(text.as_bytes()).await.expect("writes");
        read_all(&mut stream).await
    }

    /// What was told of refusals: the reasons.
    pub(crate) fn denials(&self) -> Vec<String> {
        let batch = self.events.read(0, usize::MAX);
        let denied = batch.entries.iter().filter(|(_, record)| record.type_name.contains("egress_denied"));
        denied.map(|(_, record)| record.event.reason().to_owned()).collect()
    }
}

/// Reads to the end. A reset is an end too.
pub(crate) async fn read_all(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    let _ = timeout(PATIENCE, stream.read_to_end(&mut bytes)).await.expect("it ends");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Reads until the text ends like this.
pub(crate) async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut bytes = Vec::new();
    let reading = async {
        while !bytes.ends_with(end.as_bytes()) {
            let read = stream.read_buf(&mut bytes).await.expect("reads");
            assert!(read > 0, "it ended: {}", String::from_utf8_lossy(&bytes));
        }
    };
    let done = timeout(PATIENCE, reading).await;
    assert!(done.is_ok(), "{end:?} did not come");
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A server that gives every request the same answer and then closes; what it was asked comes out.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) asked: mpsc::UnboundedReceiver<String>,
    _serving: JoinSet<()>,
}

impl Server {
    pub(crate) async fn answering(answer: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let (sender, asked) = mpsc::unbounded_channel();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let sender = sender.clone();
                tokio::spawn(async move {
                    let mut bytes = Vec::new();
                    while !is_whole(&bytes) {
                        if stream.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
                            break;
                        }
                    }
                    let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
                    let _ = stream.write_all(answer.as_bytes()).await;
                    if answer.starts_with("HTTP/1.1 101") {
                        let (mut reader, mut writer) = stream.split();
                        let _ = tokio::io::copy(&mut reader, &mut writer).await;
                    }
                    let _ = stream.shutdown().await;
                    // Read to the end, so that nothing is reset.
                    let _ = stream.read_to_end(&mut bytes).await;
                });
            }
        });
        Self { address, asked, _serving: serving }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn destination(&self) -> String {
        self.address.to_string()
    }

    pub(crate) async fn was_asked(&mut self) -> String {
        timeout(PATIENCE, self.asked.recv()).await.expect("it is asked").expect("it serves")
    }
}

/// Whether a request is there with its body.
fn is_whole(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes).to_ascii_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.trim().parse::<usize>().ok());
    if head.contains("transfer-encoding: chunked") {
        return body.ends_with("0\r\n\r\n");
    }
    body.len() >= length.unwrap_or(0)
}
