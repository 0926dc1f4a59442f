//! The plugin `thumbnailer`: small versions of pictures.
//!
//! Pictures come from strangers, so what is decoded is bounded three ways: pixels per side, decoded bytes, and pictures
//! at the same time. The work is done on threads of its own, so that health and short calls are answered meanwhile.

mod scale;

use std::{
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
};

use plugvisor_worker::{CallContext, Host, MAX_MESSAGE_BYTES, Plugin, ReconfigureError, Services, StartError};
use scale::{Bounds, ScaleError, Wanted};
use serde::Deserialize;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::{Stream, StreamExt as _, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use v1::{
    BatchRequest, BatchResponse, ImageFormat, ThumbnailRequest, ThumbnailResponse,
    batch_response::Outcome,
    thumbnailer_service_server::{ThumbnailerService, ThumbnailerServiceServer},
};

/// The generated contract.
#[allow(missing_docs, clippy::all, unused_qualifications, reason = "generated; the .proto file is the documentation")]
pub mod v1 {
    tonic::include_proto!("plugvisor.examples.thumbnailer.v1");
}

/// The contract as a serialised `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/thumbnailer.binpb"));

/// Above the SDK's blocking threads there would be waiting, not work.
const MOST_DECODERS: usize = 4;

/// The configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// The longer side of a thumbnail, in pixels, where the caller names none. 1 to 2048.
    pub default_edge: u32,
    /// The longest side, in pixels, of a picture that is decoded. 1 to 65535.
    pub max_picture_edge: u32,
    /// The most bytes that one decoded picture may take. At least 1.
    pub max_decoded_bytes: u64,
    /// The quality of JPEG. 1 to 100.
    pub jpeg_quality: u8,
    /// Pictures that are decoded at the same time. 1 to 4; takes effect at a start only.
    pub decoders: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { default_edge: 256, max_picture_edge: 12_000, max_decoded_bytes: 64 << 20, jpeg_quality: 82, decoders: 2 }
    }
}

impl Config {
    /// The faulty key and what is wrong with it.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let within = |key, value: u64, most: u64| {
            let fault = || (key, format!("is {value}, but must be from 1 to {most}"));
            (1..=most).contains(&value).then_some(()).ok_or_else(fault)
        };
        within("defaultEdge", self.default_edge.into(), Bounds::MOST_THUMBNAIL_EDGE.into())?;
        within("maxPictureEdge", self.max_picture_edge.into(), 65_535)?;
        within("maxDecodedBytes", self.max_decoded_bytes, u64::MAX)?;
        within("jpegQuality", self.jpeg_quality.into(), 100)?;
        within("decoders", self.decoders as u64, MOST_DECODERS as u64)
    }
}

/// The plugin.
#[derive(Debug, Clone)]
pub struct Thumbnailer {
    config: Arc<RwLock<Config>>,
    decoders: Arc<Semaphore>,
}

impl Plugin for Thumbnailer {
    type Config = Config;

    async fn start(config: Config, _host: Host) -> Result<Self, StartError> {
        config.check().map_err(|(key, problem)| StartError::configuration(key, problem))?;
        let decoders = Arc::new(Semaphore::new(config.decoders));
        Ok(Self { config: Arc::new(RwLock::new(config)), decoders })
    }

    fn services(self: Arc<Self>, services: &mut Services) {
        services.add(
            ThumbnailerServiceServer::from_arc(self)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        );
    }

    async fn reconfigure(&self, config: Config) -> Result<(), ReconfigureError> {
        config.check().map_err(|(key, problem)| ReconfigureError::Invalid(format!("{key}: {problem}")))?;
        let mut current = self.config.write().unwrap_or_else(PoisonError::into_inner);
        if config.decoders != current.decoders {
            return Err(ReconfigureError::Invalid("decoders: takes effect at a start only".into()));
        }
        *current = config;
        Ok(())
    }
}

