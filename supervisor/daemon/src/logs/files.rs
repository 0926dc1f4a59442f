//! The files that keep plugins' lines: written by a thread of its own, rotated by size, bounded in number and in total.
//!
//! Whoever hands a line over never waits: the queue is bounded, and a line that finds it full, or that the disk refuses,
//! is counted and lost. A disk that is full is told once, and written to again as soon as it has room. Names of files
//! come from [`PluginName`] only, and every step goes through the directory's descriptor and follows no link.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, SystemTime},
};

use plugvisor_core::event::ResourceEvent;
use plugvisor_package::PluginName;
use rustix::{
    fs::{AtFlags, Mode, OFlags},
    io::Errno,
};
use tokio::sync::oneshot;

use super::{
    Figures, LogLine,
    record::{self, Place},
};
use crate::{
    events::{Events, Subject},
    runtime_directory::Owner,
};

/// Bounds of what is kept on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLimits {
    /// A file that would grow beyond this is rotated.
    pub file_bytes: u64,
    /// Files of one plugin, the one that is written to included; 0 keeps nothing on disk.
    pub files: u32,
    /// All files of all plugins together. Beyond it the oldest rotated file goes first.
    pub total_bytes: u64,
    /// Lines that may wait for the disk.
    pub queue: usize,
}

impl Default for FileLimits {
    fn default() -> Self {
        Self { file_bytes: 4 * 1024 * 1024, files: 4, total_bytes: 256 * 1024 * 1024, queue: 1024 }
    }
}

/// The longest line in a file that is read, in bytes: a line's text and what JSON adds to it at the worst.
pub(super) const RECORD_BYTES: u64 = 1024 * 1024;

/// Files held open at once.
const OPEN: usize = 64;

/// How long the last lines may take to reach the disk when the supervisor ends.
const PATIENCE: Duration = Duration::from_secs(2);

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} the log directory {}: {source}; check its permissions, or set [logs] directory", path.display())]
pub struct LogDirectoryError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// The directory of the files, open.
#[derive(Clone, Debug)]
pub struct LogDirectory {
    path: PathBuf,
    descriptor: Arc<OwnedFd>,
}

impl LogDirectory {
    /// Opens it, or makes it: private, and `owner`'s when root makes it for another user. One that exists must be
    /// theirs already: nothing of anybody else's is taken over by a wrong path.
    pub fn open(path: &Path, owner: Option<Owner>) -> Result<Self, LogDirectoryError> {
        let failed = |what: &'static str| {
            move |error: Errno| LogDirectoryError { what, path: path.to_owned(), source: error.into() }
        };
        let private = Mode::RWXU;
        let mut made = true;
        match rustix::fs::mkdir(path, private) {
            Ok(()) => {}
            Err(Errno::EXIST) => made = false,
            Err(Errno::NOENT) => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                std::fs::create_dir_all(parent).map_err(|source| LogDirectoryError {
                    what: "make the parent of",
                    path: path.to_owned(),
                    source,
                })?;
                rustix::fs::mkdir(path, private).map_err(failed("make"))?;
            }
            Err(error) => return Err(failed("make")(error)),
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let descriptor = rustix::fs::open(path, flags, Mode::empty()).map_err(failed("open"))?;
        if made {
            if let Some(Owner { uid, gid }) = owner {
                let (uid, gid) = (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid));
                rustix::fs::fchown(&descriptor, Some(uid), Some(gid)).map_err(failed("hand over"))?;
            }
        } else {
            let stat = rustix::fs::fstat(&descriptor).map_err(failed("look at"))?;
            let uid = owner.map_or_else(|| rustix::process::geteuid().as_raw(), |owner| owner.uid);
            let strange = if stat.st_uid != uid {
                Some(format!("it belongs to user {}, not to user {uid}", stat.st_uid))
            } else if stat.st_mode & 0o022 != 0 {
                Some("others may write to it".to_owned())
            } else {
                None
            };
            if let Some(why) = strange {
                let source = io::Error::other(why);
                return Err(LogDirectoryError { what: "use", path: path.to_owned(), source });
            }
        }
        Ok(Self { path: path.to_owned(), descriptor: Arc::new(descriptor) })
    }

    /// Where it lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&*self.descriptor, name, flags, Mode::RUSR | Mode::WUSR)?;
        let file = File::from(file);
        if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("it is no regular file")) }
    }

    /// The files of ours in it: name, plugin, rotation number (0 is written to), size, when it was written last.
    fn list(&self) -> io::Result<Vec<Listed>> {
        let mut found = Vec::new();
        for entry in rustix::fs::Dir::read_from(&*self.descriptor)? {
            let entry = entry?;
            let Some((plugin, number)) = entry.file_name().to_str().ok().and_then(parse) else { continue };
            let name = name(&plugin, number);
            // It may have been removed since.
            let Ok(stat) = rustix::fs::statat(&*self.descriptor, &name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let bytes = u64::try_from(stat.st_size).unwrap_or(0);
            let written = (stat.st_mtime, stat.st_mtime_nsec);
            found.push(Listed { name, plugin, number, bytes, written });
        }
        Ok(found)
    }
}

