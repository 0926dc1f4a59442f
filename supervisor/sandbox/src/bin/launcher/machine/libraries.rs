//! What a program of a bundle needs of the host: its interpreter, and the libraries that it and they name.
//!
//! Files are read as their loader reads them, as far as is needed to know names (`DT_NEEDED`, `DT_RUNPATH`). What cannot
//! be understood needs nothing: then the loader in the guest says what it misses. Everything is read behind the plugin's
//! own walls.

use std::{
    cell::Cell,
    collections::BTreeSet,
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
};

use super::archive::{Contents, Executable, Node};

/// How much is read and followed. What is beyond is not there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Files that are looked into.
    pub(super) files: usize,
    /// Bytes that are read of all of them together.
    pub(super) bytes: u64,
    /// Bytes of one table or text.
    pub(super) table: usize,
    /// Headers of one file, and entries of its dynamic section.
    pub(super) entries: usize,
    /// Libraries that one file names, and the places that it names for them.
    pub(super) names: usize,
    pub(super) places: usize,
}

impl Default for Bounds {
    /// The largest programs in use name some two hundred libraries, and have string tables of a few hundred KiB. An
    /// interpreter's own library has some thousand files.
    fn default() -> Self {
        Self { files: 20_000, bytes: 64 << 20, table: 1 << 20, entries: 4096, names: 512, places: 16 }
    }
}

/// The longest first line of a script that the kernel reads.
const MOST_LINE: usize = 256;

/// Puts everything into the contents that its files need. `places` are where libraries are looked for.
pub(super) fn complete(contents: &mut Contents, places: &[PathBuf], bounds: &Bounds) {
    let bytes = Cell::new(bounds.bytes);
    // What is taken last is followed first: the bundle's before what `runtime` brings, which may be more than is looked into.
    let mut left = contents.files();
    left.reverse();
    let mut seen: BTreeSet<PathBuf> = BTreeSet::new();
    while let Some(path) = left.pop() {
        if seen.len() >= bounds.files || !seen.insert(path.clone()) {
            continue;
        }
        let needs = Needs::of(&path, bounds, &bytes);
        let mut add = |found: PathBuf| {
            if !contents.has(&found) {
                let executable = fs::metadata(&found).is_ok_and(|found| found.permissions().mode() & 0o111 != 0);
                let executable = if executable { Executable::Yes } else { Executable::No };
                contents.put(&found, Node::Copy { from: found.clone(), executable });
            }
            left.push(found);
        };
        for program in needs.programs.into_iter().filter(|program| program.is_absolute() && program.is_file()) {
            add(program);
        }
        for library in &needs.libraries {
            let own = needs.places.iter().map(|place| origin(place, &path));
            let all = own.chain(places.iter().cloned()).map(|place| place.join(library));
            if let Some(found) = all.into_iter().find(|candidate| candidate.is_file()) {
                add(found);
            }
        }
    }
}

/// A place that a file names, in which `$ORIGIN` is where the file itself is.
fn origin(place: &str, file: &Path) -> PathBuf {
    let own = file.parent().map(|parent| parent.display().to_string()).unwrap_or_default();
    PathBuf::from(place.replace("${ORIGIN}", &own).replace("$ORIGIN", &own))
}

/// What one file names.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    programs: Vec<PathBuf>,
    libraries: Vec<String>,
    places: Vec<String>,
}

impl Needs {
    /// `left` is how many bytes may be read.
    fn of(path: &Path, bounds: &Bounds, left: &Cell<u64>) -> Self {
        let Ok(file) = File::open(path) else { return Self::default() };
        let mut head = Vec::new();
        if (&file).take(MOST_LINE as u64).read_to_end(&mut head).is_err() {
            return Self::default();
        }
        if let Some(line) = head.strip_prefix(b"#!") {
            return Self { programs: script(line), ..Self::default() };
        }
        Elf { file: &file, bounds, left }.needs(&head).unwrap_or_default()
    }
}

/// The programs in a script's first line: its interpreter, and where that is env(1), what env looks for.
fn script(line: &[u8]) -> Vec<PathBuf> {
    let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split_whitespace();
    let Some(first) = words.next().map(PathBuf::from) else { return Vec::new() };
    let mut programs = vec![first.clone()];
    if first.file_name().is_some_and(|name| name == "env")
        && let Some(name) = words.find(|word| !word.starts_with('-'))
    {
        let places = ["/usr/local/bin", "/usr/bin", "/bin"];
        programs.extend(places.map(|place| Path::new(place).join(name)).into_iter().find(|path| path.is_file()));
    }
    programs
}

