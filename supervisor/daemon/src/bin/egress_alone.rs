//! The egress proxy in a process of its own, on the host's loopback instead of a plugin's: what `cargo xtask bench egress`
//! measures. There is no launcher and no plugin.
//!
//! It answers each line of its standard input with the address that it listens at, and serves until the input ends.
#![forbid(unsafe_code)]

use std::{io::BufRead as _, net::TcpListener, sync::Arc};

use clap::Parser;
use plugvisor_core::{
    CapabilitySet, Rights,
    egress::{AddressRules, AllowList},
};
use plugvisor_daemon::{
    egress::{EgressHost, EgressLimits, Figures, Proxy, Rules},
    events::{Events, Subject},
    meter::Meter,
};
use plugvisor_package::{Capability, Destination};

#[derive(Debug, Parser)]
struct Arguments {
    /// Where it may connect to, `host:port`; may be given several times.
    #[arg(long, value_name = "DESTINATION", required = true)]
    destination: Vec<Destination>,
    /// The bandwidth, both directions together.
    #[arg(long)]
    bytes_per_second: Option<u64>,
}

fn main() -> anyhow::Result<()> {
    let Arguments { destination, bytes_per_second } = Arguments::parse();
    let rules = Rules {
        allow: AllowList::new(destination, None),
        addresses: AddressRules { listed: vec!["127.0.0.0/8".parse()?] },
        rights: Rights::of(CapabilitySet::of(&[Capability::HttpClient, Capability::WebSocket])),
        bandwidth: bytes_per_second.map(|rate| Arc::new(Meter::new(rate))),
    };
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let host = Arc::new(EgressHost::new(EgressLimits::default()));
    let subject = Subject::Plugin("bench".to_owned());
    let proxy = Proxy::new(subject, rules, host, Arc::new(Figures::default()), Arc::new(Events::new()));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let serving = runtime.spawn(proxy.serve(listener.into()));
    println!("ready");
    for line in std::io::stdin().lock().lines() {
        line?;
        println!("{address}");
    }
    serving.abort();
    Ok(())
}
