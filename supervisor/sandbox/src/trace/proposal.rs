//! From what was seen to what a manifest should say. Pure.

use std::collections::BTreeSet;

use plugvisor_package::Capability;

use super::{
    book::{Book, Kind, Verdict},
    seen::{Access, FileUse, Place, Seen, SocketUse, Times},
};
use crate::{
    protocol::{EGRESS, Grant, Level},
    rules::Granted,
};

/// What a trace comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proposal {
    /// The strongest level at which every call that some level lets through still would be.
    pub level: Level,
    /// The capabilities that it used there, and those of the manifest that a trace cannot tell about.
    pub capabilities: Vec<Capability>,
    /// Capabilities that the manifest does not ask for and whose every use was refused in the trace too, of a plugin that
    /// served all the same: it may ask for them, and does without.
    pub optional: Vec<Capability>,
    /// The ports at which it listened there, or tried to.
    pub listen: Vec<u16>,
    /// Those of them that are there because a trace cannot tell about them.
    pub untold: Vec<Capability>,
    /// What of the manifest's capabilities was not used.
    pub unused: Vec<Capability>,
    /// The calls that the manifest's level and capabilities refuse.
    pub denied: Vec<Denied>,
    /// The calls that the level above the proposed one would refuse.
    pub above: Vec<Denied>,
    /// Files and addresses that are not the plugin's at the manifest's level and capabilities.
    pub outside: Vec<Outside>,
    /// How often it looked for files that are nowhere, as loaders and search paths do.
    pub nowhere: u64,
    /// How often it connected to its broker.
    pub broker: u64,
    /// How often it connected to the egress proxy.
    pub proxy: u64,
}

/// A kind of call that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denied {
    /// The call.
    pub name: String,
    /// The arguments that the policy looks at, as they were the first time.
    pub arguments: Vec<(usize, u64)>,
    /// How often.
    pub count: u64,
    /// How it fails.
    pub errno: i32,
    /// Why, in the words of the policy.
    pub reason: String,
    /// The capabilities with which it is let through, at this level.
    pub capabilities: Vec<Capability>,
    /// The strongest level, with those capabilities, that lets it through; `None` when no level with a filter does.
    pub level: Option<Level>,
}

/// Something outside of the plugin's tree or network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outside {
    /// What it did, in a word.
    pub access: &'static str,
    /// To what.
    pub what: String,
    /// How often.
    pub count: u64,
    /// Whether the host has it.
    pub on_this_host: bool,
    /// The capability that opens it, if one does.
    pub capability: Option<Capability>,
}

/// Whether a plugin went on in spite of what a trace refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// It served, until others ended the trace.
    ToTheEnd,
    /// It ended by itself, or was not seen to serve.
    Unknown,
}

/// Those that open the way to the egress proxy.
const PROXY: [Capability; 3] = [Capability::HttpClient, Capability::WebSocket, Capability::DnsResolve];

