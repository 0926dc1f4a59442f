//! The broker in a process of its own, between callers and providers that others run: what `cargo xtask bench broker`
//! measures, and what the tests attack whose bound is the process's memory.
//!
//! Policy, breaker and metrics are on, as in plugvisord; there is no launcher and no plugin. Its events come on standard
//! error, a line each. It serves until its standard input ends.
#![forbid(unsafe_code)]

use std::{io::Read as _, os::unix::net::UnixListener, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use anyhow::Context as _;
use clap::Parser;
use plugvisor_core::{
    CapabilitySet, Generation, Rights, breaker,
    route::{Availability, Export, Plugin, PluginCaller, RouteTable, Service},
};
use plugvisor_daemon::broker::{
    Broker, BrokerConfig, BrokerHandle, CallLimits, CallerSpec, PluginIdentity, ProviderSpec,
};
use plugvisor_package::Capability;
use rustix::fs::{Mode, OFlags};

#[derive(Debug, Parser)]
struct Arguments {
    /// A socket to make, and the plugin that calls through it; may be given several times.
    #[arg(long, value_name = "NAME=SOCKET", required = true)]
    caller: Vec<CallerArgument>,
    /// A plugin, the service that it provides and the socket that it serves; may be given several times.
    #[arg(long, value_name = "NAME=SERVICE=SOCKET", required = true)]
    provider: Vec<ProviderArgument>,
    /// How long a peer may take to begin HTTP/2 and to answer a ping, instead of the default.
    #[arg(long)]
    patience_ms: Option<u64>,
    /// Whether breakers stay closed whatever happens.
    #[arg(long)]
    no_breakers: bool,
}

#[derive(Clone, Debug)]
struct CallerArgument {
    name: String,
    socket: PathBuf,
}

#[derive(Clone, Debug)]
struct ProviderArgument {
    name: String,
    service: String,
    socket: PathBuf,
}

impl FromStr for CallerArgument {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (name, socket) = text.split_once('=').ok_or("it is not NAME=SOCKET")?;
        Ok(Self { name: name.into(), socket: socket.into() })
    }
}

impl FromStr for ProviderArgument {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.splitn(3, '=');
        match (parts.next(), parts.next(), parts.next()) {
            (Some(name), Some(service), Some(socket)) => {
                Ok(Self { name: name.into(), service: service.into(), socket: socket.into() })
            }
            _ => Err("it is not NAME=SERVICE=SOCKET"),
        }
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let mut config = BrokerConfig::default();
    if let Some(patience) = arguments.patience_ms.map(Duration::from_millis) {
        config.plugin_connections.handshake_timeout = patience;
        config.connect_timeout = patience;
    }
    let (broker, mut events) = Broker::start(config, Vec::new())?;
    std::thread::spawn(move || {
        while let Some(event) = events.blocking_recv() {
            eprintln!("broker-alone: {event:?}");
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(set_up(&broker, &arguments))?;
    println!("ready");
    // Whoever started us ends us by closing our standard input.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let snapshot = runtime.block_on(broker.snapshot())?;
    let calls: u64 = snapshot.calls.iter().flat_map(|series| series.by_code).sum();
    eprintln!("broker-alone: {calls} calls, {} series refused", snapshot.rejected.len());
    Ok(())
}

async fn set_up(broker: &BrokerHandle, arguments: &Arguments) -> anyhow::Result<()> {
    for CallerArgument { name, socket } in &arguments.caller {
        let listener = UnixListener::bind(socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
        let caller = PluginCaller {
            name: name.parse()?,
            generation: Generation(1),
            rights: Rights::of(CapabilitySet::of(&[Capability::InternalCalls])),
            dependencies: Vec::new(),
        };
        let uid = Some(rustix::process::geteuid().as_raw());
        broker.add_caller(CallerSpec { caller, listener: listener.into(), uid }).await?;
    }
    let mut plugins = Vec::new();
    for ProviderArgument { name, service, socket } in &arguments.provider {
        let path = socket;
        let socket = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("cannot open {}", path.display()))?;
        let identity = PluginIdentity { name: name.parse()?, generation: Generation(1) };
        let limits = CallLimits::default();
        let mode = if arguments.no_breakers { breaker::Mode::Off } else { breaker::Mode::On };
        let breaker = breaker::Settings { mode, ..breaker::Settings::default() };
        broker
            .add_provider(ProviderSpec { identity: identity.clone(), socket, breaker, breaker_memory: None, limits })
            .await?;
        plugins.push(Plugin {
            name: identity.name,
            generation: identity.generation,
            availability: Availability::Serving,
            services: vec![Service {
                name: service.clone(),
                token: None,
                export: Export::Shared { global: true, capabilities: CapabilitySet::EMPTY },
            }],
        });
    }
    broker.publish_routes(Arc::new(RouteTable::new(plugins.iter().cloned()))).await?;
    for Plugin { name, generation, .. } in plugins {
        broker.set_ready(&PluginIdentity { name, generation }, true).await?;
    }
    Ok(())
}
