//! The launcher's command line, for both sides: the starter writes it, the launcher reads it.
//!
//! In the embedded default this is the launcher's whole policy: it is fixed before the starter drops its privileges, and
//! nothing that comes through the socket later can widen it.

use std::{
    ffi::{OsStr, OsString},
    io,
    ops::RangeInclusive,
    os::{
        fd::{BorrowedFd, RawFd},
        unix::{ffi::OsStrExt, process::CommandExt as _},
    },
    path::{Component, Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use plugvisor_package::{PluginName, TrustTier, VariableName};
use rustix::io::FdFlags;

use crate::protocol::{Control, Tier};

/// The uids that plugins get when the starter names none: the part of the uid space that systemd's `UIDS-GIDS` lists as
/// unused, so that neither people, services, nor containers are met there.
pub const DEFAULT_UIDS: RangeInclusive<u32> = 1_879_048_192..=1_879_113_727;

/// The uids of plugins that are traced, in no service manager's range either: a trace knows no book of who has which uid, and
/// the kernel counts processes, signals and watches by uid, whatever the namespace.
pub const TRACED_UIDS: RangeInclusive<u32> = 1_879_113_728..=1_879_179_263;

/// The size of all bundles in the store together when the starter names none.
pub const DEFAULT_STORE_BYTES: u64 = 4 << 30;

/// How many bundles the store holds when the starter names no number.
pub const DEFAULT_STORE_BUNDLES: u32 = 256;

/// How long an import may take when the starter names no time.
pub const DEFAULT_IMPORT_TIME: Duration = Duration::from_mins(2);

/// What the launcher may do. Written as flags by [`Options::to_args`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// How the supervisor comes.
    pub supervisor: Supervisor,
    /// `--uid-range A-B`: uids for plugins, used when the launcher is root; never holding 0.
    pub uids: RangeInclusive<u32>,
    /// `--cgroup-root NAME`: the group below the launcher's own in each hierarchy in which each launch gets a child.
    pub cgroup_root: String,
    /// `--bundle-root TIER=DIR`, repeatable: bundles whose files were imported from beneath DIR have this tier.
    pub bundle_roots: Vec<BundleRoot>,
    /// `--store DIR`: where bundles are kept, absolute, writable by root alone on the whole way. Without it they are kept
    /// in memory, for the launcher's life.
    pub store: Option<PathBuf>,
    /// `--store-bytes N`: the size of all bundles together.
    pub store_bytes: u64,
    /// `--store-bundles N`: how many bundles.
    pub store_bundles: u32,
    /// `--import-seconds N`: how long one import may take.
    pub import_time: Duration,
    /// `--policy FILE`: what the administrator approved, see `docs/adr/0004`. It must belong to the launcher's user, and
    /// nobody else may write it. Read anew when it changes.
    pub policy: Option<PathBuf>,
    /// `--config-root DIR`: where plugins' configuration directories are, `DIR/NAME`. As root it, and all on the way to it,
    /// must be root's alone.
    pub config_root: Option<PathBuf>,
    /// `--data-root DIR`: where plugins' data directories are, `DIR/NAME`, made when they are needed. The same holds.
    pub data_root: Option<PathBuf>,
    /// `--env PLUGIN=NAME`, repeatable: a variable of the operator's that this plugin may be given. Its value comes with the
    /// launch.
    pub variables: Vec<Variable>,
    /// `--max-plugins N`: how many may run at once.
    pub max_plugins: u32,
    /// `--spares N`: how many children are made ready ahead of launches, so that these are quick; used when the launcher
    /// is root. Each costs a process, a network namespace and a group in each cgroup hierarchy. 0 to 16.
    pub spares: u32,
    /// `--runtime-directory DIR`: an existing private directory in which the launcher makes `launcher/` for its
    /// sockets. Absolute.
    pub runtime_directory: PathBuf,
    /// `--trace-fd N`: launches are traced by the process that started the launcher, over this inherited connection: in place
    /// of a filter, it answers for every system call. Weaker walls than any level's own, so that no launcher that listens, and
    /// none that a service manager started, takes it; nor can anything that comes over a socket ask for it.
    pub trace: Option<RawFd>,
    /// `--without CONTROL`, repeatable: a wall that is left out of every launch, so that the escape suite can show that the
    /// attempts which it holds would succeed. Only a build for development knows it: in a release build it is an unknown
    /// flag, and nothing reads this field.
    pub without: Vec<Control>,
}

/// A directory of bundles, and what the operator says of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BundleRoot {
    /// The tier of what was imported from it.
    pub tier: Tier,
    /// Absolute.
    pub path: PathBuf,
}

