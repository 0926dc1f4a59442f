//! The host module `plugvisor.host.v1.Events`, served to plugins behind the broker.
//!
//! Whether the caller holds `api:publish-events` the broker's rules have decided before; here it is only asked which
//! types its manifest declares. Who calls is what the connection says, never what the message says.

use std::sync::Arc;

use plugvisor_core::event::{CustomEvent, Event};
use plugvisor_proto::host::v1::{PublishRequest, PublishResponse, events_server};
use tonic::{Request, Response, Status};

use crate::{
    admin::wire,
    broker::CallerIdentity,
    driver::Plugins,
    events::{Events, Subject},
};

/// The longest data of one event, encoded.
const MAX_DATA: usize = 64 * 1024;

/// How deeply the data may nest.
const MAX_DEPTH: usize = 16;

/// Publishes what plugins declare.
#[derive(Clone, Debug)]
pub struct HostEvents {
    events: Arc<Events>,
    plugins: Plugins,
}

impl HostEvents {
    /// Publishes to this hub.
    #[must_use]
    pub fn new(events: Arc<Events>, plugins: Plugins) -> Self {
        Self { events, plugins }
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
