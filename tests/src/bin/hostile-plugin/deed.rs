//! The deeds that a call can ask for.

use std::{
    os::fd::{AsFd, OwnedFd},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
};

use anyhow::Context;
use plugvisor_client::{Client, Refusal};
use plugvisor_tests::contract::{
    ActRequest, ActResponse, Chain, SayRequest, SayResponse, act_request::Deed,
    hostile_service_client::HostileServiceClient, hostile_service_server::HostileService,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tonic::{
    Code, Request, Response, Status,
    client::Grpc,
    metadata::{Ascii, MetadataValue},
};
use tonic_prost::ProstCodec;

use crate::{assault, connection::Scissors, echo, health::Condition};

/// Serves `HostileService`.
#[derive(Debug)]
pub(crate) struct Hostile {
    pub(crate) scissors: Scissors,
    pub(crate) condition: Condition,
    pub(crate) hoard: Mutex<Hoard>,
}

/// What was taken and is never given back.
#[derive(Debug, Default)]
pub(crate) struct Hoard {
    memory: Vec<Vec<u8>>,
    descriptors: Vec<OwnedFd>,
}

#[tonic::async_trait]
impl HostileService for Hostile {
    async fn act(&self, request: Request<ActRequest>) -> Result<Response<ActResponse>, Status> {
        let caller = echo::text(request.metadata(), "plugvisor-caller");
        let trace = request.metadata().get("traceparent").cloned();
        let hops = request.metadata().get("plugvisor-hops").cloned();
        let answer = |text: String| Ok(Response::new(ActResponse { text, ballast: Vec::new() }));
        match request.into_inner().deed {
            None | Some(Deed::Nothing(_)) => answer(caller),
            Some(Deed::Exit(code)) => std::process::exit(code),
            Some(Deed::Close(_)) => {
                self.scissors.cut();
                // The answer's first byte is what finds the connection cut.
                answer(String::new())
            }
            Some(Deed::Hang(_)) => std::future::pending().await,
            Some(Deed::AnswerBytes(count)) => {
                let ballast = vec![0; usize::try_from(count).unwrap_or(usize::MAX)];
                Ok(Response::new(ActResponse { text: String::new(), ballast }))
            }
            Some(Deed::Fail(code)) => Err(Status::new(Code::from_i32(code), "as you asked")),
            Some(Deed::TakeMemoryBytes(count)) => {
                // Written, not only reserved: an untouched page costs nothing.
                let taken = vec![0xA5; usize::try_from(count).unwrap_or(usize::MAX)];
                self.hoard.lock().unwrap_or_else(PoisonError::into_inner).memory.push(taken);
                answer("taken".to_owned())
            }
            Some(Deed::TakeDescriptors(_)) => {
                let mut hoard = self.hoard.lock().unwrap_or_else(PoisonError::into_inner);
                let before = hoard.descriptors.len();
                while let Ok(copy) = std::io::stdout().as_fd().try_clone_to_owned() {
                    hoard.descriptors.push(copy);
                }
                let taken = hoard.descriptors.len() - before;
                // One is given back, or this very answer's connection could not be replaced.
                hoard.descriptors.pop();
                answer(taken.to_string())
            }
            Some(Deed::Call(path)) => answer(call(&path, trace).await),
            Some(Deed::Chain(Chain { tokens })) => answer(chain(tokens, hops).await),
            Some(Deed::HangHealth(_)) => {
                self.condition.hang();
                answer("no more".to_owned())
            }
            Some(Deed::Assault(_)) => match tokio::task::spawn_blocking(assault::assault).await {
                Ok(Ok(count)) => answer(count.to_string()),
                Ok(Err(error)) => Err(Status::internal(format!("{error:#}"))),
                Err(error) => Err(Status::internal(error.to_string())),
            },
            Some(Deed::Say(said)) => answer(say(&said.to, &said.text).await),
            Some(Deed::Variable(name)) => answer(std::env::var(name).unwrap_or_else(|_| "unset".to_owned())),
            Some(Deed::File(file)) => answer(keep(&file.path, &file.text)),
            Some(Deed::Escape(_)) => match escape() {
                Ok(pid) => answer(pid),
                Err(error) => Err(Status::internal(format!("{error:#}"))),
            },
        }
    }
}

/// Calls a method through the broker; what came back as text.
async fn call(path: &str, trace: Option<MetadataValue<Ascii>>) -> String {
    let Some(broker) = std::env::var_os("PLUGVISOR_BROKER") else { return "no PLUGVISOR_BROKER".to_owned() };
    let Ok(path) = path.parse() else { return format!("{path:?} is no path") };
    // More than the broker gives by itself: a machine that stands still for some seconds is not what is looked for.
    let mut grpc = Grpc::new(Client::lazy(broker).with_timeout(std::time::Duration::from_secs(60)));
    if let Err(status) = grpc.ready().await {
        return format!("not ready: {status}");
    }
    let codec = ProstCodec::<SayRequest, SayResponse>::default();
    let mut request = Request::new(SayRequest { text: "from a plugin".to_owned() });
    if let Some(trace) = trace {
        request.metadata_mut().insert("traceparent", trace);
    }
    match grpc.unary(request, path, codec).await {
        Ok(answer) => match answer.into_inner() {
            SayResponse { caller, traceparent, .. } if traceparent.is_empty() => format!("ok caller={caller}"),
            SayResponse { caller, traceparent, .. } => format!("ok caller={caller} traceparent={traceparent}"),
        },
        Err(status) => refused(&status),
    }
}

/// Has the next of a chain of plugins do the same; what came back as text.
async fn chain(mut tokens: Vec<String>, hops: Option<MetadataValue<Ascii>>) -> String {
    if tokens.is_empty() {
        let hops = hops.as_ref().and_then(|hops| hops.to_str().ok()).unwrap_or_default();
        return format!("reached by {hops}");
    }
    let Some(broker) = std::env::var_os("PLUGVISOR_BROKER") else { return "no PLUGVISOR_BROKER".to_owned() };
    let token = tokens.remove(0);
    let Some(next) = Client::lazy(broker).with_token(&token) else { return format!("{token:?} is no token") };
    let mut request = Request::new(ActRequest { ballast: Vec::new(), deed: Some(Deed::Chain(Chain { tokens })) });
    request.set_timeout(std::time::Duration::from_secs(60));
    if let Some(hops) = hops {
        request.metadata_mut().insert("plugvisor-hops", hops);
    }
    match HostileServiceClient::new(next).act(request).await {
        Ok(answer) => answer.into_inner().text,
        Err(status) => refused(&status),
    }
}

/// A failed call as text.
fn refused(status: &Status) -> String {
    match Refusal::from_status(status) {
        Some(refusal) => format!("{:?} {:?}: {} ({})", refusal.code, refusal.reason, refusal.message, refusal.hint),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}

/// Says something over TCP; what came back, or why not.
async fn say(to: &str, text: &str) -> String {
    let proxy = std::env::var("HTTP_PROXY").ok();
    let to = match proxy.as_deref().and_then(|proxy| proxy.strip_prefix("http://")) {
        _ if !to.is_empty() => to,
        Some(proxy) => proxy,
        None => return "no HTTP_PROXY".to_owned(),
    };
    let said = async {
        let mut stream = TcpStream::connect(to).await?;
        stream.write_all(text.as_bytes()).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
    };
    said.await.unwrap_or_else(|error| match error.raw_os_error() {
        Some(errno) => format!("errno {errno}"),
        None => error.to_string(),
    })
}

/// Starts a process that leaves this one's session and parent; its number as it sees it.
fn escape() -> anyhow::Result<String> {
    let middle = Command::new("/proc/self/exe").arg("orphan").stderr(Stdio::inherit()).output().context("orphan")?;
    anyhow::ensure!(middle.status.success(), "orphan ended with {}", middle.status);
    Ok(String::from_utf8_lossy(&middle.stdout).trim().to_owned())
}

/// The process in the middle of [`escape`].
pub(crate) fn orphan() -> anyhow::Result<()> {
    rustix::process::setsid().context("setsid")?;
    let lingers = Command::new("/proc/self/exe")
        .arg("lingers")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("lingers")?;
    println!("{}", lingers.id());
    Ok(())
}

/// Writes a text, if there is one, and reads it back.
fn keep(path: &str, text: &str) -> String {
    let written = if text.is_empty() { Ok(()) } else { std::fs::write(path, text) };
    written.and_then(|()| std::fs::read_to_string(path)).unwrap_or_else(|error| {
        error.raw_os_error().map_or_else(|| error.to_string(), |errno| format!("errno {errno}"))
    })
}
