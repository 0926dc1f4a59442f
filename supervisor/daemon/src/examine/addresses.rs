//! Addresses where others reach plugins, and those that lead to nobody: what the operator set beside what each plugin's
//! manifest says, judged as a load judges it.

use std::{collections::BTreeMap, path::Path};

use plugvisor_core::Error;
use plugvisor_package::PluginName;
use plugvisor_proto::admin::v1::HostPlace;

use super::place;
use crate::{
    config::{Config, ListenConfig},
    discovery::Source,
    driver::{decide, in_vain},
    ingress,
};

/// Every address of the configuration. Where no supervisor runs each is tried. Blocks.
pub(super) fn places(config: &Config, sources: &[Source], running: bool) -> Vec<HostPlace> {
    let in_vain = all_in_vain(config, sources);
    let mut places = Vec::new();
    for (plugin, settings) in &config.plugins {
        for (index, listen) in settings.network.listen.iter().enumerate() {
            let ListenConfig { address, port, max_connections, .. } = listen;
            let trouble = match in_vain.get(&(plugin, index)) {
                Some(Error { message, hint, .. }) => Some((message.clone(), hint.clone())),
                None if running => None,
                None => ingress::try_address(*address).err(),
            };
            let leads = format!("leads to port {port} of plugin {plugin}, {max_connections} connections at most");
            places.push(place("address", Path::new(&address.to_string()), &leads, trouble));
        }
    }
    places
}

/// By the plugin and the index of the address. A bundle that cannot be read, or never runs, is told of when it is loaded.
fn all_in_vain<'a>(config: &'a Config, sources: &[Source]) -> BTreeMap<(&'a PluginName, usize), Error> {
    let mut found = BTreeMap::new();
    if config.plugins.values().all(|settings| settings.network.listen.is_empty()) {
        return found;
    }
    let place = config.place();
    for source in sources {
        let Ok(bundle) = source.open() else { continue };
        let Some((plugin, settings)) = config.plugins.get_key_value(&bundle.manifest.name) else { continue };
        let Ok((_, verdict)) = decide(source, &bundle, settings, &place) else { continue };
        let in_vain = in_vain(&bundle.manifest, &verdict, settings, &place).into_iter();
        found.extend(in_vain.map(|in_vain| ((plugin, in_vain.index), in_vain.error)));
    }
    found
}
