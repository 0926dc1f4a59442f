//! Who has which uid: each plugin's name has one, for good.
//!
//! A uid is the only owner that a plugin's files have, so one that was given is never given to another name, whatever was
//! unloaded, forgotten or restarted meanwhile. With a store on the disk the names are written there; a file that cannot be
//! read is never begun anew. What was written is made durable by the child that becomes the plugin, before it takes the
//! uid: the loop does not wait for the disk.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    ops::RangeInclusive,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use plugvisor_package::PluginName;
use plugvisor_sandbox::protocol::{Refusal, RefusalCode};

use crate::{check::refuse, store};

const HEADING: &str = "plugvisor uids 1\n";
const FILE: &str = "uids";

/// The uids of a launcher that is root.
pub(crate) struct Uids {
    /// The last of the range is the copier's.
    range: RangeInclusive<u32>,
    taken: BTreeMap<String, u32>,
    file: Option<PathBuf>,
    /// How often the file was written, and up to which time that is known to be on the disk.
    written: u64,
    durable: u64,
}

/// What a child makes durable before it takes the uid.
pub(crate) struct Unsaved {
    pub(crate) file: OwnedFd,
    pub(crate) directory: OwnedFd,
    /// Which writing this is, for [`Uids::saved`].
    pub(crate) mark: u64,
}

impl Uids {
    /// Reads the file in the store's directory. An error names the fix.
    pub(crate) fn open(range: RangeInclusive<u32>, directory: Option<&Path>) -> Result<Self, String> {
        let mut this = Self { range, taken: BTreeMap::new(), file: None, written: 0, durable: 0 };
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

    /// The uid of this name, and what must be durable before it is used.
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
        Ok((uid, self.unsaved().map_err(|error| unwritten(name, &error))?))
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
        if let Some(path) = &self.file {
            let new = store::write_beside(path, &write(&self.taken));
            if let Err(error) = new.and_then(|_| fs::rename(store::beside(path), path)) {
                self.taken.remove(name.as_str());
                return Err(unwritten(name, &error));
            }
            self.written += 1;
        }
        Ok(uid)
    }

    fn unsaved(&self) -> io::Result<Option<Unsaved>> {
        let Some(path) = self.file.as_ref().filter(|_| self.durable < self.written) else { return Ok(None) };
        let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let (file, directory) = (File::open(path)?.into(), File::open(directory)?.into());
        Ok(Some(Unsaved { file, directory, mark: self.written }))
    }

    /// A child has made this writing durable.
    pub(crate) fn saved(&mut self, mark: u64) {
        self.durable = self.durable.max(mark);
    }
}

fn unwritten(name: &PluginName, error: &io::Error) -> Refusal {
    Refusal {
        code: RefusalCode::Exhausted,
        message: format!(
            "{name} was not started: its uid could not be written down: {error}; look at the store's disk"
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
    use super::*;

    fn name(text: &str) -> PluginName {
        text.parse().expect("a name")
    }

    fn uid(uids: &mut Uids, of: &str) -> u32 {
        uids.of(&name(of)).expect("a uid").0
    }

    #[test]
    fn a_name_keeps_its_uid_and_nobody_else_gets_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let open = |range| Uids::open(range, Some(directory.path()));
        let mut uids = open(5000..=5003).expect("a new file");
        assert_eq!((uid(&mut uids, "a"), uid(&mut uids, "b"), uid(&mut uids, "a")), (5000, 5001, 5000));
        let mut uids = open(5000..=5003).expect("the same file");
        assert_eq!((uid(&mut uids, "c"), uid(&mut uids, "b")), (5002, 5001));
        // 5003 is the copier's.
        assert_eq!(uids.of(&name("d")).map(|_| ()).expect_err("none is left").code, RefusalCode::Exhausted);
        let mut uids = open(6000..=6003).expect("the same file");
        assert_eq!(uids.of(&name("a")).map(|_| ()).expect_err("outside").code, RefusalCode::Policy);
        assert_eq!(uid(&mut uids, "d"), 6000);
    }

    #[test]
    fn what_was_written_is_asked_to_be_saved_until_it_is() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut uids = Uids::open(5000..=5009, Some(directory.path())).expect("a new file");
        let (_, first) = uids.of(&name("a")).expect("a uid");
        let (_, again) = uids.of(&name("a")).expect("a uid");
        assert_eq!(first.map(|unsaved| unsaved.mark), again.as_ref().map(|unsaved| unsaved.mark));
        uids.saved(again.expect("not saved yet").mark);
        assert!(uids.of(&name("a")).expect("a uid").1.is_none());
        assert!(uids.of(&name("b")).expect("a uid").1.is_some());
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
