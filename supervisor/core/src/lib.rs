//! The pure rules of the supervisor: lifecycle, breaker, restart, policy, route and events.
//!
//! This crate knows no clock, no randomness, no thread, no socket and no file: time, jitter and identifiers are
//! arguments, and results are values that the daemon carries out.
#![forbid(unsafe_code)]
