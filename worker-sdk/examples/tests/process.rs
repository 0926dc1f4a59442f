//! The example plugins as processes: how they start, what they log, how they end.
#![allow(clippy::unwrap_used, reason = "a failed test is a panic")]

use std::{
    fs,
    io::Read as _,
    os::{fd::OwnedFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use plugvisor_examples::{
    gallery::{
        self,
        v1::{BuildRequest, File, Page, build_request, build_response, gallery_service_client::GalleryServiceClient},
    },
    markdown::{
        self,
        v1::{RenderRequest, markdown_service_client::MarkdownServiceClient},
    },
    thumbnailer,
};
use plugvisor_proto::worker::v1::{InitRequest, worker_client::WorkerClient};
use plugvisor_worker::Client;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Far longer than anything here takes, so that a hang is a failure with a name.
const LONG: Duration = Duration::from_secs(60);
const THUMBNAILER: &str = env!("CARGO_BIN_EXE_thumbnailer");
const MARKDOWN: &str = env!("CARGO_BIN_EXE_markdown");
const GALLERY: &str = env!("CARGO_BIN_EXE_gallery");

/// A plugin process that is killed when a test fails.
struct Process {
    /// `None` once it has been waited for.
    child: Option<Child>,
    client: Client,
    _directory: tempfile::TempDir,
}

impl Process {
    /// As the supervisor starts it, with the socket already listening. It is inherited as standard input, because a test
    /// cannot place a descriptor at 3 without unsafe code; `LISTEN_FDS_FIRST_FD` says so.
    fn supervised(program: &str) -> Self {
        let (directory, path) = socket();
        let listener = OwnedFd::from(UnixListener::bind(&path).unwrap());
        let mut command = plugin(program);
        command.env("PLUGVISOR_PROTOCOL", "1").env("PLUGVISOR_PLUGIN", "sample").env("PLUGVISOR_GENERATION", "3");
        command.env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0").stdin(Stdio::from(listener));
        let child = Some(command.spawn().unwrap());
        Self { child, client: Client::lazy(&path), _directory: directory }
    }

    async fn initialised(program: &str) -> Self {
        let process = Self::supervised(program);
        process.init("").await.unwrap();
        process
    }

    /// Init; `key`, unless empty, is set to 0 in the configuration.
    async fn init(&self, key: &str) -> Result<(), tonic::Status> {
        let mut config = prost_types::Struct::default();
        if !key.is_empty() {
            config.fields.insert(key.to_owned(), prost_types::Value::from(0.0));
        }
        let request = InitRequest { protocol_versions: vec![1], config: Some(config), ..InitRequest::default() };
        let answer = timeout(LONG, WorkerClient::new(self.client.clone()).init(request)).await.unwrap();
        answer.map(|_| ())
    }

    fn terminate(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.as_ref().unwrap().id()).unwrap()).unwrap();
        kill_process(pid, Signal::TERM).unwrap();
    }

    /// Waits for the end; returns its status and what was logged.
    async fn ended(mut self) -> (ExitStatus, String) {
        let mut child = self.child.take().unwrap();
        let waiting = tokio::task::spawn_blocking(move || {
            let mut log = String::new();
            child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
            (child.wait().unwrap(), log)
        });
        timeout(LONG, waiting).await.expect("the plugin ends").unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn socket() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("worker.sock");
    (directory, path)
}

/// With nothing in its environment but what the test adds.
fn plugin(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn render(client: &Client, markdown: &str) -> String {
    let request = RenderRequest { markdown: markdown.to_owned() };
    MarkdownServiceClient::new(client.clone()).render(request).await.unwrap().into_inner().html
}

/// Waits until somebody listens: for plugins that bind the path themselves.
async fn listening(path: &Path) -> Client {
    loop {
        match Client::connect(path).await {
            Ok(client) => return client,
            // There is no event for a path that comes to be listened at.
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

#[tokio::test]
async fn an_inherited_socket_is_served_and_sigterm_ends_with_0() {
    /// Far below the time for which calls in flight are waited for, which is what a watch that counted would take.
    const AT_ONCE: Duration = Duration::from_secs(2);
    // A watch that holds up the end does so each time; a machine that stands still does not.
    for attempt in 1.. {
        let process = Process::initialised(MARKDOWN).await;
        assert_eq!(render(&process.client, "*hi*").await, "<p><em>hi</em></p>\n");
        // An open health watch, as a supervisor has, must not hold up the end.
        let mut watch = HealthClient::new(process.client.clone());
        let mut watch = watch.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
        watch.message().await.unwrap().unwrap();
        let begun = std::time::Instant::now();
        process.terminate();
        let (status, log) = process.ended().await;
        assert_eq!(status.code(), Some(0), "{log}");
        let took = begun.elapsed();
        if took < AT_ONCE {
            return;
        }
        assert!(attempt < 5, "{took:?}");
    }
}

#[tokio::test]
async fn sigterm_lets_a_call_in_flight_finish() {
    let process = Process::initialised(GALLERY).await;
    let (parts, requests) = mpsc::channel(4);
    let part = |part| BuildRequest { part: Some(part) };
    parts.send(part(build_request::Part::Page(Page::default()))).await.unwrap();
    parts.send(part(build_request::Part::File(File { name: "first".into(), ..File::default() }))).await.unwrap();
    let mut client = GalleryServiceClient::new(process.client.clone());
    let mut answers = client.build(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert!(matches!(first.part, Some(build_response::Part::Progress(_))), "{first:?}");

    // The plugin says that it ends; the call goes on meanwhile.
    let mut watch = HealthClient::new(process.client.clone());
    let mut watch = watch.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    process.terminate();
    watch.message().await.unwrap().unwrap();
    parts.send(part(build_request::Part::File(File { name: "second".into(), ..File::default() }))).await.unwrap();
    drop(parts);
    let mut last = None;
    while let Some(answer) = answers.message().await.unwrap() {
        last = answer.part;
    }
    let Some(build_response::Part::Summary(summary)) = last else { panic!("{last:?}") };
    assert_eq!(summary.skipped, 2);
    let (status, log) = process.ended().await;
    assert_eq!(status.code(), Some(0), "{log}");
}

#[tokio::test]
async fn a_refused_configuration_is_named_and_ends_with_78() {
    let process = Process::supervised(THUMBNAILER);
    let refused = process.init("decoders").await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("decoders: is 0, but must be from 1 to 4"), "{refused}");
    let refused = process.init("decodres").await.unwrap_err();
    assert!(refused.message().contains("unknown field `decodres`"), "{refused}");
    process.terminate();
    let (status, _) = process.ended().await;
    assert_eq!(status.code(), Some(78));
}

#[tokio::test]
async fn logs_are_lines_of_json_that_say_who_speaks() {
    let process = Process::supervised(THUMBNAILER);
    process.init("decoders").await.unwrap_err();
    process.terminate();
    let (_, log) = process.ended().await;
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let refusal = lines.iter().find(|line| line["message"] == "the plugin did not start").unwrap();
    assert_eq!(refusal["level"], "ERROR");
    assert_eq!(refusal["plugin"], "sample");
    assert_eq!(refusal["generation"], 3);
    assert!(refusal["fields"]["error"].as_str().unwrap().contains("decoders"), "{refusal}");
    assert!(refusal["timestamp"].as_str().unwrap().ends_with('Z'), "{refusal}");
}

#[tokio::test]
async fn alone_a_plugin_binds_its_path_and_reads_a_file() {
    let (directory, path) = socket();
    let config = directory.path().join("config.json");
    fs::write(&config, r#"{"maxDocumentBytes": 4}"#).unwrap();
    let child = plugin(MARKDOWN).env("PLUGVISOR_LISTEN", &path).env("PLUGVISOR_CONFIG", &config).spawn().unwrap();
    let client = timeout(LONG, listening(&path)).await.unwrap();
    let process = Process { child: Some(child), client, _directory: directory };
    assert_eq!(render(&process.client, "four").await, "<p>four</p>\n");
    let request = RenderRequest { markdown: "fives".into() };
    let refused = MarkdownServiceClient::new(process.client.clone()).render(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("maxDocumentBytes"), "{refused}");
    process.terminate();
    assert_eq!(process.ended().await.0.code(), Some(0));
}

#[test]
fn without_a_socket_a_plugin_says_how_to_run_it() {
    let output = plugin(MARKDOWN).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("PLUGVISOR_LISTEN=/tmp/plugin.sock markdown"), "{log}");
}

#[test]
fn what_is_no_listening_socket_is_refused() {
    let inherit = |stdin: Stdio| {
        let mut command = plugin(MARKDOWN);
        command.env("PLUGVISOR_PROTOCOL", "1").env("LISTEN_FDS", "1").env("LISTEN_FDS_FIRST_FD", "0").stdin(stdin);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(78));
        String::from_utf8(output.stderr).unwrap()
    };
    let (connected, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    for stdin in [Stdio::null(), Stdio::from(OwnedFd::from(connected))] {
        let log = inherit(stdin);
        assert!(log.contains("is not a listening Unix socket"), "{log}");
    }
    let output = plugin(MARKDOWN).env("LISTEN_FDS", "2").env("LISTEN_FDS_FIRST_FD", "0").output().unwrap();
    assert_eq!(output.status.code(), Some(78));
}

#[test]
fn each_plugin_prints_its_descriptor_set() {
    for (program, descriptor_set, service) in [
        (THUMBNAILER, thumbnailer::DESCRIPTOR_SET, "ThumbnailerService"),
        (MARKDOWN, markdown::DESCRIPTOR_SET, "MarkdownService"),
        (GALLERY, gallery::DESCRIPTOR_SET, "GalleryService"),
    ] {
        let output = plugin(program).arg("--descriptor-set").output().unwrap();
        assert!(output.status.success());
        assert_eq!(output.stdout, descriptor_set);
        assert!(String::from_utf8_lossy(descriptor_set).contains(service));
    }
}
