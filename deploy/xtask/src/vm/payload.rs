//! What goes into the guest beside Debian's root: a second archive, which the kernel unpacks over the first.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;
use tempfile::TempDir;

use super::image::{self, Image};
use super::plan::{self, Plan};
use crate::build::{Profile, binaries, bundle_examples, cargo, workspace_root};
use crate::steps::run;

/// The programs that tests and the package start.
const PROGRAMS: [&str; 8] = [
    "gallery",
    "hostile-plugin",
    "markdown",
    "plugvisor",
    "plugvisor-launcher",
    "plugvisor-walled",
    "plugvisord",
    "thumbnailer",
];

/// Where the packages are whose tests are run.
const PACKAGES: [&str; 2] = ["supervisor/sandbox", "tests"];

/// What the package puts into /usr/bin.
const PACKAGED: [&str; 3] = ["plugvisor", "plugvisor-launcher", "plugvisord"];

/// How the names of directories begin that are being filled.
pub(super) const PREFIX: &str = "payload-";

/// What cargo built.
#[derive(Debug)]
pub(super) struct Built {
    /// The directory of the programs.
    pub(super) binaries: PathBuf,
    /// Test programs by name.
    pub(super) tests: BTreeMap<String, PathBuf>,
}

/// Builds the programs and tests as `cargo test --workspace` builds them.
///
/// # Errors
/// When the build fails.
pub(super) fn build() -> anyhow::Result<Built> {
    let binaries = binaries(Profile::Dev)?;
    let mut command = cargo();
    command.args(["test", "--locked", "--workspace", "--all-features", "--no-run"]);
    command.args(["--message-format=json-render-diagnostics", "--bin", plan::UNIT_TESTS]);
    command.args(plan::integration_tests().flat_map(|name| ["--test", name])).stdout(Stdio::piped());
    let mut running = command.spawn().context("cannot start cargo test")?;
    let output = running.stdout.take().context("cargo test has no standard output")?;
    let packages = PACKAGES.map(|package| workspace_root().join(package).join("Cargo.toml"));
    let mut tests = BTreeMap::new();
    for line in BufReader::new(output).lines() {
        let message: Value = serde_json::from_str(&line.context("cannot read what cargo says")?)
            .context("cargo said something that is not JSON")?;
        // Other packages have tests of the same names, which know nothing of kernels.
        let ours = message["manifest_path"].as_str().is_some_and(|path| packages.contains(&PathBuf::from(path)));
        let is_test = ours && message["profile"]["test"] == true;
        if let (true, Some(program), Some(name)) =
            (is_test, message["executable"].as_str(), message["target"]["name"].as_str())
            && let Some(other) = tests.insert(name.to_owned(), PathBuf::from(program))
        {
            bail!("two test programs are called {name}: {} is one", other.display());
        }
    }
    let status = running.wait().context("cannot wait for cargo test")?;
    if !status.success() {
        bail!("`cargo test --no-run` ended with {status}");
    }
    Ok(Built { binaries, tests })
}

/// The initramfs that a machine boots with. It is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Initramfs {
    directory: TempDir,
}

impl Initramfs {
    /// The file.
    pub(super) fn path(&self) -> PathBuf {
        self.directory.path().join("initramfs")
    }
}

