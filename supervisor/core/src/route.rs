//! Who serves a call, and whether the caller may make it: a pure function over a snapshot.
//!
//! Owns the rules of reach. It does not know sockets, breakers or how the caller was identified: the broker knows the
//! caller by its connection and says so in [`Caller`]. A decision that lets the call pass allocates nothing.

mod explain;
mod hops;
mod module;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;

use plugvisor_package::{Capability, PluginName};

pub use self::{
    explain::{Explanation, Finding, Step, explain},
    hops::{MAX_HOPS, check_hops, extend_hops},
    module::HostModule,
    table::{Availability, Export, Plugin, Provider, RouteTable, Service},
};
use crate::{Generation, Rights, policy::Lack};

/// A plugin as a caller, known by its connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PluginCaller {
    /// Its name.
    pub name: PluginName,
    /// The generation whose broker socket the call came in on.
    pub generation: Generation,
    /// What it may do, and why not more.
    pub rights: Rights,
    /// The plugins that its manifest lists in `dependencies`.
    pub dependencies: Vec<PluginName>,
}

/// Who calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller<'a> {
    /// A plugin, on its own broker socket.
    Plugin(&'a PluginCaller),
    /// A local application, on `calls.sock`, whose user was let in.
    Local {
        /// The user of the peer's credentials.
        uid: u32,
    },
}

/// Where a call goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision<'t> {
    /// To a plugin.
    Provider(&'t Provider),
    /// To the supervisor itself.
    Host(HostModule),
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $status:literal;)+) => {
        /// Why the broker itself ended a call; mirrors `plugvisor.broker.v1.Reason`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason {
            $($(#[$doc])* $variant),+
        }

        impl Reason {
            /// Every reason, in the order of their numbers in the proto, from 1.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The text of the trailer `plugvisor-reason`.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }

            /// The gRPC status code that goes with it.
            #[must_use]
            pub const fn grpc_status(self) -> i32 {
                match self { $(Self::$variant => $status),+ }
            }
        }
    };
}

reasons! {
    /// UNIMPLEMENTED: no plugin provides the service.
    UnknownService = "unknown_service", 12;
    /// NOT_FOUND: no plugin offers the token.
    UnknownToken = "unknown_token", 5;
    /// FAILED_PRECONDITION: several plugins provide the service and no token chose one.
    AmbiguousService = "ambiguous_service", 9;
    /// PERMISSION_DENIED: the caller lacks a capability, or the service is not exported to it.
    CallerNotAllowed = "caller_not_allowed", 7;
    /// UNAVAILABLE: the provider is not loaded, is restarting or is draining.
    ProviderNotReady = "provider_not_ready", 14;
    /// UNAVAILABLE: the provider's breaker is open.
    BreakerOpen = "breaker_open", 14;
    /// RESOURCE_EXHAUSTED: the provider's concurrency limit and queue are full.
    Overloaded = "overloaded", 8;
    /// DEADLINE_EXCEEDED: the time ran out at the broker.
    Deadline = "deadline", 4;
    /// FAILED_PRECONDITION: the call came back to a plugin on its path, or made too many hops.
    Loop = "loop", 9;
    /// UNAVAILABLE: the provider's process or connection ended during the call.
    ProviderLost = "provider_lost", 14;
    /// RESOURCE_EXHAUSTED: a message is over the size limit.
    MessageTooLarge = "message_too_large", 8;
    /// INTERNAL: the provider broke HTTP/2 or gRPC.
    ProtocolError = "protocol_error", 13;
    /// INVALID_ARGUMENT: the caller's request is not gRPC.
    BadRequest = "bad_request", 3;
    /// UNAVAILABLE: the supervisor is stopping.
    Stopping = "stopping", 14;
    /// UNIMPLEMENTED: the caller may call this service of the host, and this version does not have it.
    ModuleNotAvailable = "module_not_available", 12;
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The broker's own answer to a call that it does not pass on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub reason: Reason,
    /// What was refused and why: `grpc-message`.
    pub message: String,
    /// What to do next, for operators; for the caller too, unless there is another one for it.
    pub hint: String,
    /// What the caller is told in its place: without what only operators may know.
    pub hint_for_caller: Option<String>,
}

