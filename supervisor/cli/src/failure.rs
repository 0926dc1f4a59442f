//! How a command ends when it does not succeed: a stable exit code and a message that names the next command.

use std::error::Error;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::process::ExitCode;

use tonic::{Code, Status, TimeoutExpired};

use crate::output::colour_wanted;
use crate::text::{Line, Style};

/// The stable exit codes; clap uses 2 by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The reader of our output went away: not our failure.
    ReaderGone,
    Failed,
    Usage,
    Degraded,
    NotFound,
    Denied,
    Timeout,
    DaemonDown,
    InvalidConfiguration,
}

impl Outcome {
    /// The number for the shell.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::ReaderGone => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Degraded => 3,
            Self::NotFound => 4,
            Self::Denied => 5,
            Self::Timeout => 6,
            Self::DaemonDown => 7,
            Self::InvalidConfiguration => 8,
        }
    }
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        Self::from(outcome.code())
    }
}

/// A command that did not do what was asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) outcome: Outcome,
    /// What happened, to what, why. Empty when the output already said everything.
    pub(crate) message: String,
    /// What to do next. May be empty.
    pub(crate) hint: String,
}

impl Failure {
    pub(crate) fn new(outcome: Outcome, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { outcome, message: message.into(), hint: hint.into() }
    }

    /// For commands whose output is the explanation.
    pub(crate) const fn silent(outcome: Outcome) -> Self {
        Self { outcome, message: String::new(), hint: String::new() }
    }

    /// The answer did not come in time.
    pub(crate) fn timeout(what: &str) -> Self {
        Self::new(
            Outcome::Timeout,
            format!("{what}: no answer in time"),
            "wait longer with --timeout, or see `plugvisor status`",
        )
    }

    /// Somebody holds the socket, and a question that needs no waiting has no answer.
    pub(crate) fn mute(what: &str, socket: &Path) -> Self {
        Self::new(
            Outcome::Timeout,
            format!("{what}: {} takes connections, but nobody answered in time", socket.display()),
            "the supervisor hangs, or it ended and its launcher holds the socket for the next one ([launcher] linger): \
             start it again with the same configuration, or wait longer with --timeout",
        )
    }

    /// A refusal by the supervisor on its admin socket.
    pub(crate) fn from_admin(what: &str, socket: &Path, status: &Status) -> Self {
        if let Some(error) = io_cause(status) {
            return Self::unreachable(socket, error);
        }
        if is_late(status) {
            return Self::timeout(what);
        }
        let code = trailer(status, "plugvisor-code");
        let outcome = match status.code() {
            _ if code.as_deref().is_some_and(|code| code.starts_with("config.")) => Outcome::InvalidConfiguration,
            Code::NotFound => Outcome::NotFound,
            // With a code it is a service that no plugin has; without, a supervisor that lacks the question.
            Code::Unimplemented if code.is_some() => Outcome::NotFound,
            Code::PermissionDenied | Code::Unauthenticated => Outcome::Denied,
            Code::DeadlineExceeded => Outcome::Timeout,
            Code::Unavailable if code.is_none() => Outcome::DaemonDown,
            _ => Outcome::Failed,
        };
        let message = match code {
            Some(code) => format!("{what}: {} [{code}]", status.message()),
            None => format!("{what}: {}", said(status)),
        };
        Self::new(outcome, message, trailer(status, "plugvisor-hint").unwrap_or_default())
    }

    /// A call to a plugin that did not succeed, refused by the broker or by the plugin itself.
    pub(crate) fn from_call(method: &str, socket: &Path, status: &Status) -> Self {
        if let Some(error) = io_cause(status) {
            return Self::unreachable(socket, error);
        }
        if is_late(status) {
            return Self::timeout(method);
        }
        let outcome = match status.code() {
            Code::NotFound | Code::Unimplemented => Outcome::NotFound,
            Code::PermissionDenied | Code::Unauthenticated => Outcome::Denied,
            Code::DeadlineExceeded => Outcome::Timeout,
            _ => Outcome::Failed,
        };
        let reason = trailer(status, "plugvisor-reason");
        let who = match &reason {
            Some(reason) => format!("refused by the broker, {reason}"),
            None => "from the plugin".to_owned(),
        };
        let message = format!("{method}: {} ({who})", said(status));
        Self::new(outcome, message, trailer(status, "plugvisor-hint").unwrap_or_default())
    }

    /// Nobody answers at the socket.
    pub(crate) fn unreachable(socket: &Path, error: &io::Error) -> Self {
        let at = socket.display();
        match error.kind() {
            io::ErrorKind::NotFound => Self::new(
                Outcome::DaemonDown,
                format!("the supervisor is not running: there is no socket at {at}"),
                "start it with `plugvisor run`, or name its socket with --socket PATH",
            ),
            io::ErrorKind::ConnectionRefused => Self::new(
                Outcome::DaemonDown,
                format!("the supervisor is not running: nobody listens at {at}"),
                "it ended without cleaning up; start it again with `plugvisor run`",
            ),
            io::ErrorKind::PermissionDenied => Self::new(
                Outcome::Denied,
                format!("you may not connect to {at}"),
                "run the command as the user that started the supervisor, or as root",
            ),
            _ => Self::new(
                Outcome::DaemonDown,
                format!("cannot talk to the supervisor at {at}: {error}"),
                "is it running?",
            ),
        }
    }