/// Lays everything out as the guest is to have it and makes an archive of it behind Debian's root: the kernel unpacks one
/// after the other.
///
/// # Errors
/// When something cannot be read or copied.
pub(super) fn pack(here: &Path, image: &Image, built: &Built, plan: &Plan) -> anyhow::Result<Initramfs> {
    let directory = tempfile::Builder::new().prefix(PREFIX).tempdir_in(here).context("cannot make a directory")?;
    let tree = directory.path().join("tree");
    let inside = |path: &Path| tree.join(path.strip_prefix("/").unwrap_or(path));
    for name in PROGRAMS {
        let program = built.binaries.join(name);
        strip(&program, &inside(&program))?;
    }
    // The root lives in the guest's memory: only what is run.
    for program in plan.programs() {
        strip(program, &inside(program))?;
    }
    let lane = tree.join("lane");
    strip(&std::env::current_exe().context("cannot read our own path")?, &lane.join("xtask"))?;
    write(&lane.join("plan.json"), &serde_json::to_string_pretty(plan).context("the plan cannot be written")?)?;

    let checked_in = workspace_root().join("tests/vm");
    let units = Path::new("etc/systemd/system");
    copy(&checked_in.join("plugvisor-lane.service"), &tree.join(units).join("plugvisor-lane.service"))?;
    let wanted = tree.join(units).join("multi-user.target.wants");
    fs::create_dir_all(&wanted).with_context(|| format!("cannot make {}", wanted.display()))?;
    std::os::unix::fs::symlink("../plugvisor-lane.service", wanted.join("plugvisor-lane.service"))
        .context("cannot enable the lane's unit")?;
    copy(&checked_in.join("lane.conf"), &tree.join("usr/lib/sysusers.d/lane.conf"))?;
    package(built, &inside, &lane.join("package"))?;

    let second = directory.path().join("payload.cpio");
    image::pack(&tree, &second)?;
    let whole = Initramfs { directory };
    let mut file = File::create(whole.path()).context("cannot write the initramfs")?;
    for archive in [&image.root, &second] {
        let mut archive = File::open(archive).with_context(|| format!("cannot read {}", archive.display()))?;
        io::copy(&mut archive, &mut file).context("cannot write the initramfs")?;
    }
    fs::remove_dir_all(&tree).context("cannot remove what was laid out")?;
    Ok(whole)
}

/// What an operator's package manager would unpack, below a directory of its own until it is installed.
fn package(built: &Built, inside: &impl Fn(&Path) -> PathBuf, into: &Path) -> anyhow::Result<()> {
    for name in PACKAGED {
        copy(&inside(&built.binaries.join(name)), &into.join("usr/bin").join(name))?;
    }
    let root = workspace_root();
    for (from, to) in [
        ("systemd/plugvisor.target", "usr/lib/systemd/system/plugvisor.target"),
        ("systemd/plugvisor.service", "usr/lib/systemd/system/plugvisor.service"),
        ("systemd/plugvisor-launcher.service", "usr/lib/systemd/system/plugvisor-launcher.service"),
        ("systemd/sysusers.d/plugvisor.conf", "usr/lib/sysusers.d/plugvisor.conf"),
        ("systemd/tmpfiles.d/plugvisor.conf", "usr/lib/tmpfiles.d/plugvisor.conf"),
        ("systemd/plugvisor.toml", "etc/plugvisor/plugvisor.toml"),
        ("systemd/launcher.toml", "etc/plugvisor/launcher.toml"),
    ] {
        copy(&root.join(from), &into.join(to))?;
    }
    // The same programs as elsewhere, without what debuggers read.
    let stripped = inside(&built.binaries);
    bundle_examples(&root, &stripped, &into.join("usr/local/lib/plugvisor/plugins"))
}

/// A copy without what debuggers read: the guest's memory holds it.
fn strip(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_parent(to)?;
    run(Command::new("strip").args(["--strip-debug", "-o"]).arg(to).arg(from))
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    make_parent(to)?;
    fs::copy(from, to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn write(to: &Path, text: &str) -> anyhow::Result<()> {
    make_parent(to)?;
    fs::write(to, text).with_context(|| format!("cannot write {}", to.display()))
}

/// Every directory may be entered by everybody, whatever our umask is and whatever the host's directories are.
fn make_parent(of: &Path) -> anyhow::Result<()> {
    let parent = of.parent().context("it has no parent")?;
    let mut missing: Vec<&Path> = parent.ancestors().take_while(|path| !path.exists()).collect();
    missing.reverse();
    for directory in missing {
        fs::create_dir(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
            .with_context(|| format!("cannot open {} to others", directory.display()))?;
    }
    Ok(())
}
