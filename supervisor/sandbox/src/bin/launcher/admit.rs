//! Whether a bundle may be launched as it was asked: it is in the store, it is this plugin's, and the walls are those of
//! its tier and of its manifest.

use std::{os::fd::OwnedFd, path::PathBuf, time::SystemTime};

use plugvisor_package::{Digest, PluginName};
use plugvisor_sandbox::protocol::{Launch, Refusal, RefusalCode, Tier};

use crate::{
    check::{self, Asked, Checked, refuse},
    directories::{self, Roots},
    launch::Launcher,
    level::Walls,
    store::{Asking, Bundle, WritableCode},
};

/// A bundle that may be launched.
pub(crate) struct Admitted {
    /// Its directory, open.
    pub(crate) directory: OwnedFd,
    /// Where that is.
    pub(crate) path: PathBuf,
    /// What is executed, as its manifest says.
    pub(crate) checked: Checked,
    /// What its files have in bytes, and how many there are.
    pub(crate) bytes: u64,
    pub(crate) files: usize,
}

impl Launcher {
    pub(crate) fn admit(&mut self, request: &Launch, plugin: &PluginName, walls: Walls) -> Result<Admitted, Refusal> {
        let named = Digest::from_bytes(request.bundle);
        let lasting = !self.privileged() || self.uids.last();
        let bundle = self.store.use_bundle(&request.bundle)?;
        // The manifest is part of the digest: no content is launched under another plugin's name and uid.
        if bundle.name != *plugin {
            return refuse(
                RefusalCode::Policy,
                format!("{plugin} was not started: the bundle {named} is {}, and no other plugin", bundle.name),
            );
        }
        within(request, plugin, bundle)?;
        writable_code(request, plugin, bundle, walls)?;
        let now = SystemTime::now();
        let tier = self.policy.tier(plugin, &request.bundle, &bundle.origins, request.approval.as_ref(), now)?;
        let tier = claimed(tier, bundle);
        self.policy.check_level(plugin, named, tier, request.level, bundle.doubt.as_ref(), now)?;
        self.policy.check_tier(plugin, named, tier, request.tier, bundle.doubt.as_ref(), now)?;
        of_name(request, plugin, named, tier)?;
        directories::check(request, Roots::of(&self.options), lasting)?;
        self.policy.check_environment(plugin, &request.environment)?;
        let checked = check::program(plugin, &Asked::of(request), &bundle.stated, walls)?;
        let (path, bytes, files) = (bundle.path().to_owned(), bundle.bytes, bundle.files.len());
        match bundle.open() {
            Ok(directory) => Ok(Admitted { directory, path, checked, bytes, files }),
            Err(error) => refuse(
                RefusalCode::Kernel,
                format!("{plugin} was not started: its bundle in the store cannot be opened: {error}"),
            ),
        }
    }
}

/// The tier, which is never above what the manifest claims.
pub(crate) fn claimed(tier: Tier, bundle: &Bundle) -> Tier {
    bundle.stated.tier.map_or(tier, |claim| claim.min(tier))
}

/// Whether the request keeps within what the manifest fixes.
fn within(request: &Launch, plugin: &PluginName, bundle: &Bundle) -> Result<(), Refusal> {
    if let Some(least) = bundle.stated.level.filter(|least| request.level < *least) {
        return refuse(
            RefusalCode::Policy,
            format!(
                "{plugin} was not started: its manifest asks for the level {least:?} at least, and {:?} is weaker",
                request.level
            ),
        );
    }
    let stated = bundle.stated.grants();
    match request.grants.iter().find(|grant| !stated.contains(grant)) {
        Some(grant) => refuse(
            RefusalCode::Policy,
            format!(
                "{plugin} was not started: its manifest does not ask for {grant:?}; add it to security.capabilities"
            ),
        ),
        None => Ok(()),
    }
}

/// Whether it is given nothing of its name that it was not approved under. Whoever can have bundles imported can give one
/// any name, and what belongs to a name is not theirs.
fn of_name(request: &Launch, plugin: &PluginName, bundle: Digest, tier: Tier) -> Result<(), Refusal> {
    match request.grants.iter().find(|grant| grant.is_of_name() && tier <= Tier::Untrusted) {
        Some(grant) => refuse(
            RefusalCode::Policy,
            format!(
                "{plugin} was not started: to the launcher its bundle {bundle} is untrusted, and {grant:?} gives what \
                 belongs to the name {plugin} to bundles that were approved under it alone; put it into a plugin directory \
                 that has a tier, let the launcher's administrator approve it, or take the grant back"
            ),
        ),
        None => Ok(()),
    }
}

/// Whether its files ask for nothing that the level denies and that nothing could deny once they are executed.
fn writable_code(request: &Launch, plugin: &PluginName, bundle: &Bundle, walls: Walls) -> Result<(), Refusal> {
    let (file, by) = match &bundle.writable_code {
        WritableCode::Asked { file, by } if walls.no_write_exec => (file, by),
        WritableCode::Asked { .. } | WritableCode::None => return Ok(()),
    };
    // The kernel makes that memory before the program runs: no rule on memory sees it.
    let (asks, fix) = match by {
        Asking::Stack => (
            "a stack that can be executed, or does not say that it needs none (PT_GNU_STACK)",
            "link it with -z noexecstack",
        ),
        Asking::Segment => (
            "a segment of code that is writable or longer in memory than in the file (PT_LOAD)",
            "link it with -z separate-code, without -N and --omagic",
        ),
    };
    refuse(
        RefusalCode::Policy,
        format!(
            "{plugin} was not started: its file {file:?} asks for {asks}, and {} allows no memory that is written and \
             executed; {fix}",
            request.level.as_str()
        ),
    )
}
