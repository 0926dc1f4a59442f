//! plugvisord as a whole, with the real launcher and a real plugin: from the start to the end that leaves nothing.
//!
//! Runs as root (walls complete) and as an ordinary user (what the host lacks is allowed to be missing).

#![allow(clippy::unwrap_used, reason = "a helper that fails fails its test")]

use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::Once,
    time::Duration,
};

use hyper_util::rt::TokioIo;
use plugvisor_proto::{
    admin::v1::{
        DescribePluginRequest, GetStatusRequest, PluginState, PluginStatus, ReadLogsRequest, UnloadPluginRequest,
        WatchEventsRequest, admin_client::AdminClient,
    },
    event::v1::Event,
};
use plugvisor_sandbox::protocol::Control;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UnixStream},
    process::{Child, Command},
    time::timeout,
};
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

/// Far more than anything here takes; only a defect needs it.
const PATIENCE: Duration = Duration::from_secs(60);

struct World {
    directory: tempfile::TempDir,
}

impl World {
    /// `plugins`: a name, and the argument of the program.
    fn new(plugins: &[(&str, &str)], more: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        open(path);
        std::fs::create_dir(path.join("plugins")).unwrap();
        open(&path.join("plugins"));
        for (name, argument) in plugins {
            let bundle = path.join("plugins").join(name);
            std::fs::create_dir_all(bundle.join("bin")).unwrap();
            std::fs::copy(plugin(), bundle.join("bin/plugin")).unwrap();
            let manifest = serde_json::json!({
                "name": name, "version": "1.0.0",
                "monitoring": { "performance": { "maxStartupTime": 20_000 } },
                "runtime": { "exec": "bin/plugin", "socket": "bind", "args": [argument] },
            });
            std::fs::write(bundle.join("plugin.json"), manifest.to_string()).unwrap();
        }
        let degraded = Control::ALL.map(|control| format!("{:?}", control.as_str())).join(", ");
        let text = format!(
            "[supervisor]\nruntime_directory = \"run\"\nstate_directory = \"state\"\nmetrics_address = \"127.0.0.1:0\"\nallow_degraded = \
             [{degraded}]\n[[directory]]\npath = \"plugins\"\ntier = \"verified\"\n{more}"
        );
        std::fs::write(path.join("plugvisor.toml"), text).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plugvisord"));
        command.arg("--config").arg(self.path("plugvisor.toml")).arg("--launcher").arg(launcher());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).kill_on_drop(true);
        command
    }

    async fn start(&self) -> Running {
        let mut child = self.command().spawn().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let printed = tokio::spawn(async move {
            let mut text = String::new();
            let _ = stderr.read_to_string(&mut text).await;
            text
        });
        let socket = self.path("run/admin.sock");
        let answers = async {
            loop {
                if let Some(status) = child.try_wait().unwrap() {
                    return Err(status);
                }
                if UnixStream::connect(&socket).await.is_ok() {
                    return Ok(());
                }
                // There is no event for a path that comes to be listened at.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if let Err(status) = timeout(PATIENCE, answers).await.expect("plugvisord binds its socket") {
            panic!("plugvisord ended with {status}: {}", printed.await.unwrap());
        }
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        let channel = Endpoint::from_static("http://admin.invalid").connect_with_connector_lazy(connector);
        let mut admin = AdminClient::new(channel);
        let request = WatchEventsRequest { after_sequence: Some(0), follow: true, ..Default::default() };
        let events = admin.watch_events(request).await.unwrap().into_inner();
        let events = events.into();
        Running { child, admin, events, printed }
    }

    /// Runs it to its end, which must come by itself.
    async fn refused(&self) -> Output {
        timeout(PATIENCE, self.command().output()).await.expect("plugvisord ends").unwrap()
    }
}

struct Running {
    child: Child,
    admin: AdminClient<Channel>,
    events: Events,
    printed: tokio::task::JoinHandle<String>,
}

struct Events(Streaming<plugvisor_proto::admin::v1::WatchEventsResponse>);

impl From<Streaming<plugvisor_proto::admin::v1::WatchEventsResponse>> for Events {
    fn from(stream: Streaming<plugvisor_proto::admin::v1::WatchEventsResponse>) -> Self {
        Self(stream)
    }
}