struct Listed {
    name: String,
    plugin: PluginName,
    number: u32,
    bytes: u64,
    written: (i64, u64),
}

/// `gallery.log` and `gallery.log.3`.
fn name(plugin: &PluginName, number: u32) -> String {
    if number == 0 { format!("{plugin}.log") } else { format!("{plugin}.log.{number}") }
}

fn parse(name: &str) -> Option<(PluginName, u32)> {
    let (plugin, rest) = name.split_once(".log")?;
    let number = match rest.strip_prefix('.') {
        Some(number) => number.parse().ok().filter(|number| *number > 0)?,
        None if rest.is_empty() => 0,
        None => return None,
    };
    Some((plugin.parse().ok()?, number))
}

/// A line on its way to its file.
struct Entry {
    line: LogLine,
    number: u64,
    figures: Arc<Figures>,
}

/// What keeps lines on disk, and reads them again.
#[derive(Debug)]
pub struct LogFiles {
    directory: LogDirectory,
    queue: Mutex<Option<SyncSender<Entry>>>,
    ended: Mutex<Option<oneshot::Receiver<()>>>,
    /// Held by the writer while it renames, and by readers while they open.
    names: Arc<RwLock<()>>,
    run: u64,
}

impl LogFiles {
    /// Starts the thread that writes.
    pub fn start(directory: LogDirectory, limits: FileLimits, events: Arc<Events>) -> io::Result<Self> {
        let (queue, entries) = sync_channel(limits.queue.max(1));
        let (end, ended) = oneshot::channel();
        let names = Arc::new(RwLock::new(()));
        // Distinct runs are all it must tell apart.
        let run = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let run = u64::try_from(run).unwrap_or(u64::MAX);
        let writer = Writer {
            directory: directory.clone(),
            limits,
            run,
            names: Arc::clone(&names),
            open: BTreeMap::new(),
            refused: false,
            events,
        };
        std::thread::Builder::new().name("plugvisor-logs".into()).spawn(move || {
            writer.run(&entries);
            // Nobody may be waiting.
            let _ = end.send(());
        })?;
        Ok(Self { directory, queue: Mutex::new(Some(queue)), ended: Mutex::new(Some(ended)), names, run })
    }

    /// Hands a line over; never waits. `number` is the line's own in this run of the supervisor.
    pub(super) fn keep(&self, line: LogLine, number: u64, figures: &Arc<Figures>) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = queue.as_ref() else { return };
        let entry = Entry { line, number, figures: Arc::clone(figures) };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = queue.try_send(entry) {
            figures.lost(1);
        }
    }

    /// This run's own number, by which lines that are kept in memory too are known.
    pub(super) fn run(&self) -> u64 {
        self.run
    }

    /// Every plugin that has a file.
    pub(crate) fn plugins(&self) -> Vec<PluginName> {
        let mut plugins: Vec<PluginName> =
            self.directory.list().unwrap_or_default().into_iter().map(|listed| listed.plugin).collect();
        plugins.sort();
        plugins.dedup();
        plugins
    }

    /// A plugin's files, the oldest first, without those that were written last before `since`. Blocks on the disk.
    pub(super) fn open(&self, plugin: &PluginName, since: Option<SystemTime>) -> Vec<File> {
        let _names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        let mut listed = self.directory.list().unwrap_or_default();
        listed.retain(|listed| listed.plugin == *plugin);
        listed.sort_by_key(|listed| std::cmp::Reverse(listed.number));
        let files = listed.iter().filter_map(|listed| self.directory.open_file(&listed.name, OFlags::RDONLY).ok());
        let late = |file: &File| {
            let written = file.metadata().and_then(|metadata| metadata.modified()).ok();
            since.is_none_or(|since| written.is_none_or(|written| written >= since))
        };
        files.filter(late).collect()
    }

    /// Takes no more lines and waits, not for long, until those handed over are written.
    pub async fn close(&self) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(ended) = ended
            && tokio::time::timeout(PATIENCE, ended).await.is_err()
        {
            tracing::warn!(directory = %self.directory.path().display(), "the disk is too slow: the last log lines are not kept");
        }
    }
}

