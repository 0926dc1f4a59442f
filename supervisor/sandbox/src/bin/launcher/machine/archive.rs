//! The archive that a guest's kernel unpacks as its root: the "newc" format of cpio(5), uncompressed.
//!
//! The same files give the same bytes: names are sorted, everything is root's, times are 0. It is bounded.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory,
    /// A file of this file's bytes.
    Copy {
        from: PathBuf,
        executable: Executable,
    },
    /// A file of these bytes, root's alone.
    Bytes(Vec<u8>),
    /// The guest's first process.
    Init(&'static [u8]),
    Link(PathBuf),
    /// A character device.
    Device {
        major: u32,
        minor: u32,
    },
}

/// Whether a file may be executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Executable {
    Yes,
    No,
}

/// What will be in it.
#[derive(Debug, Default)]
pub(super) struct Contents {
    nodes: BTreeMap<PathBuf, Node>,
}

/// What a name takes beside its file's bytes, at most: 110 bytes of a head, and a name of 255 in a path.
const NAMED: u64 = 512;

/// The most that one directory may have in it, with everything below.
const MOST_ENTRIES: usize = 20_000;

impl Contents {
    /// Puts something at a path of the guest, and directories on the way to it. What is there already stays.
    pub(super) fn put(&mut self, path: &Path, node: Node) {
        let path = path.strip_prefix("/").unwrap_or(path);
        for parent in path.ancestors().skip(1).filter(|parent| !parent.as_os_str().is_empty()) {
            self.nodes.entry(parent.to_owned()).or_insert(Node::Directory);
        }
        self.nodes.entry(path.to_owned()).or_insert(node);
    }

    pub(super) fn has(&self, path: &Path) -> bool {
        self.nodes.contains_key(path.strip_prefix("/").unwrap_or(path))
    }

    /// Puts a file or a directory with everything in it at this path of the guest.
    pub(super) fn put_tree(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        self.put_all(from, to, Executable::Yes).map(drop)
    }

    /// The same of data: nothing of it may be executed, and it has so many bytes at most, with [`NAMED`] for each name.
    pub(super) fn put_data(&mut self, from: &Path, to: &Path, most: u64) -> io::Result<()> {
        let bytes = self.put_all(from, to, Executable::No)?;
        if bytes > most {
            let from = from.display();
            return Err(io::Error::other(format!(
                "{from} has {bytes} bytes, and at most {most} are copied into a machine"
            )));
        }
        Ok(())
    }

    /// Puts it, with programs as programs or not, and says how many bytes its files have.
    fn put_all(&mut self, from: &Path, to: &Path, programs: Executable) -> io::Result<u64> {
        let (mut left, mut bytes) = (vec![(from.to_owned(), to.to_owned())], 0_u64);
        while let Some((from, to)) = left.pop() {
            let found = fs::symlink_metadata(&from).map_err(|error| about(&from, &error))?;
            bytes = bytes.saturating_add(NAMED);
            if self.nodes.len() > MOST_ENTRIES {
                let from = from.display();
                return Err(io::Error::other(format!(
                    "there are more than {MOST_ENTRIES} files, counted up to {from}"
                )));
            }
            if found.is_dir() {
                self.put(&to, Node::Directory);
                let entries = fs::read_dir(&from).map_err(|error| about(&from, &error))?;
                for entry in entries {
                    let name = entry?.file_name();
                    left.push((from.join(&name), to.join(&name)));
                }
            } else if found.is_symlink() {
                self.put(&to, Node::Link(fs::read_link(&from)?));
            } else if found.is_file() {
                let executable = if found.permissions().mode() & 0o111 == 0 { Executable::No } else { programs };
                bytes = bytes.saturating_add(found.len());
                self.put(&to, Node::Copy { from, executable });
            }
        }
        Ok(bytes)
    }

    /// The files that are copied.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let from = |node: &Node| match node {
            Node::Copy { from, .. } => Some(from.clone()),
            Node::Directory | Node::Bytes(_) | Node::Init(_) | Node::Link(_) | Node::Device { .. } => None,
        };
        self.nodes.values().filter_map(from).collect()
    }

    /// Writes the archive, of at most so many bytes.
    pub(super) fn write(&self, to: &mut impl Write, most: u64) -> io::Result<()> {
        let mut archive = Archive { to, left: most, number: 0 };
        for (path, node) in &self.nodes {
            archive.node(path, node)?;
        }
        archive.entry(Path::new("TRAILER!!!"), 0, 0, (0, 0), &mut io::empty())
    }
}

/// The same with the path that it is about.
fn about(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const PLAIN: u32 = 0o100_644;
const PRIVATE: u32 = 0o100_600;
const LINK: u32 = 0o120_777;
const DEVICE: u32 = 0o020_600;

struct Archive<'a, W> {
    to: &'a mut W,
    left: u64,
    number: u32,
}

