//! The peers: other people's forwarders, if they are installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Context as _;

use super::processes::Process;
use crate::build::workspace_root;

/// Somebody else's forwarder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Peer {
    HaProxy,
    Nginx,
}

impl Peer {
    pub(super) const ALL: [Self; 2] = [Self::HaProxy, Self::Nginx];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::HaProxy => "haproxy",
            Self::Nginx => "nginx",
        }
    }

    const fn template(self) -> &'static str {
        match self {
            Self::HaProxy => "haproxy.cfg.in",
            Self::Nginx => "nginx.conf.in",
        }
    }

    /// Starts it between `upstream` and a new socket in `directory`; `None` when it is not installed.
    pub(super) fn start(self, upstream: &Path, directory: &Path) -> anyhow::Result<Option<(Process, PathBuf)>> {
        let Some(program) = find(self.name()) else { return Ok(None) };
        let directory = directory.join(self.name());
        fs::create_dir(&directory)?;
        let listen = directory.join("calls.sock");
        let template = workspace_root().join("deploy/bench").join(self.template());
        let text = fs::read_to_string(&template).with_context(|| format!("cannot read {}", template.display()))?;
        let text = text
            .replace("@LISTEN@", &listen.display().to_string())
            .replace("@UPSTREAM@", &upstream.display().to_string())
            .replace("@DIRECTORY@", &directory.display().to_string());
        let configuration = directory.join("configuration");
        fs::write(&configuration, text)?;
        let mut command = Command::new(program);
        match self {
            // -db: in the foreground.
            Self::HaProxy => command.arg("-db").arg("-q").arg("-f").arg(&configuration),
            Self::Nginx => command.arg("-p").arg(&directory).arg("-c").arg(&configuration).args(["-e", "stderr"]),
        };
        Ok(Some((Process::theirs(self.name(), &mut command, &listen)?, listen)))
    }
}

/// A program on the path, or where distributions put servers.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/local/sbin".into()]);
    directories.map(|directory| directory.join(name)).find(|program| program.is_file())
}
