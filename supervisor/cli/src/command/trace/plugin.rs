//! What a supervisor asks a plugin before others may call it, as far as the program's own doing goes.

use std::{os::fd::OwnedFd, path::Path, time::Duration};

use plugvisor_package::{Manifest, SocketMode};
use plugvisor_proto::worker::v1::{InitRequest, worker_client::WorkerClient};
use plugvisor_sandbox::worker_socket;
use serde_json::Value;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::{Code, Status, transport::Channel};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::admin;

/// The start-up time when the manifest says nothing.
const START: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_millis(50);

/// Waits for its socket: the one that it was given, or the one that it binds in a directory of its own, held as it was when it
/// was found to be one.
pub(super) async fn socket(given: &OwnedFd, manifest: &Manifest) -> Result<OwnedFd, String> {
    let (deadline, patience) = deadline(manifest);
    let copy = || given.try_clone().map_err(|error| format!("its socket cannot be held: {error}"));
    loop {
        match manifest.runtime.socket {
            SocketMode::Inherit => return copy(),
            SocketMode::Bind => match worker_socket::bound(given) {
                Ok(Some(socket)) => return Ok(socket),
                Ok(None) if Instant::now() < deadline => sleep(RETRY).await,
                Ok(None) => return Err(format!("it bound no socket at PLUGVISOR_LISTEN in {} s", patience.as_secs())),
                Err(why) => return Err(why.to_string()),
            },
        }
    }
}

/// Until when it must serve, and how long that is: every call of it waits for an answer from here, which makes it slower.
fn deadline(manifest: &Manifest) -> (Instant, Duration) {
    let patience = manifest.monitoring.max_startup_time.unwrap_or(START) * 4;
    (Instant::now() + patience, patience)
}

/// Waits until it serves: health, `Init`, health again.
pub(super) async fn greet(worker: &Path, manifest: &Manifest) -> Result<(), String> {
    let (deadline, patience) = deadline(manifest);
    let late = |what: &str| format!("{what} in {} s", patience.as_secs());
    let channel = timeout_at(deadline, connect(worker, deadline)).await;
    let channel = channel.ok().flatten().ok_or_else(|| late("it accepted no connection"))?;
    let mut health = HealthClient::new(channel.clone());
    answered(&mut health, deadline).await?;
    let left = deadline.saturating_duration_since(Instant::now());
    let init = InitRequest {
        plugin: manifest.name.to_string(),
        generation: 1,
        protocol_versions: vec![1],
        config: Some(to_struct(manifest.runtime.config.defaults.clone())),
        capabilities: manifest.security.capabilities.iter().map(ToString::to_string).collect(),
        deadline: prost_types::Duration::try_from(left).ok(),
    };
    match timeout_at(deadline, WorkerClient::new(channel).init(init)).await {
        Err(_) => return Err(late("it did not answer Init")),
        Ok(Err(status)) if status.code() != Code::Unimplemented => {
            return Err(format!("it refused Init: {}", status.message()));
        }
        Ok(_) => {}
    }
    loop {
        let asked = timeout_at(deadline, health.check(HealthCheckRequest::default())).await;
        match asked {
            Err(_) => return Err(late("its health service did not say SERVING")),
            Ok(Ok(answer)) if answer.get_ref().status == ServingStatus::Serving as i32 => return Ok(()),
            Ok(_) => sleep(RETRY).await,
        }
    }
}

async fn answered(health: &mut HealthClient<Channel>, deadline: Instant) -> Result<(), String> {
    match timeout_at(deadline, health.check(HealthCheckRequest::default())).await {
        Err(_) => Err("its health service never answered".to_owned()),
        Ok(Err(status)) if of_transport(&status) => Err(format!("it ended the connection: {}", status.message())),
        Ok(Err(status)) if status.code() == Code::Unimplemented => Err("it has no grpc.health.v1.Health".to_owned()),
        Ok(Ok(_) | Err(_)) => Ok(()),
    }
}

fn of_transport(status: &Status) -> bool {
    std::error::Error::source(status).is_some()
}

/// A connection, as soon as there is somebody to connect to.
async fn connect(worker: &Path, deadline: Instant) -> Option<Channel> {
    loop {
        if let Ok(channel) = admin::connect(worker, deadline.saturating_duration_since(Instant::now())).await {
            return Some(channel);
        }
        sleep(RETRY).await;
    }
}

fn to_struct(object: serde_json::Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct { fields: object.into_iter().map(|(key, value)| (key, to_value(value))).collect() }
}

fn to_value(value: Value) -> prost_types::Value {
    use prost_types::value::Kind;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(all) => {
            Kind::ListValue(prost_types::ListValue { values: all.into_iter().map(to_value).collect() })
        }
        Value::Object(object) => Kind::StructValue(to_struct(object)),
    };
    prost_types::Value { kind: Some(kind) }
}
