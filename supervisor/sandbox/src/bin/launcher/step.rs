//! The steps of setting up a plugin's process, as the child reports them and as people read them.

use plugvisor_sandbox::protocol::{Control, Level, Refusal, RefusalCode};

macro_rules! steps {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $doing:literal;)*) => {
        /// What the child was doing when it failed.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub(crate) enum Step { $($(#[$doc])* $name = $number,)* }

        impl Step {
            pub(crate) fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }

            const fn doing(self) -> &'static str {
                match self { $(Self::$name => $doing,)* }
            }
        }
    };
}

steps! {
    UserNamespace = 1, "mapping its user in the new user namespace";
    Namespaces = 2, "making its namespaces";
    Trial = 4, "copying the launcher's own program into sealed memory";
    Cgroup = 6, "joining its cgroup";
    Session = 7, "starting its own session";
    Propagation = 8, "making its mounts private";
    Root = 9, "mounting its root";
    HostDirectories = 10, "mounting the host's runtime directories";
    Bundle = 11, "mounting the bundle from the store";
    Devices = 12, "making its /dev";
    Proc = 13, "mounting its /proc";
    Temp = 14, "mounting its /tmp";
    Sockets = 15, "mounting its sockets";
    Pivot = 16, "changing to its root";
    Rlimits = 17, "setting its resource limits";
    Groups = 18, "dropping supplementary groups";
    BoundingSet = 19, "dropping the capability bounding set";
    Securebits = 20, "locking the securebits";
    Identity = 21, "taking its uid and gid";
    Capabilities = 22, "dropping its capabilities";
    ParentDeath = 23, "tying its life to the launcher's";
    LauncherGone = 24, "checking that the launcher still lives";
    NoNewPrivs = 25, "setting no_new_privs";
    Descriptors = 26, "arranging its descriptors";
    Landlock = 27, "putting up its Landlock rules";
    LandlockCheck = 28, "trying its Landlock rules: opening / should have been denied";
    Fork = 29, "starting the program under its init";
    Signals = 30, "resetting its signals";
    Seccomp = 31, "installing its seccomp filters";
    Exec = 32, "executing the entry";
    Network = 34, "making the sockets of its network namespace";
    HostName = 35, "giving it a host name of its own";
    LateNamespaces = 36, "entering its UTS and cgroup namespaces";
    WriteExec = 37, "refusing it memory that is written and executed";
    Listener = 38, "installing the filter that lets one exec pass";
    HostTree = 39, "showing it the host's files";
    Machine = 40, "mounting the kernel of its machine";
    ConfigDirectory = 41, "mounting its configuration directory";
    ConfigShared = 42, "mounting its configuration directory, which others can change";
    DataDirectory = 43, "mounting its data directory";
    DataShared = 44, "mounting its data directory, whose place others can change";
    DataOwner = 45, "mounting its data directory, which has files of another user";
}

impl Step {
    /// The control that this step puts up, for steps that fail where the host lacks it.
    pub(crate) const fn control(self) -> Option<Control> {
        match self {
            Self::UserNamespace
            | Self::Namespaces
            | Self::Propagation
            | Self::Root
            | Self::HostDirectories
            | Self::Devices
            | Self::Pivot => Some(Control::MountNamespace),
            Self::Proc => Some(Control::PidNamespace),
            Self::Rlimits => Some(Control::Rlimits),
            Self::Groups | Self::Identity => Some(Control::OwnUid),
            Self::BoundingSet | Self::Securebits | Self::Capabilities => Some(Control::NoCapabilities),
            Self::ParentDeath => Some(Control::DiesWithLauncher),
            Self::NoNewPrivs => Some(Control::NoNewPrivs),
            Self::Landlock | Self::LandlockCheck => Some(Control::Landlock),
            Self::Seccomp => Some(Control::Seccomp),
            Self::HostName => Some(Control::UtsNamespace),
            Self::LateNamespaces => Some(Control::CgroupNamespace),
            Self::WriteExec => Some(Control::NoWriteExec),
            Self::Listener => Some(Control::SingleExec),
            Self::Trial
            | Self::Cgroup
            | Self::Machine
            | Self::HostTree
            | Self::ConfigDirectory
            | Self::ConfigShared
            | Self::DataDirectory
            | Self::DataShared
            | Self::DataOwner
            | Self::Session
            | Self::Network
            | Self::Bundle
            | Self::Temp
            | Self::Sockets
            | Self::LauncherGone
            | Self::Descriptors
            | Self::Fork
            | Self::Signals
            | Self::Exec => None,
        }
    }