/// What the manifest should say, and what it says that is too little or too much. `level` and `capabilities` are the
/// manifest's.
#[must_use]
pub fn propose(seen: &Seen, book: &Book, level: Level, capabilities: &[Capability], survival: Survival) -> Proposal {
    let outward = outward(capabilities);
    let network = network(seen, capabilities, &outward);
    let (strongest, lifted) = strongest(seen, book);
    let mut used: BTreeSet<Capability> = lifted.iter().flat_map(|lift| opened_by(*lift, &network)).collect();
    let mut outside = Vec::new();
    let (mut nowhere, mut broker, mut proxy) = (0, 0, 0);
    for (file, count) in &seen.files {
        match of_file(file) {
            OfFile::Own => {}
            OfFile::Broker => broker += count,
            OfFile::Nowhere => nowhere += count,
            OfFile::Needs(capability) => {
                used.insert(capability);
                if !capabilities.contains(&capability) {
                    outside.push(outside_file(file, *count, Some(capability)));
                }
            }
            OfFile::Outside => outside.push(outside_file(file, *count, None)),
        }
    }
    for (socket, count) in &seen.sockets {
        let (access, what, capability) = match socket {
            SocketUse::Connect(address) => {
                if *address == EGRESS.into() {
                    proxy += count;
                }
                used.extend(outward.iter().copied());
                ("connect", address.to_string(), outward[0])
            }
            SocketUse::Bind(address) => {
                used.insert(Capability::TcpServer);
                ("bind", address.to_string(), Capability::TcpServer)
            }
            SocketUse::Abstract(name) => {
                outside.push(Outside {
                    access: "connect",
                    what: format!("@{name}"),
                    count: *count,
                    on_this_host: false,
                    capability: None,
                });
                continue;
            }
        };
        if !capabilities.contains(&capability) {
            outside.push(Outside { access, what, count: *count, on_this_host: false, capability: Some(capability) });
        }
    }
    if used.contains(&Capability::WriteData) {
        // It opens the same directory.
        used.remove(&Capability::ReadData);
    }
    let ports = seen.sockets.keys().filter_map(|socket| match socket {
        // Port 0 is the kernel's choice, which nobody finds.
        SocketUse::Bind(address) if address.port() > 0 => Some(address.port()),
        SocketUse::Bind(_) | SocketUse::Connect(_) | SocketUse::Abstract(_) => None,
    });
    let listen: BTreeSet<u16> = ports.collect();
    let mut untold = Vec::new();
    let mut unused = Vec::new();
    for capability in capabilities.iter().filter(|capability| !used.contains(capability)) {
        match Grant::of(*capability) {
            Some(Grant::AccessEnv) => untold.push(*capability),
            None if broker > 0 && *capability != Capability::TcpServer => untold.push(*capability),
            Some(_) | None => unused.push(*capability),
        }
    }
    used.extend(untold.iter().copied());
    let optional = match survival {
        Survival::ToTheEnd => refused(seen, capabilities, &used),
        Survival::Unknown => BTreeSet::new(),
    };
    let ordered = |wanted: &dyn Fn(&Capability) -> bool| -> Vec<Capability> {
        Capability::ALL.iter().copied().filter(|capability| wanted(capability)).collect()
    };
    let grants = Granted::of(&Grant::of_all(capabilities.iter().copied()));
    Proposal {
        level: strongest,
        capabilities: ordered(&|capability| used.contains(capability) && !optional.contains(capability)),
        optional: ordered(&|capability| optional.contains(capability)),
        listen: listen.into_iter().collect(),
        untold,
        unused,
        denied: denied(seen, book, level, &grants, &network),
        above: if strongest == Level::Sandbox {
            Vec::new()
        } else {
            let mut above = denied(seen, book, Level::Sandbox, &lifted, &network);
            above.retain(|call| call.level == Some(Level::Container));
            above
        },
        outside,
        nowhere,
        broker,
        proxy,
    }
}

/// Those that were used in vain alone: without them the trace has no such directory, no port and no way out either. A TCP
/// socket by itself is carried out, and nothing that was carried out is known to be done without.
fn refused(seen: &Seen, capabilities: &[Capability], used: &BTreeSet<Capability>) -> BTreeSet<Capability> {
    let connects = seen.sockets.keys().any(|socket| matches!(socket, SocketUse::Connect(_)));
    let in_vain = |capability: &&Capability| match capability {
        Capability::ReadConfig | Capability::ReadData | Capability::WriteData | Capability::TcpServer => true,
        Capability::HttpClient => connects,
        _ => false,
    };
    let unasked = used.iter().filter(|capability| !capabilities.contains(capability));
    unasked.filter(in_vain).copied().collect()
}

/// The capabilities by which this manifest reaches the proxy, or would: a trace cannot tell them apart.
fn outward(capabilities: &[Capability]) -> Vec<Capability> {
    let asked: Vec<Capability> = PROXY.into_iter().filter(|capability| capabilities.contains(capability)).collect();
    if asked.is_empty() { vec![Capability::HttpClient] } else { asked }
}

/// The capabilities that its TCP sockets are for. Of one that was neither bound nor connected the manifest alone can say.
fn network(seen: &Seen, capabilities: &[Capability], outward: &[Capability]) -> Vec<Capability> {
    let any = |wanted: fn(&SocketUse) -> bool| seen.sockets.keys().any(wanted);
    let (binds, connects) =
        (any(|socket| matches!(socket, SocketUse::Bind(_))), any(|socket| matches!(socket, SocketUse::Connect(_))));
    let serves = capabilities.contains(&Capability::TcpServer);
    let proxied = PROXY.iter().any(|capability| capabilities.contains(capability));
    let inward = (binds || (serves && !connects)).then_some(Capability::TcpServer);
    let goes_out = connects || inward.is_none() || (proxied && !binds);
    inward.into_iter().chain(outward.iter().copied().filter(|_| goes_out)).collect()
}

