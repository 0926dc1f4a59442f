//! The directories of a plugin's name (`filesystem:read-config`, `read-data`, `write-data`), tried from inside: what is
//! there, what may be done with it, and that nothing else is reached through it. As root and as an ordinary user.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::Path,
};

use harness::{As, Harness, LEVELS, Manner, ORDINARY, is_root, with_directories};
use plugvisor_package::Digest;
use plugvisor_sandbox::protocol::{Grant, Level, Refusal, RefusalCode, Reply, Request};

const ENOENT: &str = "2";
const EACCES: &str = "13";
const EROFS: &str = "30";

const ALL: [Grant; 3] = [Grant::ReadConfig, Grant::ReadData, Grant::WriteData];

fn refused(harness: &mut Harness, grants: &[Grant]) -> Refusal {
    let mut request = harness.request(&["pause"]);
    request.grants = grants.to_vec();
    harness.try_launch(request).map(drop).expect_err("it is refused")
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("chmod");
}

#[test]
fn without_a_grant_there_is_nothing() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        for level in LEVELS {
            let seen = harness.attempt_at(level, &[], &["list", "/plugvisor/config", "list", "/plugvisor/data", "env"]);
            let nothing = if level == Level::None { ENOENT } else { EACCES };
            // Landlock does not say what is there.
            assert!(seen[..2].iter().all(|seen| seen == ENOENT || seen == nothing), "{as_:?} {level:?}: {seen:?}");
            assert!(!seen[2].contains("_DIR="), "{as_:?} {level:?}: {}", seen[2]);
        }
        assert!(fs::read_dir(harness.path("data")).expect("the root").next().is_none(), "and nothing was made");
    }
}

#[test]
fn each_grant_opens_what_it_says() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        for level in LEVELS {
            let other = if level == Level::None { ENOENT } else { EACCES };
            let config = [
                "cat",
                "/plugvisor/config/greeting",
                "list",
                "/plugvisor/config",
                "append",
                "/plugvisor/config/greeting",
                "append",
                "/plugvisor/config/new",
                "list",
                "/plugvisor/data",
            ];
            let seen = harness.attempt_at(level, &[Grant::ReadConfig], &config);
            // Who owns a file is asked before whether anybody may write it.
            assert!(seen[2] == EROFS || seen[2] == EACCES, "{as_:?} {level:?}: {}", seen[2]);
            assert_eq!([&seen[0], &seen[1], &seen[3]], ["hello", "greeting", EROFS], "{as_:?} {level:?}");
            assert!(seen[4] == other || seen[4] == ENOENT, "{as_:?} {level:?}: {}", seen[4]);

            let name = format!("/plugvisor/data/{}", level.as_str());
            let moved = format!("{name}/moved");
            let (file, kept) = (format!("{name}/file"), format!("{name}/kept"));
            let write = [
                "mkdir",
                &name,
                "write",
                &file,
                "kept",
                "rename",
                &file,
                &moved,
                "cat",
                &moved,
                "copy-exec",
                "/plugvisor/data/program",
                "remove",
                "/plugvisor/data/program",
                "list",
                "/plugvisor/config",
                "env",
                "keep",
                &kept,
            ];
            let seen = harness.attempt_at(level, &[Grant::WriteData], &write);
            let no_exec = if level == Level::Sandbox { "38" } else { EACCES };
            assert_eq!(seen[..6], ["ok", "ok", "ok", "kept", no_exec, "ok"], "{as_:?} {level:?}");
            assert!(seen[6] == other || seen[6] == ENOENT, "{as_:?} {level:?}: {}", seen[6]);
            assert!(seen[7].contains("PLUGVISOR_DATA_DIR=/plugvisor/data"), "{}", seen[7]);
            assert!(!seen[7].contains("PLUGVISOR_CONFIG_DIR"), "{}", seen[7]);
            assert_eq!(seen[8], "ok", "{as_:?} {level:?}: what programs do with files");
            if level != Level::None {
                let seen = harness.attempt_at(level, &[Grant::WriteData], &["bind", "/plugvisor/data/socket"]);
                assert_eq!(seen, [EACCES], "{as_:?} {level:?}: no sockets");
            }
            // Another launch, another grant, the same data.
            let read = ["cat", &moved, "append", &moved, "append", "/plugvisor/data/new"];
            let seen = harness.attempt_at(level, &[Grant::ReadData, Grant::ReadConfig], &read);
            assert_eq!(seen, ["kept", EROFS, EROFS], "{as_:?} {level:?}");
        }
    }
}