/// A variable that a plugin may be given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Which plugin.
    pub plugin: PluginName,
    /// The variable's name.
    pub name: VariableName,
}

/// How the supervisor comes to the launcher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Supervisor {
    /// `--socket-fd N`: by the inherited connection, and when it closes, everything ends. 0 (standard input) is the
    /// easiest to hand over; 1 and 2 are refused.
    Inherited(RawFd),
    /// By a socket that the launcher makes, one supervisor at a time, and another may come when it is gone.
    Listen(Listen),
}

/// Where the launcher listens, for whom, and how long it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listen {
    /// `--listen PATH`: where the socket is made, absolute, in a directory that only root or the launcher's own user can
    /// write to. A socket from systemd (`LISTEN_FDS`) is used instead of making one; then the path is for people.
    pub path: PathBuf,
    /// `--socket-fd N` beside `--listen`: the connection of the first supervisor, which started the launcher and so need
    /// not wait for the path. Its uid is that of the starter, not the one below.
    pub first: Option<RawFd>,
    /// `--supervisor-uid UID`: who may connect, by `SO_PEERCRED`. Nobody else, not even root. A name is looked up in
    /// `/etc/passwd`, where systemd-sysusers puts the users of services.
    pub uid: u32,
    /// `--linger SECONDS` or `--linger forever`: how long plugins are kept without a supervisor; then the launcher ends,
    /// and they with it. 0, the default, ends at once.
    pub linger: Linger,
}

/// How long the launcher goes on without a supervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linger {
    /// So long. Whole seconds on the command line.
    For(Duration),
    /// Until it is told to end: for a service of its own.
    Forever,
}

