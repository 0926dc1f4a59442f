//! As a guest's kernel asks, and as it never would.

use std::{fs as std_fs, os::unix::fs::symlink, os::unix::net::UnixStream};

use proptest::prelude::*;

use super::*;

/// A directory, what answers for it, and what the other side has asked.
struct World {
    place: tempfile::TempDir,
    files: Files,
}

const LOOK_UP: u32 = 1;
const ATTRIBUTES: u32 = 3;
const SET_ATTRIBUTES: u32 = 4;
const READ_LINK: u32 = 5;
const MAKE_LINK: u32 = 6;
const MAKE_DIRECTORY: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const CLOSE: u32 = 18;
const OPEN_DIRECTORY: u32 = 27;
const READ_DIRECTORY: u32 = 28;
const CREATE: u32 = 35;

const USER: u32 = 60_000;

/// What lies behind a head, in order.
#[derive(Default)]
struct Asked(Vec<u8>);

impl Asked {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_le_bytes());
        self
    }

    fn text(mut self, text: &str) -> Self {
        self.0.extend_from_slice(text.as_bytes());
        self.0.push(0);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }
}

fn asked() -> Asked {
    Asked::default()
}

impl World {
    fn new() -> Self {
        Self::with(Bounds { file_size: Some(1000) })
    }

    fn with(bounds: Bounds) -> Self {
        let place = tempfile::tempdir().expect("a directory");
        std_fs::create_dir(place.path().join("data")).expect("a directory");
        let files = Files::open(&place.path().join("data"), bounds, USER).expect("opens");
        Self { place, files }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.place.path().join(name)
    }

    #[allow(clippy::needless_pass_by_value, reason = "it is made for this")]
    fn ask(&mut self, operation: u32, node: u64, asked: Asked) -> Result<Vec<u8>, i32> {
        let head = Head { operation, unique: 77, node };
        let reply = self.files.answer(head, Body(&asked.0)).expect("a reply");
        let mut read = Body(&reply);
        let (length, error) = (read.u32().expect("a length"), read.u32().expect("an error"));
        assert_eq!((usize::try_from(length).expect("small"), read.u64()), (reply.len(), Ok(77)));
        match error.cast_signed() {
            0 => Ok(read.0.to_vec()),
            error => {
                assert!(read.0.is_empty());
                Err(-error)
            }
        }
    }

    fn look_up(&mut self, directory: u64, name: &str) -> Result<u64, i32> {
        self.ask(LOOK_UP, directory, asked().text(name)).map(|reply| {
            assert_eq!(reply.len(), 128);
            u64_at(&reply, 0)
        })
    }

    /// A new file: its number and its handle.
    fn create(&mut self, directory: u64, name: &str) -> Result<(u64, u64), i32> {
        let flags = (libc::O_RDWR | libc::O_CREAT).unsigned_abs();
        let reply = self.ask(CREATE, directory, asked().u32(flags).u32(0o100_640).u32(0).u32(0).text(name))?;
        assert_eq!(reply.len(), 128 + 16);
        Ok((u64_at(&reply, 0), u64_at(&reply, 128)))
    }

    fn write(&mut self, handle: u64, offset: u64, bytes: &[u8]) -> Result<u32, i32> {
        let size = u32::try_from(bytes.len()).expect("small");
        let asked = asked().u64(handle).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0).bytes(bytes);
        self.ask(WRITE, 0, asked).map(|reply| u32_at(&reply, 0))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.ask(READ, 0, asked().u64(handle).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0))
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

