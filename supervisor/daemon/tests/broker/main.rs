//! The broker over real Unix sockets, with tonic and bare HTTP/2 at both ends.

#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod backpressure;
mod faults;
#[path = "../grpc/mod.rs"]
mod grpc;
mod lifecycle;
mod passing;
mod refusals;
mod support;
