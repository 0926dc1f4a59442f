//! One packet of an import: whether its files may come, where they come from, and the child that copies them.

use std::{
    collections::BTreeSet,
    fs,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    time::Instant,
};

use plugvisor_package::{BundleFile, Digest, Manifest};
use plugvisor_sandbox::protocol::{ImportFile, Refusal, RefusalCode};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags, fchmod, mkdirat, openat2},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
    process::getpid,
};

use super::{
    super::{
        StoreLimits,
        copy::{self, Job, Terms, Told},
        origin::{Doubt, Owners},
    },
    Copying, Origin, Transaction,
    words::shown,
};
use crate::{
    check::refuse,
    creds::Identity,
    kernel::{self, Cloned},
};

/// What holds for a packet, whoever sends it.
pub(super) struct Given<'a> {
    pub(super) limits: &'a StoreLimits,
    pub(super) copier: Identity,
    pub(super) owners: Owners,
    /// The directories that have a tier.
    pub(super) roots: &'a BTreeSet<PathBuf>,
}

impl Transaction {
    pub(super) fn take(
        &mut self,
        request: u64,
        files: Vec<ImportFile>,
        descriptors: &[OwnedFd],
        given: &Given<'_>,
    ) -> Result<(), Refusal> {
        let Given { limits, copier, owners, roots } = *given;
        if files.is_empty() || files.len() != descriptors.len() {
            return refuse(
                RefusalCode::Policy,
                format!(
                    "{} files came with {} descriptors; each file needs one, and a packet at least one file",
                    files.len(),
                    descriptors.len()
                ),
            );
        }
        let mut paths = Vec::with_capacity(files.len());
        for (file, descriptor) in files.iter().zip(descriptors) {
            self.expect(file, limits)?;
            paths.push(self.note_origin(file, descriptor, roots));
        }
        let mut targets = Vec::with_capacity(files.len());
        for file in &files {
            targets.push(self.create(file).map_err(|errno| match errno {
                Errno::EXIST | Errno::NOTDIR => Refusal {
                    code: RefusalCode::Policy,
                    message: format!("{} was not imported: its path came twice", shown(&file.path)),
                },
                other => Refusal {
                    code: RefusalCode::Kernel,
                    message: format!("{} was not imported: making its copy failed: {other}", shown(&file.path)),
                },
            })?);
        }
        let failed = |error: std::io::Error| Refusal {
            code: RefusalCode::Exhausted,
            message: format!("the bundle was not imported: no process could be started to copy it: {error}"),
        };
        // One message, however long: a pipe would take a part of it.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (report, write) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
            .map_err(|errno| failed(errno.into()))?;
        let jobs: Vec<Job<'_>> = files
            .iter()
            .zip(descriptors)
            .zip(&targets)
            .zip(paths)
            .map(|(((file, source), target), path)| Job { source: source.as_fd(), target: target.as_fd(), file, path })
            .collect();
        let vouching = match &self.origin {
            Origin::Bundle { path, .. } if files.iter().any(|file| file.path == Manifest::FILE_NAME) => {
                Some(path.clone())
            }
            Origin::Bundle { .. } | Origin::Unknown | Origin::None(_) => None,
        };
        let terms = Terms {
            launcher: getpid(),
            identity: copier,
            limits: &limits.bundle,
            vouching,
            owners,
            time: limits.copy_time,
        };
        match kernel::clone3(0, None) {
            Ok(Cloned::Child) => copy::run(&jobs, write.as_fd(), &terms),
            Ok(Cloned::Parent { pidfd, pid }) => {
                drop(jobs);
                let deadline = Instant::now() + limits.copy_time;
                self.copying =
                    Some(Copying { request: Some(request), pidfd, pid, report, files, deadline, refusal: None });
                Ok(())
            }
            Err(error) => Err(failed(error)),
        }
    }

    /// Whether the file may come, by its name and size.
    fn expect(&mut self, file: &ImportFile, limits: &StoreLimits) -> Result<(), Refusal> {
        let name = shown(&file.path);
        let bounds = &limits.bundle;
        let wrong = |why: String| refuse(RefusalCode::Policy, format!("{name} was not imported: {why}"));
        if let Err(why) = check_path(&file.path, bounds.depth, bounds.name_bytes) {
            return wrong(format!("{why}; it must be a relative path inside the bundle"));
        }
        if file.size > bounds.file_bytes {
            return wrong(format!("it is larger than {} bytes", bounds.file_bytes));
        }
        self.bytes = self.bytes.saturating_add(file.size);
        if self.bytes > self.begin.bytes {
            return wrong(format!("the import was to bring {} bytes, and this is more", self.begin.bytes));
        }
        if self.files.len() >= usize::try_from(self.begin.files).unwrap_or(usize::MAX) {
            return wrong(format!("the import was to bring {} files, and this is one more", self.begin.files));
        }
        let parents = file.path.match_indices('/').map(|(at, _)| file.path[..at].to_owned());
        self.directories.extend(parents);
        if self.files.len() + self.directories.len() >= bounds.entries {
            return wrong(format!("the bundle has more than {} files and directories", bounds.entries));
        }
        self.files.push(BundleFile {
            path: file.path.clone(),
            executable: file.executable,
            size: file.size,
            sha256: Digest::from_bytes(file.sha256),
        });
        Ok(())
    }

