//! What the service manager is told: that the supervisor serves, that it lives, that it stops. One that was not started
//! by a service manager tells nobody.

use plugvisor_sandbox::service_manager;

/// Tells that everything is bound and answers. Plugins may still be starting: `/readyz` tells of those.
pub(crate) fn serves() {
    tell("READY=1");
}

/// Tells that the end has begun.
pub(crate) fn stops() {
    tell("STOPPING=1");
}

/// Tells at the asked intervals that the supervisor's thread still comes around to everything. Never ends, unless nobody
/// wants to know.
pub(crate) async fn lives() {
    let Some(interval) = service_manager::watchdog() else { return };
    let mut ticks = tokio::time::interval(interval);
    loop {
        ticks.tick().await;
        tell("WATCHDOG=1");
    }
}

fn tell(state: &str) {
    if let Err(error) = service_manager::tell(state) {
        tracing::warn!(%error, state, "the service manager was not told");
    }
}
