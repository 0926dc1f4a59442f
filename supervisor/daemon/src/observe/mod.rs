//! What monitoring sees: the metrics page and the health endpoints on the loopback.

pub mod exposition;
mod server;

pub use server::{BindError, Observed, Readiness, ServerLimits, bind, serve};
