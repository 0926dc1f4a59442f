//! `grpc.health.v1.Health`, answered honestly, with NOT_SERVING, or never.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tonic::{Request, Response, Status};
use tonic_health::{
    ServingStatus,
    pb::{HealthCheckRequest, HealthCheckResponse, health_server::Health},
};

/// How the plugin says that it is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Condition {
    hangs: Arc<AtomicBool>,
    not_serving: bool,
}

impl Condition {
    pub(crate) fn new(hangs: bool, not_serving: bool) -> Self {
        Self { hangs: Arc::new(AtomicBool::new(hangs)), not_serving }
    }

    /// From now on no health check is answered.
    pub(crate) fn hang(&self) {
        self.hangs.store(true, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl Health for Condition {
    async fn check(&self, _: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if self.hangs.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let status = if self.not_serving { ServingStatus::NotServing } else { ServingStatus::Serving };
        Ok(Response::new(HealthCheckResponse { status: status as i32 }))
    }

    type WatchStream = tokio_stream::Pending<Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("this plugin answers Check only"))
    }
}
