//! `ExplainCall`: what would become of a call, step by step, without making it.
//!
//! Reach is decided by the same pure function as the broker's, over the same table; what stands behind it (the
//! provider's connection, its limit, its breaker) is read from the broker's figures at this moment.

use std::fmt::Write as _;

use plugvisor_core::{
    breaker::Position,
    route::{Caller, Decision, Explanation, Finding, PluginCaller, Reason, Refusal, RouteTable, Step, explain},
};
use plugvisor_package::{method_names, nearest};
use plugvisor_proto::admin::v1::{CallStep, ExplainCallResponse, StepOutcome};

use crate::{
    broker::{ProviderSnapshot, Snapshot},
    driver::PluginView,
};

/// Who is asked about.
pub(super) enum From {
    /// A plugin, with what its connection would tell the broker, and what is to be said about it.
    Plugin { caller: PluginCaller, about: Result<String, String> },
    /// A local application of this user.
    Local { uid: u32 },
}

/// What is asked.
pub(super) struct Question<'a> {
    pub(super) from: From,
    pub(super) service: &'a str,
    pub(super) method: &'a str,
    pub(super) token: Option<&'a str>,
}

/// Explains the call. `provider_view` finds a plugin's view by its name.
pub(super) fn answer(
    question: &Question<'_>,
    table: &RouteTable,
    calls: &Snapshot,
    provider_view: impl Fn(&str) -> Option<std::sync::Arc<PluginView>>,
) -> ExplainCallResponse {
    let Question { from, service, method, token } = question;
    let mut steps = Steps::default();
    let caller = match from {
        From::Plugin { caller, about } => {
            match about {
                Ok(about) => steps.add("caller", StepOutcome::Passes, about),
                Err(about) => steps.add("caller", StepOutcome::Skipped, about),
            }
            Caller::Plugin(caller)
        }
        From::Local { uid } => {
            steps.add("caller", StepOutcome::Passes, format!("an application of user {uid}, on calls.sock"));
            Caller::Local { uid: *uid }
        }
    };
    let Explanation { verdict, steps: found } = explain(table, caller, service, *token);
    for (step, finding) in found {
        if step == Step::Hops {
            // Between what a provider shares and whether it can be called now stands what a guard would say.
            steps.guard(verdict.is_ok() || stopped_behind(&verdict, Reason::ProviderNotReady));
        }
        match (finding, &verdict) {
            (Finding::Refused, Err(refusal)) => steps.refuse(step.as_str(), refusal, suggestion(table, step, service)),
            (Finding::Passed(why), _) => steps.add(step.as_str(), StepOutcome::Passes, why),
            (Finding::Skipped(why), _) => steps.add(step.as_str(), StepOutcome::Skipped, why),
            (Finding::NotReached | Finding::Refused, _) => steps.add(step.as_str(), StepOutcome::NotReached, ""),
        }
    }
    match &verdict {
        Ok(Decision::Provider(provider)) => {
            let name = provider.name().as_str();
            let figures = calls.providers.iter().find(|found| {
                found.identity.name == *provider.name() && found.identity.generation == provider.generation()
            });
            steps.behind(name, figures);
            if let Some(view) = provider_view(name) {
                steps.method(&view, service, method);
            }
            steps.finish(name)
        }
        Ok(Decision::Host(module)) => {
            for name in ["connection", "limit", "breaker"] {
                steps.add(name, StepOutcome::Skipped, format!("{} is served by the supervisor", module.service()));
            }
            steps.finish("host")
        }
        Err(_) => {
            for name in ["connection", "limit", "breaker"] {
                steps.add(name, StepOutcome::NotReached, "");
            }
            steps.finish("")
        }
    }
}

fn stopped_behind(verdict: &Result<Decision<'_>, Refusal>, reason: Reason) -> bool {
    verdict.as_ref().is_err_and(|refusal| refusal.reason == reason)
}

/// A service that was probably meant.
fn suggestion(table: &RouteTable, step: Step, service: &str) -> Option<String> {
    if step == Step::Service { nearest(service, table.services()).map(str::to_owned) } else { None }
}

#[derive(Default)]
struct Steps {
    steps: Vec<CallStep>,
    refused: Option<(Refusal, Option<String>)>,
}

impl Steps {
    fn add(&mut self, name: &str, outcome: StepOutcome, detail: impl Into<String>) {
        self.steps.push(CallStep { name: name.to_owned(), outcome: outcome.into(), detail: detail.into() });
    }

    fn refuse(&mut self, name: &str, refusal: &Refusal, suggestion: Option<String>) {
        self.add(name, StepOutcome::Refuses, refusal.message.clone());
        self.refused = Some((refusal.clone(), suggestion));
    }

    /// What a later step is worth once one has refused.
    fn reached(&self) -> bool {
        self.refused.is_none()
    }

