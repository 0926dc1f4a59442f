//! Bundles on a real file system: what is opened, what is refused, and what the digest covers.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value, reason = "helpers of tests")]

use std::{
    fs::{self, File},
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use plugvisor_package::{Bundle, BundleError, BundleLimits, Digest, EntryKind, Refusal, Services};
use proptest::prelude::*;
use prost::Message;
use prost_types::{FileDescriptorProto, FileDescriptorSet, ServiceDescriptorProto};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};
use tempfile::TempDir;

const SCRIPT: &[u8] = b"#!/bin/sh\nexit 0\n";

fn put(root: &Path, path: &str, bytes: &[u8], mode: u32) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

/// A bundle that opens: a manifest with `more` merged in, and a script.
fn bundle(more: Value) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut manifest = json!({ "name": "a", "version": "1.0.0" });
    manifest.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    put(directory.path(), "plugin.json", manifest.to_string().as_bytes(), 0o644);
    put(directory.path(), "bin/a", SCRIPT, 0o755);
    directory
}

fn open(directory: &TempDir) -> Result<Bundle, BundleError> {
    Bundle::open(directory.path(), &BundleLimits::default())
}

fn refusal(directory: &TempDir, limits: &BundleLimits) -> (String, Refusal) {
    match Bundle::open(directory.path(), limits) {
        Err(error @ BundleError::Refused { .. }) => {
            assert!(!error.hint().is_empty());
            let BundleError::Refused { path, refusal } = error else { unreachable!() };
            (path.strip_prefix(directory.path()).unwrap().display().to_string(), refusal)
        }
        other => panic!("expected a refusal, found {other:?}"),
    }
}

fn descriptor(services: &[(&str, &str)]) -> Vec<u8> {
    let file = services.iter().map(|(package, name)| FileDescriptorProto {
        package: Some((*package).into()),
        service: vec![ServiceDescriptorProto { name: Some((*name).into()), ..Default::default() }],
        ..Default::default()
    });
    FileDescriptorSet { file: file.collect() }.encode_to_vec()
}

#[test]
fn a_good_bundle_is_opened_with_its_entry_and_services() {
    let module = json!({
        "providers": ["acme.v1.Thumbs", "Stats"],
        "exports": ["Thumbs"],
        "controllers": ["Thumbs"],
        "crossPluginServices": [{ "serviceName": "Stats", "token": "S" }],
    });
    let directory = bundle(json!({ "module": module }));
    let set = descriptor(&[("acme.v1", "Thumbs"), ("acme.v1", "Stats"), ("other", "Unused")]);
    put(directory.path(), "descriptor.binpb", &set, 0o600);
    let mut opened = open(&directory).unwrap();
    assert_eq!(opened.services.provided, ["acme.v1.Stats", "acme.v1.Thumbs"]);
    assert_eq!(opened.services.exported, ["acme.v1.Thumbs"]);
    assert_eq!(opened.services.controllers, ["acme.v1.Thumbs"]);
    assert_eq!(opened.services.cross_plugin[0].service_name, "acme.v1.Stats");
    assert_eq!(opened.descriptor_set.as_deref(), Some(&*set));
    assert_eq!(opened.entry.path, "bin/a");
    assert_eq!(opened.entry.kind, EntryKind::Script);
    assert_eq!(opened.entry.sha256, Digest::of(SCRIPT));
    let mut bytes = Vec::new();
    opened.entry.file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, SCRIPT, "the entry's descriptor stands at its beginning");
    let paths: Vec<&str> = opened.files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(paths, ["bin/a", "descriptor.binpb", "plugin.json"]);
    assert_eq!(opened.path(), directory.path());
}

