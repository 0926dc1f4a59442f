//! What a bundle may be to the launcher: its tier, and the weakest walls for that tier.
//!
//! The supervisor's word counts for nothing here. A tier comes from the directory that a bundle's files were imported
//! from (what the starter wrote on the command line), from an entry of the administrator's policy file, or from a
//! signature by a key that stands there; whatever has none of them is untrusted. This module knows no store.

mod raw;
mod rules;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use ed25519_dalek::Signature;
use plugvisor_package::{Digest, PluginName, TrustTier, VariableName};
use plugvisor_sandbox::{
    options::{BundleRoot, Options, Variable},
    protocol::{Approval, Level, PolicyFile, Refusal, RefusalCode, Tier, approval_text},
    tables::Problem,
};
use rustix::fs::{Mode, OFlags};

pub(crate) use self::rules::required;
use self::rules::{Approved, Rules, Wall, parse};
use crate::{
    check::refuse,
    expiry::Expiry,
    machine,
    store::{self, Doubt},
};

const MOST_BYTES: u64 = 1 << 20;

/// Problems of the file that are told; the others are counted. What is told fits a packet to the supervisor.
const MOST_TOLD: usize = 32;

/// Characters of each.
const MOST_CHARACTERS: usize = 400;

/// The policy of one launcher.
pub(crate) struct Policy {
    roots: Vec<BundleRoot>,
    /// Those that the starter wrote on the command line.
    variables: Vec<Variable>,
    file: Option<PathBuf>,
    /// What the file said, and which file that was.
    read: Option<(Stamp, Rules)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

/// Whether something that may expire holds now.
fn holds(expires: Option<Expiry>, now: SystemTime) -> bool {
    expires.is_none_or(|expires| !expires.is_over(now))
}

impl Policy {
    /// Reads the file that the options name, and lets it replace what it may. An error names the fix.
    pub(crate) fn load(options: &mut Options) -> Result<Self, String> {
        let canonical = |root: &BundleRoot| {
            let path = fs::canonicalize(&root.path).ok()?;
            Some(BundleRoot { tier: root.tier, path })
        };
        let roots = options.bundle_roots.iter().filter_map(canonical).collect();
        let variables = options.variables.clone();
        let mut this = Self { roots, variables, file: options.policy.clone(), read: None };
        let rules = this.rules()?;
        if let Some(range) = &rules.uid_range {
            options.uids = range.clone();
        }
        if let Some(group) = &rules.cgroup_root {
            options.cgroup_root = group.clone();
        }
        for (root, of_file) in
            [(&mut options.config_root, &rules.config_root), (&mut options.data_root, &rules.data_root)]
        {
            // Links on the way to it are the administrator's; from here on none is followed.
            *root = of_file.as_ref().or(root.as_ref()).map(|path| resolved(path));
        }
        Ok(this)
    }

    /// The rules of the file as it is now.
    fn rules(&mut self) -> Result<&Rules, String> {
        let Some(path) = &self.file else {
            return Ok(&self
                .read
                .get_or_insert((Stamp { device: 0, inode: 0, size: 0, changed: (0, 0) }, Rules::default()))
                .1);
        };
        let stamp = stamp(path)?;
        match &self.read {
            Some((before, _)) if *before == stamp => {}
            _ => self.read = Some((stamp, read(path)?)),
        }
        self.read.as_ref().map(|(_, rules)| rules).ok_or_else(|| "the policy file was not read".to_owned())
    }

    /// The directories that have a tier.
    pub(crate) fn roots(&mut self) -> Result<BTreeSet<PathBuf>, Refusal> {
        let given: Vec<PathBuf> = self.roots.iter().map(|root| root.path.clone()).collect();
        let rules = self.rules().map_err(|why| refused(&why))?;
        Ok(given.into_iter().chain(rules.directory.iter().map(|directory| directory.path.clone())).collect())
    }

