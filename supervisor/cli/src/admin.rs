//! The connection to the supervisor's admin socket: where it is, and what its refusals mean.

use std::fs;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use plugvisor_proto::admin::v1::admin_client::AdminClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::failure::{Failure, Outcome};

/// For questions that the supervisor answers from what it knows.
pub(crate) const QUESTION: Duration = Duration::from_secs(10);

/// For loads and restarts, which wait for a plugin to be ready or given up.
pub(crate) const LIFE: Duration = Duration::from_secs(120);

/// How long after a time limit a call that others should have ended is given up.
pub(crate) const MARGIN: Duration = Duration::from_secs(1);

/// Descriptor sets and kept logs are larger than tonic's 4 MiB at times.
const LARGEST_ANSWER: usize = 64 * 1024 * 1024;

/// A client of the admin service.
#[derive(Clone, Debug)]
pub(crate) struct Admin {
    pub(crate) socket: PathBuf,
    pub(crate) timeout: Option<Duration>,
    pub(crate) client: AdminClient<Channel>,
}

impl Admin {
    /// Connects to `socket`, or to where this user's or the system's supervisor listens.
    pub(crate) async fn connect(socket: Option<&Path>, timeout: Option<Duration>) -> Result<Self, Failure> {
        let socket = match socket {
            Some(socket) => socket.to_path_buf(),
            None => default_socket()?,
        };
        let channel = connect(&socket, timeout.unwrap_or(QUESTION)).await?;
        let client = AdminClient::new(channel).max_decoding_message_size(LARGEST_ANSWER);
        Ok(Self { socket, timeout, client })
    }

    /// Asks and waits for the answer; `what` names the question in errors.
    pub(crate) async fn ask<Q, A, F>(
        &self,
        what: &str,
        usual: Duration,
        question: Q,
        call: impl FnOnce(AdminClient<Channel>, Request<Q>) -> F,
    ) -> Result<A, Failure>
    where
        F: Future<Output = Result<Response<A>, Status>>,
    {
        let limit = self.timeout.unwrap_or(usual);
        let mut request = Request::new(question);
        request.set_timeout(limit);
        // The supervisor and tonic hold the limit; this is for a supervisor that hangs.
        match tokio::time::timeout(limit + MARGIN, call(self.client.clone(), request)).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(self.refused(what, &status)),
            Err(_) => Err(Failure::timeout(what)),
        }
        .map_err(|failure| match failure.outcome {
            Outcome::Timeout if usual == QUESTION => Failure::mute(what, &self.socket),
            _ => failure,
        })
    }

    /// What a refusal means.
    pub(crate) fn refused(&self, what: &str, status: &Status) -> Failure {
        Failure::from_admin(what, &self.socket, status)
    }
}

/// Connects to a Unix socket.
pub(crate) async fn connect(socket: &Path, limit: Duration) -> Result<Channel, Failure> {
    // sockaddr_un has room for 107 bytes and the end (unix(7)).
    if socket.as_os_str().as_bytes().len() > 107 {
        return Err(Failure::new(
            Outcome::Usage,
            format!("the socket's path is longer than the 107 bytes that Unix allows: {}", socket.display()),
            "name it by a shorter path, such as one through a symbolic link",
        ));
    }
    let uri = socket.to_str().map(|path| format!("unix:{path}")).ok_or_else(|| {
        Failure::new(Outcome::Usage, format!("the socket's path is not UTF-8: {}", socket.display()), "")
    })?;
    let endpoint = Endpoint::from_shared(uri).map_err(|error| {
        Failure::new(Outcome::Usage, format!("{} cannot be a socket's path: {error}", socket.display()), "")
    })?;
    match tokio::time::timeout(limit, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(Failure::from_admin("connect", socket, &Status::from_error(Box::new(error)))),
        Err(_) => Err(Failure::timeout(&format!("connect to {}", socket.display()))),
    }
}

/// This user's supervisor if there is one, else the system's.
fn default_socket() -> Result<PathBuf, Failure> {
    const SYSTEM: &str = "/run/plugvisor/admin.sock";
    let uid = rustix::process::geteuid();
    if uid.is_root() {
        return Ok(SYSTEM.into());
    }
    let own = match std::env::var_os("XDG_RUNTIME_DIR").filter(|directory| !directory.is_empty()) {
        Some(directory) => PathBuf::from(directory).join("plugvisor"),
        None => PathBuf::from(format!("/tmp/plugvisor-{}", uid.as_raw())),
    };
    match fs::symlink_metadata(&own) {
        // Anyone may make a directory in /tmp; a stranger's socket would get our requests.
        Ok(metadata) if metadata.uid() != uid.as_raw() || !metadata.is_dir() => Err(Failure::new(
            Outcome::Denied,
            format!("{} belongs to another user or is no directory, so it is not trusted", own.display()),
            "remove it, or name the supervisor's socket with --socket PATH",
        )),
        Err(_) if Path::new(SYSTEM).exists() => Ok(SYSTEM.into()),
        Ok(_) | Err(_) => Ok(own.join("admin.sock")),
    }
}
