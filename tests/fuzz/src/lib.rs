//! Fuzz targets: each reads bytes as a stranger would send them, and asserts what must hold for any bytes.
//!
//! A target is a plain function over bytes that panics when a property does not hold; [`Target::check`] adds bounds on
//! memory and on processor time. Any driver can call it: ours ([`Session`]) changes the corpus' inputs by a seeded
//! generator and keeps those that led to something new, on the stable toolchain and the same way each time.
#![forbid(unsafe_code)]

mod corpus;
mod mutate;
mod session;
mod target;

pub use corpus::corpus;
pub use session::{Finding, Report, Session};
pub use target::{Shape, Target};
