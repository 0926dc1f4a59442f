//! Requests and replies of FUSE, version 7.31 (`linux/fuse.h`, Linux 5.4): how they lie in bytes. Pure.
//!
//! A request is a head and what its operation has behind it, a reply a head and what the operation gives. What does not
//! fit is no request; nothing here is trusted to be as long as it says.

use std::ffi::{CStr, CString};

use rustix::{
    fs::{Stat, StatVfs},
    io::Errno,
};

/// The version that is spoken; a kernel of a later one speaks it too.
pub(super) const VERSION: (u32, u32) = (7, 31);
/// The oldest whose greeting has the form that is written here.
const OLDEST: (u32, u32) = (7, 23);

/// The most that is written by one request, and read by one: what a kernel takes that was not told of more pages.
pub(super) const MOST_BYTES: u32 = 128 << 10;
/// The longest request: a write.
pub(super) const MOST_REQUEST: usize = MOST_BYTES as usize + 4096;

/// Bytes of a request's head, and of a reply's.
pub(super) const HEAD: usize = 40;
const REPLY_HEAD: usize = 16;

/// The largest name, in bytes (`NAME_MAX`).
const MOST_NAME: usize = 255;
/// The longest target of a link, in bytes (`PATH_MAX`, with its end).
const MOST_TARGET: usize = 4095;

/// How long a kernel may go by what it was told, in seconds.
const VALID: u64 = 1;

/// What all requests have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) operation: u32,
    /// What its reply names.
    pub(super) unique: u64,
    /// What it is about.
    pub(super) node: u64,
}

impl Head {
    pub(super) fn read(bytes: &[u8; HEAD]) -> (usize, Self) {
        let mut body = Body(bytes);
        let mut number = || body.u32().unwrap_or(0);
        let (length, operation) = (number(), number());
        let mut number = || body.u64().unwrap_or(0);
        let (unique, node) = (number(), number());
        (usize::try_from(length).unwrap_or(usize::MAX), Self { operation, unique, node })
    }
}

/// What is behind a head.
#[derive(Clone, Copy, Debug)]
pub(super) struct Body<'a>(pub(super) &'a [u8]);

impl<'a> Body<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Errno> {
        self.take().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Errno> {
        self.take().map(u64::from_le_bytes)
    }

    /// Passes over what is of no interest.
    pub(super) fn skip(&mut self, bytes: usize) -> Result<(), Errno> {
        self.0 = self.0.get(bytes..).ok_or(Errno::INVAL)?;
        Ok(())
    }

    fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.skip(text.count_bytes() + 1)?;
        Ok(text)
    }

    /// The name of something in a directory: it leads nowhere else.
    pub(super) fn name(&mut self) -> Result<CString, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > MOST_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name.to_owned()),
        }
    }

    /// The target of a link, which the guest follows.
    pub(super) fn target(&mut self) -> Result<CString, Errno> {
        let target = self.text()?;
        if target.count_bytes() > MOST_TARGET { Err(Errno::NAMETOOLONG) } else { Ok(target.to_owned()) }
    }

    /// So many bytes.
    pub(super) fn bytes(self, count: u32) -> Result<&'a [u8], Errno> {
        self.0.get(..usize::try_from(count).map_err(|_| Errno::INVAL)?).ok_or(Errno::INVAL)
    }
}

/// A reply that is being written.
#[derive(Debug, Default)]
pub(super) struct Reply(Vec<u8>);

impl Reply {
    pub(super) fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) const fn len(&self) -> usize {
        self.0.len()
    }

    /// `struct fuse_init_out` for a kernel of this version; an error when it speaks another form.
    pub(super) fn greet(&mut self, version: (u32, u32)) -> Result<(), Errno> {
        /// Reads of one file at the same time; writes of more than a page; what a file's time or size shows to be old is
        /// read anew.
        const FLAGS: u32 = 1 | 1 << 5 | 1 << 12;
        if version < OLDEST || version.0 != VERSION.0 {
            return Err(Errno::PROTO);
        }
        self.u32(VERSION.0).u32(VERSION.1.min(version.1)).u32(MOST_BYTES).u32(FLAGS);
        // 12 requests in the background are many, 16 the most; times are in nanoseconds.
        self.u32(16 | 12 << 16).u32(MOST_BYTES).u32(1);
        self.bytes(&[0; 36]);
        Ok(())
    }

    /// `struct fuse_entry_out`.
    pub(super) fn entry(&mut self, node: u64, attributes: &Attributes) {
        self.u64(node).u64(0).u64(VALID).u64(VALID).u32(0).u32(0);
        self.attributes(attributes);
    }

    /// `struct fuse_attr_out`.
    pub(super) fn only_attributes(&mut self, attributes: &Attributes) {
        self.u64(VALID).u32(0).u32(0);
        self.attributes(attributes);
    }

    fn attributes(&mut self, Attributes { stat, owner, group }: &Attributes) {
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        self.u64(stat.st_ino).u64(number(stat.st_size)).u64(number(stat.st_blocks));
        // Before 1970 they are negative, in the same bits.
        self.u64(stat.st_atime.cast_unsigned()).u64(stat.st_mtime.cast_unsigned()).u64(stat.st_ctime.cast_unsigned());
        self.u32(small(stat.st_atime_nsec)).u32(small(stat.st_mtime_nsec)).u32(small(stat.st_ctime_nsec));
        self.u32(stat.st_mode).u32(u32::try_from(stat.st_nlink).unwrap_or(u32::MAX)).u32(*owner).u32(*group);
        self.u32(0).u32(u32::try_from(stat.st_blksize).unwrap_or(4096)).u32(0);
    }

    /// `struct fuse_open_out`.
    pub(super) fn opened(&mut self, handle: u64) {
        self.u64(handle).u32(0).u32(0);
    }

    /// `struct fuse_statfs_out`.
    pub(super) fn file_system(&mut self, found: &StatVfs) {
        let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        self.u64(found.f_blocks).u64(found.f_bfree).u64(found.f_bavail).u64(found.f_files).u64(found.f_ffree);
        self.u32(small(found.f_bsize)).u32(small(found.f_namemax)).u32(small(found.f_frsize)).bytes(&[0; 28]);
    }

    /// `struct fuse_dirent`, with the place behind it; whether it fits into so many bytes.
    pub(super) fn directory_entry(&mut self, most: usize, inode: u64, next: u64, kind: u32, name: &CStr) -> bool {
        let name = name.to_bytes();
        let whole = (24 + name.len()).next_multiple_of(8);
        if self.len() + whole > most {
            return false;
        }
        let end = self.len() + whole;
        self.u64(inode).u64(next).u32(u32::try_from(name.len()).unwrap_or(0)).u32(kind).bytes(name);
        self.0.resize(end, 0);
        true
    }

    /// With its head.
    pub(super) fn finish(self, unique: u64) -> Vec<u8> {
        whole(unique, 0, &self.0)
    }
}

/// What is known of something, and whose it is to the guest.
pub(super) struct Attributes {
    pub(super) stat: Stat,
    pub(super) owner: u32,
    pub(super) group: u32,
}

/// A reply that is an error.
pub(super) fn refusal(unique: u64, errno: Errno) -> Vec<u8> {
    whole(unique, -errno.raw_os_error(), &[])
}

fn whole(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(REPLY_HEAD + body.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(REPLY_HEAD + body.len());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&error.to_le_bytes());
    bytes.extend_from_slice(&unique.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}
