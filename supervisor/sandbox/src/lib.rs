//! The walls: which controls a launch needs, the launcher that puts them up, and the protocol to ask it.
//!
//! This is the only crate with `unsafe`. It knows neither tokio nor gRPC nor the supervisor's configuration.

pub mod protocol;
