//! What a trace came to, for people and for programs. Pure but for the printing.

use std::path::Path;

use plugvisor_package::Capability;
use plugvisor_sandbox::{
    protocol::Level,
    trace::{Denied, Outside, Proposal, Seen},
};
use serde_json::{Value, json};

use crate::{
    args::Format,
    failure::Failure,
    output::Output,
    text::{Line, Style},
};

/// What was traced.
pub(super) struct Subject<'a> {
    pub(super) name: &'a str,
    /// The manifest's.
    pub(super) level: Level,
    /// The manifest's.
    pub(super) capabilities: &'a [Capability],
    /// Why the trace ended.
    pub(super) ended: &'a str,
    pub(super) policy: Option<&'a Path>,
}

/// Prints it in the form that was asked for.
pub(super) fn print(output: &Output, subject: &Subject<'_>, seen: &Seen, proposal: &Proposal) -> Result<(), Failure> {
    match output.format {
        Format::Table | Format::Wide => output.lines(&lines(subject, seen, proposal, output.format == Format::Wide)),
        Format::Json | Format::Jsonl => output.json(&as_json(subject, seen, proposal)),
        Format::Name => {
            let names = proposal.capabilities.iter().map(|capability| Line::new(capability.as_str()));
            output.lines(&names.collect::<Vec<_>>())
        }
    }
}

/// How many files and addresses are shown unless all are asked for.
const SOME: usize = 20;

fn lines(subject: &Subject<'_>, seen: &Seen, proposal: &Proposal, wide: bool) -> Vec<Line> {
    let total: u64 = seen.calls.values().map(|times| times.count).sum();
    let mut lines = vec![
        Line::default()
            .add(Style::Title, subject.name)
            .add(Style::Plain, format!(": {total} system calls; the trace ended because {}", subject.ended)),
    ];
    let title = |text: String| [Line::default(), Line::default().add(Style::Title, text)];
    let asked = if subject.capabilities.is_empty() {
        "no capability".to_owned()
    } else {
        names(subject.capabilities).join(", ")
    };
    lines.extend(title(format!("Refused at {} with {asked}", subject.level.as_str())));
    if proposal.denied.is_empty() {
        lines.push(Line::new("  no system call"));
    }
    lines.extend(proposal.denied.iter().flat_map(|call| denied(call, subject.level)));
    if !proposal.above.is_empty() && subject.level != Level::Sandbox {
        lines.extend(title("Why not sandbox: it would refuse".to_owned()));
        lines.extend(proposal.above.iter().flat_map(|call| denied(call, Level::Sandbox)));
    }
    if !proposal.outside.is_empty() {
        lines.extend(title("Outside its tree and network".to_owned()));
        let shown = if wide { usize::MAX } else { SOME };
        lines.extend(proposal.outside.iter().take(shown).map(outside));
        if proposal.outside.len() > shown {
            lines.push(Line::new(format!("  and {} more: -o wide shows all", proposal.outside.len() - shown)));
        }
    }
    if proposal.nowhere > 0 {
        let text =
            format!("  it also looked {} for files that this host does not have either", times(proposal.nowhere));
        lines.push(Line::default().add(Style::Faint, text));
    }
    if !proposal.unused.is_empty() {
        lines.extend(title("Asked for and not used".to_owned()));
        lines.extend(names(&proposal.unused).into_iter().map(|name| Line::new(format!("  {name}"))));
    }
    if !proposal.optional.is_empty() {
        lines.extend(title("Survived without, and so optional".to_owned()));
        lines.extend(names(&proposal.optional).into_iter().map(|name| Line::new(format!("  {name}"))));
    }
    lines.extend(title("plugin.json, for what was seen".to_owned()));
    lines.extend(format!("{:#}", snippet(proposal)).lines().map(Line::new));
    lines.push(Line::default());
    lines.extend(notes(subject, seen, proposal).into_iter().map(Line::new));
    lines
}

fn denied(call: &Denied, level: Level) -> [Line; 2] {
    let arguments: Vec<String> = call.arguments.iter().map(|(at, value)| format!("argument {at} {value:#x}")).collect();
    let arguments = if arguments.is_empty() { String::new() } else { format!(" ({})", arguments.join(", ")) };
    let (style, remedy) = match (call.level, call.capabilities.as_slice()) {
        (None, _) => (Style::Bad, "no capability allows it, and no level but none, which has no filter".to_owned()),
        (Some(at), []) if at == level => (Style::Warning, "allowed beside another capability".to_owned()),
        (Some(at), []) => (Style::Warning, format!("the level {} allows it, no capability does", at.as_str())),
        (Some(at), more) if at == level => (Style::Good, format!("{} allows it", names(more).join(" with "))),
        (Some(at), more) => {
            (Style::Warning, format!("the level {} with {} allows it", at.as_str(), names(more).join(" and ")))
        }
    };
    [
        Line::new("  ")
            .add(Style::Title, &call.name)
            .add(Style::Plain, format!("{arguments}, {}, {}: ", times(call.count), errno(call.errno)))
            .add(style, remedy),
        Line::default().add(Style::Faint, format!("      {}", call.reason)),
    ]
}

