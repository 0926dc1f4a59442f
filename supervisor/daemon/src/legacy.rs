//! What an earlier supervisor left: for each plugin the one launch that a driver may take over. All others are ended.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use plugvisor_core::Generation;
use plugvisor_package::PluginName;
use plugvisor_sandbox::protocol::Known;
use tokio_util::task::TaskTracker;

use crate::{
    driver::{Living, Shared},
    events::Subject,
    launcher::{Inventory, Launcher},
};

/// Launches that wait for their drivers.
#[derive(Debug, Default)]
pub(crate) struct Legacy {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    waiting: BTreeMap<String, Living>,
    taken: Vec<(String, Generation)>,
}

impl Legacy {
    /// Has the launcher hand everything over, and ends what a newer launch of the same plugin has replaced.
    pub(crate) async fn take(&self, shared: &Shared, tasks: &TaskTracker, inventory: Inventory) {
        let Inventory { launches, held: _, ends_forgotten, unattended } = inventory;
        if ends_forgotten > 0 {
            tracing::warn!(ends_forgotten, "the launcher forgot how some plugins ended while no supervisor was there");
        }
        let gap = unattended.unwrap_or_default();
        let handed = launches.into_iter().map(|known| async move {
            let reattachment = hand_over(&shared.launcher, &known).await?;
            Some(Living { known, reattachment, gap })
        });
        for living in futures_util::future::join_all(handed).await.into_iter().flatten() {
            let replaced = {
                let mut state = self.lock();
                match state.waiting.remove(&living.known.plugin) {
                    Some(other) if other.known.generation >= living.known.generation => {
                        state.waiting.insert(other.known.plugin.clone(), other);
                        Some(living)
                    }
                    other => {
                        state.waiting.insert(living.known.plugin.clone(), living);
                        other
                    }
                }
            };
            if let Some(replaced) = replaced {
                reap(shared, tasks, replaced, "a newer generation of it runs");
            }
        }
    }

    /// The launch that this plugin's driver takes over, if it is wanted at all.
    pub(crate) fn claim(
        &self,
        shared: &Shared,
        tasks: &TaskTracker,
        name: &PluginName,
        wanted: bool,
    ) -> Option<Living> {
        let living = self.lock().waiting.remove(name.as_str())?;
        if !wanted {
            reap(shared, tasks, living, "nobody wants it to run");
            return None;
        }
        self.lock().taken.push((name.to_string(), Generation(living.known.generation)));
        Some(living)
    }

    /// Ends what nobody claimed. Returns what was claimed.
    pub(crate) fn settle(&self, shared: &Shared, tasks: &TaskTracker) -> Vec<(String, Generation)> {
        let State { waiting, taken } = std::mem::take(&mut *self.lock());
        for living in waiting.into_values() {
            reap(shared, tasks, living, "no valid bundle bears its name any more");
        }
        taken
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn hand_over(launcher: &Launcher, known: &Known) -> Option<crate::launcher::Reattachment> {
    match launcher.reattach(known.launch).await {
        Ok(reattachment) => Some(reattachment),
        Err(error) => {
            let plugin = &known.plugin;
            tracing::error!(plugin, %error, "a launch was not handed over; it is ended");
            // Nothing may run unowned.
            if let Err(error) = launcher.kill(known.launch).await {
                tracing::debug!(plugin, %error, "it was not killed; it may have ended");
            }
            None
        }
    }
}

fn reap(shared: &Shared, tasks: &TaskTracker, living: Living, why: &'static str) {
    let (launcher, events) = (shared.launcher.clone(), std::sync::Arc::clone(&shared.events));
    let plugin = &living.known.plugin;
    // The launcher says only names that an earlier supervisor gave it; a bad one would be a bug, not a danger.
    let subject = match plugin.parse::<PluginName>() {
        Ok(name) => Subject::Generation(name, Generation(living.known.generation)),
        Err(_) => Subject::Plugin(plugin.chars().filter(|c| !c.is_control()).take(64).collect()),
    };
    tasks.spawn(async move { living.reap(&launcher, &events, subject, why.to_owned()).await });
}
