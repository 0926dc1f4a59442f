//! The broker in a process of its own, between one caller and one provider: what `cargo xtask bench broker` measures.
//!
//! Policy, breaker and metrics are on, as in plugvisord; there is no launcher and no plugin. It serves until its standard
//! input ends.
#![forbid(unsafe_code)]

use std::{io::Read as _, os::unix::net::UnixListener, path::PathBuf, sync::Arc};

use anyhow::Context as _;
use clap::Parser;
use plugvisor_core::{
    CapabilitySet, Generation, breaker,
    route::{Availability, Export, Plugin, PluginCaller, RouteTable, Service},
};
use plugvisor_daemon::broker::{
    Broker, BrokerConfig, BrokerHandle, CallLimits, CallerSpec, PluginIdentity, ProviderSpec,
};
use plugvisor_package::Capability;
use rustix::fs::{Mode, OFlags};

#[derive(Debug, Parser)]
struct Arguments {
    /// The socket to make for the caller.
    #[arg(long)]
    listen: PathBuf,
    /// The socket that the provider serves.
    #[arg(long)]
    provider: PathBuf,
    /// The service that the provider provides.
    #[arg(long)]
    service: String,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let (broker, mut events) = Broker::start(BrokerConfig::default(), Vec::new())?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    runtime.block_on(set_up(&broker, &arguments))?;
    println!("ready");
    // Whoever started us ends us by closing our standard input.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    let snapshot = runtime.block_on(broker.snapshot())?;
    let calls: u64 = snapshot.calls.iter().flat_map(|series| series.by_code).sum();
    eprintln!("broker-alone: {calls} calls, {} series refused", snapshot.rejected.len());
    while let Ok(event) = events.try_recv() {
        eprintln!("broker-alone: {event:?}");
    }
    Ok(())
}

async fn set_up(broker: &BrokerHandle, arguments: &Arguments) -> anyhow::Result<()> {
    let listener = UnixListener::bind(&arguments.listen)
        .with_context(|| format!("cannot listen on {}", arguments.listen.display()))?;
    let socket = rustix::fs::open(&arguments.provider, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", arguments.provider.display()))?;
    let provider = PluginIdentity { name: "provider".parse()?, generation: Generation(1) };
    let caller = PluginCaller {
        name: "caller".parse()?,
        generation: Generation(1),
        granted: CapabilitySet::of(&[Capability::InternalCalls]),
        dependencies: Vec::new(),
    };
    let uid = Some(rustix::process::geteuid().as_raw());
    broker.add_caller(CallerSpec { caller, listener: listener.into(), uid }).await?;
    let limits = CallLimits::default();
    let breaker = breaker::Settings::default();
    broker.add_provider(ProviderSpec { identity: provider.clone(), socket, breaker, limits }).await?;
    let routes = RouteTable::new([Plugin {
        name: provider.name.clone(),
        generation: provider.generation,
        availability: Availability::Serving,
        services: vec![Service {
            name: arguments.service.clone(),
            token: None,
            export: Export::Shared { global: true, capabilities: CapabilitySet::EMPTY },
        }],
    }]);
    broker.publish_routes(Arc::new(routes)).await?;
    broker.set_ready(&provider, true).await?;
    Ok(())
}
