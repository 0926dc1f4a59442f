//! `cargo xtask test vm`: the tests in the other kernel world, a Debian 12 with systemd as PID 1 and cgroup v2 alone, in
//! a virtual machine without hardware help.
//!
//! ```text
//! host    image: debootstrap, kernel ──▶ root.cpio (cached) ┐
//!         payload: what was built, units, plan ──▶ cpio     ├──▶ QEMU ──▶ guest: xtask vm-guest
//!         machine: a time limit, the console's tail  ◀─ ttyS0 ┘             │ tests, units
//!         report: one JSON message a line            ◀─ ttyS1 ──────────────┘
//! ```
//!
//! The same programs run in both worlds, at the same paths: nothing is built for the guest. [ADR 9] says why so.
//!
//! [ADR 9]: ../../../docs/adr/0009-a-virtual-machine-without-hardware-help.md

mod guest;
mod image;
mod machine;
mod package;
mod payload;
mod plan;
mod report;
mod units;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock};

pub(crate) use guest::run as run_guest;

use self::machine::Machine;
use self::plan::Plan;
use self::report::Message;
use crate::build::{target_directory, workspace_root};
use crate::steps::step;
use crate::{setup, skips};

/// How long the machine may take for the quick plan and for the whole one, boot and power-off included: what never ends takes
/// this long, and a host that does much else must not. Parts have time limits of their own.
const LONGEST_QUICK: Duration = Duration::from_mins(40);
const LONGEST: Duration = Duration::from_mins(120);

/// Why the lane cannot run here; `None` when it can, once [`setup::for_vm`] has passed.
pub(crate) fn cannot() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some(
            "the machine is an x86-64 one and runs what was built here, so this host must be one too".to_owned(),
        );
    }
    if !rustix::process::geteuid().is_root() {
        return Some("making the image needs root (debootstrap changes root and makes device files)".to_owned());
    }
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available =
        memory.lines().find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok());
    if let Some(kib) = available.filter(|kib: &u64| *kib < u64::from(machine::MEMORY_MIB) * 1024) {
        return Some(format!("the machine has {} MiB of memory, and here are {} MiB", machine::MEMORY_MIB, kib / 1024));
    }
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let has = |line: &str| release.lines().any(|other| other.replace('"', "") == line);
    (!has("ID=debian") || !has("VERSION_CODENAME=bookworm")).then(|| {
        "the guest is Debian 12 and runs what was built here, so this host must be Debian 12 (bookworm) too".to_owned()
    })
}

/// Runs the lane. With `full` everything, without it a fixed part that takes some minutes; `only` narrows it to parts
/// whose name holds one of these.
///
/// # Errors
/// What failed, with the console's tail when the machine itself did.
pub(crate) fn run(full: bool, only: &[String]) -> anyhow::Result<()> {
    if let Some(why) = cannot() {
        bail!("the virtual machine's lane cannot run here: {why}");
    }
    let here = target_directory()?.join("vm");
    fs::create_dir_all(&here).with_context(|| format!("cannot make {}", here.display()))?;
    let _alone = alone(&here)?;
    let next = "run the command it names, then `cargo xtask test vm` again";
    step("what the virtual machine needs", next, setup::for_vm)?;
    let built = step("programs and tests", "fix what the compiler shows", payload::build)?;
    let image = step("image", "see what debootstrap says above; the mirror is the host's own", || image::image(&here))?;
    let mut plan = Plan::new(&built, full)?;
    plan.retain(only);
    let payload =
        step("payload", "see what could not be read or copied", || payload::pack(&here, &image, &built, &plan))?;
    let skipped = step("virtual machine", "the part that failed is named above; see docs/testing.md", || {
        judge(&here, &image, &payload.path(), &plan, if full { LONGEST } else { LONGEST_QUICK })
    })?;
    check_skips(&skipped, full && only.is_empty())
}

/// One lane at a time for each target directory: the console and what is being made have fixed places. What an
/// interrupted one left is removed.
fn alone(here: &Path) -> anyhow::Result<File> {
    let lock = File::create(here.join("lock")).context("cannot make the lane's lock")?;
    if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        bail!("another `cargo xtask test vm` runs in {}", here.display());
    }
    for entry in fs::read_dir(here).with_context(|| format!("cannot read {}", here.display()))? {
        let path = entry.with_context(|| format!("cannot read {}", here.display()))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(payload::PREFIX) || name.starts_with(image::PREFIX) {
            fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(lock)
}

/// Boots the machine, shows what it reports, and returns what was skipped in it, by name.
fn judge(
    here: &Path,
    image: &image::Image,
    initramfs: &Path,
    plan: &Plan,
    longest: Duration,
) -> anyhow::Result<BTreeMap<String, String>> {
    let console = here.join("console.log");
    let machine = Machine::start(image, initramfs, &console)?;
    let began = Instant::now();
    let (mut skipped, mut failed, mut verdict) = (BTreeMap::new(), Vec::new(), None);
    let ended = machine.run(longest, |message| match message {
        Message::Booted { release } => {
            eprintln!("    booted {release} in {:.1} s", began.elapsed().as_secs_f64());
        }
        Message::Began { part } => eprintln!("    {part} …"),
        Message::Line { text } => eprintln!("      {text}"),
        Message::Skipped { name, why } => drop(skipped.insert(name, why)),
        Message::Ended { part, seconds, failure: None } => eprintln!("    ok {part} ({seconds:.1} s)"),
        Message::Ended { part, seconds, failure: Some(why) } => {
            eprintln!("    FAILED {part} ({seconds:.1} s): {why}");
            failed.push(part);
        }
        Message::Verdict { parts } => verdict = Some(parts),
    });
    let tail = || machine::tail(&console);
    if let Err(error) = ended {
        bail!("{error:#}; the console ends with:\n{}", tail());
    }
    for (name, why) in &skipped {
        eprintln!("    skipped {name}: {why}");
    }
    if !failed.is_empty() {
        bail!("failed in the virtual machine: {}", failed.join(", "));
    }
    match verdict {
        Some(parts) if parts == plan.parts.len() => {}
        Some(parts) => bail!("{parts} of {} parts were run", plan.parts.len()),
        None => bail!("the machine ended without a verdict; the console ends with:\n{}", tail()),
    }
    Ok(skipped)
}

/// Holds the skips against the checked-in list. The machine is the same everywhere, so when everything ran, whatever the
/// list has and was not skipped is out of date.
fn check_skips(skipped: &BTreeMap<String, String>, everything: bool) -> anyhow::Result<()> {
    const LIST: &str = "tests/vm/expected-skips.txt";
    let list = workspace_root().join(LIST);
    let expected = fs::read_to_string(&list).with_context(|| format!("cannot read {}", list.display()))?;
    skips::check(skipped, &expected, LIST)?;
    if everything {
        for name in skips::unused(skipped, &expected) {
            eprintln!("note: {LIST} has {name}, and nothing was skipped under this name: remove it");
        }
    }
    Ok(())
}
