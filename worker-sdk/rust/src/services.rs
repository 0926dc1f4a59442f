//! The gRPC services of a plugin, by name.
//!
//! A map in place of tonic's router: the names are needed for Init and for health, and a lookup by service name is all
//! the routing that gRPC has.

use std::{collections::BTreeMap, convert::Infallible, fmt};

use http::{Request, Response};
use tonic::{body::Body, server::NamedService};
use tower::{Service, util::BoxCloneSyncService};

pub(crate) type BoxedService = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// The services that a plugin serves.
#[derive(Default)]
pub struct Services {
    by_name: BTreeMap<&'static str, BoxedService>,
}

impl Services {
    /// Adds a generated tonic server. A second one of the same name replaces the first.
    pub fn add<S>(&mut self, service: S) -> &mut Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
        S: Clone + Send + Sync + 'static,
        S::Future: Send + 'static,
    {
        self.by_name.insert(S::NAME, BoxCloneSyncService::new(service));
        self
    }

    /// Adds all services of another set, for example those of another plugin in a test.
    pub fn append(&mut self, other: Self) {
        self.by_name.extend(other.by_name);
    }

    /// The fully qualified names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.by_name.keys().copied()
    }

    /// The service of a path such as `/acme.v1.Thumbnailer/Resize`.
    pub(crate) fn find(&self, path: &str) -> Option<&BoxedService> {
        let (service, _method) = path.strip_prefix('/')?.split_once('/')?;
        self.by_name.get(service)
    }
}

impl fmt::Debug for Services {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_set().entries(self.by_name.keys()).finish()
    }
}
