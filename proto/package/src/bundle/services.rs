//! The services of a bundle by their full names.
//!
//! The manifest may name a service without its package; the descriptor set says what is meant. This module knows the two
//! lists of names and nothing of files.

use std::collections::BTreeSet;

use crate::{
    CrossPluginService, Manifest, ManifestLimits, Problems,
    json::At,
    problem::{Findings, did_you_mean},
};

/// The services of a bundle by their full names, each list sorted and without repetition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Services {
    /// What the process serves (`module.providers`).
    pub provided: Vec<String>,
    /// What others may call (`module.exports`).
    pub exported: Vec<String>,
    /// What the gateway will offer (`module.controllers`).
    pub controllers: Vec<String>,
    /// What other plugins may call under conditions; `service_name` is the full name here.
    pub cross_plugin: Vec<CrossPluginService>,
}

impl Services {
    /// Resolves the names in a manifest against the services of its descriptor set; `None` when the bundle has none, and
    /// then only full names will do.
    ///
    /// # Errors
    ///
    /// Every name that means no service or several, and every service that is offered and not among the providers.
    pub fn resolve(manifest: &Manifest, known: Option<&[String]>, limits: &ManifestLimits) -> Result<Self, Problems> {
        let mut resolver = Resolver { known, findings: Findings::new(limits.problems), most: limits.items };
        let module = At::Key(&At::Root, "module");
        let provided = resolver.list(&manifest.module.providers, At::Key(&module, "providers"), None);
        let offered = Some(&provided);
        let exported = resolver.list(&manifest.module.exports, At::Key(&module, "exports"), offered);
        let controllers = resolver.list(&manifest.module.controllers, At::Key(&module, "controllers"), offered);
        let at = At::Key(&module, "crossPluginServices");
        let mut cross_plugin = Vec::new();
        for (index, service) in manifest.module.cross_plugin_services.iter().enumerate() {
            let at = At::Index(&at, index);
            let name = resolver.name(&service.service_name, At::Key(&at, "serviceName"), offered);
            cross_plugin.extend(name.map(|service_name| CrossPluginService { service_name, ..service.clone() }));
        }
        resolver.findings.into_result()?;
        let sorted = |names: BTreeSet<String>| names.into_iter().collect();
        Ok(Self {
            exported: sorted(exported),
            controllers: sorted(controllers),
            cross_plugin,
            provided: sorted(provided),
        })
    }
}

struct Resolver<'a> {
    known: Option<&'a [String]>,
    findings: Findings,
    most: usize,
}

impl Resolver<'_> {
    fn list(&mut self, names: &[String], at: At<'_>, offered: Option<&BTreeSet<String>>) -> BTreeSet<String> {
        let mut list = BTreeSet::new();
        for (index, name) in names.iter().enumerate().take(self.most) {
            let at = At::Index(&at, index);
            if let Some(full) = self.name(name, at, offered)
                && !list.insert(full.clone())
            {
                let message = format!("{full} stands in the list already");
                self.findings.add(at, message, Some("remove one of them".to_owned()));
            }
        }
        list
    }

    fn name(&mut self, name: &str, at: At<'_>, offered: Option<&BTreeSet<String>>) -> Option<String> {
        let full = self.full(name, at)?;
        if let Some(offered) = offered
            && !offered.contains(&full)
        {
            let suggestion = format!("add {full:?} to module.providers");
            self.findings.add(
                at,
                format!("{full} is offered, but the plugin does not say that it serves it"),
                Some(suggestion),
            );
            return None;
        }
        Some(full)
    }

    fn full(&mut self, name: &str, at: At<'_>) -> Option<String> {
        let Some(known) = self.known else {
            if name.contains('.') {
                return Some(name.to_owned());
            }
            let suggestion = "write package.Service, or add a descriptor set to the bundle".to_owned();
            let message = format!("{name:?} has no package, and the bundle has no descriptor set to find it in");
            self.findings.add(at, message, Some(suggestion));
            return None;
        };
        if known.iter().any(|service| service == name) {
            return Some(name.to_owned());
        }
        let last = |service: &str| service.rsplit('.').next().map(str::to_owned);
        let meant: Vec<&String> = match name.contains('.') {
            true => Vec::new(),
            false => known.iter().filter(|service| last(service).as_deref() == Some(name)).collect(),
        };
        match meant.as_slice() {
            [one] => return Some((*one).clone()),
            [] => {
                let near = did_you_mean(name, known.iter().map(String::as_str));
                let suggestion =
                    near.or_else(|| Some("write the descriptor set anew if the service is new".to_owned()));
                self.findings.add(at, format!("the descriptor set has no service {name}"), suggestion);
            }
            several => {
                let names: Vec<&str> = several.iter().take(8).map(|service| service.as_str()).collect();
                let suggestion = format!("write one of {}", names.join(", "));
                self.findings.add(
                    at,
                    format!("{name:?} means {} services of the descriptor set", several.len()),
                    Some(suggestion),
                );
            }
        }
        None
    }
}
