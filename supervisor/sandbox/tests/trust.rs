//! What a supervisor that was taken over cannot have a trusted bundle do, and which directories give a tier at all.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use harness::{
    As, Harness, Manner, ORDINARY, announce, digest, is_root, listed, make_bundle, open_to_all, patience, read_all,
};
use plugvisor_package::{BundleFile, Digest, content_digest};
use plugvisor_sandbox::protocol::{Exit, Grant, ImportBegin, ImportFile, Launch, RefusalCode, Stored, Tier};
use serde_json::json;

fn start(as_: As) -> Harness {
    Harness::start_with_store(as_, |_| ())
}

/// A bundle `walled` of its own, directly in the trusted directory, with a second program and a file.
fn bundle(harness: &Harness, name: &str) -> PathBuf {
    let path = harness.path("bundles").join(name);
    make_bundle(&harness.path("bundles"), name);
    fs::write(path.join("plugin.json"), Manner::of(&["pause"]).manifest("walled", "bin/walled")).expect("the manifest");
    fs::write(path.join("bin/other"), "#!/bin/sh\necho other\n").expect("a second program");
    fs::set_permissions(path.join("bin/other"), Permissions::from_mode(0o755)).expect("chmod");
    fs::write(path.join("checks"), "what the program looks at before it does anything").expect("a file");
    fs::set_permissions(path.join("checks"), Permissions::from_mode(0o644)).expect("chmod");
    path
}

/// What a supervisor says of these files.
fn said(files: &[ImportFile]) -> ImportBegin {
    let all: Vec<BundleFile> = files
        .iter()
        .map(|file| BundleFile {
            path: file.path.clone(),
            executable: file.executable,
            size: file.size,
            sha256: Digest::from_bytes(file.sha256),
        })
        .collect();
    announce(*content_digest(&all).as_bytes(), files)
}

fn launch_of(harness: &Harness, bundle: [u8; 32]) -> Launch {
    Launch { bundle, ..harness.request(&["pause"]) }
}

/// That a launch from this content is refused because of where it came from, and what is said.
fn refused(harness: &mut Harness, bundle: [u8; 32], why: &str) -> String {
    let request = launch_of(harness, bundle);
    let refusal = harness.launch_stored(request).map(drop).expect_err("it has no tier");
    assert!(refusal.message.contains("untrusted"), "{}", refusal.message);
    assert!(refusal.message.contains(why), "{}", refusal.message);
    refusal.message
}

#[test]
fn what_runs_is_what_the_manifest_says() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let manner = Manner { env: vec![("COLOUR".into(), "green".into())], ..Manner::of(&["env"]) };
        let request = harness.request_in(&manner);
        let mut plugin = harness.launch(request.clone());
        let first = read_all(&mut plugin.stdout);
        assert!(first.contains("COLOUR=green"), "{first}");
        harness.exit_of(plugin.launched.launch);
        if as_ == As::Ordinary {
            continue;
        }
        // And so it is for a launcher that finds the bundle in its store.
        let hex = Digest::from_bytes(request.bundle).to_string().trim_start_matches("sha256:").to_owned();
        let own = harness.path("store/bundles").join(hex);
        await_file(&own.join("list"));
        let restart = |harness: &mut Harness| {
            harness.process.kill().expect("SIGKILL");
            harness.process.wait().expect("its end");
            harness.restart();
        };
        restart(&mut harness);
        let mut plugin = harness.launch_stored(request.clone()).expect("launched");
        assert_eq!(read_all(&mut plugin.stdout), first);
        harness.exit_of(plugin.launched.launch);
        // An older launcher wrote the name and the directories alone: such a bundle is imported anew.
        fs::write(own.join("about"), format!("walled\n{}\n", harness.path("bundles/walled").display())).expect("old");
        restart(&mut harness);
        assert_eq!(harness.find(request.bundle), None);
        let plugin = harness.launch(request.clone());
        assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false));
        // One that did not look at what memory the files ask for wrote nothing of it, and counts as no more.
        await_file(&own.join("list"));
        let about = fs::read_to_string(own.join("about")).expect("what is known of it");
        let mut about: serde_json::Value = serde_json::from_str(&about).expect("JSON");
        assert_eq!(about.as_object_mut().and_then(|about| about.remove("writable_code")), Some(json!("none")));
        fs::write(own.join("about"), about.to_string()).expect("old");
        restart(&mut harness);
        assert_eq!(harness.find(request.bundle), None);
    }
}

