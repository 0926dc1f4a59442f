//! The launcher's side: what this host has for machines, and what a launch at VM becomes: one of the monitor.

use std::{
    ffi::CString,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{Grant, Launch, Refusal, RefusalCode, SocketMode};

use super::{
    Accelerator, GUEST, Kvm, accelerator,
    monitor::{MONITOR, Orders},
    ours::{Owners, Part, judge_entry},
    settings::{Parts, Settings},
    size::{CONFIGURATION, Size},
};
use crate::{
    check::{Checked, refuse},
    directories::Kind,
    launch::{Launcher, OPEN_FILES, TEMP_BYTES},
    own_program,
};

/// The most files that `runtime` may name altogether.
const MOST_FILES: usize = 20_000;

/// How long what was wrong with `runtime` is remembered: walking it anew takes time that all launches wait for.
const AGAIN: Duration = Duration::from_secs(10);

/// What machines are made of here.
#[derive(Debug)]
pub(crate) struct Machines {
    /// By what the policy file said last.
    settings: Option<Settings>,
    found: Result<Found, String>,
    /// What `runtime` has, or why that is not known, for these settings; and when it was walked.
    runtime: Option<(Result<u64, String>, Instant)>,
    /// Whether KVM runs guests, or why not; tried once, when machines are first asked for.
    pub(crate) kvm: Kvm,
    /// The launcher's own program, which is the monitor.
    monitor: Option<OwnedFd>,
}

#[derive(Debug)]
struct Found {
    parts: Parts,
    /// What `runtime` has in bytes.
    runtime: u64,
}

impl Default for Machines {
    fn default() -> Self {
        Self {
            settings: None,
            found: Err("nobody has looked yet".to_owned()),
            runtime: None,
            kvm: Kvm::Untried,
            monitor: None,
        }
    }
}

impl Machines {
    /// Why there are none.
    pub(crate) fn lacking(&self) -> Option<&str> {
        self.found.as_ref().err().map(String::as_str)
    }

    /// Whether the administrator wants some.
    pub(crate) const fn are_wanted(&self) -> bool {
        self.settings.is_some()
    }

    /// What makes them.
    pub(crate) fn accelerator(&self) -> Accelerator {
        match &self.kvm {
            Kvm::Known(Ok(())) => Accelerator::Kvm,
            Kvm::Known(Err(_)) | Kvm::Trying(_) | Kvm::Untried => Accelerator::Emulation,
        }
    }

    /// The same in words.
    pub(crate) fn mechanism(&self) -> String {
        let emulator =
            self.found.as_ref().map_or_else(|_| String::new(), |found| found.parts.emulator.display().to_string());
        match &self.kvm {
            Kvm::Known(Ok(())) => format!("{emulator}, by KVM"),
            Kvm::Known(Err(why)) => format!("{emulator}, by emulation: {why}"),
            Kvm::Trying(_) => format!("{emulator}; whether by KVM is being tried"),
            Kvm::Untried => format!("{emulator}, by emulation"),
        }
    }

    /// The emulator, as the policy names it.
    pub(crate) fn emulator(&self) -> Option<&Path> {
        self.found.as_ref().ok().map(|found| found.parts.emulator.as_path())
    }

    fn look(&mut self, settings: Option<Settings>, now: Instant) {
        let Some(wanted) = settings else {
            self.found = Err("the launcher's policy file has no table [vm], or there is no such file".to_owned());
            self.settings = None;
            return;
        };
        if GUEST.is_empty() {
            self.found =
                Err("this launcher was built without a static C library, and so without a guest's first process"
                    .to_owned());
            return;
        }
        if self.settings.as_ref() != Some(&wanted) {
            self.runtime = None;
        }
        self.found = wanted.parts().and_then(|parts| {
            let runtime = self.size_of_runtime(&parts.runtime, now)?;
            Ok(Found { parts, runtime })
        });
        self.settings = Some(wanted);
        if matches!(self.kvm, Kvm::Untried) {
            self.kvm = Kvm::begin(now);
        }
    }

    /// Waits until it is known what makes them: before the launcher serves anybody.
    pub(crate) fn settle(&mut self) {
        self.kvm.wait();
    }

    /// The child that finds that out.
    pub(crate) fn is_child(&self, pid: i32) -> bool {
        matches!(&self.kvm, Kvm::Trying(attempt) if attempt.pid == pid)
    }

    /// Walked once for the same settings; where that failed, again after a while.
    fn size_of_runtime(&mut self, paths: &[PathBuf], now: Instant) -> Result<u64, String> {
        match &self.runtime {
            Some((known, walked)) if known.is_ok() || now.duration_since(*walked) < AGAIN => known.clone(),
            _ => self.runtime.insert((size_of(paths), now)).0.clone(),
        }
    }

    fn monitor(&mut self) -> io::Result<OwnedFd> {
        match &self.monitor {
            Some(monitor) => monitor.try_clone(),
            None => self.monitor.insert(own_program::sealed()?).try_clone(),
        }
    }
}

/// What these files and directories have in bytes, when nobody else may change any of them.
fn size_of(paths: &[PathBuf]) -> Result<u64, String> {
    // A guest has what a link leads to under the link's name.
    let named = paths.iter().map(|path| path.canonicalize().unwrap_or_else(|_| path.clone()));
    let (mut left, mut bytes, mut files) = (named.collect::<Vec<_>>(), 0_u64, 0_usize);
    while let Some(path) = left.pop() {
        let wrong = |error: io::Error| format!("[vm] runtime: {}: {error}", path.display());
        let found = fs::symlink_metadata(&path).map_err(wrong)?;
        judge_entry(&found, Owners::here()).map_err(|doubt| {
            format!(
                "[vm] runtime: {}: {doubt}; every guest would get it: chown -R root and chmod -R go-w what runtime names",
                path.display()
            )
        })?;
        files += 1;
        if files > MOST_FILES {
            return Err(format!("[vm] runtime names more than {MOST_FILES} files"));
        }
        if found.is_dir() {
            for entry in fs::read_dir(&path).map_err(wrong)? {
                left.push(entry.map_err(wrong)?.path());
            }
        }
        // And its head in the archive.
        bytes = bytes.saturating_add(found.len()).saturating_add(512);
    }
    Ok(bytes)
}

/// A launch of the monitor in place of a plugin's.
pub(crate) struct Prepared {
    /// What is asked of the host.
    pub(crate) request: Launch,
    pub(crate) checked: Checked,
    pub(crate) monitor: OwnedFd,
    /// The kernel and its modules.
    pub(crate) files: Arc<[Part]>,
    pub(crate) device: Option<&'static str>,
}

impl Launcher {
    /// Looks for what machines are made of, as the policy file says now.
    pub(crate) fn look_for_machines(&mut self) {
        match self.policy.machine() {
            Ok(settings) => self.machines.look(settings, Instant::now()),
            // What is wrong with it is told once, as the file's own trouble.
            Err(_) => {
                let why = "the launcher's policy file cannot be used as it is now; `plugvisor doctor` says what is wrong with it";
                self.machines.found = Err(why.to_owned());
            }
        }
    }

    /// Makes a launch at VM one of its monitor. `bundle` is the size of its bundle in bytes, and `files` how many it has.
    pub(crate) fn prepare_machine(
        &mut self,
        request: &Launch,
        checked: Checked,
        bundle: u64,
        files: usize,
    ) -> Result<Prepared, Refusal> {
        let plugin = &request.plugin;
        let not_started = |why: String| Refusal {
            code: RefusalCode::ControlUnavailable,
            message: format!("{plugin} was not started: {why}"),
        };
        let failed = |error: io::Error| Refusal {
            code: RefusalCode::Kernel,
            message: format!("{plugin} was not started: copying the launcher's own program failed: {error}"),
        };
        if let Kvm::Trying(_) = self.machines.kvm {
            return refuse(
                RefusalCode::Kernel,
                format!(
                    "{plugin} was not started: [vm] is new in the launcher's policy file, and whether this host's processor \
                     runs guests is being tried, for a second at most; try again"
                ),
            );
        }
        let monitor = self.machines.monitor().map_err(failed)?;
        let accelerator = self.machines.accelerator();
        let Found { parts, runtime } = self.machines.found.as_ref().map_err(|why| not_started(why.clone()))?;
        let heads = u64::try_from(files).unwrap_or(u64::MAX).saturating_mul(512);
        let configuration = request.grants.contains(&Grant::ReadConfig);
        let own = bundle.saturating_add(heads).saturating_add(if configuration { CONFIGURATION } else { 0 });
        let size = Size::of(&request.limits, own, *runtime, request.inward);
        if size.whole() > parts.max_memory {
            return refuse(
                RefusalCode::Policy,
                format!(
                    "{plugin} was not started: its machine would have {} MiB of the host's memory ({} MiB of guest, of which \
                     twice its archive of at most {} MiB, and {} MiB for connections to its ports), and [vm] max_memory of \
                     the launcher's policy file allows {}; give it a smaller maxMemory or bundle, or fewer max_connections, \
                     or raise max_memory",
                    size.whole() >> 20,
                    size.guest >> 20,
                    size.archive >> 20,
                    size.connections >> 20,
                    parts.max_memory >> 20
                ),
            );
        }
        let limits = &request.limits;
        let orders = Orders {
            emulator: parts.emulator.clone(),
            accelerator,
            guest_bytes: size.guest,
            archive_bytes: size.archive,
            modules: u64::try_from(parts.files.len().saturating_sub(1)).unwrap_or(0),
            libraries: parts.libraries.clone(),
            runtime: parts.runtime.clone(),
            inherits: checked.socket == SocketMode::Inherit,
            egress: request.grants.contains(&Grant::Egress),
            listen: checked.listen.clone(),
            inward: request.inward,
            configuration,
            data: Kind::Data.access(&request.grants),
            temp: request.grants.contains(&Grant::WriteTemp).then_some(TEMP_BYTES),
            memory: limits.memory_bytes,
            pids: limits.pids.map(u64::from),
            open_files: limits.open_files.map_or(OPEN_FILES, u64::from),
            file_size: limits.file_size_bytes,
        };
        let orders = serde_json::to_string(&orders).ok().and_then(|text| CString::new(text).ok());
        let Some(orders) = orders else {
            return refuse(RefusalCode::Policy, format!("{plugin} was not started: a path of [vm] is not text"));
        };
        let first = [c"plugvisor-launcher".to_owned(), CString::new(MONITOR).unwrap_or_default(), orders];
        let argv = first.into_iter().chain(checked.argv).collect();
        Ok(Prepared {
            request: Launch { limits: size.outside(limits), ..request.clone() },
            checked: Checked { argv, ..checked },
            monitor,
            files: parts.files.clone(),
            device: (accelerator == Accelerator::Kvm).then_some(accelerator::DEVICE),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_runtime_is_looked_at_again_after_a_while() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("file");
        let paths = [file.clone()];
        let mut machines = Machines::default();
        let begun = Instant::now();
        let why = machines.size_of_runtime(&paths, begun).expect_err("it is not there");
        assert!(why.contains("runtime") && why.contains("file"), "{why}");
        fs::write(&file, "text").expect("writes");
        let soon = begun + AGAIN.saturating_sub(Duration::from_nanos(1));
        assert_eq!(machines.size_of_runtime(&paths, soon), Err(why));
        assert_eq!(machines.size_of_runtime(&paths, begun + AGAIN), Ok(4 + 512));
        // And what is known is not walked again.
        fs::remove_file(&file).expect("removes");
        assert_eq!(machines.size_of_runtime(&paths, begun + 3 * AGAIN), Ok(4 + 512));
    }

    #[test]
    fn what_a_link_leads_to_counts() {
        let directory = tempfile::tempdir().expect("a directory");
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, "a longer text").expect("writes");
        std::os::unix::fs::symlink("file", &link).expect("a link");
        assert_eq!(size_of(&[link]), Ok(13 + 512));
    }
}
