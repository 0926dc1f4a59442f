//! Peers that attack the broker, as callers and as providers, below and above HTTP/2.
//!
//! Each test has a broker in a process of its own, so that its memory can be bounded, and a pair of plugins in it that
//! call each other all the while: every one of their calls must succeed. What is asserted are facts of the protocol and
//! what an operator sees, nothing of how the broker is made.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod bombs;
mod breaches;
mod floods;
#[path = "../grpc/mod.rs"]
mod grpc;
mod messages;
mod providers;
mod silence;
mod wire;
mod world;
