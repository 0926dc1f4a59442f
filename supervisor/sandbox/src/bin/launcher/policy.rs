//! What a bundle may be to the launcher: its tier, and the weakest walls for that tier.
//!
//! The supervisor's word counts for nothing here. A tier comes from the directory that a bundle's files were imported
//! from (what the starter wrote on the command line), from an entry of the administrator's policy file, or from a
//! signature by a key that stands there; whatever has none of them is untrusted. This module knows no store.

mod raw;
mod rules;

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
    protocol::{Approval, Level, Refusal, RefusalCode, Tier, approval_text},
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
            "put its [[key]] entry there and start plugvisord again, or approve the bundle by another key",
        );
    };
    if !holds(known.expires, now) {
        return wrong(
            "the key has expired in the launcher's policy file",
            "give it another expires there and start plugvisord again, or approve the bundle by another key",
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
    store::only_ours(&file).map_err(|why| wrong(format!("{why}; chown it to the launcher's user and chmod it 644")))?;
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

#[cfg(test)]
mod tests {
    use ed25519_dalek::{Signer as _, SigningKey};

    use super::*;

    const CONTENT: [u8; 32] = [7; 32];

    /// 2026-01-01.
    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_767_225_600)
    }

    fn read_text(text: &str) -> Result<Rules, String> {
        parse(text).map_err(|problems| told(Path::new("/etc/launcher.toml"), &problems))
    }

    fn name(text: &str) -> PluginName {
        text.parse().expect("a name")
    }

    fn policy(text: &str, roots: Vec<BundleRoot>) -> Policy {
        let rules = read_text(text).unwrap_or_else(|why| panic!("{why}"));
        Policy {
            roots,
            variables: Vec::new(),
            file: None,
            read: Some((Stamp { device: 0, inode: 0, size: 0, changed: (0, 0) }, rules)),
        }
    }

    fn tier(policy: &mut Policy, plugin: &str, origins: &[&str], approval: Option<&Approval>) -> Result<Tier, String> {
        let origins: BTreeSet<PathBuf> = origins.iter().map(PathBuf::from).collect();
        policy.tier(&name(plugin), &CONTENT, &origins, approval, now()).map_err(|refusal| refusal.message)
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn a_tier_comes_from_where_a_bundle_was_or_from_an_entry() {
        let digest = Digest::from_bytes(CONTENT);
        let text = format!(
            "version = 1\n[[directory]]\npath = \"/srv/community\"\ntier = \"community\"\n\
             [[approved]]\nname = \"a\"\ntier = \"internal\"\ndigest = \"{digest}\"\n"
        );
        let roots = vec![BundleRoot { tier: Tier::Verified, path: "/opt/plugins".into() }];
        let mut policy = policy(&text, roots);
        for (plugin, origins, expected) in [
            ("b", &[][..], Tier::Untrusted),
            ("b", &["/srv/other/b"], Tier::Untrusted),
            ("b", &["/opt/pluginsx/b"], Tier::Untrusted),
            ("b", &["/srv/community/b"], Tier::Community),
            ("b", &["/srv/community/b", "/opt/plugins/b"], Tier::Verified),
            ("a", &[], Tier::Internal),
        ] {
            assert_eq!(tier(&mut policy, plugin, origins, None), Ok(expected), "{plugin} {origins:?}");
        }
    }

    #[test]
    fn quarantine_outweighs_everything() {
        let digest = Digest::from_bytes(CONTENT);
        let text = format!(
            "version = 1\n[[approved]]\nname = \"a\"\ntier = \"internal\"\ndigest = \"{digest}\"\n\
             [[approved]]\nname = \"z\"\ntier = \"quarantined\"\ndigest = \"{digest}\"\n"
        );
        let mut policy = policy(&text, vec![BundleRoot { tier: Tier::Internal, path: "/opt".into() }]);
        assert_eq!(tier(&mut policy, "a", &["/opt/a"], None), Ok(Tier::Quarantined));
        assert!(
            policy
                .check_level(&name("a"), Digest::from_bytes(CONTENT), Tier::Quarantined, Level::Vm, None, now())
                .is_err()
        );
    }

    #[test]
    fn variables_are_those_of_the_file_and_of_the_starter_for_this_plugin() {
        let text = "version = 1\n[[environment]]\nplugin = \"a\"\nvariables = [\"TZ\", \"A_TITLE\"]\n";
        let mut policy = policy(text, vec![]);
        policy.variables.push(Variable { plugin: name("a"), name: "OF_STARTER".parse().expect("a name") });
        let mut ask = |plugin: &str, names: &[&str]| {
            let given: Vec<_> = names.iter().map(|name| ((*name).to_owned(), "x".to_owned())).collect();
            policy.check_environment(&name(plugin), &given).map_err(|refusal| refusal.message)
        };
        assert_eq!(ask("a", &["A_TITLE", "OF_STARTER", "TZ"]), Ok(()));
        assert_eq!(ask("b", &[]), Ok(()));
        for (plugin, names) in [("b", &["TZ"][..]), ("a", &["A_TITLE", "OTHER", "TZ"]), ("a", &["A"])] {
            let why = ask(plugin, names).expect_err("it is not listed");
            assert!(why.contains("[[environment]]") && why.contains(plugin), "{why}");
            assert!(!why.contains("A_TITLE"), "only what is missing is named: {why}");
        }
        for code in ["LD_PRELOAD", "GCONV_PATH", "PYTHONPATH", "HTTPS_PROXY", "PLUGVISOR_BROKER"] {
            let text = format!("version = 1\n[[environment]]\nplugin = \"a\"\nvariables = [\"{code}\"]\n");
            read_text(&text).map(|_| ()).expect_err(code);
        }
    }

    #[test]
    fn what_has_expired_approves_nothing() {
        let digest = Digest::from_bytes(CONTENT);
        let entry = |expires: &str| {
            format!("version = 1\n[[approved]]\nname = \"a\"\ntier = \"verified\"\ndigest = \"{digest}\"\n{expires}\n")
        };
        for (expires, expected) in [
            ("", Tier::Verified),
            ("expires = 2026-01-02", Tier::Verified),
            ("expires = 2026-01-01T00:00:01Z", Tier::Verified),
            ("expires = 2026-01-01", Tier::Untrusted),
            ("expires = 2026-01-01T00:00:00+01:00", Tier::Untrusted),
        ] {
            let mut policy = policy(&entry(expires), vec![]);
            assert_eq!(tier(&mut policy, "a", &[], None), Ok(expected), "{expires}");
            let checked = policy.check_level(&name("a"), digest, expected, Level::Process, None, now());
            let told = checked.map_err(|refusal| refusal.message.contains("has expired"));
            assert_eq!(told, if expected == Tier::Verified { Ok(()) } else { Err(true) }, "{expires}");
        }
        for wrong in ["expires = \"soon\"", "expires = \"2026-01-02\"", "expires = 2026-01-02T00:00:00", "expires = 7"]
        {
            assert!(read_text(&entry(wrong)).is_err(), "{wrong}");
        }
        let quarantined = entry("expires = 2030-01-01").replace("verified", "quarantined");
        assert!(read_text(&quarantined).is_err_and(|why| why.contains("a quarantine has none")));
    }

    #[test]
    fn a_key_stands_once() {
        let public = hex(SigningKey::from_bytes(&[3; 32]).verifying_key().as_bytes());
        let key = |id: &str| format!("[[key]]\nid = \"{id}\"\npublic_key = \"{public}\"\ntier = \"verified\"\n");
        let twice = read_text(&format!("version = 1\n{}{}", key("a"), key("b")));
        assert!(twice.is_err_and(|why| why.contains("that of another key")));
    }

    #[test]
    fn a_signature_holds_for_what_was_signed() {
        let key = SigningKey::from_bytes(&[3; 32]);
        let public = hex(key.verifying_key().as_bytes());
        let mut policy = policy(
            &format!("version = 1\n[[key]]\nid = \"ops\"\npublic_key = \"{public}\"\ntier = \"verified\"\n"),
            vec![],
        );
        let sign = |plugin: &str, tier, bundle: &[u8; 32]| {
            key.sign(approval_text(plugin, tier, bundle).as_bytes()).to_bytes().to_vec()
        };
        let good = Approval { tier: Tier::Verified, key: "ops".into(), signature: sign("a", Tier::Verified, &CONTENT) };
        assert_eq!(tier(&mut policy, "a", &[], Some(&good)), Ok(Tier::Verified));
        let low = Approval { tier: Tier::Community, signature: sign("a", Tier::Community, &CONTENT), ..good.clone() };
        assert_eq!(tier(&mut policy, "a", &[], Some(&low)), Ok(Tier::Community));
        let high = Approval { tier: Tier::Internal, signature: sign("a", Tier::Internal, &CONTENT), ..good.clone() };
        let refusal = tier(&mut policy, "a", &[], Some(&high)).expect_err("more than the key may give");
        assert!(refusal.contains("verified at most"), "{refusal}");
        let mut flipped = good.clone();
        flipped.signature[9] ^= 1;
        for (what, plugin, approval) in [
            ("another name", "b", good.clone()),
            ("another tier", "a", Approval { tier: Tier::Internal, ..good.clone() }),
            ("another content", "a", Approval { signature: sign("a", Tier::Verified, &[8; 32]), ..good.clone() }),
            ("another key", "a", Approval { key: "other".into(), ..good.clone() }),
            ("a flipped bit", "a", flipped),
            ("too short", "a", Approval { signature: vec![1; 63], ..good.clone() }),
            ("nothing", "a", Approval { signature: Vec::new(), ..good }),
        ] {
            let refusal = tier(&mut policy, plugin, &[], Some(&approval)).expect_err(what);
            assert!(refusal.contains("does not hold"), "{what}: {refusal}");
        }
    }

    #[test]
    fn a_supervisor_that_counts_on_more_trust_is_refused() {
        let mut policy = policy("version = 1\n", vec![]);
        let (a, bundle) = (name("a"), Digest::from_bytes(CONTENT));
        let mut check = |tier, counted_on, doubt: Option<&Doubt>| {
            let refused = policy.check_tier(&a, bundle, tier, counted_on, doubt, now());
            refused.map_err(|refusal| (refusal.code, refusal.message))
        };
        for tier in [Tier::Untrusted, Tier::Community, Tier::Verified, Tier::Internal] {
            assert_eq!(check(tier, Tier::Untrusted, None), Ok(()));
            assert_eq!(check(tier, tier, None), Ok(()));
        }
        let (code, message) = check(Tier::Community, Tier::Verified, None).expect_err("it counts on more");
        assert_eq!(code, RefusalCode::Policy);
        for word in ["is community", "counts on verified", "tier = \"verified\""] {
            assert!(message.contains(word), "{message}");
        }
        // The way it came is named, when that is why.
        let doubt = Doubt::Unfit { path: "/srv/plugins/a".into(), why: "can be written by others".into() };
        let (code, message) = check(Tier::Untrusted, Tier::Verified, Some(&doubt)).expect_err("it counts on more");
        assert_eq!(code, RefusalCode::Directory);
        assert!(message.contains("/srv/plugins/a"), "{message}");
    }

    #[test]
    fn each_tier_has_its_weakest_walls() {
        let mut usual = policy("version = 1\n", vec![]);
        let a = name("a");
        for (tier, least) in [
            (Tier::Internal, Level::None),
            (Tier::Verified, Level::Process),
            (Tier::Community, Level::Container),
            (Tier::Untrusted, Level::Sandbox),
        ] {
            let levels = [Level::None, Level::Process, Level::Container, Level::Sandbox, Level::Vm];
            for level in levels {
                assert_eq!(
                    usual.check_level(&a, Digest::from_bytes(CONTENT), tier, level, None, now()).is_ok(),
                    level >= least,
                    "{tier:?} {level:?}"
                );
            }
        }
        let mut strict = policy("version = 1\n[weakest]\nverified = \"vm\"\n", vec![]);
        let refused = strict.check_level(&a, Digest::from_bytes(CONTENT), Tier::Verified, Level::Sandbox, None, now());
        assert!(refused.is_err_and(|refusal| refusal.message.contains("tier = \"internal\"")));
    }

    #[test]
    fn what_the_file_may_not_say() {
        let weak = "00".repeat(32);
        for (text, named) in [
            (String::new(), "version"),
            ("version = 2".to_owned(), "version"),
            ("version = 1\nuid = 0".to_owned(), "uid"),
            (
                "version = 1\n[[approved]]\nname = \"a\"\ntier = \"verified\"\ndigest = \"sha256:00\"".to_owned(),
                "digest",
            ),
            (
                format!("version = 1\n[[approved]]\nname = \"A\"\ntier = \"verified\"\ndigest = \"sha256:{weak}\""),
                "plugin's name",
            ),
            ("version = 1\n[[directory]]\npath = \"srv\"\ntier = \"verified\"".to_owned(), "absolute"),
            (format!("version = 1\n[[key]]\nid = \"k\"\npublic_key = \"{weak}\"\ntier = \"verified\""), "public key"),
            ("version = 1\n[weakest]\nquarantined = \"none\"".to_owned(), "quarantined"),
        ] {
            let why = read_text(&text).map(|_| ()).expect_err(&text);
            assert!(why.contains(named), "{text}: {why}");
        }
    }

    /// However much is wrong, what is told has its bounds, and a supervisor is told in one line.
    #[test]
    fn what_is_told_has_its_bounds() {
        let long = "x".repeat(5000);
        let entries: String = (0..200).map(|_| format!("[[directory]]\n\"{long}\\n\" = 1\n")).collect();
        let why = read_text(&format!("version = 1\n{entries}")).map(|_| ()).expect_err("much is wrong");
        assert!(why.contains("has 600 problems") && why.ends_with("and 568 more"), "{why}");
        assert!(why.len() < 32 * 1024, "{} bytes", why.len());
        assert_eq!(why.lines().count(), 2 + MOST_TOLD);
        let one = read_text("version = 2").map(|_| ()).expect_err("another version");
        let message = refused(&one).message;
        assert!(!message.contains('\n') && message.contains("correct them: line 1: version: is 2"), "{message}");
    }

    #[test]
    fn the_file_is_ours_alone_and_read_anew_when_it_changes() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("policy.toml");
        let write = |text: &str| {
            let new = directory.path().join("new");
            fs::write(&new, text).expect("writes");
            fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).expect("chmod");
            fs::rename(new, &path).expect("renames");
        };
        write("version = 1\n");
        let mut options = Options::new(3, "/run/p".into(), vec![]);
        options.policy = Some(path.clone());
        let mut policy = Policy::load(&mut options).expect("a policy");
        assert_eq!(tier(&mut policy, "a", &["/srv/a"], None), Ok(Tier::Untrusted));
        write("version = 1\n[[directory]]\npath = \"/srv\"\ntier = \"verified\"\n");
        assert_eq!(tier(&mut policy, "a", &["/srv/a"], None), Ok(Tier::Verified));
        // What cannot be read is not taken for what it was.
        write("version = 1\n[[directory]]\n");
        assert!(tier(&mut policy, "a", &["/srv/a"], None).is_err());
        write("version = 1\nuid_range = \"7000-7999\"\ncgroup_root = \"pv\"\n");
        Policy::load(&mut options).expect("a policy");
        assert_eq!((options.uids.clone(), options.cgroup_root.as_str()), (7000..=7999, "pv"));
        for mode in [0o664, 0o646, 0o666] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
            let why = Policy::load(&mut options).map(|_| ()).expect_err("others may write it");
            assert!(why.contains("others may write it"), "{why}");
        }
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("chmod");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(12_345), None).expect("chown");
            assert!(Policy::load(&mut options).is_err(), "it belongs to somebody else");
        }
        fs::remove_file(&path).expect("removes");
        assert!(Policy::load(&mut options).is_err(), "it was named and is not there");
    }
}