    /// The file as it is now, for whoever asks without a launch.
    pub(crate) fn state(&mut self) -> PolicyFile {
        let Some(path) = self.file.as_ref().map(|file| file.display().to_string()) else { return PolicyFile::Absent };
        match self.rules() {
            Ok(_) => PolicyFile::Usable { path },
            Err(why) => PolicyFile::Unusable { path, why },
        }
    }

    /// Refuses while the file cannot be used, whatever else is wrong.
    pub(crate) fn check_file(&mut self) -> Result<(), Refusal> {
        self.rules().map(drop).map_err(|why| refused(&why))
    }

    /// What machines are made of; `None` when the file does not say.
    pub(crate) fn machine(&mut self) -> Result<Option<machine::Settings>, Refusal> {
        let rules = self.rules().map_err(|why| refused(&why))?;
        Ok(rules.vm.clone())
    }

    /// Says which directories give no tier because others than root can change them. Asked at the start, for whoever
    /// reads what a starting launcher prints; what counts is asked anew at each import.
    pub(crate) fn shared_roots(&mut self) -> Vec<String> {
        let roots = self.roots().unwrap_or_default();
        let shared = roots.iter().filter_map(|root| store::check_root(root).err());
        shared.map(|doubt| format!("a plugin directory gives its bundles no tier: {doubt}")).collect()
    }

    /// The tier of a bundle that is to run under this name.
    pub(crate) fn tier(
        &mut self,
        name: &PluginName,
        bundle: &[u8; 32],
        origins: &BTreeSet<PathBuf>,
        approval: Option<&Approval>,
        now: SystemTime,
    ) -> Result<Tier, Refusal> {
        let roots = self.roots.clone();
        let rules = self.rules().map_err(|why| refused(&why))?;
        let entries = || rules.approved.iter().filter(|entry| entry.digest.as_bytes() == bundle);
        // Nothing outweighs this one, under whatever name.
        if entries().any(|entry| entry.tier == TrustTier::Quarantined) {
            return Ok(Tier::Quarantined);
        }
        let named = entries()
            .filter(|entry| entry.name == *name && holds(entry.expires, now))
            .map(|entry| Tier::from(entry.tier));
        // Directly in it: a directory deeper down is a part of a bundle, whatever it holds.
        let beneath = |root: &Path| origins.iter().any(|origin| origin.parent() == Some(root));
        let directories = rules.directory.iter().map(|directory| (&directory.path, Tier::from(directory.tier)));
        let directories = directories.chain(roots.iter().map(|root| (&root.path, root.tier)));
        let from = directories.filter(|(path, _)| beneath(path)).map(|(_, tier)| tier);
        let signed = approval.map(|approval| signed(rules, name, bundle, approval, now)).transpose()?;
        Ok(named.chain(from).chain(signed).max().unwrap_or(Tier::Untrusted))
    }