#[test]
fn a_program_of_this_host_is_taken_and_another_machine_is_named() {
    let directory = bundle(json!({}));
    let mut head = vec![0; 64];
    File::open(std::env::current_exe().unwrap()).unwrap().read_exact(&mut head).unwrap();
    put(directory.path(), "bin/a", &head, 0o755);
    assert_eq!(open(&directory).unwrap().entry.kind, EntryKind::Elf);
    head[18..20].copy_from_slice(&22_u16.to_le_bytes());
    put(directory.path(), "bin/a", &head, 0o755);
    let error = open(&directory).unwrap_err();
    let BundleError::EntryArchitecture { found, host, .. } = &error else { panic!("{error:?}") };
    assert_eq!(found, "S390 (64 bits)");
    assert!(error.to_string().ends_with(&format!("is built for S390 (64 bits), this host is {host}")), "{error}");
    assert_eq!(error.hint(), format!("build the program for {host}"));
}

#[test]
fn a_wrong_entry_is_told_why() {
    let directory = bundle(json!({}));
    let entry = directory.path().join("bin/a");
    put(directory.path(), "bin/a", SCRIPT, 0o644);
    let error = open(&directory).unwrap_err();
    assert!(matches!(error, BundleError::EntryNotExecutable { .. }), "{error:?}");
    assert_eq!(error.hint(), format!("chmod +x {}", entry.display()));
    put(directory.path(), "bin/a", b"", 0o755);
    assert!(matches!(open(&directory), Err(BundleError::EntryNotAProgram { .. })));
    fs::remove_file(&entry).unwrap();
    assert!(matches!(open(&directory), Err(BundleError::EntryMissing { path }) if path == entry));
    fs::create_dir(&entry).unwrap();
    assert!(matches!(open(&directory), Err(BundleError::EntryMissing { .. })), "a directory is no entry");
}