#[test]
fn what_is_written_is_there_and_read_again() {
    let mut world = World::new();
    let made = world.ask(MAKE_DIRECTORY, ROOT, asked().u32(0o40_700).u32(0).text("d")).expect("makes it");
    let directory = u64_at(&made, 0);
    let (node, handle) = world.create(directory, "file").expect("makes it");
    assert_eq!(world.write(handle, 2, b"bytes"), Ok(5));
    assert_eq!(world.read(handle, 0, 4096), Ok(b"\0\0bytes".to_vec()));
    assert_eq!(std_fs::read(world.path("data/d/file")).expect("a file"), b"\0\0bytes");
    let told = world.ask(ATTRIBUTES, node, asked().u32(0).u32(0).u64(0)).expect("attributes");
    assert_eq!(told.len(), 104);
    // The size; the mode, links, owner and group.
    assert_eq!((u64_at(&told, 24), u32_at(&told, 76), u32_at(&told, 80)), (7, 0o100_640, 1));
    assert_eq!((u32_at(&told, 84), u32_at(&told, 88)), (USER, USER));

    // Another name of the same file.
    let linked = world.ask(LINK, ROOT, asked().u64(node).text("other")).expect("links");
    assert_eq!((u64_at(&linked, 0), u32_at(&linked, 40 + 64)), (node, 2));
    assert_eq!(world.look_up(ROOT, "other"), Ok(node));
    assert_eq!(world.ask(UNLINK, directory, asked().text("file")), Ok(Vec::new()));
    assert_eq!(world.look_up(directory, "file"), Err(libc::ENOENT));
    assert_eq!(world.ask(ATTRIBUTES, node, asked().u32(0).u32(0).u64(0)).map(|told| u64_at(&told, 24)), Ok(7));
    assert_eq!(world.ask(CLOSE, node, asked().u64(handle).u64(0).u64(0)), Ok(Vec::new()));
    assert_eq!(world.ask(ATTRIBUTES, node, asked().u32(0).u32(0).u64(0)).map(|told| u64_at(&told, 24)), Ok(7));
    assert_eq!(world.read(handle, 0, 1), Err(libc::EBADF));
    assert_eq!(world.ask(RENAME, ROOT, asked().u64(directory).text("other").text("file")), Ok(Vec::new()));
    assert_eq!(std_fs::read(world.path("data/d/file")).expect("a file"), b"\0\0bytes");
}

/// What has no name any more goes on for whoever has it open, and for nobody else.
#[test]
fn a_removed_file_is_there_while_it_is_open() {
    let mut world = World::new();
    let (node, handle) = world.create(ROOT, "file").expect("makes it");
    assert_eq!(world.ask(UNLINK, ROOT, asked().text("file")), Ok(Vec::new()));
    let told = |world: &mut World| world.ask(ATTRIBUTES, node, asked().u32(0).u32(0).u64(0));
    let mode = asked().u32(1).u32(0).bytes(&[0; 60]).u32(0o100_600).bytes(&[0; 16]);
    assert_eq!(world.ask(SET_ATTRIBUTES, node, mode).map(|told| u32_at(&told, 76)), Ok(0o100_600));
    assert_eq!(world.write(handle, 0, b"on"), Ok(2));
    assert_eq!(told(&mut world).map(|told| (u64_at(&told, 24), u32_at(&told, 80))), Ok((2, 0)));
    assert!(world.ask(CLOSE, node, asked().u64(handle).u64(0).u64(0)).is_ok());
    assert_eq!(told(&mut world), Err(libc::ESTALE));
}

