//! Errors as every edge shows them: the same code on the wire, in events, in metrics and on the command line.
//!
//! This module owns the stable codes and what each says about itself. It does not know gRPC: the daemon maps
//! [`Category`] to a status in one place.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an error is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// The bundle or its manifest.
    Manifest,
    /// Another plugin that this one needs.
    Dependency,
    /// Trust, capabilities, signatures, identity.
    Security,
    /// The walls that the kernel holds.
    Isolation,
    /// Memory, processes, descriptors, addresses.
    Resource,
    /// Bytes between processes.
    Communication,
    /// Something took longer than its limit.
    Timeout,
    /// The request does not fit the plugin's present state.
    State,
    /// The registry of plugins.
    Registry,
    /// A defect of Plugvisor.
    Internal,
}

/// How bad it is. The order is the order of weight, that of `plugvisor.event.v1.Severity`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing to do.
    Info,
    /// Something to look at.
    Warning,
    /// Something does not work.
    Error,
    /// The host as a whole is affected.
    Critical,
}

/// Who can mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Who wrote the plugin.
    Author,
    /// Who configures and runs the supervisor.
    Operator,
    /// Who made the call.
    Caller,
    /// The host: its kernel, its disks, its memory.
    Host,
}

macro_rules! texts {
    ($type:ident { $($variant:ident = $text:literal),+ $(,)? }) => {
        impl $type {
            /// The stable text, in `snake_case`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}

texts!(Category {
    Manifest = "manifest",
    Dependency = "dependency",
    Security = "security",
    Isolation = "isolation",
    Resource = "resource",
    Communication = "communication",
    Timeout = "timeout",
    State = "state",
    Registry = "registry",
    Internal = "internal",
});
texts!(Severity { Info = "info", Warning = "warning", Error = "error", Critical = "critical" });
texts!(Fault { Author = "author", Operator = "operator", Caller = "caller", Host = "host" });

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $category:ident, $severity:ident, $fault:ident;)+) => {
        /// The stable codes. A code's text and meaning never change once released; new ones may be added.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $($(#[$doc])* $variant),+
        }

        impl Code {
            /// Every code.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The code as programs compare it.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// What the error is about.
            #[must_use]
            pub const fn category(self) -> Category {
                match self { $(Self::$variant => Category::$category),+ }
            }

            /// How bad it is.
            #[must_use]
            pub const fn severity(self) -> Severity {
                match self { $(Self::$variant => Severity::$severity),+ }
            }

            /// Who can mend it.
            #[must_use]
            pub const fn fault(self) -> Fault {
                match self { $(Self::$variant => Fault::$fault),+ }
            }
        }
    };
}

