//! What a plugin may ask of its host: other plugins, and the publishing of events.

use std::sync::Arc;

use plugvisor_client::Client;
use plugvisor_proto::host::v1::{PublishRequest, events_client::EventsClient};
use serde::Serialize;

use crate::config::{StructError, to_struct};

/// The plugin's side of its host. Clones share it.
#[derive(Debug, Clone)]
pub struct Host(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    plugin: String,
    generation: u64,
    capabilities: Vec<String>,
    client: Client,
}

impl Host {
    pub(crate) fn new(plugin: String, generation: u64, capabilities: Vec<String>, client: Client) -> Self {
        Self(Arc::new(Inner { plugin, generation, capabilities, client }))
    }

    /// The plugin's own name, as in its manifest.
    pub fn plugin(&self) -> &str {
        &self.0.plugin
    }

    /// Which start of the plugin this process is: 1, 2, 3 and so on.
    pub fn generation(&self) -> u64 {
        self.0.generation
    }

    /// What was granted, such as `api:internal-calls`. Never more than what the manifest asked for.
    pub fn capabilities(&self) -> &[String] {
        &self.0.capabilities
    }

    /// Whether a capability was granted.
    pub fn is_granted(&self, capability: &str) -> bool {
        self.0.capabilities.iter().any(|granted| granted == capability)
    }

    /// The way to other plugins: hand it to a generated client, such as `MarkdownServiceClient::new(host.client())`.
    ///
    /// A call made while serving a call carries on its deadline and its trace ([`CallContext`](crate::CallContext));
    /// dropping the call cancels it. It connects when first used. The broker decides who may be called.
    pub fn client(&self) -> Client {
        self.0.client.clone()
    }

    /// Publishes an event of a type that the manifest declares in `events.custom`; needs `api:publish-events`.
    /// `data` is serialised as a JSON object of at most 64 KiB. Returns the host's sequence number of the event.
    pub async fn publish(&self, event_type: &str, data: impl Serialize) -> Result<u64, PublishError> {
        let data = serde_json::to_value(data).map_err(StructError::from)?;
        let request = PublishRequest { r#type: event_type.to_owned(), data: Some(to_struct(data)?) };
        let answer = EventsClient::new(self.client()).publish(request).await.map_err(Box::new)?;
        Ok(answer.into_inner().sequence)
    }
}

/// Why an event was not published.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PublishError {
    /// The data cannot be an event's data.
    #[error("the data of an event must be a JSON object: {0}")]
    Data(#[from] StructError),
    /// The host refused, or could not be reached.
    #[error("the host did not take the event: {0}")]
    Host(#[from] Box<tonic::Status>),
}
