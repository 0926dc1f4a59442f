//! The part of `bench spawn` that compares: the same program started by the launcher at each level, by `bwrap`, by `runc`,
//! and by nobody but fork and exec.
//!
//! Each figure spans the same: from just before the order is given (the request sent; the command forked) to the moment
//! that the program tells as its first act. Ours is given to a launcher that runs already and may have made a child ahead,
//! because that is what it is for; bwrap and runc begin with their own start, because they have no process before. All
//! three show the program its own directory, /usr, a /proc and a /dev, and an empty network. They take turns in every
//! round, and who begins moves on from round to round.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, ensure};
use rustix::time::{ClockId, clock_gettime};
use serde_json::json;

use super::{peers::find, processes::Process};
use crate::{build::workspace_root, steps};

/// Who starts the program besides the launcher.
pub(super) const PEERS: [&str; 3] = [DIRECT, "bwrap", "runc"];
/// fork and exec without any wall: the floor.
const DIRECT: &str = "direct";
const PROGRAM: &str = "first-act";

/// What was measured, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Outside {
    /// By level; those that the launcher supports.
    pub(super) levels: BTreeMap<&'static str, Ours>,
    /// By level, why the launcher refused it.
    pub(super) refused: BTreeMap<&'static str, String>,
    /// By name; those that are installed.
    pub(super) peers: BTreeMap<&'static str, Vec<f64>>,
}

/// The launches of one level.
#[derive(Debug, Default)]
pub(super) struct Ours {
    /// As the program tells.
    pub(super) seen: Vec<f64>,
    /// As the launcher counts, which does not see the way to it and back.
    pub(super) launcher: Vec<f64>,
    /// How many had a child made ahead.
    pub(super) ahead: usize,
}

/// Measures every level of `levels` and every peer in `rounds` rounds; one more goes before them to warm up.
pub(super) fn measure(binaries: &Path, levels: &[&'static str], rounds: usize) -> anyhow::Result<Outside> {
    let directory = tempfile::Builder::new().prefix("plugvisor-bench-").tempdir()?;
    // The launcher's copier is another user, and must find the bundle where it is said to be.
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))?;
    let program = compile(directory.path())?;
    let mut command = Command::new(binaries.join("launch-alone"));
    command.arg(binaries.join("plugvisor-launcher")).arg(&program).arg(directory.path());
    let mut ours = Process::ours("the launcher", &mut command)?;
    let peers = Peers::new(&program, directory.path())?;

    let mut outside = Outside::default();
    for level in levels {
        match ask(&mut ours, level)? {
            Answer::Seen { .. } => drop(outside.levels.insert(level, Ours::default())),
            Answer::Refused(why) => drop(outside.refused.insert(level, why)),
        }
    }
    let installed = PEERS.into_iter().filter(|name| peers.command(name, 0).is_some());
    outside.peers = installed.map(|name| (name, Vec::new())).collect();
    let levels: Vec<&'static str> = outside.levels.keys().copied().collect();
    let turns: Vec<&'static str> = levels.iter().copied().chain(outside.peers.keys().copied()).collect();
    for round in 0..=rounds {
        eprint!("\rlaunches seen from outside, round {round} of {rounds}");
        for turn in 0..turns.len() {
            let name = turns[(round + turn) % turns.len()];
            if levels.contains(&name) {
                let answer = ask(&mut ours, name)?;
                let Answer::Seen { seen, launcher, ahead } = answer else {
                    anyhow::bail!("a launch at {name} was refused after others succeeded: {answer:?}");
                };
                let figures = outside.levels.entry(name).or_default();
                // The first round warms caches.
                if round > 0 {
                    figures.seen.push(seen);
                    figures.launcher.push(launcher);
                    figures.ahead += usize::from(ahead);
                }
            } else if let Some(mut command) = peers.command(name, round) {
                let seen = time(&mut command)?;
                if round > 0 {
                    outside.peers.entry(name).or_default().push(seen);
                }
            }
        }
    }
    eprintln!();
    drop(ours);
    drop(peers);
    directory.close()?;
    Ok(outside)
}

/// What one launch gave.
#[derive(Debug)]
enum Answer {
    Seen { seen: f64, launcher: f64, ahead: bool },
    Refused(String),
}

fn ask(ours: &mut Process, level: &str) -> anyhow::Result<Answer> {
    let line = ours.ask(level)?;
    read(&line).with_context(|| format!("launch-alone said {line:?}"))
}

fn read(line: &str) -> Option<Answer> {
    if let Some(why) = line.strip_prefix("refused ") {
        return Some(Answer::Refused(why.to_owned()));
    }
    let mut words = line.split(' ');
    let mut after = |word: &str| {
        let nanos = (words.next()? == word).then(|| words.next())??.parse::<f64>().ok()?;
        Some(nanos / 1e6)
    };
    let (seen, launcher) = (after("seen")?, after("launcher")?);
    let ahead = match words.next()? {
        "ahead" => true,
        "nothing" => false,
        _ => return None,
    };
    Some(Answer::Seen { seen, launcher, ahead })
}

