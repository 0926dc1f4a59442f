//! The first phase of a load: every plugin that this one depends on must be loaded.
//!
//! Waits for them by their views, never by looking again and again. In which order plugins are told to load is the
//! fleet's business.

use std::{collections::BTreeMap, sync::Arc};

use plugvisor_core::{
    Code, Error, Generation,
    event::DependencyEvent,
    graph::{Graph, Node},
    lifecycle::{Event, Phase, State},
};
use plugvisor_package::{Dependency, PluginName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Driver, Inward, PluginHandle, PluginView, Shared,
    load::{failed, permanent},
};
use crate::events::Subject;

impl Driver {
    pub(super) fn begin_resolve(&mut self, generation: Generation) {
        let (shared, name) = (Arc::clone(&self.shared), self.name.clone());
        let subject = Subject::Generation(self.name.clone(), generation);
        let bundle = self.view.borrow().bundle.clone();
        self.spawn(generation, async move {
            let dependencies = bundle.as_ref().map_or(&[][..], |bundle| &bundle.manifest.dependencies);
            let load_order = bundle.as_ref().and_then(|bundle| bundle.manifest.load_order).unwrap_or(0);
            Some(match resolve(&shared, &name, &subject, dependencies).await {
                Ok(()) => Inward::Resolved(generation, shared.starts.place(load_order).await),
                Err(Unresolved::Failed(error)) => failed(generation, Phase::Resolve, permanent(error)),
                Err(Unresolved::Blocked(error, by)) => Inward::Blocked(generation, error, by),
            })
        });
    }

    /// From now on it is told of each dependency that is lost, and of its return.
    pub(super) fn watch_dependencies(&mut self, generation: Generation) {
        let Some(bundle) = self.view.borrow().bundle.clone() else { return };
        let plugins = self.shared.plugins.load_full();
        for dependency in &bundle.manifest.dependencies {
            let Some(handle) = plugins.get(dependency.name.as_str()) else { continue };
            let (shared, view, on) = (Arc::clone(&self.shared), handle.view.clone(), dependency.name.clone());
            let subject = Subject::Generation(self.name.clone(), generation);
            self.spawn(generation, async move {
                watch(shared, subject, on, view).await;
                None
            });
        }
    }

    /// A dependency will not come by itself: the load fails, and is begun anew once somebody has loaded it.
    pub(super) async fn blocked(
        &mut self,
        generation: Generation,
        error: Error,
        mut by: watch::Receiver<Arc<PluginView>>,
    ) {
        let phase = Phase::Resolve;
        let _ = self.apply(Event::PhaseFailed { generation, phase, failure: permanent(error) }).await;
        let waiting = CancellationToken::new();
        self.restart = Some(waiting.clone());
        self.spawn_until(waiting, generation, async move {
            let loaded = by.wait_for(|view| view.is_loaded()).await.is_ok();
            loaded.then_some(Inward::Unblocked(generation))
        });
    }

    /// What a failed load waited for has been loaded.
    pub(super) async fn unblocked(&mut self, generation: Generation) {
        if self.life.generation() == generation && matches!(self.life.state(), State::Failed(_)) {
            self.start_reason = "restart";
            let _ = self.apply(Event::LoadRequested).await;
        }
    }
}

/// Tells of each dependency that is lost, and when it is back. The plugin itself runs on: its calls to the lost one are
/// refused, and what it does then it knows best.
async fn watch(shared: Arc<Shared>, subject: Subject, on: PluginName, mut view: watch::Receiver<Arc<PluginView>>) {
    // After a takeover it may have been found again before the one that it depends on, which is not lost for that.
    if view.wait_for(|view| view.has_begun() && view.is_settled()).await.is_err() {
        return;
    }
    loop {
        if view.wait_for(|view| !view.is_loaded()).await.is_err() {
            return;
        }
        shared.events.publish(subject.clone(), DependencyEvent::Lost { on: on.to_string() });
        if view.wait_for(|view| view.is_loaded()).await.is_err() {
            return;
        }
        shared.events.publish(subject.clone(), DependencyEvent::Satisfied {});
    }
}