fn opened_by(lift: Granted, network: &[Capability]) -> Vec<Capability> {
    match lift {
        Granted::SpawnChild => vec![Capability::SpawnChild],
        Granted::SignalHandling => vec![Capability::SignalHandling],
        Granted::Tcp => network.to_vec(),
        Granted::Machine | Granted::MachineDevice => Vec::new(),
    }
}

/// The calls that are let through somewhere.
fn possible<'a>(seen: &'a Seen, book: &'a Book) -> impl Iterator<Item = (Kind, Times)> + 'a {
    let all = seen.calls.iter().map(|(kind, times)| (*kind, *times));
    all.filter(|(kind, _)| book.always_refused(*kind).is_none())
}

/// The strongest level that refuses none of the calls which some level lets through, and the least that must be granted for
/// it. Whatever was seen, CONTAINER is one; that PROCESS has the same filter is why it never is.
fn strongest(seen: &Seen, book: &Book) -> (Level, Vec<Granted>) {
    let least = |level| {
        let refused = |lifted: &[Granted]| {
            possible(seen, book).filter(|(kind, _)| book.verdict(*kind, level, lifted) != Verdict::Allowed).count()
        };
        let all = Granted::sets().into_iter().map(|lifted| (refused(&lifted), lifted));
        all.min_by_key(|(refused, lifted)| (*refused, lifted.len())).unwrap_or_default()
    };
    let (refused, lifted) = least(Level::Sandbox);
    if refused == 0 { (Level::Sandbox, lifted) } else { (Level::Container, least(Level::Container).1) }
}

fn denied(seen: &Seen, book: &Book, level: Level, grants: &[Granted], network: &[Capability]) -> Vec<Denied> {
    let mut all = Vec::new();
    for (kind, times) in &seen.calls {
        let Verdict::Refused(errno) = book.verdict(*kind, level, grants) else { continue };
        let lets_through = |level, lifted: &[Granted]| book.verdict(*kind, level, lifted) == Verdict::Allowed;
        // The fewest more, at this level or else at the strongest one that has them.
        let more = |level| {
            let sets = Granted::sets().into_iter().filter(|lifted| grants.iter().all(|grant| lifted.contains(grant)));
            sets.filter(|lifted| lets_through(level, lifted)).min_by_key(Vec::len)
        };
        let way = [level, Level::Container].into_iter().find_map(|level| more(level).map(|lifted| (level, lifted)));
        let (allowed_at, lifted) = way.map_or((None, Vec::new()), |(level, lifted)| (Some(level), lifted));
        let added = lifted.iter().filter(|lift| !grants.contains(lift));
        all.push(Denied {
            name: book.name(*kind),
            arguments: book.arguments_looked_at(*kind).into_iter().map(|at| (at, times.first[at])).collect(),
            count: times.count,
            errno,
            reason: book.reason(*kind, level, grants).to_owned(),
            capabilities: added.flat_map(|lift| opened_by(*lift, network).into_iter().take(1)).collect(),
            level: allowed_at,
        });
    }
    all
}

enum OfFile {
    /// Its own at every level.
    Own,
    Broker,
    /// A look for what is nowhere.
    Nowhere,
    /// With this capability it is its own.
    Needs(Capability),
    Outside,
}