struct Open {
    file: File,
    bytes: u64,
}

/// The thread's own.
struct Writer {
    directory: LogDirectory,
    limits: FileLimits,
    run: u64,
    names: Arc<RwLock<()>>,
    open: BTreeMap<PluginName, Open>,
    /// The disk refused the last line.
    refused: bool,
    events: Arc<Events>,
}

impl Writer {
    fn run(mut self, entries: &Receiver<Entry>) {
        self.hold_total();
        while let Ok(Entry { line, number, figures }) = entries.recv() {
            let bytes = record::encode(&line, Place { run: self.run, number });
            match self.write(&line.plugin, &bytes) {
                Ok(()) if self.refused => {
                    self.refused = false;
                    tracing::info!(directory = %self.directory.path().display(), "log lines are kept on disk again");
                }
                Ok(()) => {}
                Err(error) => {
                    figures.lost(1);
                    self.open.remove(&line.plugin);
                    if !std::mem::replace(&mut self.refused, true) {
                        self.tell(&error);
                    }
                }
            }
        }
    }

    fn write(&mut self, plugin: &PluginName, bytes: &[u8]) -> io::Result<()> {
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let limit = self.limits.file_bytes;
        if self.opened(plugin)?.bytes > 0 && self.opened(plugin)?.bytes.saturating_add(length) > limit {
            self.rotate(plugin)?;
        }
        let open = self.opened(plugin)?;
        match open.file.write_all(bytes) {
            Ok(()) => {
                open.bytes += length;
                Ok(())
            }
            Err(error) => {
                // Half a line is none. Should this fail too, the next start trims it.
                let _ = open.file.set_len(open.bytes);
                Err(error)
            }
        }
    }

    fn opened(&mut self, plugin: &PluginName) -> io::Result<&mut Open> {
        if !self.open.contains_key(plugin) {
            if self.open.len() >= OPEN {
                self.open.clear();
            }
            let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE;
            let mut file = self.directory.open_file(&name(plugin, 0), flags)?;
            let bytes = trim(&mut file)?;
            self.open.insert(plugin.clone(), Open { file, bytes });
        }
        self.open.get_mut(plugin).ok_or_else(|| io::Error::other("it was not opened"))
    }

    fn rotate(&mut self, plugin: &PluginName) -> io::Result<()> {
        {
            let _names = self.names.write().unwrap_or_else(PoisonError::into_inner);
            let directory = self.directory.descriptor.as_fd();
            let last = self.limits.files.saturating_sub(1);
            // Those of an earlier, larger limit too.
            for listed in self.directory.list()? {
                if listed.plugin == *plugin && listed.number >= last {
                    rustix::fs::unlinkat(directory, &listed.name, AtFlags::empty())?;
                }
            }
            for number in (0..last).rev() {
                match rustix::fs::renameat(directory, name(plugin, number), directory, name(plugin, number + 1)) {
                    Ok(()) | Err(Errno::NOENT) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            self.open.remove(plugin);
        }
        self.hold_total();
        Ok(())
    }

    /// Removes the oldest rotated files until all together are within the bound.
    fn hold_total(&self) {
        let Ok(mut listed) = self.directory.list() else { return };
        let mut total: u64 = listed.iter().map(|listed| listed.bytes).sum();
        listed.retain(|listed| listed.number > 0);
        listed.sort_by_key(|listed| (listed.written, std::cmp::Reverse(listed.number)));
        for Listed { name, bytes, .. } in listed {
            if total <= self.limits.total_bytes {
                return;
            }
            if rustix::fs::unlinkat(&*self.directory.descriptor, &name, AtFlags::empty()).is_ok() {
                total -= bytes;
            }
        }
    }

    fn tell(&self, error: &io::Error) {
        let place = self.directory.path().display().to_string();
        tracing::error!(directory = place, %error, "log lines are not kept on disk; they are counted until they are again");
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            self.events.publish(Subject::Supervisor, ResourceEvent::DiskLow { place });
        }
    }
}

/// Cuts a last line without its end, which a crash left, and returns the file's length.
fn trim(file: &mut File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let from = length.saturating_sub(RECORD_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut tail = Vec::new();
    (&mut *file).take(RECORD_BYTES).read_to_end(&mut tail)?;
    let good = match tail.iter().rposition(|byte| *byte == b'\n') {
        Some(end) => from + u64::try_from(end).unwrap_or(0) + 1,
        // No line of ours is that long: nothing of the tail is one.
        None => from,
    };
    if good < length {
        file.set_len(good)?;
    }
    Ok(good)
}

#[cfg(test)]
mod tests;