/// Why a plugin cannot be loaded now.
enum Unresolved {
    /// Until somebody changes something.
    Failed(Error),
    /// Until this plugin is loaded, which nothing under way will do.
    Blocked(Error, watch::Receiver<Arc<PluginView>>),
}

async fn resolve(
    shared: &Shared,
    name: &PluginName,
    subject: &Subject,
    dependencies: &[Dependency],
) -> Result<(), Unresolved> {
    let path = if dependencies.is_empty() { None } else { graph(&shared.plugins.load()).circle(name) };
    if let Some(path) = path {
        let path: Vec<String> = path.iter().map(PluginName::to_string).collect();
        shared.events.publish(subject.clone(), DependencyEvent::CycleRejected { path: path.clone() });
        return Err(Unresolved::Failed(Error::new(
            Code::DependencyCycle,
            format!("plugin {name} depends on itself: {}", path.join(" → ")),
            "remove one of these dependencies from its plugin.json",
        )));
    }
    let mut waited = false;
    for dependency in dependencies {
        let wanted = &dependency.name;
        let plugins = shared.plugins.load();
        let Some(handle) = plugins.get(wanted.as_str()) else {
            return Err(Unresolved::Failed(Error::new(
                Code::DependencyMissing,
                format!("plugin {name} depends on {wanted}, which is not in the plugin directories"),
                format!("install {wanted}, then `plugvisor load {wanted}` and `plugvisor load {name}`"),
            )));
        };
        let mut view = handle.view.clone();
        drop(plugins);
        loop {
            let now = Arc::clone(&view.borrow_and_update());
            if let Some(version) = now.bundle.as_ref().map(|bundle| &bundle.manifest.version)
                && !dependency.range.matches(version)
            {
                return Err(Unresolved::Failed(Error::new(
                    Code::DependencyVersion,
                    format!("plugin {name} needs {wanted}@{}, but {version} is installed", dependency.range),
                    format!("install a version of {wanted} in that range"),
                )));
            }
            if now.is_loaded() {
                break;
            }
            if !will_come(&now) {
                let first = match now.state {
                    State::Unloaded => format!("`plugvisor load {wanted}`"),
                    State::Unknown
                    | State::Discovered
                    | State::Loading(_)
                    | State::Loaded(_)
                    | State::Failed(_)
                    | State::Quarantined => format!("`plugvisor describe {wanted}` says why"),
                };
                let error = Error::new(
                    Code::DependencyNotReady,
                    format!("plugin {name} depends on {wanted}, which is {}", now.state.name()),
                    format!("{first}; {name} is loaded by itself as soon as {wanted} is"),
                );
                return Err(Unresolved::Blocked(error, view));
            }
            if !waited {
                waited = true;
                let on = vec![wanted.to_string()];
                shared.events.publish(subject.clone(), DependencyEvent::Waiting { on });
            }
            if view.changed().await.is_err() {
                break;
            }
        }
    }
    if waited {
        shared.events.publish(subject.clone(), DependencyEvent::Satisfied {});
    }
    Ok(())
}

/// Whether waiting for it may be worth while.
fn will_come(view: &PluginView) -> bool {
    match &view.state {
        State::Unknown | State::Discovered => view.wanted,
        State::Loading(_) | State::Loaded(_) => true,
        State::Failed(failed) => failed.restart.is_some(),
        State::Unloaded | State::Quarantined => false,
    }
}

/// Who depends on whom. Rejected bundles are not in it: they are never loaded.
pub(crate) fn graph(plugins: &BTreeMap<String, PluginHandle>) -> Graph {
    Graph::new(plugins.values().filter(|handle| handle.commands.is_some()).filter_map(|handle| {
        let bundle = handle.view.borrow().bundle.clone()?;
        let dependencies = bundle.manifest.dependencies.iter().map(|dependency| dependency.name.clone()).collect();
        let node = Node { dependencies, load_order: bundle.manifest.load_order.unwrap_or(0) };
        Some((bundle.manifest.name.clone(), node))
    }))
}