    /// The refusal that this failure becomes.
    pub(crate) fn refusal(self, plugin: &str, errno: i32) -> Refusal {
        let why = std::io::Error::from_raw_os_error(errno);
        let doing = self.doing();
        let (code, message) = match self {
            Self::Exec => {
                (RefusalCode::Entry, format!("{plugin} was not started: {doing} failed: {}", exec_words(errno)))
            }
            _ => match self.control() {
                Some(control) if matches!(errno, libc::EPERM | libc::ENOSYS | libc::EOPNOTSUPP | libc::EACCES) => (
                    RefusalCode::ControlUnavailable,
                    format!(
                        "{plugin} was not started: {doing} failed ({why}), so {control} cannot be enforced: {}",
                        fix(control)
                    ),
                ),
                _ => (RefusalCode::Kernel, format!("{plugin} was not started: {doing} failed: {why}")),
            },
        };
        Refusal { code, message }
    }
}

fn exec_words(errno: i32) -> String {
    match errno {
        libc::ENOEXEC => "it is neither an ELF program for this machine nor a script beginning with #!; \
             build it for this architecture"
            .to_owned(),
        libc::ENOENT => "the interpreter that its first line or its ELF header names is not on this host, \
             or not under /usr, /bin or /lib; install it there or build a static program"
            .to_owned(),
        libc::EACCES => "the entry or its interpreter may not be executed; make the interpreter executable".to_owned(),
        libc::E2BIG => "its arguments and environment are too long".to_owned(),
        other => std::io::Error::from_raw_os_error(other).to_string(),
    }
}

/// What an operator can do where namespaces cannot be made.
pub(crate) const FIX_NAMESPACES: &str = "start plugvisord as root, or allow unprivileged user namespaces \
     (sysctl kernel.apparmor_restrict_unprivileged_userns=0, kernel.unprivileged_userns_clone=1, \
     user.max_user_namespaces above 0)";

/// The same at NONE, where groups end what has no PID namespace.
const FIX_GROUP: &str = "start plugvisord as root or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes ...), \
     or run the plugin at the level process, or put \"whole-kill\" and \"dies-with-launcher\" into allow_degraded";

/// What an operator can do where a level lacks a control.
pub(crate) const fn fix_at(level: Level, control: Control) -> &'static str {
    match (level, control) {
        (Level::None, Control::WholeKill | Control::DiesWithLauncher) => FIX_GROUP,
        _ => fix(control),
    }
}

/// What an operator can do where a control cannot be enforced.
pub(crate) const fn fix(control: Control) -> &'static str {
    match control {
        Control::OwnUid => "start plugvisord as root, or put \"own-uid\" into allow_degraded",
        Control::MountNamespace
        | Control::PidNamespace
        | Control::IpcNamespace
        | Control::NetworkNamespace
        | Control::WholeKill
        | Control::DiesWithLauncher => FIX_NAMESPACES,
        Control::Landlock => {
            "boot a kernel of 5.13 or newer with lsm=...,landlock, or put \"landlock\" into allow_degraded"
        }
        Control::MemoryLimit => {
            "start plugvisord as root or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes ...), \
             or put \"memory-limit\" into allow_degraded"
        }
        Control::CpuLimit => {
            "start plugvisord as root or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes ...), \
             or put \"cpu-limit\" into allow_degraded"
        }
        Control::PidsLimit => {
            "start plugvisord as root or in a delegated cgroup (systemd-run --user --scope -p Delegate=yes ...), \
             or put \"pids-limit\" into allow_degraded"
        }
        Control::UtsNamespace | Control::CgroupNamespace => {
            "boot a kernel with CONFIG_UTS_NS and CONFIG_CGROUPS, or run the plugin at the level process"
        }
        Control::Seccomp => "boot a kernel with CONFIG_SECCOMP_FILTER",
        Control::NoWriteExec => "boot a kernel with CONFIG_SECCOMP_FILTER, or run the plugin at the level container",
        Control::SingleExec => {
            "boot a kernel of 5.0 or newer with CONFIG_SECCOMP_FILTER, and start plugvisord where no other program \
             listens to seccomp notifications (some container managers do), or run the plugin at the level container"
        }
        Control::OwnKernel => {
            "correct what is named, in [vm] of the launcher's policy file; where nothing is there yet, apt install \
             qemu-system-x86 linux-image-cloud-amd64 and name the kernel there (kernel = \"/boot/vmlinuz-…\"); or run the \
             plugin at the level sandbox"
        }
        Control::NoCapabilities | Control::NoNewPrivs | Control::Rlimits => {
            "this kernel is older than Plugvisor supports; 5.14 or newer is needed"
        }
    }
}
