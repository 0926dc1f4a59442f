//! Files of settings in TOML, read key by key: one bad key hides no other, and what is wrong is said in words.
//!
//! The supervisor's configuration and the launcher's policy are read by it. It knows the form of such files and none of
//! their keys: each table says itself what its keys take ([`Table`]).

mod problem;
mod reader;

pub use problem::{Problem, Problems};
pub use reader::{Section, Table, field_names, into_table, join, section, silent_keys};
