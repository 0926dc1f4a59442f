//! What authors, the registry and the supervisor agree on: the manifest, the bundle and its digest.
//!
//! This crate reads and judges files that strangers wrote. It knows neither the supervisor nor the kernel's walls, and
//! no async runtime. Every limit on size, depth and count is a value that the caller passes in.
#![forbid(unsafe_code)]

mod approval;
#[cfg(feature = "bundle")]
mod bundle;
mod capability;
mod content;
#[cfg(feature = "bundle")]
mod descriptor;
mod destination;
mod digest;
mod isolation;
mod json;
mod limits;
mod manifest;
mod name;
mod problem;
#[cfg(feature = "schema")]
mod schema;
mod trust;
mod variable;

pub use approval::{Approval, ApprovalError, approval_text};
#[cfg(feature = "bundle")]
pub use bundle::{Bundle, BundleError, Entry, EntryKind, Refusal, Services};
pub use capability::{Capability, CapabilityError};
pub use content::{BundleFile, content_digest, content_list, read_content_list};
#[cfg(feature = "bundle")]
pub use descriptor::method_names;
pub use destination::{Destination, DestinationError, Host, HostName, HostPattern, host_and_port};
pub use digest::{Digest, DigestError};
pub use isolation::IsolationLevel;
pub use limits::{BundleLimits, ManifestLimits};
pub use manifest::{
    Activation, BundleOptimization, ByteSize, Caching, CircuitBreaker, Class, Compression, Config, CrossPluginService,
    Dependency, Events, Field, GrammarError, Guard, GuardScope, Kind, LifecycleHooks, Manifest, Module, Monitoring,
    NotChecked, Optimization, ResourceLimits, Runtime, RuntimeKind, Sandbox, Security, Signature, SignatureAlgorithm,
    SocketMode, Unsupported,
};
pub use name::{PluginName, PluginNameError};
pub use problem::{Problem, Problems, nearest};
#[cfg(feature = "schema")]
pub use schema::manifest_schema;
pub use trust::TrustTier;
pub use variable::{VariableError, VariableName};
