//! The host module `plugvisor.host.v1.Events`, served to plugins behind the broker.
//!
//! Whether the caller holds `api:publish-events` the broker's rules have decided before; here it is only asked which
//! types its manifest declares. Who calls is what the connection says, never what the message says.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use plugvisor_core::event::{CustomEvent, Event};
use plugvisor_package::PluginName;
use plugvisor_proto::host::v1::{PublishRequest, PublishResponse, events_server};
use tokio::time::Instant;
use tonic::{Request, Response, Status};

use crate::{
    admin::{error::with_trailers, wire},
    broker::CallerIdentity,
    bucket::{Bucket, Rate},
    driver::Plugins,
    events::{Events, Subject},
};

/// The longest data of one event, encoded.
const MAX_DATA: usize = 64 * 1024;

/// How deeply the data may nest.
const MAX_DEPTH: usize = 16;

/// Bounds of what plugins publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishLimits {
    /// Calls of one plugin, whatever became of them and whichever generation made them. Default: 50 a second, 100 at
    /// once.
    pub per_plugin: Rate,
}

impl Default for PublishLimits {
    fn default() -> Self {
        Self { per_plugin: Rate { per_second: 50, burst: 100 } }
    }
}

/// Publishes what plugins declare.
#[derive(Clone, Debug)]
pub struct HostEvents {
    events: Arc<Events>,
    plugins: Plugins,
    limits: PublishLimits,
    /// Of every plugin that has ever published; there are no more than bundles.
    left: Arc<Mutex<BTreeMap<PluginName, Bucket>>>,
}

impl HostEvents {
    /// Publishes to this hub.
    #[must_use]
    pub fn new(events: Arc<Events>, plugins: Plugins, limits: PublishLimits) -> Self {
        Self { events, plugins, limits, left: Arc::default() }
    }

    fn within_rate(&self, plugin: &PluginName) -> Result<(), Status> {
        let (rate, now) = (self.limits.per_plugin, Instant::now());
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if left.entry(plugin.clone()).or_insert_with(|| Bucket::new(rate, now)).take(1, now) {
            return Ok(());
        }
        let Rate { per_second, burst } = rate;
        let message = format!("plugin {plugin} publishes more than {per_second} events a second ({burst} at once)");
        let hint = "publish less often, or several happenings as one event; try again in a second";
        Err(with_trailers(Status::resource_exhausted(message), &[("plugvisor-hint", hint)]))
    }

    /// As a service for the broker; longer messages than the limit are refused while they are read.
    #[must_use]
    pub fn into_server(self) -> events_server::EventsServer<Self> {
        events_server::EventsServer::new(self).max_decoding_message_size(MAX_DATA + 1024)
    }
}

#[tonic::async_trait]
impl events_server::Events for HostEvents {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let Some(CallerIdentity::Plugin(caller)) = request.extensions().get::<CallerIdentity>().cloned() else {
            return Err(Status::permission_denied("only plugins publish events"));
        };
        self.within_rate(&caller.name)?;
        let PublishRequest { r#type: name, data } = request.into_inner();
        let plugins = self.plugins.load();
        let declared = plugins.get(caller.name.as_str()).is_some_and(|handle| {
            let view = handle.view.borrow();
            view.bundle.as_ref().is_some_and(|bundle| bundle.manifest.events.custom.contains(&name))
        });
        if !declared {
            let shown: String = name.chars().take(128).collect();
            return Err(Status::invalid_argument(format!(
                "{shown:?} is not a type that plugin {} declares in events.custom",
                caller.name
            )));
        }
        let data = wire::from_struct(data.unwrap_or_default(), MAX_DEPTH).ok_or_else(|| {
            Status::invalid_argument(format!(
                "the data nests deeper than {MAX_DEPTH} levels, or has a number not finite"
            ))
        })?;
        let subject = Subject::Generation(caller.name, caller.generation);
        let sequence = self.events.publish(subject, Event::Custom(CustomEvent { name, data }));
        Ok(Response::new(PublishResponse { sequence }))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use plugvisor_core::Generation;
    use plugvisor_proto::host::v1::events_server::Events as _;
    use tonic::Code;

    use super::*;
    use crate::broker::PluginIdentity;

    #[tokio::test(start_paused = true)]
    async fn each_plugin_has_its_own_rate() {
        let limits = PublishLimits { per_plugin: Rate { per_second: 10, burst: 2 } };
        let host = HostEvents::new(Arc::new(Events::new()), Plugins::default(), limits);
        let publish = async |name: &str, generation| {
            let mut request = Request::new(PublishRequest::default());
            let identity = PluginIdentity { name: name.parse().unwrap(), generation: Generation(generation) };
            request.extensions_mut().insert(CallerIdentity::Plugin(identity));
            host.publish(request).await.unwrap_err()
        };
        // Nobody has declared anything here: what is within the rate is refused for that.
        for _ in 0..2 {
            assert_eq!(publish("noisy", 1).await.code(), Code::InvalidArgument);
        }
        // A new generation is the same plugin.
        let refused = publish("noisy", 2).await;
        assert_eq!(refused.code(), Code::ResourceExhausted);
        assert!(refused.message().contains("noisy publishes more than 10 events a second"), "{refused:?}");
        assert!(refused.metadata().get("plugvisor-hint").is_some(), "{refused:?}");
        assert_eq!(publish("quiet", 1).await.code(), Code::InvalidArgument);
        tokio::time::advance(Duration::from_millis(101)).await;
        assert_eq!(publish("noisy", 2).await.code(), Code::InvalidArgument);
    }
}
