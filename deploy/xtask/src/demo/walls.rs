//! What holds around each plugin, read from the kernel by this process, beside what the supervisor says.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

use super::checks::Checks;
use super::process::{cgroups, namespace, status};
use super::supervisor::Supervisor;

/// Prints and checks the walls of one plugin.
///
/// # Errors
/// When the plugin or its process is gone.
pub(crate) fn judge(
    supervisor: &Supervisor,
    name: &str,
    pid: u32,
    degraded: &BTreeSet<String>,
    checks: &mut Checks,
) -> anyhow::Result<()> {
    let description = supervisor.ask(&["describe", name])?;
    let controls = description["controls"].as_array().cloned().unwrap_or_default();
    let text = |control: &Value, field: &str| control[field].as_str().unwrap_or_default().to_owned();
    let level = description["status"]["isolation_level"].as_str().unwrap_or_default().to_owned();
    println!("\n{name} (pid {pid}) at the level {level}, as the supervisor read it from the kernel:");
    for control in &controls {
        let enforced = text(control, "enforced");
        let (mark, what) = if enforced.is_empty() { ("-", text(control, "unavailable")) } else { ("+", enforced) };
        println!("  {mark} {:<20} {what}  [{}]", text(control, "name"), text(control, "read_from"));
    }
    let missing: Vec<String> = controls
        .iter()
        .filter(|control| text(control, "enforced").is_empty())
        .map(|control| text(control, "name"))
        .filter(|name| !degraded.contains(name))
        .collect();
    checks.check(
        &format!("{name}: every control holds or is in allow_degraded"),
        missing.is_empty() && !controls.is_empty(),
        format!("{} controls, missing: {missing:?}", controls.len()),
        "none missing",
        "see `plugvisor describe`",
    );
    from_outside(name, pid, &level, degraded, checks)?;
    limits(name, pid, &description["manifest"], degraded, checks)
}

/// The controls that `/proc` shows to us.
fn from_outside(
    name: &str,
    pid: u32,
    level: &str,
    degraded: &BTreeSet<String>,
    checks: &mut Checks,
) -> anyhow::Result<()> {
    let status = status(pid)?;
    let field = |field: &str| status.get(field).cloned().unwrap_or_default();
    let next = "this wall is not there: report it";
    let mut expect = |control: &str, file: &str, seen: String, expected: &str| {
        if !degraded.contains(control) {
            checks.check(&format!("{name}: {control}"), seen == expected, format!("{file} {seen}"), expected, next);
        }
    };
    expect("no-new-privs", "NoNewPrivs", field("NoNewPrivs"), "1");
    expect("seccomp", "Seccomp", field("Seccomp"), "2");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        expect("no-capabilities", set, field(set), "0000000000000000");
    }
    let mut kinds = vec![
        ("mnt", "mount-namespace"),
        ("pid", "pid-namespace"),
        ("ipc", "ipc-namespace"),
        ("net", "network-namespace"),
    ];
    if level == "sandbox" {
        kinds.extend([("uts", "uts-namespace"), ("cgroup", "cgroup-namespace")]);
    }
    for (kind, control) in kinds {
        if degraded.contains(control) {
            continue;
        }
        let (theirs, ours) = (namespace(pid, kind)?, namespace(std::process::id(), kind)?);
        checks.check(&format!("{name}: {control}"), theirs != ours, &theirs, format!("not {ours}"), next);
    }
    let uid = field("Uid").split_whitespace().next().unwrap_or_default().to_owned();
    let root = rustix::process::geteuid().is_root();
    if root && !degraded.contains("own-uid") {
        checks.check(&format!("{name}: own-uid"), uid != "0" && uid != "65534", &uid, "a uid of its own", next);
    }
    Ok(())
}

/// Limits are compared with the manifest, in the cgroup files of the kernel.
fn limits(
    name: &str,
    pid: u32,
    manifest: &Value,
    degraded: &BTreeSet<String>,
    checks: &mut Checks,
) -> anyhow::Result<()> {
    let ours = cgroups(std::process::id())?;
    // A limit on a group that we are in too would not be the plugin's.
    let mut groups = cgroups(pid)?;
    groups.retain(|controller, group| ours.get(controller) != Some(group));
    let asked = &manifest["security"]["sandbox"]["resourceLimits"]["maxMemory"];
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a number of bytes in a protobuf Struct"
    )]
    let asked = asked.as_u64().or_else(|| asked.as_f64().map(|bytes| bytes as u64));
    if let Some(asked) = asked.filter(|_| !degraded.contains("memory-limit")) {
        let files = [("memory", "memory.limit_in_bytes"), ("", "memory.max")];
        let seen = first_file(&groups, &files).with_context(|| format!("{name} has no memory cgroup"))?;
        checks.check(
            &format!("{name}: memory-limit"),
            seen.1 == asked.to_string(),
            format!("{} {}", seen.0, seen.1),
            asked,
            "the limit in the kernel is not the manifest's: report it",
        );
    }
    if !degraded.contains("pids-limit") {
        let seen = first_file(&groups, &[("pids", "pids.max"), ("", "pids.max")]);
        // Without a cgroup the limit counts the processes of one user in one user namespace, which must be its own.
        let own_users = namespace(pid, "user")? != namespace(std::process::id(), "user")?;
        let seen = match seen {
            Some(seen) => Some(seen),
            None if own_users => max_processes(pid)?,
            None => None,
        };
        let (place, value) = seen.unwrap_or_default();
        let limited = value.parse::<u32>().is_ok();
        let next = "the plugin may start any number of processes: report it";
        checks.check(&format!("{name}: pids-limit"), limited, format!("{place} {value}"), "a number", next);
    }
    Ok(())
}

/// The soft limit on processes: where it was read and what it is.
fn max_processes(pid: u32) -> anyhow::Result<Option<(String, String)>> {
    let path = format!("/proc/{pid}/limits");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let limit = text.lines().find_map(|line| line.strip_prefix("Max processes")?.split_whitespace().next());
    Ok(limit.map(|limit| (path.clone(), limit.to_owned())))
}

/// The first of the files that exists: its path and its content.
fn first_file(
    groups: &std::collections::BTreeMap<String, std::path::PathBuf>,
    files: &[(&str, &str)],
) -> Option<(String, String)> {
    files.iter().find_map(|(controller, file)| {
        let path = groups.get(*controller)?.join(file);
        let content = fs::read_to_string(&path).ok()?;
        Some((path.to_string_lossy().into_owned(), content.trim().to_owned()))
    })
}

/// Prints the processes below `root` as a tree.
///
/// # Errors
/// When `/proc` cannot be read.
pub(crate) fn print_tree(root: u32) -> anyhow::Result<()> {
    println!("\nprocesses:");
    for (depth, pid) in super::process::tree(root)? {
        let Ok(status) = status(pid) else { continue };
        let field = |field: &str| status.get(field).cloned().unwrap_or_default();
        let uid = field("Uid").split_whitespace().next().unwrap_or_default().to_owned();
        let program = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("cmdline")).unwrap_or_default();
        let program = program.split('\0').next().unwrap_or_default().to_owned();
        let name = if program.is_empty() { field("Name") } else { program };
        println!("  {}{pid} {name} (uid {uid}, {})", "  ".repeat(depth), field("VmRSS"));
    }
    Ok(())
}
