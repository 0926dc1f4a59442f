//! A plugin's data directory for the plugin in its machine: the monitor answers the FUSE requests of the guest's kernel, which
//! the guest's init passes on as they are.
//!
//! ```text
//! plugin ── /plugvisor/data ── guest's kernel ── guest's init ── a connection of the link ── this ── /plugvisor/data
//! ```
//!
//! Whoever has taken over the guest says here what it likes, and gets no further than a plugin of SANDBOX that was granted the
//! same: the monitor is behind those walls, of the plugin's user, and sees of the directory the mount that such a plugin
//! sees, read-only without `filesystem:write-data`. Names are looked up below the directory and never through a link; a
//! link is read and given to the guest, which follows it in its own tree. Numbers, handles, lengths and depths are
//! bounded, and one file's size by `maxFileSize`, which a guest's kernel holds for its plugin and here is held for the
//! guest.
//!
//! What may be done with a file is the host's to say, by its modes, groups and lists of access. There are no locks here (a
//! guest's kernel has them among its own processes), no attributes beside those of stat(2), and nobody makes devices,
//! sockets or pipes.

mod change;
mod nodes;
mod wire;

use std::{
    collections::HashMap,
    ffi::{CStr, CString},
    io::{self, IoSlice, Read, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{
        self, Access, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, SeekFrom,
    },
    io::{Errno, ReadWriteFlags, pread, pwrite, pwritev2, retry_on_intr},
};

use self::{
    change::Change,
    nodes::{Nodes, ROOT},
    wire::{Attributes, Body, HEAD, Head, MOST_BYTES, MOST_REQUEST, Reply, refusal},
};

/// The most files and directories that are open at once; beside them the monitor has the connections that it carries.
const MOST_HANDLES: usize = 256;

/// The rights that may be set: none that lend somebody's identity.
const RIGHTS: u32 = 0o1777;

/// One directory, for one guest.
pub(super) struct Files {
    root: OwnedFd,
    nodes: Nodes,
    handles: HashMap<u64, Handle>,
    last: u64,
    bounds: Bounds,
    /// Whose its files are here, user and group, and who both are in the guest.
    own: (u32, u32),
    guests: u32,
}

/// What a plugin may do with them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// The largest file, in bytes.
    pub(super) file_size: Option<u64>,
}

struct Handle {
    node: u64,
    file: OwnedFd,
    /// Up to where a directory was read.
    position: u64,
}

type Answer = Result<Reply, Errno>;

/// A directory on the way to something.
enum Directory<'a> {
    Root(&'a OwnedFd),
    Below(OwnedFd),
}

impl AsFd for Directory<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Root(root) => root.as_fd(),
            Self::Below(directory) => directory.as_fd(),
        }
    }
}