#[test]
fn what_is_no_file_is_refused_unread() {
    let limits = BundleLimits::default();
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secret", b"secret", 0o644);

    for target in [outside.path().join("secret"), outside.path().to_owned(), "nowhere".into()] {
        let directory = bundle(json!({}));
        symlink(&target, directory.path().join("data")).unwrap();
        assert_eq!(refusal(&directory, &limits), ("data".into(), Refusal::SymbolicLink), "{}", target.display());
    }
    for path in ["plugin.json", "bin/a"] {
        let directory = bundle(json!({}));
        let moved = outside.path().join("moved");
        fs::rename(directory.path().join(path), &moved).unwrap();
        symlink(&moved, directory.path().join(path)).unwrap();
        assert_eq!(refusal(&directory, &limits), (path.into(), Refusal::SymbolicLink));
    }
    let directory = bundle(json!({}));
    fs::rename(directory.path().join("bin"), outside.path().join("bin")).unwrap();
    symlink(outside.path().join("bin"), directory.path().join("bin")).unwrap();
    assert_eq!(refusal(&directory, &limits), ("bin".into(), Refusal::SymbolicLink));

    for path in ["plugin.json", "bin/a", "data"] {
        let directory = bundle(json!({}));
        let at = directory.path().join(path);
        let _ = fs::remove_file(&at);
        mknodat(CWD, &at, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        assert_eq!(refusal(&directory, &limits), (path.into(), Refusal::Special("named pipe")));
    }
    let directory = bundle(json!({}));
    let _socket = UnixListener::bind(directory.path().join("s")).unwrap();
    assert_eq!(refusal(&directory, &limits), ("s".into(), Refusal::Special("socket")));
}

#[test]
fn set_id_bits_are_refused() {
    for mode in [0o4755, 0o2755] {
        let directory = bundle(json!({}));
        put(directory.path(), "bin/tool", SCRIPT, mode);
        let found = refusal(&directory, &BundleLimits::default());
        assert_eq!(found, ("bin/tool".into(), Refusal::SetId), "{mode:o}");
    }
}

#[test]
fn names_are_held_to_what_a_line_can_show() {
    let limits = BundleLimits { name_bytes: 20, ..BundleLimits::default() };
    for (name, expected) in [
        (&b"caf\xe9"[..], Refusal::NameNotUtf8),
        (b"line\nbreak", Refusal::NameControl),
        (b"esc\x1b[2J", Refusal::NameControl),
        (b"123456789012345678901", Refusal::NameTooLong(20)),
    ] {
        let directory = bundle(json!({}));
        fs::write(directory.path().join(std::ffi::OsStr::from_bytes(name)), b"x").unwrap();
        let error = Bundle::open(directory.path(), &limits).unwrap_err();
        assert!(!error.to_string().contains(char::is_control), "{error:?}");
        assert_eq!(refusal(&directory, &limits).1, expected, "{name:?}");
    }
}

#[test]
fn every_limit_is_held_and_named() {
    let directory = bundle(json!({}));
    put(directory.path(), "x/y/z", &[7; 1000], 0o644);
    put(directory.path(), "descriptor.binpb", &descriptor(&[("a", "B"), ("a", "C")]), 0o644);
    assert!(open(&directory).is_ok());
    let default = BundleLimits::default;
    let cases = [
        (BundleLimits { entries: 6, ..default() }, "", Refusal::TooManyEntries(6)),
        (BundleLimits { depth: 1, ..default() }, "x/y", Refusal::TooDeep(1)),
        (BundleLimits { file_bytes: 999, ..default() }, "x/y/z", Refusal::FileTooLarge(999)),
        (BundleLimits { total_bytes: 1005, ..default() }, "", Refusal::BundleTooLarge(1005)),
        (BundleLimits { descriptor_bytes: 5, ..default() }, "descriptor.binpb", Refusal::FileTooLarge(5)),
    ];
    for (limits, path, expected) in cases {
        assert_eq!(refusal(&directory, &limits), (path.to_owned(), expected));
    }
    let mut limits = default();
    limits.manifest.bytes = 10;
    assert_eq!(refusal(&directory, &limits), ("plugin.json".into(), Refusal::FileTooLarge(10)));
    let error = Bundle::open(directory.path(), &BundleLimits { services: 1, ..default() }).unwrap_err();
    assert!(error.to_string().ends_with("it has more than 1 services"), "{error}");
}

#[test]
fn missing_and_broken_parts_are_told_apart() {
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(open(&empty), Err(BundleError::NoManifest { path }) if path == empty.path()));
    let nowhere = Bundle::open(&empty.path().join("x"), &BundleLimits::default());
    assert!(matches!(nowhere, Err(BundleError::Io { .. })));

    let error = open(&bundle(json!({ "nmae": 1, "critical": "no" }))).unwrap_err();
    let BundleError::Manifest { problems, .. } = &error else { panic!("{error:?}") };
    assert_eq!(problems.all().len(), 2);

    let directory = bundle(json!({ "runtime": { "descriptorSet": "api.binpb" } }));
    assert!(matches!(open(&directory), Err(BundleError::DescriptorMissing { .. })));
    put(directory.path(), "api.binpb", b"\xff\xff\xff", 0o644);
    let error = open(&directory).unwrap_err();
    assert!(error.to_string().ends_with("it is not a google.protobuf.FileDescriptorSet"), "{error}");
}