/// Waits for a file that the store writes when it has the time. There is no event for it outside of the launcher.
fn await_file(path: &Path) {
    let deadline = Instant::now() + patience();
    while !path.exists() {
        assert!(Instant::now() < deadline, "{} never came", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_manifest_bounds_what_may_be_asked_for() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let with = |security| Manner { security, ..Manner::of(&["pause"]) };
        let mut ask = |security, grants: &[Grant], why: &str| {
            let mut request = harness.request_in(&with(security));
            request.grants = grants.to_vec();
            let refusal = harness.try_launch(request).map(drop).expect_err(why);
            assert_eq!(refusal.code, RefusalCode::Policy, "{}", refusal.message);
            assert!(refusal.message.contains(why), "{}", refusal.message);
        };
        ask(json!({}), &[Grant::SpawnChild], "does not ask for SpawnChild");
        ask(json!({ "capabilities": ["process:spawn-child"] }), &[Grant::WriteTemp], "does not ask for WriteTemp");
        ask(json!({ "sandbox": { "isolationLevel": "container" } }), &[], "asks for the level Container");
        // It claims less than its directory would give.
        ask(json!({ "trustLevel": "untrusted" }), &[], "its bundle is untrusted");
        ask(json!({ "trustLevel": "quarantined" }), &[], "quarantined");
        // A program that is not there, and variables that are not the plugin's own, are not even stored.
        let no_program = harness.path("bundles/no-program");
        make_bundle(&harness.path("bundles"), "no-program");
        let manifest =
            |manner: &Manner, exec| fs::write(no_program.join("plugin.json"), manner.manifest("walled", exec));
        manifest(&Manner::default(), "bin/walled").expect("the manifest");
        let (_, good) = listed(&no_program);
        let tunables = Manner { env: vec![("GLIBC_TUNABLES".into(), "x".into())], ..Manner::default() };
        for (manner, exec, code) in [
            (&Manner::default(), "bin/nowhere", RefusalCode::Entry),
            (&Manner::default(), "plugin.json", RefusalCode::Entry),
            (&tunables, "bin/walled", RefusalCode::Policy),
        ] {
            manifest(manner, exec).expect("the manifest");
            let bytes = fs::read(no_program.join("plugin.json")).expect("the manifest");
            let parsed = plugvisor_package::Manifest::parse(&bytes, &plugvisor_package::ManifestLimits::default());
            let canonical = parsed.expect("a manifest").canonical();
            let mut files = good.clone();
            let own = files.iter_mut().find(|file| file.path == "plugin.json").expect("it");
            own.size = canonical.len() as u64;
            own.sha256 = *Digest::of(&canonical).as_bytes();
            let refusal = harness.import_listed(said(&files), &files, &no_program).expect_err(exec);
            assert_eq!(refusal.code, code, "{}", refusal.message);
        }
    }
}

#[test]
fn a_part_of_a_trusted_directory_is_not_trusted() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let path = bundle(&harness, "whole");
        let (begin, files) = listed(&path);
        // Without the file that its program looks at.
        let part: Vec<ImportFile> = files.iter().filter(|file| file.path != "checks").cloned().collect();
        let stored = harness.import_listed(said(&part), &part, &path).expect("imported");
        assert_eq!(stored.tier, Tier::Untrusted);
        let message = refused(&mut harness, said(&part).bundle, "is not what");
        assert!(message.contains(path.to_str().expect("a path")), "{message}");
        // With another mode.
        let mut changed = files.clone();
        changed.iter_mut().find(|file| file.path == "checks").expect("it").executable = true;
        let stored = harness.import_listed(said(&changed), &changed, &path).expect("imported");
        assert_eq!(stored.tier, Tier::Untrusted);
        // All of it.
        assert_eq!(harness.import_listed(begin, &files, &path).expect("imported").tier, Tier::Verified);
        let request = launch_of(&harness, begin.bundle);
        drop(harness.launch_stored(request).expect("launched"));
        // A file that came since is one that the import lacks; a link is nothing that a bundle has.
        fs::write(path.join("new"), "new").expect("a file");
        fs::set_permissions(path.join("new"), Permissions::from_mode(0o644)).expect("chmod");
        let other = bundle(&harness, "linked");
        symlink("checks", other.join("link")).expect("a link");
        let (_, whole) = listed(&bundle(&harness, "plain"));
        let stored = harness.import_listed(said(&whole), &whole, &other).expect("imported");
        // The same content came from a directory that vouches for it, and from one that does not.
        assert_eq!(stored, Stored { tier: Tier::Verified, bytes: begin.bytes });
        let mut odd = whole.clone();
        odd.retain(|file| file.path != "bin/other");
        fs::remove_file(other.join("bin/other")).expect("removed");
        let stored = harness.import_listed(said(&odd), &odd, &other).expect("imported");
        assert_eq!(stored.tier, Tier::Untrusted);
        refused(&mut harness, said(&odd).bundle, "neither a file nor a directory");
    }
}

