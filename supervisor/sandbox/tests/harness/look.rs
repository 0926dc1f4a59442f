//! What the launcher has on the host: its cgroups, its spares and its descriptors.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use plugvisor_sandbox::protocol::{Reply, Request};

use super::{Harness, is_root, patience};

impl Harness {
    /// Every cgroup directory of this launcher that exists now.
    pub fn cgroups(&self) -> Vec<PathBuf> {
        fn walk(directory: &Path, name: &str, depth: u32, found: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let path = entry.path();
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                if path.iter().any(|part| part == name) {
                    found.push(path.clone());
                }
                if depth > 0 {
                    walk(&path, name, depth - 1, found);
                }
            }
        }
        let mut found = Vec::new();
        walk(Path::new("/sys/fs/cgroup"), &self.cgroup, 8, &mut found);
        found
    }

    /// Whether a child of the launcher is closing descriptors, or may be about to.
    fn closing(&self, only_named: bool) -> bool {
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its children");
        children.split_whitespace().any(|child| {
            let name = fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
            let name = name.trim();
            let others = ["plugvisor-init", "plugvisor-guard", "plugvisor-early", "plugvisor-spare"];
            name == "plugvisor-close" || (!only_named && !others.contains(&name))
        })
    }

    /// The processes that wait for a launch.
    pub fn waiting(&self) -> Vec<i32> {
        let pid = self.process.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("its children");
        let spare = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "plugvisor-spare")
        };
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).filter(spare).collect()
    }

    /// Waits until there are as many spares as there should be. There is no event for it.
    pub fn await_spares(&self) -> Vec<i32> {
        let deadline = Instant::now() + patience();
        loop {
            let waiting = self.waiting();
            if waiting.len() == self.spares {
                return waiting;
            }
            assert!(Instant::now() < deadline, "{waiting:?} are not {} spares", self.spares);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until a child of the launcher is closing descriptors. There is no event for it.
    pub fn await_closing(&self) {
        let deadline = Instant::now() + patience();
        while !self.closing(true) {
            assert!(Instant::now() < deadline, "nothing is closed");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the launcher has no more descriptors open than this: /proc leaves out a child that closes some while another
    /// one ends (proc_pid_task_tid_children(5)), so that one count may be of a moment in between. A leak stays.
    pub fn await_descriptors(&mut self, most: Option<usize>, after: &str) {
        let deadline = Instant::now() + patience();
        loop {
            let open = self.descriptors();
            if open <= most {
                return;
            }
            if Instant::now() >= deadline {
                let directory = format!("/proc/{}/fd", self.process.id());
                let links = fs::read_dir(directory).into_iter().flatten().flatten();
                let links: Vec<_> = links.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
                panic!("{open:?} descriptors {after}, and {most:?} before: {links:?}");
            }
        }
    }

    /// How many descriptors the launcher has open when it has closed what it got; `None`, and said so, where only root may
    /// see that: the launcher is not dumpable.
    pub fn descriptors(&mut self) -> Option<usize> {
        let deadline = Instant::now() + patience();
        // An answer comes in a later turn of its loop than what was before: the closing child has begun by then, and in
        // the turn that reaps it lets go of it too.
        let turn = |harness: &mut Self| assert!(matches!(harness.ask(&Request::Probe, &[]).0, Reply::Probe(_)));
        turn(self);
        self.await_spares();
        // One child may follow another: none runs when there is none after a turn that began with none.
        loop {
            while self.closing(false) {
                assert!(Instant::now() < deadline, "the closing does not end");
                std::thread::sleep(Duration::from_millis(1));
            }
            turn(self);
            if !self.closing(false) {
                break;
            }
        }
        match fs::read_dir(format!("/proc/{}/fd", self.process.id())) {
            Ok(open) => Some(open.count()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied && !is_root() => {
                println!("SKIP privileged-lane: only root may count the launcher's descriptors");
                None
            }
            Err(error) => panic!("its descriptors: {error}"),
        }
    }
}
