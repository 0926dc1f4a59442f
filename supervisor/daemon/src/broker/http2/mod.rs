//! HTTP/2 as the broker speaks it (RFC 9113): frames in, events out; orders in, frames out.
//!
//! Nothing here reads a socket, a clock or a setting: bytes, time and limits are passed in, so that tests and fuzzers drive all of
//! it. It owns what makes one connection right: framing, header compression, streams, flow control, and the budget that
//! keeps a peer from making work for nothing. It does not know what a call is; each stream carries a number of its
//! owner's choice.

pub mod budget;
pub mod code;
pub mod connection;
pub mod fields;
pub mod frame;
pub mod hpack;
mod outbox;
mod react;
mod receive;
pub mod rehearsal;
mod send;
pub mod settings;
pub mod stream;

pub use self::{
    code::{Code, ConnectionError},
    connection::{Connection, Limits, Role},
    fields::{Field, Fields},
    outbox::Outbox,
    receive::Event,
    send::{Moved, comes_again, encode},
    stream::StreamId,
};