/// A program or library for x86-64.
struct Elf<'a> {
    file: &'a File,
    bounds: &'a Bounds,
    /// Bytes that may still be read.
    left: &'a Cell<u64>,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_STRSZ: u64 = 10;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;

/// One program header: type, offset, address, size in the file.
type Header = (u32, u64, u64, u64);

impl Elf<'_> {
    fn needs(&self, head: &[u8]) -> Option<Needs> {
        // ELF, of 64 bits, in little endian.
        if !head.starts_with(b"\x7fELF\x02\x01") {
            return None;
        }
        let (offset, entry, count) = (number(head, 32)?, u64::from(short(head, 54)?), u64::from(short(head, 56)?));
        let Bounds { entries: most, names, places, .. } = *self.bounds;
        let table = self.read(offset, entry.checked_mul(count)?)?;
        let headers: Vec<Header> = table
            .chunks_exact(usize::try_from(entry).ok().filter(|entry| *entry >= 56)?)
            .take(most)
            .filter_map(|header| Some((word(header, 0)?, number(header, 8)?, number(header, 16)?, number(header, 32)?)))
            .collect();
        let mut needs = Needs::default();
        if let Some((_, offset, _, size)) = headers.iter().find(|(kind, ..)| *kind == PT_INTERP) {
            let text = self.read(*offset, *size)?;
            needs.programs.push(PathBuf::from(until_zero(&text)?));
        }
        let Some((_, offset, _, size)) = headers.iter().find(|(kind, ..)| *kind == PT_DYNAMIC) else {
            return Some(needs);
        };
        let dynamic = self.read(*offset, *size)?;
        let entries: Vec<(u64, u64)> = dynamic
            .chunks_exact(16)
            .take(most)
            .filter_map(|entry| Some((number(entry, 0)?, number(entry, 8)?)))
            .collect();
        let value = |tag| entries.iter().find(|(found, _)| *found == tag).map(|(_, value)| *value);
        let strings = self.read(in_file(&headers, value(DT_STRTAB)?)?, value(DT_STRSZ)?)?;
        let text = |at: u64| until_zero(strings.get(usize::try_from(at).ok()?..)?);
        for (tag, at) in entries.iter().copied() {
            match tag {
                DT_NEEDED if needs.libraries.len() < names => needs.libraries.push(text(at)?),
                DT_RPATH | DT_RUNPATH => {
                    let room = places - needs.places.len();
                    needs.places.extend(text(at)?.split(':').take(room).map(str::to_owned));
                }
                _ => {}
            }
        }
        // A name with a slash is a path, and not looked for.
        needs.libraries.retain(|library| !library.is_empty() && !library.contains('/'));
        needs
            .places
            .retain(|place| place.starts_with('/') || place.starts_with("$ORIGIN") || place.starts_with("${ORIGIN}"));
        Some(needs)
    }

    fn read(&self, offset: u64, size: u64) -> Option<Vec<u8>> {
        self.left.set(self.left.get().checked_sub(size)?);
        let size = usize::try_from(size).ok().filter(|size| *size <= self.bounds.table)?;
        let mut bytes = vec![0; size];
        self.file.read_exact_at(&mut bytes, offset).ok()?;
        Some(bytes)
    }
}

/// Where in the file lies what is loaded at this address.
fn in_file(headers: &[Header], address: u64) -> Option<u64> {
    headers.iter().filter(|(kind, ..)| *kind == PT_LOAD).find_map(|(_, offset, start, size)| {
        let into = address.checked_sub(*start).filter(|into| into < size)?;
        offset.checked_add(into)
    })
}

fn until_zero(bytes: &[u8]) -> Option<String> {
    let text = bytes.split(|byte| *byte == 0).next()?;
    Some(std::str::from_utf8(text).ok()?.to_owned())
}

fn number(of: &[u8], at: usize) -> Option<u64> {
    of.get(at..)?.first_chunk().copied().map(u64::from_le_bytes)
}

