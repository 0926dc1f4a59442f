//! Where the supervisor's socket for local applications is.
//!
//! Knows the rules for the runtime directory, which `plugvisord` follows too; opens nothing.

use std::{
    env, fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// The environment variable that names the socket itself and overrides the rules.
pub const CALLS_VARIABLE: &str = "PLUGVISOR_CALLS";

const SOCKET_NAME: &str = "calls.sock";

/// The directory that would hold the socket cannot be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// Another user owns the directory in `/tmp`, so whoever listens there is not our supervisor.
    #[error(
        "{} belongs to user {owner}, not to you (user {expected}), so its sockets cannot be trusted; \
         remove it, or set XDG_RUNTIME_DIR or {CALLS_VARIABLE}", path.display()
    )]
    ForeignDirectory {
        /// The directory.
        path: PathBuf,
        /// The user id that owns it.
        owner: u32,
        /// The user id of this process.
        expected: u32,
    },
    /// The directory cannot be examined.
    #[error("cannot examine {}: {source}", path.display())]
    Unreadable {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// The path of `calls.sock`: `PLUGVISOR_CALLS` when set, else `/run/plugvisor/calls.sock` for root,
/// `$XDG_RUNTIME_DIR/plugvisor/calls.sock` for others, and `/tmp/plugvisor-<uid>/calls.sock` without `XDG_RUNTIME_DIR`.
///
/// The file need not exist. Fails when the directory in `/tmp` is another user's.
pub fn default_calls_socket() -> Result<PathBuf, PlaceError> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = variable(CALLS_VARIABLE) {
        return Ok(path);
    }
    let uid = rustix::process::geteuid().as_raw();
    let directory = runtime_directory(uid, variable("XDG_RUNTIME_DIR").as_deref());
    if directory.starts_with("/tmp") {
        check_owner(&directory, uid)?;
    }
    Ok(directory.join(SOCKET_NAME))
}

fn runtime_directory(uid: u32, xdg: Option<&Path>) -> PathBuf {
    match (uid, xdg) {
        (0, _) => PathBuf::from("/run/plugvisor"),
        (_, Some(xdg)) => xdg.join("plugvisor"),
        (uid, None) => PathBuf::from(format!("/tmp/plugvisor-{uid}")),
    }
}

/// `/tmp` is writable by all, so a stranger could have made the directory first and be listening in it.
fn check_owner(path: &Path, expected: u32) -> Result<(), PlaceError> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.uid() == expected => Ok(()),
        Ok(found) => Err(PlaceError::ForeignDirectory { path: path.into(), owner: found.uid(), expected }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(PlaceError::Unreadable { path: path.into(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_others_and_those_without_a_session_each_have_a_place() {
        assert_eq!(runtime_directory(0, Some(Path::new("/run/user/0"))), Path::new("/run/plugvisor"));
        assert_eq!(runtime_directory(7, Some(Path::new("/run/user/7"))), Path::new("/run/user/7/plugvisor"));
        assert_eq!(runtime_directory(7, None), Path::new("/tmp/plugvisor-7"));
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mine = fs::metadata(directory.path()).unwrap().uid();
        check_owner(directory.path(), mine).unwrap();
        check_owner(&directory.path().join("missing"), mine).unwrap();
        let refused = check_owner(directory.path(), mine + 1).unwrap_err().to_string();
        assert!(refused.contains("cannot be trusted"), "{refused}");
    }
}