/// Why a command line was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    /// A flag that does not exist.
    #[error(
        "unknown flag {0:?}; the flags are --socket-fd, --listen, --supervisor-uid, --linger, --uid-range, --cgroup-root, --bundle-root, --store, --store-bytes, --store-bundles, --import-seconds, --policy, --config-root, --data-root, --env, --max-plugins, --spares, --runtime-directory and --trace-fd"
    )]
    Unknown(String),
    /// A flag without its value.
    #[error("{0} needs a value")]
    NoValue(&'static str),
    /// A flag given twice that may be given once.
    #[error("{0} was given twice")]
    Twice(&'static str),
    /// A value that does not fit its flag.
    #[error("{flag}: {value:?} is refused: {why}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What was given.
        value: String,
        /// What it must be.
        why: &'static str,
    },
    /// A required flag is missing.
    #[error("{0} is required")]
    Missing(&'static str),
    /// A flag that a launcher of this kind never takes.
    #[error("{0} is for a launcher that its starter alone uses, not beside {1}")]
    Beside(&'static str, &'static str),
    /// A flag that means nothing without another one.
    #[error("{0} means nothing without {1}")]
    Without(&'static str, &'static str),
}

const SOCKET: &str = "--socket-fd";
const LISTEN: &str = "--listen";
const SUPERVISOR: &str = "--supervisor-uid";
const LINGER: &str = "--linger";
/// The word for [`Linger::Forever`].
const FOREVER: &str = "forever";
const UIDS: &str = "--uid-range";
const CGROUP: &str = "--cgroup-root";
const BUNDLES: &str = "--bundle-root";
const STORE: &str = "--store";
const STORE_BYTES: &str = "--store-bytes";
const STORE_BUNDLES: &str = "--store-bundles";
const IMPORT: &str = "--import-seconds";
const POLICY: &str = "--policy";
const CONFIG: &str = "--config-root";
const DATA: &str = "--data-root";
const ENV: &str = "--env";
const MAX: &str = "--max-plugins";
/// See [`Options::spares`].
const SPARES: &str = "--spares";
/// Spares when the starter says nothing: for a few plugins that start together. Each is some 0.3 MiB.
const DEFAULT_SPARES: u32 = 4;
const RUNTIME: &str = "--runtime-directory";
const TRACE: &str = "--trace-fd";
/// See [`Options::without`].
const WITHOUT: &str = "--without";

impl Options {
    /// The defaults for what the starter seldom sets: [`DEFAULT_UIDS`], the cgroup `plugvisor-<pid of the starter>`, 64
    /// plugins.
    #[must_use]
    pub fn new(socket_fd: RawFd, runtime_directory: PathBuf, bundle_roots: Vec<BundleRoot>) -> Self {
        Self {
            supervisor: Supervisor::Inherited(socket_fd),
            uids: DEFAULT_UIDS,
            cgroup_root: format!("plugvisor-{}", std::process::id()),
            bundle_roots,
            store: None,
            store_bytes: DEFAULT_STORE_BYTES,
            store_bundles: DEFAULT_STORE_BUNDLES,
            import_time: DEFAULT_IMPORT_TIME,
            policy: None,
            config_root: None,
            data_root: None,
            variables: Vec::new(),
            max_plugins: 64,
            spares: DEFAULT_SPARES,
            runtime_directory,
            trace: None,
            without: Vec::new(),
        }
    }

    /// The directory of the listening socket, when it is beneath the runtime directory: then it is there for this
    /// launcher alone, and goes with it.
    #[must_use]
    pub fn door_directory(&self) -> Option<&Path> {
        let Supervisor::Listen(listen) = &self.supervisor else { return None };
        let parent = listen.path.parent()?;
        (parent != self.runtime_directory && parent.starts_with(&self.runtime_directory)).then_some(parent)
    }

    /// The arguments after the program's name.
    #[must_use]
    pub fn to_args(&self) -> Vec<OsString> {
        let Self {
            supervisor,
            uids,
            cgroup_root,
            bundle_roots,
            store,
            store_bytes,
            store_bundles,
            import_time,
            policy,
            config_root,
            data_root,
            variables,
            max_plugins,
            spares,
            runtime_directory,
            trace,
            without,
        } = self;
        let mut args: Vec<OsString> = Vec::new();
        let mut push = |flag: &str, value: &OsStr| args.extend([OsString::from(flag), value.to_owned()]);
        match supervisor {
            Supervisor::Inherited(fd) => push(SOCKET, fd.to_string().as_ref()),
            Supervisor::Listen(Listen { path, first, uid, linger }) => {
                push(LISTEN, path.as_os_str());
                if let Some(fd) = first {
                    push(SOCKET, fd.to_string().as_ref());
                }
                push(SUPERVISOR, uid.to_string().as_ref());
                match linger {
                    Linger::For(time) => push(LINGER, time.as_secs().to_string().as_ref()),
                    Linger::Forever => push(LINGER, FOREVER.as_ref()),
                }
            }
        }
        push(UIDS, format!("{}-{}", uids.start(), uids.end()).as_ref());
        push(CGROUP, cgroup_root.as_ref());
        push(MAX, max_plugins.to_string().as_ref());
        push(SPARES, spares.to_string().as_ref());
        push(RUNTIME, runtime_directory.as_os_str());
        if let Some(fd) = trace {
            push(TRACE, fd.to_string().as_ref());
        }
        for BundleRoot { tier, path } in bundle_roots {
            let mut value = OsString::from(TrustTier::from(*tier).as_str());
            value.push("=");
            value.push(path);
            push(BUNDLES, &value);
        }
        if let Some(store) = store {
            push(STORE, store.as_os_str());
        }
        push(STORE_BYTES, store_bytes.to_string().as_ref());
        push(STORE_BUNDLES, store_bundles.to_string().as_ref());
        push(IMPORT, import_time.as_secs().to_string().as_ref());
        if let Some(policy) = policy {
            push(POLICY, policy.as_os_str());
        }
        for (flag, root) in [(CONFIG, config_root), (DATA, data_root)] {
            if let Some(root) = root {
                push(flag, root.as_os_str());
            }
        }
        for Variable { plugin, name } in variables {
            push(ENV, format!("{plugin}={name}").as_ref());
        }
        for control in without {
            push(WITHOUT, control.as_str().as_ref());
        }
        args
    }

    /// Starts this launcher with this policy, and with the descriptors that it names, which it takes over. What it has to say
    /// goes to `words`.
    ///
    /// Must be called while the process has one thread: for a moment the descriptors are inheritable, and they stay so until
    /// they are closed.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(&self, program: &Path, named: &[BorrowedFd<'_>], words: Stdio) -> io::Result<Child> {
        for descriptor in named {
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        Command::new(program)
            .args(self.to_args())
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(words)
            // Ctrl-C on a terminal reaches the whole foreground group; plugins must outlive it by their drain.
            .process_group(0)
            .spawn()
    }

    /// Reads the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, OptionsError> {
        Self::parse_in(args, cfg!(debug_assertions))
    }

    /// The same, in a build for development or not.
    fn parse_in(args: impl IntoIterator<Item = OsString>, development: bool) -> Result<Self, OptionsError> {
        let mut args = args.into_iter();
        let (mut socket, mut listen, mut supervisor, mut linger) = (None, None, None, None);
        let (mut uids, mut cgroup, mut max, mut spares, mut runtime) = (None, None, None, None, None);
        let (mut bundle_roots, mut variables, mut without) = (Vec::new(), Vec::new(), Vec::new());
        let (mut config_root, mut data_root, mut trace) = (None, None, None);
        let (mut store, mut store_bytes, mut store_bundles, mut import, mut policy) = (None, None, None, None, None);
        while let Some(flag) = args.next() {
            let mut value = |flag| args.next().ok_or(OptionsError::NoValue(flag));
            match flag.to_str().unwrap_or_default() {
                SOCKET => once(SOCKET, &mut socket, parse_fd(SOCKET, &value(SOCKET)?)?)?,
                TRACE => once(TRACE, &mut trace, parse_fd(TRACE, &value(TRACE)?)?)?,
                LISTEN => once(LISTEN, &mut listen, parse_dir(LISTEN, &value(LISTEN)?)?)?,
                SUPERVISOR => once(SUPERVISOR, &mut supervisor, parse_uid(&value(SUPERVISOR)?)?)?,
                LINGER => once(LINGER, &mut linger, parse_linger(&value(LINGER)?)?)?,
                UIDS => once(UIDS, &mut uids, parse_uids(&value(UIDS)?)?)?,
                CGROUP => once(CGROUP, &mut cgroup, parse_group(&value(CGROUP)?)?)?,
                SPARES => once(SPARES, &mut spares, parse_spares(&value(SPARES)?)?)?,
                MAX => once(MAX, &mut max, parse_max(&value(MAX)?)?)?,
                RUNTIME => once(RUNTIME, &mut runtime, parse_dir(RUNTIME, &value(RUNTIME)?)?)?,
                BUNDLES => bundle_roots.push(parse_root(&value(BUNDLES)?)?),
                STORE => once(STORE, &mut store, parse_dir(STORE, &value(STORE)?)?)?,
                STORE_BYTES => once(STORE_BYTES, &mut store_bytes, parse_number(STORE_BYTES, &value(STORE_BYTES)?)?)?,
                STORE_BUNDLES => {
                    once(STORE_BUNDLES, &mut store_bundles, parse_number(STORE_BUNDLES, &value(STORE_BUNDLES)?)?)?;
                }
                IMPORT => once(IMPORT, &mut import, parse_number::<u32>(IMPORT, &value(IMPORT)?)?)?,
                POLICY => once(POLICY, &mut policy, parse_dir(POLICY, &value(POLICY)?)?)?,
                CONFIG => once(CONFIG, &mut config_root, parse_dir(CONFIG, &value(CONFIG)?)?)?,
                DATA => once(DATA, &mut data_root, parse_dir(DATA, &value(DATA)?)?)?,
                ENV => variables.push(parse_variable(&value(ENV)?)?),
                WITHOUT if development => without.push(parse_control(&value(WITHOUT)?)?),
                _ => return Err(OptionsError::Unknown(flag.to_string_lossy().into_owned())),
            }
        }
        if trace.is_some() && listen.is_some() {
            return Err(OptionsError::Beside(TRACE, LISTEN));
        }
        if trace.is_some() && trace == socket {
            return Err(OptionsError::Beside(TRACE, "a --socket-fd of the same number"));
        }
        let supervisor = match (socket, listen) {
            (None, None) => return Err(OptionsError::Missing("--socket-fd or --listen")),
            (Some(_), None) if supervisor.is_some() => return Err(OptionsError::Without(SUPERVISOR, LISTEN)),
            (Some(_), None) if linger.is_some() => return Err(OptionsError::Without(LINGER, LISTEN)),
            (Some(fd), None) => Supervisor::Inherited(fd),
            (first, Some(path)) => Supervisor::Listen(Listen {
                path,
                first,
                uid: supervisor.ok_or(OptionsError::Missing(SUPERVISOR))?,
                linger: linger.unwrap_or(Linger::For(Duration::ZERO)),
            }),
        };
        Ok(Self {
            supervisor,
            uids: uids.unwrap_or(DEFAULT_UIDS),
            cgroup_root: cgroup.ok_or(OptionsError::Missing(CGROUP))?,
            bundle_roots,
            store,
            store_bytes: store_bytes.unwrap_or(DEFAULT_STORE_BYTES),
            store_bundles: store_bundles.unwrap_or(DEFAULT_STORE_BUNDLES),
            import_time: import.map_or(DEFAULT_IMPORT_TIME, |seconds| Duration::from_secs(seconds.into())),
            policy,
            config_root,
            data_root,
            variables,
            max_plugins: max.unwrap_or(64),
            spares: spares.unwrap_or(DEFAULT_SPARES),
            runtime_directory: runtime.ok_or(OptionsError::Missing(RUNTIME))?,
            trace,
            without,
        })
    }
}

