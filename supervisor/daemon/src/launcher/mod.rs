//! The supervisor's side of the launcher: starting it, and asking it.
//!
//! [`spawn`] runs while the process has one thread and, perhaps, root; [`Launcher::start`] takes the connection into
//! the runtime. Which plugin is launched how is the drivers' business; what a request may do, the launcher's own.

mod client;
mod import;
mod keep;
mod link;
mod spawn;

pub use client::{Gone, Launcher, LauncherEnd, LauncherError, Process, describe_exit, signal_name};
pub use import::BundleFiles;
pub use keep::{Found, Inventory, Output, Reattachment};
pub(crate) use link::CONFIGURATION;
pub use link::{Link, LinkError, Own, Tie};
pub use spawn::{PROGRAM, SpawnError, Spawned, beside_this_program, spawn};