#[test]
fn what_is_mounted_is_read_back() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        for level in LEVELS {
            let mut request = harness.request_at(level, &["pause"]);
            request.grants = ALL.to_vec();
            let plugin = harness.launch(request);
            let states = &plugin.launched.directories;
            let places: Vec<&str> = states.iter().map(|state| state.place.as_str()).collect();
            assert_eq!(places, ["/plugvisor/config", "/plugvisor/data"], "{as_:?} {level:?}");
            let held = |index: usize| states[index].enforced.clone().unwrap_or_default();
            assert!(held(0).starts_with("ro,nosuid,nodev,noexec"), "{states:?}");
            assert!(held(1).starts_with("rw,nosuid,nodev,noexec") && held(1).ends_with("sets no quota"), "{states:?}");
            assert!(states[1].requested.contains("data/walled"), "{states:?}");
            let listed = harness.list();
            let known = listed.launches.iter().find(|known| known.launch == plugin.launched.launch).expect("it runs");
            assert_eq!(known.grants, ALL, "the next supervisor compares them");
            let launch = plugin.launched.launch;
            assert_eq!(harness.ask(&Request::Kill { launch }, &[]).0, Reply::Done);
            harness.exit_of(launch);
        }
    }
}

/// As root the data are of the uid that the name has for good, below a directory that nobody else may enter.
#[test]
fn data_are_the_names_for_good() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        let data = harness.path("data");
        let uids: Vec<u32> = ["walled", "walled-other"]
            .into_iter()
            .map(|plugin| {
                let mut request = harness.request(&["write", "/plugvisor/data/name", plugin]);
                (request.plugin, request.grants) = (plugin.to_owned(), vec![Grant::WriteData]);
                let plugin = harness.launch(request);
                harness.exit_of(plugin.launched.launch);
                plugin.launched.uid
            })
            .collect();
        let own = |name: &str| fs::metadata(data.join(name)).expect("it was made");
        for (name, uid) in ["walled", "walled-other"].into_iter().zip(&uids) {
            assert_eq!((own(name).uid(), own(name).mode() & 0o777), (*uid, 0o700), "{as_:?} {name}");
            assert_eq!(fs::read_to_string(data.join(name).join("name")).expect("its file"), name);
        }
        // Each sees its own, and nothing of the other through it.
        let seen = harness.attempt_at(
            Level::Process,
            &[Grant::ReadData],
            &[
                "cat",
                "/plugvisor/data/name",
                "list",
                "/plugvisor/data/..",
                "read",
                "/plugvisor/data/../walled-other/name",
            ],
        );
        assert_eq!(seen, ["walled", EACCES, ENOENT], "{as_:?}");
        if as_ == As::Root {
            assert_ne!(uids[0], uids[1]);
            // Also for the next launcher.
            harness.process.kill().expect("SIGKILL");
            harness.process.wait().expect("it ends");
            harness.restart();
            let seen = harness.attempt_at(Level::None, &[Grant::ReadData], &["cat", "/plugvisor/data/name"]);
            assert_eq!(seen, ["walled"]);
            assert_eq!(own("walled").uid(), uids[0]);
        }
    }
}

#[test]
fn no_link_is_followed_to_a_directory() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        let elsewhere = harness.path("elsewhere");
        fs::create_dir(&elsewhere).expect("a directory");
        fs::write(elsewhere.join("greeting"), "wrong").expect("a file");
        mode(&elsewhere, 0o755);
        for (kind, grant) in [("config", Grant::ReadConfig), ("data", Grant::WriteData)] {
            let own = harness.path(kind).join("walled");
            drop(fs::remove_dir_all(&own));
            symlink(&elsewhere, &own).expect("a link");
            let refusal = refused(&mut harness, &[grant]);
            assert_eq!(refusal.code, RefusalCode::Policy);
            let shown = own.display().to_string();
            assert!(refusal.message.contains("link") && refusal.message.contains(&shown), "{}", refusal.message);
            fs::remove_file(&own).expect("the link");
            // Nor is a file taken for one.
            fs::write(&own, "").expect("a file");
            assert!(refused(&mut harness, &[grant]).message.contains(&shown));
            fs::remove_file(&own).expect("the file");
        }
        assert!(refused(&mut harness, &[Grant::ReadConfig]).message.contains("mkdir"), "it is not there");
        assert_eq!(harness.attempt_at(Level::Process, &[Grant::WriteData], &["list", "/plugvisor/data"]), [""]);
    }
}

/// Links inside are the plugin's: they lead to what it sees itself.
#[test]
fn a_link_inside_leads_nowhere_else() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        let secret = harness.path("secret").display().to_string();
        symlink(&secret, harness.path("config/walled/link")).expect("a link");
        for level in [Level::Process, Level::Container, Level::Sandbox] {
            let probes = ["read", "/plugvisor/config/link", "follow", "/plugvisor/data/link", &secret];
            let seen = harness.attempt_at(level, &ALL, &probes);
            assert_eq!(seen, [ENOENT, ENOENT], "{as_:?} {level:?}");
        }
    }
}

