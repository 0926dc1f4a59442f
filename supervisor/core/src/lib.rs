//! The pure rules of the supervisor: lifecycle, breaker, restart, probes, policy, route, egress, errors and events.
//!
//! This crate knows no clock, no randomness, no thread, no socket and no file: time, jitter and identifiers are
//! arguments, and results are values that the daemon carries out. Every module can therefore be driven by hand, and
//! its tests run against simple models under a clock that they move themselves.
#![forbid(unsafe_code)]

pub mod breaker;
pub mod egress;
pub mod error;
pub mod event;
mod generation;
pub mod graph;
pub mod lifecycle;
pub mod policy;
pub mod probe;
pub mod restart;
pub mod route;
mod time;

pub use error::{Category, Code, Error, Fault, Severity};
pub use generation::Generation;
pub use policy::{CapabilitySet, Rights};
pub use time::{Jitter, Time};
