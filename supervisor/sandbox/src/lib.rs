//! The walls: which controls a launch needs, the launcher that puts them up, and the protocol to ask it.
//!
//! This is the only crate with `unsafe`. It knows neither tokio nor gRPC nor the supervisor's configuration.
//!
//! What the supervisor needs: [`options`] to start the launcher, [`seqpacket`] to carry packets, [`codec`] to turn them
//! into the messages of [`protocol`], [`inward`] for sockets that an earlier one had. What both need: [`service_manager`],
//! to tell systemd how they are, and [`tables`], to read their files. [`worker_socket`] is for whoever connects to a plugin
//! that binds its own.
#![deny(unsafe_code)]

pub mod codec;
pub mod inward;
pub mod notify;
pub mod options;
pub mod protocol;
pub mod rules;
pub mod seqpacket;
pub mod service_manager;
pub mod tables;
pub mod trace;
pub mod worker_socket;
