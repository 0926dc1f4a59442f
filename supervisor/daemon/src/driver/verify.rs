//! The verify phase: a bundle is read, judged, and shown.

use std::{os::fd::AsFd as _, sync::Arc};

use plugvisor_core::{
    Code, Error, Generation,
    event::{PluginEvent, SecurityEvent},
    lifecycle::{Failure, Phase},
    policy::{Policy, Verdict, WhyNot},
};
use plugvisor_package::{Approval, Bundle, Capability, Manifest, PluginName, TrustTier, VariableName};

use super::{
    BundleInfo, Driver, Inward, PluginView,
    load::{failed, permanent, transient},
    settings,
};
use crate::{
    config::{ListenConfig, PluginConfig},
    discovery::{Rejection, Source},
    launcher::BundleFiles,
};

/// A bundle that may be launched.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) info: Arc<BundleInfo>,
    pub(super) files: Arc<BundleFiles>,
    pub(super) verdict: Arc<Verdict>,
    /// What its directory gives it.
    pub(super) directory_tier: TrustTier,
    /// What an administrator signed that gives it more.
    pub(super) approval: Option<Approval>,
}

/// What of a bundle outlives its descriptors.
pub(super) fn info(bundle: &Bundle) -> BundleInfo {
    BundleInfo {
        manifest: bundle.manifest.clone(),
        digest: bundle.digest,
        services: bundle.services.clone(),
        descriptor_set: bundle.descriptor_set.clone(),
    }
}

impl Driver {
    pub(super) fn begin_verify(&mut self, generation: Generation) {
        let (found, source, name) = (self.found.take(), self.source.clone(), self.name.clone());
        let (config, place) = (self.config.clone(), Arc::clone(&self.shared.place));
        self.spawn(generation, async move {
            // Reading and hashing block.
            let verified = tokio::task::spawn_blocking(move || verify(found, &source, &name, &config, &place)).await;
            Some(match verified {
                Ok(Ok(verified)) => Inward::Verified(generation, Box::new(verified)),
                Ok(Err(failure)) => failed(generation, Phase::Verify, failure),
                Err(panic) => {
                    let error = Error::new(Code::Bug, format!("reading the bundle: {panic}"), "report this as a bug");
                    failed(generation, Phase::Verify, permanent(error))
                }
            })
        });
    }

    /// Shows what verification found.
    pub(super) async fn verified(&mut self) {
        let Some(verified) = self.run.as_ref().and_then(|run| run.verified.as_ref()) else { return };
        let (info, verdict) = (Arc::clone(&verified.info), Arc::clone(&verified.verdict));
        self.emit(PluginEvent::Validated { version: info.manifest.version.to_string(), digest: info.digest });
        self.emit(SecurityEvent::TrustAssessed { tier: verdict.tier.as_str(), level: verdict.level.as_str() });
        let mut denied = 0;
        for capability in &verdict.capabilities {
            let name = capability.capability.as_str();
            match capability.why_not {
                None => self.emit(SecurityEvent::CapabilityGranted { capability: name }),
                // The operator gave more than was asked for: shown in the description, denied to nobody.
                Some(WhyNot::NotAsked) => {}
                Some(why) => {
                    denied += 1;
                    let hint = verdict.rights.lack(capability.capability).hint(self.name.as_str());
                    self.emit(SecurityEvent::CapabilityDenied { capability: name, why: why.describe(), hint });
                }
            }
        }
        self.view.send_modify(|view| {
            let view: &mut PluginView = Arc::make_mut(view);
            view.bundle = Some(info);
            view.verdict = Some(verdict);
            view.figures.capabilities_denied += denied;
        });
    }
}

fn verify(
    found: Option<Bundle>,
    source: &Source,
    name: &PluginName,
    config: &PluginConfig,
    place: &Arc<str>,
) -> Result<Verified, Failure> {
    let bundle = match found {
        Some(bundle) => bundle,
        None => source.open().map_err(|Rejection { error, problems: _ }| permanent(error))?,
    };
    if bundle.manifest.name != *name {
        let message = format!("the bundle {} now bears the name {}", source.path().display(), bundle.manifest.name);
        let hint = format!("give it back the name {name}, or restart plugvisord");
        return Err(permanent(Error::new(Code::ManifestInvalid, message, hint)));
    }
    if let Some(error) =
        joined(bundle.manifest.unsupported().into_iter().map(|field| {
            Error::new(Code::ManifestUnsupported, format!("{}: {}", field.path, field.message), field.hint)
        }))
    {
        return Err(permanent(error));
    }
    let directory_tier = source.tier();
    let (approval, verdict) = decide(source, &bundle, config, place).map_err(permanent)?;
    let ungiven = ungiven(name, &verdict, config, place);
    let in_vain = in_vain(&bundle.manifest, &verdict, config, place).into_iter().next();
    if let Some(error) = joined(ungiven.into_iter().chain(in_vain.map(|in_vain| in_vain.error))) {
        return Err(permanent(error));
    }
    let read = |error: std::io::Error| {
        let hint = "raise the limit on open files of plugvisord";
        transient(Error::new(Code::InputOutput, format!("the bundle of {name}: {error}"), hint))
    };
    let directory = bundle.directory().as_fd().try_clone_to_owned().map_err(read)?;
    let info = Arc::new(info(&bundle));
    let files = BundleFiles { digest: bundle.digest, files: bundle.files, directory };
    Ok(Verified { info, files: Arc::new(files), verdict: Arc::new(verdict), directory_tier, approval })
}