impl Refusal {
    /// A refusal with its text and its next step.
    #[must_use]
    pub fn new(reason: Reason, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { reason, message: message.into(), hint: hint.into(), hint_for_caller: None }
    }

    /// What the caller is told to do next: the trailer `plugvisor-hint`.
    #[must_use]
    pub fn caller_hint(&self) -> &str {
        self.hint_for_caller.as_deref().unwrap_or(&self.hint)
    }
}

/// Decides where a call to `service` (fully qualified, without slashes) goes. `token` is the metadata
/// `plugvisor-token`, and `hops` the metadata `plugvisor-hops` as the caller sent it (see [`check_hops`]).
///
/// # Errors
///
/// A [`Refusal`] when nobody may serve this caller now.
pub fn route<'t>(
    table: &'t RouteTable,
    caller: Caller<'_>,
    service: &str,
    token: Option<&str>,
    hops: Option<&str>,
) -> Result<Decision<'t>, Refusal> {
    if is_reserved(service) {
        return host(caller, service);
    }
    let provider = choose(table, caller, service, token)?;
    if let Caller::Plugin(caller) = caller {
        check_hops(hops, &caller.name, provider.name())?;
    }
    match provider.availability() {
        Availability::Serving => Ok(Decision::Provider(provider)),
        Availability::Unavailable { why } => Err(not_ready(provider, why)),
    }
}

/// Packages whose services are the supervisor's own or gRPC's; no plugin's offer of them is ever routed to. Other packages
/// below `plugvisor`, such as `plugvisor.examples`, are plugins' as any other.
const RESERVED: [&str; 6] =
    ["grpc.", "plugvisor.admin.", "plugvisor.broker.", "plugvisor.event.", "plugvisor.host.", "plugvisor.worker."];

fn is_reserved(service: &str) -> bool {
    RESERVED.iter().any(|package| service.starts_with(package))
}

/// The names that the supervisor keeps for itself. Whether the caller may call is said first: who may not learns nothing of
/// what there is.
fn host<'t>(caller: Caller<'_>, service: &str) -> Result<Decision<'t>, Refusal> {
    let Some(module) = HostModule::of(service) else {
        return Err(Refusal::new(
            Reason::UnknownService,
            format!("{} is not a service of this host", shown(service)),
            "services in this package belong to the supervisor; those for plugins are listed in docs/manifest.md",
        ));
    };
    let caller = match caller {
        Caller::Plugin(caller) => caller,
        Caller::Local { uid } => {
            return Err(Refusal::new(
                Reason::CallerNotAllowed,
                format!("user {uid} called {service}, which only plugins may call"),
                "call it from a plugin",
            ));
        }
    };
    if module.held_by(&caller.rights).is_none() {
        return Err(lacks(caller, &caller.rights.lack(module.capability()), service));
    }
    if module.is_served() {
        return Ok(Decision::Host(module));
    }
    Err(Refusal::new(
        Reason::ModuleNotAvailable,
        format!("plugin {} may call {service}, which this version of Plugvisor does not serve yet", caller.name),
        "do without it, or update plugvisord when a version has it",
    ))
}

/// One offer against one caller.
#[derive(Clone, Copy)]
enum Reach {
    Allowed,
    NotExported,
    NotADependency,
    Lacks(Capability),
}

