//! What the administrator's policy file says of machines: `[vm]`.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use plugvisor_sandbox::tables::{Problems, Section, Table};
use rustix::io::Errno;
use serde::Deserialize;

use super::ours::{Doubt, Owners, Part, judge_place, judged};
use crate::{mounts::HOST_DIRECTORIES, policy::required};

/// What a machine needs of a kernel that has neither virtio nor FUSE built in, in the order in which they are loaded, below
/// `/lib/modules/VERSION/kernel`.
const MODULES: [&str; 5] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_mmio.ko",
    "drivers/char/virtio_console.ko",
    "fs/fuse/fuse.ko",
];

const MOST_MODULES: usize = 16;

/// The largest kernel, in bytes.
const MOST_KERNEL: u64 = 256 << 20;

/// The table as it is written.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RawSettings {
    kernel: Option<PathBuf>,
    modules: Option<Vec<PathBuf>>,
    emulator: Option<PathBuf>,
    libraries: Option<Vec<PathBuf>>,
    runtime: Option<Vec<PathBuf>>,
    max_memory: Option<u64>,
}

impl Table for RawSettings {
    fn takes(key: &str) -> &'static str {
        match key {
            "kernel" => "a whole path in text, such as \"/boot/vmlinuz-6.1.0-56-cloud-amd64\"",
            "modules" => "a list of at most 16 whole paths, such as [] for a kernel that has virtio built in",
            "emulator" => "a whole path in text, such as \"/usr/bin/qemu-system-x86_64\"",
            "libraries" => "a list of whole paths, such as [\"/usr/lib/x86_64-linux-gnu\"]",
            "runtime" => "a list of whole paths, such as [\"/usr/lib/python3\"]",
            "max_memory" => "a number of bytes, such as 1073741824 for 1 GiB",
            _ => "",
        }
    }
}

/// The table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Settings {
    /// A kernel for x86-64 as QEMU loads it: Debian's `/boot/vmlinuz-…-cloud-amd64`.
    kernel: PathBuf,
    /// Its modules for virtio, in the order in which they are loaded. By default those of `/lib/modules/VERSION` that a
    /// kernel called `vmlinuz-VERSION` has.
    modules: Option<Vec<PathBuf>>,
    /// QEMU.
    emulator: PathBuf,
    /// Where the libraries lie that programs of bundles need.
    libraries: Vec<PathBuf>,
    /// Files and directories of the host that every guest gets whole, such as `/usr/lib/python3.11`.
    runtime: Vec<PathBuf>,
    /// The most memory of the host that one machine may have in bytes, with all that is around its plugin. A bundle decides
    /// how large it is, and the archive of it is in memory.
    max_memory: u64,
}

/// See [`Settings::max_memory`].
const USUAL_MEMORY: u64 = 1 << 30;

fn usual_emulator() -> PathBuf {
    "/usr/bin/qemu-system-x86_64".into()
}

fn usual_libraries() -> Vec<PathBuf> {
    let places = ["/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"];
    places.map(PathBuf::from).to_vec()
}

/// What the settings name, and is there.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// The kernel, then its modules.
    pub(crate) files: Arc<[Part]>,
    pub(crate) emulator: PathBuf,
    pub(crate) libraries: Vec<PathBuf>,
    pub(crate) runtime: Vec<PathBuf>,
    /// The most memory of the host, in bytes.
    pub(crate) max_memory: u64,
}

