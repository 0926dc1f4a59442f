//! What a guest's kernel knows of a directory's contents, by the numbers that it was given for them. Pure.
//!
//! A number stands for a file by its names and not by a descriptor: there may be many. A file that has two names has one
//! number, and a name behind which another file is found gets another. The table is bounded: when it is full, the number of
//! a file that nobody has open is given up, and a kernel that uses it is told ESTALE, after which it looks the name up anew.
//! What a hostile guest says of numbers that it was not given is an error to that guest.

use std::{
    collections::{HashMap, VecDeque},
    ffi::{CStr, CString, OsStr},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};

use rustix::{
    fs::{FileType, Stat},
    io::Errno,
};

/// The root's number, which every kernel knows.
pub(super) const ROOT: u64 = 1;

/// The most that is known at once.
const MOST_NODES: usize = 32_768;
/// The deepest path.
const MOST_DEPTH: usize = 256;
/// The longest path in bytes, as the kernel has it.
const MOST_PATH: usize = 4096;

/// A name in a directory.
type Place = (u64, CString);

/// Something below the root.
#[derive(Debug)]
struct Node {
    file: File,
    /// Under which names it is known; none when it was removed and somebody still has it open.
    places: Vec<Place>,
    /// How often the kernel was told of it and has not forgotten it.
    known: u64,
    /// How many handles it has.
    open: usize,
}

/// Which file it is on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct File {
    device: u64,
    inode: u64,
    is_directory: bool,
    /// It has more names than one.
    has_names: bool,
}

impl From<&Stat> for File {
    fn from(stat: &Stat) -> Self {
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        Self { device: stat.st_dev, inode: stat.st_ino, is_directory, has_names: !is_directory && stat.st_nlink > 1 }
    }
}

impl File {
    const fn identity(self) -> (u64, u64) {
        (self.device, self.inode)
    }
}

#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_place: HashMap<Place, u64>,
    /// Of those that have, or had, several names.
    by_file: HashMap<(u64, u64), u64>,
    /// All of them and some that are gone, the longest known first.
    order: VecDeque<u64>,
    last: u64,
    most: usize,
}

impl Nodes {
    pub(super) fn new() -> Self {
        let (nodes, by_place, by_file, order) = (HashMap::new(), HashMap::new(), HashMap::new(), VecDeque::new());
        Self { nodes, by_place, by_file, order, last: ROOT, most: MOST_NODES }
    }

    /// Sees that there is room for one more, for who makes something that will have a number.
    pub(super) fn make_room(&mut self) -> Result<(), Errno> {
        for _ in 0..self.order.len() {
            if self.nodes.len() < self.most {
                return Ok(());
            }
            let Some(number) = self.order.pop_front() else { break };
            match self.nodes.get(&number) {
                None => {}
                // Below a directory there may be others, and a process that is in one never looks it up anew.
                Some(node) if node.file.is_directory || node.open > 0 => self.order.push_back(number),
                Some(_) => self.drop_node(number),
            }
        }
        if self.nodes.len() < self.most { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Another answer tells the kernel that this name has this file: its number.
    pub(super) fn tell(&mut self, directory: u64, name: &CStr, file: File) -> Result<u64, Errno> {
        let place = (directory, name.to_owned());
        let same = |node: &Node| node.file.identity() == file.identity() && node.file.is_directory == file.is_directory;
        if let Some(number) = self.by_place.get(&place).copied() {
            if let Some(node) = self.nodes.get_mut(&number).filter(|node| same(node)) {
                node.known = node.known.saturating_add(1);
                if file.has_names {
                    self.by_file.insert(file.identity(), number);
                }
                return Ok(number);
            }
            self.remove(directory, name);
        }
        let other = self.by_file.get(&file.identity()).copied().filter(|_| file.has_names);
        if let Some(number) = other
            && let Some(node) = self.nodes.get_mut(&number).filter(|node| same(node) && !node.places.is_empty())
        {
            node.known = node.known.saturating_add(1);
            node.places.push(place.clone());
            self.by_place.insert(place, number);
            return Ok(number);
        }
        self.make_room()?;
        self.last = self.last.checked_add(1).ok_or(Errno::NFILE)?;
        self.by_place.insert(place.clone(), self.last);
        if file.has_names {
            self.by_file.insert(file.identity(), self.last);
        }
        self.nodes.insert(self.last, Node { file, places: vec![place], known: 1, open: 0 });
        if self.order.len() >= 2 * self.most {
            self.order.retain(|number| self.nodes.contains_key(number));
        }
        self.order.push_back(self.last);
        Ok(self.last)
    }

    /// Its file is about to have another name.
    pub(super) fn will_have_names(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.file.has_names = true;
            self.by_file.insert(node.file.identity(), number);
        }
    }

    /// It has one handle more.
    pub(super) fn opened(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.open += 1;
        }
    }