fn word(of: &[u8], at: usize) -> Option<u32> {
    of.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn short(of: &[u8], at: usize) -> Option<u16> {
    of.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needs_within(path: &Path, bounds: &Bounds) -> Needs {
        Needs::of(path, bounds, &Cell::new(bounds.bytes))
    }

    fn needs_of(path: &Path) -> Needs {
        needs_within(path, &Bounds::default())
    }

    /// Each bound by itself, on this test program, which names more than one of each.
    #[test]
    fn what_is_beyond_a_bound_is_not_there() {
        let own = std::env::current_exe().expect("a path");
        let all = needs_of(&own);
        assert!(all.libraries.len() > 1, "{all:?}");
        let bounds = Bounds::default();
        let one = needs_within(&own, &Bounds { names: 1, ..bounds });
        assert_eq!(one.libraries, all.libraries[..1]);
        for bounds in
            [Bounds { bytes: 100, ..bounds }, Bounds { table: 100, ..bounds }, Bounds { entries: 1, ..bounds }]
        {
            assert_eq!(needs_within(&own, &bounds).libraries, Vec::<String>::new(), "{bounds:?}");
        }
        let mut contents = Contents::default();
        contents.put(Path::new("/plugin/bin/a"), Node::Copy { from: own, executable: Executable::Yes });
        complete(&mut contents, &[PathBuf::from("/lib/x86_64-linux-gnu")], &Bounds { files: 0, ..bounds });
        assert_eq!(contents.files().len(), 1, "{:?}", contents.files());
    }

    #[test]
    fn places_are_counted_over_all_entries() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("library");
        fs::write(&path, with_places(40)).expect("writes");
        let most = Bounds::default().places;
        assert_eq!(needs_of(&path).places.len(), most);
        fs::write(&path, with_places(3)).expect("writes");
        assert_eq!(needs_of(&path).places, ["/a", "/b", "/a", "/b", "/a", "/b"]);
    }

    /// An ELF file with nothing but a dynamic section of so many `DT_RUNPATH`, each of two places.
    fn with_places(count: usize) -> Vec<u8> {
        let text = b"/a:/b\0";
        let dynamic: Vec<(u64, u64)> =
            (0..count).map(|_| (DT_RUNPATH, 0)).chain([(DT_STRTAB, 0), (DT_STRSZ, text.len() as u64)]).collect();
        let at = 64 + 2 * 56;
        let length = dynamic.len() as u64 * 16;
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32..40].copy_from_slice(&64_u64.to_le_bytes());
        bytes[54..58].copy_from_slice(&[56, 0, 2, 0]);
        for (kind, offset, size) in [(PT_LOAD, at + length, text.len() as u64), (PT_DYNAMIC, at, length)] {
            let mut header = [0; 56];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..16].copy_from_slice(&offset.to_le_bytes());
            header[32..40].copy_from_slice(&size.to_le_bytes());
            bytes.extend(header);
        }
        bytes.extend(dynamic.iter().flat_map(|(tag, value)| [tag.to_le_bytes(), value.to_le_bytes()].concat()));
        bytes.extend(text);
        bytes
    }

    /// This test program is one.
    #[test]
    fn a_program_names_its_interpreter_and_libraries() {
        let own = std::env::current_exe().expect("a path");
        let needs = needs_of(&own);
        assert!(needs.libraries.iter().any(|library| library.starts_with("libc.so")), "{needs:?}");
        assert_eq!(needs.programs.len(), 1, "{needs:?}");
        let mut contents = Contents::default();
        contents.put(Path::new("/plugin/bin/a"), Node::Copy { from: own, executable: Executable::Yes });
        let places: Vec<PathBuf> =
            ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64"].map(PathBuf::from).to_vec();
        complete(&mut contents, &places, &Bounds::default());
        assert!(contents.has(&needs.programs[0]), "its interpreter");
        assert!(contents.files().iter().any(|file| file.ends_with("libc.so.6")), "{:?}", contents.files());
    }

    #[test]
    fn a_script_names_its_interpreter() {
        assert_eq!(script(b"/bin/sh -e\nrest"), [PathBuf::from("/bin/sh")]);
        let by_env = script(b" /usr/bin/env -S sh\n");
        assert_eq!(by_env[0], PathBuf::from("/usr/bin/env"));
        assert!(by_env.len() == 2 && by_env[1].ends_with("sh"), "{by_env:?}");
        assert_eq!(script(b"\n"), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_broken_file_needs_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("file");
        let own = fs::read(std::env::current_exe().expect("a path")).expect("reads");
        for (length, at) in [(20, 0), (64, 40), (4096, 54), (4096, 56), (own.len().min(100_000), 32)] {
            let mut bytes = own[..length].to_vec();
            bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = 0xff);
            fs::write(&path, bytes).expect("writes");
            assert!(needs_of(&path).libraries.is_empty(), "{length} {at}");
        }
        assert_eq!(needs_of(directory.path()), Needs::default());
    }
}
