//! What a guest's kernel knows of a directory's contents, by the numbers that it was given for them. Pure.
//!
//! A number stands for a name in a directory, not for a file that is held open: there may be many. The table is bounded,
//! and what a hostile guest says of numbers that it was not given is an error to that guest.

use std::{
    collections::HashMap,
    ffi::{CStr, CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

use rustix::io::Errno;

/// The root's number, which every kernel knows.
pub(super) const ROOT: u64 = 1;

/// The most that is known at once.
const MOST_NODES: usize = 32_768;
/// The deepest path.
const MOST_DEPTH: usize = 256;
/// The longest path in bytes, as the kernel has it.
const MOST_PATH: usize = 4096;

/// Something below the root.
#[derive(Debug)]
struct Node {
    /// In which directory and under which name it is; `None` when it was removed and somebody still has it open.
    place: Option<(u64, CString)>,
    /// How often the kernel was told of it and has not forgotten it.
    known: u64,
}

#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_place: HashMap<(u64, CString), u64>,
    last: u64,
    most: usize,
}

impl Nodes {
    pub(super) fn new() -> Self {
        Self { nodes: HashMap::new(), by_place: HashMap::new(), last: ROOT, most: MOST_NODES }
    }

    /// Another answer tells the kernel of this name: its number.
    pub(super) fn tell(&mut self, directory: u64, name: &CStr) -> Result<u64, Errno> {
        let place = (directory, name.to_owned());
        if let Some(number) = self.by_place.get(&place).copied()
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.known = node.known.saturating_add(1);
            return Ok(number);
        }
        if self.nodes.len() >= self.most {
            return Err(Errno::NFILE);
        }
        self.last = self.last.checked_add(1).ok_or(Errno::NFILE)?;
        self.by_place.insert(place.clone(), self.last);
        self.nodes.insert(self.last, Node { place: Some(place), known: 1 });
        Ok(self.last)
    }

    /// The kernel has forgotten so many answers about it.
    pub(super) fn forget(&mut self, number: u64, answers: u64) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        node.known = node.known.saturating_sub(answers);
        if node.known == 0 {
            self.release(number);
            self.nodes.remove(&number);
        }
    }

    /// What had this name is removed.
    pub(super) fn remove(&mut self, directory: u64, name: &CStr) {
        if let Some(number) = self.by_place.remove(&(directory, name.to_owned()))
            && let Some(node) = self.nodes.get_mut(&number)
        {
            node.place = None;
        }
    }

    /// What had the first name has the second one from now on, in place of what had that.
    pub(super) fn rename(&mut self, from: (u64, &CStr), to: (u64, &CStr)) {
        self.remove(to.0, to.1);
        if let Some(number) = self.by_place.remove(&(from.0, from.1.to_owned())) {
            self.put(number, to);
        }
    }

    /// Each of two has the other's name from now on.
    pub(super) fn exchange(&mut self, one: (u64, &CStr), other: (u64, &CStr)) {
        let taken = [one, other].map(|(directory, name)| self.by_place.remove(&(directory, name.to_owned())));
        for (number, place) in taken.into_iter().zip([other, one]) {
            if let Some(number) = number {
                self.put(number, place);
            }
        }
    }

    fn put(&mut self, number: u64, (directory, name): (u64, &CStr)) {
        let place = (directory, name.to_owned());
        if let Some(node) = self.nodes.get_mut(&number) {
            node.place = Some(place.clone());
            self.by_place.insert(place, number);
        }
    }

    fn release(&mut self, number: u64) {
        if let Some(place) = self.nodes.get(&number).and_then(|node| node.place.as_ref()) {
            self.by_place.remove(place);
        }
    }

    /// In which directory it is, and under which name; `None` for the root.
    pub(super) fn place(&self, number: u64) -> Result<Option<(u64, &CStr)>, Errno> {
        if number == ROOT {
            return Ok(None);
        }
        let node = self.nodes.get(&number).ok_or(Errno::STALE)?;
        node.place.as_ref().map(|(directory, name)| Some((*directory, name.as_c_str()))).ok_or(Errno::STALE)
    }

    /// The path of a directory from the root on; empty for the root.
    pub(super) fn path(&self, mut number: u64) -> Result<PathBuf, Errno> {
        let mut names = Vec::new();
        let mut length = 0;
        while let Some((directory, name)) = self.place(number)? {
            length += name.count_bytes() + 1;
            if names.len() >= MOST_DEPTH || length >= MOST_PATH {
                return Err(Errno::NAMETOOLONG);
            }
            names.push(OsStr::from_bytes(name.to_bytes()));
            number = directory;
        }
        Ok(names.into_iter().rev().collect())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn path(nodes: &Nodes, number: u64) -> Result<String, Errno> {
        nodes.path(number).map(|path| path.display().to_string())
    }

    #[test]
    fn a_number_follows_what_it_stands_for() {
        let mut nodes = Nodes::new();
        let a = nodes.tell(ROOT, c"a").expect("a number");
        let b = nodes.tell(a, c"b").expect("a number");
        assert_eq!(nodes.tell(a, c"b"), Ok(b));
        assert_eq!((path(&nodes, b), path(&nodes, ROOT)), (Ok("a/b".into()), Ok(String::new())));
        nodes.rename((ROOT, c"a"), (ROOT, c"c"));
        assert_eq!(path(&nodes, b), Ok("c/b".into()));
        let other = nodes.tell(ROOT, c"a").expect("a number");
        assert_ne!(other, a);
        nodes.exchange((ROOT, c"a"), (ROOT, c"c"));
        assert_eq!((path(&nodes, b), path(&nodes, other)), (Ok("a/b".into()), Ok("c".into())));
        // What is removed keeps its number and has no place; its name may be given anew.
        nodes.rename((ROOT, c"c"), (a, c"b"));
        assert_eq!((path(&nodes, other), path(&nodes, b)), (Ok("a/b".into()), Err(Errno::STALE)));
        nodes.remove(a, c"b");
        assert_eq!(path(&nodes, other), Err(Errno::STALE));
        // It is forgotten when all answers are.
        nodes.forget(b, 1);
        assert!(nodes.nodes.contains_key(&b));
        nodes.forget(b, 1);
        assert!(!nodes.nodes.contains_key(&b));
        nodes.forget(ROOT, u64::MAX);
        nodes.forget(99, 1);
        assert_eq!(path(&nodes, 99), Err(Errno::STALE));
    }

    #[test]
    fn it_is_bounded() {
        let mut nodes = Nodes { most: 300, ..Nodes::new() };
        let mut deepest = ROOT;
        for _ in 0..300 {
            deepest = nodes.tell(deepest, c"d").expect("a number");
        }
        assert_eq!(nodes.tell(ROOT, c"more"), Err(Errno::NFILE));
        assert_eq!(nodes.path(deepest), Err(Errno::NAMETOOLONG));
        // Names that lead in a circle lead nowhere.
        let first = nodes.tell(ROOT, c"d").expect("it is known");
        nodes.rename((ROOT, c"d"), (deepest, c"d"));
        assert_eq!(nodes.path(first), Err(Errno::NAMETOOLONG));
        nodes.forget(deepest, 1);
        assert!(nodes.tell(ROOT, c"more").is_ok());
        assert_eq!(nodes.path(ROOT).as_deref(), Ok(Path::new("")));
    }
}