/// Runs a command that ends with the program, and tells what passed until the program's first act.
fn time(command: &mut Command) -> anyhow::Result<f64> {
    let began = clock_gettime(ClockId::Monotonic);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {command:?}"))?;
    let told = <[u8; 8]>::try_from(output.stdout.as_slice()).ok().filter(|_| output.status.success());
    let told = told.with_context(|| {
        format!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim())
    })?;
    let began = u64::try_from(began.tv_sec)? * 1_000_000_000 + u64::try_from(began.tv_nsec)?;
    #[expect(clippy::cast_precision_loss, reason = "nanoseconds of seconds")]
    let nanos = u64::from_ne_bytes(told).saturating_sub(began) as f64;
    Ok(nanos / 1e6)
}

fn compile(directory: &Path) -> anyhow::Result<PathBuf> {
    let (source, own) = (workspace_root().join("deploy/bench/first-act.c"), directory.join("own"));
    fs::create_dir(&own)?;
    let program = own.join(PROGRAM);
    steps::run(Command::new("cc").args(["-O2", "-static", "-o"]).arg(&program).arg(source))?;
    Ok(program)
}

/// The others, as far as they are installed, and what they are started with.
struct Peers {
    program: PathBuf,
    directory: PathBuf,
    bwrap: Option<PathBuf>,
    runc: Option<PathBuf>,
}

impl Peers {
    fn new(program: &Path, directory: &Path) -> anyhow::Result<Self> {
        let own = program.parent().context("the program has no directory")?;
        let bundle = directory.join("runc");
        fs::create_dir_all(bundle.join("rootfs"))?;
        fs::write(bundle.join("config.json"), runc_configuration(own).to_string())?;
        // runc wants root, or a user namespace that others of these do not have.
        let runc = find("runc").filter(|_| rustix::process::geteuid().is_root());
        ensure!(program.is_file(), "{} is not there", program.display());
        Ok(Self { program: program.to_path_buf(), directory: directory.to_path_buf(), bwrap: find("bwrap"), runc })
    }

    /// The command with which this one starts the program; `None` when it is not installed.
    fn command(&self, name: &str, round: usize) -> Option<Command> {
        match name {
            "bwrap" => {
                let mut command = Command::new(self.bwrap.as_ref()?);
                command.args(["--unshare-all", "--ro-bind", "/usr", "/usr", "--symlink", "usr/lib", "/lib"]);
                command.args(["--symlink", "usr/lib64", "/lib64", "--symlink", "usr/bin", "/bin", "--ro-bind"]);
                command.arg(self.program.parent()?).arg("/plugin").args(["--proc", "/proc", "--dev", "/dev"]);
                command.arg(format!("/plugin/{PROGRAM}"));
                Some(command)
            }
            "runc" => {
                let mut command = Command::new(self.runc.as_ref()?);
                command.arg("--root").arg(self.directory.join("runc-state")).args(["run", "--bundle"]);
                command.arg(self.directory.join("runc"));
                command.arg(format!("plugvisor-bench-{}-{round}", std::process::id()));
                Some(command)
            }
            _ => Some(Command::new(&self.program)),
        }
    }
}

/// What `runc spec` writes, without what the program does not need, and with the same view of the host as the others.
fn runc_configuration(own: &Path) -> serde_json::Value {
    let namespaces = ["pid", "network", "ipc", "uts", "mount"].map(|kind| json!({ "type": kind }));
    let read_only = |at: &str, source: &Path| json!({ "destination": at, "type": "none", "source": source, "options": ["bind", "ro"] });
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "cwd": "/", "noNewPrivileges": true,
            "args": [format!("/plugin/{PROGRAM}")], "env": ["PATH=/usr/bin"],
        },
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"] },
            read_only("/usr", Path::new("/usr")),
            read_only("/plugin", own),
        ],
        "linux": { "namespaces": namespaces },
    })
}

#[cfg(test)]
mod tests {
    use super::{Answer, read};

    #[test]
    fn an_answer_is_read() {
        let Some(Answer::Seen { seen, launcher, ahead }) = read("seen 1500000 launcher 1250000 ahead") else {
            panic!("it was seen")
        };
        assert!((seen - 1.5).abs() < 1e-9 && (launcher - 1.25).abs() < 1e-9 && ahead);
        assert!(matches!(read("seen 1 launcher 1 nothing"), Some(Answer::Seen { ahead: false, .. })));
        assert!(matches!(read("refused for this reason"), Some(Answer::Refused(why)) if why == "for this reason"));
        for wrong in ["", "seen", "seen 1 launcher", "seen x launcher 1 ahead", "seen 1 launcher 1 else"] {
            assert!(read(wrong).is_none(), "{wrong:?}");
        }
    }
}