fn of_file(FileUse { access, path, place }: &FileUse) -> OfFile {
    let below =
        |directory: &str| path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    match access {
        Access::Connect if path == "/run/plugvisor/broker.sock" => OfFile::Broker,
        Access::Connect if below("/run/plugvisor") => OfFile::Own,
        Access::Read | Access::Write if below("/plugvisor/data") => OfFile::Needs(match access {
            Access::Write => Capability::WriteData,
            _ => Capability::ReadData,
        }),
        Access::Read if below("/plugvisor/config") => OfFile::Needs(Capability::ReadConfig),
        Access::Write if below("/tmp") => OfFile::Needs(Capability::WriteTemp),
        Access::Read if below("/tmp") && *place == Place::Tree => OfFile::Needs(Capability::WriteTemp),
        // Devices without state, what is open already, and the socket that it binds itself.
        Access::Write if *place == Place::Tree && below("/dev") => OfFile::Own,
        Access::Write if below("/proc/self/fd") || below("/run/plugvisor/worker") => OfFile::Own,
        Access::Execute if below("/tmp") || below("/plugvisor") => OfFile::Outside,
        Access::Connect | Access::Write => OfFile::Outside,
        Access::Read | Access::Execute => match place {
            Place::Tree => OfFile::Own,
            Place::Host => OfFile::Outside,
            Place::Nowhere => OfFile::Nowhere,
        },
    }
}

