//! A supervisor that only answers: the admin service and one plugin's service over real Unix sockets.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use plugvisor_proto::admin::v1::admin_server::{Admin, AdminServer};
use plugvisor_proto::admin::v1::{
    BreakerStatus, CallStep, CapabilityState, Control, DescribePluginRequest, DescribePluginResponse,
    ExamineHostRequest, ExamineHostResponse, ExplainCallRequest, ExplainCallResponse, GetStatusRequest,
    GetStatusResponse, HostControl, HostFeature, HostLevel, HostPlace, LastExit, LevelGap, ListBreakersRequest,
    ListBreakersResponse, LoadPluginRequest, LoadPluginResponse, LogStream, PluginState, PluginStatus, ReadLogsRequest,
    ReadLogsResponse, ResetBreakersRequest, ResetBreakersResponse, ResolveServiceRequest, ResolveServiceResponse,
    RestartPluginRequest, RestartPluginResponse, ServiceState, Setting, ShowConfigurationRequest,
    ShowConfigurationResponse, StepOutcome, SupervisorStatus, Transition, UnloadPluginRequest, UnloadPluginResponse,
    WatchEventsRequest, WatchEventsResponse,
};
use plugvisor_proto::event::v1::{Event, Severity};
use plugvisor_proto::host::v1::events_server::{Events, EventsServer};
use plugvisor_proto::host::v1::{PublishRequest, PublishResponse};
use prost_types::value::Kind;
use prost_types::{Struct, Timestamp, Value};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::metadata::MetadataMap;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

/// Terminal control that a plugin could print: clear the screen, an 8-bit CSI, text direction, bell.
pub(crate) const HOSTILE: &str = "\x1b[2J\u{9b}31m\u{202e}gnp\x07\r";

/// A running fake, gone with its runtime.
pub(crate) struct Fake {
    _runtime: tokio::runtime::Runtime,
    directory: tempfile::TempDir,
}

impl Fake {
    /// Starts answering on `admin.sock` and `calls.sock` of a new directory.
    pub(crate) fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let answers = Answers { calls: directory.path().join("calls.sock") };
        let listen = |name: &str| {
            let _inside = runtime.enter();
            UnixListenerStream::new(UnixListener::bind(directory.path().join(name)).unwrap())
        };
        let admin = Server::builder().add_service(AdminServer::new(answers)).serve_with_incoming(listen("admin.sock"));
        let calls = Server::builder().add_service(EventsServer::new(Plugin)).serve_with_incoming(listen("calls.sock"));
        runtime.spawn(admin);
        runtime.spawn(calls);
        Self { _runtime: runtime, directory }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }
}

struct Answers {
    calls: PathBuf,
}

type Stream<T> = tokio_stream::Iter<std::vec::IntoIter<Result<T, Status>>>;

/// 2026-11-23T05:30:41.123Z and whole seconds after it.
fn at(second: i64) -> Option<Timestamp> {
    Some(Timestamp { seconds: 1_795_411_841 + second, nanos: 123_000_000 })
}

/// Long enough ago that two units stay the same while the test runs.
fn long_ago() -> Option<Timestamp> {
    Some((SystemTime::now() - Duration::from_secs(5 * 86_400 + 12 * 3_600 + 1_800)).into())
}

fn thumbnailer() -> PluginStatus {
    PluginStatus {
        name: "thumbnailer".into(),
        version: "0.1.0".into(),
        state: PluginState::Loaded.into(),
        conditions: vec!["serving".into()],
        generation: 1,
        pid: 4242,
        isolation_level: "process".into(),
        tier: "verified".into(),
        since: long_ago(),
        breaker: "closed".into(),
        calls_total: 12_345,
        calls_failed_total: 0,
        memory_bytes: 5_452_595,
        ..PluginStatus::default()
    }
}