fn outside(outside: &Outside) -> Line {
    let line = Line::new("  ").add(Style::Plain, format!("{:<8} ", outside.access)).add(Style::Title, &outside.what);
    let line = line.add(Style::Plain, format!(", {}: ", times(outside.count)));
    match outside.capability {
        Some(capability) => line.add(Style::Good, format!("{capability} opens it")),
        None if outside.on_this_host => line.add(Style::Warning, "this host has it, no plugin does"),
        None => line.add(Style::Warning, "no capability opens it"),
    }
}

fn notes(subject: &Subject<'_>, seen: &Seen, proposal: &Proposal) -> Vec<String> {
    let mut notes = vec![
        "A trace shows what happened, not what can happen: drive every branch, or ask for more than this.".to_owned(),
        "Paths are read from the plugin's memory a moment before the kernel reads them, and it can change them in between."
            .to_owned(),
    ];
    let mut say = |text: String| notes.push(text);
    if !proposal.untold.is_empty() {
        say(format!(
            "Kept because a trace cannot tell whether they were used (variables; calls over the broker, which nobody answered): {}.",
            names(&proposal.untold).join(", ")
        ));
    }
    if !proposal.optional.is_empty() {
        say(format!(
            "What it used {} for was refused in this trace too, and it served to the end: ask for them if that is to work.",
            names(&proposal.optional).join(", ")
        ));
    }
    if [&proposal.capabilities, &proposal.optional].iter().any(|some| some.contains(&Capability::HttpClient))
        && !subject.capabilities.contains(&Capability::HttpClient)
    {
        say("TCP is one to the kernel: network:websocket or network:dns-resolve may be what is meant by network:http-client."
            .to_owned());
    }
    if subject.level == Level::None || subject.level == Level::Vm {
        say(format!(
            "At {} Plugvisor filters no system call; it was traced in the tree and namespaces of {}.",
            subject.level.as_str(),
            super::session::traced_at(subject.level).as_str()
        ));
    }
    let ports: Vec<String> = proposal.listen.iter().map(u16::to_string).collect();
    if !ports.is_empty() {
        say(format!(
            "It listens at {}, or tried to: with network:tcp-server plugin.json names the ports in runtime.network.listen, and at others \
             binding is refused, also in a trace.",
            ports.join(", ")
        ));
    }
    if seen.listeners > 0 {
        say(format!(
            "It installed seccomp filters with a listener {}, which only a trace refuses.",
            times(seen.listeners)
        ));
    }
    if seen.unread > 0 {
        say(format!("What it named was not readable {}.", times(seen.unread)));
    }
    if seen.uncounted > 0 {
        say(format!(
            "Files or addresses beyond the first 4096 were named {} and are not shown.",
            times(seen.uncounted)
        ));
    }
    if let Some(path) = subject.policy {
        say(format!(
            "The calls that it made are in {}; Plugvisor loads no policy of one plugin's own.",
            path.display()
        ));
    }
    notes
}

/// What to put into plugin.json.
fn snippet(proposal: &Proposal) -> Value {
    let mut snippet = json!({ "security": {
        "capabilities": names(&proposal.capabilities),
        "sandbox": { "isolationLevel": proposal.level.as_str() },
    } });
    if !proposal.listen.is_empty() && proposal.capabilities.contains(&Capability::TcpServer) {
        snippet["runtime"] = json!({ "network": { "listen": proposal.listen } });
    }
    snippet
}

fn names(capabilities: &[Capability]) -> Vec<&'static str> {
    capabilities.iter().map(|capability| capability.as_str()).collect()
}

fn times(count: u64) -> String {
    if count == 1 { "once".to_owned() } else { format!("{count} times") }
}

/// The errors with which rules fail.
fn errno(number: i32) -> String {
    match number {
        1 => "EPERM".to_owned(),
        38 => "ENOSYS".to_owned(),
        other => format!("error {other}"),
    }
}

