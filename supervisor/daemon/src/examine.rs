//! What this host and this user can do: every control of the walls, and every place that the supervisor needs.
//!
//! Controls are what the launcher found by using them; places are tried as the supervisor would use them, and left as
//! they were. Nothing here starts or stops a plugin.

mod configuration;

use std::{
    collections::BTreeSet,
    fs, io,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use plugvisor_package::PluginName;
use plugvisor_proto::admin::v1::{
    ExamineHostResponse, HostControl, HostLevel, HostPlace, LevelGap, Setting, ShowConfigurationResponse,
};
use plugvisor_sandbox::{
    options::Options,
    protocol::{Control, Host, Lacking, ProbeState, Probed, ProbedLevel},
};
use prost::Message as _;

use crate::{
    config::{Config, ConfigError, ListenConfig, Origin, Problem, Surroundings},
    discovery::{Found, PluginDirectory},
    ingress,
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
        (Ok(_), Some(policy)) => report.places.push(place("launcher policy", &policy, "read and valid", None)),
        (Ok(_), None) => {}
        (Err(error), Some(policy)) => {
            let fix = "if the launcher has said above what is wrong with its policy, correct that; else install plugvisord and \
                       plugvisor-launcher together";
            report.places.push(place("launcher policy", &policy, "", Some((error, fix.into()))));
        }
        (Err(error), None) => {
            let fix = "install plugvisord and plugvisor-launcher together";
            report.places.push(place("launcher", Path::new(launcher::PROGRAM), "", Some((error, fix.into()))));
        }
    }
    report
}

/// The place of that name.
const CONFIGURATION: &str = "configuration";

/// What an error says before it lists each problem.
fn first_line(error: &ConfigError) -> String {
    error.to_string().lines().next().unwrap_or_default().trim_end_matches(':').to_owned()
}

/// Starts a launcher of our own for its probe, in a directory that is gone afterwards.
fn probe(program: Option<PathBuf>, policy: Option<PathBuf>) -> Result<Host, String> {
    let program = program.map_or_else(launcher::beside_this_program, Ok).map_err(|error| error.to_string())?;
    let directory = Scratch::make(&std::env::temp_dir()).map_err(|error| format!("no scratch directory: {error}"))?;
    let path = directory.0.canonicalize().map_err(|error| error.to_string())?;
    // Must come before the runtime: a descriptor is inheritable for a moment.
    let mut spawned = launcher::spawn(&program, |socket| {
        let mut options = Options::new(socket, path, Vec::new());
        options.spares = 0;
        options.policy = policy;
        options
    })
    .map_err(|error| error.to_string())?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    let connection = spawned.connection;
    let probed = runtime.block_on(async {
        let launcher = Launcher::start(connection).await.map_err(|error| error.to_string())?;
        let probed = launcher.probe().await.map_err(|error| error.to_string());
        launcher.close();
        probed
    });
    drop(runtime);
    // Its end follows that of its connection.
    let _ = spawned.child.wait();
    probed
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
/// directories that it `holds`: it may not be allowed to reach them by their paths any more.
pub fn report(
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
                place("plugin directory", &directory.path, &detail, None)
            }
            Err(error) => {
                place("plugin directory", &directory.path, "", Some((error.to_string(), error.fix().to_owned())))
            }
        });
    }
    for (plugin, settings) in &config.plugins {
        let listen = settings.network.listen.iter();
        places.extend(listen.map(|listen| outer_address(plugin, listen, holds.is_some())));
    }
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

/// An address where others reach a plugin. Where no supervisor runs it is tried.
fn outer_address(plugin: &PluginName, listen: &ListenConfig, running: bool) -> HostPlace {
    let ListenConfig { address, port, max_connections, .. } = listen;
    let leads = format!("leads to port {port} of plugin {plugin}, {max_connections} connections at most");
    let trouble = if running { None } else { ingress::try_address(*address).err() };
    place("address", Path::new(&address.to_string()), &leads, trouble)
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