fn markdown() -> PluginStatus {
    PluginStatus {
        name: "markdown".into(),
        version: "0.1.0".into(),
        state: PluginState::Failed.into(),
        generation: 2,
        isolation_level: "process".into(),
        tier: "verified".into(),
        restarts: 1,
        since: long_ago(),
        breaker: "open".into(),
        calls_total: 99,
        calls_failed_total: 3,
        last_error: format!("exited SIGKILL {HOSTILE}"),
        hint: "it was killed from outside; find who did".into(),
        restart_in: Some(prost_types::Duration { seconds: 0, nanos: 412_000_000 }),
        ..PluginStatus::default()
    }
}

fn not_found(name: &str) -> Status {
    let mut trailers = MetadataMap::new();
    trailers.insert("plugvisor-code", "plugin.not_found".parse().unwrap());
    trailers.insert("plugvisor-hint", "did you mean thumbnailer?".parse().unwrap());
    Status::with_metadata(Code::NotFound, format!("no plugin is called {name}"), trailers)
}

fn text(value: &str) -> Value {
    Value { kind: Some(Kind::StringValue(value.into())) }
}

#[tonic::async_trait]
impl Admin for Answers {
    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let supervisor = SupervisorStatus {
            version: "0.1.0".into(),
            pid: 4000,
            launcher_pid: 4001,
            started_at: long_ago(),
            metrics_address: "127.0.0.1:4001".into(),
            calls_socket: self.calls.to_str().unwrap().into(),
            configuration_file: String::new(),
            degraded: vec!["memory-limit".into(), "cpu-limit".into()],
            ready: true,
            features: vec![
                HostFeature { name: "landlock".into(), works: true, detail: "ABI 7".into() },
                HostFeature { name: "memory-limit".into(), works: false, detail: "no delegated cgroup".into() },
            ],
            resident_bytes: 12_900_000,
            launcher_resident_bytes: 2_097_152,
            ..SupervisorStatus::default()
        };
        Ok(Response::new(GetStatusResponse { supervisor: Some(supervisor), plugins: vec![markdown(), thumbnailer()] }))
    }

    async fn describe_plugin(
        &self,
        request: Request<DescribePluginRequest>,
    ) -> Result<Response<DescribePluginResponse>, Status> {
        let name = request.into_inner().name;
        if name != "markdown" {
            return Err(not_found(&name));
        }
        Ok(Response::new(DescribePluginResponse {
            status: Some(markdown()),
            bundle_directory: "/srv/plugins/markdown".into(),
            content_digest: format!("sha256:{}", "ab".repeat(32)),
            controls: vec![
                Control {
                    name: "seccomp".into(),
                    requested: "deny list".into(),
                    enforced: "mode 2, 1 filter".into(),
                    read_from: "/proc/4242/status".into(),
                    unavailable: String::new(),
                },
                Control {
                    name: "memory-limit".into(),
                    requested: "67108864 bytes".into(),
                    enforced: String::new(),
                    read_from: String::new(),
                    unavailable: "no delegated cgroup; start it by systemd with Delegate=yes".into(),
                },
            ],
            capabilities: vec![
                CapabilityState { name: "api:internal-calls".into(), granted: true, reason: String::new() },
                CapabilityState {
                    name: "network:http-client".into(),
                    granted: false,
                    reason: "not in the operator's grants".into(),
                },
            ],
            inactive_fields: vec!["optimization.caching.ttl".into()],
            services: vec![ServiceState { name: "acme.v1.Markdown".into(), token: "md".into(), exported: true }],
            transitions: vec![
                Transition { at: at(0), from: "LOADING".into(), to: "LOADED".into(), cause: "registered".into() },
                Transition { at: at(60), from: "LOADED".into(), to: "FAILED".into(), cause: "exited SIGKILL".into() },
            ],
            stderr_tail: vec!["starting".into(), HOSTILE.into()],
            last_exit: Some(LastExit {
                at: long_ago(),
                code: None,
                signal: "SIGKILL".into(),
                oom: true,
                uptime: Some(prost_types::Duration { seconds: 3, nanos: 200_000_000 }),
            }),
            manifest: None,
            sdk: "plugvisor-worker-rust 0.1.0".into(),
            tier_reason: String::new(),
            isolation_reason: "the least for the tier verified; its plugin.json asks for none".into(),
        }))
    }

    async fn load_plugin(&self, request: Request<LoadPluginRequest>) -> Result<Response<LoadPluginResponse>, Status> {
        match request.into_inner().name_or_path.as_str() {
            "thumbnailer" => Ok(Response::new(LoadPluginResponse { plugin: Some(thumbnailer()) })),
            "markdown" => Ok(Response::new(LoadPluginResponse { plugin: Some(markdown()) })),
            // Never answers: the caller's own time limit must end the wait.
            "hangs" => std::future::pending().await,
            other => Err(not_found(other)),
        }
    }

    async fn unload_plugin(
        &self,
        request: Request<UnloadPluginRequest>,
    ) -> Result<Response<UnloadPluginResponse>, Status> {
        let UnloadPluginRequest { name, cascade } = request.into_inner();
        if name != "thumbnailer" {
            return Err(Status::permission_denied("only root may unload it"));
        }
        let plugin = PluginStatus { state: PluginState::Unloaded.into(), pid: 0, ..thumbnailer() };
        let dependents = if cascade { vec!["album".to_owned(), "gallery".to_owned()] } else { Vec::new() };
        Ok(Response::new(UnloadPluginResponse { plugin: Some(plugin), dependents }))
    }

    async fn restart_plugin(
        &self,
        _: Request<RestartPluginRequest>,
    ) -> Result<Response<RestartPluginResponse>, Status> {
        let plugin = PluginStatus { generation: 2, pid: 4343, ..thumbnailer() };
        Ok(Response::new(RestartPluginResponse { plugin: Some(plugin) }))
    }

    type WatchEventsStream = Stream<WatchEventsResponse>;

    async fn watch_events(
        &self,
        request: Request<WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let request = request.into_inner();
        let event = |sequence: u32, kind: &str, severity: Severity, reason: &str, data: &[(&str, Value)]| Event {
            id: format!("0193-{sequence}"),
            source: "/host/boot".into(),
            r#type: format!("io.plugvisor.{kind}.v1"),
            subject: "markdown/2".into(),
            time: at(sequence.into()),
            sequence: sequence.into(),
            severity: severity.into(),
            reason: reason.into(),
            data: Some(Struct {
                fields: data.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect::<BTreeMap<_, _>>(),
            }),
            ..Event::default()
        };
        let mut exited = event(
            7,
            "plugin.exited",
            Severity::Error,
            "signal",
            &[("signal", text("SIGKILL")), ("stderr_tail", text(HOSTILE)), ("uptime_ms", number(3200.0))],
        );
        exited.hint = "see `plugvisor describe markdown`".into();
        let opened = event(8, "breaker.opened", Severity::Warning, "failures", &[("calls", number(3.0))]);
        let events = [exited, opened];
        let answers = events
            .into_iter()
            .filter(|event| event.r#type.starts_with(&request.type_prefix))
            .filter(|event| event.subject.starts_with(&request.plugin))
            .map(|event| Ok(WatchEventsResponse { missed: u64::from(event.sequence == 8) * 5, event: Some(event) }));
        Ok(Response::new(tokio_stream::iter(answers.collect::<Vec<_>>())))
    }

    type ReadLogsStream = Stream<ReadLogsResponse>;

    async fn read_logs(&self, request: Request<ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        let wanted = request.into_inner();
        if !wanted.pattern.is_empty() {
            // Every filter that was given shows in the answer.
            let seen = format!("{wanted:?}");
            let line = ReadLogsResponse { at: at(1), plugin: "markdown".into(), line: seen, ..Default::default() };
            return Ok(Response::new(tokio_stream::iter(vec![Ok(line)])));
        }
        let line = |second, stream: LogStream, line: &str, continues| {
            Ok(ReadLogsResponse {
                at: at(second),
                plugin: "markdown".into(),
                generation: 2,
                stream: stream.into(),
                line: line.into(),
                continues,
                missed: 0,
            })
        };
        Ok(Response::new(tokio_stream::iter(vec![
            line(1, LogStream::Stdout, "ready", false),
            line(2, LogStream::Stderr, HOSTILE, true),
        ])))
    }

    async fn resolve_service(
        &self,
        request: Request<ResolveServiceRequest>,
    ) -> Result<Response<ResolveServiceResponse>, Status> {
        let service = request.into_inner().service;
        let descriptor_set = match service.as_str() {
            // The contracts' own descriptors stand in for a plugin's.
            "plugvisor.host.v1.Events" => plugvisor_proto::FILE_DESCRIPTOR_SET.to_vec(),
            "acme.v1.Bare" => Vec::new(),
            "acme.v1.Broken" => b"\xff\xff\xff".to_vec(),
            other => return Err(not_found(other)),
        };
        Ok(Response::new(ResolveServiceResponse { plugin: "announcer".into(), descriptor_set }))
    }

    async fn explain_call(
        &self,
        request: Request<ExplainCallRequest>,
    ) -> Result<Response<ExplainCallResponse>, Status> {
        let ExplainCallRequest { from, service, method, token } = request.into_inner();
        if from == "nobody" {
            return Err(not_found(&from));
        }
        let allowed = token == "blue";
        let step = |name: &str, outcome: StepOutcome, detail: &str| CallStep {
            name: name.into(),
            outcome: outcome.into(),
            detail: detail.into(),
        };
        let (grant, after) = if allowed {
            (StepOutcome::Passes, StepOutcome::Skipped)
        } else {
            (StepOutcome::Refuses, StepOutcome::NotReached)
        };
        let steps = vec![
            step("service", StepOutcome::Passes, &format!("{service} by {HOSTILE}")),
            step("grant", grant, &format!("asked by {from} for {method}")),
            step("guard", StepOutcome::Inactive, "no guards"),
            step("breaker", after, ""),
        ];
        let answer = ExplainCallResponse { steps, allowed, ..Default::default() };
        Ok(Response::new(if allowed {
            ExplainCallResponse { provider: "thumbnailer".into(), ..answer }
        } else {
            ExplainCallResponse {
                reason: "caller_not_allowed".into(),
                message: "plugin gallery called acme.v1.A without the capability api:internal-calls".into(),
                hint: "add api:internal-calls to its grants".into(),
                ..answer
            }
        }))
    }

    async fn show_configuration(
        &self,
        _: Request<ShowConfigurationRequest>,
    ) -> Result<Response<ShowConfigurationResponse>, Status> {
        let setting = |key: &str, value: &str, origin: &str| Setting {
            key: key.into(),
            value: value.into(),
            origin: origin.into(),
        };
        let settings = vec![
            setting("supervisor.user", "\"nobody\"", "default"),
            setting("supervisor.metrics_address", "\"127.0.0.1:0\"", "/etc/plugvisor/plugvisor.toml:2"),
        ];
        Ok(Response::new(ShowConfigurationResponse { file: "/etc/plugvisor/plugvisor.toml".into(), settings }))
    }

    async fn examine_host(&self, _: Request<ExamineHostRequest>) -> Result<Response<ExamineHostResponse>, Status> {
        let works =
            |name: &str, works: &str| HostControl { name: name.into(), works: works.into(), ..HostControl::default() };
        let lacks = |name: &str, allowed| HostControl {
            name: name.into(),
            why: "no delegated cgroup".into(),
            fix: "start it by systemd with Delegate=yes".into(),
            allowed,
            ..HostControl::default()
        };
        let gap = |control: &str, allowed| LevelGap {
            control: control.into(),
            why: "no delegated cgroup".into(),
            fix: "start it by systemd with Delegate=yes".into(),
            allowed,
            may_be_allowed: true,
        };
        let level = |name: &str, gaps| HostLevel { name: name.into(), gaps };
        let place = |name: &str, path: &str, detail: &str, trouble: &str, fix: &str| HostPlace {
            name: name.into(),
            path: path.into(),
            detail: detail.into(),
            trouble: trouble.into(),
            fix: fix.into(),
        };
        Ok(Response::new(ExamineHostResponse {
            uid: 1000,
            user: String::new(),
            kernel: "Linux 6.18.0".into(),
            controls: vec![works("seccomp", "a filter"), lacks("memory-limit", true), lacks("cpu-limit", false)],
            places: vec![
                place("state directory", "/var/lib/plugvisor", "there", "", ""),
                place("plugin directory", "/srv/plugins", "", "No such file", "create it"),
                place(
                    "launcher policy",
                    "/etc/plugvisor/launcher.toml",
                    "",
                    "the policy file /etc/plugvisor/launcher.toml has 2 problems, correct them:\n  line 1: version: is 2, and \
                     this launcher reads version 1\n  line 5: directory[0].path: is required",
                    "correct that in the file and look again",
                ),
            ],
            running: true,
            levels: vec![
                level("none", vec![gap("whole-kill", false)]),
                level("process", vec![gap("memory-limit", true), gap("cpu-limit", false)]),
                level("container", vec![gap("memory-limit", true)]),
                level("vm", vec![LevelGap { why: "this version does not have it".into(), ..LevelGap::default() }]),
            ],
        }))
    }

    async fn list_breakers(&self, _: Request<ListBreakersRequest>) -> Result<Response<ListBreakersResponse>, Status> {
        Ok(Response::new(ListBreakersResponse { breakers: breakers() }))
    }

    async fn reset_breakers(
        &self,
        request: Request<ResetBreakersRequest>,
    ) -> Result<Response<ResetBreakersResponse>, Status> {
        let ResetBreakersRequest { plugin } = request.into_inner();
        let before: Vec<_> =
            breakers().into_iter().filter(|breaker| plugin.is_empty() || breaker.plugin == plugin).collect();
        if before.is_empty() { Err(not_found(&plugin)) } else { Ok(Response::new(ResetBreakersResponse { before })) }
    }
}

