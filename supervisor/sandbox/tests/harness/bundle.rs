//! Bundles of the test plugin: made on the disk, described as a supervisor does, and imported.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    sync::PoisonError,
};

use plugvisor_package::{Bundle, BundleFile, BundleLimits, Digest};
use plugvisor_sandbox::protocol::{
    Import, ImportBegin, ImportFile, MAX_DESCRIPTORS, Refusal, Reply, Request, SocketMode, Stored,
};

use super::Harness;

/// Where every bundle's manifest says that it listens.
pub const PORTS: [u16; 2] = [8080, 8443];

/// What a bundle's manifest says is executed, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manner {
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub socket: SocketMode,
    /// The whole of `security`.
    pub security: serde_json::Value,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            args: Vec::new(),
            env: vec![("COLOUR".to_owned(), "blue".to_owned())],
            socket: SocketMode::Inherit,
            security: serde_json::json!({ "capabilities": [
                "filesystem:write-temp", "filesystem:read-config", "filesystem:read-data", "filesystem:write-data",
                "process:spawn-child", "process:signal-handling", "network:http-client", "network:tcp-server"
            ] }),
        }
    }
}

impl Manner {
    pub fn of(args: &[&str]) -> Self {
        Self { args: args.iter().map(ToString::to_string).collect(), ..Self::default() }
    }

    /// The manifest of a bundle that runs so.
    pub fn manifest(&self, name: &str, exec: &str) -> String {
        let Self { args, env, socket, security } = self;
        let env: BTreeMap<&String, &String> = env.iter().map(|(name, value)| (name, value)).collect();
        let socket = if *socket == SocketMode::Bind { "bind" } else { "inherit" };
        let manifest = serde_json::json!({
            "name": name, "version": "1.0.0", "security": security,
            "runtime": { "exec": exec, "args": args, "env": env, "socket": socket, "network": { "listen": PORTS } },
        });
        serde_json::to_string_pretty(&manifest).expect("JSON")
    }
}

impl Harness {
    /// The digest of a bundle of this name that runs so; it is made when there is none.
    pub fn made(&self, name: &str, manner: &Manner) -> [u8; 32] {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let path = self.path("bundles").join(format!("made-{name}-{}", made.len()));
        let known = made.iter().find(|(_, (known, path))| known == manner && named(path, name));
        if let Some((digest, _)) = known {
            return *digest;
        }
        fs::create_dir_all(path.join("bin")).expect("the bundle");
        // The same file: a bundle is a manifest's worth.
        fs::hard_link(self.path("bundles/walled/bin/walled"), path.join("bin/walled")).expect("the entry");
        fs::write(path.join("plugin.json"), manner.manifest(name, "bin/walled")).expect("the manifest");
        open_to_all(&path);
        let digest = digest(&path);
        made.insert(digest, (manner.clone(), path));
        digest
    }

    /// Where a bundle is that was made.
    pub fn place_of(&self, bundle: [u8; 32]) -> PathBuf {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.get(&bundle).map(|(_, path)| path.clone()).expect("it was made")
    }

    /// What the store has under this digest.
    pub fn find(&mut self, bundle: [u8; 32]) -> Option<Stored> {
        match self.ask(&Request::Import(Import::Find { bundle }), &[]).0 {
            Reply::Imported(found) => found,
            other => panic!("{other:?}"),
        }
    }

    /// Imports a bundle as a supervisor does.
    pub fn import(&mut self, path: &Path) -> Result<Stored, Refusal> {
        let (begin, files) = listed(path);
        self.import_listed(begin, &files, path)
    }

    /// Imports what is said of a bundle.
    pub fn import_listed(&mut self, begin: ImportBegin, files: &[ImportFile], path: &Path) -> Result<Stored, Refusal> {
        self.step(Import::Begin(begin), &[])?;
        for packet in files.chunks(MAX_DESCRIPTORS) {
            let open: Vec<File> =
                packet.iter().map(|file| File::open(path.join(&file.path)).expect("a file of the bundle")).collect();
            let descriptors: Vec<BorrowedFd<'_>> = open.iter().map(AsFd::as_fd).collect();
            self.step(Import::Files(packet.to_vec()), &descriptors)?;
        }
        Ok(self.step(Import::Commit, &[])?.expect("what was committed"))
    }

    /// One step of an import.
    pub fn step(&mut self, step: Import, descriptors: &[BorrowedFd<'_>]) -> Result<Option<Stored>, Refusal> {
        match self.ask(&Request::Import(step), descriptors).0 {
            Reply::Done => Ok(None),
            Reply::Imported(found) => Ok(found),
            Reply::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }
}

/// A bundle with the test plugin under this name.
pub fn make_bundle(bundles: &Path, name: &str) {
    let bundle = bundles.join(name);
    fs::create_dir_all(bundle.join("bin")).expect("the bundle");
    fs::copy(env!("CARGO_BIN_EXE_plugvisor-walled"), bundle.join("bin/walled")).expect("the entry");
    write_manifest(&bundle, name, "bin/walled");
    fs::set_permissions(bundles, fs::Permissions::from_mode(0o755)).expect("chmod");
    open_to_all(&bundle);
}

/// Whether the bundle here has been made under this name.
fn named(path: &Path, name: &str) -> bool {
    let own = path.file_name().and_then(|file| file.to_str()).and_then(|file| file.strip_prefix("made-"));
    own.and_then(|own| own.rsplit_once('-')).is_some_and(|(own, _)| own == name)
}

/// Whatever the umask is, everybody reads a bundle and its owner alone writes it.
pub fn open_to_all(bundle: &Path) {
    for directory in [bundle, &bundle.join("bin")] {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).expect("chmod");
    }
    fs::set_permissions(bundle.join("plugin.json"), fs::Permissions::from_mode(0o644)).expect("chmod");
}

pub fn write_manifest(bundle: &Path, name: &str, exec: &str) {
    fs::write(bundle.join("plugin.json"), Manner::default().manifest(name, exec)).expect("the manifest");
}

/// What a supervisor says of a bundle.
pub fn listed(path: &Path) -> (ImportBegin, Vec<ImportFile>) {
    let bundle = Bundle::open(path, &BundleLimits::default()).expect("a bundle");
    described(bundle.digest, bundle.files)
}

/// What a supervisor says of a bundle with these files, when it says this digest.
pub fn described(digest: Digest, files: impl IntoIterator<Item = BundleFile>) -> (ImportBegin, Vec<ImportFile>) {
    let file = |file: BundleFile| ImportFile {
        path: file.path,
        executable: file.executable,
        size: file.size,
        sha256: *file.sha256.as_bytes(),
    };
    let files: Vec<ImportFile> = files.into_iter().map(file).collect();
    (announce(*digest.as_bytes(), &files), files)
}

/// The beginning of an import of these files.
pub fn announce(bundle: [u8; 32], files: &[ImportFile]) -> ImportBegin {
    let bytes = files.iter().map(|file| file.size).sum();
    ImportBegin { bundle, files: files.len().try_into().expect("few"), bytes }
}

/// The content digest of a bundle.
pub fn digest(path: &Path) -> [u8; 32] {
    listed(path).0.bundle
}
