//! The phases of a load. Each runs as a task of its generation and reports its end; the lifecycle decides what follows.

use std::{
    fs::File,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::Arc,
};

use plugvisor_core::{
    Code, Error, Generation,
    event::{BrokerEvent, PluginEvent, SecurityEvent},
    lifecycle::{Event, Failure, Permanence, Phase},
    policy::{Policy, Verdict, WhyNot},
    route::PluginCaller,
};
use plugvisor_package::{Bundle, Capability, PluginName, SocketMode};
use plugvisor_proto::worker::v1::LifecycleHook;
use plugvisor_sandbox::protocol::{self, Launch, Level, RefusalCode};
use tokio::time::Instant;

use super::{
    BundleInfo, Driver, HOOK_PATIENCE, Inward, PluginView, ProcessView, Running,
    exit::Watcher,
    settings,
    worker::{Init, Trouble, Worker, bound_socket},
};
use crate::{
    broker::{CallLimits, CallerSpec, ProviderSpec},
    discovery::{Rejection, Source},
    launcher::{LauncherError, Process},
    logs::LogStream,
};

/// A bundle that may be launched.
#[derive(Debug)]
pub(super) struct Verified {
    info: Arc<BundleInfo>,
    entry: File,
    entry_path: String,
    entry_sha256: [u8; 32],
    directory: OwnedFd,
    pub(super) verdict: Arc<Verdict>,
}

/// What of a bundle outlives its descriptors.
pub(super) fn info(bundle: &Bundle) -> BundleInfo {
    BundleInfo {
        manifest: bundle.manifest.clone(),
        digest: bundle.digest,
        services: bundle.services.clone(),
        descriptor_set: bundle.descriptor_set.clone(),
    }
}

pub(super) fn permanent(error: Error) -> Failure {
    Failure { error, permanence: Permanence::Permanent, stderr_tail: Vec::new() }
}

fn transient(error: Error) -> Failure {
    Failure { error, permanence: Permanence::Transient, stderr_tail: Vec::new() }
}

pub(super) fn failed(generation: Generation, phase: Phase, failure: Failure) -> Inward {
    Inward::Life(Event::PhaseFailed { generation, phase, failure })
}

impl Driver {
    pub(super) fn begin_verify(&mut self, generation: Generation) {
        let (found, source, name) = (self.found.take(), self.source.clone(), self.name.clone());
        let config = self.config.clone();
        self.spawn(generation, async move {
            // Reading and hashing block.
            let verified = tokio::task::spawn_blocking(move || verify(found, &source, &name, &config)).await;
            Some(match verified {
                Ok(Ok(verified)) => Inward::Verified(generation, Box::new(verified)),
                Ok(Err(failure)) => failed(generation, Phase::Verify, failure),
                Err(panic) => {
                    let error = Error::new(Code::Bug, format!("reading the bundle: {panic}"), "report this as a bug");
                    failed(generation, Phase::Verify, permanent(error))
                }
            })
        });
    }

    /// Shows what verification found.
    pub(super) async fn verified(&mut self) {
        let Some(verified) = self.run.as_ref().and_then(|run| run.verified.as_ref()) else { return };
        let (info, verdict) = (Arc::clone(&verified.info), Arc::clone(&verified.verdict));
        self.emit(PluginEvent::Validated { version: info.manifest.version.to_string(), digest: info.digest });
        self.emit(SecurityEvent::TrustAssessed { tier: verdict.tier.as_str(), level: verdict.level.as_str() });
        for capability in &verdict.capabilities {
            let name = capability.capability.as_str();
            match capability.why_not {
                None => self.emit(SecurityEvent::CapabilityGranted { capability: name }),
                // The operator gave more than was asked for: shown in the description, denied to nobody.
                Some(WhyNot::NotAsked) => {}
                Some(why) => {
                    self.emit(SecurityEvent::CapabilityDenied { capability: name, why: why.describe() });
                }
            }
        }
        self.view.send_modify(|view| {
            let view: &mut PluginView = Arc::make_mut(view);
            view.bundle = Some(info);
            view.verdict = Some(verdict);
        });
    }

