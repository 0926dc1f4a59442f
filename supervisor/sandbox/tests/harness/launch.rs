//! Launches of the test plugin, and what a launched one gives.

use std::{fs::File, os::fd::OwnedFd, sync::PoisonError};

use plugvisor_sandbox::protocol::{
    Control, Exit, Grant, Launch, Launched, Level, Limits, Refusal, Reply, Request, Tier,
};

use super::{As, Harness, Manner, read_all};

/// The levels of one kernel, from the weakest on.
pub const LEVELS: [Level; 4] = [Level::None, Level::Process, Level::Container, Level::Sandbox];

/// A launched plugin and its ends.
pub struct Plugin {
    pub launched: Launched,
    pub pidfd: OwnedFd,
    pub broker: OwnedFd,
    pub worker: OwnedFd,
    pub stdout: File,
    pub stderr: File,
    /// Where the egress proxy accepts, when it was granted.
    pub egress: Option<OwnedFd>,
}

impl Plugin {
    pub(super) fn of(launched: Launched, mut descriptors: Vec<OwnedFd>) -> Self {
        let egress = (descriptors.len() == 6).then(|| descriptors.remove(5));
        let [pidfd, broker, worker, stdout, stderr] =
            <[OwnedFd; 5]>::try_from(descriptors).expect("five descriptors, or six with egress");
        Self { launched, pidfd, broker, worker, stdout: stdout.into(), stderr: stderr.into(), egress }
    }
}

impl Harness {
    /// A launch of the test plugin with these arguments, with what is lacking allowed, so that the rest can be seen.
    pub fn request(&self, args: &[&str]) -> Launch {
        self.request_in(&Manner::of(args))
    }

    /// A launch of the test plugin as it runs in a bundle made for it.
    pub fn request_in(&self, manner: &Manner) -> Launch {
        let lacking = [Control::OwnUid, Control::MemoryLimit, Control::CpuLimit, Control::PidsLimit];
        Launch {
            plugin: "walled".to_owned(),
            generation: 7,
            level: Level::Process,
            bundle: self.made("walled", manner),
            tier: Tier::Untrusted,
            approval: None,
            limits: Limits::default(),
            grants: Vec::new(),
            environment: Vec::new(),
            inward: 0,
            allow_degraded: if self.as_ == As::Ordinary { lacking.to_vec() } else { Vec::new() },
        }
    }

    /// The same at a level. At NONE an ordinary user also lacks the cgroup that would end all of it together.
    pub fn request_at(&self, level: Level, args: &[&str]) -> Launch {
        self.request_at_in(level, &Manner::of(args))
    }

    /// The same as it runs in a bundle made for it.
    pub fn request_at_in(&self, level: Level, manner: &Manner) -> Launch {
        let mut launch = self.request_in(manner);
        launch.level = level;
        if level == Level::None && self.as_ == As::Ordinary {
            launch.allow_degraded.extend([Control::WholeKill, Control::DiesWithLauncher]);
        }
        launch
    }

    /// Launches; the bundle of the plugin's name is made and imported first, when there is none.
    pub fn try_launch(&mut self, launch: Launch) -> Result<Plugin, Refusal> {
        let launch = self.try_prepare(launch)?;
        self.launch_stored(launch)
    }

    /// The launch, with its bundle in the store.
    pub fn prepared(&mut self, launch: Launch) -> Launch {
        self.try_prepare(launch).unwrap_or_else(|refusal| panic!("refused: {refusal:?}"))
    }

    fn try_prepare(&mut self, mut launch: Launch) -> Result<Launch, Refusal> {
        let known = |harness: &Self, bundle| {
            let made = harness.made.lock().unwrap_or_else(PoisonError::into_inner);
            made.get(&bundle).cloned()
        };
        if let Some((manner, _)) = known(self, launch.bundle).filter(|_| launch.plugin.starts_with("walled-")) {
            launch.bundle = self.made(&launch.plugin, &manner);
        }
        if let Some((_, path)) = known(self, launch.bundle)
            && self.find(launch.bundle).is_none()
        {
            self.import(&path)?;
        }
        Ok(launch)
    }

    /// Launches from what the store has.
    pub fn launch_stored(&mut self, launch: Launch) -> Result<Plugin, Refusal> {
        match self.ask(&Request::Launch(Box::new(launch)), &[]) {
            (Reply::Launched(launched), descriptors) => Ok(Plugin::of(launched, descriptors)),
            (Reply::Refused(refusal), descriptors) => {
                assert!(descriptors.is_empty());
                Err(refusal)
            }
            (other, _) => panic!("{other:?}"),
        }
    }

    pub fn launch(&mut self, launch: Launch) -> Plugin {
        self.try_launch(launch).unwrap_or_else(|refusal| panic!("refused: {refusal:?}"))
    }

    /// Launches, reads its output to the end, and gives the lines by name.
    pub fn attempt(&mut self, change: impl FnOnce(&mut Launch), args: &[&str]) -> Vec<(String, String)> {
        let mut request = self.request(args);
        change(&mut request);
        let mut plugin = self.launch(request);
        let text = read_all(&mut plugin.stdout);
        let errors = read_all(&mut plugin.stderr);
        let exit = self.exit_of(plugin.launched.launch);
        assert_eq!(exit, (Exit::Code(0), false), "stdout: {text}, stderr: {errors}");
        text.lines()
            .map(|line| line.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).expect("NAME RESULT"))
            .collect()
    }
    /// The same at a level and with these grants; the results alone.
    pub fn attempt_at(&mut self, level: Level, grants: &[Grant], args: &[&str]) -> Vec<String> {
        let allowed = self.request_at(level, args).allow_degraded;
        let change = |launch: &mut Launch| {
            launch.level = level;
            launch.grants = grants.to_vec();
            launch.allow_degraded = allowed;
        };
        self.attempt(change, args).into_iter().map(|(_, result)| result).collect()
    }

    /// The version of Landlock that plugins are held by here, as the launcher read it.
    pub fn landlock_version(&mut self) -> u32 {
        let request = self.request(&["exit", "0"]);
        let plugin = self.launch(request);
        let state = plugin.launched.controls.iter().find(|state| state.control == Control::Landlock);
        let held = state.and_then(|state| state.enforced.as_deref()).expect("it is held by Landlock");
        let number = held.strip_prefix("Landlock version ").and_then(|rest| rest.split(',').next());
        number.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("{held:?} names no version"))
    }
}
