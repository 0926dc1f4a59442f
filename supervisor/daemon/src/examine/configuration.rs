//! Whether a configuration would do what it says: the file itself, the places that it names, and the settings of each plugin
//! beside what its manifest says.
//!
//! A problem keeps the supervisor, or the plugin that it is about, from starting. A warning is what has no effect.

use std::{collections::BTreeSet, sync::Arc};

use plugvisor_core::{Error, policy::Verdict};
use plugvisor_package::{Bundle, Capability, IsolationLevel, PluginName, nearest};
use plugvisor_proto::admin::v1::{ConfigurationCheck, ConfigurationProblem};
use plugvisor_sandbox::protocol::Grant;

use super::{at, configured, shown};
use crate::{
    config::{Config, PluginConfig, Problem, Surroundings},
    discovery::{PluginDirectory, Source},
    driver::{InVain, decide, in_vain, ungiven},
    privileges,
    start::Args,
};

/// Everything that is wrong or idle.
pub(super) fn check(args: &Args) -> ConfigurationCheck {
    let surroundings = Surroundings::of_process();
    let (config, mut problems) = match configured(args, &surroundings) {
        Ok(read) => read,
        Err(error) => {
            let place = Config::without_file(&surroundings).place().to_string();
            let file = args.config.as_ref().map_or(place, |file| file.display().to_string());
            let unreadable = ConfigurationProblem { message: error.to_string(), ..ConfigurationProblem::default() };
            return ConfigurationCheck { file, problems: vec![unreadable], ..ConfigurationCheck::default() };
        }
    };
    let mut look = Look { config: &config, refused: Vec::new(), warnings: Vec::new() };
    let mut names = BTreeSet::new();
    for directory in &config.directories {
        let found = PluginDirectory::open(directory).and_then(|directory| Arc::new(directory).look());
        match found {
            Ok(found) => {
                for source in &found.candidates {
                    // As its manifest says, or its directory when that says nothing.
                    let Ok(bundle) = source.open() else {
                        names.insert(source.name().to_owned());
                        continue;
                    };
                    look.at_bundle(source, &bundle);
                    names.insert(bundle.manifest.name.to_string());
                }
            }
            Err(error) => problems.push(at(&config, format!("directory[{}].path", directory.index), &error)),
        }
    }
    if surroundings.uid == 0
        && let Err(error) = privileges::find(&config.supervisor.user)
    {
        problems.push(at(&config, "supervisor.user".to_owned(), &error));
    }
    let Look { config: _, refused, mut warnings } = look;
    for name in config.plugins.keys().map(ToString::to_string).filter(|name| !names.contains(name)) {
        let suggestion = nearest(&name, names.iter().map(String::as_str)).map(str::to_owned);
        let idle = "no plugin of this name is in a plugin directory, so it has no effect";
        warnings.push(Problem { suggestion, ..at(&config, format!("plugin.{name}"), &idle) });
    }
    // What a supervisor would go by: it starts, whatever becomes of single plugins.
    let shown = problems.is_empty().then(|| shown(&config));
    problems.extend(refused);
    problems.sort_by_key(|problem| problem.line);
    ConfigurationCheck {
        file: config.file.as_ref().map(|file| file.display().to_string()).unwrap_or_default(),
        problems: problems.into_iter().map(wire).collect(),
        configuration: shown,
        warnings: warnings.into_iter().map(wire).collect(),
    }
}

fn wire(problem: Problem) -> ConfigurationProblem {
    let Problem { line, key, message, suggestion } = problem;
    let line = u32::try_from(line).unwrap_or(u32::MAX);
    ConfigurationProblem { line, key, message, suggestion: suggestion.unwrap_or_default() }
}

/// What is found about plugins.
struct Look<'a> {
    config: &'a Config,
    /// What keeps a plugin from being started.
    refused: Vec<Problem>,
    warnings: Vec<Problem>,
}

impl Look<'_> {
    fn at_bundle(&mut self, source: &Source, bundle: &Bundle) {
        let (name, place) = (&bundle.manifest.name, self.config.place());
        let settings = self.config.plugin(name);
        // One that never runs is told of when it is loaded; its settings are as good as any.
        let Ok((_, verdict)) = decide(source, bundle, &settings, &place) else { return };
        if let Some(error) = ungiven(name, &verdict, &settings, &place) {
            self.refuse(format!("plugin.{name}.env"), &error);
        }
        self.walls(name, &verdict);
        self.serving(name, bundle, &settings, &verdict);
    }

    fn refuse(&mut self, key: String, Error { message, hint, .. }: &Error) {
        self.refused.push(at(self.config, key, &format!("{message}; {hint}")));
    }

    /// In the host's own network nothing holds what a plugin connects to or who connects to it; the launcher refuses.
    fn walls(&mut self, name: &PluginName, verdict: &Verdict) {
        let network =
            |capability: &Capability| matches!(Grant::of(*capability), Some(Grant::Egress | Grant::TcpServer));
        let Some(granted) = verdict.granted().iter().find(network) else { return };
        if verdict.level == IsolationLevel::None {
            let why = format!(
                "plugin {name} runs at the level none, in the host's network, and is not started with {granted}; take it back \
                 from its grants, or have its plugin.json ask for the level process"
            );
            self.refused.push(at(self.config, format!("plugin.{name}.grants"), &why));
        }
    }

    fn serving(&mut self, name: &PluginName, bundle: &Bundle, settings: &PluginConfig, verdict: &Verdict) {
        let (listen, ports) = (&settings.network.listen, &bundle.manifest.runtime.listen);
        let table = format!("plugin.{name}.network.listen");
        let in_vain = in_vain(&bundle.manifest, verdict, settings, &self.config.place());
        for InVain { index, key, error } in &in_vain {
            self.refuse(format!("{table}[{index}].{key}"), error);
        }
        if in_vain.iter().any(|in_vain| in_vain.key == "address") {
            return;
        }
        let port_names = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        let lack = verdict.rights.lack(Capability::TcpServer);
        let why = match (ports.is_empty(), lack.not_asked, verdict.rights.hold(Capability::TcpServer)) {
            (true, false, _) if listen.is_empty() => {
                "it asks for network:tcp-server, and can listen at no port before runtime.network.listen in its plugin.json \
                 lists it"
                    .to_owned()
            }
            (false, _, false) => {
                format!("it cannot listen at {port_names} without network:tcp-server: {}; {}", lack.why(), lack.hint(name.as_str()))
            }
            (false, _, true) if listen.is_empty() => {
                format!("nobody reaches it at {port_names}: no [[{table}]] leads there")
            }
            _ => return,
        };
        self.warnings.push(at(self.config, format!("plugin.{name}"), &why));
    }
}
