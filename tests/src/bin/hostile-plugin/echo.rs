//! The good citizen's service: one method of each streaming kind.

use plugvisor_tests::contract::{
    ChatRequest, ChatResponse, CollectRequest, CollectResponse, RepeatRequest, RepeatResponse, SayRequest, SayResponse,
    echo_service_server::EchoService,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming, metadata::MetadataMap};

/// Answers what it was sent.
#[derive(Debug)]
pub(crate) struct Echo;

/// Answers that wait to be read by a slow caller; small, so that flow control is felt.
const WAITING: usize = 4;

#[tonic::async_trait]
impl EchoService for Echo {
    async fn say(&self, request: Request<SayRequest>) -> Result<Response<SayResponse>, Status> {
        let generation = std::env::var("PLUGVISOR_GENERATION").unwrap_or_default().parse().unwrap_or_default();
        let metadata = request.metadata();
        let mut answer = Response::new(SayResponse {
            caller: text(metadata, "plugvisor-caller"),
            traceparent: text(metadata, "traceparent"),
            timeout: text(metadata, "grpc-timeout"),
            text: String::new(),
            generation,
        });
        if let Some(value) = metadata.get("x-echo") {
            answer.metadata_mut().insert("x-echo", value.clone());
        }
        answer.get_mut().text = request.into_inner().text;
        Ok(answer)
    }

    async fn collect(&self, request: Request<Streaming<CollectRequest>>) -> Result<Response<CollectResponse>, Status> {
        let mut parts = request.into_inner();
        let mut answer = CollectResponse::default();
        while let Some(part) = parts.message().await? {
            answer.count += 1;
            answer.joined.push_str(&part.text);
        }
        Ok(Response::new(answer))
    }

    type RepeatStream = ReceiverStream<Result<RepeatResponse, Status>>;

    async fn repeat(&self, request: Request<RepeatRequest>) -> Result<Response<Self::RepeatStream>, Status> {
        let RepeatRequest { text, count } = request.into_inner();
        let (send, receive) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            for index in 0..count {
                if send.send(Ok(RepeatResponse { text: text.clone(), index })).await.is_err() {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }

    type ChatStream = ReceiverStream<Result<ChatResponse, Status>>;

    async fn chat(&self, request: Request<Streaming<ChatRequest>>) -> Result<Response<Self::ChatStream>, Status> {
        let mut said = request.into_inner();
        let (send, receive) = mpsc::channel(WAITING);
        tokio::spawn(async move {
            loop {
                let answer = match said.message().await {
                    Ok(Some(ChatRequest { text })) => Ok(ChatResponse { text }),
                    Ok(None) => break,
                    Err(status) => Err(status),
                };
                let last = answer.is_err();
                if send.send(answer).await.is_err() || last {
                    break;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(receive)))
    }
}

/// A metadata value as text; empty when it is missing.
pub(crate) fn text(metadata: &MetadataMap, name: &str) -> String {
    metadata.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}