    /// Refuses a variable that neither the command line nor the file has for this plugin. A variable can make some program
    /// run other code, so that a supervisor which was taken over must not choose its name.
    pub(crate) fn check_environment(
        &mut self,
        name: &PluginName,
        environment: &[(String, String)],
    ) -> Result<(), Refusal> {
        if environment.is_empty() {
            return Ok(());
        }
        let (file, given) = (self.file.clone(), self.variables.clone());
        let rules = self.rules().map_err(|why| refused(&why))?;
        let of_file = rules.environment.iter().filter(|entry| entry.plugin == *name).flat_map(|entry| &entry.variables);
        let of_starter = given.iter().filter(|variable| variable.plugin == *name).map(|variable| &variable.name);
        let allowed: BTreeSet<&str> = of_file.chain(of_starter).map(VariableName::as_str).collect();
        let missing: Vec<&str> =
            environment.iter().map(|(name, _)| name.as_str()).filter(|name| !allowed.contains(name)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let file = file.map_or_else(
            || "a policy file (`version = 1`; plugvisord --launcher-policy FILE)".to_owned(),
            |file| file.display().to_string(),
        );
        refuse(
            RefusalCode::Policy,
            format!(
                "{name} was not started: the launcher's policy lets it have no variable {missing:?}; let the launcher's \
                 administrator write into {file} an [[environment]] entry with plugin = \"{name}\", variables = \
                 {missing:?}, or start a launcher that plugvisord starts itself again, with plugvisord"
            ),
        )
    }

    /// Refuses walls that are weaker than this tier's.
    pub(crate) fn check_level(
        &mut self,
        name: &PluginName,
        bundle: Digest,
        tier: Tier,
        level: Level,
        doubt: Option<&Doubt>,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let weakest = self.rules().map_err(|why| refused(&why))?.weakest.clone();
        let Some(least) = weakest.of(tier) else {
            return refuse(
                RefusalCode::Policy,
                format!(
                    "{name} was not started: its bundle {bundle} is quarantined; to run it all the same, the \
                     launcher's administrator takes that out of the launcher's policy file"
                ),
            );
        };
        if level >= least {
            return Ok(());
        }
        let enough = [Tier::Community, Tier::Verified, Tier::Internal]
            .into_iter()
            .find(|higher| *higher > tier && weakest.of(*higher).is_some_and(|least| level >= least));
        let needs = format!("that needs the level {}, not {}", least.as_str(), level.as_str());
        self.distrusted(name, bundle, tier, &needs, enough, doubt, now)
    }

    /// Refuses a launch whose supervisor counts on more trust than this: what it grants itself, it grants by that.
    pub(crate) fn check_tier(
        &mut self,
        name: &PluginName,
        bundle: Digest,
        tier: Tier,
        counted_on: Tier,
        doubt: Option<&Doubt>,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        if tier >= counted_on {
            return Ok(());
        }
        let counts = format!("the supervisor counts on {}", TrustTier::from(counted_on));
        self.distrusted(name, bundle, tier, &counts, Some(counted_on), doubt, now)
    }

    /// Says why a bundle has no higher tier than this, and what gives it `enough`.
    #[allow(clippy::too_many_arguments, reason = "each is one fact of the message")]
    fn distrusted(
        &mut self,
        name: &PluginName,
        bundle: Digest,
        tier: Tier,
        against: &str,
        enough: Option<Tier>,
        doubt: Option<&Doubt>,
        now: SystemTime,
    ) -> Result<(), Refusal> {
        let file = self.file.clone();
        let rules = self.rules().map_err(|why| refused(&why))?;
        let refused = |code, next: &str| {
            let tier = TrustTier::from(tier);
            refuse(code, format!("{name} was not started: to the launcher its bundle is {tier}, and {against}; {next}"))
        };
        // Where it came from is nearer to what is wrong than what an administrator could do instead.
        match doubt.filter(|_| tier == Tier::Untrusted) {
            None | Some(Doubt::Elsewhere | Doubt::Scattered) => {}
            Some(doubt) => return refused(RefusalCode::Directory, &format!("its directory gives no tier: {doubt}")),
        }
        let expired = |entry: &Approved| {
            entry.name == *name && entry.digest == bundle && entry.tier > tier.into() && !holds(entry.expires, now)
        };
        if rules.approved.iter().any(expired) {
            return refused(
                RefusalCode::Policy,
                "its [[approved]] entry in the launcher's policy file has expired: let the administrator look at the plugin \
                 again, and give the entry another expires",
            );
        }
        let next = enough.map_or_else(
            || "the launcher's policy allows this level to no tier".to_owned(),
            |enough| {
                let enough = TrustTier::from(enough);
                let file = file.map_or_else(
                    || "a policy file (`version = 1`; plugvisord --launcher-policy FILE)".to_owned(),
                    |file| file.display().to_string(),
                );
                format!(
                    "if you trust it, put it into a plugin directory of the tier {enough} and start plugvisord again, or \
                     let the launcher's administrator write into {file} an [[approved]] entry with name = \"{name}\", \
                     tier = \"{enough}\", digest = \"{bundle}\""
                )
            },
        );
        refused(RefusalCode::Policy, &next)
    }
}

/// Says to a supervisor, in one line, why the file cannot be used.
fn refused(why: &str) -> Refusal {
    let message = format!("the launcher cannot use its policy: {}", why.replace(":\n  ", ": ").replace("\n  ", "; "));
    Refusal { code: RefusalCode::PolicyFile, message }
}

/// A path without links, as far as it is there: its last component may be missing.
fn resolved(path: &Path) -> PathBuf {
    let whole = fs::canonicalize(path);
    whole.unwrap_or_else(|_| match (path.parent().map(fs::canonicalize), path.file_name()) {
        (Some(Ok(parent)), Some(name)) => parent.join(name),
        _ => path.to_owned(),
    })
}

/// The tier of a signed approval.
fn signed(
    rules: &Rules,
    name: &PluginName,
    bundle: &[u8; 32],
    approval: &Approval,
    now: SystemTime,
) -> Result<Tier, Refusal> {
    let Approval { tier, key, signature } = approval;
    let wrong = |why: &str, fix: &str| {
        let key: String = key.chars().take(64).collect();
        refuse(
            RefusalCode::Approval,
            format!(
                "{name} was not started: its approval by the key {key:?} does not hold: {why}; {fix}, or remove \
                 {name}.approval.json beside the bundle to run it by its directory's tier"
            ),
        )
    };
    let Some(known) = rules.key.iter().find(|known| known.id == *key) else {
        return wrong(
            "the launcher's policy file names no such key",
            "put its [[key]] entry there, which the next launch goes by, or approve the bundle by another key",
        );
    };
    if !holds(known.expires, now) {
        return wrong(
            "the key has expired in the launcher's policy file",
            "give it another expires there, which the next launch goes by, or approve the bundle by another key",
        );
    }
    let Ok(signature) = Signature::from_slice(signature) else {
        return wrong("it is no Ed25519 signature", "approve it again");
    };
    // What the supervisor grants, it grants by the tier that was signed: the lower one of the two would not do.
    if *tier > known.tier.into() {
        return wrong(
            &format!("this key may give {} at most", known.tier),
            &format!("approve it with --tier {}, or by another key", known.tier),
        );
    }
    let text = approval_text(name.as_str(), *tier, bundle);
    match known.public_key.verify_strict(text.as_bytes(), &signature) {
        Ok(()) => Ok(*tier),
        Err(_) => wrong("the signature is over another name, tier or content, or by another key", "approve it again"),
    }
}

fn stamp(path: &Path) -> Result<Stamp, String> {
    let found = fs::metadata(path).map_err(|error| format!("the policy file {}: {error}", path.display()))?;
    Ok(Stamp {
        device: found.dev(),
        inode: found.ino(),
        size: found.size(),
        changed: (found.ctime(), found.ctime_nsec()),
    })
}

fn read(path: &Path) -> Result<Rules, String> {
    let wrong = |why: String| format!("the policy file {}: {why}; correct it", path.display());
    // A FIFO put there would make the launcher wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| wrong(error.to_string()))?;
    store::only_ours(&file).map_err(|why| {
        format!("the policy file {}: {why}; chown it to the launcher's user and chmod it 644", path.display())
    })?;
    let file = File::from(file);
    let kind = file.metadata().map_err(|error| wrong(error.to_string()))?;
    if !kind.is_file() || kind.len() > MOST_BYTES {
        return Err(wrong("it is not a file of at most 1 MiB".to_owned()));
    }
    let text = io::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    parse(&text).map_err(|problems| told(path, &problems))
}

/// What is wrong with the file: each problem in a line of its own, with the line of the file.
fn told(path: &Path, problems: &[Problem]) -> String {
    let (count, plural) = (problems.len(), if problems.len() == 1 { "" } else { "s" });
    let mut told = format!("the policy file {} has {count} problem{plural}, correct them:", path.display());
    for problem in problems.iter().take(MOST_TOLD) {
        told.push_str("\n  ");
        // A name of the file's may have any length, and control characters.
        let problem = problem.to_string();
        let shown = problem.chars().take(MOST_CHARACTERS).map(|c| if c.is_control() { '\u{fffd}' } else { c });
        told.extend(shown);
    }
    if count > MOST_TOLD {
        told.push_str(&format!("\n  and {} more", count - MOST_TOLD));
    }
    told
}