codes! {
    /// plugin.json is missing, unreadable or breaks the manifest's rules.
    ManifestInvalid = "manifest.invalid", Manifest, Error, Author;
    /// The manifest uses a field whose mechanism this version does not have, and ignoring it would be unsafe.
    ManifestUnsupported = "manifest.unsupported", Manifest, Error, Author;
    /// Two bundles bear the same name.
    ManifestDuplicate = "manifest.duplicate_name", Manifest, Error, Operator;
    /// The bundle directory is missing, unreadable or breaks a limit.
    BundleInvalid = "bundle.invalid", Manifest, Error, Author;
    /// The entry named by `runtime.exec` is not there.
    EntryMissing = "bundle.entry_missing", Manifest, Error, Author;
    /// The entry lacks the executable bit.
    EntryNotExecutable = "bundle.entry_not_executable", Manifest, Error, Author;
    /// The entry is for another machine, or no program at all.
    EntryWrongFormat = "bundle.entry_wrong_format", Manifest, Error, Author;
    /// The descriptor set does not parse, or a name in the manifest is not in it.
    DescriptorInvalid = "bundle.descriptor_invalid", Manifest, Error, Author;

    /// No plugin has the name.
    PluginNotFound = "plugin.not_found", State, Error, Caller;
    /// The request needs a loaded plugin.
    PluginNotLoaded = "plugin.not_loaded", State, Error, Caller;
    /// The plugin is loaded, or being loaded, already.
    PluginAlreadyLoaded = "plugin.already_loaded", State, Error, Caller;
    /// The plugin's state does not admit the request.
    PluginWrongState = "plugin.wrong_state", State, Error, Caller;
    /// The plugin is quarantined and is never started.
    PluginQuarantined = "plugin.quarantined", Security, Error, Operator;
    /// The process ended unasked.
    PluginExited = "plugin.exited", State, Error, Author;
    /// The process ended with status 78: its configuration is wrong, and a restart would not help.
    PluginMisconfigured = "plugin.misconfigured", State, Error, Operator;
    /// The plugin's `Init` answered with an error.
    PluginInitFailed = "plugin.init_failed", State, Error, Author;
    /// The plugin does not serve what its manifest promises.
    PluginServiceMissing = "plugin.service_missing", Manifest, Error, Author;
    /// The operator, or the stop of the supervisor, ended the load.
    PluginLoadAborted = "plugin.load_aborted", State, Warning, Operator;

    /// A plugin that this one depends on is not known.
    DependencyMissing = "dependency.missing", Dependency, Error, Operator;
    /// A plugin that this one depends on is known and not loaded.
    DependencyNotReady = "dependency.not_ready", Dependency, Error, Operator;
    /// A plugin that this one depends on has a version outside the range.
    DependencyVersion = "dependency.version", Dependency, Error, Operator;
    /// Plugins that run depend on this one.
    DependencyRequired = "dependency.required", Dependency, Error, Caller;
    /// Plugins depend on one another in a circle.
    DependencyCycle = "dependency.cycle", Dependency, Error, Author;

    /// The tier never runs.
    TierNeverRuns = "security.tier_never_runs", Security, Error, Operator;
    /// The manifest's own bound is below the tier that the operator set.
    TierTooHigh = "security.tier_too_high", Security, Error, Operator;
    /// A granted capability has no mechanism in this version.
    /// The entry's or bundle's digest is not the one expected.
    DigestMismatch = "security.digest_mismatch", Security, Critical, Author;
    /// The other end of a socket is not who it should be.
    PeerMismatch = "security.peer_mismatch", Security, Critical, Host;

    /// The effective isolation level has no mechanism in this version.
    LevelNotImplemented = "isolation.level_not_implemented", Isolation, Error, Operator;
    /// The host cannot enforce a control that the level requires.
    ControlUnavailable = "isolation.control_unavailable", Isolation, Error, Operator;
    /// The launcher refused the launch.
    LaunchRefused = "isolation.launch_refused", Isolation, Error, Operator;
    /// The launcher is gone.
    LauncherLost = "isolation.launcher_lost", Isolation, Critical, Host;

    /// A limit of the launcher or the host is reached.
    ResourceExhausted = "resource.exhausted", Resource, Error, Host;
    /// The kernel killed the plugin for using more memory than its limit.
    OutOfMemory = "resource.out_of_memory", Resource, Error, Operator;
    /// The supervisor cannot make or write cgroups.
    CgroupUnavailable = "resource.cgroup_unavailable", Resource, Error, Operator;
    /// A TCP address is in use.
    AddressInUse = "resource.address_in_use", Resource, Critical, Operator;
    /// Another supervisor holds the runtime directory.
    RuntimeDirectoryBusy = "resource.runtime_directory_busy", Resource, Critical, Operator;
    /// The supervisor's own state cannot be written: nothing can be asked of it that must be remembered.
    StateReadOnly = "resource.state_read_only", Resource, Critical, Host;
    /// Another process held the supervisor's own state for too long.
    StateLocked = "resource.state_locked", Resource, Error, Operator;
    /// A file, directory or socket of the supervisor's own failed.
    InputOutput = "resource.io", Resource, Critical, Host;

    /// The plugin never served its socket.
    NeverListened = "communication.never_listened", Communication, Error, Author;
    /// What the plugin sent is not HTTP/2 or not gRPC.
    ProtocolBroken = "communication.protocol_broken", Communication, Error, Author;
    /// The connection to the plugin ended.
    ConnectionLost = "communication.connection_lost", Communication, Error, Author;
    /// A message is longer than the limit.
    MessageTooLarge = "communication.message_too_large", Communication, Error, Caller;

    /// The plugin was not ready within `maxStartupTime`.
    StartupTimeout = "timeout.startup", Timeout, Error, Author;
    /// The plugin did not answer its liveness probes.
    Hung = "timeout.hung", Timeout, Error, Author;
    /// An operation of the supervisor's own took too long.
    OperationTimeout = "timeout.operation", Timeout, Error, Host;

    /// The configuration is wrong.
    ConfigurationInvalid = "config.invalid", State, Error, Operator;
    /// A request on the admin socket is malformed.
    RequestInvalid = "request.invalid", State, Error, Caller;
    /// The requester may not do this.
    RequestDenied = "request.denied", Security, Error, Caller;
    /// The supervisor is stopping.
    Stopping = "supervisor.stopping", State, Warning, Operator;
    /// A defect of Plugvisor.
    Bug = "internal.bug", Internal, Critical, Host;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One error: what happened to what and why, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize)]
#[error("{message}")]
pub struct Error {
    /// For programs.
    pub code: Code,
    /// What happened, to what, and why.
    pub message: String,
    /// What to do next; never empty.
    pub hint: String,
}

impl Error {
    /// An error with its text and its next step.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { code, message: message.into(), hint: hint.into() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::Code;

    #[test]
    fn codes_are_distinct_and_dotted() {
        let texts: BTreeSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(texts.len(), Code::ALL.len());
        for text in texts {
            let (group, name) = text.split_once('.').expect("a code is group.name");
            for part in [group, name] {
                assert!(!part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{text}");
            }
        }
    }
}
