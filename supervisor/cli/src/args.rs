//! The command line: commands, flags, their help. It knows no behaviour; man pages and completions can be made from it.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::{ContextKind, ContextValue, Error, ErrorKind};
use clap::{Arg, Args, Parser, Subcommand, ValueEnum};

/// Operate Plugvisor: see, load, call and check plugins.
///
/// Exit codes: 0 ok, 1 failed, 2 usage, 3 degraded, 4 not found, 5 denied, 6 timeout, 7 daemon down, 8 invalid
/// configuration. `run` ends as plugvisord does: 78 invalid configuration, 74 the host refused something, 70 a bug.
#[derive(Debug, Parser)]
#[command(name = "plugvisor", version, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags that every command takes.
#[derive(Args, Debug)]
pub(crate) struct Global {
    /// The supervisor's admin socket [default: admin.sock in the runtime directory].
    #[arg(long, value_name = "PATH", env = "PLUGVISOR_ADMIN", hide_env_values = true, global = true)]
    pub(crate) socket: Option<PathBuf>,
    /// How to print what was found.
    #[arg(short, long, value_enum, default_value_t = Format::Table, global = true)]
    pub(crate) output: Format,
    /// The longest time to wait for an answer, such as 500ms, 10s or 2m.
    #[arg(long, value_name = "TIME", value_parser = parse_duration, global = true)]
    pub(crate) timeout: Option<Duration>,
    /// No colours; NO_COLOR and a pipe mean the same.
    #[arg(long, global = true)]
    pub(crate) no_color: bool,
}

/// How to print what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Columns for people.
    Table,
    /// More columns for people.
    Wide,
    /// One JSON document.
    Json,
    /// One JSON object per line.
    Jsonl,
    /// Names only, one per line.
    Name,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the supervisor here, in this terminal.
    #[command(disable_help_flag = true)]
    Run {
        /// Handed to plugvisord, for example --config FILE --launcher-policy FILE; `plugvisor run --help` lists them.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
        arguments: Vec<std::ffi::OsString>,
    },
    /// Show the supervisor and every plugin.
    ///
    /// SINCE is how long a plugin has been in its state. RESTARTS counts its starts again after failures, all of its life: it
    /// is kept in the state directory over restarts of the supervisor and of the host, and `plugvisor restart` and `load` are
    /// not among them. CALLS and FAILED count from the start of the supervisor that runs.
    #[command(visible_alias = "ps")]
    Status,
    /// Show everything about one plugin: walls, grants, services, history.
    Describe {
        /// The plugin's name.
        name: String,
    },
    /// Show events, oldest first.
    Events {
        /// Stay and show new events as they come.
        #[arg(short, long)]
        follow: bool,
        /// Only this plugin's.
        #[arg(long, value_name = "NAME")]
        plugin: Option<String>,
        /// Only types that start so, such as breaker. or plugin.exited.
        #[arg(long = "type", value_name = "PREFIX")]
        type_prefix: Option<String>,
        /// Only events after this sequence number.
        #[arg(long, value_name = "SEQUENCE")]
        after: Option<u64>,
    },
    /// Show what plugins printed.
    Logs {
        /// Stay and show new lines as they come.
        #[arg(short, long)]
        follow: bool,
        /// Begin with this many kept lines; 0 is all of them.
        #[arg(short = 'n', long, default_value_t = 0, value_name = "LINES")]
        tail: u32,
        #[command(flatten)]
        filter: LogFilter,
        /// The plugin's name; without it, every plugin's lines.
        name: Option<String>,
    },
    /// Load a plugin, by its name or its bundle's directory.
    Load {
        /// The plugin's name, or the path of a bundle directory.
        plugin: String,
    },
    /// Stop a plugin and keep it stopped.
    Unload {
        /// The plugin's name.
        name: String,
        /// Unload the plugins that depend on it first.
        #[arg(long)]
        cascade: bool,
    },
    /// Stop a plugin and start it again.
    Restart {
        /// The plugin's name.
        name: String,
    },
    /// Call a plugin's method with JSON.
    Call(CallArgs),
    /// Say what would happen, and why, without doing it.
    Explain {
        #[command(subcommand)]
        command: ExplainCommand,
    },
    /// Show circuit breakers, or close them.
    Breaker {
        #[command(subcommand)]
        command: BreakerCommand,
    },
    /// Say what this host can enforce, what it lacks, and the fix; exit code 3 when something is lacking.
    Doctor {
        /// Look at a host without asking a supervisor that runs.
        #[arg(long)]
        offline: bool,
        /// Look at what a start with this configuration would find, whatever runs.
        #[arg(long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Look at what a start with this policy file of the launcher would find, whatever runs.
        #[arg(long, value_name = "FILE")]
        launcher_policy: Option<PathBuf>,
    },
    /// Check or show the supervisor's configuration.
    Config {
        #[command(subcommand)]
        command: ConfigCommand,
    },
    /// Sign that a bundle has a tier, for launchers whose policy file has the key. Needs no supervisor.
    Approve {
        /// The bundle directory; the approval is written beside it.
        #[arg(required_unless_present = "new_key", requires_all = ["tier", "key"])]
        bundle: Option<PathBuf>,
        /// The tier that it has.
        #[arg(long, value_parser = TierParser)]
        tier: Option<ApprovedTier>,
        /// Sign this content only, by the digest that `plugvisor plugin validate` showed when it was reviewed.
        #[arg(long, value_name = "sha256:HEX")]
        digest: Option<plugvisor_package::Digest>,
        /// The file of the private key.
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Make a key in this file instead, and print the entry for the launcher's policy file.
        #[arg(long, value_name = "FILE", conflicts_with_all = ["bundle", "tier", "digest", "key"])]
        new_key: Option<PathBuf>,
    },
    /// Print the completions of a shell, to be put where it looks for them.
    Completion {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Work on plugins as their author.
    Plugin {
        #[command(subcommand)]
        command: PluginCommand,
    },
}