    pub(super) fn begin_launch(&mut self, generation: Generation) {
        let asked = self.of(generation).and_then(|run| run.verified.as_ref()).map(|verified| {
            let Verified { info, entry, entry_path, entry_sha256, directory, verdict } = verified;
            let manifest = &info.manifest;
            let launch = Launch {
                plugin: manifest.name.to_string(),
                generation: generation.0,
                level: Level::Process,
                entry_sha256: *entry_sha256,
                entry: entry_path.clone(),
                args: manifest.runtime.args.clone(),
                env: manifest.runtime.env.clone().into_iter().collect(),
                socket: match manifest.runtime.socket {
                    SocketMode::Inherit => protocol::SocketMode::Inherit,
                    SocketMode::Bind => protocol::SocketMode::Bind,
                },
                limits: settings::kernel_limits(&verdict.limits),
                grants: verdict.granted.iter().filter_map(kernel_grant).collect(),
                allow_degraded: Vec::new(),
            };
            let descriptors = entry.try_clone().and_then(|entry| Ok((entry, directory.try_clone()?)));
            (launch, descriptors)
        });
        let Some((mut launch, descriptors)) = asked else { return };
        launch.allow_degraded.clone_from(&self.shared.allow_degraded);
        let (launcher, name) = (self.shared.launcher.clone(), self.name.clone());
        self.spawn(generation, async move {
            let launched = match descriptors {
                Ok((entry, directory)) => launcher.launch(launch, entry.into(), directory).await,
                Err(error) => Err(LauncherError::Request(error.to_string())),
            };
            Some(match launched {
                Ok(process) => Inward::Launched(generation, Box::new(process)),
                Err(error) => failed(generation, Phase::Launch, launch_failure(&name, &error)),
            })
        });
    }

    /// A process runs: show it, read its pipes, wait for its end.
    pub(super) async fn launched(&mut self, generation: Generation, process: Process) {
        let Process { launched, pidfd, broker_listener, worker, stdout, stderr, notices } = process;
        let reason = self.start_reason;
        let now = Instant::now();
        let health = self.config.health.clone();
        let Some(run) = self.of(generation) else {
            // Cannot be: a generation with a launch under way is not forgotten. Nothing may run unowned all the same.
            let _ = self.shared.launcher.kill(launched.launch).await;
            return;
        };
        let Some(verified) = &run.verified else { return };
        let startup = settings::startup_time(&verified.info.manifest, &health);
        let memory_limit = verified.verdict.limits.memory_bytes;
        let level = verified.verdict.level.as_str();
        let cgroups: Vec<PathBuf> = launched.cgroups.iter().map(PathBuf::from).collect();
        let missing: Vec<String> = launched
            .controls
            .iter()
            .filter(|control| control.enforced.is_none())
            .map(|control| control.control.to_string())
            .collect();
        let (pid, launch) = (launched.pid, launched.launch);
        let view = ProcessView { launch, pid, uid: launched.uid, controls: launched.controls, cgroups };
        let view = Arc::new(view);
        run.process = Some(Running {
            view: Arc::clone(&view),
            launched_at: now,
            deadline: now + startup,
            given: Arc::new(worker),
            broker_listener: Some(broker_listener),
            socket: None,
            worker: None,
        });
        self.view.send_modify(|seen| {
            let seen: &mut PluginView = Arc::make_mut(seen);
            seen.process = Some(Arc::clone(&view));
            *seen.figures.starts.entry(reason).or_insert(0) += 1;
        });
        let readers = [(LogStream::Stdout, stdout), (LogStream::Stderr, stderr)]
            .map(|(stream, pipe)| {
                let logs = Arc::clone(&self.shared.logs);
                self.tasks.spawn(logs.read(self.name.clone(), generation.0, stream, pipe))
            })
            .into();
        let launch_exec_us = launched.launch_exec_nanos / 1_000;
        self.emit(PluginEvent::Starting { pid, cgroups: launched.cgroups, level, launch_exec_us });
        if !missing.is_empty() {
            self.emit(SecurityEvent::SandboxDegraded { missing });
        }
        let watcher = Watcher {
            plugin: self.name.clone(),
            generation,
            launch,
            pidfd,
            notices,
            launched_at: now,
            memory_limit,
            readers,
            launcher: self.shared.launcher.clone(),
            logs: Arc::clone(&self.shared.logs),
            events: Arc::clone(&self.shared.events),
        };
        self.spawn(generation, watcher.run());
        self.done(generation, Phase::Launch).await;
    }

    pub(super) async fn begin_handshake(&mut self, generation: Generation) -> Option<Event> {
        if let Err(failure) = self.add_caller(generation).await {
            return Some(Event::PhaseFailed { generation, phase: Phase::Handshake, failure });
        }
        let name = self.name.clone();
        let run = self.of(generation)?;
        let mode = run.verified.as_ref()?.info.manifest.runtime.socket;
        let running = run.process.as_ref()?;
        let (given, uid, deadline) = (Arc::clone(&running.given), running.view.uid, running.deadline);
        self.spawn_phase(generation, Phase::Handshake, async move {
            let (socket, peer) = match mode {
                SocketMode::Inherit => (given, None),
                SocketMode::Bind => (Arc::new(bound_socket(name.as_str(), &given, deadline).await?), Some(uid)),
            };
            let worker = Worker::new(Arc::clone(&socket), peer);
            worker.first_answer(name.as_str(), deadline).await?;
            Ok(Inward::Reached(generation, socket, worker))
        });
        None
    }

