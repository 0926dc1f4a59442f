//! What the policy file says, and everything that is wrong with it. Knows text, and neither files nor launches.

use std::{collections::BTreeMap, ops::RangeInclusive, path::PathBuf};

use ed25519_dalek::VerifyingKey;
use plugvisor_package::{Digest, PluginName, TrustTier, VariableName};
use plugvisor_sandbox::{
    options::Options,
    protocol::{Level, Tier},
    tables::{Problem, Problems, Section, Table, field_names, into_table, section},
};
use serde::Deserialize;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::raw;
use crate::{expiry::Expiry, machine};

/// The policy file.
#[derive(Debug, Default)]
pub(super) struct Rules {
    /// Replaces `--uid-range`; used at the start only, as the three below.
    pub(super) uid_range: Option<RangeInclusive<u32>>,
    pub(super) cgroup_root: Option<String>,
    pub(super) config_root: Option<PathBuf>,
    pub(super) data_root: Option<PathBuf>,
    pub(super) weakest: Weakest,
    pub(super) directory: Vec<Directory>,
    pub(super) approved: Vec<Approved>,
    pub(super) key: Vec<Key>,
    pub(super) environment: Vec<Environment>,
    /// What machines are made of, at the level VM.
    pub(super) vm: Option<machine::Settings>,
}

/// The weakest isolation of each tier; a quarantined bundle is never launched.
#[derive(Clone, Debug)]
pub(super) struct Weakest {
    internal: Wall,
    verified: Wall,
    community: Wall,
    untrusted: Wall,
}

impl Default for Weakest {
    fn default() -> Self {
        Self { internal: Wall::None, verified: Wall::Process, community: Wall::Container, untrusted: Wall::Sandbox }
    }
}

impl Weakest {
    /// None is for what is never launched.
    pub(super) fn of(&self, tier: Tier) -> Option<Level> {
        let wall = match tier {
            Tier::Quarantined => return None,
            Tier::Untrusted => self.untrusted,
            Tier::Community => self.community,
            Tier::Verified => self.verified,
            Tier::Internal => self.internal,
        };
        Some(wall.into())
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Wall {
    None,
    Process,
    Container,
    Sandbox,
    Vm,
}

impl From<Wall> for Level {
    fn from(wall: Wall) -> Self {
        match wall {
            Wall::None => Self::None,
            Wall::Process => Self::Process,
            Wall::Container => Self::Container,
            Wall::Sandbox => Self::Sandbox,
            Wall::Vm => Self::Vm,
        }
    }
}

/// Bundles imported from beneath it have this tier.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) tier: TrustTier,
}

/// This content has this tier, under this name.
#[derive(Debug)]
pub(super) struct Approved {
    pub(super) name: PluginName,
    pub(super) tier: TrustTier,
    pub(super) digest: Digest,
    /// From when on it no longer holds.
    pub(super) expires: Option<Expiry>,
}

/// Whoever has the private key may approve bundles up to this tier.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) id: String,
    pub(super) public_key: VerifyingKey,
    pub(super) tier: TrustTier,
    /// From when on nothing that it signed holds.
    pub(super) expires: Option<Expiry>,
}

/// The variables that a plugin may be given, by their names: their values are the supervisor's to say.
#[derive(Debug)]
pub(super) struct Environment {
    pub(super) plugin: PluginName,
    pub(super) variables: Vec<VariableName>,
}

/// The rules in this text, or everything that is wrong with it: nothing of a file that does not hold is used.
pub(super) fn parse(text: &str) -> Result<Rules, Vec<Problem>> {
    let mut problems = Problems::new(text);
    let (document, errors) = DeTable::parse_recoverable(text);
    for error in &errors {
        problems.add(&error.span().unwrap_or(0..0), "", error.message());
    }
    let rules = if errors.is_empty() { rules(document, &mut problems) } else { Rules::default() };
    let problems = problems.into_sorted();
    if problems.is_empty() { Ok(rules) } else { Err(problems) }
}

