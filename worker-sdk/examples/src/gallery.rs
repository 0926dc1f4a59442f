//! The plugin `gallery`: one HTML page of pictures and texts, made by calling `thumbnailer` and `markdown`.
//!
//! It sees no files of the host: what goes into the page comes in the request. The other plugins are reached through the
//! broker, so their absence, limits and faults arrive as statuses, which are named on the page.

mod page;

use std::{pin::Pin, sync::Arc};

use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream};
use page::{Entry, render};
use plugvisor_worker::{CallContext, Client, Host, MAX_MESSAGE_BYTES, Plugin, Services, StartError};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use v1::{
    BuildRequest, BuildResponse, File, Outcome, Page, Progress, Summary, build_request, build_response,
    gallery_service_server::{GalleryService, GalleryServiceServer},
};

use crate::{
    markdown::v1::{RenderRequest, markdown_service_client::MarkdownServiceClient},
    thumbnailer::v1::{ImageFormat, ThumbnailRequest, thumbnailer_service_client::ThumbnailerServiceClient},
};

/// The generated contract.
#[allow(missing_docs, clippy::all, unused_qualifications, reason = "generated; the .proto file is the documentation")]
pub mod v1 {
    tonic::include_proto!("plugvisor.examples.gallery.v1");
}

/// The contract as a serialised `google.protobuf.FileDescriptorSet`.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/gallery.binpb"));

const CHUNK_BYTES: usize = 64 << 10;
const MOST_NAME_BYTES: usize = 1024;

/// The configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// The most files of one page. At least 1.
    pub max_files: usize,
    /// The most bytes of one page: what is kept while the page is made is bounded by it too. At least 1.
    pub max_page_bytes: usize,
    /// Files that are worked on at the same time. 1 to 64.
    pub parallel: usize,
    /// The longer side of a thumbnail, in pixels, where the caller names none. 0 leaves it to `thumbnailer`.
    pub thumbnail_edge: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self { max_files: 500, max_page_bytes: 32 << 20, parallel: 4, thumbnail_edge: 320 }
    }
}

/// The plugin.
#[derive(Debug, Clone)]
pub struct Gallery {
    config: Config,
    host: Host,
}

impl Plugin for Gallery {
    type Config = Config;

    async fn start(config: Config, host: Host) -> Result<Self, StartError> {
        for (key, value, most) in [
            ("maxFiles", config.max_files, usize::MAX),
            ("maxPageBytes", config.max_page_bytes, usize::MAX),
            ("parallel", config.parallel, 64),
        ] {
            if !(1..=most).contains(&value) {
                return Err(StartError::configuration(key, format!("is {value}, but must be from 1 to {most}")));
            }
        }
        if !host.is_granted("api:internal-calls") {
            tracing::warn!("without the capability api:internal-calls the broker will refuse this plugin's calls");
        }
        Ok(Self { config, host })
    }

    fn services(self: Arc<Self>, services: &mut Services) {
        services.add(
            GalleryServiceServer::from_arc(self)
                .max_decoding_message_size(MAX_MESSAGE_BYTES)
                .max_encoding_message_size(MAX_MESSAGE_BYTES),
        );
    }
}

#[tonic::async_trait]
impl GalleryService for Gallery {
    type BuildStream = Pin<Box<dyn Stream<Item = Result<BuildResponse, Status>> + Send>>;