impl<W: Write> Archive<'_, W> {
    fn node(&mut self, path: &Path, node: &Node) -> io::Result<()> {
        let length = |bytes: &[u8]| bytes.len() as u64;
        match node {
            Node::Directory => self.entry(path, DIRECTORY, 0, (0, 0), &mut io::empty()),
            Node::Bytes(bytes) => self.entry(path, PRIVATE, length(bytes), (0, 0), &mut bytes.as_slice()),
            Node::Init(bytes) => self.entry(path, EXECUTABLE, length(bytes), (0, 0), &mut &**bytes),
            Node::Link(target) => {
                let target = target.as_os_str().as_encoded_bytes();
                self.entry(path, LINK, length(target), (0, 0), &mut &*target)
            }
            Node::Device { major, minor } => self.entry(path, DEVICE, 0, (*major, *minor), &mut io::empty()),
            Node::Copy { from, executable } => {
                let mut file = File::open(from).map_err(|error| about(from, &error))?;
                let mode = if *executable == Executable::Yes { EXECUTABLE } else { PLAIN };
                let size = file.metadata()?.len();
                self.entry(path, mode, size, (0, 0), &mut file)
            }
        }
    }

    fn entry(&mut self, path: &Path, mode: u32, size: u64, device: (u32, u32), bytes: &mut dyn Read) -> io::Result<()> {
        self.number += 1;
        let name = path.as_os_str().as_encoded_bytes();
        let Ok(small) = u32::try_from(size) else { return Err(io::ErrorKind::FileTooLarge.into()) };
        let named = u32::try_from(name.len() + 1).map_err(io::Error::other)?;
        let mut head = b"070701".to_vec();
        // Inode, mode, owner, group, links, time, size, two numbers each of its device and of what it is a device of, the
        // name's length, a sum that this format does not use.
        for field in [self.number, mode, 0, 0, 1, 0, small, 0, 0, device.0, device.1, named, 0] {
            write!(head, "{field:08x}")?;
        }
        head.extend_from_slice(name);
        head.push(0);
        head.resize(head.len().next_multiple_of(4), 0);
        let whole = (head.len() as u64).saturating_add(size.next_multiple_of(4));
        self.left = self.left.checked_sub(whole).ok_or_else(|| {
            io::Error::other("its files and the libraries that they need are more than its machine has room for")
        })?;
        self.to.write_all(&head)?;
        let copied = io::copy(&mut bytes.take(size), self.to)?;
        if copied != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let padding = usize::try_from(size.next_multiple_of(4) - size).unwrap_or(0);
        self.to.write_all(&[0; 3][..padding])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(contents: &Contents, most: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        contents.write(&mut bytes, most).map(|()| bytes)
    }

    #[test]
    fn the_same_files_give_the_same_bytes_whatever_their_order() {
        let nodes = [
            ("/plugin/bin/a", Node::Bytes(b"abc".to_vec())),
            ("/dev/console", Node::Device { major: 5, minor: 1 }),
            ("/lib", Node::Link("usr/lib".into())),
        ];
        let mut one = Contents::default();
        let mut other = Contents::default();
        nodes.iter().for_each(|(path, node)| one.put(Path::new(path), node.clone()));
        nodes.iter().rev().for_each(|(path, node)| other.put(Path::new(path), node.clone()));
        let bytes = written(&one, 1 << 20).expect("it fits");
        assert_eq!(bytes, written(&other, 1 << 20).expect("it fits"));
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        // Directories come before what is in them.
        let at = |name: &str| text.find(name).unwrap_or_else(|| panic!("{name} is missing"));
        assert!(at("plugin\0") < at("plugin/bin\0") && at("plugin/bin\0") < at("plugin/bin/a\0"));
        assert!(text.ends_with('\0') && text.contains("TRAILER!!!"));
        assert!(written(&one, bytes.len() as u64 - 1).is_err(), "one byte too few");
    }

    #[test]
    fn a_tree_is_copied_as_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("in")).expect("a directory");
        fs::write(directory.path().join("in/file"), "text").expect("writes");
        std::os::unix::fs::symlink("file", directory.path().join("in/link")).expect("links");
        let mut contents = Contents::default();
        contents.put_tree(directory.path(), Path::new("/plugin")).expect("reads");
        assert!(contents.has(Path::new("/plugin/in/link")));
        assert_eq!(contents.files(), [directory.path().join("in/file")]);
        let bytes = written(&contents, 4096).expect("it fits");
        assert!(bytes.windows(4).any(|window| window == b"text"));
    }

    #[test]
    fn data_are_bounded_and_not_executable() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        fs::write(&file, "text").expect("writes");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("chmod");
        let mode_of = |contents: &Contents| match contents.nodes.get(Path::new("data/file")) {
            Some(Node::Copy { executable, .. }) => *executable,
            other => panic!("{other:?}"),
        };
        let mut contents = Contents::default();
        contents.put_data(directory.path(), Path::new("/data"), 4 + 2 * NAMED).expect("it fits");
        assert_eq!(mode_of(&contents), Executable::No);
        let mut contents = Contents::default();
        contents.put_tree(directory.path(), Path::new("/data")).expect("reads");
        assert_eq!(mode_of(&contents), Executable::Yes);
        let error = Contents::default()
            .put_data(directory.path(), Path::new("/data"), 3 + 2 * NAMED)
            .expect_err("it does not fit");
        assert!(error.to_string().contains("has 1028 bytes, and at most 1027"), "{error}");
    }
}
