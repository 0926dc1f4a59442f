//! What a trace has seen, counted. It grows with what is different, not with how often it happened, and up to a bound.

use std::{collections::BTreeMap, net::SocketAddr};

use super::book::Kind;

/// The most different calls, files, and addresses that are kept apart.
const MOST: usize = 4096;

/// Everything that was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// The calls, by what is decided of them.
    pub calls: BTreeMap<Kind, Times>,
    /// The files that it named, by how.
    pub files: BTreeMap<FileUse, u64>,
    /// The sockets that it connected or bound.
    pub sockets: BTreeMap<SocketUse, u64>,
    /// Uses beyond the bound of the three above.
    pub uncounted: u64,
    /// Calls of which the memory that they point at could not be read: the process ended, or the pointer was wrong.
    pub unread: u64,
    /// Filters with a listener, which a trace refuses: they would answer in its place.
    pub listeners: u64,
}

/// How often a kind of call was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// How often.
    pub count: u64,
    /// The arguments of the first.
    pub first: [u64; 6],
}

/// A file that was named in a call.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileUse {
    /// What for.
    pub access: Access,
    /// Its path as the plugin sees it; `..` and links in it are not followed.
    pub path: String,
    /// Where there was such a file when it was named.
    pub place: Place,
}

/// What a file is named for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Access {
    /// To be read, or looked into.
    Read,
    /// To be written, made, removed or changed.
    Write,
    /// To be executed.
    Execute,
    /// To connect to the socket there.
    Connect,
}

impl Access {
    /// A word for it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Execute => "execute",
            Self::Connect => "connect",
        }
    }
}

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the plugin's own tree.
    Tree,
    /// Not in its tree; on this host's root file system, at the same path. Others are not looked into.
    Host,
    /// In neither.
    Nowhere,
}

/// An address of the network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SocketUse {
    /// It connected to it.
    Connect(SocketAddr),
    /// It bound it.
    Bind(SocketAddr),
    /// It connected to this name, which is no file's.
    Abstract(String),
}

impl Seen {
    pub(super) fn call(&mut self, kind: Kind, arguments: [u64; 6]) {
        // There are more numbers than calls, and whoever is traced may try them all.
        if self.calls.len() >= MOST && !self.calls.contains_key(&kind) {
            self.uncounted += 1;
            return;
        }
        self.calls.entry(kind).or_insert(Times { count: 0, first: arguments }).count += 1;
    }

    pub(super) fn file(&mut self, file: FileUse) {
        count(&mut self.files, file, &mut self.uncounted);
    }

    pub(super) fn socket(&mut self, socket: SocketUse) {
        count(&mut self.sockets, socket, &mut self.uncounted);
    }
}

fn count<K: Ord>(all: &mut BTreeMap<K, u64>, one: K, uncounted: &mut u64) {
    if all.len() >= MOST && !all.contains_key(&one) {
        *uncounted += 1;
        return;
    }
    *all.entry(one).or_insert(0) += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_has_a_bound() {
        let mut seen = Seen::default();
        for number in 0..MOST + 5 {
            let file = FileUse { access: Access::Read, path: format!("/{number}"), place: Place::Nowhere };
            seen.file(file);
        }
        seen.file(FileUse { access: Access::Read, path: "/1".to_owned(), place: Place::Nowhere });
        assert_eq!((seen.files.len(), seen.uncounted), (MOST, 5));
    }
}
