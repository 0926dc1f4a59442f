//! A launcher that a test starts itself, as a service manager would: it outlives the daemons that use it.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Stdio,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, ensure};
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::UnixDatagram,
    process::{Child, Command},
};

use crate::{Lane, Process, World, place::Place, stretched};

/// How long it may take to listen, and to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running launcher without a supervisor. It ends when this is dropped.
#[derive(Debug)]
pub struct ExternalLauncher {
    child: Child,
    socket: PathBuf,
    _place: Place,
}

impl World {
    /// Starts a launcher for the daemons of this world that goes on without them.
    ///
    /// # Errors
    /// When it does not listen.
    pub async fn launcher(&self) -> anyhow::Result<ExternalLauncher> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let lane = self.lane();
        let door = self.path().join("door");
        let run = self.path().join("launcher-run");
        for directory in [&door, &run] {
            fs::create_dir(directory)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(0o755))?;
            chown(directory, Some(lane.uid()), None)?;
        }
        let socket = door.join("launcher.sock");
        let program = self.daemon_binary()?.with_file_name("plugvisor-launcher");
        let group = format!("plugvisor-external-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let other_user = (crate::lane::is_root() && lane == Lane::Rootless).then(|| lane.uid());
        let place = Place::new(other_user);
        let notify = self.path().join(format!("{group}.notify"));
        let told = UnixDatagram::bind(&notify)?;
        fs::set_permissions(&notify, fs::Permissions::from_mode(0o666))?;
        let mut command = Command::from(place.command(&program));
        command
            .arg("--listen")
            .arg(&socket)
            .args(["--supervisor-uid", &supervisor_uid(lane)?.to_string(), "--linger", "forever"])
            .args(["--cgroup-root", &group, "--max-plugins", "16"])
            .arg("--runtime-directory")
            .arg(&run)
            .arg("--bundle-root")
            .arg(format!("verified={}", self.plugins().display()))
            .env_clear()
            .env("NOTIFY_SOCKET", &notify)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().context("cannot start plugvisor-launcher")?;
        let stderr = child.stderr.take().context("it has no standard error")?;
        // Read for as long as it runs: nobody may write to a pipe that nobody reads.
        let ended = tokio::spawn(async move {
            let mut lines = BufReader::new(stderr).lines();
            let mut said = String::new();
            while let Ok(Some(line)) = lines.next_line().await {
                said.push_str(&line);
            }
            said
        });
        tokio::select! {
            said = ended => anyhow::bail!("plugvisor-launcher ended: {}", said?),
            ready = until_ready(&told) => ready?,
        }
        Ok(ExternalLauncher { child, socket, _place: place })
    }
}

impl ExternalLauncher {
    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Ends it with SIGTERM, and every plugin with it.
    ///
    /// # Errors
    /// When it goes on running, or ends badly.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let pid = self.child.id().context("it has ended already")?;
        Process::open(pid).context("it has ended already")?.signal(Signal::TERM)?;
        let status =
            tokio::time::timeout(stretched(PATIENCE), self.child.wait()).await.context("it goes on running")??;
        ensure!(status.success(), "the launcher ended with {status}");
        Ok(())
    }
}

/// Whom the daemon of this lane becomes, started by root: it must be told to.
fn supervisor_uid(lane: Lane) -> anyhow::Result<u32> {
    match lane {
        Lane::Rootless => Ok(lane.uid()),
        Lane::Privileged => {
            let users = fs::read_to_string("/etc/passwd")?;
            let daemon = users.lines().find_map(|line| line.strip_prefix("daemon:")?.split(':').nth(1)?.parse().ok());
            daemon.context("this host has no user daemon")
        }
    }
}

/// Waits until the launcher tells its service manager, which is this test, that it is ready (`sd_notify(3)`): its socket
/// listens then, which its path alone does not say.
async fn until_ready(told: &UnixDatagram) -> anyhow::Result<()> {
    let ready = async {
        let mut state = [0; 256];
        loop {
            let read = told.recv(&mut state).await?;
            if state[..read].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                return anyhow::Ok(());
            }
        }
    };
    tokio::time::timeout(stretched(PATIENCE), ready).await.context("the launcher does not get ready")?
}