/// Where a file ends, and what is behind a name, may be somebody else's doing on the host.
#[test]
fn what_the_host_does_meanwhile_is_seen() {
    let mut world = World::new();
    let (node, handle) = world.create(ROOT, "log").expect("makes it");
    std_fs::write(world.path("data/log"), "of the host, ").expect("writes");
    let append = (libc::O_WRONLY | libc::O_APPEND).unsigned_abs();
    let asked_to =
        |offset: u64, how: u32| asked().u64(handle).u64(offset).u32(2).u32(how).u64(0).u32(append).u32(0).bytes(b"at");
    assert!(world.ask(WRITE, node, asked_to(0, 0)).is_ok());
    // What comes out of the guest's cache has its place.
    assert!(world.ask(WRITE, node, asked_to(0, 1)).is_ok());
    assert_eq!(std_fs::read(world.path("data/log")).expect("reads"), b"at the host, at");
    std_fs::remove_file(world.path("data/log")).expect("removes");
    std_fs::write(world.path("data/log"), "another").expect("writes");
    let new = world.look_up(ROOT, "log").expect("it is there");
    assert_ne!(new, node);
    let size = |told: Vec<u8>| u64_at(&told, 24);
    assert_eq!(world.ask(ATTRIBUTES, new, asked().u32(0).u32(0).u64(0)).map(size), Ok(7));
    assert_eq!(world.ask(ATTRIBUTES, node, asked().u32(0).u32(0).u64(0)).map(size), Ok(15));
    // Nobody has room beyond the limit, by whatever call.
    let allocate = |length: u64| asked().u64(handle).u64(0).u64(length).u32(0).u32(0);
    assert_eq!(world.ask(43, node, allocate(1001)), Err(libc::EFBIG));
    assert_eq!(world.ask(43, node, allocate(1000)).map(drop), Ok(()));
    // Who may do what is asked of the host.
    assert_eq!(world.ask(34, ROOT, asked().u32(7).u32(0)).map(drop), Ok(()));
    assert_eq!(world.ask(34, 99, asked().u32(4).u32(0)), Err(libc::ESTALE));
}

#[test]
fn attributes_are_set_as_far_as_they_may_be() {
    let mut world = World::new();
    let (node, handle) = world.create(ROOT, "file").expect("makes it");
    let set = |valid: u32, size: u64, mode: u32, owner: u32| {
        let asked = asked().u32(valid).u32(0).u64(handle).u64(size).u64(0).u64(1).u64(2).u64(0).u32(3).u32(4).u32(0);
        asked.u32(mode).u32(0).u32(owner).u32(owner).u32(0)
    };
    let times = 1 << 4 | 1 << 5;
    let told = world.ask(SET_ATTRIBUTES, node, set(1 | 1 << 3 | times, 9, 0o106_755, 0)).expect("sets");
    // No rights that lend an identity; both times with their nanoseconds.
    assert_eq!((u64_at(&told, 24), u32_at(&told, 76)), (9, 0o100_755));
    assert_eq!((u64_at(&told, 40), u64_at(&told, 48), u32_at(&told, 64), u32_at(&told, 68)), (1, 2, 3, 4));
    assert_eq!(world.ask(SET_ATTRIBUTES, node, set(1 << 3, 1001, 0, 0)), Err(libc::EFBIG));
    assert!(world.ask(SET_ATTRIBUTES, node, set(1 << 1 | 1 << 2, 0, 0, USER)).is_ok());
    assert_eq!(world.ask(SET_ATTRIBUTES, node, set(1 << 1, 0, 0, 0)), Err(libc::EPERM));
    assert_eq!(world.write(handle, 999, b"ab"), Err(libc::EFBIG));
    assert_eq!(world.write(handle, u64::MAX, b"ab"), Err(libc::EFBIG));
    assert_eq!(world.write(handle, 998, b"ab"), Ok(2));
}

