//! What the policy file on this host lets a key give. A launcher decides by its own file, which may be on another host; this
//! tells at the signing what the one here would refuse at a launch.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use plugvisor_package::TrustTier;
use serde::Deserialize;

/// The policy file of root's launcher.
pub(super) const POLICY: &str = "/etc/plugvisor/launcher.toml";

/// As many bytes as a launcher reads.
const MOST_BYTES: u64 = 1 << 20;

/// What of the file is of interest here. Whether the rest of it holds is told by `plugvisor doctor`.
#[derive(Deserialize)]
struct Policy {
    #[serde(default)]
    key: Vec<Key>,
}

#[derive(Deserialize)]
struct Key {
    public_key: String,
    tier: TrustTier,
}

/// What to tell when the file is there and lets the key give less than this tier.
pub(super) fn warning(file: &Path, id: &str, public: &str, tier: TrustTier) -> Option<String> {
    let most = most(file, public).filter(|most| *most < tier)?;
    Some(format!(
        "the launcher's policy file {} lets the key {id} give {most} at most, so that a launcher with it refuses to start this \
         bundle: approve it with --tier {most}, by another key, or change tier in the key's entry there",
        file.display()
    ))
}

fn most(file: &Path, public: &str) -> Option<TrustTier> {
    let file = File::open(file).ok().filter(|file| file.metadata().is_ok_and(|found| found.is_file()))?;
    let mut text = String::new();
    file.take(MOST_BYTES).read_to_string(&mut text).ok()?;
    let policy: Policy = toml::from_str(&text).ok()?;
    policy.key.iter().find(|key| key.public_key.eq_ignore_ascii_case(public)).map(|key| key.tier)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_key_may_not_give_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("launcher.toml");
        let told = |public: &str, tier| warning(&file, "ops", public, tier);
        assert_eq!(told("0a", TrustTier::Internal), None, "there is no file");
        let text = "version = 1\n[[key]]\nid = \"other\"\npublic_key = \"0b\"\ntier = \"internal\"\n\
                    [[key]]\nid = \"ops\"\npublic_key = \"0A\"\ntier = \"verified\"\n";
        std::fs::write(&file, text).unwrap();
        let said = told("0a", TrustTier::Internal).unwrap();
        for word in ["launcher.toml", "the key ops", "verified at most", "--tier verified"] {
            assert!(said.contains(word), "{said}");
        }
        for (public, tier) in [
            ("0a", TrustTier::Verified),
            ("0a", TrustTier::Community),
            ("0b", TrustTier::Internal),
            // Of a key that stands nowhere here another host may know.
            ("0c", TrustTier::Internal),
        ] {
            assert_eq!(told(public, tier), None, "{public} {tier}");
        }
        std::fs::write(&file, "not a policy").unwrap();
        assert_eq!(told("0a", TrustTier::Internal), None);
    }
}