    /// Prints the message and the hint to standard error.
    pub(crate) fn print(&self, no_color: bool) {
        let colour = colour_wanted(no_color, io::stderr().is_terminal());
        for (number, line) in self.message.lines().enumerate() {
            let first = if number == 0 { Line::default().add(Style::Bad, "error: ") } else { Line::new("  ") };
            eprintln!("{}", first.add(Style::Plain, line).render(colour));
        }
        for line in self.hint.lines() {
            eprintln!("{}", Line::default().add(Style::Title, "next: ").add(Style::Plain, line).render(colour));
        }
    }
}

/// The code and the message of a status.
fn said(status: &Status) -> String {
    // Code's Debug is its name; its Display is a sentence.
    match status.message() {
        "" => format!("{:?}", status.code()),
        message => format!("{:?}: {message}", status.code()),
    }
}

fn trailer(status: &Status, name: &str) -> Option<String> {
    status.metadata().get(name)?.to_str().ok().map(str::to_owned).filter(|value| !value.is_empty())
}

/// Whether the time limit ended it, here or there: both sides hold it, and either may be first.
fn is_late(status: &Status) -> bool {
    // tonic on this side says so as a cause; a tonic server sends the code CANCELLED with this text and nothing else.
    causes(status).any(<dyn Error>::is::<TimeoutExpired>)
        || (status.code() == Code::Cancelled && status.message() == "Timeout expired")
}

/// The error of the socket beneath a status that tonic made itself.
fn io_cause(status: &Status) -> Option<&io::Error> {
    causes(status).find_map(|error| error.downcast_ref())
}

fn causes(status: &Status) -> impl Iterator<Item = &(dyn Error + 'static)> {
    std::iter::successors(status.source(), |error| (*error).source())
}

#[cfg(test)]
mod tests {
    use tonic::metadata::MetadataMap;

    use super::*;

    fn refused(code: Code, message: &str, trailers: &[(&'static str, &'static str)]) -> Status {
        let mut metadata = MetadataMap::new();
        for (name, value) in trailers {
            metadata.insert(*name, value.parse().unwrap());
        }
        Status::with_metadata(code, message, metadata)
    }

    #[test]
    fn admin_refusals_keep_their_code_and_hint() {
        let status = refused(
            Code::NotFound,
            "no plugin is called thumbnailr",
            &[("plugvisor-code", "plugin.not_found"), ("plugvisor-hint", "did you mean thumbnailer?")],
        );
        let failure = Failure::from_admin("describe", Path::new("/s"), &status);
        assert_eq!(failure.outcome.code(), 4);
        assert_eq!(failure.message, "describe: no plugin is called thumbnailr [plugin.not_found]");
        assert_eq!(failure.hint, "did you mean thumbnailer?");

        let status =
            refused(Code::Unimplemented, "no plugin provides a.B", &[("plugvisor-code", "call.unknown_service")]);
        assert_eq!(Failure::from_admin("find a.B", Path::new("/s"), &status).outcome.code(), 4);
    }

    #[test]
    fn a_wrong_configuration_has_its_own_exit_code() {
        let code = [("plugvisor-code", "config.invalid")];
        let status = refused(Code::InvalidArgument, "unknown key: memroy", &code);
        assert_eq!(Failure::from_admin("reload", Path::new("/s"), &status).outcome.code(), 8);
        let other = refused(Code::InvalidArgument, "no name", &[("plugvisor-code", "request.invalid")]);
        assert_eq!(Failure::from_admin("load", Path::new("/s"), &other).outcome.code(), 1);
    }

    #[test]
    fn a_limit_that_the_other_side_held_first_is_a_timeout_too() {
        let late = refused(Code::Cancelled, "Timeout expired", &[]);
        assert_eq!(Failure::from_admin("load x", Path::new("/s"), &late), Failure::timeout("load x"));
        assert_eq!(Failure::from_call("a.B/C", Path::new("/s"), &late), Failure::timeout("a.B/C"));
        let ended = refused(Code::Cancelled, "the plugin ended", &[]);
        assert_eq!(Failure::from_call("a.B/C", Path::new("/s"), &ended).outcome, Outcome::Failed);
    }

    #[test]
    fn the_broker_and_the_plugin_are_told_apart() {
        let broker = refused(Code::Unavailable, "breaker open", &[("plugvisor-reason", "breaker_open")]);
        let failure = Failure::from_call("a.B/C", Path::new("/s"), &broker);
        assert_eq!(failure.message, "a.B/C: Unavailable: breaker open (refused by the broker, breaker_open)");
        assert_eq!(failure.outcome, Outcome::Failed, "the supervisor answered, so it is not down");

        let plugin = refused(Code::PermissionDenied, "", &[]);
        let failure = Failure::from_call("a.B/C", Path::new("/s"), &plugin);
        assert_eq!(failure.message, "a.B/C: PermissionDenied (from the plugin)");
        assert_eq!(failure.outcome.code(), 5);
    }
}