    async fn build(&self, request: Request<Streaming<BuildRequest>>) -> Result<Response<Self::BuildStream>, Status> {
        let mut requests = request.into_inner();
        let page = match requests.message().await?.and_then(|request| request.part) {
            Some(build_request::Part::Page(page)) => page,
            Some(build_request::Part::File(_)) | None => {
                return Err(Status::invalid_argument("the first message must be the page's settings"));
            }
        };
        let (answers, receiver) = mpsc::channel(1);
        let plugin = self.clone();
        // A new task leaves the call's context behind unless it is taken along: with it, the calls to the other plugins
        // carry this call's deadline and trace.
        let call = CallContext::current().unwrap_or_default();
        tokio::spawn(call.scope(async move {
            tokio::select! {
                built = plugin.build_page(page, requests, &answers) => {
                    if let Err(status) = built {
                        // When the caller went away, there is nobody to tell.
                        let _ = answers.send(Err(status)).await;
                    }
                }
                // The caller went away: dropping the work cancels the calls to the other plugins.
                () = answers.closed() => tracing::debug!("the caller left before the page was done"),
            }
        }));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

type Answers = mpsc::Sender<Result<BuildResponse, Status>>;

impl Gallery {
    async fn build_page(
        &self,
        settings: Page,
        requests: Streaming<BuildRequest>,
        answers: &Answers,
    ) -> Result<(), Status> {
        let edge = match settings.thumbnail_edge {
            0 => self.config.thumbnail_edge,
            edge => edge,
        };
        let client = self.host.client();
        // In order of arrival, with a few at the same time; reading the next file waits until there is room for it.
        let files = stream::try_unfold(requests, next_file);
        let entries = files
            .map(|file| {
                let client = client.clone();
                async move {
                    let File { name, content } = file?;
                    Ok::<_, Status>(entry_of(client, name, content, edge).await)
                }
            })
            .buffered(self.config.parallel);
        let mut entries = std::pin::pin!(entries);

        let (mut kept, mut bytes) = (Vec::new(), 0);
        while let Some(entry) = entries.next().await {
            let entry = entry?;
            bytes += entry.bytes();
            if kept.len() == self.config.max_files {
                return Err(over("maxFiles", self.config.max_files, "files"));
            }
            if bytes > self.config.max_page_bytes {
                return Err(over("maxPageBytes", self.config.max_page_bytes, "bytes"));
            }
            send(answers, build_response::Part::Progress(progress_of(&entry))).await?;
            kept.push(entry);
        }
        let html = Bytes::from(render(&settings.title, &kept));
        for start in (0..html.len()).step_by(CHUNK_BYTES) {
            let chunk = html.slice(start..html.len().min(start + CHUNK_BYTES));
            send(answers, build_response::Part::Chunk(chunk)).await?;
        }
        let summary = summary_of(&kept, html.len());
        tracing::info!(
            pictures = summary.pictures,
            texts = summary.texts,
            failed = summary.failed,
            bytes = summary.bytes,
            "page built"
        );
        send(answers, build_response::Part::Summary(summary)).await
    }
}

async fn next_file(mut requests: Streaming<BuildRequest>) -> Result<Option<(File, Streaming<BuildRequest>)>, Status> {
    match requests.message().await? {
        None => Ok(None),
        Some(BuildRequest { part: Some(build_request::Part::File(file)) }) => {
            if file.name.len() > MOST_NAME_BYTES {
                return Err(Status::invalid_argument(format!("a file's name has more than {MOST_NAME_BYTES} bytes")));
            }
            Ok(Some((file, requests)))
        }
        Some(BuildRequest { part: Some(build_request::Part::Page(_)) | None }) => {
            Err(Status::invalid_argument("after the first message, each must be a file"))
        }
    }
}

async fn entry_of(client: Client, name: String, content: Bytes, edge: u32) -> Entry {
    match kind_of(&name, &content) {
        Some(Kind::Picture) => {
            let request = ThumbnailRequest { image: content, max_edge: edge, format: ImageFormat::Unspecified.into() };
            match client_of_thumbnailer(client).thumbnail(request).await.map(Response::into_inner) {
                Ok(thumbnail) => {
                    let media = match thumbnail.format() {
                        ImageFormat::Png => "image/png",
                        ImageFormat::Jpeg | ImageFormat::Unspecified => "image/jpeg",
                    };
                    let (width, height) = (thumbnail.width, thumbnail.height);
                    Entry::Picture { name, media, width, height, file: thumbnail.image }
                }
                Err(status) => failed(name, "thumbnailer", &status),
            }
        }
        Some(Kind::Text) => {
            let Ok(markdown) = String::from_utf8(content.into()) else {
                return Entry::Failed { name, problem: "it is not UTF-8".to_owned() };
            };
            match client_of_markdown(client).render(RenderRequest { markdown }).await.map(Response::into_inner) {
                Ok(rendered) => Entry::Text { name, title: rendered.title, html: rendered.html },
                Err(status) => failed(name, "markdown", &status),
            }
        }
        None => Entry::Skipped { name },
    }
}

fn client_of_thumbnailer(client: Client) -> ThumbnailerServiceClient<Client> {
    ThumbnailerServiceClient::new(client)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

fn client_of_markdown(client: Client) -> MarkdownServiceClient<Client> {
    MarkdownServiceClient::new(client)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

enum Kind {
    Picture,
    Text,
}

fn kind_of(name: &str, content: &[u8]) -> Option<Kind> {
    if content.starts_with(b"\x89PNG\r\n\x1a\n") || content.starts_with(b"\xff\xd8\xff") {
        return Some(Kind::Picture);
    }
    let (_, extension) = name.rsplit_once('.')?;
    ["md", "markdown", "txt"].iter().any(|known| extension.eq_ignore_ascii_case(known)).then_some(Kind::Text)
}

fn failed(name: String, plugin: &str, status: &Status) -> Entry {
    // A file that is at fault is the caller's affair; anything else is the operator's as well.
    if status.code() != Code::InvalidArgument {
        tracing::warn!(plugin, code = ?status.code(), "a call failed: {}", status.message());
    }
    Entry::Failed { name, problem: format!("{plugin}: {}", status.message()) }
}

fn progress_of(entry: &Entry) -> Progress {
    let (outcome, detail) = match entry {
        Entry::Picture { .. } => (Outcome::Picture, ""),
        Entry::Text { .. } => (Outcome::Text, ""),
        Entry::Skipped { .. } => (Outcome::Skipped, "neither a picture nor a text"),
        Entry::Failed { problem, .. } => (Outcome::Failed, problem.as_str()),
    };
    Progress { name: entry.name().to_owned(), outcome: outcome.into(), detail: detail.to_owned() }
}

fn summary_of(entries: &[Entry], bytes: usize) -> Summary {
    let mut summary = Summary { bytes: bytes as u64, ..Summary::default() };
    for entry in entries {
        *match entry {
            Entry::Picture { .. } => &mut summary.pictures,
            Entry::Text { .. } => &mut summary.texts,
            Entry::Skipped { .. } => &mut summary.skipped,
            Entry::Failed { .. } => &mut summary.failed,
        } += 1;
    }
    summary
}

fn over(key: &str, most: usize, unit: &str) -> Status {
    Status::resource_exhausted(format!("one page takes at most {most} {unit} ({key}); make several pages"))
}

async fn send(answers: &Answers, part: build_response::Part) -> Result<(), Status> {
    let answer = BuildResponse { part: Some(part) };
    answers.send(Ok(answer)).await.map_err(|_| Status::cancelled("the caller left"))
}