impl Settings {
    /// The settings of a table; what is wrong with it becomes problems.
    pub(crate) fn read(table: &Section<RawSettings>, problems: &mut Problems<'_>) -> Option<Self> {
        let RawSettings { kernel, modules, emulator, libraries, runtime, max_memory } = &table.value;
        let one = |path: &Option<PathBuf>| path.iter().cloned().collect::<Vec<_>>();
        let many = |paths: &Option<Vec<PathBuf>>| paths.clone().unwrap_or_default();
        for (key, paths) in [
            ("kernel", one(kernel)),
            ("modules", many(modules)),
            ("emulator", one(emulator)),
            ("libraries", many(libraries)),
            ("runtime", many(runtime)),
        ] {
            for relative in paths.iter().filter(|path| !path.is_absolute()) {
                let takes = RawSettings::takes(key);
                let message = format!("{:?} is not absolute; it takes {takes}", relative.display().to_string());
                problems.add(table.at(key), table.key(key), message);
            }
        }
        if let Some(modules) = modules.as_ref().filter(|modules| modules.len() > MOST_MODULES) {
            let takes = RawSettings::takes("modules");
            let message = format!("has {} entries, more than {MOST_MODULES}; it takes {takes}", modules.len());
            problems.add(table.at("modules"), table.key("modules"), message);
        }
        Some(Self {
            kernel: required(table, "kernel", kernel.clone(), problems)?,
            modules: modules.clone(),
            emulator: emulator.clone().unwrap_or_else(usual_emulator),
            libraries: libraries.clone().unwrap_or_else(usual_libraries),
            runtime: runtime.clone().unwrap_or_default(),
            max_memory: max_memory.unwrap_or(USUAL_MEMORY),
        })
    }

    /// Looks at everything that is named, and says what is not as it must be.
    pub(crate) fn parts(&self) -> Result<Parts, String> {
        // The plugin's tree has no other directory of the host.
        if !HOST_DIRECTORIES.iter().any(|directory| self.emulator.starts_with(directory)) {
            let places = HOST_DIRECTORIES.join(", ");
            return Err(format!("[vm] emulator: {} lies in none of {places}", self.emulator.display()));
        }
        ours("emulator", &self.emulator, u64::MAX)?;
        let kernel = ours("kernel", &self.kernel, MOST_KERNEL)?;
        let modules = self.modules.clone().map_or_else(|| virtio_of(&self.kernel), Ok)?;
        let modules = modules.iter().map(|module| ours("modules", module, MOST_KERNEL));
        for place in &self.libraries {
            match judge_place(place, Owners::here()) {
                // Not every distribution has each of the usual ones.
                Ok(()) | Err(Doubt::Failed(_, Errno::NOENT)) => {}
                Err(doubt) => return Err(doubted("libraries", place, &doubt)),
            }
        }
        for place in &self.runtime {
            judge_place(place, Owners::here()).map_err(|doubt| doubted("runtime", place, &doubt))?;
        }
        Ok(Parts {
            files: [Ok(kernel)].into_iter().chain(modules).collect::<Result<_, _>>()?,
            emulator: self.emulator.clone(),
            libraries: self.libraries.clone(),
            runtime: self.runtime.clone(),
            max_memory: self.max_memory,
        })
    }
}

/// The modules that belong to a kernel of this name, as far as it has them as files: what is missing is built in. When none
/// of its modules is there, they are elsewhere, and a guest would wait for a port that it never gets.
fn virtio_of(kernel: &Path) -> Result<Vec<PathBuf>, String> {
    let Some(version) = kernel.file_name().and_then(|name| name.to_str()?.strip_prefix("vmlinuz-")) else {
        return Ok(Vec::new());
    };
    let modules = Path::new("/lib/modules").join(version);
    if !modules.is_dir() {
        return Err(format!(
            "[vm] modules: there is no {}, where those of {} would be; name its modules for virtio, or set modules = [] if \
             they are built in",
            modules.display(),
            kernel.display()
        ));
    }
    let kernel = modules.join("kernel");
    Ok(MODULES.iter().map(|module| kernel.join(module)).filter(|path| path.is_file()).collect())
}

fn ours(key: &str, path: &Path, most: u64) -> Result<Part, String> {
    judged(path, most, Owners::here()).map_err(|doubt| doubted(key, path, &doubt))
}

