//! The one place that turns domain errors into gRPC statuses.

use plugvisor_core::{Code, Error, route::Refusal};
use tonic::{Code as Grpc, Status, metadata::MetadataValue};

/// The status of an error, with its code, category and hint as trailers.
#[must_use]
pub fn status(error: &Error) -> Status {
    let Error { code, message, hint } = error;
    let trailers =
        [("plugvisor-code", code.as_str()), ("plugvisor-category", code.category().as_str()), ("plugvisor-hint", hint)];
    with_trailers(Status::new(grpc_code(*code), message.as_str()), &trailers)
}

/// What the broker would answer to a call, as an answer about the call.
#[must_use]
pub fn refused(refusal: &Refusal) -> Status {
    let Refusal { reason, message, hint, hint_for_caller: _ } = refusal;
    let code = format!("call.{reason}");
    let trailers = [("plugvisor-code", code.as_str()), ("plugvisor-reason", reason.as_str()), ("plugvisor-hint", hint)];
    with_trailers(Status::new(Grpc::from_i32(reason.grpc_status()), message.as_str()), &trailers)
}

pub(crate) fn with_trailers(mut status: Status, trailers: &[(&'static str, &str)]) -> Status {
    let metadata = status.metadata_mut();
    for (name, text) in trailers {
        // Header values are visible ASCII; a hint may name a path that is not.
        let ascii: String = text.chars().map(|c| if c.is_ascii() && !c.is_ascii_control() { c } else { '?' }).collect();
        if let Ok(value) = MetadataValue::try_from(ascii) {
            metadata.insert(*name, value);
        }
    }
    status
}

/// Exhaustive, so that a new code cannot be forgotten.
fn grpc_code(code: Code) -> Grpc {
    match code {
        Code::PluginNotFound => Grpc::NotFound,
        Code::PluginAlreadyLoaded => Grpc::AlreadyExists,
        Code::RequestDenied => Grpc::PermissionDenied,
        Code::RequestInvalid | Code::ConfigurationInvalid => Grpc::InvalidArgument,
        Code::ResourceExhausted | Code::OutOfMemory | Code::MessageTooLarge => Grpc::ResourceExhausted,
        Code::StartupTimeout | Code::Hung | Code::OperationTimeout => Grpc::DeadlineExceeded,
        Code::Stopping
        | Code::LauncherLost
        | Code::ConnectionLost
        | Code::NeverListened
        | Code::StateReadOnly
        | Code::StateLocked => Grpc::Unavailable,
        Code::Bug | Code::InputOutput | Code::ProtocolBroken => Grpc::Internal,
        Code::ManifestInvalid
        | Code::ManifestUnsupported
        | Code::ManifestDuplicate
        | Code::BundleInvalid
        | Code::EntryMissing
        | Code::EntryNotExecutable
        | Code::EntryWrongFormat
        | Code::DescriptorInvalid
        | Code::PluginNotLoaded
        | Code::PluginWrongState
        | Code::PluginQuarantined
        | Code::PluginExited
        | Code::PluginMisconfigured
        | Code::PluginInitFailed
        | Code::PluginServiceMissing
        | Code::PluginLoadAborted
        | Code::DependencyMissing
        | Code::DependencyNotReady
        | Code::DependencyVersion
        | Code::DependencyCycle
        | Code::DependencyRequired
        | Code::TierNeverRuns
        | Code::TierTooHigh
        | Code::DigestMismatch
        | Code::PeerMismatch
        | Code::LevelNotImplemented
        | Code::ControlUnavailable
        | Code::LaunchRefused
        | Code::CgroupUnavailable
        | Code::AddressInUse
        | Code::RuntimeDirectoryBusy => Grpc::FailedPrecondition,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailers_say_what_programs_and_people_need() {
        let status = status(&Error::new(Code::PluginNotFound, "no plugin is called x", "look at ✓ `plugvisor status`"));
        assert_eq!((status.code(), status.message()), (Grpc::NotFound, "no plugin is called x"));
        let trailer = |name: &str| status.metadata().get(name).unwrap().to_str().unwrap().to_owned();
        assert_eq!(trailer("plugvisor-code"), "plugin.not_found");
        assert_eq!(trailer("plugvisor-category"), "state");
        assert_eq!(trailer("plugvisor-hint"), "look at ? `plugvisor status`");
    }

    #[test]
    fn a_wrong_configuration_has_the_code_that_the_command_looks_for() {
        // `plugvisor` ends with the exit code 8 for codes that begin with `config.`.
        let status = status(&Error::new(Code::ConfigurationInvalid, "unknown key", "remove it"));
        assert_eq!(status.metadata().get("plugvisor-code").unwrap(), "config.invalid");
    }
}