impl Options {
    /// A range of uids as `--uid-range` takes it.
    #[must_use]
    pub fn uid_range(text: &str) -> Option<RangeInclusive<u32>> {
        parse_uids(text.as_ref()).ok()
    }

    /// A group's name as `--cgroup-root` takes it.
    #[must_use]
    pub fn group_name(text: &str) -> Option<String> {
        parse_group(text.as_ref()).ok()
    }
}

fn once<T>(flag: &'static str, slot: &mut Option<T>, value: T) -> Result<(), OptionsError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(OptionsError::Twice(flag)),
    }
}

fn refuse(flag: &'static str, value: &OsStr, why: &'static str) -> OptionsError {
    OptionsError::Value { flag, value: value.to_string_lossy().into_owned(), why }
}

fn parse_fd(flag: &'static str, value: &OsStr) -> Result<RawFd, OptionsError> {
    let fd = value.to_str().and_then(|text| text.parse().ok()).filter(|fd| *fd == 0 || *fd > 2);
    fd.ok_or_else(|| refuse(flag, value, "it must be 0 or a descriptor's number above 2"))
}

fn parse_uid(value: &OsStr) -> Result<u32, OptionsError> {
    let text = value.to_str().unwrap_or_default();
    if text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_') {
        let users = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        return uid_of(text, &users).ok_or_else(|| refuse(SUPERVISOR, value, "/etc/passwd has no such user"));
    }
    // u32::MAX is nobody's, and 65534 is what unmapped ids look like.
    let uid = text.parse().ok().filter(|uid| ![65534, u32::MAX].contains(uid));
    uid.ok_or_else(|| refuse(SUPERVISOR, value, "it must be a user's name, or a uid other than 65534 and 4294967295"))
}