impl Events {
    async fn until(&mut self, type_name: &str, subject: &str) -> Event {
        let type_name = format!("io.plugvisor.{type_name}.v1");
        let search = async {
            loop {
                let event = self.0.message().await.unwrap().expect("the stream goes on").event.expect("an event");
                if event.r#type == type_name && event.subject == subject {
                    return event;
                }
            }
        };
        timeout(PATIENCE, search).await.unwrap_or_else(|_| panic!("no {type_name} of {subject:?}"))
    }
}

impl Running {
    async fn plugin(&mut self, name: &str) -> PluginStatus {
        let status = self.admin.get_status(GetStatusRequest {}).await.unwrap().into_inner();
        status.plugins.into_iter().find(|plugin| plugin.name == name).expect("the plugin is known")
    }

    async fn page(&mut self, path: &str) -> String {
        let status = self.admin.get_status(GetStatusRequest {}).await.unwrap().into_inner();
        let mut stream = TcpStream::connect(status.supervisor.unwrap().metrics_address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn stop(mut self) -> String {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id().unwrap()).unwrap()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = timeout(PATIENCE, self.child.wait()).await.expect("plugvisord stops").unwrap();
        let printed = self.printed.await.unwrap();
        assert_eq!(status.code(), Some(0), "{printed}");
        printed
    }
}

#[tokio::test]
async fn a_plugin_lives_dies_returns_and_leaves_nothing() {
    let world = World::new(&[("least", "serve")], "");
    let mut running = world.start().await;
    running.events.until("supervisor.ready", "").await;
    let first = running.plugin("least").await;
    assert_eq!((first.state(), first.generation), (PluginState::Loaded, 1), "{first:?}");
    assert!(running.page("/readyz").await.starts_with("HTTP/1.1 200"));

    let described = running.admin.describe_plugin(DescribePluginRequest { name: "least".into() }).await.unwrap();
    let controls = described.into_inner().controls;
    let seccomp = controls.iter().find(|control| control.name == "seccomp").expect("seccomp is a control");
    assert!(!seccomp.enforced.is_empty() && !seccomp.read_from.is_empty(), "{seccomp:?}");

    let pid = rustix::process::Pid::from_raw(i32::try_from(first.pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let exited = running.events.until("plugin.exited", "least/1").await;
    assert_eq!(exited.reason, "signal");
    running.events.until("plugin.ready", "least/2").await;
    let second = running.plugin("least").await;
    assert_eq!((second.state(), second.generation, second.restarts), (PluginState::Loaded, 2, 1), "{second:?}");
    let metrics = running.page("/metrics").await;
    assert!(metrics.contains("plugvisor_plugin_exits_total{plugin=\"least\",cause=\"signal\"} 1\n"), "{metrics}");
    assert!(metrics.contains("plugvisor_plugin_state{plugin=\"least\",state=\"loaded\"} 1\n"), "{metrics}");

    // What it printed comes through a pipe, in its own time.
    let request = ReadLogsRequest { plugin: "least".into(), tail: 100, follow: true, ..ReadLogsRequest::default() };
    let mut lines = running.admin.read_logs(request).await.unwrap().into_inner();
    let printed = async { while lines.message().await.unwrap().expect("the stream goes on").generation != 2 {} };
    timeout(PATIENCE, printed).await.expect("the second one prints");
    drop(lines);
    let request = ReadLogsRequest { plugin: "least".into(), tail: 1, ..ReadLogsRequest::default() };
    let mut lines = running.admin.read_logs(request).await.unwrap().into_inner();
    let line = lines.message().await.unwrap().expect("one line");
    assert_eq!((line.line.as_str(), line.generation), ("listening", 2));
    assert!(lines.message().await.unwrap().is_none(), "without follow the stream ends");

    let unloaded =
        running.admin.unload_plugin(UnloadPluginRequest { name: "least".into(), cascade: false }).await.unwrap();
    assert_eq!(unloaded.into_inner().plugin.unwrap().state(), PluginState::Unloaded);
    let unknown =
        running.admin.unload_plugin(UnloadPluginRequest { name: "other".into(), cascade: false }).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    assert_eq!(unknown.metadata().get("plugvisor-code").unwrap(), "plugin.not_found");

    let launcher = running.admin.get_status(GetStatusRequest {}).await.unwrap().into_inner();
    let launcher = launcher.supervisor.unwrap().launcher_pid;
    running.stop().await;
    assert!(!Path::new(&format!("/proc/{launcher}")).exists(), "the launcher has ended");
    let left: Vec<_> = std::fs::read_dir(world.path("run")).into_iter().flatten().flatten().collect();
    assert!(left.is_empty(), "the runtime directory still has {left:?}");
}

#[tokio::test]
async fn failures_are_told_with_their_cause_and_touch_nobody_else() {
    let hang = "[plugin.hangs]\nhealth = { startup_timeout_ms = 6000 }\nrestart = { enabled = false }\n";
    let crash = "[plugin.crashes]\nrestart = { enabled = false }\n";
    let plugins = [("least", "serve"), ("hangs", "hang"), ("crashes", "crash")];
    let world = World::new(&plugins, &format!("{hang}{crash}"));
    let broken = world.path("plugins/broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("plugin.json"), r#"{"name": "broken", "versoin": "1.0.0"}"#).unwrap();
    let mut running = world.start().await;
    running.events.until("supervisor.ready", "").await;

    assert_eq!(running.plugin("least").await.state(), PluginState::Loaded);
    let crashes = running.plugin("crashes").await;
    assert_eq!(crashes.state(), PluginState::Failed);
    assert!(crashes.last_error.contains("ended with status 3"), "{crashes:?}");
    let hangs = running.plugin("hangs").await;
    assert_eq!(hangs.state(), PluginState::Failed);
    assert!(hangs.last_error.contains("did not answer its health check"), "{hangs:?}");
    let broken = running.plugin("broken").await;
    assert_eq!(broken.state(), PluginState::Failed);
    assert!(broken.last_error.contains("versoin") && !broken.hint.is_empty(), "{broken:?}");

    let described = running.admin.describe_plugin(DescribePluginRequest { name: "crashes".into() }).await.unwrap();
    let described = described.into_inner();
    assert_eq!(described.stderr_tail, ["this plugin crashes on purpose"]);
    assert_eq!(described.last_exit.unwrap().code, Some(3));

    // A second supervisor takes nothing from the first.
    let second = world.refused().await;
    let printed = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(74), "{printed}");
    assert!(printed.contains("another supervisor (pid "), "{printed}");
    assert_eq!(running.plugin("least").await.state(), PluginState::Loaded);
    running.stop().await;
}

#[tokio::test]
async fn a_wrong_configuration_starts_nothing() {
    let world = World::new(&[], "[plugin.x]\nlod = \"auto\"\n");
    let ended = world.refused().await;
    let printed = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert_eq!(ended.status.code(), Some(78), "{printed}");
    assert!(printed.contains("plugin.x.lod: unknown key; did you mean \"load\"?"), "{printed}");
    assert!(!world.path("run").exists(), "nothing was made");
}

fn open(path: &Path) {
    // The supervisor becomes another user when it is started by root.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// The plugin is an example of this package, which `cargo test --test whole` alone does not build.
fn plugin() -> PathBuf {
    static BUILT: Once = Once::new();
    built(&BUILT, "examples/least-plugin", &["--package", "plugvisor-daemon", "--example", "least-plugin"])
}

/// The launcher belongs to another package, which cargo does not build for this one's tests.
fn launcher() -> PathBuf {
    static BUILT: Once = Once::new();
    built(&BUILT, "plugvisor-launcher", &["--package", "plugvisor-sandbox", "--bin", "plugvisor-launcher"])
}

/// A file beside plugvisord, built at most once in a run, when it is not there: a run of the workspace's tests has built
/// it, and building it alone would build its dependencies anew with other features, beside tests that measure time.
fn built(once: &Once, name: &str, target: &[&str]) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_plugvisord")).with_file_name(name);
    once.call_once(|| {
        if path.exists() {
            return;
        }
        let mut build = std::process::Command::new(env!("CARGO"));
        build.args(["build", "--quiet"]).args(target).current_dir(env!("CARGO_MANIFEST_DIR"));
        assert!(build.status().unwrap().success(), "{name} does not build");
    });
    path
}
