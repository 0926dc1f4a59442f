//! What programs do with files that they keep, and expect of every file system.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink},
    },
    path::Path,
    ptr,
    time::{Duration, SystemTime},
};

/// More than one request carries, and no whole number of pages.
const LARGE: usize = 300_001;
/// More names than one answer has room for.
const MANY: usize = 300;

type Step = (&'static str, fn(&Path) -> io::Result<bool>);

/// Tries everything in a new directory, and says what was not as it should be, or `ok`.
pub(crate) fn keep(place: &str) -> String {
    let steps: [Step; 10] = [
        ("large", large),
        ("appended", appended),
        ("cut", cut),
        ("removed while open", removed),
        ("mapped", mapped),
        ("renamed over", renamed),
        ("named twice", named_twice),
        ("listed while emptied", listed),
        ("attributes", attributes),
        ("made durable", durable),
    ];
    let place = Path::new(place);
    if let Err(error) = fs::create_dir(place) {
        return format!("its directory: {error}");
    }
    let wrong = steps.iter().filter_map(|(name, step)| match step(place) {
        Ok(true) => None,
        Ok(false) => Some(format!("{name}: not as it should be")),
        Err(error) => Some(format!("{name}: {error}")),
    });
    let wrong: Vec<String> = wrong.collect();
    if wrong.is_empty() { "ok".to_owned() } else { wrong.join("; ") }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at % 251).unwrap_or(0)).collect()
}

fn large(place: &Path) -> io::Result<bool> {
    let (path, bytes) = (place.join("large"), pattern(LARGE));
    fs::write(&path, &bytes)?;
    let file = File::open(&path)?;
    let mut end = vec![0; 1000];
    file.read_exact_at(&mut end, LARGE as u64 - 1000)?;
    Ok(fs::read(&path)? == bytes && end == bytes[LARGE - 1000..])
}

fn appended(place: &Path) -> io::Result<bool> {
    let path = place.join("appended");
    let open = || OpenOptions::new().append(true).create(true).open(&path);
    let (mut one, mut other) = (open()?, open()?);
    for _ in 0..3 {
        one.write_all(b"1")?;
        other.write_all(b"2")?;
    }
    Ok(fs::read(&path)? == b"121212")
}

fn cut(place: &Path) -> io::Result<bool> {
    let path = place.join("cut");
    fs::write(&path, b"a longer text")?;
    fs::write(&path, b"short")?;
    let whole = fs::read(&path)?;
    let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
    file.set_len(2)?;
    file.set_len(4)?;
    file.seek(SeekFrom::Start(6))?;
    file.write_all(b"x")?;
    Ok(whole == b"short" && fs::read(&path)? == b"sh\0\0\0\0x")
}

fn removed(place: &Path) -> io::Result<bool> {
    let path = place.join("removed");
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    file.write_all(b"before")?;
    fs::remove_file(&path)?;
    fs::write(&path, b"another")?;
    file.write_all(b", after")?;
    let (length, links) = (file.metadata()?.len(), file.metadata()?.nlink());
    file.set_len(10)?;
    let mut text = String::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_string(&mut text)?;
    Ok((length, links, text.as_str()) == (13, 0, "before, af") && fs::read(&path)? == b"another")
}

fn mapped(place: &Path) -> io::Result<bool> {
    let path = place.join("mapped");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
    file.set_len(8192)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping of the file's whole length, which nothing else knows.
    let map = unsafe { libc::mmap(ptr::null_mut(), 8192, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
    if map == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    drop(file);
    let byte = map.cast::<u8>().wrapping_add(5000);
    // SAFETY: the byte lies in the mapping.
    unsafe { byte.write(7) };
    // SAFETY: the mapping is this one, and is not used afterwards.
    unsafe { libc::munmap(map, 8192) };
    Ok(fs::read(&path)?.iter().enumerate().all(|(at, byte)| *byte == if at == 5000 { 7 } else { 0 }))
}

fn renamed(place: &Path) -> io::Result<bool> {
    let (new, old) = (place.join("new"), place.join("old"));
    fs::write(&old, b"old")?;
    let mut reader = File::open(&old)?;
    fs::write(&new, b"new")?;
    fs::rename(&new, &old)?;
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    // A directory with something in it, whose files are known by their old paths.
    let (directory, moved) = (place.join("directory"), place.join("moved"));
    fs::create_dir(&directory)?;
    fs::write(directory.join("in"), b"in")?;
    fs::rename(&directory, &moved)?;
    Ok(text == "old" && fs::read(&old)? == b"new" && !new.exists() && fs::read(moved.join("in"))? == b"in")
}

fn named_twice(place: &Path) -> io::Result<bool> {
    let (one, other, link) = (place.join("one"), place.join("other"), place.join("link"));
    fs::write(&one, b"text")?;
    fs::hard_link(&one, &other)?;
    symlink("one", &link)?;
    fs::remove_file(&one)?;
    let gone = fs::read(&link).is_err();
    fs::rename(&other, &one)?;
    Ok(gone && fs::read(&link)? == b"text" && fs::read_link(&link)? == Path::new("one"))
}

fn listed(place: &Path) -> io::Result<bool> {
    let directory = place.join("many");
    fs::create_dir(&directory)?;
    let names: BTreeSet<String> = (0..MANY).map(|number| format!("name-{number:04}")).collect();
    for name in &names {
        File::create(directory.join(name))?;
    }
    // As `rm -r` does: each is removed when it was found, and none is passed over.
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(&directory)? {
        let name = entry?.file_name();
        fs::remove_file(directory.join(&name))?;
        found.insert(name.to_string_lossy().into_owned());
    }
    fs::remove_dir(&directory)?;
    Ok(found == names)
}

fn attributes(place: &Path) -> io::Result<bool> {
    let path = place.join("attributes");
    let file = File::create(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o604))?;
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_000_000_005);
    file.set_modified(long_ago)?;
    let found = fs::metadata(&path)?;
    // SAFETY: geteuid takes nothing.
    let own = unsafe { libc::geteuid() };
    Ok(found.mode() == 0o100_604 && found.modified()? == long_ago && found.uid() == own)
}

fn durable(place: &Path) -> io::Result<bool> {
    let mut file = File::create(place.join("durable"))?;
    file.write_all(b"text")?;
    file.sync_data()?;
    file.sync_all()?;
    File::open(place)?.sync_all()?;
    Ok(true)
}