/// What to call.
#[derive(Args, Debug)]
pub(crate) struct CallArgs {
    /// The method, as package.Service/Method.
    #[arg(value_name = "SERVICE/METHOD")]
    pub(crate) method: String,
    /// The request as JSON; @FILE reads a file, - reads standard input. A method that takes a stream takes an array.
    #[arg(long, value_name = "JSON", default_value = "{}")]
    pub(crate) json: String,
    /// Selects the provider where several offer the service.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
    /// The socket of calls [default: as the supervisor says].
    #[arg(long, value_name = "PATH", env = "PLUGVISOR_CALLS", hide_env_values = true)]
    pub(crate) calls_socket: Option<PathBuf>,
}

/// Which lines.
#[derive(Args, Debug)]
pub(crate) struct LogFilter {
    /// Only lines since then: a time such as 2026-11-23T08:00:00Z, or how long ago, such as 10m.
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub(crate) since: Option<prost_types::Timestamp>,
    /// Only lines before then, written like --since.
    #[arg(long, value_name = "TIME", value_parser = parse_moment)]
    pub(crate) until: Option<prost_types::Timestamp>,
    /// Only what was printed on this stream.
    #[arg(long, value_enum, value_name = "STREAM")]
    pub(crate) stream: Option<Stream>,
    /// Only lines that this regular expression matches somewhere.
    #[arg(long, value_name = "PATTERN")]
    pub(crate) grep: Option<String>,
    /// Only lines of this generation, that is of one load of the plugin.
    #[arg(long, value_name = "NUMBER")]
    pub(crate) generation: Option<u64>,
}

/// Where a plugin printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ExplainCommand {
    /// Follow a call through route, grants, provider, limit and breaker; exit code 1 when it would be refused.
    Call(ExplainCallArgs),
}

/// Which call.
#[derive(Args, Debug)]
pub(crate) struct ExplainCallArgs {
    /// Who would call: a plugin's name, or local for an application of yours.
    pub(crate) from: String,
    /// The method, as package.Service/Method.
    #[arg(value_name = "SERVICE/METHOD")]
    pub(crate) method: String,
    /// The token that would select the provider.
    #[arg(long, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum BreakerCommand {
    /// Show every breaker with its counts.
    List,
    /// Close a breaker, or every one; an event says who did it.
    Reset {
        /// The plugin's name; without it, every plugin's breaker.
        plugin: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Check a file without a supervisor; every problem is listed, exit code 8.
    Validate {
        /// The file [default: the one that plugvisord would read].
        file: Option<PathBuf>,
    },
    /// Show every setting that holds: of the running supervisor, or of one that would be started now.
    Show {
        /// Show where each setting was set.
        #[arg(long)]
        origin: bool,
        /// Show what this file would bring about, whatever runs.
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
}

/// What can be signed: everything that is more than nothing.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum ApprovedTier {
    Community,
    Verified,
    Internal,
}

/// Reads a tier. clap's own reader of such words adds the one that is nearest to a wrong one, which here would be a guess
/// at how far somebody is trusted; this one lists all of them.
#[derive(Clone, Copy)]
struct TierParser;

impl TypedValueParser for TierParser {
    type Value = ApprovedTier;

