//! All plugins together: who is found, who is told to load, and in which order they stop.
//!
//! Owns the drivers' tasks. A single plugin's life is its driver's business.

use std::{
    collections::{BTreeMap, VecDeque},
    path::Path,
    sync::{Arc, PoisonError},
    time::{Duration, SystemTime},
};

use plugvisor_core::{
    Code, Error, Generation,
    event::{PluginEvent, SupervisorEvent},
    lifecycle::{Failed, Haste, State},
};
use plugvisor_package::{Bundle, PluginName, nearest};
use tokio::{
    sync::{Mutex, mpsc, oneshot, watch},
    time::timeout,
};
use tokio_util::task::TaskTracker;

use crate::{
    config::Config,
    discovery::{Found, PluginDirectory, Rejection, Source},
    driver::{Command, Driver, Figures, PluginHandle, PluginView, Shared, check_restart, graph},
    events::Subject,
    launcher::Inventory,
    legacy::Legacy,
    state::{Desired, PluginRecord},
};

/// Every plugin of the host.
#[derive(Debug)]
pub struct Fleet {
    shared: Arc<Shared>,
    config: Arc<Config>,
    directories: Vec<Arc<PluginDirectory>>,
    drivers: TaskTracker,
    /// Held while a plugin is added, so that two requests do not add the same one. Never across a load.
    adding: Mutex<()>,
    /// What earlier supervisors remembered, until it is asked for.
    remembered: std::sync::Mutex<BTreeMap<PluginName, PluginRecord>>,
    /// What an earlier supervisor left running.
    legacy: Legacy,
}

/// What is asked for by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Load it.
    Load,
    /// Stop it and keep it stopped.
    Unload,
    /// Stop it and load it anew.
    Restart,
}

/// What an unload does to plugins that depend on the one that is unloaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cascade {
    /// It is refused while one of them runs.
    Refuse,
    /// They are unloaded first.
    Dependents,
}

/// How long telling every plugin to load may take before the first starts.
const TELLING: Duration = Duration::from_secs(1);

impl Fleet {
    /// No plugin yet.
    #[must_use]
    pub fn new(
        shared: Arc<Shared>,
        config: Arc<Config>,
        directories: Vec<PluginDirectory>,
        remembered: BTreeMap<PluginName, PluginRecord>,
    ) -> Self {
        let directories = directories.into_iter().map(Arc::new).collect();
        let remembered = std::sync::Mutex::new(remembered);
        Self {
            shared,
            config,
            directories,
            drivers: TaskTracker::new(),
            adding: Mutex::new(()),
            remembered,
            legacy: Legacy::default(),
        }
    }

    /// The plugin directories, held open since the start.
    pub fn directories(&self) -> &[Arc<PluginDirectory>] {
        &self.directories
    }

    /// Finds every bundle, takes over what the launcher kept of an earlier supervisor's, and tells those to load that
    /// load by themselves. Returns the plugins that are being taken over, and their generations, when all are told.
    pub async fn discover(&self, inventory: Inventory) -> Vec<(String, Generation)> {
        let mut sources = Vec::new();
        for directory in &self.directories {
            match directory.look() {
                Ok(Found { candidates, strays }) => {
                    sources.extend(candidates);
                    for stray in strays {
                        let path = directory.path().join(stray);
                        tracing::warn!(path = %path.display(), "no bundle: it has no plugin.json");
                    }
                }
                Err(error) => tracing::error!(%error, "a plugin directory cannot be read"),
            }
        }
        // Reading and hashing block, and bundles do not wait for one another.
        let read = sources.into_iter().map(|source| {
            let reading = tokio::task::spawn_blocking({
                let source = source.clone();
                move || source.open()
            });
            async move { (source, reading.await) }
        });
        let (bundles, ()) = tokio::join!(
            futures_util::future::join_all(read),
            self.legacy.take(&self.shared, &self.drivers, inventory)
        );
        for (source, bundle) in bundles {
            match bundle {
                Ok(bundle) => drop(self.add(source, bundle)),
                Err(panic) => tracing::error!(bundle = ?source, %panic, "reading a bundle failed"),
            }
        }
        let taken = self.legacy.settle(&self.shared, &self.drivers);
        let plugins = self.plugins();
        for name in self.config.plugins.keys().filter(|name| !plugins.contains_key(name.as_str())) {
            let meant = nearest(name.as_str(), plugins.keys().map(String::as_str));
            let meant = meant.map_or_else(String::new, |meant| format!("; did you mean {meant}?"));
            tracing::warn!(
                "[plugin.{name}] of {} has no effect: no plugin of that name is in a plugin directory{meant}",
                self.config.place()
            );
        }
        let order = graph(&plugins);
        // Everyone is told before anyone starts, so that loadOrder decides and not who was told first.
        let held_back = self.shared.starts.hold_back();
        let mut told = Vec::new();
        for name in order.order() {
            // What runs already is not started.
            if taken.iter().any(|(taken, _)| taken == name.as_str()) {
                continue;
            }
            let wanted = plugins.get(name.as_str()).filter(|handle| handle.view.borrow().wanted);
            if let Some(commands) = wanted.and_then(|handle| handle.commands.as_ref()) {
                let (reply, answer) = oneshot::channel();
                let _ = commands.send(Command::Load(reply)).await;
                told.push(answer);
            }
        }
        // Who takes a process over answers later and starts nothing.
        let _ = timeout(TELLING, futures_util::future::join_all(told)).await;
        drop(held_back);
        taken
    }