fn choose<'t>(
    table: &'t RouteTable,
    caller: Caller<'_>,
    service: &str,
    token: Option<&str>,
) -> Result<&'t Provider, Refusal> {
    let offers = table.offers(service);
    if offers.is_empty() {
        return Err(Refusal::new(
            Reason::UnknownService,
            format!("no plugin provides {}", shown(service)),
            "check the name, or load the plugin that provides it; `plugvisor status` lists the plugins",
        ));
    }
    if let Caller::Plugin(caller) = caller
        && !caller.rights.hold(Capability::InternalCalls)
    {
        return Err(lacks(caller, &caller.rights.lack(Capability::InternalCalls), service));
    }
    let mut chosen: Option<&'t Provider> = None;
    let mut denied = None;
    let mut token_known = false;
    for offer in offers {
        if token.is_some() && offer.token() != token {
            continue;
        }
        token_known = true;
        let provider = table.provider(offer);
        match reach(provider, offer, caller) {
            Reach::Allowed => match chosen {
                Some(other) if other.slot() != provider.slot() => return Err(ambiguous(service, other, provider)),
                Some(_) | None => chosen = Some(provider),
            },
            no @ (Reach::NotExported | Reach::NotADependency | Reach::Lacks(_)) => {
                denied.get_or_insert((provider, no));
            }
        }
    }
    match (chosen, denied, token) {
        (Some(provider), _, _) => Ok(provider),
        (None, Some((provider, why)), _) => Err(deny(service, caller, provider, why)),
        (None, None, Some(token)) if !token_known => Err(Refusal::new(
            Reason::UnknownToken,
            format!("no plugin offers {} under the token {:?}", shown(service), cut(token)),
            "check the metadata plugvisor-token, or leave it out when only one plugin provides the service",
        )),
        (None, None, _) => Err(Refusal::new(
            Reason::UnknownService,
            format!("no plugin provides {}", shown(service)),
            "check the name, or load the plugin that provides it; `plugvisor status` lists the plugins",
        )),
    }
}

fn reach(provider: &Provider, offer: &table::Offer, caller: Caller<'_>) -> Reach {
    let (global, capabilities) = match offer.export() {
        Export::Private => return Reach::NotExported,
        Export::Shared { global, capabilities } => (*global, *capabilities),
    };
    match caller {
        Caller::Local { uid: _ } => Reach::Allowed,
        Caller::Plugin(caller) => {
            if !global && !caller.dependencies.contains(provider.name()) {
                return Reach::NotADependency;
            }
            capabilities.minus(caller.rights.granted()).iter().next().map_or(Reach::Allowed, Reach::Lacks)
        }
    }
}

fn lacks(caller: &PluginCaller, lack: &Lack, service: &str) -> Refusal {
    let (name, capability) = (&caller.name, lack.capability);
    Refusal {
        reason: Reason::CallerNotAllowed,
        message: format!("plugin {name} called {} without the capability {capability}: {}", shown(service), lack.why()),
        hint: lack.hint(name.as_str()),
        hint_for_caller: Some(lack.hint_for_plugin(name.as_str())),
    }
}

fn deny(service: &str, caller: Caller<'_>, provider: &Provider, why: Reach) -> Refusal {
    let who = match caller {
        Caller::Plugin(caller) => format!("plugin {}", caller.name),
        Caller::Local { uid } => format!("user {uid}"),
    };
    let owner = provider.name();
    let (why, hint) = match (why, caller) {
        (Reach::Lacks(capability), Caller::Plugin(caller)) => {
            return lacks(caller, &caller.rights.lack(capability), service);
        }
        (Reach::NotADependency, _) => (
            format!("{owner} shares it only with plugins that depend on it"),
            format!("list {owner} in dependencies of the caller's plugin.json"),
        ),
        (Reach::NotExported | Reach::Allowed | Reach::Lacks(_), _) => (
            format!("{owner} keeps it to itself"),
            format!("list it in module.exports or module.crossPluginServices of {owner}'s plugin.json"),
        ),
    };
    Refusal::new(Reason::CallerNotAllowed, format!("{who} may not call {}: {why}", shown(service)), hint)
}

fn ambiguous(service: &str, one: &Provider, other: &Provider) -> Refusal {
    Refusal::new(
        Reason::AmbiguousService,
        format!("both {} and {} provide {}", one.name(), other.name(), shown(service)),
        format!(
            "choose one by its token, in the metadata plugvisor-token or with `plugvisor call --token`; \
             `plugvisor describe {}` shows it, and module.crossPluginServices of its plugin.json gives it one",
            one.name()
        ),
    )
}

fn not_ready(provider: &Provider, why: &str) -> Refusal {
    let name = provider.name();
    Refusal::new(
        Reason::ProviderNotReady,
        format!("plugin {name} is not ready: {why}"),
        format!("`plugvisor describe {name}` says why; try again when it is LOADED"),
    )
}

/// A name from a stranger, short enough for a message.
fn shown(service: &str) -> &str {
    cut(service)
}

fn cut(text: &str) -> &str {
    let mut end = text.len().min(128);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