    fn parse_ref(&self, command: &clap::Command, argument: Option<&Arg>, value: &OsStr) -> Result<ApprovedTier, Error> {
        let text = value.to_string_lossy();
        if let Ok(tier) = ApprovedTier::from_str(&text, false) {
            return Ok(tier);
        }
        let known = ApprovedTier::value_variants().iter().filter_map(ApprovedTier::to_possible_value);
        let known = known.map(|value| value.get_name().to_owned()).collect();
        let mut error = Error::new(ErrorKind::InvalidValue).with_cmd(command);
        let argument = argument.map_or_else(|| "--tier".to_owned(), ToString::to_string);
        error.insert(ContextKind::InvalidArg, ContextValue::String(argument));
        error.insert(ContextKind::InvalidValue, ContextValue::String(text.into_owned()));
        error.insert(ContextKind::ValidValue, ContextValue::Strings(known));
        Err(error)
    }

    /// For the help and for completions.
    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(ApprovedTier::value_variants().iter().filter_map(ApprovedTier::to_possible_value)))
    }
}

impl From<ApprovedTier> for plugvisor_package::TrustTier {
    fn from(tier: ApprovedTier) -> Self {
        match tier {
            ApprovedTier::Community => Self::Community,
            ApprovedTier::Verified => Self::Verified,
            ApprovedTier::Internal => Self::Internal,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum PluginCommand {
    /// Check a bundle directory or a plugin.json; every problem is listed.
    Validate {
        /// The bundle directory, or its plugin.json.
        path: PathBuf,
    },
    /// Run a bundle with weaker walls, see what it asks the kernel, and propose the least that its manifest must ask for.
    Trace(TraceArgs),
}

/// What to trace, and until when: Ctrl-C, the end of the plugin's program, or what comes first of these.
#[derive(Args, Debug)]
pub(crate) struct TraceArgs {
    /// The bundle directory.
    pub(crate) bundle: PathBuf,
    /// End after this time, such as 30s or 5m.
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration)]
    pub(crate) time: Option<Duration>,
    /// Write the system calls that were seen into this file, in the form of Plugvisor's own policy files.
    #[arg(long, value_name = "FILE")]
    pub(crate) policy: Option<PathBuf>,
    /// Run this when the plugin serves, and end when it does. PLUGVISOR_WORKER is the path of the plugin's socket, for any
    /// gRPC client.
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) driver: Vec<std::ffi::OsString>,
}

/// Reads "500ms", "10s", "2m", "1h".
fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "write a number and a unit, such as 500ms, 10s or 2m".to_owned())?;
    let milliseconds = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1_000),
        "m" => number.checked_mul(60_000),
        "h" => number.checked_mul(3_600_000),
        "" => return Err(format!("the unit is missing; write for example {number}s")),
        _ => return Err(format!("unit {unit:?} is none of ms, s, m, h; write for example {number}s")),
    };
    milliseconds.filter(|ms| *ms > 0).map(Duration::from_millis).ok_or_else(|| "must be more than 0".to_owned())
}

/// Reads "2026-11-23T08:00:00Z", or "10m" for ten minutes ago.
fn parse_moment(text: &str) -> Result<prost_types::Timestamp, String> {
    if let Ok(ago) = parse_duration(text) {
        let then = SystemTime::now().checked_sub(ago).ok_or_else(|| "is before all time".to_owned())?;
        return Ok(then.into());
    }
    text.parse()
        .map_err(|_| "write a time such as 2026-11-23T08:00:00Z, or how long ago, such as 30s, 10m or 2h".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ps_is_the_status() {
        let said = |word: &str| Cli::try_parse_from(["plugvisor", word]).map(|cli| cli.command);
        assert!(matches!(said("ps"), Ok(Command::Status)));
        for near in ["pss", "stauts"] {
            let told = said(near).map(drop).unwrap_err().to_string();
            assert!(told.contains("tip: a similar subcommand exists: 'ps'") || told.contains("'status'"), "{told}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert!(parse_duration("10").unwrap_err().contains("10s"));
        assert!(parse_duration("s").is_err());
        assert!(parse_duration("0s").is_err());
        assert!(parse_duration("99999999999999999h").is_err());
    }

    #[test]
    fn a_tier_is_never_guessed() {
        let approve = |tier: &str| {
            let arguments = ["plugvisor", "approve", "bundle", "--key", "k", "--tier", tier];
            Cli::try_parse_from(arguments).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(approve("verified"), Ok(()));
        for wrong in ["trusted", "untrusted", "verifed", "interna"] {
            let said = approve(wrong).unwrap_err();
            assert!(said.contains("[possible values: community, verified, internal]"), "{said}");
            assert!(!said.contains("similar"), "{said}");
        }
    }

    #[test]
    fn moments_are_times_or_ages() {
        assert_eq!(parse_moment("1970-01-01T00:01:00Z").unwrap().seconds, 60);
        let now = prost_types::Timestamp::from(SystemTime::now()).seconds;
        assert!((3600..3660).contains(&(now - parse_moment("1h").unwrap().seconds)));
        assert!(parse_moment("yesterday").unwrap_err().contains("10m"));
    }
}