/// However a guest asks, and whatever lies in the directory.
#[test]
fn nothing_leads_out_of_the_directory() {
    let mut world = World::new();
    std_fs::write(world.path("secret"), "of others").expect("a file");
    symlink("../secret", world.path("data/link")).expect("a link");
    symlink("..", world.path("data/up")).expect("a link");
    for name in ["..", ".", "", "../secret", "a/b", "/etc"] {
        assert_eq!(world.look_up(ROOT, name), Err(libc::EINVAL), "{name:?}");
        assert_eq!(world.create(ROOT, name), Err(libc::EINVAL), "{name:?}");
    }
    assert_eq!(world.look_up(ROOT, &"n".repeat(256)), Err(libc::ENAMETOOLONG));
    let link = world.look_up(ROOT, "link").expect("a link");
    assert_eq!(world.ask(READ_LINK, link, asked()), Ok(b"../secret".to_vec()));
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        assert_eq!(world.ask(OPEN, link, asked().u32(flags.unsigned_abs()).u32(0)), Err(libc::ELOOP));
    }
    let size = asked().u32(1 << 3).bytes(&[0; 84]);
    assert_eq!(world.ask(SET_ATTRIBUTES, link, size), Err(libc::ELOOP));
    let mode = asked().u32(1).bytes(&[0; 84]);
    assert_eq!(world.ask(SET_ATTRIBUTES, link, mode), Err(libc::EOPNOTSUPP));
    // A directory that becomes a link while its number is known.
    let up = world.look_up(ROOT, "up").expect("a link");
    assert_eq!(world.look_up(up, "secret"), Err(libc::ENOTDIR));
    assert_eq!(world.ask(OPEN_DIRECTORY, up, asked()), Err(libc::ENOTDIR));
    let made = world.ask(MAKE_DIRECTORY, ROOT, asked().u32(0o700).u32(0).text("d")).expect("makes it");
    let directory = u64_at(&made, 0);
    std_fs::remove_dir(world.path("data/d")).expect("removes");
    symlink("..", world.path("data/d")).expect("a link");
    for refused in [
        world.look_up(directory, "secret").map(drop),
        world.create(directory, "secret").map(drop),
        world.ask(UNLINK, directory, asked().text("secret")).map(drop),
        world.ask(RENAME, directory, asked().u64(ROOT).text("secret").text("mine")).map(drop),
        world.ask(MAKE_LINK, directory, asked().text("new").text("x")).map(drop),
    ] {
        assert!(matches!(refused, Err(libc::ELOOP | libc::ENOTDIR)), "{refused:?}");
    }
    assert_eq!(std_fs::read(world.path("secret")).expect("it is there"), b"of others");
    // Nothing waits for a pipe's other end, and nothing but files is opened.
    fs::mkfifoat(CWD, world.path("data/pipe"), Mode::RUSR | Mode::WUSR).expect("a pipe");
    let pipe = world.look_up(ROOT, "pipe").expect("a pipe");
    assert_eq!(world.ask(OPEN, pipe, asked().u32(0).u32(0)), Err(libc::EPERM));
    let wanted = asked().u32(0o010_600).u32(0).u32(0).u32(0).text("another");
    assert_eq!(world.ask(8, ROOT, wanted), Err(libc::EACCES));
}

#[test]
fn what_is_open_is_bounded() {
    let mut world = World::new();
    let (node, first) = world.create(ROOT, "file").expect("makes it");
    let mut open = vec![first];
    for _ in 1..MOST_HANDLES {
        open.push(u64_at(&world.ask(OPEN, node, asked().u32(0).u32(0)).expect("opens"), 0));
    }
    assert_eq!(world.ask(OPEN, node, asked().u32(0).u32(0)), Err(libc::ENFILE));
    assert_eq!(world.create(ROOT, "more"), Err(libc::ENFILE));
    assert!(!world.path("data/more").exists());
    let last = open.pop().expect("one");
    assert!(world.ask(CLOSE, node, asked().u64(last).u64(0).u64(0)).is_ok());
    assert!(world.create(ROOT, "more").is_ok());
}

#[test]
fn a_directory_is_listed_in_pieces() {
    let mut world = World::new();
    let names: std::collections::BTreeSet<String> = (0..300).map(|number| format!("name-{number}")).collect();
    for name in &names {
        std_fs::write(world.path("data").join(name), "").expect("a file");
    }
    let handle = u64_at(&world.ask(OPEN_DIRECTORY, ROOT, asked()).expect("opens"), 0);
    let (mut offset, mut found) = (0, Vec::new());
    loop {
        let piece = world.ask(READ_DIRECTORY, ROOT, asked().u64(handle).u64(offset).u32(500).u32(0).u64(0).u64(0));
        let piece = piece.expect("a piece");
        assert!(piece.len() <= 500);
        let mut rest = piece.as_slice();
        if rest.is_empty() {
            break;
        }
        while !rest.is_empty() {
            offset = u64_at(rest, 8);
            let length = usize::try_from(u32_at(rest, 16)).expect("small");
            found.push(String::from_utf8(rest[24..24 + length].to_vec()).expect("a name"));
            rest = &rest[(24 + length).next_multiple_of(8)..];
        }
    }
    found.retain(|name| name != "." && name != "..");
    assert_eq!(found.len(), names.len());
    assert_eq!(found.into_iter().collect::<std::collections::BTreeSet<_>>(), names);
}

