//! The supervisor: it drives plugins, routes their calls and answers operators.
//!
//! It never forks a plugin itself and holds no privilege: the launcher does both. Rules live in `plugvisor-core`;
//! this crate carries out what they decide and converts between wire and domain types at its edges.
#![forbid(unsafe_code)]

pub mod broker;
pub mod config;
pub mod journal;
pub mod launcher;
pub mod logs;
pub mod observe;
pub mod privileges;
mod readiness;
pub mod runtime_directory;
