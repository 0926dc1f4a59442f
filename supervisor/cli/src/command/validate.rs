//! `plugvisor plugin validate PATH`: everything that is wrong with a bundle or a manifest, at once.
//!
//! What only a host or a registry can tell is shown as `not checked`; what this version cannot honour is shown too.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use plugvisor_package::{Bundle, BundleError, BundleLimits, Capability, IsolationLevel, Manifest, Problem};
use serde_json::{Value, json};

use crate::args::Format;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::text::{Line, Style};

/// What was found; `problems` is empty for what is valid.
#[derive(Debug, Default)]
struct Report {
    /// Name and version, when the manifest could be read.
    subject: String,
    digest: String,
    problems: Vec<Problem>,
    unsupported: Vec<(String, String)>,
    not_checked: Vec<(String, String)>,
    inactive: Vec<String>,
    /// What is right in itself and does nothing beside the rest.
    ineffective: Vec<(&'static str, &'static str)>,
    services: Vec<String>,
}

/// Prints the report; [`Outcome::Failed`] when there is a problem.
pub(crate) fn validate(output: &Output, path: &Path) -> Result<(), Failure> {
    let report = if path.is_dir() { bundle(path)? } else { manifest(path)? };
    match output.format {
        Format::Table | Format::Wide => print(output, path, &report)?,
        Format::Json | Format::Jsonl => output.json(&as_json(&report))?,
        Format::Name => output.line(&Line::new(&report.subject))?,
    }
    if report.problems.is_empty() { Ok(()) } else { Err(Failure::silent(Outcome::Failed)) }
}

fn bundle(path: &Path) -> Result<Report, Failure> {
    match Bundle::open(path, &BundleLimits::default()) {
        Ok(bundle) => {
            let mut report = judged(&bundle.manifest);
            report.digest = bundle.digest.to_string();
            report.services = bundle.services.provided;
            Ok(report)
        }
        Err(BundleError::Manifest { problems, .. }) => {
            Ok(Report { problems: problems.into_iter().collect(), ..Report::default() })
        }
        Err(BundleError::Io { path, source }) => Err(unreadable(&path, &source)),
        Err(error) => {
            let problem = Problem { path: String::new(), message: error.to_string(), suggestion: Some(error.hint()) };
            // The rest of the bundle cannot be judged; the manifest, which is what a person edits, can.
            let mut report = manifest(&path.join("plugin.json")).unwrap_or_default();
            report.problems.push(problem);
            Ok(report)
        }
    }
}

/// A manifest alone: its bundle is not looked at.
fn manifest(path: &Path) -> Result<Report, Failure> {
    let limits = BundleLimits::default().manifest;
    let mut bytes = Vec::new();
    // One byte more than allowed, so that the manifest's reader sees that it is too large.
    let most = limits.bytes as u64 + 1;
    // A pipe or a device would make this wait for ever.
    let regular = |path| match fs::metadata(path)?.is_file() {
        true => File::open(path),
        false => Err(io::Error::other("it is neither a directory nor a regular file")),
    };
    regular(path).and_then(|file| file.take(most).read_to_end(&mut bytes)).map_err(|error| unreadable(path, &error))?;
    Ok(match Manifest::parse(&bytes, &limits) {
        Ok(manifest) => judged(&manifest),
        Err(problems) => Report { problems: problems.into_iter().collect(), ..Report::default() },
    })
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    let outcome = match error.kind() {
        io::ErrorKind::NotFound => Outcome::NotFound,
        io::ErrorKind::PermissionDenied => Outcome::Denied,
        _ => Outcome::Failed,
    };
    Failure::new(
        outcome,
        format!("cannot read {}: {error}", path.display()),
        "give the path of a bundle directory or of its plugin.json",
    )
}

fn judged(manifest: &Manifest) -> Report {
    Report {
        subject: format!("{} {}", manifest.name, manifest.version),
        unsupported: manifest
            .unsupported()
            .into_iter()
            .map(|field| (field.path, format!("{} ({})", field.message, field.hint)))
            .collect(),
        not_checked: manifest
            .not_checked()
            .into_iter()
            .map(|field| (field.path, field.message))
            .chain(in_the_hosts_network(manifest))
            .collect(),
        inactive: manifest.inactive_fields().to_vec(),
        ineffective: ineffective(manifest),
        ..Report::default()
    }
}

