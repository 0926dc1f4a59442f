//! The pages that people begin with: what they point to exists.

use std::path::{Path, PathBuf};

const PAGES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "docs/manifest.md",
    "docs/bundle.md",
    "docs/lifecycle.md",
    "docs/protocol.md",
    "docs/systemd.md",
    "docs/testing.md",
    "docs/escape.md",
    "docs/trace.md",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text(page: &str) -> String {
    std::fs::read_to_string(root().join(page)).unwrap_or_else(|error| panic!("{page}: {error}"))
}

#[test]
fn links_lead_somewhere() {
    let mut broken = Vec::new();
    let mut followed = 0;
    for page in PAGES {
        let text = text(page);
        for rest in text.split("](").skip(1) {
            let target = rest.split(')').next().unwrap_or_default();
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") {
                continue;
            }
            let beside = root().join(page).parent().map_or_else(root, Path::to_path_buf);
            followed += 1;
            if !beside.join(file).exists() {
                broken.push(format!("{page}: {target}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:?}");
    assert!(followed > 8, "only {followed} links were followed");
}

/// ARCHITECTURE.md says where to look; a file that moved makes it lie.
#[test]
fn the_map_names_what_is_there() {
    let page = text("ARCHITECTURE.md");
    let table = page.split("## Where to look").nth(1).expect("the page ends with the map");
    let paths: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|path| path.contains('/')).collect();
    let whole = |path: &&str| {
        ["deploy/", "proto/", "supervisor/", "systemd/", "tests/"].iter().any(|top| path.starts_with(top))
    };
    let (full, below): (Vec<&str>, Vec<&str>) = paths.into_iter().partition(whole);
    let missing: Vec<&&str> = full.iter().filter(|path| !root().join(path).exists()).collect();
    assert!(missing.is_empty(), "{missing:?}");
    assert!(full.len() >= 8, "{full:?}");
    assert_eq!(below, ["lifecycle/"], "write whole paths");
    for package in page.lines().filter_map(|line| line.split_once("plugvisor-").map(|(path, _)| path.trim())) {
        let is_path = package.contains('/') && !package.contains([' ', '`', '*', '|', '─']);
        assert!(!is_path || root().join(package).join("Cargo.toml").exists(), "{package} is no crate");
    }
}
