//! What monitoring sees: the metrics page and the health endpoints on the loopback.

mod exporter;
pub mod exposition;
mod server;

pub use exporter::Counters;
pub use server::{BindError, Observed, Readiness, ServerLimits, bind, serve};
