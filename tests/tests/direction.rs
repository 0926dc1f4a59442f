//! The direction of dependencies: what each crate must not know, held over what cargo says and not over what was meant.
//!
//! `ARCHITECTURE.md` gives the reasons. A failure here says which edge is new; either the code is in the wrong crate, or
//! the architecture changes, with its document.

use std::{collections::BTreeSet, fs, process::Command, sync::OnceLock};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package, TargetKind};

/// Every crate of the workspace with the crates of the workspace that it may depend on.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("plugvisor-proto", &[]),
    ("plugvisor-package", &[]),
    ("plugvisor-core", &["plugvisor-package"]),
    ("plugvisor-sandbox", &["plugvisor-package"]),
    ("plugvisor-daemon", &["plugvisor-core", "plugvisor-package", "plugvisor-proto", "plugvisor-sandbox"]),
    ("plugvisor-cli", &["plugvisor-client", "plugvisor-package", "plugvisor-proto", "plugvisor-sandbox"]),
    ("plugvisor-client", &["plugvisor-proto"]),
    ("plugvisor-worker", &["plugvisor-client", "plugvisor-proto"]),
    // The client in tests only: it stands where an application would.
    ("plugvisor-examples", &["plugvisor-client", "plugvisor-proto", "plugvisor-worker"]),
    // These two drive the programs from outside: they see what an operator, an author or an application sees.
    ("plugvisor-tests", &["plugvisor-client", "plugvisor-package", "plugvisor-proto"]),
    // It reads what they read, by the same functions.
    ("plugvisor-fuzz", &["plugvisor-daemon", "plugvisor-package", "plugvisor-sandbox"]),
    ("xtask", &["plugvisor-client", "plugvisor-examples", "plugvisor-package", "plugvisor-proto", "plugvisor-tests"]),
];

/// Crates that must not be in another's tree at all, however deep.
const MUST_NOT_REACH: &[(&str, &[&str])] = &[
    // Pure rules: no time, no kernel, no wire, so that they can be tested to exhaustion.
    ("plugvisor-core", &["tokio", "tonic", "prost", "hyper", "nix", "rustix", "libc", "rusqlite"]),
    // One thread and no runtime: the launcher forks, and it is the part that has privileges.
    ("plugvisor-sandbox", &["tokio", "tonic", "prost", "hyper", "cgroups-rs", "zbus"]),
    // Wire contracts only: what an author's program carries.
    ("plugvisor-worker", &["plugvisor-package", "plugvisor-core", "plugvisor-sandbox", "plugvisor-daemon"]),
    ("plugvisor-package", &["tokio", "tonic", "nix"]),
];

/// The only crate with `unsafe`.
const UNSAFE: &str = "plugvisor-sandbox";

fn metadata() -> &'static Metadata {
    static METADATA: OnceLock<Metadata> = OnceLock::new();
    METADATA.get_or_init(|| {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml");
        MetadataCommand::new().manifest_path(manifest).no_deps().exec().expect("cargo describes the workspace")
    })
}

fn members() -> Vec<&'static Package> {
    metadata().workspace_packages()
}

#[test]
fn crates_know_only_those_below_them() {
    let names: BTreeSet<&str> = members().iter().map(|package| package.name.as_str()).collect();
    let listed: BTreeSet<&str> = MAY_KNOW.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, listed, "the workspace and the table above list different crates");
    let mut wrong = Vec::new();
    for (name, allowed) in MAY_KNOW {
        let package = members().into_iter().find(|package| package.name == *name).expect("listed");
        for dependency in &package.dependencies {
            let own = dependency.name == *name && dependency.kind == DependencyKind::Development;
            if names.contains(dependency.name.as_str()) && !own && !allowed.contains(&dependency.name.as_str()) {
                wrong.push(format!("{name} -> {} ({})", dependency.name, dependency.kind));
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn pure_crates_stay_pure_all_the_way_down() {
    for (name, forbidden) in MUST_NOT_REACH {
        let tree = tree(name);
        assert!(tree.contains(*name), "cargo tree does not begin with {name}: {tree:?}");
        let reached: Vec<_> = forbidden.iter().filter(|forbidden| tree.contains(**forbidden)).collect();
        assert!(reached.is_empty(), "{name} reaches {reached:?}; `cargo tree -p {name} -i CRATE` shows how");
    }
}

/// The names of all crates that are compiled into one, with the features that it alone asks for: `cargo metadata` would
/// join the features that other members turn on.
fn tree(package: &str) -> BTreeSet<String> {
    let root = metadata().workspace_root.as_std_path();
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"])
        .args(["--package", package])
        .current_dir(root)
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("names of crates are UTF-8");
    text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn unsafe_code_is_forbidden_in_every_root_but_one() {
    let mut without = Vec::new();
    let mut with = 0;
    for package in members() {
        for target in &package.targets {
            let program = [TargetKind::Lib, TargetKind::Bin].iter().any(|kind| target.kind.contains(kind));
            if !program || package.name == UNSAFE {
                continue;
            }
            let root = fs::read_to_string(&target.src_path).expect("the root of a target can be read");
            if root.lines().any(|line| line.trim() == "#![forbid(unsafe_code)]") {
                with += 1;
            } else {
                without
                    .push(target.src_path.strip_prefix(&metadata().workspace_root).expect("below the root").to_owned());
            }
        }
    }
    assert!(without.is_empty(), "without #![forbid(unsafe_code)]: {without:?}");
    assert!(with >= MAY_KNOW.len() - 1, "only {with} roots were seen");
}

/// Generated code, which the lints were not written for.
const GENERATED: &str = "plugvisor-proto";

/// A crate that does not inherit the lints would be held to nothing.
#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    for package in members() {
        let manifest = fs::read_to_string(&package.manifest_path).expect("a manifest can be read");
        let inherits = manifest.contains("[lints]\nworkspace = true") || package.name == GENERATED;
        assert!(inherits, "{} has no [lints] workspace = true", package.name);
        assert_eq!(package.publish.as_deref(), Some(&[][..]), "{} could be published by mistake", package.name);
    }
}