impl Thumbnailer {
    async fn thumbnail(&self, request: ThumbnailRequest) -> Result<ThumbnailResponse, Status> {
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner).clone();
        let bounds = Bounds { picture_edge: config.max_picture_edge, decoded_bytes: config.max_decoded_bytes };
        let wanted = wanted(&request, &config)?;
        // A caller that goes away while waiting here leaves the queue. Once begun, the work keeps its permit to its end,
        // because a thread cannot be cancelled.
        let permit = Arc::clone(&self.decoders).acquire_owned().await;
        let permit = permit.map_err(|_| Status::unavailable("the plugin is stopping"))?;
        let work = move || {
            let _permit = permit;
            scale::thumbnail(&request.image, wanted, bounds)
        };
        let scaled = tokio::task::spawn_blocking(work).await;
        let scaled = scaled.map_err(|_| Status::internal("decoding this picture failed in an unforeseen way"))??;
        tracing::debug!(width = scaled.width, height = scaled.height, "scaled");
        Ok(ThumbnailResponse {
            image: scaled.file.into(),
            format: match scaled.format {
                scale::Format::Png => ImageFormat::Png.into(),
                scale::Format::Jpeg => ImageFormat::Jpeg.into(),
            },
            width: scaled.width,
            height: scaled.height,
            original_width: scaled.original_width,
            original_height: scaled.original_height,
        })
    }
}

fn wanted(request: &ThumbnailRequest, config: &Config) -> Result<Wanted, Status> {
    let edge = match request.max_edge {
        0 => config.default_edge,
        edge => edge,
    };
    if edge > Bounds::MOST_THUMBNAIL_EDGE {
        return Err(Status::invalid_argument(format!(
            "max_edge is {edge}, but a thumbnail has at most {} pixels per side",
            Bounds::MOST_THUMBNAIL_EDGE
        )));
    }
    let format = match ImageFormat::try_from(request.format) {
        Ok(ImageFormat::Unspecified) => None,
        Ok(ImageFormat::Png) => Some(scale::Format::Png),
        Ok(ImageFormat::Jpeg) => Some(scale::Format::Jpeg),
        Err(_) => return Err(Status::invalid_argument(format!("format {} is not known", request.format))),
    };
    Ok(Wanted { edge, format, jpeg_quality: config.jpeg_quality })
}

impl From<ScaleError> for Status {
    fn from(error: ScaleError) -> Self {
        match error {
            ScaleError::NotAPicture | ScaleError::TooLarge(_) | ScaleError::Broken(_) => {
                Self::invalid_argument(error.to_string())
            }
            ScaleError::Encode(_) => Self::internal(error.to_string()),
        }
    }
}

#[tonic::async_trait]
impl ThumbnailerService for Thumbnailer {
    async fn thumbnail(&self, request: Request<ThumbnailRequest>) -> Result<Response<ThumbnailResponse>, Status> {
        self.thumbnail(request.into_inner()).await.map(Response::new)
    }

    type BatchStream = Pin<Box<dyn Stream<Item = Result<BatchResponse, Status>> + Send>>;

    async fn batch(&self, request: Request<Streaming<BatchRequest>>) -> Result<Response<Self::BatchStream>, Status> {
        let (answers, receiver) = mpsc::channel(1);
        let (plugin, requests) = (self.clone(), request.into_inner());
        let call = CallContext::current().unwrap_or_default();
        tokio::spawn(call.scope(async move {
            tokio::select! {
                () = plugin.answer_batch(requests, &answers) => {}
                // The caller went away.
                () = answers.closed() => {}
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

impl Thumbnailer {
    async fn answer_batch(
        &self,
        mut requests: Streaming<BatchRequest>,
        answers: &mpsc::Sender<Result<BatchResponse, Status>>,
    ) {
        while let Some(request) = requests.next().await {
            let answer = match request {
                Ok(BatchRequest { id, thumbnail }) => {
                    let outcome = match self.thumbnail(thumbnail.unwrap_or_default()).await {
                        Ok(thumbnail) => Outcome::Thumbnail(thumbnail),
                        Err(status) => Outcome::Error(status.message().to_owned()),
                    };
                    Ok(BatchResponse { id, outcome: Some(outcome) })
                }
                Err(status) => Err(status),
            };
            let ended = answer.is_err();
            if answers.send(answer).await.is_err() || ended {
                return;
            }
        }
    }
}
