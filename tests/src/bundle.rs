//! Makes bundles: good ones from the built binaries, and broken ones on request.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use anyhow::Context;
use serde_json::{Value, json};

use crate::{Binaries, binaries, contract};

/// A bundle to be written. Begins as a good citizen: the echo service of the test plugin.
#[derive(Clone, Debug)]
pub struct BundleBuilder {
    name: String,
    binary: String,
    manifest: Value,
    descriptor: Option<Vec<u8>>,
    raw_manifest: Option<Vec<u8>>,
    entry: EntryFile,
}

/// What lies where the entry should be.
#[derive(Clone, Debug)]
enum EntryFile {
    Binary,
    Missing,
    Bytes { bytes: Vec<u8>, mode: u32 },
    OtherMachine(u16),
    Mode(u32),
}

impl BundleBuilder {
    /// A good citizen that serves `plugvisor.test.v1.EchoService` and exports it.
    #[must_use]
    pub fn echo(name: &str) -> Self {
        Self::serving(name, &["echo"], "plugvisor.test.v1.EchoService")
    }

    /// The hostile plugin with the behaviour `args` (see `src/bin/hostile-plugin`). It offers
    /// `plugvisor.test.v1.HostileService` under its own name as the token, so that a world can have many of them.
    #[must_use]
    pub fn hostile(name: &str, args: &[&str]) -> Self {
        Self::serving(name, args, "plugvisor.test.v1.HostileService").set(
            "/module/crossPluginServices",
            json!([{ "serviceName": "plugvisor.test.v1.HostileService", "token": name, "global": true }]),
        )
    }

    /// The plugin in Python, which knows no SDK: `plugvisor.test.v1.PolyglotService`.
    #[must_use]
    pub fn polyglot(name: &str) -> Self {
        let mut bundle = Self::serving(name, &[], "plugvisor.test.v1.PolyglotService")
            .set("/runtime/socket", "bind")
            .capabilities(&["api:internal-calls"]);
        bundle.entry = EntryFile::Bytes { bytes: include_bytes!("../plugins/polyglot").to_vec(), mode: 0o755 };
        bundle
    }

    fn serving(name: &str, args: &[&str], service: &str) -> Self {
        let manifest = json!({
            "name": name,
            "version": "1.0.0",
            "description": "A plugin of the tests",
            "runtime": { "exec": format!("bin/{name}"), "args": args },
            "module": { "providers": [service], "exports": [service] },
        });
        Self::from_binary(name, "hostile-plugin", manifest, Some(contract::DESCRIPTOR_SET.to_vec()))
    }

    /// Any built binary with its manifest.
    #[must_use]
    pub fn from_binary(name: &str, binary: &str, manifest: Value, descriptor: Option<Vec<u8>>) -> Self {
        Self {
            name: name.to_owned(),
            binary: binary.to_owned(),
            manifest,
            descriptor,
            raw_manifest: None,
            entry: EntryFile::Binary,
        }
    }

    /// Sets a field of the manifest; `path` is a JSON pointer such as `/runtime/socket`. Objects on the way are made.
    #[must_use]
    pub fn set(mut self, path: &str, value: impl Into<Value>) -> Self {
        let mut at = &mut self.manifest;
        for key in path.trim_start_matches('/').split('/') {
            at = &mut at[key];
        }
        *at = value.into();
        self
    }

    /// Asks for capabilities.
    #[must_use]
    pub fn capabilities(self, names: &[&str]) -> Self {
        self.set("/security/capabilities", json!(names))
    }

    /// Writes these bytes as plugin.json.
    #[must_use]
    pub fn raw_manifest(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.raw_manifest = Some(bytes.into());
        self
    }

    /// Writes these bytes as the descriptor set.
    #[must_use]
    pub fn descriptor(mut self, bytes: &[u8]) -> Self {
        self.descriptor = Some(bytes.to_vec());
        self
    }

    /// Leaves the entry out.
    #[must_use]
    pub fn without_entry(mut self) -> Self {
        self.entry = EntryFile::Missing;
        self
    }

    /// Writes these bytes as the entry, with this mode.
    #[must_use]
    pub fn entry_bytes(mut self, bytes: impl Into<Vec<u8>>, mode: u32) -> Self {
        self.entry = EntryFile::Bytes { bytes: bytes.into(), mode };
        self
    }

    /// Gives the entry this mode.
    #[must_use]
    pub fn entry_mode(mut self, mode: u32) -> Self {
        self.entry = EntryFile::Mode(mode);
        self
    }

    /// Makes the entry's ELF header name another machine (`e_machine`, see elf(5)).
    #[must_use]
    pub fn entry_machine(mut self, machine: u16) -> Self {
        self.entry = EntryFile::OtherMachine(machine);
        self
    }

    /// The plugin's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes the bundle as the subdirectory of `directory` with the plugin's name, readable by every user.
    ///
    /// # Errors
    /// When a file cannot be written or the binary was not built.
    pub fn write(&self, directory: &Path, built: &Binaries) -> anyhow::Result<PathBuf> {
        let bundle = directory.join(&self.name);
        let bin = bundle.join("bin");
        fs::create_dir_all(&bin).with_context(|| format!("cannot make {}", bin.display()))?;
        let entry = bin.join(&self.name);
        match &self.entry {
            EntryFile::Missing => {}
            EntryFile::Binary => binaries::place(&built.path(&self.binary)?, &entry)?,
            EntryFile::Bytes { bytes, mode } => write(&entry, bytes, *mode)?,
            // A hard link would share the mode with the built binary.
            EntryFile::Mode(mode) => write(&entry, &fs::read(built.path(&self.binary)?)?, *mode)?,
            EntryFile::OtherMachine(machine) => {
                let mut bytes = fs::read(built.path(&self.binary)?)?;
                bytes[18..20].copy_from_slice(&machine.to_le_bytes());
                write(&entry, &bytes, 0o755)?;
            }
        }
        let manifest = match &self.raw_manifest {
            Some(bytes) => bytes.clone(),
            None => serde_json::to_vec_pretty(&self.manifest)?,
        };
        write(&bundle.join("plugin.json"), &manifest, 0o644)?;
        if let Some(descriptor) = &self.descriptor {
            write(&bundle.join("descriptor.binpb"), descriptor, 0o644)?;
        }
        for path in [&bundle, &bin] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(bundle)
    }
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(())
}
