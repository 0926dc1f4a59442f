//! The socket that a plugin serves on, and what its environment says about it.
//!
//! Three ways, in this order: the inherited listening socket (descriptor 3, `LISTEN_FDS=1`), a path to bind
//! (`PLUGVISOR_LISTEN`), or an error that says how to run the plugin.

use std::{
    env, fs, io,
    os::unix::{
        fs::FileTypeExt as _,
        net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use listenfd::ListenFd;
use rustix::net::{AddressFamily, sockopt};
use tokio::{
    net::{UnixListener, UnixStream},
    time::{Sleep, sleep},
};
use tokio_stream::Stream;

/// How long accepting rests after an error, such as no free descriptor: the condition does not end by asking again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the environment says.
#[derive(Debug, Default, Clone)]
pub(crate) struct Environment {
    /// Started by a supervisor, which will call Init.
    pub(crate) supervised: bool,
    pub(crate) plugin: String,
    pub(crate) generation: u64,
    pub(crate) broker: Option<PathBuf>,
    pub(crate) listen: Option<PathBuf>,
    /// A JSON file, for running alone.
    pub(crate) config: Option<PathBuf>,
}

/// A faulty environment. Every kind is permanent: the process exits with 78.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum ListenError {
    #[error(
        "there is no socket to serve on: this program is a plugin, started by plugvisord; to try it alone, run it as \
         `PLUGVISOR_LISTEN=/tmp/plugin.sock {program}`"
    )]
    NoSocket { program: String },
    #[error("descriptor 3 (LISTEN_FDS=1) is not a listening Unix socket: {0}")]
    NotListening(io::Error),
    #[error("LISTEN_FDS is {0}, but a plugin serves on exactly one socket")]
    Count(usize),
    #[error("cannot listen on {} (PLUGVISOR_LISTEN): {source}", path.display())]
    Bind { path: PathBuf, source: io::Error },
}

impl Environment {
    pub(crate) fn read() -> Self {
        let text = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let program = env::args_os().next().map(PathBuf::from);
        let program = program.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
        Self {
            supervised: text("PLUGVISOR_PROTOCOL").is_some(),
            plugin: text("PLUGVISOR_PLUGIN").or(program).unwrap_or_else(|| "plugin".to_owned()),
            generation: text("PLUGVISOR_GENERATION").and_then(|value| value.parse().ok()).unwrap_or(0),
            broker: path("PLUGVISOR_BROKER"),
            listen: path("PLUGVISOR_LISTEN"),
            config: path("PLUGVISOR_CONFIG"),
        }
    }

    /// Takes the socket. Must run before any thread is started, since it edits the environment.
    pub(crate) fn listen(&self) -> Result<StdListener, ListenError> {
        let mut inherited = ListenFd::from_env();
        let listener = match inherited.len() {
            0 => match &self.listen {
                Some(path) => bind(path).map_err(|source| ListenError::Bind { path: path.clone(), source })?,
                None => return Err(ListenError::NoSocket { program: self.plugin.clone() }),
            },
            1 => {
                let taken = inherited.take_unix_listener(0).map_err(ListenError::NotListening)?;
                let listener = taken.ok_or_else(|| ListenError::NotListening(io::ErrorKind::NotFound.into()))?;
                check_listening(&listener).map_err(ListenError::NotListening)?;
                listener
            }
            count => return Err(ListenError::Count(count)),
        };
        listener.set_nonblocking(true).map_err(ListenError::NotListening)?;
        Ok(listener)
    }
}

fn check_listening(listener: &StdListener) -> io::Result<()> {
    let listening = sockopt::socket_acceptconn(listener)?;
    if listening && sockopt::socket_domain(listener)? == AddressFamily::UNIX {
        return Ok(());
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "the socket does not accept connections"))
}

/// Binds the path; takes the place of a socket that a dead process left, and of nothing else.
fn bind(path: &Path) -> io::Result<StdListener> {
    match StdListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match StdStream::connect(path) {
            // Connecting to a plain file is refused as well.
            Err(refused) if refused.kind() == io::ErrorKind::ConnectionRefused && is_socket(path)? => {
                fs::remove_file(path)?;
                StdListener::bind(path)
            }
            _ => Err(error),
        },
        outcome => outcome,
    }
}

fn is_socket(path: &Path) -> io::Result<bool> {
    Ok(fs::symlink_metadata(path)?.file_type().is_socket())
}

/// The accepted connections, without end and without errors.
pub(crate) struct Incoming {
    listener: UnixListener,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    pub(crate) fn new(listener: StdListener) -> io::Result<Self> {
        Ok(Self { listener: UnixListener::from_std(listener)?, pause: None })
    }
}

impl Stream for Incoming {
    type Item = io::Result<UnixStream>;

    fn poll_next(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(task));
                self.pause = None;
            }
            match ready!(self.listener.poll_accept(task)) {
                Ok((stream, _)) => return Poll::Ready(Some(Ok(stream))),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    self.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_socket_is_replaced_and_a_live_one_or_a_file_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plugin.sock");
        let live = bind(&path).unwrap();
        assert_eq!(bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(live);
        bind(&path).unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "kept").unwrap();
        assert!(bind(&file).is_err());
        assert_eq!(fs::read_to_string(&file).unwrap(), "kept");
    }

    #[test]
    fn a_connected_socket_is_not_a_listening_one() {
        let directory = tempfile::tempdir().unwrap();
        let listener = StdListener::bind(directory.path().join("s")).unwrap();
        check_listening(&listener).unwrap();
        let (one, _other) = StdStream::pair().unwrap();
        let disguised = StdListener::from(std::os::fd::OwnedFd::from(one));
        assert!(check_listening(&disguised).is_err());
    }
}
