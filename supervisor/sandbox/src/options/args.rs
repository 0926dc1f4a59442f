//! The flags: written and read, each with what it takes.

use std::{
    ffi::{OsStr, OsString},
    ops::RangeInclusive,
    os::{fd::RawFd, unix::ffi::OsStrExt},
    path::{Component, Path, PathBuf},
    time::Duration,
};

use plugvisor_package::TrustTier;

use super::{
    BundleRoot, DEFAULT_IMPORT_TIME, DEFAULT_SPARES, DEFAULT_STORE_BUNDLES, DEFAULT_STORE_BYTES, DEFAULT_UIDS, Linger,
    Listen, Options, OptionsError, Supervisor, Variable,
};
use crate::protocol::{Control, Tier};

const SOCKET: &str = "--socket-fd";
pub(super) const LISTEN: &str = "--listen";
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
const RUNTIME: &str = "--runtime-directory";
pub(super) const TRACE: &str = "--trace-fd";
/// See [`Options::without`].
pub(super) const WITHOUT: &str = "--without";

impl Options {
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

    /// Reads the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, OptionsError> {
        Self::parse_in(args, cfg!(debug_assertions))
    }

    /// The same, in a build for development or not.
    pub(super) fn parse_in(args: impl IntoIterator<Item = OsString>, development: bool) -> Result<Self, OptionsError> {
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
pub(super) fn uid_of(name: &str, users: &str) -> Option<u32> {
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