    /// Waits until each of these has been taken over, or was not. Returns how many were.
    pub async fn until_reattached(&self, taken: &[(String, Generation)]) -> usize {
        let mut reattached = 0;
        for (name, generation) in taken {
            let Some(mut view) = self.plugins().get(name).map(|handle| handle.view.clone()) else { continue };
            // A later generation was started because this one was not to be had.
            let over =
                |view: &Arc<PluginView>| view.has_begun() && (view.is_settled() || view.generation > *generation);
            let settled = view.wait_for(over).await;
            reattached += usize::from(settled.is_ok_and(|view| view.is_loaded() && view.generation == *generation));
        }
        reattached
    }

    /// Ends the drivers and leaves the plugins running, for the next supervisor.
    pub async fn leave(&self) {
        for handle in self.plugins().values() {
            tell(handle, Command::Leave).await;
        }
        self.drivers.close();
        self.drivers.wait().await;
    }

    /// Every plugin by its name.
    #[must_use]
    pub fn plugins(&self) -> Arc<BTreeMap<String, PluginHandle>> {
        self.shared.plugins.load_full()
    }

    /// Waits until every plugin that loads by itself is loaded or has failed, and says so once.
    pub async fn until_ready(&self) {
        let (mut loaded, mut failed) = (0, 0);
        for handle in self.plugins().values() {
            let mut view = handle.view.clone();
            if !view.borrow().wanted {
                continue;
            }
            match view.wait_for(|view| view.has_begun() && view.is_settled() || is_rejected(view)).await {
                Ok(view) if view.is_loaded() => loaded += 1,
                Ok(_) | Err(_) => failed += 1,
            }
        }
        self.shared.events.publish(Subject::Supervisor, SupervisorEvent::Ready { plugins: loaded, failed });
    }

    /// Carries out a wish and waits until it is settled: loaded, failed or stopped.
    pub async fn wish(&self, wish: Wish, name_or_path: &str) -> Result<Arc<PluginView>, Error> {
        let handle = match wish {
            Wish::Load => self.find_or_add(name_or_path).await?,
            Wish::Unload | Wish::Restart => self.find(name_or_path)?,
        };
        let Some(commands) = &handle.commands else {
            // Rejected: the reason is the answer.
            let view = handle.view.borrow();
            return Err(view.last_error.clone().unwrap_or_else(|| self.not_found(name_or_path)));
        };
        let name = handle.view.borrow().name.parse::<PluginName>();
        let runs = handle.view.borrow().process.is_some();
        if wish == Wish::Restart && runs {
            check_restart(&self.shared.launcher, name_or_path).await?;
        }
        if let Ok(name) = name {
            // First remembered, then done: who comes after a crash finds what was asked for.
            let desired = match wish {
                Wish::Load | Wish::Restart => Desired::Loaded,
                Wish::Unload => Desired::Unloaded,
            };
            self.shared.state.desire(name, desired).await?;
        }
        let (reply, answer) = oneshot::channel();
        let command = match wish {
            Wish::Load => Command::Load(reply),
            Wish::Unload => Command::Unload(reply),
            Wish::Restart => Command::Restart(reply),
        };
        let stopping = || Error::new(Code::Stopping, "the supervisor is stopping", "start it again");
        commands.send(command).await.map_err(|_| stopping())?;
        let target = answer.await.map_err(|_| stopping())??;
        let mut view = handle.view.clone();
        let settled = view.wait_for(|view| view.is_settled() && (view.generation >= target || !view.is_loaded())).await;
        settled.map(|view| Arc::clone(&view)).map_err(|_| stopping())
    }