    /// The kernel tells the path behind a descriptor without asking the file system. Whether that file is there for the
    /// launcher too is for the child to see.
    fn note_origin(&mut self, file: &ImportFile, descriptor: &OwnedFd, roots: &BTreeSet<PathBuf>) -> PathBuf {
        let path = fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd())).unwrap_or_default();
        let within = format!("/{}", file.path);
        let text = path.as_os_str().as_bytes();
        let bundle = text.strip_suffix(within.as_bytes()).filter(|bundle| bundle.starts_with(b"/"));
        let bundle = bundle.map(|bundle| PathBuf::from(std::ffi::OsStr::from_bytes(bundle)));
        self.origin = match (std::mem::replace(&mut self.origin, Origin::Unknown), bundle) {
            // Looked at by nobody when it gives nothing: the supervisor named it.
            (Origin::Unknown, Some(path)) if !roots.iter().any(|root| path.starts_with(root)) => {
                Origin::None(Doubt::Elsewhere)
            }
            (Origin::Unknown, Some(path)) if !path.parent().is_some_and(|parent| roots.contains(parent)) => {
                Origin::None(Doubt::Nested { bundle: path })
            }
            (Origin::Unknown, Some(path)) => Origin::Bundle { path, listing: None },
            (Origin::Bundle { path, listing }, Some(bundle)) if path == bundle => Origin::Bundle { path, listing },
            (Origin::Unknown | Origin::Bundle { .. }, _) => Origin::None(Doubt::Scattered),
            (Origin::None(doubt), _) => Origin::None(doubt),
        };
        path
    }

    /// What the child saw of where the files are.
    pub(super) fn seen(&mut self, in_place: bool, found: Option<Result<[u8; 32], Doubt>>) {
        self.origin = match (std::mem::replace(&mut self.origin, Origin::Unknown), found) {
            // Nobody is trusted for a path that only the supervisor sees.
            (Origin::Bundle { .. }, _) if !in_place => Origin::None(Doubt::Scattered),
            (Origin::Bundle { path, .. }, Some(Ok(listing))) => Origin::Bundle { path, listing: Some(listing) },
            (Origin::Bundle { .. }, Some(Err(doubt))) => Origin::None(doubt),
            (origin, _) => origin,
        };
    }

    /// Makes the file, empty, with its directories.
    fn create(&self, file: &ImportFile) -> Result<OwnedFd, Errno> {
        let parts: Vec<&str> = file.path.split('/').collect();
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        for count in 1..parts.len() {
            let directory = parts[..count].join("/");
            match mkdirat(&self.root, &directory, Mode::from_raw_mode(0o755)) {
                Ok(()) => {
                    // The launcher's umask leaves nothing to others.
                    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                    let made = openat2(&self.root, &directory, flags, Mode::empty(), beneath)?;
                    fchmod(&made, Mode::from_raw_mode(0o755))?;
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno),
            }
        }
        // For reading too: the child looks at what it wrote.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = openat2(&self.root, &file.path, flags, Mode::from_raw_mode(0o600), beneath)?;
        fchmod(&made, Mode::from_raw_mode(if file.executable { 0o755 } else { 0o644 }))?;
        Ok(made)
    }

    /// What the child copied is here.
    pub(super) fn arrived(&mut self, told: Option<Told>) -> Result<(), Refusal> {
        if let Some(Told { name, stated }) = told {
            match name.parse() {
                Ok(name) => self.manifest = Some((name, stated)),
                Err(_) => return refuse(RefusalCode::File, "plugin.json gives no name that a plugin may have"),
            }
        }
        Ok(())
    }
}

/// Why a path may not be in a bundle.
fn check_path(path: &str, depth: usize, name_bytes: usize) -> Result<(), &'static str> {
    if path.is_empty() || path.starts_with('/') || path.len() > (depth + 1) * (name_bytes + 1) {
        return Err("its path is empty, absolute or too long");
    }
    if path.chars().any(char::is_control) {
        return Err("its path has a control character");
    }
    let parts = path.split('/');
    if parts.clone().count() > depth + 1 {
        return Err("it lies too deep");
    }
    for part in parts {
        if matches!(part, "" | "." | "..") {
            return Err("its path has an empty part, '.' or '..'");
        }
        if part.len() > name_bytes {
            return Err("a name in its path is too long");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::check_path;

    #[test]
    fn only_plain_relative_paths_are_taken() {
        for good in ["plugin.json", "bin/a", "a b/c.d", "…", &["a"; 17].join("/")] {
            assert_eq!(check_path(good, 16, 128), Ok(()), "{good:?}");
        }
        let (deep, long) = (["a"; 18].join("/"), "a".repeat(129));
        for bad in ["", "/", "/etc/passwd", "a//b", "a/", "./a", "a/..", "../a", "a\n", "a\0", &deep, &long] {
            assert!(check_path(bad, 16, 128).is_err(), "{bad:?} was accepted");
        }
    }
}