    /// From its first instruction on the plugin may call others, as far as its grants go.
    async fn add_caller(&mut self, generation: Generation) -> Result<(), Failure> {
        let name = self.name.clone();
        let caller = self.of(generation).and_then(|run| {
            let verified = run.verified.as_ref()?;
            let running = run.process.as_mut()?;
            let dependencies = verified.info.manifest.dependencies.iter().map(|d| d.name.clone()).collect();
            let caller = PluginCaller { name, generation, granted: verified.verdict.granted, dependencies };
            Some(CallerSpec { caller, listener: running.broker_listener.take()?, uid: Some(running.view.uid) })
        });
        let Some(caller) = caller else { return Ok(()) };
        self.shared.calls.broker().add_caller(caller).await.map_err(|error| {
            let hint = "raise the limit on open files of plugvisord, then `plugvisor restart`";
            transient(Error::new(Code::ResourceExhausted, error.to_string(), hint))
        })
    }

    pub(super) fn begin_init(&mut self, generation: Generation) {
        let config = self.config.config.clone();
        let before_load = self.hook_wanted(|hooks| hooks.before_load);
        let name = self.name.clone();
        let Some(worker) = self.worker(generation) else { return };
        let Some(run) = self.of(generation) else { return };
        let (Some(verified), Some(running)) = (&run.verified, &run.process) else { return };
        let (info, verdict, deadline) = (Arc::clone(&verified.info), Arc::clone(&verified.verdict), running.deadline);
        self.spawn_phase(generation, Phase::Init, async move {
            let mut merged = info.manifest.runtime.config.defaults.clone();
            merged.extend(config);
            let ask = Init {
                plugin: name.as_str(),
                generation: generation.0,
                config: merged,
                granted: verdict.granted,
                provided: &info.services.provided,
            };
            let sdk = worker.init(ask, deadline).await?;
            worker.serving(name.as_str(), deadline).await?;
            if before_load {
                worker.hook(LifecycleHook::BeforeLoad, HOOK_PATIENCE).await.map_err(|why| Trouble {
                    error: Error::new(
                        Code::PluginInitFailed,
                        format!("plugin {name} refused to be loaded in its hook beforeLoad: {why}"),
                        format!("see `plugvisor logs {name}`"),
                    ),
                    permanence: Permanence::Transient,
                })?;
            }
            Ok(Inward::Initialised(generation, sdk))
        });
    }

    pub(super) async fn try_register(&mut self, generation: Generation) -> Result<(), Failure> {
        let name = self.name.clone();
        let gone = |what: &str| {
            let message = format!("plugin {name} cannot be registered: {what}");
            transient(Error::new(Code::InputOutput, message, "`plugvisor restart` tries again"))
        };
        let identity = self.identity(generation);
        let breaker = self.config.breaker.clone();
        let provider = self.run.as_ref().filter(|run| run.generation == generation).and_then(|run| {
            let (verified, running) = (run.verified.as_ref()?, run.process.as_ref()?);
            let socket = running.socket.as_ref()?.try_clone();
            let breaker = settings::breaker(&verified.info.manifest, &breaker);
            let limits = CallLimits { max_deadline: verified.verdict.limits.call_time, ..CallLimits::default() };
            Some(socket.map(|socket| ProviderSpec { identity: identity.clone(), socket, breaker, limits }))
        });
        let provider =
            provider.ok_or_else(|| gone("its process is gone"))?.map_err(|error| gone(&error.to_string()))?;
        let broker = self.shared.calls.broker().clone();
        broker.add_provider(provider).await.map_err(|stopped| gone(&stopped.to_string()))?;
        if let Some(run) = self.of(generation) {
            run.registered = true;
        }
        broker.set_ready(&identity, true).await.map_err(|stopped| gone(&stopped.to_string()))?;
        self.emit_services(|service| BrokerEvent::ServiceRegistered { service });
        Ok(())
    }

    /// Runs a phase that asks the plugin something.
    fn spawn_phase(
        &mut self,
        generation: Generation,
        phase: Phase,
        work: impl Future<Output = Result<Inward, Trouble>> + Send + 'static,
    ) {
        let (logs, name) = (Arc::clone(&self.shared.logs), self.name.clone());
        self.spawn(generation, async move {
            Some(work.await.unwrap_or_else(|Trouble { error, permanence }| {
                let stderr_tail = logs.stderr_tail(&name, generation.0, super::exit::TAIL);
                failed(generation, phase, Failure { error, permanence, stderr_tail })
            }))
        });
    }
}

