//! What authors, the registry and the supervisor agree on: the manifest, the bundle and its digest.
//!
//! This crate reads and judges files that strangers wrote. It knows neither the supervisor nor the kernel's walls, and
//! no async runtime. Every limit on size, depth and count is a value that the caller passes in.
#![forbid(unsafe_code)]

mod capability;
mod digest;
mod isolation;
mod name;
mod trust;

pub use capability::{Capability, CapabilityError};
pub use digest::{Digest, DigestError};
pub use isolation::IsolationLevel;
pub use name::{PluginName, PluginNameError};
pub use trust::TrustTier;
