//! Who has which uid: each plugin's name has one, for good.
//!
//! A uid is the only owner that a plugin's files have, so one that was given is never given to another name, whatever was
//! unloaded, forgotten or restarted meanwhile. With a store on the disk the names are written there; a file that cannot be
//! read is never begun anew. A child writes it, the saver: the loop does not wait for the disk, and the plugin's own
//! child sets itself up meanwhile. Nothing is executed under a uid before its name is on the disk.

use std::{
    collections::BTreeMap,
    fs::File,
    io,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use plugvisor_package::PluginName;
use plugvisor_sandbox::protocol::{Refusal, RefusalCode};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, getpid, pidfd_send_signal, waitid};

use crate::{
    check::refuse,
    kernel::{self, Cloned},
    store,
};

const HEADING: &str = "plugvisor uids 1\n";
const FILE: &str = "uids";

/// The uids of a launcher that is root.
pub(crate) struct Uids {
    /// The last of the range is the copier's.
    range: RangeInclusive<u32>,
    taken: BTreeMap<String, u32>,
    file: Option<PathBuf>,
    /// How many names were added, how many of these are known to be on the disk, and for how many somebody waits.
    changes: u64,
    durable: u64,
    asked: u64,
    saver: Option<Saver>,
}

/// How many of the added names must be on the disk before a uid is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Unsaved(u64);

/// The child that writes the names, as they were when it was forked.
struct Saver {
    pidfd: OwnedFd,
    pid: i32,
    changes: u64,
}

