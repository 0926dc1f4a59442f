//! What [`route`] decides and why, step by step, without a call: for people who ask before they call.
//!
//! The verdict is `route`'s own answer; the steps only tell how it was reached, so that the two cannot disagree. It does
//! not know breakers and limits: what stands behind the route is added by whoever knows it.

use std::fmt;

use plugvisor_package::Capability;

use super::{
    Availability, Caller, Decision, Export, HostModule, Provider, Reason, Refusal, RouteTable, is_reserved, route,
    table::Offer,
};

/// One thing that is decided about a call, in the order in which it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Step {
    /// Who provides the service.
    Service,
    /// Whether the caller may call other plugins, or the host, at all.
    Grant,
    /// Which of several providers is meant.
    Token,
    /// Whether the provider shares the service with this caller.
    Export,
    /// Whether the call comes back to its caller.
    Hops,
    /// Whether the provider takes calls now.
    Provider,
}

impl Step {
    /// Every step, in order.
    pub const ALL: [Self; 6] = [Self::Service, Self::Grant, Self::Token, Self::Export, Self::Hops, Self::Provider];

    /// The stable text.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Grant => "grant",
            Self::Token => "token",
            Self::Export => "export",
            Self::Hops => "hops",
            Self::Provider => "provider",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a step came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It lets the call pass; why, in words.
    Passed(String),
    /// It does not concern this call; why not, in words.
    Skipped(String),
    /// It refuses the call: the verdict says why.
    Refused,
    /// An earlier step refused the call.
    NotReached,
}

/// The whole account.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation<'t> {
    /// What [`route`] answers.
    pub verdict: Result<Decision<'t>, Refusal>,
    /// Each of [`Step::ALL`] with its finding.
    pub steps: Vec<(Step, Finding)>,
}

/// Explains what [`route`] would answer to a call that has no path behind it yet.
#[must_use]
pub fn explain<'t>(table: &'t RouteTable, caller: Caller<'_>, service: &str, token: Option<&str>) -> Explanation<'t> {
    let verdict = route(table, caller, service, token, None);
    let stopped = verdict.as_ref().err().map(|refusal| deciding(caller, service, refusal.reason));
    let steps = Step::ALL
        .into_iter()
        .map(|step| {
            let finding = match stopped {
                Some(stop) if stop == step => Finding::Refused,
                Some(stop) if stop < step => Finding::NotReached,
                Some(_) | None => passed(table, caller, service, token, &verdict, step),
            };
            (step, finding)
        })
        .collect();
    Explanation { verdict, steps }
}

/// The step that gives this refusal.
fn deciding(caller: Caller<'_>, service: &str, reason: Reason) -> Step {
    match reason {
        Reason::UnknownService => Step::Service,
        Reason::UnknownToken | Reason::AmbiguousService => Step::Token,
        Reason::CallerNotAllowed if is_reserved(service) => Step::Grant,
        Reason::CallerNotAllowed => match caller {
            Caller::Plugin(caller) if !caller.rights.hold(Capability::InternalCalls) => Step::Grant,
            Caller::Plugin(_) | Caller::Local { uid: _ } => Step::Export,
        },
        Reason::Loop | Reason::BadRequest => Step::Hops,
        // All but the first come from behind the route, never from it; the last step is the nearest.
        Reason::ProviderNotReady
        | Reason::BreakerOpen
        | Reason::Overloaded
        | Reason::Deadline
        | Reason::ProviderLost
        | Reason::MessageTooLarge
        | Reason::ProtocolError
        | Reason::Stopping
        | Reason::ModuleNotAvailable => Step::Provider,
    }
}

fn passed(
    table: &RouteTable,
    caller: Caller<'_>,
    service: &str,
    token: Option<&str>,
    verdict: &Result<Decision<'_>, Refusal>,
    step: Step,
) -> Finding {
    if is_reserved(service) {
        return match step {
            Step::Service => Finding::Passed("a service of the supervisor itself".to_owned()),
            Step::Grant => match (HostModule::of(service), caller) {
                (Some(module), Caller::Plugin(caller)) => match module.held_by(&caller.rights) {
                    Some(held) => Finding::Passed(format!("{} holds {held}", caller.name)),
                    None => Finding::Skipped("it holds no capability for it".to_owned()),
                },
                (None, _) | (_, Caller::Local { uid: _ }) => Finding::Skipped("it needs no capability".to_owned()),
            },
            Step::Token | Step::Export | Step::Hops | Step::Provider => {
                Finding::Skipped("no plugin is asked".to_owned())
            }
        };
    }
    let offers = table.offers(service);
    match step {
        Step::Service => Finding::Passed(format!("provided by {}", names(table, offers))),
        Step::Grant => match caller {
            Caller::Plugin(caller) => Finding::Passed(format!("{} holds {}", caller.name, Capability::InternalCalls)),
            Caller::Local { uid } => Finding::Passed(format!("user {uid} was let in to calls.sock")),
        },
        Step::Token => match token {
            Some(token) => {
                Finding::Passed(format!("{token:?} chooses {}", chosen(verdict, table, offers, Some(token))))
            }
            None => Finding::Skipped("none was given, and none is needed".to_owned()),
        },
        Step::Export => {
            let shared = offers.iter().filter(|offer| token.is_none() || offer.token() == token);
            let mut found = shared.filter_map(|offer| match offer.export() {
                Export::Private => None,
                Export::Shared { global, capabilities } => Some((table.provider(offer), *global, *capabilities)),
            });
            match found.next() {
                None => Finding::Passed("shared with the caller".to_owned()),
                Some((provider, global, capabilities)) => {
                    let with = if global { "every plugin" } else { "the plugins that depend on it" };
                    let holding = capabilities.iter().map(|c| c.to_string()).collect::<Vec<_>>().join(", ");
                    let holding = if holding.is_empty() { String::new() } else { format!(" and hold {holding}") };
                    let local = match caller {
                        Caller::Local { uid: _ } => " and local applications",
                        Caller::Plugin(_) => "",
                    };
                    Finding::Passed(format!("{} shares it with {with}{holding}{local}", provider.name()))
                }
            }
        }
        Step::Hops => match caller {
            Caller::Plugin(_) => {
                Finding::Passed("the call does not come back to its caller; its path is judged when it is made".into())
            }
            Caller::Local { uid: _ } => Finding::Skipped("a call from outside has no path yet".to_owned()),
        },
        Step::Provider => match verdict {
            Ok(Decision::Provider(provider)) => match provider.availability() {
                Availability::Serving => {
                    Finding::Passed(format!("{} serves, generation {}", provider.name(), provider.generation()))
                }
                Availability::Unavailable { why } => Finding::Passed(why.clone()),
            },
            Ok(Decision::Host(_)) | Err(_) => Finding::Skipped("no plugin is asked".to_owned()),
        },
    }
}

fn names(table: &RouteTable, offers: &[Offer]) -> String {
    let mut names: Vec<&str> = offers.iter().map(|offer| table.provider(offer).name().as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names.join(", ")
}

fn chosen(
    verdict: &Result<Decision<'_>, Refusal>,
    table: &RouteTable,
    offers: &[Offer],
    token: Option<&str>,
) -> String {
    match verdict {
        Ok(Decision::Provider(provider)) => Provider::name(provider).to_string(),
        Ok(Decision::Host(_)) | Err(_) => {
            let meant: Vec<Offer> = offers.iter().filter(|offer| offer.token() == token).cloned().collect();
            names(table, &meant)
        }
    }
}
