//! Bundles: a directory with anything in it is opened or refused, never hung upon or left, and a digest is one digest.
//!
//! The input is a text; each line makes one thing: `kind mode path content`. Kinds: `f` a file, `d` a directory, `l` a
//! symbolic link, `h` a hard link, `p` a FIFO, `s` a socket. Content is the rest of the line as it is, but `@name` stands
//! for [`sample`]s and `@zeros N` for so many. Lines that make no sense are passed over.

use std::{
    fs::File,
    io::Write as _,
    os::fd::{AsFd as _, OwnedFd},
};

use plugvisor_package::{Bundle, BundleLimits, ManifestLimits, content_digest};
use rustix::fs::{AtFlags, FileType, Mode, OFlags};

/// Things made for one input, and bytes written.
const THINGS: usize = 300;
const BYTES: u64 = 1 << 20;

fn limits() -> BundleLimits {
    BundleLimits {
        manifest: ManifestLimits::default(),
        entries: 64,
        depth: 4,
        total_bytes: 256 * 1024,
        file_bytes: 128 * 1024,
        name_bytes: 40,
        descriptor_bytes: 4096,
        services: 16,
    }
}

pub(super) fn check(input: &[u8]) -> String {
    let place = tempfile::tempdir().expect("a directory can be made");
    make(place.path(), input);
    let limits = limits();
    let outcome = match Bundle::open(place.path(), &limits) {
        Err(error) => {
            let said = error.to_string();
            assert!(!said.is_empty() && said.len() <= 64 * 1024, "an error of {} bytes", said.len());
            assert!(!error.hint().is_empty(), "{said}: and what now?");
            said.replace(&*place.path().to_string_lossy(), "")
        }
        Ok(bundle) => {
            let again = Bundle::open(place.path(), &limits).expect("nothing changed in between");
            assert_eq!(again.digest, bundle.digest, "two digests of one bundle");
            assert_eq!(content_digest(&bundle.files), bundle.digest);
            assert!(bundle.files.windows(2).all(|pair| pair[0].path < pair[1].path), "{:?}", bundle.files);
            assert!(bundle.files.len() <= limits.entries + 1);
            assert!(bundle.files.iter().map(|file| file.size).sum::<u64>() <= limits.total_bytes + limits.file_bytes);
            for file in &bundle.files {
                let path = place.path().join(&file.path);
                assert!(path.symlink_metadata().expect("it is there").is_file(), "{path:?} is no file");
                assert!(file.path.split('/').all(|part| !matches!(part, "" | "." | "..")), "{:?}", file.path);
            }
            assert!(bundle.files.iter().any(|file| file.path == bundle.entry.path && file.executable));
            format!("opened {} {:?}", bundle.files.len().min(4), bundle.entry.kind)
        }
    };
    // Whoever takes the search permission away would keep us from removing it, were we not root.
    let _ = rustix::fs::chmod(place.path(), Mode::from_raw_mode(0o700));
    outcome
}

fn make(root: &std::path::Path, input: &[u8]) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags, Mode::empty()).expect("it was just made");
    let mut left = BYTES;
    for line in input.split(|byte| *byte == b'\n').take(THINGS) {
        // Whatever the system refuses is simply not there.
        let _ = thing(&root, line, &mut left);
    }
}

fn thing(root: &OwnedFd, line: &[u8], left: &mut u64) -> Option<()> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    let (kind, mode, path) = (parts.next()?, parts.next()?, parts.next()?);
    let content = parts.next().unwrap_or_default();
    let mode = u32::from_str_radix(std::str::from_utf8(mode).ok()?, 8).ok()? & 0o7777;
    let (directory, name) = within(root, path)?;
    match kind {
        b"f" => {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&directory, name, flags, Mode::from_raw_mode(0o600)).ok()?;
            let mut file = File::from(file);
            fill(&mut file, content, left)?;
            rustix::fs::fchmod(&file, Mode::from_raw_mode(mode)).ok()
        }
        b"d" => rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o700)).ok(),
        b"l" => rustix::fs::symlinkat(content, &directory, name).ok(),
        b"h" => {
            let (from, original) = within(root, content)?;
            rustix::fs::linkat(&from, original, &directory, name, AtFlags::empty()).ok()
        }
        b"p" => rustix::fs::mknodat(&directory, name, FileType::Fifo, Mode::from_raw_mode(mode), 0).ok(),
        b"s" => rustix::fs::mknodat(&directory, name, FileType::Socket, Mode::from_raw_mode(mode), 0).ok(),
        _ => None,
    }
}

fn fill(file: &mut File, content: &[u8], left: &mut u64) -> Option<()> {
    if let Some(count) = content.strip_prefix(b"@zeros ") {
        let count: u64 = std::str::from_utf8(count).ok()?.parse().ok()?;
        // A hole costs nothing, but its reading does.
        *left = left.checked_sub(count)?;
        return file.set_len(count).ok();
    }
    let content = content.strip_prefix(b"@").and_then(sample).unwrap_or(content);
    *left = left.checked_sub(content.len() as u64)?;
    file.write_all(content).ok()
}

/// Contents that are tedious to write in a line.
fn sample(name: &[u8]) -> Option<&'static [u8]> {
    Some(match name {
        b"least" => include_bytes!("../../../../proto/package/tests/samples/least.json"),
        b"full" => include_bytes!("../../../../proto/package/tests/samples/full.json"),
        b"elf" => b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0\x01\0\0\0",
        b"arm" => b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\xb7\0\x01\0\0\0",
        b"script" => b"#!/bin/sh\n",
        // A FileDescriptorSet: one file, package `t`, service `S`.
        b"descriptor" => b"\x0a\x0d\x0a\x01a\x12\x01t\x32\x05\x0a\x01S\x12\0",
        _ => return None,
    })
}

/// The directory of a path below the root, made as needed, and the path's last name. No link is followed on the way, so
/// that nothing is ever made outside.
fn within<'p>(root: &OwnedFd, path: &'p [u8]) -> Option<(OwnedFd, &'p [u8])> {
    const DEPTH: usize = 12;
    let mut names = path.split(|byte| *byte == b'/').filter(|name| !matches!(*name, b"" | b"." | b".."));
    let mut name = names.next()?;
    let mut directory = root.as_fd().try_clone_to_owned().ok()?;
    for (depth, next) in names.enumerate() {
        if depth > DEPTH {
            return None;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // It may be there already; whether it is a directory shows when it is opened.
        let _ = rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755));
        directory = rustix::fs::openat(&directory, name, flags, Mode::empty()).ok()?;
        name = next;
    }
    Some((directory, name))
}