/// The third field of the user's line (passwd(5)).
fn uid_of(name: &str, users: &str) -> Option<u32> {
    let line = users.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split(':').nth(1)?.parse().ok()
}

fn parse_linger(value: &OsStr) -> Result<Linger, OptionsError> {
    if value == FOREVER {
        return Ok(Linger::Forever);
    }
    let seconds = value.to_str().and_then(|text| text.parse::<u32>().ok());
    let seconds =
        seconds.ok_or_else(|| refuse(LINGER, value, "it must be a whole number of seconds, or \"forever\""))?;
    Ok(Linger::For(Duration::from_secs(seconds.into())))
}

fn parse_uids(value: &OsStr) -> Result<RangeInclusive<u32>, OptionsError> {
    let bounds = value.to_str().and_then(|text| text.split_once('-'));
    let bounds = bounds.and_then(|(a, b)| Some((a.parse::<u32>().ok()?, b.parse::<u32>().ok()?)));
    match bounds {
        // u32::MAX is "no change" to setresuid, and 65534 is what unmapped ids look like.
        Some((a, b)) if a > 0 && a <= b && b < u32::MAX && !(a..=b).contains(&65534) => Ok(a..=b),
        _ => Err(refuse(UIDS, value, "it must be FIRST-LAST with neither 0, 65534 nor 4294967295 inside")),
    }
}

