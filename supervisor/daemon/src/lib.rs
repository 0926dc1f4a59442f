//! The supervisor: it drives plugins, routes their calls and answers operators.
//!
//! It never forks a plugin itself and holds no privilege: the launcher does both. Rules live in `plugvisor-core`;
//! this crate carries out what they decide and converts between wire and domain types at its edges.
#![forbid(unsafe_code)]

pub mod admin;
mod aside;
pub mod broker;
pub mod bucket;
pub mod calls;
pub mod config;
mod directory_lock;
pub mod discovery;
pub mod driver;
pub mod egress;
pub mod events;
pub mod examine;
pub mod fleet;
pub mod host_events;
pub mod ingress;
pub mod journal;
pub mod launcher;
mod legacy;
pub mod listeners;
pub mod logs;
pub mod meter;
pub mod metrics;
pub mod observe;
pub mod open_files;
pub mod privileges;
mod readiness;
pub mod run;
pub mod runtime_directory;
mod service;
pub mod start;
pub mod starts;
pub mod state;
pub mod stats;
pub mod supervisor;
mod told;
pub mod traces;