#[test]
fn a_kernel_is_greeted_in_its_version_and_what_is_no_request_ends_it() {
    let mut world = World::new();
    for (minor, told) in [(38, 31), (31, 31), (27, 27)] {
        let reply = world.ask(26, 0, asked().u32(7).u32(minor).u32(0).u32(0)).expect("a greeting");
        assert_eq!((reply.len(), u32_at(&reply, 0), u32_at(&reply, 4)), (64, 7, told));
        assert_eq!((u32_at(&reply, 20), u32_at(&reply, 24)), (MOST_BYTES, 1));
    }
    for version in [(7, 22), (6, 40), (8, 0)] {
        let reply = world.ask(26, 0, asked().u32(version.0).u32(version.1).u32(0).u32(0));
        assert_eq!(reply, Err(libc::EPROTO), "{version:?}");
    }
    for length in [0, 39, u32::try_from(MOST_REQUEST).expect("small") + 1, u32::MAX] {
        let (mut guest, ours) = UnixStream::pair().expect("a pair");
        guest.write_all(&asked().u32(length).bytes(&[0; 36]).0).expect("writes");
        let files = Files::open(&world.path("data"), Bounds { file_size: None }, USER).expect("opens");
        assert_eq!(files.serve(ours).expect_err("no request").kind(), io::ErrorKind::InvalidData);
    }
    // One that is whole is answered, and the end is no error.
    let (mut guest, ours) = UnixStream::pair().expect("a pair");
    guest.write_all(&asked().u32(40).u32(17).u64(5).u64(1).bytes(&[0; 16]).0).expect("writes");
    guest.shutdown(std::net::Shutdown::Write).expect("ends");
    let files = Files::open(&world.path("data"), Bounds { file_size: None }, USER).expect("opens");
    files.serve(ours).expect("serves");
    let mut reply = Vec::new();
    guest.read_to_end(&mut reply).expect("reads");
    assert_eq!((reply.len(), u32_at(&reply, 4), u64_at(&reply, 8)), (96, 0, 5));
}

proptest! {
    /// Whatever is asked, in whatever order: nothing beside the directory is touched, and everything has its bounds.
    #[test]
    fn whatever_is_asked_stays_in_the_directory(
        requests in prop::collection::vec(
            (0_u32..50, 0_u64..8, prop::collection::vec(any::<u8>(), 0..64), prop::collection::vec("[a-c./]{0,3}", 0..3)),
            1..60,
        ),
    ) {
        let mut world = World::new();
        std_fs::write(world.path("secret"), "of others").expect("a file");
        std_fs::create_dir(world.path("data/a")).expect("a directory");
        for (operation, node, mut bytes, names) in requests {
            for name in names {
                bytes.extend_from_slice(name.as_bytes());
                bytes.push(0);
            }
            let head = Head { operation, unique: 1, node };
            let reply = world.files.answer(head, Body(&bytes));
            prop_assert!(reply.is_none_or(|reply| reply.len() <= MOST_REQUEST));
        }
        let beside: Vec<_> = std_fs::read_dir(world.place.path()).expect("reads").flatten().map(|found| found.file_name()).collect();
        prop_assert_eq!(beside.len(), 2, "{:?}", beside);
        prop_assert_eq!(std_fs::read(world.path("secret")).expect("it is there"), b"of others");
    }
}