fn rules(document: Spanned<DeTable<'_>>, problems: &mut Problems<'_>) -> Rules {
    // The tables are read by themselves, so that each of their keys is judged alone.
    let (whole, mut document) = (document.span(), document.into_inner());
    let [weakest, directory, approved, key, environment, vm] =
        ["weakest", "directory", "approved", "key", "environment", "vm"].map(|name| document.remove(name));
    let top: Section<raw::File> = section("", Spanned::new(whole, DeValue::Table(document)), problems);
    let raw::File {
        version,
        uid_range,
        cgroup_root,
        config_root,
        data_root,
        weakest: None,
        directory: None,
        approved: None,
        key: None,
        environment: None,
        vm: None,
    } = &top.value
    else {
        unreachable!("the tables were taken out above")
    };
    match required(&top, "version", version.as_ref(), problems) {
        Some(1) | None => {}
        Some(other) => {
            let message = format!("is {other}, and this launcher reads version 1");
            problems.add(top.at("version"), top.key("version"), message);
        }
    }
    Rules {
        uid_range: fitting(&top, "uid_range", uid_range.as_deref(), Options::uid_range, problems),
        cgroup_root: fitting(&top, "cgroup_root", cgroup_root.as_deref(), Options::group_name, problems),
        config_root: whole_path(&top, "config_root", config_root.clone(), problems),
        data_root: whole_path(&top, "data_root", data_root.clone(), problems),
        weakest: weakest.map(|value| weakest_of(value, problems)).unwrap_or_default(),
        directory: entries("directory", directory, problems, directory_of),
        approved: entries("approved", approved, problems, approved_of),
        key: keys(key, problems),
        environment: entries("environment", environment, problems, environment_of),
        vm: vm.and_then(|value| machine::Settings::read(&section("vm", value, problems), problems)),
    }
}

/// A key's value; a problem when nobody wrote it.
pub(crate) fn required<T: Table, V>(
    table: &Section<T>,
    key: &str,
    value: Option<V>,
    problems: &mut Problems<'_>,
) -> Option<V> {
    if value.is_none() && table.lacks(key) {
        problems.add(table.at(key), table.key(key), format!("is required; it takes {}", T::takes(key)));
    }
    value
}

/// A text that has the grammar of its key, or a problem.
fn fitting<T: Table, V>(
    table: &Section<T>,
    key: &str,
    text: Option<&str>,
    read: fn(&str) -> Option<V>,
    problems: &mut Problems<'_>,
) -> Option<V> {
    let text = text?;
    let value = read(text);
    if value.is_none() {
        problems.add(table.at(key), table.key(key), format!("is the text {text:?}; it takes {}", T::takes(key)));
    }
    value
}

fn whole_path<T: Table>(
    table: &Section<T>,
    key: &str,
    path: Option<PathBuf>,
    problems: &mut Problems<'_>,
) -> Option<PathBuf> {
    if let Some(relative) = path.as_ref().filter(|path| !path.is_absolute()) {
        let message = format!("{:?} is not absolute; it takes {}", relative.display().to_string(), T::takes(key));
        problems.add(table.at(key), table.key(key), message);
    }
    path
}

