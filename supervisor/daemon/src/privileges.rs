//! Giving up root, once, before any thread or runtime exists.

use nix::unistd::{Uid, User, getresgid, getresuid, setgroups, setresgid, setresuid};

use crate::runtime_directory::Owner;

/// Why privileges could not be given up. The supervisor does not go on.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The user does not exist.
    #[error("[supervisor] user = {0:?}: this host has no such user; create it, or name another unprivileged one")]
    NoUser(String),
    /// The user is root by another name.
    #[error("[supervisor] user = {0:?} has uid or gid 0; name an unprivileged user")]
    Root(String),
    /// The system refused a step.
    #[error("cannot become the user {user:?}: {step} failed: {source}; start plugvisord as that user instead")]
    Refused {
        /// Whom.
        user: String,
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        source: nix::Error,
    },
    /// Something of root was left.
    #[error("after becoming {user:?} the process still has {left}; not going on")]
    Left {
        /// Whom.
        user: String,
        /// What was left.
        left: String,
    },
}

/// Looks the user up.
pub fn find(user: &str) -> Result<Owner, PrivilegeError> {
    let found = User::from_name(user)
        .map_err(|source| PrivilegeError::Refused { user: user.to_owned(), step: "looking it up", source })?
        .ok_or_else(|| PrivilegeError::NoUser(user.to_owned()))?;
    if found.uid.is_root() || found.gid.as_raw() == 0 {
        return Err(PrivilegeError::Root(user.to_owned()));
    }
    Ok(Owner { uid: found.uid.as_raw(), gid: found.gid.as_raw() })
}

/// Becomes `owner` for good, and verifies it by reading back and by trying to return.
///
/// Must be called while the process has one thread.
pub fn drop_to(user: &str, owner: Owner) -> Result<(), PrivilegeError> {
    let refused = |step| move |source| PrivilegeError::Refused { user: user.to_owned(), step, source };
    let left = |left: String| Err(PrivilegeError::Left { user: user.to_owned(), left });
    let (uid, gid) = (Uid::from_raw(owner.uid), nix::unistd::Gid::from_raw(owner.gid));
    setgroups(&[]).map_err(refused("setgroups"))?;
    setresgid(gid, gid, gid).map_err(refused("setresgid"))?;
    setresuid(uid, uid, uid).map_err(refused("setresuid"))?;
    // Nothing this process may ever execute gets more than it has.
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| refused("no_new_privs")(nix::Error::from_raw(error.raw_os_error())))?;

    let uids = getresuid().map_err(refused("getresuid"))?;
    let gids = getresgid().map_err(refused("getresgid"))?;
    if [uids.real, uids.effective, uids.saved] != [uid; 3] {
        return left(format!("the uids {uids:?}"));
    }
    if [gids.real, gids.effective, gids.saved] != [gid; 3] {
        return left(format!("the gids {gids:?}"));
    }
    if setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_ok() {
        return left("the way back to root".to_owned());
    }
    // The ambient, permitted and effective sets go with the uid (capabilities(7)); trust, but read.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let value = status.lines().find_map(|line| line.strip_prefix(set)?.strip_prefix(':'));
        if value.map(str::trim).is_none_or(|value| value.bytes().any(|digit| digit != b'0')) {
            return left(format!("capabilities ({set}:{})", value.unwrap_or(" unreadable")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_users_and_root_are_refused() {
        assert!(matches!(find("no-such-user-of-plugvisor"), Err(PrivilegeError::NoUser(_))));
        assert!(matches!(find("root"), Err(PrivilegeError::Root(_))));
    }
}
