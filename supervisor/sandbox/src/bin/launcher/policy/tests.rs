//! What a policy makes of bundles, names and files.

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
        policy.check_level(&name("a"), Digest::from_bytes(CONTENT), Tier::Quarantined, Level::Vm, None, now()).is_err()
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
    for wrong in ["expires = \"soon\"", "expires = \"2026-01-02\"", "expires = 2026-01-02T00:00:00", "expires = 7"] {
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
        ("version = 1\n[[approved]]\nname = \"a\"\ntier = \"verified\"\ndigest = \"sha256:00\"".to_owned(), "digest"),
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
    let shown = path.display().to_string();
    assert_eq!(policy.state(), PolicyFile::Usable { path: shown.clone() });
    assert_eq!(policy.check_file(), Ok(()));
    // What cannot be read is not taken for what it was.
    write("version = 1\n[[directory]]\n");
    assert!(tier(&mut policy, "a", &["/srv/a"], None).is_err());
    assert!(policy.check_file().is_err_and(|refusal| refusal.code == RefusalCode::PolicyFile));
    let PolicyFile::Unusable { path: named, why } = policy.state() else { panic!("it does not hold") };
    assert!(named == shown && why.contains("\n  line 2: directory[0].path: is required"), "{why}");
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