/// What a plugin of this bundle gets, and the approval that gives it its tier, if one does.
///
/// # Errors
///
/// Why it never runs.
pub(crate) fn decide(
    source: &Source,
    bundle: &Bundle,
    config: &PluginConfig,
    place: &Arc<str>,
) -> Result<(Option<Approval>, Verdict), Error> {
    let name = &bundle.manifest.name;
    let approval = approval(source, name, bundle);
    let tier = approval.as_ref().map_or(source.tier(), |approval| approval.tier);
    let asked = settings::asked(&bundle.manifest);
    let operator = settings::operator(tier, source.grants(), config, place);
    Ok((approval, Policy::default().decide(name, &asked, &operator)?))
}

/// The approval beside the bundle, when it is for this content and gives more than the directory does. A quarantined
/// directory stays one.
fn approval(source: &Source, name: &PluginName, bundle: &Bundle) -> Option<Approval> {
    let found = match source.approval() {
        Ok(found) => found?,
        Err(why) => {
            // Debug, because the text quotes what somebody wrote.
            tracing::warn!(plugin = %name, ?why, "the approval beside the bundle is no approval, and gives nothing");
            return None;
        }
    };
    if found.name != *name || found.digest != bundle.digest {
        tracing::warn!(
            plugin = %name, digest = %bundle.digest, approved_name = %found.name, approved_digest = %found.digest,
            "the approval beside the bundle is for another name or content, and gives nothing; approve it again with \
             `plugvisor approve`"
        );
        return None;
    }
    let more = source.tier() != TrustTier::Quarantined && found.tier > source.tier();
    more.then_some(found)
}

/// Why variables that the operator set for it cannot be given to it. Left out they would be missed without a word.
pub(crate) fn ungiven(name: &PluginName, verdict: &Verdict, config: &PluginConfig, place: &str) -> Option<Error> {
    let set = config.environment.keys().chain(&config.unset);
    let set: Vec<&str> = set.map(VariableName::as_str).collect();
    let lack = verdict.rights.lack(Capability::AccessEnv);
    if set.is_empty() || verdict.rights.hold(Capability::AccessEnv) {
        return None;
    }
    Some(Error::new(
        Code::ConfigurationInvalid,
        format!(
            "{place} sets the variables {} for plugin {name}, which may not see them without {}: {}",
            set.join(", "),
            lack.capability,
            lack.why()
        ),
        format!("{}; or remove env and pass_env from [plugin.{name}]", lack.hint(name.as_str())),
    ))
}

/// An address that the operator set for a plugin, and why it leads to nobody. It would be connected to in vain.
#[derive(Debug)]
pub(crate) struct InVain {
    /// Which `[[plugin.NAME.network.listen]]` it is, counted from 0.
    pub(crate) index: usize,
    /// What of it does not fit: `address` or `port`.
    pub(crate) key: &'static str,
    /// Why, and what to do.
    pub(crate) error: Error,
}

/// The addresses that lead to nobody: none may lead to the plugin, or its manifest does not list the port.
pub(crate) fn in_vain(manifest: &Manifest, verdict: &Verdict, config: &PluginConfig, place: &str) -> Vec<InVain> {
    let served = verdict.rights.hold(Capability::TcpServer);
    let all = config.network.listen.iter().enumerate();
    let wrong = all.filter_map(|(index, listen)| {
        if !served {
            return Some(InVain { index, key: "address", error: unserved(&manifest.name, verdict, listen, place) });
        }
        Some(InVain { index, key: "port", error: unlisted(manifest, listen, place)? })
    });
    wrong.collect()
}

fn unserved(name: &PluginName, verdict: &Verdict, listen: &ListenConfig, place: &str) -> Error {
    let lack = verdict.rights.lack(Capability::TcpServer);
    Error::new(
        Code::ConfigurationInvalid,
        format!(
            "{place} has {} lead to plugin {name}, which may serve nobody without {}: {}",
            listen.address,
            lack.capability,
            lack.why()
        ),
        format!("{}; or remove [[plugin.{name}.network.listen]]", lack.hint(name.as_str())),
    )
}

fn unlisted(manifest: &Manifest, listen: &ListenConfig, place: &str) -> Option<Error> {
    let name = &manifest.name;
    let wrong = listen.unlisted(manifest)?;
    Some(Error::new(
        Code::ConfigurationInvalid,
        format!("{place}: {wrong}"),
        format!("set port in [[plugin.{name}.network.listen]] to one of them, or have its author list this one"),
    ))
}

/// Several errors as one: the first one's code, everyone's text.
fn joined(errors: impl IntoIterator<Item = Error>) -> Option<Error> {
    errors.into_iter().reduce(|mut all, next| {
        for (all, next) in [(&mut all.message, next.message), (&mut all.hint, next.hint)] {
            all.push_str("; ");
            all.push_str(&next);
        }
        all
    })
}