impl Files {
    /// `user` is the plugin's in the guest.
    pub(super) fn open(root: &Path, bounds: Bounds, user: u32) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = fs::open(root, flags, Mode::empty())?;
        let own = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        Ok(Self { root, nodes: Nodes::new(), handles: HashMap::new(), last: 0, bounds, own, guests: user })
    }

    /// Answers until the connection ends, or says what is no request.
    pub(super) fn serve(mut self, mut connection: impl Read + Write) -> io::Result<()> {
        let mut bytes = Vec::new();
        loop {
            let mut head = [0; HEAD];
            match connection.read_exact(&mut head) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                read => read?,
            }
            let (length, head) = Head::read(&head);
            let behind = length.checked_sub(HEAD).filter(|_| length <= MOST_REQUEST);
            let behind = behind.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
            bytes.resize(behind, 0);
            connection.read_exact(&mut bytes)?;
            if let Some(reply) = self.answer(head, Body(&bytes)) {
                connection.write_all(&reply)?;
            }
        }
    }

    /// The reply, if the operation has one.
    fn answer(&mut self, head: Head, mut body: Body<'_>) -> Option<Vec<u8>> {
        const FORGET: u32 = 2;
        const INTERRUPT: u32 = 36;
        const BATCH_FORGET: u32 = 42;
        match head.operation {
            FORGET => {
                self.nodes.forget(head.node, body.u64().unwrap_or(0));
                None
            }
            BATCH_FORGET => {
                let _ = self.forget_all(body);
                None
            }
            // What is under way is done soon.
            INTERRUPT => None,
            _ => Some(match self.perform(head, body) {
                Ok(reply) => reply.finish(head.unique),
                Err(errno) => refusal(head.unique, errno),
            }),
        }
    }

    fn perform(&mut self, Head { operation, node, unique: _ }: Head, body: Body<'_>) -> Answer {
        match operation {
            1 => self.look_up(node, body),
            3 => self.attributes(node, body),
            4 => self.set_attributes(node, body),
            5 => self.read_link(node),
            6 => self.make_link(node, body),
            9 => self.make_directory(node, body),
            10 => self.remove(node, body, AtFlags::empty()),
            11 => self.remove(node, body, AtFlags::REMOVEDIR),
            12 => self.rename(node, body, false),
            13 => self.link(node, body),
            14 => self.open_file(node, body),
            15 => self.read(body),
            16 => self.write(body),
            17 => self.file_system(),
            18 | 29 => self.close(body),
            20 | 30 => self.make_durable(body),
            26 => greet(body),
            27 => self.open_directory(node),
            28 => self.read_directory(body),
            34 => self.may(node, body),
            35 => self.create(node, body),
            // Devices, sockets and pipes: as Landlock has it at other levels.
            8 => Err(Errno::ACCESS),
            38 => Ok(Reply::default()),
            43 => self.allocate(body),
            45 => self.rename(node, body, true),
            _ => Err(Errno::NOSYS),
        }
    }

    fn forget_all(&mut self, mut body: Body<'_>) -> Result<(), Errno> {
        let count = body.u32()?;
        body.skip(4)?;
        for _ in 0..count {
            let (node, answers) = (body.u64()?, body.u64()?);
            self.nodes.forget(node, answers);
        }
        Ok(())
    }

    /// A directory by its number.
    fn directory(&self, node: u64) -> Result<Directory<'_>, Errno> {
        if node == ROOT {
            return Ok(Directory::Root(&self.root));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        beneath(&self.root, self.nodes.path(node)?, flags, Mode::empty()).map(Directory::Below)
    }

    /// Where something is, and its name there.
    fn place(&self, node: u64) -> Result<(Directory<'_>, CString), Errno> {
        match self.nodes.place(node)? {
            None => Ok((Directory::Root(&self.root), c".".to_owned())),
            Some((directory, name)) => Ok((self.directory(directory)?, name.to_owned())),
        }
    }

    fn open_node(&self, node: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
        let (directory, name) = self.place(node)?;
        // Nothing waits for a writer of a pipe.
        let more = if flags.contains(OFlags::PATH) { OFlags::empty() } else { OFlags::NONBLOCK | OFlags::NOCTTY };
        let flags = flags | more | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        beneath(&directory, name.as_c_str(), flags, Mode::empty())
    }

    fn seen(&self, stat: fs::Stat) -> Attributes {
        let owner = if stat.st_uid == self.own.0 { self.guests } else { 0 };
        let group = if stat.st_gid == self.own.1 { self.guests } else { 0 };
        Attributes { stat, owner, group }
    }

    /// A handle of something whose name may be gone.
    fn open_still(&self, node: u64) -> Option<&OwnedFd> {
        self.handles.values().find(|handle| handle.node == node).map(|handle| &handle.file)
    }

    /// Of something that may be open still when its name is gone.
    fn attributes_of(&self, node: u64, handle: Option<u64>) -> Result<Attributes, Errno> {
        let open = match handle {
            Some(handle) => Some(self.handles.get(&handle).ok_or(Errno::BADF)?),
            None => None,
        };
        let by_name = |this: &Self| {
            let (directory, name) = this.place(node)?;
            fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
        };
        let stat = match open {
            Some(handle) => fs::fstat(&handle.file),
            None => by_name(self).or_else(|errno| self.open_still(node).map_or(Err(errno), fs::fstat)),
        };
        stat.map(|stat| self.seen(stat))
    }

    /// Tells the kernel of a name, when it is there.
    fn entry(&mut self, directory: u64, name: &CStr) -> Result<(u64, Reply), Errno> {
        let stat = fs::statat(self.directory(directory)?, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let attributes = self.seen(stat);
        let node = self.nodes.tell(directory, name, (&stat).into())?;
        let mut reply = Reply::default();
        reply.entry(node, &attributes);
        Ok((node, reply))
    }

    fn look_up(&mut self, node: u64, mut body: Body<'_>) -> Answer {
        self.entry(node, &body.name()?).map(|(_, reply)| reply)
    }

    fn attributes(&self, node: u64, mut body: Body<'_>) -> Answer {
        const OF_HANDLE: u32 = 1;
        let flags = body.u32()?;
        body.skip(4)?;
        let handle = body.u64()?;
        let mut reply = Reply::default();
        reply.only_attributes(&self.attributes_of(node, (flags & OF_HANDLE != 0).then_some(handle))?);
        Ok(reply)
    }

    fn set_attributes(&self, node: u64, mut body: Body<'_>) -> Answer {
        let set = Change::read(&mut body)?;
        // Everything is the plugin's, or nobody's that it could be given to.
        if set.owners.iter().flatten().any(|owner| *owner != self.guests) {
            return Err(Errno::PERM);
        }
        if let Some(size) = set.size {
            match set.handle {
                Some(handle) => self.cut(&self.handles.get(&handle).ok_or(Errno::BADF)?.file, size)?,
                None => self.cut(&regular(self.open_node(node, OFlags::WRONLY)?)?, size)?,
            }
        }
        if let Some(mode) = set.mode {
            let found = self.open_node(node, OFlags::PATH);
            let held = match &found {
                Ok(held) => held,
                Err(errno) => self.open_still(node).ok_or(*errno)?,
            };
            let kind = FileType::from_raw_mode(fs::fstat(held)?.st_mode);
            if !matches!(kind, FileType::RegularFile | FileType::Directory) {
                return Err(Errno::OPNOTSUPP);
            }
            // The one thing that no call does by a descriptor of this kind.
            let path = format!("/proc/self/fd/{}", held.as_raw_fd());
            fs::chmodat(CWD, path, Mode::from_raw_mode(mode & RIGHTS), AtFlags::empty())?;
        }
        if let Some(times) = &set.times {
            match (self.place(node), self.open_still(node)) {
                (Ok((directory, name)), _) => fs::utimensat(directory, name, times, AtFlags::SYMLINK_NOFOLLOW)?,
                (Err(_), Some(held)) => fs::futimens(held, times)?,
                (Err(errno), None) => return Err(errno),
            }
        }
        let mut reply = Reply::default();
        reply.only_attributes(&self.attributes_of(node, set.handle)?);
        Ok(reply)
    }

    fn cut(&self, file: &OwnedFd, size: u64) -> Result<(), Errno> {
        if size > u64::try_from(fs::fstat(file)?.st_size).unwrap_or(0) {
            self.may_grow_to(size)?;
        }
        fs::ftruncate(file, size)
    }

    /// Whether the host lets the plugin do this with it: modes, groups and lists of access are all the host's.
    fn may(&self, node: u64, mut body: Body<'_>) -> Answer {
        let wanted =
            Access::from_bits(u8::try_from(body.u32()?).map_err(|_| Errno::INVAL)?.into()).ok_or(Errno::INVAL)?;
        let (directory, name) = self.place(node)?;
        fs::accessat(directory, name, wanted, AtFlags::EACCESS | AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(Reply::default())
    }

    fn read_link(&self, node: u64) -> Answer {
        let (directory, name) = self.place(node)?;
        let target = fs::readlinkat(directory, name, Vec::new())?;
        let mut reply = Reply::default();
        reply.bytes(target.to_bytes());
        Ok(reply)
    }

    fn make_link(&mut self, node: u64, mut body: Body<'_>) -> Answer {
        let (name, target) = (body.name()?, body.target()?);
        self.nodes.make_room()?;
        fs::symlinkat(target, self.directory(node)?, &name)?;
        self.entry(node, &name).map(|(_, reply)| reply)
    }

    fn make_directory(&mut self, node: u64, mut body: Body<'_>) -> Answer {
        let mode = body.u32()?;
        body.skip(4)?;
        let name = body.name()?;
        self.nodes.make_room()?;
        fs::mkdirat(self.directory(node)?, &name, Mode::from_raw_mode(mode & RIGHTS))?;
        self.entry(node, &name).map(|(_, reply)| reply)
    }

    fn remove(&mut self, node: u64, mut body: Body<'_>, flags: AtFlags) -> Answer {
        let name = body.name()?;
        fs::unlinkat(self.directory(node)?, &name, flags)?;
        self.nodes.remove(node, &name);
        Ok(Reply::default())
    }

    fn rename(&mut self, node: u64, mut body: Body<'_>, has_flags: bool) -> Answer {
        let to = body.u64()?;
        let mut flags = RenameFlags::empty();
        if has_flags {
            flags = RenameFlags::from_bits(body.u32()?).ok_or(Errno::INVAL)?;
            body.skip(4)?;
        }
        // What is hidden by it would be a device.
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (body.name()?, body.name()?);
        fs::renameat_with(self.directory(node)?, &old, self.directory(to)?, &new, flags)?;
        if flags.contains(RenameFlags::EXCHANGE) {
            self.nodes.exchange((node, &old), (to, &new));
        } else {
            self.nodes.rename((node, &old), (to, &new));
        }
        Ok(Reply::default())
    }

    /// Another name for a file.
    fn link(&mut self, node: u64, mut body: Body<'_>) -> Answer {
        let of = body.u64()?;
        let name = body.name()?;
        self.nodes.make_room()?;
        let (directory, old) = self.place(of)?;
        fs::linkat(directory, old, self.directory(node)?, &name, AtFlags::empty())?;
        self.nodes.will_have_names(of);
        self.entry(node, &name).map(|(_, reply)| reply)
    }

    fn open_file(&mut self, node: u64, mut body: Body<'_>) -> Answer {
        let flags = access(body.u32()?)?;
        let file = regular(self.open_node(node, flags)?)?;
        let mut reply = Reply::default();
        reply.opened(self.hold(node, file)?);
        Ok(reply)
    }

    fn create(&mut self, node: u64, mut body: Body<'_>) -> Answer {
        let (flags, mode) = (body.u32()?, body.u32()?);
        body.skip(8)?;
        let name = body.name()?;
        let more = OFlags::from_bits_retain(flags) & (OFlags::EXCL | OFlags::TRUNC);
        let how = access(flags)? | more | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if self.handles.len() >= MOST_HANDLES {
            return Err(Errno::NFILE);
        }
        self.nodes.make_room()?;
        let mode = Mode::from_raw_mode(mode & RIGHTS);
        let file = regular(beneath(&self.directory(node)?, name.as_c_str(), how, mode)?)?;
        let (number, mut reply) = self.entry(node, &name)?;
        reply.opened(self.hold(number, file)?);
        Ok(reply)
    }

    fn open_directory(&mut self, node: u64) -> Answer {
        let directory = self.open_node(node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut reply = Reply::default();
        reply.opened(self.hold(node, directory)?);
        Ok(reply)
    }

    fn hold(&mut self, node: u64, file: OwnedFd) -> Result<u64, Errno> {
        if self.handles.len() >= MOST_HANDLES {
            return Err(Errno::NFILE);
        }
        self.last = self.last.checked_add(1).ok_or(Errno::NFILE)?;
        self.handles.insert(self.last, Handle { node, file, position: 0 });
        self.nodes.opened(node);
        Ok(self.last)
    }

    fn held(&self, body: &mut Body<'_>) -> Result<&OwnedFd, Errno> {
        Ok(&self.handles.get(&body.u64()?).ok_or(Errno::BADF)?.file)
    }

    fn close(&mut self, mut body: Body<'_>) -> Answer {
        let handle = self.handles.remove(&body.u64()?).ok_or(Errno::BADF)?;
        self.nodes.closed(handle.node);
        Ok(Reply::default())
    }

    fn make_durable(&self, mut body: Body<'_>) -> Answer {
        const DATA_ALONE: u32 = 1;
        let file = self.held(&mut body)?;
        match body.u32()? & DATA_ALONE {
            0 => fs::fsync(file)?,
            _ => fs::fdatasync(file)?,
        }
        Ok(Reply::default())
    }

    fn read(&self, mut body: Body<'_>) -> Answer {
        let file = self.held(&mut body)?;
        let (offset, size) = (body.u64()?, body.u32()?);
        let mut bytes = vec![0; usize::try_from(size.min(MOST_BYTES)).map_err(|_| Errno::INVAL)?];
        let mut read = 0;
        // Less than was asked for is the end of the file to the kernel.
        while read < bytes.len() {
            match pread(file, &mut bytes[read..], offset.saturating_add(read as u64)) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        let mut reply = Reply::default();
        reply.bytes(&bytes[..read]);
        Ok(reply)
    }

    fn write(&self, mut body: Body<'_>) -> Answer {
        let file = self.held(&mut body)?;
        /// The kernel writes what was written into its cache, by a mapping.
        const FROM_CACHE: u32 = 1;
        let (offset, size, how) = (body.u64()?, body.u32()?, body.u32()?);
        // A lock's owner.
        body.skip(8)?;
        let opened = OFlags::from_bits_retain(body.u32()?);
        body.skip(4)?;
        let bytes = body.bytes(size)?;
        let end = |begin: u64| begin.checked_add(size.into()).ok_or(Errno::FBIG);
        let written = if opened.contains(OFlags::APPEND) && how & FROM_CACHE == 0 {
            // Where the end is, the host knows: somebody else may have written.
            self.may_grow_to(end(u64::try_from(fs::fstat(file)?.st_size).unwrap_or(0))?)?;
            retry_on_intr(|| pwritev2(file, &[IoSlice::new(bytes)], 0, ReadWriteFlags::APPEND))?
        } else {
            self.may_grow_to(end(offset)?)?;
            retry_on_intr(|| pwrite(file, bytes, offset))?
        };
        let mut reply = Reply::default();
        reply.u32(u32::try_from(written).unwrap_or(0)).u32(0);
        Ok(reply)
    }

    /// Sees that the disk has room, or lets go of some.
    fn allocate(&self, mut body: Body<'_>) -> Answer {
        let file = self.held(&mut body)?;
        let (offset, length) = (body.u64()?, body.u64()?);
        let how = FallocateFlags::from_bits(body.u32()?).ok_or(Errno::OPNOTSUPP)?;
        self.may_grow_to(offset.checked_add(length).ok_or(Errno::FBIG)?)?;
        fs::fallocate(file, how, offset, length)?;
        Ok(Reply::default())
    }

    fn may_grow_to(&self, size: u64) -> Result<(), Errno> {
        if self.bounds.file_size.is_some_and(|most| size > most) { Err(Errno::FBIG) } else { Ok(()) }
    }

    fn file_system(&self) -> Answer {
        let mut reply = Reply::default();
        reply.file_system(&fs::fstatvfs(&self.root)?);
        Ok(reply)
    }

    fn read_directory(&mut self, mut body: Body<'_>) -> Answer {
        let handle = self.handles.get_mut(&body.u64()?).ok_or(Errno::BADF)?;
        let (offset, size) = (body.u64()?, body.u32()?);
        let most = usize::try_from(size.min(MOST_BYTES)).map_err(|_| Errno::INVAL)?;
        // Some file systems count entries, and one that was removed moves those behind it.
        if offset != handle.position {
            fs::seek(&handle.file, SeekFrom::Start(offset))?;
        }
        handle.position = offset;
        // As the host tells them they take three quarters of that at least: what is read here fits.
        let mut buffer = vec![MaybeUninit::uninit(); most / 4 * 3];
        let mut entries = RawDir::new(&handle.file, &mut buffer);
        let mut reply = Reply::default();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let kind = match entry.file_type() {
                // DT_UNKNOWN: whoever asks looks.
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            };
            if !reply.directory_entry(most, entry.ino(), entry.next_entry_cookie(), kind, entry.file_name()) {
                break;
            }
            handle.position = entry.next_entry_cookie();
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(reply)
    }
}

fn greet(mut body: Body<'_>) -> Answer {
    let version = (body.u32()?, body.u32()?);
    let mut reply = Reply::default();
    reply.greet(version)?;
    Ok(reply)
}

/// Below a directory, and nowhere else.
fn beneath(directory: &impl AsFd, path: impl rustix::path::Arg, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    fs::openat2(directory, path, flags, mode, resolve)
}

/// How a file is opened. Where it is written to and whether what was there goes first, the guest's kernel says otherwise.
fn access(flags: u32) -> Result<OFlags, Errno> {
    match OFlags::from_bits_retain(flags & OFlags::RWMODE.bits()) {
        how @ (OFlags::RDONLY | OFlags::WRONLY | OFlags::RDWR) => Ok(how),
        _ => Err(Errno::INVAL),
    }
}

/// A file, and not what would wait, or be another thing than bytes.
fn regular(file: OwnedFd) -> Result<OwnedFd, Errno> {
    match FileType::from_raw_mode(fs::fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file),
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::PERM),
    }
}

#[cfg(test)]
mod tests;