#[test]
fn names_of_services_must_mean_one_service() {
    let told = |module: Value, set: Option<Vec<u8>>| -> Vec<String> {
        let directory = bundle(json!({ "module": module }));
        if let Some(set) = set {
            put(directory.path(), "descriptor.binpb", &set, 0o644);
        }
        match open(&directory) {
            Err(BundleError::Manifest { problems, .. }) => problems.all().iter().map(ToString::to_string).collect(),
            other => panic!("{other:?}"),
        }
    };
    let set = || Some(descriptor(&[("a.v1", "Thumbs"), ("b.v1", "Thumbs"), ("a.v1", "Stats")]));
    assert_eq!(
        told(
            json!({ "providers": ["Thumbs", "Stats", "a.v1.Stats", "a.v1.Stat", "Nothing"], "exports": ["b.v1.Thumbs"] }),
            set()
        ),
        [
            "module.providers[0]: \"Thumbs\" means 2 services of the descriptor set (write one of a.v1.Thumbs, b.v1.Thumbs)",
            "module.providers[2]: a.v1.Stats stands in the list already (remove one of them)",
            "module.providers[3]: the descriptor set has no service a.v1.Stat (did you mean \"a.v1.Stats\"?)",
            "module.providers[4]: the descriptor set has no service Nothing (write the descriptor set anew if the service is new)",
            "module.exports[0]: b.v1.Thumbs is offered, but the plugin does not say that it serves it (add \"b.v1.Thumbs\" to module.providers)",
        ]
    );
    assert_eq!(
        told(json!({ "providers": ["Thumbs"] }), None),
        [
            "module.providers[0]: \"Thumbs\" has no package, and the bundle has no descriptor set to find it in (write package.Service, or add a descriptor set to the bundle)"
        ]
    );
    let full = bundle(json!({ "module": { "providers": ["a.v1.Thumbs"], "exports": ["a.v1.Thumbs"] } }));
    let Services { provided, exported, .. } = open(&full).unwrap().services;
    assert_eq!((provided, exported), (vec!["a.v1.Thumbs".to_owned()], vec!["a.v1.Thumbs".to_owned()]));
}

#[test]
fn a_checksum_that_fits_opens_the_bundle_and_another_does_not() {
    let digest = open(&bundle(json!({}))).unwrap().digest;
    let hash = digest.to_string().trim_start_matches("sha256:").to_owned();
    let with = |hash: &str| bundle(json!({ "security": { "checksum": { "algorithm": "sha256", "hash": hash } } }));
    assert_eq!(open(&with(&hash)).unwrap().digest, digest, "the checksum stands outside of what it covers");
    let error = open(&with(&"0".repeat(64))).unwrap_err();
    let BundleError::Checksum { actual, .. } = &error else { panic!("{error:?}") };
    assert_eq!(*actual, digest);
    assert!(error.hint().ends_with(&hash), "{}", error.hint());
}

#[test]
fn the_digest_covers_content_and_nothing_else() {
    let directory = bundle(json!({}));
    let root = directory.path();
    put(root, "data/x", b"1", 0o644);
    let digest = open(&directory).unwrap().digest;
    // The golden value, so that two versions of Plugvisor agree on one bundle.
    assert_eq!(digest.to_string(), "sha256:fea3797c57deca84bab314ab1df2881afa70d5038b02975cb526a60a4010943e");

    let same = |what: &str| assert_eq!(open(&directory).unwrap().digest, digest, "{what}");
    put(root, "data/x", b"1", 0o606);
    put(root, "bin/a", SCRIPT, 0o700);
    same("mode bits beside the owner's execution");
    File::options().write(true).open(root.join("data/x")).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    same("times");
    fs::create_dir(root.join("empty")).unwrap();
    same("directories without files");
    put(root, "plugin.json", b"{\n\t\"version\": \"1.0.0\", \"n\\u0061me\": \"a\"\n}\n", 0o755);
    same("how the manifest is laid out");

    let mut seen = vec![digest];
    let mut other = |what: &str| {
        let digest = open(&directory).unwrap().digest;
        assert!(!seen.contains(&digest), "{what}");
        seen.push(digest);
    };
    put(root, "data/x", b"2", 0o644);
    other("content");
    put(root, "data/x", b"2", 0o744);
    other("execution");
    fs::rename(root.join("data/x"), root.join("data/y")).unwrap();
    other("a name");
    put(root, "data/z", b"", 0o644);
    other("one file more");
    put(root, "plugin.json", b"{\"name\":\"a\",\"version\":\"1.0.1\"}", 0o644);
    other("a value of the manifest");
}