#[test]
fn what_others_can_change_is_not_shown_as_root() {
    if !is_root() {
        println!("SKIP privileged-lane: only for root it makes a difference who owns a directory");
        return;
    }
    let mut harness = Harness::start_with_directories(As::Root);
    let (config, data) = (harness.path("config"), harness.path("data"));
    let own = config.join("walled");
    let mut wrong = |path: &Path, grant: Grant, words: &[&str]| {
        let refusal = refused(&mut harness, &[grant]);
        assert_eq!(refusal.code, RefusalCode::Policy);
        for word in words.iter().copied().chain([path.display().to_string().as_str()]) {
            assert!(refusal.message.contains(word), "{word} in {}", refusal.message);
        }
    };
    for (path, grant) in [(&config, Grant::ReadConfig), (&own, Grant::ReadConfig), (&data, Grant::ReadData)] {
        mode(path, 0o777);
        wrong(path, grant, &["chmod go-w"]);
        mode(path, 0o755);
        chown(path, Some(ORDINARY), Some(ORDINARY)).expect("chown");
        wrong(path, grant, &["chown root"]);
        chown(path, Some(0), Some(0)).expect("chown");
    }
    // Somebody else's files are not taken over; an empty directory is.
    let own = data.join("walled");
    fs::create_dir(&own).expect("a directory");
    fs::write(own.join("file"), "theirs").expect("a file");
    chown(&own, Some(ORDINARY), Some(ORDINARY)).expect("chown");
    wrong(&own, Grant::ReadData, &["another user", "uids"]);
    fs::remove_file(own.join("file")).expect("empty");
    let seen = harness.attempt_at(Level::Process, &[Grant::WriteData], &["write", "/plugvisor/data/x", "y"]);
    assert_eq!(seen, ["ok"]);
}

#[test]
fn what_the_launcher_has_no_place_for_is_refused() {
    for as_ in As::possible() {
        let mut harness = Harness::start_trusting(as_);
        for (grant, flag) in
            [(Grant::ReadConfig, "--config-root"), (Grant::ReadData, "--data-root"), (Grant::WriteData, "--data-root")]
        {
            let refusal = refused(&mut harness, &[grant]);
            assert_eq!(refusal.code, RefusalCode::Policy);
            assert!(refusal.message.contains(flag), "{}", refusal.message);
        }
        if as_ == As::Root {
            let mut harness = Harness::start_with(as_, |options| {
                with_directories(as_, options);
                options.store = None;
            });
            let refusal = refused(&mut harness, &[Grant::WriteData]);
            assert!(refusal.message.contains("--store"), "uids would not last: {}", refusal.message);
        }
    }
}

/// Whoever can have a bundle imported can give it any name.
#[test]
fn an_unapproved_bundle_gets_no_directory_of_its_name() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_store(as_, |options| {
            let store = options.store.clone();
            with_directories(as_, options);
            options.store = store;
            options.bundle_roots.clear();
        });
        for grant in ALL {
            let mut request = harness.request_at(Level::Sandbox, &["list", "/plugvisor/data"]);
            request.grants = vec![grant];
            let refusal = harness.try_launch(request.clone()).map(drop).expect_err("nobody approved it");
            assert_eq!(refusal.code, RefusalCode::Policy);
            assert!(refusal.message.contains("untrusted"), "{}", refusal.message);
            // The control.
            let digest = Digest::from_bytes(request.bundle);
            let entry = format!("[[approved]]\nname = \"walled\"\ntier = \"community\"\ndigest = \"{digest}\"\n");
            harness.write_policy(&format!("version = 1\n{entry}"));
            let plugin = harness.launch(request);
            harness.exit_of(plugin.launched.launch);
            harness.write_policy("version = 1\n");
        }
    }
}

/// A plugin that asks for nothing is given nothing, whatever a supervisor says.
#[test]
fn a_manifest_that_does_not_ask_gets_none() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_directories(as_);
        let mut manner = Manner::of(&["pause"]);
        manner.security = serde_json::json!({ "capabilities": ["filesystem:read-data"] });
        for grant in [Grant::ReadConfig, Grant::WriteData] {
            let mut request = harness.request_in(&manner);
            request.grants = vec![grant];
            let refusal = harness.try_launch(request).map(drop).expect_err("it does not ask");
            assert!(refusal.message.contains("security.capabilities"), "{}", refusal.message);
        }
    }
}