fn doubted(key: &str, path: &Path, doubt: &Doubt) -> String {
    match doubt {
        // It names the path already.
        Doubt::Failed(named, _) | Doubt::Shared(named) if named == path => format!("[vm] {key}: {doubt}"),
        Doubt::Failed(..) | Doubt::Shared(_) | Doubt::Unfit | Doubt::NoPlace => {
            format!("[vm] {key}: {}: {doubt}", path.display())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use plugvisor_sandbox::tables::section;
    use toml::{
        Spanned,
        de::{DeTable, DeValue},
    };

    use super::*;

    fn parse(text: &str) -> Result<Settings, String> {
        let document = DeTable::parse(text).map_err(|error| error.to_string())?;
        let (span, document) = (document.span(), document.into_inner());
        let mut problems = Problems::new(text);
        let table = section("vm", Spanned::new(span, DeValue::Table(document)), &mut problems);
        let settings = Settings::read(&table, &mut problems);
        let problems: Vec<String> = problems.into_sorted().iter().map(ToString::to_string).collect();
        settings.filter(|_| problems.is_empty()).ok_or_else(|| problems.join("; "))
    }

    #[test]
    fn what_is_named_wrongly_is_said() {
        let many: Vec<String> = (0..=MOST_MODULES).map(|number| format!("\"/m/{number}\"")).collect();
        for (text, named) in [
            ("emulator = \"/usr/bin/true\"".to_owned(), "kernel"),
            ("kernel = \"boot/vmlinuz\"".to_owned(), "\"boot/vmlinuz\" is not absolute"),
            ("kernel = \"/k\"\nruntime = [\"lib\"]".to_owned(), "\"lib\" is not absolute"),
            ("kernel = \"/k\"\nqemu = \"/q\"".to_owned(), "qemu"),
            (format!("kernel = \"/k\"\nmodules = [{}]", many.join(",")), "modules: has 17 entries, more than 16"),
        ] {
            let why = parse(&text).map(|_| ()).expect_err(&text);
            assert!(why.contains(named), "{text}: {why}");
        }
        for (text, named) in [
            ("kernel = \"/k\"\nemulator = \"/opt/qemu\"", "/opt/qemu lies in none of /usr"),
            (
                "kernel = \"/k\"\nemulator = \"/usr/bin/no-such-emulator\"",
                "[vm] emulator: /usr/bin/no-such-emulator: No such file",
            ),
            ("kernel = \"/\"\nemulator = \"/usr/bin/env\"", "kernel: /: it is not a file"),
            (
                "kernel = \"/usr/bin/env\"\nemulator = \"/usr/bin/env\"\nmodules = [\"/no/module\"]",
                "modules: /no/module",
            ),
        ] {
            let why = parse(text).expect("it can be read").parts().map(|_| ()).expect_err(text);
            assert!(why.contains(named), "{text}: {why}");
        }
    }

    #[test]
    fn where_libraries_and_a_runtime_lie_is_judged_too() {
        if Owners::here() != Owners::Root {
            println!("SKIP privileged-lane: only root's files are judged");
            return;
        }
        let directory = tempfile::tempdir().expect("a directory");
        let place = directory.path().join("place");
        fs::create_dir(&place).expect("a directory");
        let of = |key: &str| {
            let text = format!("kernel = \"/usr/bin/env\"\nemulator = \"/usr/bin/env\"\n{key} = [{place:?}]");
            parse(&text).expect("it can be read").parts().map(drop)
        };
        for (key, missing) in [("libraries", true), ("runtime", false)] {
            fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).expect("chmod");
            assert_eq!(of(key), Ok(()));
            fs::set_permissions(&place, fs::Permissions::from_mode(0o1777)).expect("chmod");
            let why = of(key).expect_err("others may write it");
            assert!(why.contains(key) && why.contains("chmod go-w"), "{why}");
            fs::remove_dir(&place).expect("removes");
            assert_eq!(of(key).is_ok(), missing);
            fs::create_dir(&place).expect("a directory");
        }
    }

    #[test]
    fn what_is_there_is_found_with_the_kernel_first() {
        let text = "kernel = \"/usr/bin/env\"\nemulator = \"/usr/bin/env\"\nmodules = [\"/usr/bin/head\"]";
        let parts = parse(text).expect("it can be read").parts().expect("all is there");
        let paths = |parts: &Parts| parts.files.iter().map(|part| part.path.clone()).collect::<Vec<_>>();
        assert_eq!(paths(&parts), ["/usr/bin/env", "/usr/bin/head"].map(PathBuf::from));
        // Of a kernel whose name tells no version, none are looked for.
        let parts = parse("kernel = \"/usr/bin/env\"\nemulator = \"/usr/bin/env\"").expect("it can be read").parts();
        assert_eq!(paths(&parts.expect("all is there")), [PathBuf::from("/usr/bin/env")]);
    }
}
