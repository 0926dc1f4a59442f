//! The commands, one module each.

pub(crate) mod approve;
pub(crate) mod breaker;
pub(crate) mod call;
pub(crate) mod config;
pub(crate) mod describe;
pub(crate) mod doctor;
pub(crate) mod events;
pub(crate) mod explain;
pub(crate) mod follow;
pub(crate) mod life;
pub(crate) mod logs;
pub(crate) mod run;
pub(crate) mod status;
pub(crate) mod trace;
pub(crate) mod validate;
