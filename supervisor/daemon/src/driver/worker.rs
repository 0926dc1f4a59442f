//! The supervisor's own connection to a plugin: health, Init, Drain, Stop and hooks.
//!
//! Calls between plugins do not come this way: the broker has its own connection. What is made of an answer is the
//! lifecycle's business; here it is only asked for, within limits of time and size, from a process that may say
//! anything.

use std::{error::Error as _, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use hyper_util::rt::TokioIo;
use plugvisor_core::{CapabilitySet, Code, Error, lifecycle::Permanence};
use plugvisor_package::{IsolationLevel, SocketMode};
use plugvisor_proto::worker::v1::{
    DrainRequest, HookRequest, InitRequest, LifecycleHook, StopReason, StopRequest, worker_client::WorkerClient,
};
use plugvisor_sandbox::worker_socket::{self, NotASocket};
use tokio::{
    net::UnixStream,
    time::{Instant, sleep, timeout, timeout_at},
};
use tonic::{
    Code as Grpc, Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

use crate::{admin::wire, logs};

/// An answer of a plugin to the supervisor is never longer.
const MAX_ANSWER: usize = 256 * 1024;

/// Between attempts to reach a plugin that does not listen yet.
const RETRY: Duration = Duration::from_millis(20);
const RETRY_CAP: Duration = Duration::from_millis(250);

/// The protocol versions that this supervisor speaks.
const PROTOCOL_VERSIONS: &[u32] = &[1];

/// A connection to one process; made when it is first used, and again when it broke.
#[derive(Clone, Debug)]
pub(super) struct Worker {
    channel: Channel,
}

/// What a health check found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It says SERVING.
    Serving,
    /// It says something else.
    NotServing,
    /// It said nothing, or nothing that can be understood.
    Silent(String),
}

/// Why a step failed.
#[derive(Debug)]
pub(super) struct Trouble {
    pub(super) error: Error,
    pub(super) permanence: Permanence,
}

fn transient(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Trouble {
    Trouble { error: Error::new(code, message, hint), permanence: Permanence::Transient }
}

fn permanent(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Trouble {
    Trouble { error: Error::new(code, message, hint), permanence: Permanence::Permanent }
}

/// Waits until a plugin that binds its own socket has done so; returns an `O_PATH` descriptor of the socket.
pub(super) async fn bound_socket(
    plugin: &str,
    directory: &OwnedFd,
    way: Way,
    deadline: Instant,
) -> Result<OwnedFd, Trouble> {
    let mut pause = RETRY;
    loop {
        match worker_socket::bound(directory) {
            // Bound is not yet listening.
            Ok(Some(socket)) if UnixStream::connect(path_of(&socket)).await.is_ok() => return Ok(socket),
            Ok(_) => {}
            Err(NotASocket::Other) => {
                return Err(permanent(
                    Code::PeerMismatch,
                    format!("plugin {plugin} put something that is not a socket at PLUGVISOR_LISTEN"),
                    "bind a Unix socket at that path, or set runtime.socket to \"inherit\"",
                ));
            }
            Err(NotASocket::Failed(error)) => {
                return Err(transient(
                    Code::InputOutput,
                    format!("the worker socket of plugin {plugin} cannot be opened: {error}"),
                    "see `plugvisor logs`",
                ));
            }
        }
        if Instant::now() + pause > deadline {
            return Err(never_listened(plugin, way, "it did not bind the socket at PLUGVISOR_LISTEN"));
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_CAP);
    }
}

fn path_of(socket: &OwnedFd) -> String {
    worker_socket::path_of(socket, None)
}

impl Worker {
    /// `socket` is an `O_PATH` descriptor. With `uid`, whoever accepts must be that user: only a plugin that bound its
    /// own socket can be asked, because `SO_PEERCRED` of an inherited listener names who made it.
    pub(super) fn new(socket: Arc<OwnedFd>, uid: Option<u32>) -> Self {
        let connector = tower::service_fn(move |_| {
            let socket = Arc::clone(&socket);
            async move {
                let stream = UnixStream::connect(path_of(&socket)).await?;
                let peer = stream.peer_cred()?.uid();
                match uid {
                    Some(expected) if peer != expected => Err(io::Error::new(
                        io::ErrorKind::PermissionDenied,
                        format!("uid {peer} accepts on the plugin's socket, not uid {expected}"),
                    )),
                    Some(_) | None => Ok(TokioIo::new(stream)),
                }
            }
        });
        let endpoint = Endpoint::from_static("http://plugin.invalid")
            .http2_max_header_list_size(16 * 1024)
            .initial_stream_window_size(64 * 1024)
            .initial_connection_window_size(256 * 1024)
            .buffer_size(16);
        Self { channel: endpoint.connect_with_connector_lazy(connector) }
    }

    /// Waits for the first answer of its health service, whatever it says.
    pub(super) async fn first_answer(&self, plugin: &str, way: Way, deadline: Instant) -> Result<(), Trouble> {
        let mut pause = RETRY;
        let mut last = "it accepted no connection, or never answered on one".to_owned();
        loop {
            let attempt = timeout_at(deadline, self.health().check(HealthCheckRequest::default())).await;
            let status = match attempt {
                Err(_late) => return Err(never_listened(plugin, way, &last)),
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(status)) => status,
            };
            match Fault::of(&status) {
                Fault::Answer if status.code() == Grpc::Unimplemented => {
                    return Err(permanent(
                        Code::PluginServiceMissing,
                        format!("plugin {plugin} does not serve grpc.health.v1.Health"),
                        "serve the standard health service on the worker socket; the SDKs do",
                    ));
                }
                Fault::Answer => return Ok(()),
                Fault::Protocol(detail) => return Err(broken(plugin, &detail)),
                Fault::Transport(detail) => last = detail,
            }
            if Instant::now() + pause > deadline {
                return Err(never_listened(plugin, way, &last));
            }
            sleep(pause).await;
            pause = (pause * 2).min(RETRY_CAP);
        }
    }

    /// Waits until its health service says SERVING.
    pub(super) async fn serving(&self, plugin: &str, deadline: Instant) -> Result<(), Trouble> {
        let late = || {
            transient(
                Code::StartupTimeout,
                format!("plugin {plugin} answered, but its health service did not say SERVING in its start-up time"),
                "see `plugvisor logs` for what it waits for, or raise monitoring.performance.maxStartupTime",
            )
        };
        timeout_at(deadline, self.until_serving()).await.map_err(|_| late())
    }

    async fn until_serving(&self) {
        loop {
            // Watch tells at once; where it is not served, asking again does.
            if let Ok(stream) = self.health().watch(HealthCheckRequest::default()).await {
                let mut stream = stream.into_inner();
                while let Ok(Some(answer)) = stream.message().await {
                    if answer.status == ServingStatus::Serving as i32 {
                        return;
                    }
                }
            }
            if self.check(Duration::from_secs(1)).await == Health::Serving {
                return;
            }
            sleep(RETRY_CAP).await;
        }
    }

    /// One probe.
    pub(super) async fn check(&self, patience: Duration) -> Health {
        match timeout(patience, self.health().check(HealthCheckRequest::default())).await {
            Err(_late) => Health::Silent(format!("no answer in {} ms", patience.as_millis())),
            Ok(Ok(answer)) if answer.get_ref().status == ServingStatus::Serving as i32 => Health::Serving,
            Ok(Ok(_)) => Health::NotServing,
            Ok(Err(status)) => match Fault::of(&status) {
                Fault::Answer => Health::NotServing,
                Fault::Protocol(detail) | Fault::Transport(detail) => Health::Silent(detail),
            },
        }
    }

    /// Hands over configuration and grants. Returns the SDK's name and version; empty when the plugin does not serve
    /// `Worker`.
    pub(super) async fn init(&self, ask: Init<'_>, deadline: Instant) -> Result<String, Trouble> {
        let Init { plugin, generation, config, granted, provided, place } = ask;
        let left = deadline.saturating_duration_since(Instant::now());
        let mut request = Request::new(InitRequest {
            plugin: plugin.to_owned(),
            generation,
            protocol_versions: PROTOCOL_VERSIONS.to_vec(),
            config: Some(wire::to_struct(config)),
            capabilities: granted.iter().map(|capability| capability.to_string()).collect(),
            deadline: wire::duration(left),
        });
        request.set_timeout(left);
        let answer = match timeout_at(deadline, self.worker().init(request)).await {
            Err(_late) => {
                return Err(transient(
                    Code::StartupTimeout,
                    format!("plugin {plugin} did not answer Init in its start-up time"),
                    "see `plugvisor logs` for what it waits for, or raise monitoring.performance.maxStartupTime",
                ));
            }
            Ok(Err(status)) if status.code() == Grpc::Unimplemented && status.source().is_none() => {
                return Ok(String::new());
            }
            Ok(Err(status)) => return Err(init_failed(plugin, &status, place)),
            Ok(Ok(answer)) => answer.into_inner(),
        };
        if !PROTOCOL_VERSIONS.contains(&answer.protocol_version) {
            return Err(permanent(
                Code::PluginInitFailed,
                format!("plugin {plugin} chose the protocol version {}", answer.protocol_version),
                format!("this supervisor speaks {PROTOCOL_VERSIONS:?}: use an SDK that does too"),
            ));
        }
        let missing: Vec<&str> = provided
            .iter()
            .filter(|service| !answer.services.is_empty() && !answer.services.contains(service))
            .map(String::as_str)
            .collect();
        if !missing.is_empty() {
            return Err(permanent(
                Code::PluginServiceMissing,
                format!("plugin {plugin} does not serve {}, which its manifest provides", missing.join(", ")),
                "add the service to the program, or take it out of module.providers",
            ));
        }
        let clean = |text: String| text.chars().filter(|c| !c.is_control()).take(64).collect::<String>();
        let sdk = format!("{} {}", clean(answer.sdk_name), clean(answer.sdk_version));
        Ok(sdk.trim().to_owned())
    }

    /// Asks it to finish what is in flight; `None` when it has no opinion.
    pub(super) async fn drain(&self, patience: Duration) -> Option<u32> {
        let mut request = Request::new(DrainRequest { deadline: wire::duration(patience) });
        request.set_timeout(patience);
        let answer = timeout(patience, self.worker().drain(request)).await.ok()?.ok()?;
        Some(answer.into_inner().inflight_left)
    }

    /// Tells it that SIGTERM comes next.
    pub(super) async fn stop(&self, why: &str, grace: Duration, patience: Duration) {
        let reason = match why {
            "restart" => StopReason::Restart,
            "shutdown" => StopReason::Shutdown,
            _ => StopReason::Unload,
        };
        let request = StopRequest { reason: reason.into(), grace: wire::duration(grace) };
        // Best effort: SIGTERM says the same.
        let _ = timeout(patience, self.worker().stop(request)).await;
    }

    /// Calls a hook that the manifest asked for.
    pub(super) async fn hook(&self, hook: LifecycleHook, patience: Duration) -> Result<(), String> {
        let request = HookRequest { hook: hook.into(), code: String::new(), message: String::new() };
        match timeout(patience, self.worker().hook(request)).await {
            Err(_late) => Err(format!("no answer in {} ms", patience.as_millis())),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) if status.code() == Grpc::Unimplemented => Ok(()),
            Ok(Err(status)) => Err(logs::message(status.message())),
        }
    }

    fn health(&self) -> HealthClient<Channel> {
        HealthClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    fn worker(&self) -> WorkerClient<Channel> {
        WorkerClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }
}

/// What is handed over at Init.
pub(super) struct Init<'a> {
    pub(super) plugin: &'a str,
    pub(super) generation: u64,
    pub(super) config: serde_json::Map<String, serde_json::Value>,
    pub(super) granted: CapabilitySet,
    pub(super) provided: &'a [String],
    /// Where the operator writes the configuration.
    pub(super) place: &'a str,
}

/// Where a failed call failed.
enum Fault {
    /// The plugin answered with a status.
    Answer,
    /// It broke HTTP/2 or gRPC.
    Protocol(String),
    /// It could not be reached, or the connection ended.
    Transport(String),
}

impl Fault {
    fn of(status: &Status) -> Self {
        // A status that came over the wire has no source; one that the client made up has.
        let Some(first) = status.source() else { return Self::Answer };
        let mut deepest: &(dyn std::error::Error + 'static) = first;
        let mut protocol = false;
        loop {
            protocol |= deepest.downcast_ref::<h2::Error>().is_some_and(|error| !error.is_io());
            match deepest.source() {
                Some(deeper) => deepest = deeper,
                None => break,
            }
        }
        // A peer may put text of its own into a GOAWAY.
        let detail = logs::message(&deepest.to_string());
        if protocol { Self::Protocol(detail) } else { Self::Transport(detail) }
    }
}

/// How a plugin comes to listen, as far as that says why it may not.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) mode: SocketMode,
    pub(super) level: IsolationLevel,
}

fn never_listened(plugin: &str, way: Way, detail: &str) -> Trouble {
    let message = format!("plugin {plugin} did not answer its health check in its start-up time: {detail}");
    let serve = match way.mode {
        SocketMode::Inherit => {
            "serve gRPC with grpc.health.v1.Health on descriptor 3, which is the worker socket, listening already; a program \
             that binds PLUGVISOR_LISTEN itself needs runtime.socket: \"bind\" in its plugin.json; see `plugvisor logs`"
        }
        SocketMode::Bind => {
            "serve gRPC with grpc.health.v1.Health at PLUGVISOR_LISTEN, which the program binds itself since its plugin.json \
             says runtime.socket: \"bind\"; see `plugvisor logs`"
        }
    };
    let slow = match way.level {
        IsolationLevel::Vm => {
            "; its machine may only be slow to start, as one that is emulated is: raise \
             monitoring.performance.maxStartupTime in its plugin.json"
        }
        IsolationLevel::None | IsolationLevel::Process | IsolationLevel::Container | IsolationLevel::Sandbox => "",
    };
    transient(Code::NeverListened, message, format!("{serve}{slow}"))
}

fn broken(plugin: &str, detail: &str) -> Trouble {
    transient(
        Code::ProtocolBroken,
        format!("plugin {plugin} does not speak HTTP/2 on its worker socket: {detail}"),
        "serve gRPC (HTTP/2 without TLS) on the socket that the plugin is given",
    )
}

fn init_failed(plugin: &str, status: &Status, place: &str) -> Trouble {
    let said = logs::message(status.message());
    let message = format!("plugin {plugin} refused Init: {said}");
    match status.code() {
        // Trying again with the same configuration would end the same way.
        Grpc::InvalidArgument | Grpc::FailedPrecondition => permanent(
            Code::PluginMisconfigured,
            message,
            format!("mend config under [plugin.{plugin}] in {place}, then restart plugvisord"),
        ),
        _ => transient(Code::PluginInitFailed, message, format!("see `plugvisor logs {plugin}`")),
    }
}

#[cfg(test)]
mod tests {
    use plugvisor_proto::worker::v1::{
        DrainResponse, HookResponse, InitResponse, ReconfigureRequest, ReconfigureResponse, StopResponse,
        worker_server::{self, WorkerServer},
    };
    use rustix::fs::{Mode, OFlags};
    use tokio::net::UnixListener;
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::Response;

    use super::*;

    const FORGED: &str = "no\r\n2026-01-01T00:00:00Z INFO all is well\u{1b}[1A";
    const SHOWN: &str = "no\\r\\n2026-01-01T00:00:00Z INFO all is well\\u{1b}[1A";

    /// A plugin that refuses everything with this code.
    struct Refusing(Grpc);

    #[tonic::async_trait]
    impl worker_server::Worker for Refusing {
        async fn init(&self, _: Request<InitRequest>) -> Result<Response<InitResponse>, Status> {
            Err(Status::new(self.0, FORGED))
        }

        async fn reconfigure(&self, _: Request<ReconfigureRequest>) -> Result<Response<ReconfigureResponse>, Status> {
            Err(Status::new(self.0, FORGED))
        }

        async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainResponse>, Status> {
            Err(Status::new(self.0, FORGED))
        }

        async fn stop(&self, _: Request<StopRequest>) -> Result<Response<StopResponse>, Status> {
            Err(Status::new(self.0, FORGED))
        }

        async fn hook(&self, _: Request<HookRequest>) -> Result<Response<HookResponse>, Status> {
            Err(Status::new(self.0, FORGED))
        }
    }

    fn worker(code: Grpc, directory: &tempfile::TempDir) -> Worker {
        let path = directory.path().join("worker.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tonic::transport::Server::builder().add_service(WorkerServer::new(Refusing(code)));
        // Ends with the test's runtime.
        tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
        let socket = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        Worker::new(Arc::new(socket), None)
    }

    async fn refused_init(code: Grpc) -> Trouble {
        let directory = tempfile::tempdir().unwrap();
        let ask = Init {
            plugin: "p",
            generation: 1,
            config: serde_json::Map::new(),
            granted: CapabilitySet::default(),
            provided: &[],
            place: "/srv/own.toml",
        };
        worker(code, &directory).init(ask, Instant::now() + Duration::from_secs(20)).await.unwrap_err()
    }

    #[tokio::test]
    async fn a_plugin_that_calls_its_configuration_wrong_is_not_tried_again() {
        for code in [Grpc::InvalidArgument, Grpc::FailedPrecondition] {
            let trouble = refused_init(code).await;
            assert_eq!((trouble.permanence, trouble.error.code), (Permanence::Permanent, Code::PluginMisconfigured));
        }
        let trouble = refused_init(Grpc::Unavailable).await;
        assert_eq!((trouble.permanence, trouble.error.code), (Permanence::Transient, Code::PluginInitFailed));
    }

    #[test]
    fn a_machine_may_need_more_time_and_nothing_else_is_told_so() {
        for mode in [SocketMode::Inherit, SocketMode::Bind] {
            let hint = |level| never_listened("p", Way { mode, level }, "late").error.hint;
            assert!(hint(IsolationLevel::Vm).contains("grpc.health.v1.Health"));
            assert!(hint(IsolationLevel::Vm).contains("maxStartupTime"));
            for level in [IsolationLevel::None, IsolationLevel::Process, IsolationLevel::Sandbox] {
                assert!(!hint(level).contains("maxStartupTime"), "{level:?}");
            }
        }
    }

    #[tokio::test]
    async fn what_a_plugin_says_forges_no_lines() {
        let trouble = refused_init(Grpc::Internal).await;
        assert_eq!(trouble.error.message, format!("plugin p refused Init: {SHOWN}"));
        let directory = tempfile::tempdir().unwrap();
        let hook = worker(Grpc::Internal, &directory).hook(LifecycleHook::BeforeLoad, Duration::from_secs(20)).await;
        assert_eq!(hook.unwrap_err(), SHOWN);
    }
}