    /// Unloads a plugin. While plugins that run depend on it, that is refused; with `cascade` they are unloaded first,
    /// those at the far end before the others.
    /// Returns what became of it, and the names of those others in the order in which they were unloaded.
    pub async fn unload(&self, name: &str, cascade: Cascade) -> Result<(Arc<PluginView>, Vec<String>), Error> {
        let mut unloaded = Vec::new();
        let handle = self.find(name)?;
        let plugins = self.plugins();
        let graph = graph(&plugins);
        let runs = |name: &str| {
            plugins
                .get(name)
                .is_some_and(|handle| matches!(handle.view.borrow().state, State::Loading(_) | State::Loaded(_)))
        };
        let failed = matches!(handle.view.borrow().state, State::Failed(_));
        if let (Ok(parsed), true) = (name.parse::<PluginName>(), failed || runs(name)) {
            let dependents: Vec<&PluginName> =
                graph.dependents(&parsed).into_iter().filter(|dependent| runs(dependent.as_str())).collect();
            match cascade {
                Cascade::Refuse if !dependents.is_empty() => {
                    let names: Vec<&str> = dependents.iter().map(|name| name.as_str()).collect();
                    return Err(Error::new(
                        Code::DependencyRequired,
                        format!("plugin {name} is needed by plugins that run: {}", names.join(", ")),
                        format!("unload them first, or all of them with `plugvisor unload {name} --cascade`"),
                    ));
                }
                Cascade::Refuse => {}
                Cascade::Dependents => {
                    for dependent in dependents {
                        match self.wish(Wish::Unload, dependent.as_str()).await {
                            Ok(_) => unloaded.push(dependent.to_string()),
                            // It ended meanwhile: what was wanted.
                            Err(error) if error.code == Code::PluginNotLoaded => {}
                            Err(error) => return Err(error),
                        }
                    }
                }
            }
        }
        Ok((self.wish(Wish::Unload, name).await?, unloaded))
    }

    /// The plugin of this name.
    pub fn find(&self, name: &str) -> Result<PluginHandle, Error> {
        let plugins = self.plugins();
        plugins.get(name).cloned().ok_or_else(|| {
            let mut error = self.not_found(name);
            if let Some(meant) = nearest(name, plugins.keys().map(String::as_str)) {
                error.hint = format!("did you mean {meant}?");
            }
            error
        })
    }

    /// Stops every plugin: first those that nobody running depends on. Returns when nothing of any runs.
    pub async fn stop(&self, mut haste: watch::Receiver<Haste>) {
        let mut left: BTreeMap<String, PluginHandle> =
            self.plugins().iter().map(|(name, handle)| (name.clone(), handle.clone())).collect();
        while !left.is_empty() {
            let now = *haste.borrow_and_update();
            let needed = |name: &String| left.values().any(|other| other.view.borrow().depends_on(name));
            let mut wave: Vec<String> =
                left.keys().filter(|name| now == Haste::Now || !needed(name)).cloned().collect();
            if wave.is_empty() {
                // A circle, which never loaded, or one of which a member is gone: order no longer matters.
                wave = left.keys().cloned().collect();
            }
            let wave: Vec<PluginHandle> = wave.iter().filter_map(|name| left.remove(name)).collect();
            for handle in &wave {
                tell(handle, Command::Stop(now)).await;
            }
            let ended = async {
                for handle in &wave {
                    // The driver drops its end when nothing of the plugin runs.
                    let mut view = handle.view.clone();
                    if handle.commands.is_some() {
                        while view.changed().await.is_ok() {}
                    }
                }
            };
            tokio::pin!(ended);
            tokio::select! {
                () = &mut ended => {}
                () = hurried(&mut haste, now) => {
                    for handle in wave.iter().chain(left.values()) {
                        tell(handle, Command::Stop(Haste::Now)).await;
                    }
                    left.clear();
                    ended.await;
                }
            }
        }
        self.drivers.close();
        self.drivers.wait().await;
    }

    async fn find_or_add(&self, name_or_path: &str) -> Result<PluginHandle, Error> {
        let path = Path::new(name_or_path);
        let known = if path.is_absolute() {
            self.plugins().values().find(|handle| handle.source.path() == path).cloned()
        } else {
            self.plugins().get(name_or_path).cloned()
        };
        let source = match known {
            Some(handle) if handle.commands.is_some() => return Ok(handle),
            // It was rejected: perhaps it has been mended.
            Some(handle) => handle.source,
            None if path.is_absolute() => self.source_at(path)?,
            None => self.source_named(name_or_path)?,
        };
        let _adding = self.adding.lock().await;
        let opened = tokio::task::spawn_blocking({
            let source = source.clone();
            move || source.open()
        });
        let bundle = opened.await.map_err(|panic| Error::new(Code::Bug, panic.to_string(), "report this as a bug"))?;
        self.add(source, bundle).map_err(|rejection| rejection.error)
    }

    fn not_found(&self, name: &str) -> Error {
        let hint = format!(
            "`plugvisor status` lists the plugins; put its bundle into a [[directory]] of {}, or add that directory there",
            self.config.place()
        );
        Error::new(Code::PluginNotFound, format!("no plugin is called {name}"), hint)
    }

