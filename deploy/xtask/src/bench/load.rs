//! The caller: tonic on one thread and one connection, so many calls in flight, for so long.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    task::{JoinSet, LocalSet},
};
use tonic::{
    Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};

use super::echo::{Codec, METHOD};

/// What to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Order {
    /// Bytes in each message.
    pub(super) payload: usize,
    /// Calls in flight.
    pub(super) in_flight: usize,
    /// How long to begin new calls.
    pub(super) millis: u64,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Measured {
    /// Calls that ended well.
    pub(super) calls: u64,
    /// Calls per second.
    pub(super) rps: f64,
    /// The median call.
    pub(super) p50_us: f64,
    /// The slowest call but one in a hundred.
    pub(super) p99_us: f64,
}

/// Reads orders as JSON lines from standard input and answers each with a line, until there are no more.
pub(super) async fn obey(connect: &Path) -> anyhow::Result<()> {
    let endpoint = Endpoint::from_shared(format!("unix://{}", connect.display()))?;
    let channel = endpoint.connect().await.with_context(|| format!("cannot connect to {}", connect.display()))?;
    println!("ready");
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let local = LocalSet::new();
    while let Some(line) = orders.next_line().await? {
        let order: Order = serde_json::from_str(&line)?;
        let measured = local.run_until(measure(channel.clone(), order)).await?;
        println!("{}", serde_json::to_string(&measured)?);
    }
    Ok(())
}

async fn measure(channel: Channel, order: Order) -> anyhow::Result<Measured> {
    let payload: Bytes = (0..=u8::MAX).cycle().take(order.payload).collect::<Vec<u8>>().into();
    let began = Instant::now();
    let end = began + Duration::from_millis(order.millis);
    let mut callers = JoinSet::new();
    for _ in 0..order.in_flight {
        callers.spawn_local(caller(Grpc::new(channel.clone()), payload.clone(), end));
    }
    let mut latencies = Vec::new();
    while let Some(some) = callers.join_next().await {
        latencies.extend(some??);
    }
    let elapsed = began.elapsed();
    latencies.sort_unstable();
    anyhow::ensure!(!latencies.is_empty(), "no call ended");
    let at = |hundredth: usize| micros(latencies[(latencies.len() - 1) * hundredth / 100]);
    let calls = u64::try_from(latencies.len())?;
    #[allow(clippy::cast_precision_loss, reason = "a count of calls is far below 2^52")]
    let rps = calls as f64 / elapsed.as_secs_f64();
    Ok(Measured { calls, rps, p50_us: at(50), p99_us: at(99) })
}

async fn caller(mut grpc: Grpc<Channel>, payload: Bytes, end: Instant) -> anyhow::Result<Vec<Duration>> {
    let mut latencies = Vec::with_capacity(4096);
    loop {
        let began = Instant::now();
        if began >= end {
            return Ok(latencies);
        }
        grpc.ready().await?;
        let request = Request::new(payload.clone());
        let reply = grpc.unary(request, PathAndQuery::from_static(METHOD), Codec::default()).await?;
        latencies.push(began.elapsed());
        let reply: Bytes = reply.into_inner();
        anyhow::ensure!(reply.len() == payload.len(), "the reply has {} bytes", reply.len());
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}
