//! `plugvisor-client` against real sockets; here because the SDK has a server to call.
#![allow(clippy::unwrap_used, reason = "a failed test is a panic")]

use std::{fs, os::unix::net::UnixListener, path::Path, sync::Arc, time::Duration};

use plugvisor_client::{Client, ConnectError, Reason, Refusal};
use plugvisor_proto::host::v1::{
    PublishRequest, PublishResponse,
    events_client::EventsClient,
    events_server::{Events, EventsServer},
};
use plugvisor_worker::{Host, NoConfig, Plugin, Services, StartError, testing::TestPlugin};
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};

/// Answers with the metadata that came, as a status.
struct Mirror;

impl Plugin for Mirror {
    type Config = NoConfig;

    async fn start(_config: NoConfig, _host: Host) -> Result<Self, StartError> {
        Ok(Self)
    }

    fn services(self: Arc<Self>, services: &mut Services) {
        services.add(EventsServer::from_arc(self));
    }
}

#[tonic::async_trait]
impl Events for Mirror {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let mut metadata = MetadataMap::new();
        for key in ["plugvisor-token", "grpc-timeout"] {
            if let Some(value) = request.metadata().get(key) {
                metadata
                    .insert(format!("seen-{key}").parse::<tonic::metadata::AsciiMetadataKey>().unwrap(), value.clone());
            }
        }
        metadata.insert("plugvisor-reason", "overloaded".parse().unwrap());
        metadata.insert("plugvisor-hint", "wait".parse().unwrap());
        Err(Status::with_metadata(Code::ResourceExhausted, "full", metadata))
    }
}

async fn call(client: Client) -> Status {
    EventsClient::new(client).publish(PublishRequest::default()).await.unwrap_err()
}

fn socket_in(directory: &tempfile::TempDir) -> std::path::PathBuf {
    directory.path().join("calls.sock")
}

fn bind_and_abandon(path: &Path) {
    drop(UnixListener::bind(path).unwrap());
}

#[tokio::test]
async fn a_missing_or_dead_socket_says_what_to_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = socket_in(&directory);
    for prepare in [|_: &Path| {}, bind_and_abandon] {
        prepare(&path);
        let error = Client::connect(&path).await.unwrap_err();
        assert!(matches!(error, ConnectError::NotRunning { .. }), "{error:?}");
        let late = call(Client::lazy(&path)).await;
        assert_eq!(late.code(), Code::Unavailable);
        for text in [error.to_string(), late.message().to_owned()] {
            assert!(text.contains("`plugvisor run`") && text.contains(path.to_str().unwrap()), "{text}");
        }
    }
}

#[tokio::test]
async fn a_client_connects_again_when_the_other_side_is_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = socket_in(&directory);
    let client = Client::lazy(&path);
    assert_eq!(call(client.clone()).await.code(), Code::Unavailable);
    for _ in 0..2 {
        let plugin = TestPlugin::start::<Mirror>(serde_json::json!({})).await.unwrap();
        std::os::unix::fs::symlink(plugin.socket(), &path).unwrap();
        // A connection that was just lost may cost one call, which says so; it never costs two.
        let mut status = call(client.clone()).await;
        if status.code() != Code::ResourceExhausted {
            status = call(client.clone()).await;
        }
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        plugin.stop().await;
        fs::remove_file(&path).unwrap();
    }
}

#[tokio::test]
async fn token_and_timeout_go_with_each_call() {
    let plugin = TestPlugin::start::<Mirror>(serde_json::json!({})).await.unwrap();
    let client = Client::connect(plugin.socket()).await.unwrap();
    let plain = call(client.clone()).await;
    assert!(plain.metadata().get("seen-plugvisor-token").is_none());
    assert!(plain.metadata().get("seen-grpc-timeout").is_none());
    let dressed = client.with_token("small-pictures").unwrap().with_timeout(Duration::from_secs(3));
    let seen = call(dressed).await;
    assert_eq!(seen.metadata().get("seen-plugvisor-token").unwrap(), "small-pictures");
    assert_eq!(seen.metadata().get("seen-grpc-timeout").unwrap(), "3000000u");
    assert!(client.with_token("a\nb").is_none());
}

#[tokio::test]
async fn a_refusal_is_read_from_the_wire() {
    let plugin = TestPlugin::start::<Mirror>(serde_json::json!({})).await.unwrap();
    let refusal = Refusal::from_status(&call(plugin.client()).await).unwrap();
    assert_eq!((refusal.reason, refusal.hint.as_str()), (Reason::Overloaded, "wait"));
    assert_eq!((refusal.code, refusal.message.as_str()), (Code::ResourceExhausted, "full"));
}

#[tokio::test]
async fn without_a_broker_each_call_says_so() {
    let status = call(Client::unavailable("this plugin runs alone")).await;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "this plugin runs alone"));
}
