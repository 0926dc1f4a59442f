//! The test plugins without a supervisor: the good citizen is good, and each misdeed is one. Otherwise a scenario could
//! pass because nothing bad ever happened.

use std::{
    os::{
        fd::OwnedFd,
        unix::{fs::FileTypeExt as _, net::UnixListener},
    },
    process::Stdio,
};

use anyhow::{Context, ensure};
use plugvisor_client::Client;
use plugvisor_tests::{
    Binaries,
    contract::{
        ActRequest, Nothing, SayRequest, act_request::Deed, echo_service_client::EchoServiceClient,
        hostile_service_client::HostileServiceClient,
    },
};
use tokio::process::{Child, Command};
use tonic::Code;

/// A test plugin on a socket of its own.
struct Alone {
    child: Child,
    calls: Client,
    _directory: tempfile::TempDir,
}

impl Alone {
    /// The socket listens before the plugin runs, as with the launcher; it is handed over as descriptor 0.
    fn start(behaviour: &[&str]) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("worker.sock");
        let listener = UnixListener::bind(&path)?;
        ensure!(path.metadata()?.file_type().is_socket(), "no socket");
        let child = Command::new(Binaries::find()?.path("hostile-plugin")?)
            .args(behaviour)
            .env_clear()
            .env("LISTEN_FDS", "1")
            .env("LISTEN_FDS_FIRST_FD", "0")
            .env("PLUGVISOR_GENERATION", "7")
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        Ok(Self { child, calls: Client::lazy(path), _directory: directory })
    }

    async fn act(&self, deed: Deed) -> Result<String, tonic::Status> {
        let mut client = HostileServiceClient::new(self.calls.clone());
        Ok(client.act(ActRequest { ballast: Vec::new(), deed: Some(deed) }).await?.into_inner().text)
    }
}

#[test]
fn the_good_citizen_answers_and_ends_when_asked() {
    plugvisor_tests::run(async {
        let mut alone = Alone::start(&["echo"])?;
        let mut echo = EchoServiceClient::new(alone.calls.clone());
        let answer = echo.say(SayRequest { text: "hi".to_owned() }).await?.into_inner();
        ensure!(answer.text == "hi" && answer.generation == 7, "{answer:?}");
        let pid = alone.child.id().context("it has ended")?;
        plugvisor_tests::Process::open(pid).context("it has ended")?.signal(rustix::process::Signal::TERM)?;
        ensure!(alone.child.wait().await?.success(), "it did not end well");
        Ok(())
    });
}

#[test]
fn deeds_are_done() {
    plugvisor_tests::run(async {
        let mut alone = Alone::start(&["echo"])?;
        alone.act(Deed::Nothing(Nothing {})).await?;
        let status = alone.act(Deed::Close(Nothing {})).await.expect_err("the connection was closed");
        ensure!(status.code() != Code::Ok, "{status:?}");
        alone.act(Deed::Nothing(Nothing {})).await.context("on a new connection")?;
        let status = alone.act(Deed::Fail(Code::Aborted as i32)).await.expect_err("it was told to fail");
        ensure!(status.code() == Code::Aborted, "{status:?}");
        alone.act(Deed::Exit(9)).await.expect_err("it was told to exit");
        ensure!(alone.child.wait().await?.code() == Some(9), "another exit code");
        Ok(())
    });
}

#[test]
fn garbage_is_no_http2_and_a_closed_door_is_no_answer() {
    plugvisor_tests::run(async {
        for behaviour in ["garbage", "closes"] {
            let alone = Alone::start(&[behaviour])?;
            ensure!(alone.act(Deed::Nothing(Nothing {})).await.is_err(), "{behaviour} answered");
        }
        Ok(())
    });
}

#[test]
fn the_one_that_exits_says_why() {
    plugvisor_tests::run(async {
        let alone = Alone::start(&["exits-at-once", "3"])?;
        let output = alone.child.wait_with_output().await?;
        ensure!(output.status.code() == Some(3), "{output:?}");
        ensure!(String::from_utf8_lossy(&output.stderr).contains("flux capacitor"), "{output:?}");
        Ok(())
    });
}
