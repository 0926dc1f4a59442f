//! What this host and this user can do: every control of the walls, and every place that the supervisor needs.
//!
//! Controls are what the launcher found by using them; places are tried as the supervisor would use them, and left as
//! they were. Nothing here starts or stops a plugin.

mod addresses;
mod configuration;
mod running;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use plugvisor_proto::admin::v1::{
    ExamineHostResponse, HostControl, HostLevel, HostPlace, LevelGap, Setting, ShowConfigurationResponse,
};
use plugvisor_sandbox::{
    options::Options,
    protocol::{Control, Host, Lacking, ProbeState, Probed, ProbedLevel},
};
use prost::Message as _;
use rustix::fs::MemfdFlags;

pub use self::running::running;
use crate::{
    config::{Config, ConfigError, Origin, Problem, Surroundings},
    discovery::{Found, PluginDirectory},
    launcher::{self, Launcher},
    privileges,
    runtime_directory::{self, Owner},
    start::{self, Args},
};

/// What is looked at in place of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// The host, as an `ExamineHostResponse`.
    Host,
    /// The configuration, as a `ConfigurationCheck`.
    Configuration,
}

/// Looks, and writes the message in protobuf's binary form to standard output, for `plugvisor`.
pub fn run(look: Look, args: Args) -> ExitCode {
    let bytes = match look {
        Look::Host => host(args).encode_to_vec(),
        Look::Configuration => configuration::check(&args).encode_to_vec(),
    };
    match io::Write::write_all(&mut io::stdout().lock(), &bytes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("plugvisord: cannot write to standard output: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The configuration that a start with these arguments would use.
fn configured(args: &Args, surroundings: &Surroundings) -> Result<(Config, Vec<Problem>), ConfigError> {
    let (mut config, problems) = Config::read(args.config.as_deref(), surroundings)?;
    let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let flags = [
        ("supervisor.runtime_directory", "--runtime-directory", &args.runtime_directory),
        ("supervisor.state_directory", "--state-directory", &args.state_directory),
    ];
    for (key, flag, path) in flags {
        if let Some(path) = path {
            match key {
                "supervisor.runtime_directory" => config.supervisor.runtime_directory = absolute(path),
                _ => config.supervisor.state_directory = absolute(path),
            }
            config.note_flag(key, flag);
        }
    }
    Ok((config, problems))
}

/// What is wrong with a key that reads well, with its line.
pub(crate) fn at(config: &Config, key: String, wrong: &impl ToString) -> Problem {
    let line = config.line(&key).unwrap_or_default();
    Problem { line, key, message: wrong.to_string(), suggestion: None }
}

/// Every setting of a configuration, with its origin in words.
pub fn shown(config: &Config) -> ShowConfigurationResponse {
    let file = config.file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
    let settings = config.settings().into_iter().map(|crate::config::Setting { key, value, origin }| Setting {
        key,
        value,
        origin: match origin {
            Origin::Default => "default".to_owned(),
            Origin::Line(line) => format!("{file}:{line}"),
            Origin::Flag(flag) => flag.to_owned(),
        },
    });
    let settings = settings.collect();
    ShowConfigurationResponse { file, settings }
}

fn host(args: Args) -> ExamineHostResponse {
    let surroundings = Surroundings::of_process();
    let (config, trouble) = match configured(&args, &surroundings) {
        Ok((config, problems)) => (config.clone(), config.without(problems).err()),
        Err(error) => (Config::without_file(&surroundings), Some(error)),
    };
    let policy = start::policy(args.launcher_policy, surroundings.uid);
    let probed = probe(args.launcher, policy.clone());
    let nothing = Host { controls: Vec::new(), levels: Vec::new() };
    let features = probed.as_ref().unwrap_or(&nothing);
    let owner = if surroundings.uid == 0 { privileges::find(&config.supervisor.user).ok() } else { None };
    let mut report = report(&config, features, surroundings.uid, owner, None);
    if let Some(error) = trouble {
        // In place of what is said of one that holds.
        report.places.retain(|place| place.name != CONFIGURATION);
        let file = args
            .config
            .map_or_else(|| config.place().as_ref().into(), |file| std::path::absolute(&file).unwrap_or(file));
        let wrong = (first_line(&error), format!("`plugvisor config validate {}` says what is wrong", file.display()));
        report.places.insert(0, place(CONFIGURATION, &file, "", Some(wrong)));
    }
    match (probed, policy) {
        (Ok(_), Some(path)) => running::add(&mut report, running::policy_place(&path, None)),
        (Ok(_), None) => {}
        (Err(NoProbe { why, refused: true }), Some(path)) => {
            running::add(&mut report, running::policy_place(&path, Some(why)));
        }
        (Err(NoProbe { why, refused: _ }), _) => {
            let fix = "correct that; if nothing is named, install plugvisord and plugvisor-launcher together";
            report.places.push(place("launcher", Path::new(launcher::PROGRAM), "", Some((why, fix.into()))));
        }
    }
    report
}

/// Bytes of what a launcher says that are kept; its list of what is wrong with its policy is shorter.
const MOST_SAID: u64 = 64 * 1024;

/// The place of that name.
const CONFIGURATION: &str = "configuration";

/// What an error says before it lists each problem.
fn first_line(error: &ConfigError) -> String {
    error.to_string().lines().next().unwrap_or_default().trim_end_matches(':').to_owned()
}

/// Why there is no probe.
struct NoProbe {
    why: String,
    /// Whether the launcher refused how it was started, which here is its policy.
    refused: bool,
}

impl<E: std::error::Error> From<E> for NoProbe {
    fn from(error: E) -> Self {
        Self { why: error.to_string(), refused: false }
    }
}

/// Starts a launcher of our own for its probe, in a directory that is gone afterwards.
fn probe(program: Option<PathBuf>, policy: Option<PathBuf>) -> Result<Host, NoProbe> {
    let program = program.map_or_else(launcher::beside_this_program, Ok)?;
    let directory = Scratch::make(&std::env::temp_dir())
        .map_err(|error| NoProbe { why: format!("no scratch directory: {error}"), refused: false })?;
    let path = directory.0.canonicalize()?;
    // Not a pipe: nobody has to read while the launcher writes.
    let said = rustix::fs::memfd_create("launcher-words", MemfdFlags::CLOEXEC)?;
    let words = said.try_clone()?;
    // Must come before the runtime: a descriptor is inheritable for a moment.
    let mut spawned = launcher::spawn(&program, words.into(), |socket| {
        let mut options = Options::new(socket, path, Vec::new());
        options.spares = 0;
        options.policy = policy;
        options
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let connection = spawned.connection;
    let probed = runtime.block_on(async {
        let launcher = Launcher::start(connection).await?;
        let probed = launcher.probe().await;
        launcher.close();
        probed
    });
    drop(runtime);
    // Its end follows that of its connection.
    let refused = spawned.child.wait().is_ok_and(|status| status.code() == Some(launcher::CONFIGURATION));
    let said = tail(&File::from(said));
    let (before, reason) = match &probed {
        Ok(_) => (said.as_str(), None),
        Err(_) => last_words(&said),
    };
    // As if the launcher had written it there.
    eprint!("{before}");
    probed.map_err(|error| NoProbe { why: reason.unwrap_or_else(|| error.to_string()), refused })
}

/// The end of what the launcher has said: more of it is told to nobody.
fn tail(said: &File) -> String {
    let end = said.metadata().map_or(0, |found| found.len());
    let begin = end.saturating_sub(MOST_SAID);
    let mut bytes = Vec::new();
    let mut reader = said;
    // What cannot be read back was not said; the error of the connection is told then.
    let _ = reader.seek(SeekFrom::Start(begin)).and_then(|_| reader.take(MOST_SAID).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a launcher said before its last words, and those: from the last line on that begins with its name.
fn last_words(said: &str) -> (&str, Option<String>) {
    let name = format!("{}: ", launcher::PROGRAM);
    let begins = |at: &usize| *at == 0 || said.as_bytes().get(at - 1) == Some(&b'\n');
    let last = said.rmatch_indices(&name).map(|(at, _)| at).find(begins);
    last.map_or((said, None), |at| (&said[..at], Some(said[at + name.len()..].trim_end().to_owned())))
}

/// A private directory, removed with the value.
struct Scratch(PathBuf);

impl Scratch {
    fn make(within: &Path) -> io::Result<Self> {
        let path = within.join(format!("plugvisor-examine-{}", std::process::id()));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left of it is in the directory of temporary files.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The report. `uid` starts the supervisor and `owner` is whom it becomes. A supervisor that runs shows the plugin
/// directories that it `holds`: it may not be allowed to reach them by their paths any more. Blocks.
fn report(
    config: &Config,
    features: &Host,
    uid: u32,
    owner: Option<Owner>,
    holds: Option<&[Arc<PluginDirectory>]>,
) -> ExamineHostResponse {
    let control = |probed: &Probed| {
        let (works, why, fix) = match &probed.state {
            ProbeState::Works(how) => (how.clone(), String::new(), String::new()),
            ProbeState::Lacking { why, fix } => (String::new(), why.clone(), fix.clone()),
        };
        let allowed = config.supervisor.allow_degraded.contains(&probed.control);
        HostControl { name: probed.control.to_string(), works, why, fix, allowed }
    };
    let level = |probed: &ProbedLevel| HostLevel {
        name: probed.level.as_str().to_owned(),
        gaps: probed.lacking.iter().map(|lacking| gap(lacking, &config.supervisor.allow_degraded)).collect(),
    };
    let uses = owner.map_or(uid, |owner| owner.uid);
    let setting = |key: &str| format!("{key} in {}", config.place());
    let mut places = Vec::new();
    match &config.file {
        Some(file) => places.push(place(CONFIGURATION, file, "read and valid", None)),
        None => places.push(place(CONFIGURATION, Path::new(&*config.place()), "not there: the defaults hold", None)),
    }
    let runtime = &config.supervisor.runtime_directory;
    let used = [("runtime directory", runtime), ("state directory", &config.supervisor.state_directory)];
    if holds.is_some() {
        places.extend(used.map(|(name, path)| place(name, path, "in use by this supervisor", None)));
        places.push(place("log directory", &config.log_directory(), "in use by this supervisor", None));
    } else {
        places.push(runtime_place(runtime, uid, owner, &config.place()));
        places.push(writable(used[1].0, used[1].1, uses, 0o022, &setting("[supervisor] state_directory")));
        if config.logs.files.files > 0 {
            places.push(writable("log directory", &config.log_directory(), uses, 0o022, &setting("[logs] directory")));
        }
    }
    let mut sources = Vec::new();
    for directory in &config.directories {
        let held = holds.iter().copied().flatten().find(|held| held.is(directory)).cloned();
        let opened = held.map_or_else(|| PluginDirectory::open(directory).map(Arc::new), Ok);
        places.push(match opened.and_then(|opened| opened.look()) {
            Ok(Found { candidates, strays }) => {
                let bundles = if candidates.len() == 1 { "bundle" } else { "bundles" };
                let mut detail = format!("{} {bundles}, tier {}", candidates.len(), directory.tier);
                if !strays.is_empty() {
                    detail.push_str(&format!("; without a plugin.json, and so no bundles: {}", strays.join(", ")));
                }
                sources.extend(candidates);
                place("plugin directory", &directory.path, &detail, None)
            }
            Err(error) => {
                place("plugin directory", &directory.path, "", Some((error.to_string(), error.fix().to_owned())))
            }
        });
    }
    places.extend(addresses::places(config, &sources, holds.is_some()));
    let system = rustix::system::uname();
    ExamineHostResponse {
        uid,
        user: if owner.is_some() { config.supervisor.user.clone() } else { String::new() },
        kernel: format!("{} {}", system.sysname().to_string_lossy(), system.release().to_string_lossy()),
        controls: features.controls.iter().map(control).collect(),
        levels: features.levels.iter().map(level).collect(),
        places,
        running: holds.is_some(),
    }
}

fn gap(lacking: &Lacking, allowed: &BTreeSet<Control>) -> LevelGap {
    let Lacking { control, why, fix, may_be_allowed } = lacking;
    LevelGap {
        control: control.map(|control| control.to_string()).unwrap_or_default(),
        why: why.clone(),
        fix: fix.clone(),
        allowed: *may_be_allowed && control.is_some_and(|control| allowed.contains(&control)),
        may_be_allowed: *may_be_allowed,
    }
}

fn place(name: &str, path: &Path, detail: &str, trouble: Option<(String, String)>) -> HostPlace {
    let (trouble, fix) = trouble.unwrap_or_default();
    HostPlace { name: name.to_owned(), path: path.display().to_string(), detail: detail.to_owned(), trouble, fix }
}

/// The runtime directory: the starter's own. A sticky one that the user whom root becomes may write to is what an earlier
/// start by root has left.
fn runtime_place(path: &Path, uid: u32, owner: Option<Owner>, configuration: &str) -> HostPlace {
    let key = format!("[supervisor] runtime_directory in {configuration}");
    if let Err(error) = runtime_directory::check_length(path) {
        let fix = format!("set {key} to a shorter path");
        return place("runtime directory", path, "", Some((error.to_string(), fix)));
    }
    let left = fs::symlink_metadata(path)
        .is_ok_and(|found| found.mode() & 0o1000 != 0 && owner.is_some_and(|owner| owner.gid == found.gid()));
    writable("runtime directory", path, uid, if left { 0o002 } else { 0o022 }, &key)
}

/// A directory that `uid` must be able to write to, or to make; `foreign` are the mode's bits that nobody else may have,
/// and `key` is what names another one, and where.
fn writable(name: &str, path: &Path, uid: u32, foreign: u32, key: &str) -> HostPlace {
    let fix = || format!("create it for user {uid} with mode 0700, or set {key}");
    match fs::symlink_metadata(path) {
        Ok(found) if !found.is_dir() => place(name, path, "", Some(("it is no directory".to_owned(), fix()))),
        // Root's own, empty, is handed over at the start.
        Ok(found) if found.uid() != uid && found.uid() != 0 => {
            place(name, path, "", Some((format!("it belongs to user {}, not to user {uid}", found.uid()), fix())))
        }
        Ok(found) if found.mode() & foreign != 0 => {
            place(name, path, "", Some(("others may write to it".to_owned(), format!("chmod 0700 {}", path.display()))))
        }
        Ok(_) => match access(path) {
            Ok(()) => place(name, path, "there", None),
            Err(error) => place(name, path, "", Some((error.to_string(), fix()))),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let above = path.ancestors().skip(1).find(|above| above.exists()).unwrap_or(Path::new("/"));
            match access(above) {
                Ok(()) => place(name, path, "will be made", None),
                Err(error) => {
                    let why = format!("it does not exist and cannot be made in {}: {error}", above.display());
                    place(name, path, "", Some((why, fix())))
                }
            }
        }
        Err(error) => place(name, path, "", Some((error.to_string(), fix()))),
    }
}

/// Whether this process may make files there; the kernel's own answer, a read-only mount included.
fn access(path: &Path) -> io::Result<()> {
    use rustix::fs::{Access, AtFlags, CWD, accessat};
    Ok(accessat(CWD, path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_begin_with_the_launchers_name() {
        let said = "plugvisor-launcher: one\nplugvisor-launcher: the file has 2 problems:\n  line 1: a\n  line 2: plugvisor-launcher: b\n";
        let (before, reason) = last_words(said);
        assert_eq!(before, "plugvisor-launcher: one\n");
        assert_eq!(reason.as_deref(), Some("the file has 2 problems:\n  line 1: a\n  line 2: plugvisor-launcher: b"));
        assert_eq!(last_words("Killed\n"), ("Killed\n", None));
        assert_eq!(last_words(""), ("", None));
    }

    #[test]
    fn only_the_end_of_what_is_said_is_kept() {
        let mut said = tempfile::tempfile().unwrap();
        let most = usize::try_from(MOST_SAID).unwrap();
        io::Write::write_all(&mut said, &[b'a'; 100]).unwrap();
        io::Write::write_all(&mut said, &vec![b'b'; most]).unwrap();
        assert_eq!(tail(&said), "b".repeat(most));
    }
}