/// Only a host can tell its tier and its grants.
fn in_the_hosts_network(manifest: &Manifest) -> Option<(String, String)> {
    let sandbox = &manifest.security.sandbox;
    let (field, level) = match (sandbox.enabled, sandbox.isolation_level) {
        (false, _) => ("enabled", IsolationLevel::None),
        (true, asked) => ("isolationLevel", asked?),
    };
    let mut asked = manifest.security.capabilities.iter();
    let asked = asked.find(|capability| opens(capability) || **capability == Capability::TcpServer)?;
    let why = format!(
        "whether its tier has it at none, in the host's network: there it is not started with {asked}, if it is granted; ask \
         for the level process"
    );
    (level == IsolationLevel::None).then(|| (format!("security.sandbox.{field}"), why))
}

/// Whether a capability opens the egress proxy.
fn opens(capability: &Capability) -> bool {
    matches!(capability, Capability::HttpClient | Capability::WebSocket | Capability::DnsResolve)
}

fn ineffective(manifest: &Manifest) -> Vec<(&'static str, &'static str)> {
    let asks = manifest.security.capabilities.iter().any(opens);
    let listed = !manifest.runtime.egress.is_empty();
    let limited = manifest.security.sandbox.resource_limits.max_network_bandwidth.is_some();
    let mut found = Vec::new();
    if listed && !asks {
        let why = "nothing of it is reached without network:http-client, network:websocket or network:dns-resolve in \
                   security.capabilities";
        found.push(("runtime.network.egress", why));
    }
    if asks && !listed {
        let why = "they reach nothing before runtime.network.egress lists it, such as \"example.org:443\"";
        found.push(("security.capabilities", why));
    }
    let serves = manifest.security.capabilities.contains(&Capability::TcpServer);
    let ports = !manifest.runtime.listen.is_empty();
    if ports && !serves {
        let why = "it listens at none of them without network:tcp-server in security.capabilities";
        found.push(("runtime.network.listen", why));
    }
    if serves && !ports {
        let why =
            "with network:tcp-server it listens at no port before runtime.network.listen lists it, such as [8080]";
        found.push(("security.capabilities", why));
    }
    if limited && !asks && !serves {
        let why = "there is nothing to limit without a network capability";
        found.push(("security.sandbox.resourceLimits.maxNetworkBandwidth", why));
    }
    found
}

fn print(output: &Output, path: &Path, report: &Report) -> Result<(), Failure> {
    let path = path.display();
    if report.problems.is_empty() {
        output.line(
            &Line::default().add(Style::Good, "valid").add(Style::Plain, format!(" {} ({path})", report.subject)),
        )?;
    } else {
        let count = report.problems.len();
        let plural = if count == 1 { "" } else { "s" };
        output.line(
            &Line::default()
                .add(Style::Bad, format!("{count} problem{plural}"))
                .add(Style::Plain, format!(" in {path}")),
        )?;
    }
    for problem in &report.problems {
        output.line(&entry(Style::Bad, "error", &problem.path, &problem.message))?;
        if let Some(suggestion) = &problem.suggestion {
            output.line(&Line::new(format!("               {suggestion}")))?;
        }
    }
    for (field, message) in &report.unsupported {
        output.line(&entry(Style::Warning, "refused here", field, message))?;
    }
    for (field, message) in &report.not_checked {
        output.line(&entry(Style::Warning, "not checked", field, message))?;
    }
    for field in &report.inactive {
        output.line(&entry(Style::Faint, "inactive", field, "accepted, without effect in this version"))?;
    }
    for (field, message) in &report.ineffective {
        output.line(&entry(Style::Warning, "no effect", field, message))?;
    }
    for service in &report.services {
        output.line(&entry(Style::Plain, "service", "", service))?;
    }
    if !report.digest.is_empty() {
        output.line(&entry(Style::Plain, "digest", "", &report.digest))?;
    }
    Ok(())
}

fn entry(style: Style, kind: &str, field: &str, message: &str) -> Line {
    let line = Line::new("  ").add(style, format!("{kind:<13}"));
    if field.is_empty() {
        line.add(Style::Plain, message)
    } else {
        line.add(Style::Title, field).add(Style::Plain, format!(": {message}"))
    }
}

fn as_json(report: &Report) -> Value {
    let pairs = |pairs: &[(String, String)]| -> Vec<Value> {
        pairs.iter().map(|(path, message)| json!({ "path": path, "message": message })).collect()
    };
    json!({
        "valid": report.problems.is_empty(),
        "plugin": report.subject,
        "digest": report.digest,
        "problems": report.problems,
        "unsupported": pairs(&report.unsupported),
        "notChecked": pairs(&report.not_checked),
        "inactive": report.inactive,
        "ineffective": report.ineffective.iter().map(|(path, message)| json!({ "path": path, "message": message })).collect::<Vec<_>>(),
        "services": report.services,
    })
}
