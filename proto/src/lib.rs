//! The wire contracts, generated from `proto/plugvisor/`: messages, clients and servers.
//!
//! This crate knows no behaviour. Protobuf types stay at the edges: the daemon, the SDK and the command line convert
//! them into domain types as soon as they arrive. The documentation of each message is in its `.proto` file.
#![forbid(unsafe_code)]
#![allow(missing_docs, reason = "generated; the .proto files are the documentation")]
#![allow(clippy::all, rustdoc::all, reason = "generated; comments of .proto files are not Markdown")]

/// Every contract as a serialised `google.protobuf.FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.binpb"));

/// What the supervisor asks of a plugin.
pub mod worker {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("plugvisor.worker.v1");
    }
}

/// Metadata and refusals around a brokered call.
pub mod broker {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("plugvisor.broker.v1");
    }
}

/// Services that the supervisor offers to plugins.
pub mod host {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("plugvisor.host.v1");
    }
}

/// Events on the wire.
pub mod event {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("plugvisor.event.v1");
    }
}

/// What operators' tools ask of the supervisor.
pub mod admin {
    /// Version 1.
    pub mod v1 {
        tonic::include_proto!("plugvisor.admin.v1");
    }
}