    /// It has one less.
    pub(super) fn closed(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.open = node.open.saturating_sub(1);
        }
    }

    /// The kernel has forgotten so many answers about it.
    pub(super) fn forget(&mut self, number: u64, answers: u64) {
        let Some(node) = self.nodes.get_mut(&number) else { return };
        node.known = node.known.saturating_sub(answers);
        if node.known == 0 {
            self.drop_node(number);
        }
    }

    fn drop_node(&mut self, number: u64) {
        let Some(node) = self.nodes.remove(&number) else { return };
        for place in &node.places {
            self.by_place.remove(place);
        }
        if self.by_file.get(&node.file.identity()) == Some(&number) {
            self.by_file.remove(&node.file.identity());
        }
    }

    /// What had this name has it no more.
    pub(super) fn remove(&mut self, directory: u64, name: &CStr) {
        self.take(directory, name);
    }

    /// Takes a name from the number that has it.
    fn take(&mut self, directory: u64, name: &CStr) -> Option<u64> {
        let place = (directory, name.to_owned());
        let number = self.by_place.remove(&place)?;
        if let Some(node) = self.nodes.get_mut(&number) {
            node.places.retain(|known| *known != place);
        }
        Some(number)
    }

    /// What had the first name has the second one from now on, in place of what had that.
    pub(super) fn rename(&mut self, from: (u64, &CStr), to: (u64, &CStr)) {
        // Two names of one file stay both as they are (rename(2)).
        let number = |place: (u64, &CStr)| self.by_place.get(&(place.0, place.1.to_owned())).copied();
        let (moved, there) = (number(from), number(to));
        if moved.is_some() && moved == there {
            return;
        }
        self.remove(to.0, to.1);
        if let Some(number) = self.take(from.0, from.1) {
            self.put(number, to);
        }
    }

    /// Each of two has the other's name from now on.
    pub(super) fn exchange(&mut self, one: (u64, &CStr), other: (u64, &CStr)) {
        let taken = [one, other].map(|(directory, name)| self.take(directory, name));
        for (number, place) in taken.into_iter().zip([other, one]) {
            if let Some(number) = number {
                self.put(number, place);
            }
        }
    }

    fn put(&mut self, number: u64, (directory, name): (u64, &CStr)) {
        let place = (directory, name.to_owned());
        if let Some(node) = self.nodes.get_mut(&number) {
            node.places.push(place.clone());
            self.by_place.insert(place, number);
        }
    }

    /// In which directory it is, and under which name; `None` for the root.
    pub(super) fn place(&self, number: u64) -> Result<Option<(u64, &CStr)>, Errno> {
        if number == ROOT {
            return Ok(None);
        }
        let node = self.nodes.get(&number).ok_or(Errno::STALE)?;
        node.places.last().map(|(directory, name)| Some((*directory, name.as_c_str()))).ok_or(Errno::STALE)
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

    const DIRECTORY: File = File { device: 1, inode: 2, is_directory: true, has_names: false };

    const fn file(inode: u64) -> File {
        File { device: 1, inode, is_directory: false, has_names: false }
    }

    fn directory(nodes: &mut Nodes, of: u64, name: &CStr) -> u64 {
        nodes.tell(of, name, DIRECTORY).expect("a number")
    }

    fn path(nodes: &Nodes, number: u64) -> Result<String, Errno> {
        nodes.path(number).map(|path| path.display().to_string())
    }

    #[test]
    fn a_number_follows_what_it_stands_for() {
        let mut nodes = Nodes::new();
        let a = directory(&mut nodes, ROOT, c"a");
        let b = nodes.tell(a, c"b", file(3)).expect("a number");
        assert_eq!(nodes.tell(a, c"b", file(3)), Ok(b));
        assert_eq!((path(&nodes, b), path(&nodes, ROOT)), (Ok("a/b".into()), Ok(String::new())));
        nodes.rename((ROOT, c"a"), (ROOT, c"c"));
        assert_eq!(path(&nodes, b), Ok("c/b".into()));
        let other = directory(&mut nodes, ROOT, c"a");
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
    fn a_file_has_one_number_and_a_new_file_another() {
        let mut nodes = Nodes::new();
        let one = nodes.tell(ROOT, c"one", file(3)).expect("a number");
        nodes.will_have_names(one);
        let twice = File { has_names: true, ..file(3) };
        assert_eq!(nodes.tell(ROOT, c"two", twice), Ok(one));
        nodes.rename((ROOT, c"one"), (ROOT, c"two"));
        nodes.remove(ROOT, c"one");
        assert_eq!(path(&nodes, one), Ok("two".into()));
        // Somebody put another one in its place, on the host.
        let new = nodes.tell(ROOT, c"two", file(4)).expect("a number");
        assert_ne!(new, one);
        assert_eq!((path(&nodes, one), path(&nodes, new)), (Err(Errno::STALE), Ok("two".into())));
        // One that has no name any more is not met again under another.
        assert_ne!(nodes.tell(ROOT, c"three", twice), Ok(one));
    }

    #[test]
    fn when_it_is_full_what_nobody_has_open_is_given_up() {
        let mut nodes = Nodes { most: 3, ..Nodes::new() };
        let first = directory(&mut nodes, ROOT, c"d");
        let open = nodes.tell(first, c"open", file(3)).expect("a number");
        nodes.opened(open);
        let closed = nodes.tell(first, c"closed", file(4)).expect("a number");
        let more = nodes.tell(first, c"more", file(5)).expect("there is room again");
        assert_eq!(path(&nodes, closed), Err(Errno::STALE));
        assert_eq!((path(&nodes, open), path(&nodes, more)), (Ok("d/open".into()), Ok("d/more".into())));
        nodes.forget(closed, 1);
        nodes.opened(more);
        assert_eq!(nodes.make_room(), Err(Errno::NFILE));
        nodes.closed(more);
        assert_eq!(nodes.make_room(), Ok(()));
        assert_eq!(path(&nodes, more), Err(Errno::STALE));
        // However many come and go, what is remembered of their order is bounded.
        for inode in 10..100 {
            let number = nodes.tell(first, c"x", file(inode)).expect("a number");
            nodes.forget(number, 1);
        }
        assert!(nodes.order.len() <= 7, "{}", nodes.order.len());
    }

    #[test]
    fn paths_are_bounded() {
        let mut nodes = Nodes { most: 300, ..Nodes::new() };
        let mut deepest = ROOT;
        for _ in 0..300 {
            deepest = directory(&mut nodes, deepest, c"d");
        }
        assert_eq!(nodes.tell(ROOT, c"more", file(3)), Err(Errno::NFILE));
        assert_eq!(nodes.path(deepest), Err(Errno::NAMETOOLONG));
        // Names that lead in a circle lead nowhere.
        let first = directory(&mut nodes, ROOT, c"d");
        nodes.rename((ROOT, c"d"), (deepest, c"d"));
        assert_eq!(nodes.path(first), Err(Errno::NAMETOOLONG));
        assert_eq!(nodes.path(ROOT).as_deref(), Ok(Path::new("")));
    }
}