#[test]
fn a_bundle_inside_a_bundle_is_not_trusted() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let outer = bundle(&harness, "outer");
        let inner = outer.join("vendor/inner");
        make_bundle(&outer.join("vendor"), "inner");
        fs::write(inner.join("plugin.json"), Manner::of(&["pause"]).manifest("walled", "bin/walled")).expect("its own");
        open_to_all(&inner);
        assert_eq!(harness.import(&inner).expect("imported").tier, Tier::Untrusted);
        let message = refused(&mut harness, digest(&inner), "does not lie directly in a plugin directory");
        assert!(message.contains("vendor/inner"), "{message}");
        // As a part of the bundle around it, it is what it is.
        assert_eq!(harness.import(&outer).expect("imported").tier, Tier::Verified);
    }
}

#[test]
fn what_others_can_write_gives_no_tier() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let path = bundle(&harness, "shared");
        let content = digest(&path);
        let root = harness.path("bundles");
        let above = harness.directory.path().to_owned();
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("chmod");
        let others: Vec<(PathBuf, u32)> = vec![
            (path.join("checks"), 0o644),
            (path.join("bin/walled"), 0o755),
            (path.join("plugin.json"), 0o644),
            (path.join("bin"), 0o755),
            (path.clone(), 0o755),
            (root, 0o755),
            (above.clone(), 0o755),
        ];
        for (at, usual) in &others {
            for writable in [0o020, 0o002] {
                mode(at, usual | writable);
                let stored = harness.import(&path).expect("imported");
                if as_ == As::Ordinary {
                    // Launcher and supervisor are one user: nothing is claimed.
                    assert_eq!(stored.tier, Tier::Verified, "{}", at.display());
                } else {
                    assert_eq!(stored.tier, Tier::Untrusted, "{}", at.display());
                    let message = refused(&mut harness, content, &format!("chmod go-w \"{}\"", at.display()));
                    assert!(message.contains(&format!("mode {:04o}", usual | writable)), "{message}");
                }
                mode(at, *usual);
            }
            if as_ == As::Root && is_root() {
                chown(at, Some(ORDINARY), None).expect("chown");
                assert_eq!(harness.import(&path).expect("imported").tier, Tier::Untrusted, "{}", at.display());
                let message = refused(&mut harness, content, &format!("chown root \"{}\"", at.display()));
                assert!(message.contains(&format!("owner uid {ORDINARY}")), "{message}");
                chown(at, Some(0), None).expect("chown");
            }
        }
        // In a sticky directory on the way nobody moves what is root's; the one that gives the tier is another matter.
        mode(&above, 0o1777);
        assert_eq!(harness.import(&path).expect("imported").tier, Tier::Verified);
        mode(&above, 0o755);
        let request = launch_of(&harness, content);
        drop(harness.launch_stored(request).expect("launched"));
    }
}

/// What was imported while nobody else could write it has its tier also when somebody can now: its bytes are in the store.
#[test]
fn what_is_in_the_store_is_as_it_came() {
    if !is_root() {
        println!("SKIP privileged-lane: an ordinary user's launcher claims nothing of who can write");
        return;
    }
    let mut harness = start(As::Root);
    let path = bundle(&harness, "kept");
    let content = digest(&path);
    assert_eq!(harness.import(&path).expect("imported").tier, Tier::Verified);
    fs::set_permissions(harness.path("bundles"), Permissions::from_mode(0o777)).expect("chmod");
    fs::write(path.join("checks"), "something else").expect("written");
    assert_eq!(harness.import(&path).expect("imported").tier, Tier::Untrusted);
    let request = launch_of(&harness, content);
    drop(harness.launch_stored(request).expect("the bytes that were approved"));
}