#[test]
fn below_a_parent_only_a_real_directory_of_that_name_is_opened() {
    let parent = tempfile::tempdir().unwrap();
    let elsewhere = bundle(json!({}));
    fs::rename(elsewhere.path(), parent.path().join("good")).unwrap();
    symlink("good", parent.path().join("link")).unwrap();
    fs::write(parent.path().join("file"), b"").unwrap();
    let descriptor = File::open(parent.path()).unwrap();
    let open = |name: &str| {
        Bundle::open_at(std::os::fd::AsFd::as_fd(&descriptor), parent.path(), name, &BundleLimits::default())
    };
    assert_eq!(open("good").unwrap().path(), parent.path().join("good"));
    assert!(matches!(open("link"), Err(BundleError::Refused { refusal: Refusal::SymbolicLink, .. })));
    for name in ["file", "absent", "", ".", "..", "good/bin", "/etc"] {
        assert!(matches!(open(name), Err(BundleError::Io { .. })), "{name:?}");
    }
}

/// While another thread turns a file into a link, a pipe and back as fast as it can, opening either gives the bundle as
/// it is or refuses: it never waits, and nothing from outside gets in.
#[test]
fn a_directory_that_changes_underneath_leads_nowhere() {
    let outside = tempfile::tempdir().unwrap();
    put(outside.path(), "secret", b"from outside", 0o644);
    let directory = bundle(json!({}));
    let data = directory.path().join("data");
    put(directory.path(), "data", b"inside", 0o644);
    let good = open(&directory).unwrap().digest;
    let stop = AtomicBool::new(false);
    let (mut opened, mut refused, mut rounds) = (0, 0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let scratch = tempfile::tempdir_in(outside.path()).unwrap();
            let next = scratch.path().join("next");
            while !stop.load(Ordering::Relaxed) {
                symlink(outside.path().join("secret"), &next).unwrap();
                fs::rename(&next, &data).unwrap();
                mknodat(CWD, &next, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
                fs::rename(&next, &data).unwrap();
                put(scratch.path(), "next", b"inside", 0o644);
                fs::rename(&next, &data).unwrap();
            }
        });
        // The other thread may not run for a while on a busy machine, so the race goes on until both were seen.
        while rounds < 2000 || (rounds < 1_000_000 && (opened == 0 || refused == 0)) {
            rounds += 1;
            match open(&directory) {
                Ok(bundle) => {
                    assert_eq!(bundle.digest, good);
                    opened += 1;
                }
                Err(BundleError::Refused { path, .. }) => {
                    assert_eq!(path, data);
                    refused += 1;
                }
                // Between looking at a name and opening it the name may be gone.
                Err(BundleError::Io { path, .. }) => assert_eq!(path, data),
                Err(other) => panic!("{other:?}"),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: nothing was raced");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The same files written in another order, with other permissions and times, have the same digest; one changed byte
    /// gives another.
    #[test]
    fn the_digest_is_a_function_of_the_content(
        files in proptest::collection::btree_map("[a-z]{1,6}(/[a-z]{1,6}){0,2}", proptest::collection::vec(any::<u8>(), 0..40), 1..6),
        private in any::<bool>(),
        changed in any::<prop::sample::Index>(),
    ) {
        // A path that is also a directory of another cannot exist.
        let fits = |path: &str| files.keys().all(|other| !other.starts_with(&format!("{path}/")));
        let files: Vec<_> = files.iter().filter(|(path, _)| fits(path) && !path.starts_with("bin")).collect();
        prop_assume!(!files.is_empty());
        let (one, two) = (bundle(json!({})), bundle(json!({})));
        for (path, bytes) in &files {
            put(one.path(), path, bytes, 0o644);
        }
        for (path, bytes) in files.iter().rev() {
            put(two.path(), path, bytes, if private { 0o600 } else { 0o666 });
        }
        let digest = open(&one).unwrap().digest;
        prop_assert_eq!(open(&two).unwrap().digest, digest);
        let (path, bytes) = files[changed.index(files.len())];
        let mut longer = bytes.clone();
        longer.push(0);
        put(two.path(), path, &longer, 0o644);
        prop_assert_ne!(open(&two).unwrap().digest, digest);
    }
}
