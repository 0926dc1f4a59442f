//! How many files the supervisor may have open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the soft limit to the hard one: every plugin takes several descriptors, every call and follower one, and the
/// soft limit of most hosts (1024) is there for programs that use select(2). Plugins get a limit of their own from the
/// launcher.
///
/// Without it the supervisor works, for fewer plugins and calls, so a refusal is only told.
pub fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return;
    }
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, ?current, ?maximum, "the limit on open files cannot be raised to its maximum");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let before = getrlimit(Resource::Nofile);
        // One less than the hard limit, so that no other test of this process runs out of files.
        let lower = before.maximum.map_or(1 << 20, |maximum| maximum - 1);
        setrlimit(Resource::Nofile, Rlimit { current: Some(lower), ..before }).unwrap();
        raise();
        assert_eq!(getrlimit(Resource::Nofile), Rlimit { current: before.maximum, ..before });
    }
}