fn breakers() -> Vec<BreakerStatus> {
    let open = BreakerStatus {
        plugin: "markdown".into(),
        generation: 2,
        state: "open".into(),
        consecutive_failures: 5,
        calls: 9,
        failed: 6,
        slow: 1,
        retry_after: Some(prost_types::Duration { seconds: 42, nanos: 0 }),
        in_flight: 0,
    };
    let closed = BreakerStatus {
        plugin: "thumbnailer".into(),
        generation: 1,
        state: "closed".into(),
        calls: 12,
        in_flight: 3,
        ..BreakerStatus::default()
    };
    vec![open, closed]
}

fn number(value: f64) -> Value {
    Value { kind: Some(Kind::NumberValue(value)) }
}

struct Plugin;

#[tonic::async_trait]
impl Events for Plugin {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let token = request.metadata().get("plugvisor-token").map(|token| token.to_str().unwrap().to_owned());
        let timeout = request.metadata().contains_key("grpc-timeout");
        let message = request.into_inner();
        match message.r#type.as_str() {
            "counted" => {
                let fields = message.data.map_or(0, |data| data.fields.len());
                // Each part of the request shows in the answer: a field, the token and the deadline.
                let sequence = fields as u64 + if token.as_deref() == Some("blue") { 100 } else { 0 };
                Ok(Response::new(PublishResponse { sequence: sequence + u64::from(timeout) * 1000 }))
            }
            "refused" => {
                let mut trailers = MetadataMap::new();
                trailers.insert("plugvisor-reason", "breaker_open".parse().unwrap());
                trailers.insert("plugvisor-hint", "wait 5 s, or see `plugvisor describe announcer`".parse().unwrap());
                Err(Status::with_metadata(Code::Unavailable, "the breaker of announcer is open", trailers))
            }
            "hangs" => std::future::pending().await,
            _ => Err(Status::invalid_argument(HOSTILE)),
        }
    }
}