fn as_json(subject: &Subject<'_>, seen: &Seen, proposal: &Proposal) -> Value {
    let calls = |calls: &[Denied]| -> Vec<Value> {
        calls
            .iter()
            .map(|call| {
                let arguments: Vec<Value> =
                    call.arguments.iter().map(|(at, value)| json!({ "index": at, "value": value })).collect();
                json!({
                    "call": call.name,
                    "arguments": arguments,
                    "count": call.count,
                    "error": errno(call.errno),
                    "reason": call.reason,
                    "capabilities": names(&call.capabilities),
                    "level": call.level.map(Level::as_str),
                })
            })
            .collect()
    };
    let outside: Vec<Value> = proposal
        .outside
        .iter()
        .map(|outside| {
            json!({
                "access": outside.access,
                "what": outside.what,
                "count": outside.count,
                "onThisHost": outside.on_this_host,
                "capability": outside.capability.map(Capability::as_str),
            })
        })
        .collect();
    json!({
        "plugin": subject.name,
        "ended": subject.ended,
        "requested": { "level": subject.level.as_str(), "capabilities": names(subject.capabilities) },
        "calls": seen.calls.values().map(|times| times.count).sum::<u64>(),
        "refused": calls(&proposal.denied),
        "refusedAbove": calls(&proposal.above),
        "outside": outside,
        "nowhere": proposal.nowhere,
        "broker": proposal.broker,
        "proxy": proposal.proxy,
        "unused": names(&proposal.unused),
        "untold": names(&proposal.untold),
        "survivedWithout": names(&proposal.optional),
        "proposal": snippet(proposal),
        "notes": notes(subject, seen, proposal),
    })
}

#[cfg(test)]
mod tests {
    use plugvisor_sandbox::{
        rules::syscalls,
        trace::{Access, Book, FileUse, Place, SocketUse, Survival, Times, propose},
    };

    use super::*;

    /// A plugin that does a little of everything.
    fn seen(book: &Book) -> Seen {
        let mut seen = Seen::default();
        for (name, arguments, count) in [
            ("read", [0; 6], 1200),
            ("fork", [0; 6], 1),
            ("kill", [7, 15, 0, 0, 0, 0], 2),
            ("socket", [2, 1, 0, 0, 0, 0], 3),
            ("mmap", [0, 4096, 7, 0x22, 0, 0], 4),
            ("mount", [0; 6], 1),
        ] {
            let number = syscalls::number(name).expect("a name").expect("a number");
            seen.calls.insert(book.kind(number, arguments), Times { count, first: arguments });
        }
        for (access, path, place, count) in [
            (Access::Read, "/etc/resolv.conf", Place::Host, 2),
            (Access::Read, "/etc/ld.so.preload", Place::Nowhere, 1),
            (Access::Write, "/var/cache/\u{1b}[2Jx", Place::Nowhere, 1),
            (Access::Write, "/tmp/part", Place::Nowhere, 5),
            (Access::Connect, "/run/plugvisor/broker.sock", Place::Tree, 1),
        ] {
            seen.files.insert(FileUse { access, path: path.to_owned(), place }, count);
        }
        seen.sockets.insert(SocketUse::Connect(([127, 0, 0, 1], 3128).into()), 3);
        for (port, count) in [(8443, 1), (8080, 2), (0, 1)] {
            seen.sockets.insert(SocketUse::Bind(([0, 0, 0, 0], port).into()), count);
        }
        seen.listeners = 1;
        seen
    }

    #[test]
    fn what_it_says_is_held_by_a_file() {
        let book = Book::of_this_build().expect("the data files");
        let capabilities =
            [Capability::ReadConfig, Capability::AccessEnv, Capability::InternalCalls, Capability::SpawnChild];
        let subject = Subject {
            name: "markdown",
            level: Level::Sandbox,
            capabilities: &capabilities,
            ended: "its driver ended",
            policy: Some(Path::new("policy.toml")),
        };
        let seen = seen(&book);
        let proposal = propose(&seen, &book, subject.level, subject.capabilities, Survival::Unknown);
        let table: Vec<String> =
            lines(&subject, &seen, &proposal, false).iter().map(|line| line.render(false)).collect();
        super::super::hold("trace.txt", &format!("{}\n", table.join("\n")));
        let survived = propose(&seen, &book, subject.level, subject.capabilities, Survival::ToTheEnd);
        let table: Vec<String> =
            lines(&subject, &seen, &survived, false).iter().map(|line| line.render(false)).collect();
        super::super::hold("trace-survived.txt", &format!("{}\n", table.join("\n")));
        super::super::hold("trace.json", &format!("{:#}\n", as_json(&subject, &seen, &proposal)));
        let quiet = Subject { level: Level::None, capabilities: &[], policy: None, ..subject };
        let proposal = propose(&Seen::default(), &book, quiet.level, quiet.capabilities, Survival::ToTheEnd);
        let table: Vec<String> =
            lines(&quiet, &Seen::default(), &proposal, true).iter().map(|line| line.render(false)).collect();
        super::super::hold("trace-quiet.txt", &format!("{}\n", table.join("\n")));
    }
}