    fn guard(&mut self, reached: bool) {
        let (outcome, why) = if reached {
            (StepOutcome::Inactive, "this version has no guards; a plugin whose manifest names one is not loaded")
        } else {
            (StepOutcome::NotReached, "")
        };
        self.add("guard", outcome, why);
    }

    /// Connection, limit and breaker: what the broker asks of the provider itself, in its order.
    fn behind(&mut self, name: &str, figures: Option<&ProviderSnapshot>) {
        let Some(ProviderSnapshot { identity: _, ready, breaker, in_flight, limits, connected }) = figures else {
            let refusal = Refusal::new(
                Reason::ProviderNotReady,
                format!("plugin {name} is not ready: the broker is not connected to it"),
                format!("`plugvisor describe {name}` says what it waits for"),
            );
            self.refuse("connection", &refusal, None);
            self.add("limit", StepOutcome::NotReached, "");
            self.add("breaker", StepOutcome::NotReached, "");
            return;
        };
        if *ready {
            let how = if *connected { "connected" } else { "ready; the call makes the connection" };
            self.add("connection", StepOutcome::Passes, how);
        } else {
            let refusal = Refusal::new(
                Reason::ProviderNotReady,
                format!("plugin {name} is not ready: it does not say that it is serving, or is draining"),
                format!("`plugvisor describe {name}` says what it waits for"),
            );
            self.refuse("connection", &refusal, None);
        }
        let load = format!("{in_flight} of {} calls in flight", limits.max_concurrent);
        if !self.reached() {
            self.add("limit", StepOutcome::NotReached, "");
        } else if *in_flight >= limits.max_concurrent {
            let message = format!("plugin {name} has {in_flight} calls in flight, its limit");
            let hint = "try again later, or make fewer calls at once";
            self.refuse("limit", &Refusal::new(Reason::Overloaded, message, hint), None);
        } else {
            self.add("limit", StepOutcome::Passes, load);
        }
        let window = breaker.window;
        let mut counts = format!("{} of {} recent calls failed", window.failed, window.calls);
        if breaker.consecutive_failures > 0 {
            let _ = write!(counts, ", the last {} in a row", breaker.consecutive_failures);
        }
        match breaker.position {
            _ if !self.reached() => self.add("breaker", StepOutcome::NotReached, ""),
            Position::Closed => self.add("breaker", StepOutcome::Passes, format!("closed; {counts}")),
            Position::HalfOpen => {
                self.add("breaker", StepOutcome::Passes, "half open: a few calls are let through to find out");
            }
            // The open time is over: the next call half-opens it.
            Position::Open if breaker.retry_after.is_zero() => {
                self.add(
                    "breaker",
                    StepOutcome::Passes,
                    "open, and its time is over: this call would be the first again",
                );
            }
            Position::Open => {
                let wait = breaker.retry_after.as_secs_f64().max(0.1);
                let refusal = Refusal::new(
                    Reason::BreakerOpen,
                    format!("calls to plugin {name} are refused after too many failures"),
                    format!(
                        "wait {wait:.1} s, or `plugvisor breaker reset {name}`; `plugvisor logs {name}` says why it failed"
                    ),
                );
                self.refuse("breaker", &refusal, None);
            }
        }
    }

    /// Whether the provider's descriptors have the method. The broker does not look: the provider would answer.
    fn method(&mut self, view: &PluginView, service: &str, method: &str) {
        if method.is_empty() {
            return;
        }
        let set = view.bundle.as_ref().and_then(|bundle| bundle.descriptor_set.as_deref());
        let methods = set.and_then(|set| method_names(set, service).ok().flatten());
        let (outcome, detail) = match methods {
            None => {
                (StepOutcome::Skipped, "its bundle has no descriptors of the service; the provider decides".to_owned())
            }
            Some(methods) if methods.iter().any(|known| known == method) => {
                (StepOutcome::Passes, format!("{method} is in the provider's descriptors"))
            }
            Some(methods) => {
                let meant = nearest(method, methods.iter().map(String::as_str));
                let refusal = Refusal::new(
                    Reason::UnknownService,
                    format!("{} has no method {service}/{method}", view.name),
                    match meant {
                        Some(meant) => format!("did you mean {service}/{meant}?"),
                        None => format!("its methods are {}", methods.join(", ")),
                    },
                );
                if self.reached() {
                    return self.refuse("method", &refusal, None);
                }
                (StepOutcome::NotReached, refusal.message)
            }
        };
        self.add("method", outcome, detail);
    }

    fn finish(self, provider: &str) -> ExplainCallResponse {
        let Self { steps, refused } = self;
        let allowed = refused.is_none();
        let (reason, message, hint) = match refused {
            None => Default::default(),
            Some((Refusal { reason, message, hint, hint_for_caller: _ }, suggestion)) => {
                let hint = suggestion.map_or(hint, |meant| format!("did you mean {meant}?"));
                (reason.as_str().to_owned(), message, hint)
            }
        };
        ExplainCallResponse { steps, allowed, provider: provider.to_owned(), reason, message, hint }
    }
}