/// The entries of a list of tables, each of which is read by itself. One that lacks something is told of and left out.
fn entries<R: Table, V>(
    name: &str,
    value: Option<Spanned<DeValue<'_>>>,
    problems: &mut Problems<'_>,
    mut read: impl FnMut(&Section<R>, &mut Problems<'_>) -> Option<V>,
) -> Vec<V> {
    let Some(value) = value else { return Vec::new() };
    let span = value.span();
    let DeValue::Array(entries) = value.into_inner() else {
        problems.add(&span, name, format!("must be written as [[{name}]], once for each entry"));
        return Vec::new();
    };
    let read = entries.into_iter().enumerate().filter_map(|(index, entry)| {
        let table = section(&format!("{name}[{index}]"), entry, problems);
        read(&table, problems)
    });
    read.collect()
}

fn weakest_of(value: Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Weakest {
    let span = value.span();
    let Some(table) = into_table("weakest", value, problems) else { return Weakest::default() };
    let known = field_names::<raw::Weakest>();
    let (known, unknown): (DeTable<'_>, DeTable<'_>) =
        table.into_iter().partition(|(tier, _)| known.contains(&tier.get_ref().as_ref()));
    // These words decide over trust: none is suggested for another.
    for tier in unknown.keys() {
        let message = "is no tier that is launched; they are internal, verified, community and untrusted";
        problems.add(&tier.span(), format!("weakest.{}", tier.get_ref()), message);
    }
    let table: Section<raw::Weakest> = section("weakest", Spanned::new(span, DeValue::Table(known)), problems);
    let raw::Weakest { internal, verified, community, untrusted } = table.value;
    let usual = Weakest::default();
    Weakest {
        internal: internal.unwrap_or(usual.internal),
        verified: verified.unwrap_or(usual.verified),
        community: community.unwrap_or(usual.community),
        untrusted: untrusted.unwrap_or(usual.untrusted),
    }
}

fn directory_of(table: &Section<raw::Directory>, problems: &mut Problems<'_>) -> Option<Directory> {
    let raw::Directory { path, tier } = &table.value;
    let path = required(table, "path", path.clone(), problems);
    let path = whole_path(table, "path", path, problems);
    let tier = required(table, "tier", *tier, problems);
    Some(Directory { path: path?, tier: tier? })
}

fn approved_of(table: &Section<raw::Approved>, problems: &mut Problems<'_>) -> Option<Approved> {
    let raw::Approved { name, tier, digest, expires } = &table.value;
    let name = required(table, "name", name.clone(), problems);
    let tier = required(table, "tier", *tier, problems);
    let digest = required(table, "digest", *digest, problems);
    // It would end by itself what somebody took the trouble to stop.
    if tier == Some(TrustTier::Quarantined) && expires.is_some() {
        let message = "is set for a quarantine, and a quarantine has none; remove it";
        problems.add(table.at("expires"), table.key("expires"), message);
    }
    Some(Approved { name: name?, tier: tier?, digest: digest?, expires: *expires })
}

fn keys(value: Option<Spanned<DeValue<'_>>>, problems: &mut Problems<'_>) -> Vec<Key> {
    let (mut ids, mut material) = (BTreeMap::new(), BTreeMap::new());
    entries("key", value, problems, |table: &Section<raw::Key>, problems| {
        let raw::Key { id, public_key, tier, expires } = &table.value;
        let id = required(table, "id", id.clone(), problems);
        let public_key = required(table, "public_key", *public_key, problems);
        let tier = required(table, "tier", *tier, problems);
        if let Some(other) = id.as_ref().and_then(|id| ids.insert(id.clone(), table.path.clone())) {
            problems.add(table.at("id"), table.key("id"), format!("is that of {other} too; give each key its own"));
        }
        // One that was taken back under one name would go on under the other.
        if let Some(other) = public_key.and_then(|key| material.insert(key.to_bytes(), table.path.clone())) {
            let message = format!("is that of another key, {other}; each key stands once");
            problems.add(table.at("public_key"), table.key("public_key"), message);
        }
        Some(Key { id: id?, public_key: public_key?, tier: tier?, expires: *expires })
    })
}

fn environment_of(table: &Section<raw::Environment>, problems: &mut Problems<'_>) -> Option<Environment> {
    let raw::Environment { plugin, variables } = &table.value;
    let plugin = required(table, "plugin", plugin.clone(), problems);
    let names = required(table, "variables", variables.as_ref(), problems)?;
    let mut variables = Vec::new();
    for name in names {
        match name.parse() {
            Ok(variable) => variables.push(variable),
            Err(error) => {
                let error: plugvisor_package::VariableError = error;
                let message = format!("{name:?} cannot be given: {error}");
                problems.add(table.at("variables"), table.key("variables"), message);
            }
        }
    }
    Some(Environment { plugin: plugin?, variables })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        parse(text).map(|_| ()).expect_err(text).iter().map(ToString::to_string).collect()
    }

    /// Everything at once, each with its line.
    #[test]
    fn all_that_is_wrong_is_told_in_words_with_its_line() {
        let text = r#"version = 1
uid_range = "5-0"
cgroup_root = 7
config_root = "etc"
[[directory]]
tier = "trusted"
[[directory]]
path = 5
tier = "verified"
[weakest]
unverified = "none"
community = "wall"
[[approved]]
name = "Gallery"
tier = "quarantined"
digest = "sha256:00"
expires = 2027-01-31
[[key]]
id = "ops"
public_key = "00"
[[environment]]
plugin = "a"
variables = ["TZ", "LD_PRELOAD"]
[vm]
kernel = "boot/vmlinuz"
max_memory = "1G"
"#;
        let told = problems(text);
        let expected = [
            "line 2: uid_range: is the text \"5-0\"; it takes two numbers in text",
            "line 3: cgroup_root: is the number 7; it takes one name in text",
            "line 4: config_root: \"etc\" is not absolute; it takes a whole path in text",
            "line 5: directory[0].path: is required; it takes a whole path in text, such as \"/srv/plugins\"",
            "line 6: directory[0].tier: is the text \"trusted\"; it takes \"internal\", \"verified\"",
            "line 8: directory[1].path: is the number 5; it takes a whole path in text",
            "line 11: weakest.unverified: is no tier that is launched; they are internal",
            "line 12: weakest.community: is the text \"wall\"; it takes a level: \"none\"",
            "line 14: approved[0].name: is the text \"Gallery\"; it takes a plugin's name",
            "line 16: approved[0].digest: is the text \"sha256:00\"; it takes a bundle's digest",
            "line 17: approved[0].expires: is set for a quarantine",
            "line 18: key[0].tier: is required; it takes \"internal\"",
            "line 20: key[0].public_key: is the text \"00\"; it takes an Ed25519 public key",
            "line 23: environment[0].variables: \"LD_PRELOAD\" cannot be given: ",
            "line 25: vm.kernel: \"boot/vmlinuz\" is not absolute",
            "line 26: vm.max_memory: is the text \"1G\"; it takes a number of bytes",
        ];
        assert_eq!(told.len(), expected.len(), "{told:#?}");
        for (told, expected) in told.iter().zip(expected) {
            assert!(told.starts_with(expected), "{told:?} does not begin with {expected:?}");
        }
    }

    #[test]
    fn each_table_is_written_as_it_is_read() {
        for (text, expected) in [
            ("", "line 1: version: is required; it takes the number 1"),
            ("version = 2", "line 1: version: is 2, and this launcher reads version 1"),
            ("version = \"1\"", "line 1: version: is the text \"1\"; it takes the number 1"),
            ("version = 1\nversoin = 1", "line 2: versoin: unknown key; did you mean \"version\"?"),
            ("version = 1\n[directory]\npath = \"/srv\"", "line 2: directory: must be written as [[directory]]"),
            ("version = 1\nkey = [5]", "line 2: key[0]: must be a table, not the number 5"),
            ("version = 1\nvm = true", "line 2: vm: must be a table, not true"),
            ("version = 1\nweakest = \"vm\"", "line 2: weakest: must be a table, not the text \"vm\""),
            ("version = 1\n[vm]\n", "line 2: vm.kernel: is required"),
            ("version = 1\n[weakest", "line 2: "),
        ] {
            let told = problems(text);
            assert!(told.len() == 1 && told[0].starts_with(expected), "{text}: {told:?}");
        }
    }

    #[test]
    fn a_whole_file_is_read() {
        let digest = Digest::from_bytes([7; 32]);
        let text = format!(
            "version = 1\nuid_range = \"7000-7999\"\ncgroup_root = \"pv\"\nconfig_root = \"/etc/c\"\ndata_root = \"/d\"\n\
             [weakest]\nverified = \"vm\"\n[[directory]]\npath = \"/srv\"\ntier = \"community\"\n\
             [[approved]]\nname = \"a\"\ntier = \"verified\"\ndigest = \"{digest}\"\nexpires = 2027-01-31\n\
             [[environment]]\nplugin = \"a\"\nvariables = [\"TZ\"]\n[vm]\nkernel = \"/boot/k\"\n"
        );
        let rules = parse(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
        assert_eq!((rules.uid_range, rules.cgroup_root), (Some(7000..=7999), Some("pv".to_owned())));
        assert_eq!((rules.config_root, rules.data_root), (Some("/etc/c".into()), Some("/d".into())));
        assert_eq!(rules.weakest.of(Tier::Verified), Some(Level::Vm));
        assert_eq!(rules.weakest.of(Tier::Internal), Some(Level::None));
        assert!(rules.approved[0].expires.is_some() && rules.vm.is_some());
        assert_eq!((rules.directory.len(), rules.environment[0].variables.len()), (1, 1));
    }
}
