//! The gallery with the real thumbnailer and the real markdown behind a stand-in for the broker.
#![allow(clippy::unwrap_used, reason = "a failed test is a panic")]

use std::{io::Cursor, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use image::{ImageFormat, Rgb, RgbImage};
use plugvisor_examples::{
    gallery::{
        Gallery,
        v1::{
            BuildRequest, BuildResponse, File, Outcome, Page, Summary, build_request, build_response::Part,
            gallery_service_client::GalleryServiceClient,
        },
    },
    markdown::Markdown,
    thumbnailer::{
        Thumbnailer,
        v1::{
            BatchRequest, BatchResponse, ThumbnailRequest, ThumbnailResponse, batch_response,
            thumbnailer_service_client::ThumbnailerServiceClient,
            thumbnailer_service_server::{ThumbnailerService, ThumbnailerServiceServer},
        },
    },
};
use plugvisor_proto::worker::v1::ReconfigureRequest;
use plugvisor_worker::{Host, Plugin, Services, testing::TestPlugin};
use serde_json::json;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

const LONG: Duration = Duration::from_secs(60);

fn picture(colour: [u8; 3], width: u32, height: u32, format: ImageFormat) -> Vec<u8> {
    let mut file = Cursor::new(Vec::new());
    RgbImage::from_pixel(width, height, Rgb(colour)).write_to(&mut file, format).unwrap();
    file.into_inner()
}

fn file(name: &str, content: impl Into<Vec<u8>>) -> BuildRequest {
    let file = File { name: name.to_owned(), content: content.into().into() };
    BuildRequest { part: Some(build_request::Part::File(file)) }
}

fn page(title: &str) -> BuildRequest {
    let page = Page { title: title.to_owned(), thumbnail_edge: 64 };
    BuildRequest { part: Some(build_request::Part::Page(page)) }
}

/// The services of a plugin that needs no host, as the gallery would meet them behind the broker.
async fn behind<P: Plugin<Config: Default>>(services: &mut Services, host: &Host) {
    let plugin = P::start(P::Config::default(), host.clone()).await;
    Arc::new(plugin.unwrap_or_else(|error| panic!("{error}"))).services(services);
}

/// A gallery whose broker knows the plugins that `add` adds.
async fn gallery(config: serde_json::Value, add: impl AsyncFnOnce(&mut Services, &Host)) -> TestPlugin {
    let mut services = Services::default();
    add(&mut services, &TestPlugin::host_alone()).await;
    let builder = TestPlugin::builder().config(config).grant("api:internal-calls");
    builder.broker(|broker| broker.append(services)).start::<Gallery>().await.unwrap()
}

async fn whole(config: serde_json::Value) -> TestPlugin {
    gallery(config, async |services, host| {
        behind::<Thumbnailer>(services, host).await;
        behind::<Markdown>(services, host).await;
    })
    .await
}

/// Progress as (name, outcome, detail), the page, and the summary.
type Built = (Vec<(String, Outcome, String)>, String, Summary);

async fn build(plugin: &TestPlugin, requests: Vec<BuildRequest>) -> Result<Built, Status> {
    let mut client = GalleryServiceClient::new(plugin.client());
    let mut answers = client.build(tokio_stream::iter(requests)).await?.into_inner();
    let (mut progress, mut html, mut summary) = (Vec::new(), Vec::new(), None);
    while let Some(BuildResponse { part }) = timeout(LONG, answers.message()).await.unwrap()? {
        assert!(summary.is_none(), "the summary is the last message");
        match part.unwrap() {
            Part::Progress(one) => progress.push((one.name.clone(), one.outcome(), one.detail)),
            Part::Chunk(chunk) => html.extend(chunk),
            Part::Summary(one) => summary = Some(one),
        }
    }
    Ok((progress, String::from_utf8(html).unwrap(), summary.unwrap()))
}

/// The thumbnails of a page, decoded.
fn thumbnails(html: &str) -> Vec<RgbImage> {
    let data = html.split("src=\"data:").skip(1).map(|rest| rest.split_once("\"").unwrap().0);
    data.map(|data| {
        let encoded = data.split_once(";base64,").unwrap().1;
        image::load_from_memory(&STANDARD.decode(encoded).unwrap()).unwrap().to_rgb8()
    })
    .collect()
}

#[tokio::test]
async fn a_page_holds_the_pictures_and_the_texts() {
    let plugin = whole(json!({})).await;
    let requests = vec![
        page("Summer <2026>"),
        file("red.png", picture([255, 0, 0], 640, 320, ImageFormat::Png)),
        file("notes.md", "# Notes\n\n<script>x</script>\n\n[bad](javascript:x)"),
        file("blue.jpg", picture([0, 0, 255], 100, 200, ImageFormat::Jpeg)),
        file("data.bin", [0, 1, 2]),
        file("broken.png", &picture([0, 0, 0], 9, 9, ImageFormat::Png)[..40]),
    ];
    let (progress, html, summary) = build(&plugin, requests).await.unwrap();
    let outcomes: Vec<_> = progress.iter().map(|(name, outcome, _)| (name.as_str(), *outcome)).collect();
    assert_eq!(
        outcomes,
        [
            ("red.png", Outcome::Picture),
            ("notes.md", Outcome::Text),
            ("blue.jpg", Outcome::Picture),
            ("data.bin", Outcome::Skipped),
            ("broken.png", Outcome::Failed),
        ]
    );
    assert!(progress[4].2.contains("cannot be decoded"), "{}", progress[4].2);
    assert_eq!((summary.pictures, summary.texts, summary.skipped, summary.failed), (2, 1, 1, 1));
    assert_eq!(summary.bytes, html.len() as u64);

    assert!(html.contains("<title>Summer &lt;2026&gt;</title>"));
    assert!(html.contains("<h1>Notes</h1>"));
    assert!(!html.contains("<script") && !html.contains("href="), "{html}");
    let [red, blue]: [RgbImage; 2] = thumbnails(&html).try_into().unwrap();
    assert_eq!((red.dimensions(), blue.dimensions()), ((64, 32), (32, 64)));
    assert!(red.pixels().all(|pixel| pixel.0 == [255, 0, 0]));
    assert!(blue.pixels().all(|pixel| pixel.0[2] > 240 && pixel.0[0] < 15), "{:?}", blue.get_pixel(0, 0));
}

#[tokio::test]
async fn a_missing_plugin_is_named_on_the_page() {
    let plugin = gallery(json!({}), async |services, host| behind::<Markdown>(services, host).await).await;
    let requests = vec![page(""), file("a.png", picture([1, 2, 3], 4, 4, ImageFormat::Png)), file("b.txt", "hi")];
    let (progress, html, summary) = build(&plugin, requests).await.unwrap();
    assert_eq!((summary.failed, summary.texts), (1, 1));
    assert!(progress[0].2.starts_with("thumbnailer: "), "{}", progress[0].2);
    assert!(html.contains("<li>a.png: thumbnailer: "), "{html}");
}

#[tokio::test]
async fn the_order_of_messages_and_the_limits_are_kept() {
    let plugin = whole(json!({"maxFiles": 2, "maxPageBytes": 1000})).await;
    let code = async |requests| build(&plugin, requests).await.unwrap_err();
    assert_eq!(code(vec![]).await.code(), Code::InvalidArgument);
    assert_eq!(code(vec![file("a.txt", "a")]).await.code(), Code::InvalidArgument);
    assert_eq!(code(vec![page(""), page("")]).await.code(), Code::InvalidArgument);
    assert_eq!(code(vec![page(""), file(&"n".repeat(1025), "a")]).await.code(), Code::InvalidArgument);
    let many = code(vec![page(""), file("a", ""), file("b", ""), file("c", "")]).await;
    assert_eq!(many.code(), Code::ResourceExhausted);
    assert!(many.message().contains("maxFiles"), "{many}");
    let long = code(vec![page(""), file("a.txt", "x".repeat(1000))]).await;
    assert_eq!(long.code(), Code::ResourceExhausted);
    assert!(long.message().contains("maxPageBytes"), "{long}");
}

/// Never answers; says when it is called and when that call ends.
struct Hanging {
    called: mpsc::UnboundedSender<Option<Duration>>,
    ended: mpsc::UnboundedSender<()>,
}

#[tonic::async_trait]
impl ThumbnailerService for Hanging {
    async fn thumbnail(&self, _: Request<ThumbnailRequest>) -> Result<Response<ThumbnailResponse>, Status> {
        struct OnDrop(mpsc::UnboundedSender<()>);
        impl Drop for OnDrop {
            fn drop(&mut self) {
                let _ = self.0.send(());
            }
        }
        let _ended = OnDrop(self.ended.clone());
        let left = plugvisor_worker::CallContext::current().and_then(|context| context.remaining());
        self.called.send(left).unwrap();
        std::future::pending().await
    }

    type BatchStream = tokio_stream::Empty<Result<BatchResponse, Status>>;

    async fn batch(&self, _: Request<Streaming<BatchRequest>>) -> Result<Response<Self::BatchStream>, Status> {
        Err(Status::unimplemented("not here"))
    }
}

#[tokio::test]
async fn a_caller_that_leaves_cancels_what_is_being_made() {
    let ((called, mut was_called), (ended, mut has_ended)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let hanging = ThumbnailerServiceServer::new(Hanging { called, ended });
    let plugin = gallery(json!({}), async |services, _| _ = services.add(hanging)).await;
    let mut client = GalleryServiceClient::new(plugin.client());
    let requests = vec![page(""), file("a.png", picture([1, 2, 3], 4, 4, ImageFormat::Png))];
    let mut request = Request::new(tokio_stream::iter(requests));
    request.set_timeout(Duration::from_secs(59));
    let answers = client.build(request).await.unwrap();
    let left = timeout(LONG, was_called.recv()).await.unwrap().unwrap();
    assert!(left.is_some_and(|left| left <= Duration::from_secs(59)), "the deadline travels into the task: {left:?}");
    drop(answers);
    timeout(LONG, has_ended.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_batch_answers_in_order_as_it_goes_and_survives_a_bad_picture() {
    let plugin = TestPlugin::start::<Thumbnailer>(json!({})).await.unwrap();
    let (requests, receiver) = mpsc::channel(1);
    let mut client = ThumbnailerServiceClient::new(plugin.client());
    let mut answers = client.batch(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    for (id, edge) in [("good", 64), ("bad", 0), ("again", 128)] {
        let image = if edge == 0 { b"nothing".to_vec() } else { picture([9, 9, 9], edge, edge, ImageFormat::Png) };
        let thumbnail = ThumbnailRequest { image: image.into(), max_edge: 32, ..ThumbnailRequest::default() };
        requests.send(BatchRequest { id: id.into(), thumbnail: Some(thumbnail) }).await.unwrap();
        // Each is answered before the next is asked.
        let answer = timeout(LONG, answers.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(answer.id, id);
        match answer.outcome.unwrap() {
            batch_response::Outcome::Thumbnail(small) => assert_eq!((small.width, small.original_width), (32, edge)),
            batch_response::Outcome::Error(problem) => assert!(id == "bad" && problem.contains("neither"), "{problem}"),
        }
    }
    drop(requests);
    assert!(timeout(LONG, answers.message()).await.unwrap().unwrap().is_none());
}

#[tokio::test]
async fn a_hostile_picture_is_an_invalid_argument_that_names_the_limit() {
    let plugin = TestPlugin::start::<Thumbnailer>(json!({"maxPictureEdge": 100})).await.unwrap();
    let mut client = ThumbnailerServiceClient::new(plugin.client());
    let request = |edge| ThumbnailRequest {
        image: picture([1, 1, 1], edge, 1, ImageFormat::Png).into(),
        ..ThumbnailRequest::default()
    };
    let refused = client.thumbnail(request(101)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("100"), "{refused}");
    let mut large = request(1);
    large.max_edge = 4096;
    let refused = client.thumbnail(large).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("2048"), "{refused}");

    // A new limit holds for the next call; one that needs a restart is refused and changes nothing.
    let config = |key: &str, value: f64| {
        let fields = [(key.to_owned(), prost_types::Value::from(value))].into();
        ReconfigureRequest { config: Some(prost_types::Struct { fields }) }
    };
    plugin.worker().reconfigure(config("maxPictureEdge", 200.0)).await.unwrap();
    client.thumbnail(request(101)).await.unwrap();
    let refused = plugin.worker().reconfigure(config("decoders", 3.0)).await.unwrap_err();
    assert!(refused.message().contains("decoders"), "{refused}");
    client.thumbnail(request(101)).await.unwrap();
}
