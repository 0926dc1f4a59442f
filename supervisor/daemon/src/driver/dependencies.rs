//! The first phase of a load: every plugin that this one depends on must be loaded.
//!
//! Waits for them by their views, never by looking again and again. In which order plugins are told to load is the
//! fleet's business.

use std::sync::Arc;

use plugvisor_core::{
    Code, Error, Generation,
    event::DependencyEvent,
    lifecycle::{Event, Phase, State},
};
use plugvisor_package::{Dependency, PluginName};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{
    Driver, Inward, PluginView, Shared,
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
            Some(match resolve(&shared, &name, &subject, dependencies).await {
                Ok(()) => Inward::Life(Event::PhaseDone { generation, phase: Phase::Resolve }),
                Err(Unresolved::Failed(error)) => failed(generation, Phase::Resolve, permanent(error)),
                Err(Unresolved::Blocked(error, by)) => Inward::Blocked(generation, error, by),
            })
        });
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
    if let Some(path) = cycle(shared, name) {
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
                let error = Error::new(
                    Code::DependencyNotReady,
                    format!("plugin {name} depends on {wanted}, which is {}", now.state.name()),
                    format!(
                        "`plugvisor describe {wanted}` says why; {name} is loaded by itself as soon as {wanted} is"
                    ),
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

/// A path of dependencies from the plugin back to itself.
fn cycle(shared: &Shared, name: &PluginName) -> Option<Vec<String>> {
    let plugins = shared.plugins.load();
    let mut stack = vec![vec![name.to_string()]];
    let mut seen = std::collections::BTreeSet::new();
    while let Some(path) = stack.pop() {
        let Some(handle) = path.last().and_then(|last| plugins.get(last)) else { continue };
        let view = handle.view.borrow();
        for dependency in view.bundle.iter().flat_map(|bundle| &bundle.manifest.dependencies) {
            let mut longer = path.clone();
            longer.push(dependency.name.to_string());
            if dependency.name == *name {
                return Some(longer);
            }
            if seen.insert(dependency.name.clone()) {
                stack.push(longer);
            }
        }
    }
    None
}