fn outside_file(file: &FileUse, count: u64, capability: Option<Capability>) -> Outside {
    Outside {
        access: file.access.as_str(),
        what: file.path.clone(),
        count,
        on_this_host: file.place == Place::Host,
        capability,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rules::syscalls;

    fn made(calls: &[(&str, [u64; 6])]) -> (Seen, Book) {
        let book = Book::of_this_build().expect("the data files");
        let mut seen = Seen::default();
        for (name, arguments) in calls {
            let number = syscalls::number(name).expect("a name").expect("a number");
            seen.call(book.kind(number, *arguments), *arguments);
        }
        (seen, book)
    }

    #[test]
    fn the_least_that_holds_is_proposed() {
        let (seen, book) = made(&[
            ("read", [0; 6]),
            ("fork", [0; 6]),
            ("fork", [0; 6]),
            ("kill", [7, 15, 0, 0, 0, 0]),
            ("mount", [0; 6]),
        ]);
        let proposal = propose(
            &seen,
            &book,
            Level::Sandbox,
            &[Capability::SignalHandling, Capability::WriteTemp],
            Survival::ToTheEnd,
        );
        assert_eq!(proposal.level, Level::Sandbox, "mount fails everywhere");
        assert_eq!(proposal.capabilities, [Capability::SpawnChild, Capability::SignalHandling]);
        assert_eq!(proposal.unused, [Capability::WriteTemp]);
        let denied: Vec<_> =
            proposal.denied.iter().map(|d| (d.name.as_str(), d.count, d.capabilities.as_slice(), d.level)).collect();
        let spawn = [Capability::SpawnChild];
        assert_eq!(denied, [("fork", 2, &spawn[..], Some(Level::Sandbox)), ("mount", 1, &[], None)]);
    }

    #[test]
    fn a_weaker_level_is_proposed_for_what_sandbox_never_allows() {
        let (seen, book) = made(&[("mmap", [0, 4096, 7, 0x22, 0, 0])]);
        let proposal = propose(&seen, &book, Level::Sandbox, &[], Survival::ToTheEnd);
        assert_eq!(proposal.level, Level::Container);
        assert_eq!(
            (proposal.denied[0].level, proposal.denied[0].arguments.as_slice()),
            (Some(Level::Container), &[(2, 7)][..])
        );
        assert_eq!(proposal.above, proposal.denied);
        let proposal = propose(&seen, &book, Level::Process, &[], Survival::ToTheEnd);
        assert_eq!((proposal.denied.len(), proposal.above.len(), proposal.level), (0, 1, Level::Container));
    }

    #[test]
    fn a_grant_that_makes_another_one_necessary_brings_it() {
        // tkill needs signals only beside children.
        let (seen, book) = made(&[("fork", [0; 6]), ("tkill", [9, 6, 0, 0, 0, 0])]);
        let proposal = propose(&seen, &book, Level::Process, &[], Survival::ToTheEnd);
        assert_eq!(proposal.capabilities, [Capability::SpawnChild, Capability::SignalHandling]);
        let (seen, book) = made(&[("tkill", [9, 6, 0, 0, 0, 0])]);
        assert_eq!(propose(&seen, &book, Level::Process, &[], Survival::ToTheEnd).capabilities, []);
    }

    #[test]
    fn files_and_addresses_need_what_opens_them() {
        let mut seen = Seen::default();
        for (access, path, place) in [
            (Access::Write, "/tmp/a", Place::Nowhere),
            (Access::Read, "/tmp/never", Place::Nowhere),
            (Access::Write, "/plugvisor/data/x", Place::Nowhere),
            (Access::Read, "/plugvisor/data/x", Place::Tree),
            (Access::Read, "/usr/lib/x.so", Place::Tree),
            (Access::Read, "/etc/ld.so.preload", Place::Nowhere),
            (Access::Read, "/etc/shadow", Place::Host),
            (Access::Write, "/dev/null", Place::Tree),
            (Access::Write, "/plugin/x", Place::Nowhere),
            (Access::Execute, "/tmp/a", Place::Tree),
            (Access::Connect, "/run/plugvisor/broker.sock", Place::Tree),
        ] {
            seen.file(FileUse { access, path: path.to_owned(), place });
        }
        seen.socket(SocketUse::Connect(EGRESS.into()));
        let book = Book::of_this_build().expect("the data files");
        let asked = [Capability::WebSocket, Capability::InternalCalls, Capability::ReadConfig];
        let proposal = propose(&seen, &book, Level::Sandbox, &asked, Survival::Unknown);
        let wanted = [Capability::WebSocket, Capability::WriteData, Capability::WriteTemp, Capability::InternalCalls];
        assert_eq!(proposal.capabilities, wanted);
        assert_eq!((proposal.untold.as_slice(), proposal.unused.as_slice()), (&asked[1..2], &asked[2..]));
        assert_eq!((proposal.nowhere, proposal.broker, proposal.proxy), (2, 1, 1));
        let outside: Vec<_> = proposal.outside.iter().map(|o| (o.access, o.what.as_str(), o.capability)).collect();
        assert_eq!(
            outside,
            [
                ("read", "/etc/shadow", None),
                ("read", "/plugvisor/data/x", Some(Capability::ReadData)),
                ("write", "/plugin/x", None),
                ("write", "/plugvisor/data/x", Some(Capability::WriteData)),
                ("write", "/tmp/a", Some(Capability::WriteTemp)),
                ("execute", "/tmp/a", None),
            ]
        );
    }

    #[test]
    fn what_was_refused_and_survived_is_optional() {
        let (mut seen, book) = made(&[("socket", [2, 1, 0, 0, 0, 0]), ("fork", [0; 6])]);
        let file = |access, path: &str| FileUse { access, path: path.to_owned(), place: Place::Nowhere };
        seen.file(file(Access::Write, "/tmp/a"));
        seen.file(file(Access::Read, "/plugvisor/config/x"));
        seen.file(file(Access::Write, "/plugvisor/data/x"));
        seen.socket(SocketUse::Connect(([93, 184, 215, 14], 443).into()));
        seen.socket(SocketUse::Bind(([0, 0, 0, 0], 8080).into()));
        let of = |capabilities: &[Capability], survival| propose(&seen, &book, Level::Sandbox, capabilities, survival);
        let all = [
            Capability::HttpClient,
            Capability::TcpServer,
            Capability::ReadConfig,
            Capability::WriteData,
            Capability::WriteTemp,
            Capability::SpawnChild,
        ];
        let ended = of(&[], Survival::Unknown);
        assert_eq!((ended.capabilities.as_slice(), ended.optional.as_slice()), (&all[..], &[][..]));
        // What a trace carries out may have been what it lived by.
        let survived = of(&[], Survival::ToTheEnd);
        assert_eq!((survived.capabilities.as_slice(), survived.optional.as_slice()), (&all[4..], &all[..4]));
        assert_eq!(survived.listen, [8080], "for whoever wants it to");
        // What the manifest asks for was not refused.
        let asked = of(&all, Survival::ToTheEnd);
        assert_eq!((asked.capabilities.as_slice(), asked.optional.as_slice()), (&all[..], &[][..]));
        // Nobody knows what a socket alone was for.
        let (seen, book) = made(&[("socket", [2, 1, 0, 0, 0, 0])]);
        let probed = propose(&seen, &book, Level::Sandbox, &[], Survival::ToTheEnd);
        assert_eq!((probed.capabilities.as_slice(), probed.optional.as_slice()), (&all[..1], &[][..]));
    }
}
