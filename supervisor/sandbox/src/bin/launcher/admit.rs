//! Whether a bundle may be launched as it was asked: it is in the store, it is this plugin's, and the walls are those of
//! its tier.

use std::{os::fd::OwnedFd, path::PathBuf};

use plugvisor_package::{Digest, PluginName};
use plugvisor_sandbox::protocol::{Launch, Refusal, RefusalCode};

use crate::{check::refuse, launch::Launcher};

impl Launcher {
    /// The bundle's directory, open, and where it is.
    pub(crate) fn admit(&mut self, request: &Launch, plugin: &PluginName) -> Result<(OwnedFd, PathBuf), Refusal> {
        let named = Digest::from_bytes(request.bundle);
        let bundle = self.store.use_bundle(&request.bundle)?;
        // The manifest is part of the digest: no content is launched under another plugin's name and uid.
        if bundle.name != *plugin {
            return refuse(
                RefusalCode::Policy,
                format!("{plugin} was not started: the bundle {named} is {}, and no other plugin", bundle.name),
            );
        }
        if bundle.executable(&request.entry).is_none() {
            let entry: String = request.entry.chars().take(200).collect();
            return refuse(
                RefusalCode::Entry,
                format!("{plugin} was not started: its bundle has no executable file {entry:?}; correct the bundle"),
            );
        }
        let tier = self.policy.tier(plugin, &request.bundle, &bundle.origins, request.approval.as_ref())?;
        self.policy.check_level(plugin, named, tier, request.level)?;
        let path = bundle.path().to_owned();
        match bundle.open() {
            Ok(directory) => Ok((directory, path)),
            Err(error) => refuse(
                RefusalCode::Kernel,
                format!("{plugin} was not started: its bundle in the store cannot be opened: {error}"),
            ),
        }
    }
}