impl Uids {
    /// Reads the file in the store's directory. An error names the fix.
    pub(crate) fn open(range: RangeInclusive<u32>, directory: Option<&Path>) -> Result<Self, String> {
        let mut this =
            Self { range, taken: BTreeMap::new(), file: None, changes: 0, durable: 0, asked: 0, saver: None };
        let Some(directory) = directory else { return Ok(this) };
        let path = directory.join(FILE);
        let broken = |why: &str| {
            format!(
                "{} cannot be used: {why}; restore it from a backup. Without one, move it away together with every data \
                 directory of a plugin: plugins get new uids, and a new uid must not meet an old one's files",
                path.display()
            )
        };
        match File::open(&path) {
            Ok(file) => {
                let file = OwnedFd::from(file);
                store::only_ours(&file).map_err(|why| broken(&why))?;
                let text = io::read_to_string(File::from(file)).map_err(|error| broken(&error.to_string()))?;
                this.taken = read(&text).map_err(|why| broken(&why))?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(broken(&error.to_string())),
        }
        this.file = Some(path);
        Ok(this)
    }

    /// The uid that the store's copier has, and no plugin ever.
    pub(crate) const fn copier(range: &RangeInclusive<u32>) -> u32 {
        *range.end()
    }

    /// The uid of this name, and what must be durable before anything is executed under it. The saver is to be started.
    pub(crate) fn of(&mut self, name: &PluginName) -> Result<(u32, Option<Unsaved>), Refusal> {
        let uid = match self.taken.get(name.as_str()) {
            Some(uid) if self.range.contains(uid) && *uid != Self::copier(&self.range) => *uid,
            Some(uid) => {
                return refuse(
                    RefusalCode::Policy,
                    format!(
                        "{name} was not started: its uid {uid} is outside of the range {}-{} that the launcher was \
                         started with; start it with the range that it had",
                        self.range.start(),
                        self.range.end()
                    ),
                );
            }
            None => self.give(name)?,
        };
        let unsaved = (self.durable < self.changes).then_some(Unsaved(self.changes));
        if unsaved.is_some() {
            self.asked = self.changes;
        }
        Ok((uid, unsaved))
    }

    fn give(&mut self, name: &PluginName) -> Result<u32, Refusal> {
        // Above all that were ever given; what lies between is tried when the end is reached.
        let taken: std::collections::BTreeSet<u32> = self.taken.values().copied().collect();
        let above = taken.last().map_or(*self.range.start(), |last| last.saturating_add(1)).max(*self.range.start());
        let free = |uid: &u32| *uid != Self::copier(&self.range) && *uid != 0 && !taken.contains(uid);
        let next = (above..=*self.range.end()).find(free).or_else(|| self.range.clone().find(free));
        let Some(uid) = next else {
            return refuse(
                RefusalCode::Exhausted,
                format!(
                    "{name} was not started: every uid of --uid-range is taken; widen it and start plugvisord again"
                ),
            );
        };
        self.taken.insert(name.to_string(), uid);
        if self.file.is_some() {
            self.changes += 1;
        }
        Ok(uid)
    }

    /// Whether a name has its uid beyond the launcher's own life.
    pub(crate) const fn last(&self) -> bool {
        self.file.is_some()
    }

    /// Whether this is on the disk.
    pub(crate) const fn is_saved(&self, unsaved: Unsaved) -> bool {
        unsaved.0 <= self.durable
    }

    /// Starts the saver when somebody waits for it, which keeps the store's lock until it has ended; the pidfd to watch.
    /// One that could not be started is tried again when something else happens; who waits for it has a deadline.
    pub(crate) fn start_saver(&mut self, lock: Option<BorrowedFd<'_>>) -> Option<BorrowedFd<'_>> {
        let path = self.file.as_ref().filter(|_| self.saver.is_none() && self.asked > self.durable)?;
        let launcher = getpid();
        // Its path was opened at the start, so that this fails for nothing.
        let names = store::Durable::prepare(path, write(&self.taken)).ok()?;
        match kernel::clone3(0, None) {
            Ok(Cloned::Child) => save(&names, launcher, lock),
            Ok(Cloned::Parent { pidfd, pid }) => {
                Some(self.saver.insert(Saver { pidfd, pid, changes: self.changes }).pidfd.as_fd())
            }
            Err(_) => None,
        }
    }

    /// The saver has ended: the pidfd that is no longer to be watched, and the error's number, if it failed.
    pub(crate) fn saver_ended(&mut self) -> Option<(OwnedFd, Result<(), i32>)> {
        let saver = self.saver.as_ref()?;
        let status = match waitid(WaitId::PidFd(saver.pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(None) => return None,
            Ok(Some(status)) => status.exit_status(),
            Err(_) => None,
        };
        let Saver { pidfd, changes, .. } = self.saver.take()?;
        if status == Some(0) {
            self.durable = self.durable.max(changes);
            return Some((pidfd, Ok(())));
        }
        // Whoever waits is refused; the next launch asks anew.
        self.asked = self.durable;
        Some((pidfd, Err(status.unwrap_or(libc::EINTR))))
    }

    /// Whether this is the saver, which is reaped by [`Uids::saver_ended`].
    pub(crate) fn is_child(&self, pid: i32) -> bool {
        self.saver.as_ref().is_some_and(|saver| saver.pid == pid)
    }

    /// Kills the saver: the launcher ends.
    pub(crate) fn kill(&self) {
        if let Some(saver) = &self.saver {
            let _ = pidfd_send_signal(&saver.pidfd, Signal::KILL);
        }
    }
}

/// The saver, which takes no memory. Its status is 0 or the error's number.
fn save(names: &store::Durable, launcher: Pid, lock: Option<BorrowedFd<'_>>) -> ! {
    kernel::set_name(c"plugvisor-uids");
    let ready = store::become_writer(launcher, lock);
    let saved = ready.and_then(|()| names.write());
    kernel::exit_now(saved.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0))
}

/// What a launch is told whose uid could not be saved.
pub(crate) fn unwritten(plugin: &str, errno: i32) -> Refusal {
    let error = io::Error::from_raw_os_error(errno);
    Refusal {
        code: RefusalCode::Exhausted,
        message: format!(
            "{plugin} was not started: its uid could not be written down: {error}; look at the store's disk"
        ),
    }
}

fn write(taken: &BTreeMap<String, u32>) -> String {
    let lines = taken.iter().map(|(name, uid)| format!("{name} {uid}\n"));
    std::iter::once(HEADING.to_owned()).chain(lines).collect()
}

fn read(text: &str) -> Result<BTreeMap<String, u32>, String> {
    let rest = text.strip_prefix(HEADING).ok_or("it does not begin as such a file does")?;
    if !rest.is_empty() && !rest.ends_with('\n') {
        return Err("its last line is cut off".to_owned());
    }
    let mut taken = BTreeMap::new();
    let mut uids = std::collections::BTreeSet::new();
    for line in rest.lines() {
        let parsed = line.split_once(' ').and_then(|(name, uid)| {
            Some((name.parse::<PluginName>().ok()?, uid.parse::<u32>().ok().filter(|uid| *uid != 0)?))
        });
        let Some((name, uid)) = parsed else { return Err(format!("the line {line:?} is not a name and a uid")) };
        if !uids.insert(uid) || taken.insert(name.to_string(), uid).is_some() {
            return Err(format!("{name} or the uid {uid} stands in it twice"));
        }
    }
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn name(text: &str) -> PluginName {
        text.parse().expect("a name")
    }

    fn uid(uids: &mut Uids, of: &str) -> u32 {
        uids.of(&name(of)).expect("a uid").0
    }

    /// Runs the saver to its end.
    fn save_now(uids: &mut Uids) -> Result<(), i32> {
        let pidfd = uids.start_saver(None).expect("there is something to save");
        let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut ended, None).expect("poll");
        uids.saver_ended().expect("it has ended").1
    }

    #[test]
    fn a_name_keeps_its_uid_and_nobody_else_gets_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let open = |range| Uids::open(range, Some(directory.path()));
        let mut uids = open(5000..=5003).expect("a new file");
        assert_eq!((uid(&mut uids, "a"), uid(&mut uids, "b"), uid(&mut uids, "a")), (5000, 5001, 5000));
        save_now(&mut uids).expect("saved");
        let mut uids = open(5000..=5003).expect("the same file");
        assert_eq!((uid(&mut uids, "c"), uid(&mut uids, "b")), (5002, 5001));
        // 5003 is the copier's.
        assert_eq!(uids.of(&name("d")).map(|_| ()).expect_err("none is left").code, RefusalCode::Exhausted);
        save_now(&mut uids).expect("saved");
        let mut uids = open(6000..=6003).expect("the same file");
        assert_eq!(uids.of(&name("a")).map(|_| ()).expect_err("outside").code, RefusalCode::Policy);
        assert_eq!(uid(&mut uids, "d"), 6000);
    }