/// The capabilities that open something in the kernel; the broker holds the others.
fn kernel_grant(capability: Capability) -> Option<protocol::Grant> {
    match capability {
        Capability::WriteTemp => Some(protocol::Grant::WriteTemp),
        Capability::SpawnChild => Some(protocol::Grant::SpawnChild),
        _ => None,
    }
}

fn verify(
    found: Option<Bundle>,
    source: &Source,
    name: &PluginName,
    config: &crate::config::PluginConfig,
) -> Result<Verified, Failure> {
    let bundle = match found {
        Some(bundle) => bundle,
        None => source.open().map_err(|Rejection { error, problems: _ }| permanent(error))?,
    };
    if bundle.manifest.name != *name {
        let message = format!("the bundle {} now bears the name {}", source.path().display(), bundle.manifest.name);
        let hint = format!("give it back the name {name}, or restart plugvisord");
        return Err(permanent(Error::new(Code::ManifestInvalid, message, hint)));
    }
    if let Some(error) =
        joined(bundle.manifest.unsupported().into_iter().map(|field| {
            Error::new(Code::ManifestUnsupported, format!("{}: {}", field.path, field.message), field.hint)
        }))
    {
        return Err(permanent(error));
    }
    let (asked, operator) =
        (settings::asked(&bundle.manifest), settings::operator(source.tier(), source.grants(), config));
    let verdict = match Policy::default().decide(name, &asked, &operator) {
        Ok(verdict) => verdict,
        Err(errors) => {
            let bug = || Error::new(Code::Bug, "the policy refused without a reason", "report this as a bug");
            return Err(permanent(joined(errors).unwrap_or_else(bug)));
        }
    };
    let read = |error: std::io::Error| {
        let hint = "raise the limit on open files of plugvisord";
        transient(Error::new(Code::InputOutput, format!("the bundle of {name}: {error}"), hint))
    };
    let directory = bundle.directory().as_fd().try_clone_to_owned().map_err(read)?;
    let info = Arc::new(info(&bundle));
    let entry = bundle.entry;
    Ok(Verified {
        info,
        entry_path: entry.path,
        entry_sha256: *entry.sha256.as_bytes(),
        entry: entry.file,
        directory,
        verdict: Arc::new(verdict),
    })
}

/// Several errors as one: the first one's code, everyone's text.
fn joined(errors: impl IntoIterator<Item = Error>) -> Option<Error> {
    errors.into_iter().reduce(|mut all, next| {
        for (all, next) in [(&mut all.message, next.message), (&mut all.hint, next.hint)] {
            all.push_str("; ");
            all.push_str(&next);
        }
        all
    })
}

fn launch_failure(name: &PluginName, error: &LauncherError) -> Failure {
    let message = format!("plugin {name} was not launched: {error}");
    let LauncherError::Refused(refusal) = error else {
        let (code, hint) = match error {
            LauncherError::Gone(_) => (Code::LauncherLost, "restart plugvisord"),
            LauncherError::Late(_) => (Code::OperationTimeout, "look at the load of the host"),
            _ => (Code::Bug, "report this as a bug"),
        };
        return transient(Error::new(code, message, hint));
    };
    let (code, permanence, hint) = match refusal.code {
        RefusalCode::Malformed | RefusalCode::Version | RefusalCode::UnknownLaunch => (
            Code::Bug,
            Permanence::Permanent,
            "plugvisord and plugvisor-launcher are not of one version: install them together",
        ),
        RefusalCode::Policy => (
            Code::LaunchRefused,
            Permanence::Permanent,
            "the launcher's policy is set when plugvisord starts: correct the plugin, or plugvisor.toml",
        ),
        RefusalCode::LevelUnsupported => (
            Code::LevelNotImplemented,
            Permanence::Permanent,
            "set the tier of its directory in plugvisor.toml to \"verified\", if you trust it",
        ),
        RefusalCode::ControlUnavailable => (
            Code::ControlUnavailable,
            Permanence::Permanent,
            "make the host able to enforce it, or name it in [supervisor] allow_degraded; then restart plugvisord",
        ),
        RefusalCode::Entry => (Code::EntryWrongFormat, Permanence::Permanent, "build the program for this host"),
        RefusalCode::DigestMismatch => (
            Code::DigestMismatch,
            Permanence::Permanent,
            "the program changed while it was loaded: find out who changed it, then `plugvisor load`",
        ),
        RefusalCode::Exhausted => {
            (Code::ResourceExhausted, Permanence::Transient, "unload another plugin, or raise the limits of the host")
        }
        RefusalCode::Kernel => {
            (Code::LaunchRefused, Permanence::Transient, "`plugvisor status -o wide` shows what works on this host")
        }
    };
    Failure { error: Error::new(code, message, hint), permanence, stderr_tail: Vec::new() }
}