fn parse_group(value: &OsStr) -> Result<String, OptionsError> {
    let fits = |text: &&str| {
        (1..=64).contains(&text.len())
            && !text.starts_with('.')
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    let name = value.to_str().filter(fits).map(str::to_owned);
    name.ok_or_else(|| refuse(CGROUP, value, "it must be one name of 1 to 64 letters, digits, '-', '_' or '.'"))
}

fn parse_root(value: &OsStr) -> Result<BundleRoot, OptionsError> {
    let wrong = || refuse(BUNDLES, value, "it must be TIER=DIR, where TIER is one of the trust tiers");
    let bytes = value.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
    let (tier, path) = (&bytes[..at], OsStr::from_bytes(&bytes[at + 1..]));
    let tiers = [Tier::Quarantined, Tier::Untrusted, Tier::Community, Tier::Verified, Tier::Internal];
    let tier = tiers.into_iter().find(|known| TrustTier::from(*known).as_str().as_bytes() == tier).ok_or_else(wrong)?;
    Ok(BundleRoot { tier, path: parse_dir(BUNDLES, path)? })
}

fn parse_variable(value: &OsStr) -> Result<Variable, OptionsError> {
    let wrong = || refuse(ENV, value, "it must be PLUGIN=NAME, where NAME is a variable that a plugin may be given");
    let (plugin, name) = value.to_str().and_then(|text| text.split_once('=')).ok_or_else(wrong)?;
    match (plugin.parse(), name.parse()) {
        (Ok(plugin), Ok(name)) => Ok(Variable { plugin, name }),
        _ => Err(wrong()),
    }
}

fn parse_number<T: std::str::FromStr + PartialOrd + From<u8>>(
    flag: &'static str,
    value: &OsStr,
) -> Result<T, OptionsError> {
    let number = value.to_str().and_then(|text| text.parse::<T>().ok()).filter(|number| *number >= T::from(1));
    number.ok_or_else(|| refuse(flag, value, "it must be a whole number above 0"))
}

fn parse_max(value: &OsStr) -> Result<u32, OptionsError> {
    let max = value.to_str().and_then(|text| text.parse().ok()).filter(|max| (1..=1024).contains(max));
    max.ok_or_else(|| refuse(MAX, value, "it must be a number from 1 to 1024"))
}

fn parse_spares(value: &OsStr) -> Result<u32, OptionsError> {
    let spares = value.to_str().and_then(|text| text.parse().ok()).filter(|spares| *spares <= 16);
    spares.ok_or_else(|| refuse(SPARES, value, "it must be a number from 0 to 16"))
}

fn parse_control(value: &OsStr) -> Result<Control, OptionsError> {
    let control = Control::ALL.into_iter().find(|control| value == control.as_str());
    control.ok_or_else(|| refuse(WITHOUT, value, "it must be the name of a control"))
}

fn parse_dir(flag: &'static str, value: &OsStr) -> Result<PathBuf, OptionsError> {
    let path = Path::new(value);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain && value.len() <= 1024 && !value.as_bytes().contains(&0) {
        Ok(path.to_owned())
    } else {
        Err(refuse(flag, value, "it must be an absolute path without '..'"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, OptionsError> {
        Options::parse(args.iter().map(OsString::from))
    }

    #[test]
    fn what_is_written_is_read_back() {
        let options = Options {
            uids: 5000..=5999,
            max_plugins: 3,
            spares: 5,
            store: Some("/var/lib/s".into()),
            store_bytes: 5 << 30,
            store_bundles: 7,
            import_time: Duration::from_secs(9),
            policy: Some("/etc/p.toml".into()),
            config_root: Some("/etc/c".into()),
            data_root: Some("/var/d".into()),
            variables: vec![Variable { plugin: "a".parse().expect("a name"), name: "TZ".parse().expect("one") }],
            trace: None,
            ..Options::new(
                9,
                "/run/plugvisor".into(),
                vec![
                    BundleRoot { tier: Tier::Verified, path: "/srv/a b=c".into() },
                    BundleRoot { tier: Tier::Internal, path: "/opt/plugins".into() },
                ],
            )
        };
        assert_eq!(Options::parse(options.to_args()), Ok(options.clone()));
        let traced = Options { trace: Some(10), ..options.clone() };
        assert_eq!(Options::parse(traced.to_args()), Ok(traced));
        for linger in [Linger::For(Duration::ZERO), Linger::For(Duration::from_secs(30)), Linger::Forever] {
            for first in [None, Some(9)] {
                let listen = Listen { path: "/run/plugvisor/launcher.sock".into(), first, uid: 990, linger };
                let options = Options { supervisor: Supervisor::Listen(listen), ..options.clone() };
                assert_eq!(Options::parse(options.to_args()), Ok(options));
            }
        }
    }

    #[test]
    fn a_user_is_found_by_its_whole_name() {
        let users = "root:x:0:0:root:/root:/bin/sh\nplug:x:7:7::/:\nplugvisor:x:998:997:a b:/:/usr/sbin/nologin\nbad\n";
        assert_eq!(uid_of("plugvisor", users), Some(998));
        assert_eq!(uid_of("plug", users), Some(7));
        assert_eq!(uid_of("plugv", users), None);
        assert_eq!(uid_of("bad", users), None);
    }

    #[test]
    fn only_a_build_for_development_leaves_a_wall_out() {
        let base = ["--socket-fd", "3", "--cgroup-root", "p", "--runtime-directory", "/run/p", "--without", "seccomp"];
        let args = || base.iter().map(OsString::from);
        assert_eq!(Options::parse_in(args(), false), Err(OptionsError::Unknown(WITHOUT.to_owned())));
        let options = Options::parse_in(args(), true).expect("parses");
        assert_eq!(options.without, [Control::Seccomp]);
        assert_eq!(Options::parse_in(options.to_args(), true), Ok(options));
        assert_eq!(Options::parse(args()).is_ok(), cfg!(debug_assertions));
        let unknown = base[..7].iter().chain(&["doors"]).map(OsString::from);
        assert!(matches!(Options::parse_in(unknown, true), Err(OptionsError::Value { .. })));
    }

    #[test]
    fn a_launcher_that_listens_traces_nothing() {
        let listening =
            ["--listen", "/run/l", "--supervisor-uid", "5", "--cgroup-root", "p", "--runtime-directory", "/r"];
        assert!(parse(&listening).is_ok());
        let traced: Vec<&str> = listening.iter().copied().chain(["--trace-fd", "4"]).collect();
        assert_eq!(parse(&traced), Err(OptionsError::Beside(TRACE, LISTEN)));
        let first: Vec<&str> = traced.iter().copied().chain(["--socket-fd", "3"]).collect();
        assert_eq!(parse(&first), Err(OptionsError::Beside(TRACE, LISTEN)));
    }

    #[test]
    fn each_wrong_flag_is_named() {
        let base = ["--socket-fd", "3", "--cgroup-root", "p", "--runtime-directory", "/run/p"];
        assert!(parse(&base).is_ok());
        for (extra, named) in [
            (["--uid-range", "0-5"], "--uid-range"),
            (["--uid-range", "9-5"], "--uid-range"),
            (["--uid-range", "60000-70000"], "--uid-range"),
            (["--max-plugins", "0"], "--max-plugins"),
            (["--spares", "17"], "--spares"),
            (["--bundle-root", "/srv"], "--bundle-root"),
            (["--bundle-root", "root=/srv"], "--bundle-root"),
            (["--bundle-root", "verified=relative"], "--bundle-root"),
            (["--bundle-root", "verified=/a/../b"], "--bundle-root"),
            (["--store", "relative"], "--store"),
            (["--store-bytes", "0"], "--store-bytes"),
            (["--store-bundles", "-1"], "--store-bundles"),
            (["--import-seconds", "soon"], "--import-seconds"),
            (["--policy", "p.toml"], "--policy"),
            (["--config-root", "c"], "--config-root"),
            (["--data-root", "/a/../b"], "--data-root"),
            (["--env", "TZ"], "--env"),
            (["--env", "A=TZ"], "--env"),
            (["--env", "a=LD_PRELOAD"], "--env"),
            (["--socket-fd", "4"], "--socket-fd"),
            (["--trace-fd", "3"], "--trace-fd"),
            (["--trace-fd", "2"], "--trace-fd"),
            (["--verbose", "1"], "--verbose"),
            (["--listen", "/run/p/launcher.sock"], "--supervisor-uid"),
            (["--supervisor-uid", "5"], "--supervisor-uid"),
            (["--linger", "5"], "--linger"),
        ] {
            let args: Vec<&str> = base.iter().copied().chain(extra).collect();
            let error = parse(&args).expect_err(extra[1]).to_string();
            assert!(error.contains(named), "{error}");
        }
        for group in ["", "..", "a/b", "a b"] {
            assert!(parse(&["--socket-fd", "3", "--cgroup-root", group, "--runtime-directory", "/r"]).is_err());
        }
        assert_eq!(parse(&["--socket-fd"]), Err(OptionsError::NoValue("--socket-fd")));
        assert_eq!(parse(&base[2..]), Err(OptionsError::Missing("--socket-fd or --listen")));
        let listen = ["--listen", "/run/l", "--cgroup-root", "p", "--runtime-directory", "/run/p"];
        assert_eq!(parse(&listen), Err(OptionsError::Missing("--supervisor-uid")));
        for (extra, named) in [
            (["--supervisor-uid", "65534"], "--supervisor-uid"),
            (["--supervisor-uid", "-1"], "--supervisor-uid"),
            (["--supervisor-uid", "no:such:user"], "--supervisor-uid"),
            (["--linger", "-1"], "--linger"),
            (["--linger", "always"], "--linger"),
            (["--listen", "relative"], "--listen"),
        ] {
            let args: Vec<&str> = base[2..].iter().copied().chain(extra).collect();
            let error = parse(&args).expect_err(extra[1]).to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