    #[test]
    fn a_name_is_asked_to_be_saved_until_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut uids = Uids::open(5000..=5009, Some(directory.path())).expect("a new file");
        let (_, first) = uids.of(&name("a")).expect("a uid");
        let (_, again) = uids.of(&name("a")).expect("a uid");
        assert_eq!(first, again);
        let unsaved = first.expect("not saved yet");
        assert!(!uids.is_saved(unsaved));
        save_now(&mut uids).expect("saved");
        assert!(uids.is_saved(unsaved));
        assert!(uids.start_saver(None).is_none(), "there is nothing to save");
        assert_eq!(uids.of(&name("a")).expect("a uid").1, None);
        let (_, other) = uids.of(&name("b")).expect("a uid");
        assert!(!uids.is_saved(other.expect("not saved yet")));
    }

    #[test]
    fn what_cannot_be_saved_is_told_and_asked_for_anew() {
        let around = tempfile::tempdir().expect("a directory");
        let directory = around.path().join("store");
        fs::create_dir(&directory).expect("a directory");
        let mut uids = Uids::open(5000..=5009, Some(&directory)).expect("a new file");
        let (_, unsaved) = uids.of(&name("a")).expect("a uid");
        let unsaved = unsaved.expect("not saved yet");
        fs::remove_dir(&directory).expect("it is empty");
        assert_eq!(save_now(&mut uids), Err(libc::ENOENT));
        assert!(!uids.is_saved(unsaved));
        assert!(uids.start_saver(None).is_none(), "nobody asks");
        fs::create_dir(&directory).expect("a directory");
        assert_eq!(uids.of(&name("a")).expect("a uid").1, Some(unsaved));
        save_now(&mut uids).expect("saved");
        assert!(uids.is_saved(unsaved));
    }

    #[test]
    fn a_broken_file_is_never_begun_anew() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join(FILE);
        for broken in [
            "",
            "a 5000\n",
            "plugvisor uids 1\na 5000",
            "plugvisor uids 1\na 0\n",
            "plugvisor uids 1\nA 5\n",
            "plugvisor uids 1\na 5\nb 5\n",
            "plugvisor uids 1\na 5\na 6\n",
            "plugvisor uids 2\n",
        ] {
            fs::write(&path, broken).expect("writes");
            let error = Uids::open(5000..=5009, Some(directory.path())).map(|_| ()).expect_err(broken);
            assert!(error.contains("restore it"), "{error}");
            assert_eq!(fs::read_to_string(&path).expect("reads"), broken);
        }
        fs::write(&path, HEADING).expect("writes");
        use std::os::unix::fs::PermissionsExt as _;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("chmod");
        assert!(Uids::open(5000..=5009, Some(directory.path())).is_err());
    }
}
