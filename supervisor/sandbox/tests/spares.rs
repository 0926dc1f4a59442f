//! Children made ahead of their launches: they become plugins behind the same walls, and hold nothing until then.
#![allow(missing_docs, reason = "a test")]

mod harness;

use std::{fs, os::fd::AsFd, path::Path, time::Instant};

use harness::{As, Harness, Plugin, is_root, patience, read_all, wait_readable};
use plugvisor_sandbox::protocol::{Exit, Level, Limits};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

fn privileged() -> Option<Harness> {
    if !is_root() {
        println!("SKIP privileged-lane: only a privileged launcher makes spares");
        return None;
    }
    let mut harness = Harness::start(As::Root);
    // The first launch of an entry copies it, which a spare does not do.
    let request = harness.request(&["exit", "0"]);
    let first = harness.launch(request);
    assert_eq!(harness.exit_of(first.launched.launch), (Exit::Code(0), false));
    Some(harness)
}

/// The process whose child the plugin is.
fn init_of(plugin: &Plugin) -> i32 {
    let status = fs::read_to_string(format!("/proc/{}/status", plugin.launched.pid)).expect("its status");
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:")).expect("PPid");
    parent.trim().parse().expect("a number")
}

#[test]
fn a_spare_becomes_a_plugin_behind_the_same_walls() {
    let Some(mut harness) = privileged() else { return };
    for (round, level) in [Level::Process, Level::Container, Level::Sandbox].into_iter().enumerate() {
        let spares = harness.await_spares();
        let mut request = harness.request_at(level, &["pause"]);
        request.limits = Limits {
            memory_bytes: Some(64 << 20),
            cpu_percent: Some(50),
            pids: Some(8),
            file_size_bytes: Some(1 << 20),
            open_files: Some(64),
        };
        let plugin = harness.launch(request);
        assert!(spares.contains(&init_of(&plugin)), "round {round}: {} is not of {spares:?}", init_of(&plugin));
        let controls = &plugin.launched.controls;
        assert_eq!(controls.len(), level.controls().count());
        for state in controls {
            assert!(state.enforced.is_some(), "{state:?}");
        }
        for group in &plugin.launched.cgroups {
            // v2 knows no renaming: there a spare's group keeps the name that it was made with.
            let is_v2 = Path::new(group).join("cgroup.controllers").exists();
            let name = if is_v2 { "/spare-" } else { "/walled-7-" };
            assert!(group.contains(name), "{group} is not named {name}");
            let members = fs::read_to_string(format!("{group}/cgroup.procs")).expect("its members");
            let members: Vec<i32> = members.lines().filter_map(|pid| pid.parse().ok()).collect();
            let program = i32::try_from(plugin.launched.pid).expect("a pid");
            assert!(members.contains(&program) && members.contains(&init_of(&plugin)), "{members:?} of {group}");
        }
        drop(plugin);
    }
    // From inside: its own things and nothing else, whatever was launched before it.
    let seen =
        harness.attempt(|_| (), &["list", "/proc/self/fd", "list", "/run/plugvisor", "append", "/run/x", "list", "/"]);
    let seen: Vec<&str> = seen.iter().map(|(_, result)| result.as_str()).collect();
    assert_eq!(seen, ["0,1,2,3,4", "broker.sock,worker.sock", "30", "13"]);
}

#[test]
fn a_first_launch_takes_a_spare_and_its_uid_is_on_the_disk_before() {
    if !is_root() {
        println!("SKIP privileged-lane: only a privileged launcher gives uids");
        return;
    }
    let mut harness = Harness::start_with_store(As::Root, |_| ());
    let uids = harness.path("store/uids");
    // Where the new file would be written is something that is in the way.
    let new = harness.path("store/uids.new");
    fs::create_dir(&new).expect("a directory");
    let spares = harness.await_spares();
    let request = harness.request(&["pause"]);
    let refusal = harness.try_launch(request.clone()).map(drop).expect_err("its uid cannot be written down");
    assert!(refusal.message.contains("could not be written down"), "{}", refusal.message);
    assert!(!uids.exists());

    fs::remove_dir(&new).expect("it is empty");
    let spares = [spares, harness.await_spares()].concat();
    let plugin = harness.launch(request);
    assert!(spares.contains(&init_of(&plugin)), "{} is not of {spares:?}", init_of(&plugin));
    let text = fs::read_to_string(uids).expect("the uids");
    assert!(text.contains(&format!("walled {}\n", plugin.launched.uid)), "{text:?}");
}

#[test]
fn a_spare_holds_nothing_of_any_plugin() {
    let Some(mut harness) = privileged() else { return };
    harness.await_spares();
    let request = harness.request(&["pause"]);
    let plugin = harness.launch(request);
    // At least one of these was made while the plugin ran, as a fork of the launcher that holds its descriptors.
    for spare in harness.await_spares() {
        let mut open: Vec<(u32, String)> = fs::read_dir(format!("/proc/{spare}/fd"))
            .expect("its descriptors")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let target = fs::read_link(entry.path()).expect("its target").display().to_string();
                (entry.file_name().to_string_lossy().parse().expect("a number"), target)
            })
            .filter(|(number, _)| *number > 2)
            .collect();
        open.sort();
        // Its own root, to which the plugin's part of the tree will be attached.
        open.retain(|(_, target)| target != "/");
        let (fixed, groups) = open.split_at(2);
        assert!(fixed[0].1.starts_with("socket:") && fixed[1].1.contains("pidfd"), "{open:?}");
        assert!(groups.iter().all(|(_, target)| target.ends_with("/tasks")), "{open:?}");
        assert!(groups.iter().all(|(_, target)| target.contains("/spare-")), "{open:?}");
        let mounts = fs::read_to_string(format!("/proc/{spare}/mountinfo")).expect("its mounts");
        assert!(!mounts.contains("walled") && !mounts.contains(".sock"), "{mounts}");
    }
    drop(plugin);
}

#[test]
fn a_launch_without_a_living_spare_begins_from_nothing() {
    let Some(mut harness) = privileged() else { return };
    for spare in harness.await_spares() {
        let pid = Pid::from_raw(spare).expect("a pid");
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("it lives");
        pidfd_send_signal(&pidfd, Signal::KILL).expect("it is killed");
        assert!(wait_readable(pidfd.as_fd(), Instant::now() + patience()), "it ends");
    }
    let request = harness.request(&["thread"]);
    let mut plugin = harness.launch(request);
    assert_eq!(read_all(&mut plugin.stdout), "thread ok\n");
    assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
}

#[test]
fn spares_end_with_a_killed_launcher() {
    let Some(harness) = privileged() else { return };
    let spares = harness.await_spares();
    assert_eq!(spares.len(), harness.spares);
    let pidfds: Vec<_> = spares
        .into_iter()
        .map(|pid| pidfd_open(Pid::from_raw(pid).expect("a pid"), PidfdFlags::empty()).expect("it lives"))
        .collect();
    harness.signal(Signal::KILL);
    for pidfd in pidfds {
        assert!(wait_readable(pidfd.as_fd(), Instant::now() + patience()), "a spare outlives the launcher");
    }
}