    fn source_at(&self, path: &Path) -> Result<Source, Error> {
        let (parent, name) = (path.parent(), path.file_name().and_then(|name| name.to_str()));
        let directory = self.directories.iter().find(|directory| Some(directory.path()) == parent);
        match (directory, name) {
            (Some(directory), Some(name)) => Ok(directory.source(name.to_owned())),
            _ => Err(Error::new(
                Code::PluginNotFound,
                format!("{} is not a bundle in a configured plugin directory", path.display()),
                format!("add its parent as a [[directory]] to {} and restart plugvisord", self.config.place()),
            )),
        }
    }

    /// A bundle that was put there after the start.
    fn source_named(&self, name: &str) -> Result<Source, Error> {
        let candidates =
            self.directories.iter().filter_map(|directory| directory.look().ok()).flat_map(|found| found.candidates);
        let found = candidates.into_iter().find(|source| source.name() == name);
        found.ok_or_else(|| self.find(name).err().unwrap_or_else(|| self.not_found(name)))
    }

    fn add(&self, source: Source, bundle: Result<Bundle, Rejection>) -> Result<PluginHandle, Rejection> {
        let bundle = bundle.and_then(|bundle| {
            let name = &bundle.manifest.name;
            match self.plugins().get(name.as_str()) {
                Some(other) if other.source.path() != source.path() => {
                    Err(Rejection::duplicate(name, &source.path(), &other.source.path()))
                }
                Some(_) | None => Ok(bundle),
            }
        });
        match bundle {
            Ok(bundle) => {
                let config = self.config.plugin(&bundle.manifest.name);
                let name = bundle.manifest.name.clone();
                // A name that was rejected under its directory's name before.
                self.forget_rejected(&source);
                let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner).remove(&name);
                let (driver, inbox, handle) = Driver::new(Arc::clone(&self.shared), source, bundle, config, remembered);
                let wanted = handle.view.borrow().wanted;
                let living = self.legacy.claim(&self.shared, &self.drivers, &name, wanted);
                self.insert(name.as_str(), &handle);
                self.drivers.spawn(driver.taking_over(living).run(inbox));
                Ok(handle)
            }
            Err(rejection) => {
                self.forget_rejected(&source);
                let name = self.free_name(&source);
                let event = PluginEvent::Rejected {
                    stage: "discover".to_owned(),
                    error: rejection.error.clone(),
                    problems: rejection.problems.clone(),
                };
                self.shared.events.publish(Subject::Plugin(name.clone()), event);
                let handle = rejected(name.clone(), source, &rejection);
                self.insert(&name, &handle);
                Err(rejection)
            }
        }
    }

    /// What a rejected bundle is shown as: its directory's name, or that with its path when the name is taken.
    fn free_name(&self, source: &Source) -> String {
        let taken = self.plugins().contains_key(source.name());
        if taken { source.path().display().to_string() } else { source.name().to_owned() }
    }

    fn forget_rejected(&self, source: &Source) {
        let path = source.path();
        self.shared.plugins.rcu(|plugins| {
            let mut plugins = BTreeMap::clone(plugins);
            plugins.retain(|_, handle| handle.commands.is_some() || handle.source.path() != path);
            plugins
        });
    }

    fn insert(&self, name: &str, handle: &PluginHandle) {
        self.shared.plugins.rcu(|plugins| {
            let mut plugins = BTreeMap::clone(plugins);
            plugins.insert(name.to_owned(), handle.clone());
            plugins
        });
    }
}

async fn tell(handle: &PluginHandle, command: Command) {
    if let Some(commands) = &handle.commands {
        // A driver that has ended needs no telling.
        let _: Result<(), mpsc::error::SendError<Command>> = commands.send(command).await;
    }
}

async fn hurried(haste: &mut watch::Receiver<Haste>, now: Haste) {
    if now == Haste::Now || haste.wait_for(|haste| *haste == Haste::Now).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn is_rejected(view: &PluginView) -> bool {
    view.generation == Generation::NONE && matches!(view.state, State::Failed(_))
}

fn rejected(name: String, source: Source, rejection: &Rejection) -> PluginHandle {
    let Rejection { error, problems } = rejection;
    let view = PluginView {
        name,
        state: State::Failed(Failed { error: error.clone(), restart: None }),
        since: SystemTime::now(),
        generation: Generation::NONE,
        restarts: 0,
        directory: source.path(),
        bundle: None,
        tier: source.tier(),
        verdict: None,
        process: None,
        last_error: Some(error.clone()),
        problems: problems.clone(),
        restart_at: None,
        transitions: VecDeque::new(),
        last_exit: None,
        sdk: String::new(),
        wanted: true,
        figures: Figures::default(),
    };
    let (_, view) = watch::channel(Arc::new(view));
    PluginHandle { commands: None, view, source }
}
