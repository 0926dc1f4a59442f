//! The launcher's store: what may be imported, what of it is executed and read, and who may be launched from it. As root
//! with a store on the disk, and without privileges with one in memory.
#![allow(missing_docs, reason = "tests")]

mod harness;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use harness::{
    As, Harness, Manner, Stopping, announce, described, digest, is_root, listed, make_bundle, patience, read_all,
    write_manifest,
};
use plugvisor_package::{BundleFile, Digest, Manifest, ManifestLimits, content_digest};
use plugvisor_sandbox::protocol::{Exit, Import, ImportBegin, ImportFile, Launch, RefusalCode, Request, Stored, Tier};
use sha2::Digest as _;

/// As root the store is on the disk.
fn start(as_: As) -> Harness {
    Harness::start_with_store(as_, |_| ())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}

/// A file of a bundle, as what it is said to be.
fn file(path: &str, executable: bool, bytes: &[u8]) -> BundleFile {
    BundleFile { path: path.into(), executable, size: bytes.len() as u64, sha256: Digest::of(bytes) }
}

/// A bundle `walled` of its own, with a script as its program and these other files.
fn scripted(harness: &Harness, script: &str, others: &[(&str, &[u8])]) -> std::path::PathBuf {
    let bundle = harness.path("bundles/scripted");
    drop(fs::remove_dir_all(&bundle));
    fs::create_dir_all(bundle.join("bin")).expect("the bundle");
    write_manifest(&bundle, "walled", "bin/run");
    fs::write(bundle.join("bin/run"), script).expect("the script");
    fs::set_permissions(bundle.join("bin/run"), fs::Permissions::from_mode(0o755)).expect("chmod");
    for (path, bytes) in others {
        let path = bundle.join(path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("its directory");
        fs::write(&path, bytes).expect("a file");
    }
    bundle
}

/// The canonical form of a bundle's manifest.
fn canonical(bundle: &Path) -> Vec<u8> {
    let bytes = fs::read(bundle.join("plugin.json")).expect("the manifest");
    Manifest::parse(&bytes, &ManifestLimits::default()).expect("a manifest").canonical()
}

/// A launch of `bin/run` in the bundle with this digest.
fn run_of(harness: &Harness, bundle: [u8; 32]) -> Launch {
    let mut request = harness.request(&[]);
    request.bundle = bundle;
    // Shells fork for whatever is not built in.
    request.grants = vec![plugvisor_sandbox::protocol::Grant::SpawnChild];
    request
}

fn output(harness: &mut Harness, bundle: [u8; 32]) -> String {
    let request = run_of(harness, bundle);
    let mut plugin = harness.launch_stored(request).unwrap_or_else(|refusal| panic!("refused: {refusal:?}"));
    let text = read_all(&mut plugin.stdout);
    let errors = read_all(&mut plugin.stderr);
    assert_eq!(harness.exit_of(plugin.launched.launch), (Exit::Code(0), false), "{text}{errors}");
    text
}

/// Everything that the launcher holds for a store, by its path inside; empty when there is none that can be seen.
fn on_disk(harness: &Harness) -> BTreeMap<String, u32> {
    fn walk(root: &Path, at: &Path, found: &mut BTreeMap<String, u32>) {
        for entry in fs::read_dir(at).into_iter().flatten().flatten() {
            let path = entry.path();
            // What the store removes meanwhile is gone.
            let Ok(mode) = entry.metadata().map(|metadata| metadata.mode()) else { continue };
            found.insert(path.strip_prefix(root).expect("inside").display().to_string(), mode & 0o7777);
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                walk(root, &path, found);
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(&harness.path("store"), &harness.path("store"), &mut found);
    found
}

/// Waits until what the store does by itself is done. There is no event for it outside of the launcher.
fn settled(harness: &Harness, done: impl Fn(&BTreeMap<String, u32>) -> bool) {
    let deadline = Instant::now() + patience();
    while !done(&on_disk(harness)) {
        assert!(Instant::now() < deadline, "{:?}", on_disk(harness));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_bundle_is_imported_once_and_found_again() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let bundle = harness.path("bundles/walled");
        let (begin, _) = listed(&bundle);
        assert_eq!(harness.find(begin.bundle), None);
        let stored = harness.import(&bundle).expect("imported");
        assert_eq!(stored, Stored { tier: Tier::Verified, bytes: begin.bytes });
        assert_eq!(harness.find(begin.bundle), Some(stored));
        // What a plugin sees is what the digest covers.
        let args = ["cat", "/plugin/plugin.json", "list", "/plugin/bin"];
        let made = harness.made("walled", &Manner::of(&args));
        let lines = harness.attempt(|_| (), &args);
        assert!(lines[0].1.contains(r#""args":["cat","/plugin/plugin.json","#), "{}", lines[0].1);
        let (_, files) = listed(&harness.place_of(made));
        let manifest = files.iter().find(|file| file.path == "plugin.json").expect("the manifest");
        assert_eq!(sha256(lines[0].1.as_bytes()), manifest.sha256);
        if as_ == As::Root {
            let hex = Digest::from_bytes(begin.bundle).to_string().trim_start_matches("sha256:").to_owned();
            let list = format!("bundles/{hex}/list");
            settled(&harness, |found| found.contains_key(&list));
            let text = fs::read(harness.path("store").join(&list)).expect("the list");
            assert_eq!(sha256(&text), begin.bundle, "the list's digest is the bundle's");
            let found = on_disk(&harness);
            assert_eq!(found[&format!("bundles/{hex}/files/bin/walled")], 0o755);
            assert_eq!(found[&format!("bundles/{hex}/files/plugin.json")], 0o644);
            assert_eq!(fs::metadata(harness.path("store")).expect("the store").mode() & 0o7777, 0o700);
        }
    }
}

#[test]
fn what_is_not_as_it_was_said_is_refused() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let bundle = scripted(&harness, "#!/bin/sh\necho ran\n", &[("lib/x.so", b"library"), ("assets/a", b"asset")]);
        let (begin, files) = listed(&bundle);
        assert_eq!(files.len(), 4);
        // Each file, with another hash and with another size; and all of them under another digest.
        for index in 0..files.len() {
            let mut changed = files.clone();
            changed[index].sha256[0] ^= 1;
            let refusal = harness.import_listed(begin, &changed, &bundle).expect_err("another hash");
            assert_eq!(refusal.code, RefusalCode::DigestMismatch, "{}", refusal.message);
            assert!(refusal.message.contains(&changed[index].path), "{}", refusal.message);
            let mut changed = files.clone();
            changed[index].size += 1;
            let said = announce(begin.bundle, &changed);
            let refusal = harness.import_listed(said, &changed, &bundle).expect_err("another size");
            assert_eq!(refusal.code, RefusalCode::File, "{}", refusal.message);
        }
        let mut other = begin;
        other.bundle[31] ^= 1;
        let refusal = harness.import_listed(other, &files, &bundle).expect_err("another digest");
        assert_eq!(refusal.code, RefusalCode::DigestMismatch, "{}", refusal.message);
        // A mode is part of the digest.
        let mut changed = files.clone();
        changed.iter_mut().find(|file| file.path == "assets/a").expect("it").executable = true;
        let refusal = harness.import_listed(begin, &changed, &bundle).expect_err("another mode");
        assert_eq!(refusal.code, RefusalCode::DigestMismatch, "{}", refusal.message);
        // Fewer, more, none.
        for said in [
            ImportBegin { files: begin.files + 1, ..begin },
            ImportBegin { files: begin.files - 1, ..begin },
            ImportBegin { bytes: begin.bytes - 1, ..begin },
            ImportBegin { bytes: begin.bytes + 1, ..begin },
            ImportBegin { files: 0, ..begin },
            ImportBegin { files: u32::MAX, ..begin },
            ImportBegin { bytes: u64::MAX, ..begin },
        ] {
            let refusal = harness.import_listed(said, &files, &bundle).expect_err("another count");
            assert_eq!(refusal.code, RefusalCode::Policy, "{said:?}: {}", refusal.message);
            let _ = harness.step(Import::Abort, &[]);
        }
        assert_eq!(harness.find(begin.bundle), None);
        harness.import_listed(begin, &files, &bundle).expect("as it is");
        assert_eq!(output(&mut harness, begin.bundle), "ran\n");
        if as_ == As::Root {
            settled(&harness, |found| !found.keys().any(|path| path.starts_with("staging/")));
        }
    }
}

#[test]
fn paths_that_lead_out_are_refused() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let null = File::open("/dev/null").expect("/dev/null");
        let file = |path: &str| ImportFile { path: path.into(), executable: false, size: 0, sha256: sha256(b"") };
        let deep = ["a"; 18].join("/");
        let long = "n".repeat(200);
        for path in ["", "/etc/passwd", "../x", "a/../../x", "./a", "a//b", "a/", "a\0b", "a\nb", &deep, &long] {
            harness.step(Import::Begin(ImportBegin { bundle: [1; 32], files: 9, bytes: 0 }), &[]).expect("begun");
            let refusal = harness.step(Import::Files(vec![file(path)]), &[null.as_fd()]).expect_err(path);
            assert_eq!(refusal.code, RefusalCode::Policy, "{path:?}: {}", refusal.message);
            assert!(!refusal.message.contains(['\n', '\0']), "{:?}", refusal.message);
        }
        // The same path twice, and a file where a directory is.
        let empty = tempfile::tempfile().expect("a file");
        for second in ["a", "a/b"] {
            harness.step(Import::Begin(ImportBegin { bundle: [1; 32], files: 9, bytes: 0 }), &[]).expect("begun");
            harness.step(Import::Files(vec![file("a")]), &[empty.as_fd()]).expect("the first");
            let refusal = harness.step(Import::Files(vec![file(second)]), &[empty.as_fd()]).expect_err("the second");
            assert_eq!(refusal.code, RefusalCode::Policy, "{}", refusal.message);
        }
        assert!(!harness.path("x").exists());
    }
}

#[test]
fn only_regular_files_are_read() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let fifo = harness.path("fifo");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &fifo,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .expect("a FIFO");
        let fifo: OwnedFd = File::options().read(true).write(true).open(fifo).expect("the FIFO").into();
        let zero: OwnedFd = File::open("/dev/zero").expect("/dev/zero").into();
        let directory: OwnedFd = File::open(harness.path("bundles")).expect("a directory").into();
        let socket: OwnedFd = std::os::unix::net::UnixStream::pair().expect("a pair").0.into();
        let (pipe, _writer) = rustix::pipe::pipe().expect("a pipe");
        let path = harness.path("bundles/walled/bin/walled");
        let write_only: OwnedFd =
            File::options().create(true).truncate(false).write(true).open(harness.path("w")).expect("a file").into();
        let path_only: OwnedFd =
            rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).expect("a path");
        for (what, descriptor) in [
            ("a FIFO", &fifo),
            ("an endless device", &zero),
            ("a directory", &directory),
            ("a socket", &socket),
            ("a pipe", &pipe),
            ("write only", &write_only),
            ("O_PATH", &path_only),
        ] {
            for name in ["bin/a", "plugin.json"] {
                let file = ImportFile { path: name.into(), executable: true, size: 5, sha256: [0; 32] };
                harness.step(Import::Begin(ImportBegin { bundle: [2; 32], files: 1, bytes: 5 }), &[]).expect("begun");
                // Whoever waited for a FIFO would not answer at all.
                let refusal = harness.step(Import::Files(vec![file]), &[descriptor.as_fd()]).expect_err(what);
                assert_eq!(refusal.code, RefusalCode::File, "{what}: {}", refusal.message);
            }
        }
        assert_eq!(harness.attempt(|_| (), &["thread"])[0].1, "ok");
    }
}

#[test]
fn a_file_that_grows_fills_nothing() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let path = harness.path("growing");
        fs::write(&path, vec![7; 1 << 20]).expect("a file");
        std::thread::scope(|scope| {
            // A mebibyte more while each is read, and no more than that: it is hashed each time.
            let (grow, asked) = std::sync::mpsc::channel::<()>();
            let grown = path.clone();
            scope.spawn(move || {
                let mut file = File::options().append(true).open(grown).expect("the file");
                while asked.recv().is_ok() {
                    for _ in 0..16 {
                        file.write_all(&[7; 64 << 10]).expect("append");
                    }
                }
            });
            let mut refused = 0;
            for _ in 0..20 {
                let size = fs::metadata(&path).expect("the file").len();
                let file = ImportFile { path: "bin/a".into(), executable: true, size, sha256: [0; 32] };
                harness
                    .step(Import::Begin(ImportBegin { bundle: [2; 32], files: 1, bytes: size }), &[])
                    .expect("begun");
                let open = File::open(&path).expect("the file");
                grow.send(()).expect("it grows");
                let refusal = harness.step(Import::Files(vec![file]), &[open.as_fd()]).expect_err("never these bytes");
                assert!(matches!(refusal.code, RefusalCode::File | RefusalCode::DigestMismatch), "{}", refusal.message);
                refused += 1;
            }
            assert_eq!(refused, 20);
        });
        if as_ == As::Root {
            settled(&harness, |found| !found.keys().any(|path| path.starts_with("staging/")));
        }
    }
}

#[test]
fn set_id_bits_and_links_do_not_come_along() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let bundle = scripted(
            &harness,
            "#!/bin/sh\nstat -c '%a %n' bin/run assets/a; stat -c %F assets/l\n",
            &[("assets/a", b"a")],
        );
        // The walk refuses both; a supervisor that was taken over does not walk.
        fs::set_permissions(bundle.join("bin/run"), fs::Permissions::from_mode(0o6755)).expect("chmod");
        fs::set_permissions(bundle.join("assets/a"), fs::Permissions::from_mode(0o2666)).expect("chmod");
        std::os::unix::fs::symlink("a", bundle.join("assets/l")).expect("a link");
        let canonical = canonical(&bundle);
        let script = fs::read(bundle.join("bin/run")).expect("the script");
        let said = [
            file("plugin.json", false, &canonical),
            file("bin/run", true, &script),
            file("assets/a", false, b"a"),
            // What is behind the link is what was opened: a file of its own in the store.
            file("assets/l", false, b"a"),
        ];
        let (begin, files) = described(content_digest(&said), said);
        harness.import_listed(begin, &files, &bundle).expect("imported");
        // Its files did not all come from their own places, so the directory vouches for nothing.
        let refusal = harness.launch_stored(run_of(&harness, begin.bundle)).map(drop).expect_err("untrusted");
        assert_eq!(refusal.code, RefusalCode::Policy);
        assert!(refusal.message.contains("untrusted"), "{}", refusal.message);
        let policy = format!(
            "version = 1\n[[approved]]\nname = \"walled\"\ntier = \"verified\"\ndigest = \"{}\"\n",
            Digest::from_bytes(begin.bundle)
        );
        harness.write_policy(&policy);
        assert_eq!(output(&mut harness, begin.bundle), "755 bin/run\n644 assets/a\nregular file\n");
    }
}

/// The bytes that were hashed are those that are executed and read, of every file, whatever is written meanwhile.
#[test]
fn what_changes_outside_does_not_change_inside() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let script = "#!/bin/sh\n. lib/code.sh\ncat assets/text\n";
        let others: &[(&str, &[u8])] = &[("lib/code.sh", b"echo good code\n"), ("assets/text", b"good text\n")];
        let bundle = scripted(&harness, script, others);
        let good = digest(&bundle);
        let names = ["bin/run", "lib/code.sh", "assets/text", "plugin.json"];
        let originals: Vec<Vec<u8>> = names.iter().map(|name| fs::read(bundle.join(name)).expect("a file")).collect();
        let evil = |name: &str, good: &[u8]| {
            let mut bytes = match name {
                "bin/run" => b"#!/bin/sh\necho EVIL\n".to_vec(),
                "lib/code.sh" => b"echo EVIL\n#".to_vec(),
                "plugin.json" => br#"{"name":"walled","version":"6.6.6"}"#.to_vec(),
                _ => b"EVIL text\n".to_vec(),
            };
            bytes.resize(good.len(), b' ');
            bytes
        };
        // After the import each is rewritten in place, and then replaced by another file.
        harness.import(&bundle).expect("imported");
        for (name, original) in names.iter().zip(&originals) {
            fs::write(bundle.join(name), evil(name, original)).expect("rewritten");
            assert_eq!(output(&mut harness, good), "good code\ngood text\n", "{as_:?}: {name} rewritten");
            fs::write(bundle.join("other"), evil(name, original)).expect("another");
            fs::rename(bundle.join("other"), bundle.join(name)).expect("replaced");
            assert_eq!(output(&mut harness, good), "good code\ngood text\n", "{as_:?}: {name} replaced");
            fs::write(bundle.join(name), original).expect("restored");
            fs::set_permissions(bundle.join("bin/run"), fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        // While it is imported: either what was said came, or nothing.
        let (begin, files) = listed(&bundle);
        assert_eq!(begin.bundle, good);
        assert_eq!(harness.ask(&Request::Forget { bundle: good }, &[]).0, plugvisor_sandbox::protocol::Reply::Done);
        let (mut came, mut refused) = (0, 0);
        for (name, original) in names.iter().zip(&originals) {
            let stop = AtomicBool::new(false);
            let path = bundle.join(name);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    let bad = evil(name, original);
                    let mut file = File::options().write(true).open(&path).expect("the file");
                    while !stop.load(Ordering::Relaxed) {
                        for bytes in [&bad, original] {
                            file.seek(SeekFrom::Start(0)).expect("seek");
                            file.write_all(bytes).expect("write");
                        }
                    }
                });
                let _stopping = Stopping(&stop);
                let deadline = Instant::now() + patience();
                // The other thread may not run for a while on a busy machine, so it goes on until a change was met.
                for round in 0.. {
                    if round >= 20 && (refused > 0 || Instant::now() > deadline) {
                        break;
                    }
                    match harness.import_listed(begin, &files, &bundle) {
                        Ok(_) => {
                            assert_eq!(output(&mut harness, good), "good code\ngood text\n", "{as_:?}: {name}");
                            harness.ask(&Request::Forget { bundle: good }, &[]);
                            came += 1;
                        }
                        Err(refusal) => {
                            let codes = [RefusalCode::DigestMismatch, RefusalCode::File];
                            assert!(codes.contains(&refusal.code), "{}", refusal.message);
                            refused += 1;
                        }
                    }
                }
            });
        }
        println!("{as_:?}: {came} came, {refused} refused");
        assert!(refused > 0, "the files did change");
    }
}

#[test]
fn what_a_plugin_sees_of_its_bundle_cannot_be_written() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let script = "#!/bin/sh\nfor f in bin/run assets/a plugin.json; do (echo x >> $f) 2>/dev/null && echo wrote $f; \
                      chmod 777 $f 2>/dev/null && echo opened $f; done; (echo x > new) 2>/dev/null && echo made; echo end\n";
        let bundle = scripted(&harness, script, &[("assets/a", b"a")]);
        let good = digest(&bundle);
        harness.import(&bundle).expect("imported");
        let request = run_of(&harness, good);
        let mut plugin = harness.launch_stored(request).expect("launched");
        assert_eq!(read_all(&mut plugin.stdout), "end\n", "{as_:?}");
        // Nor does a process of the same user find it.
        let name = if as_ == As::Root { "store" } else { "run/launcher/store" };
        if as_ == As::Ordinary {
            let seen = fs::read_dir(harness.path(name)).into_iter().flatten().flatten();
            let files: usize = seen.map(|entry| fs::read_dir(entry.path()).into_iter().flatten().count()).sum();
            assert_eq!(files, 0, "the bundles are in no mount but the launcher's");
        }
    }
}

#[test]
fn scripts_run_from_where_they_are() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let bundle = scripted(&harness, "#!/bin/sh\necho \"$0 $PLUGVISOR_PLUGIN $$ $(( 6 * 7 ))\"\n", &[]);
        let sh = harness.import(&bundle).map(|_| digest(&bundle)).expect("imported");
        assert_eq!(output(&mut harness, sh), "/plugin/bin/run walled 2 42\n");
        if fs::exists("/usr/bin/python3").unwrap_or(false) {
            let python = "#!/usr/bin/python3\nimport sys, threading, asyncio, json, ssl\nsys.dont_write_bytecode = True\n\
                import neighbour\nt = threading.Thread(target=lambda: print('thread')); t.start(); t.join()\n\
                asyncio.run(asyncio.sleep(0)); print(neighbour.WORD)\n";
            let bundle = scripted(&harness, python, &[("bin/neighbour.py", b"WORD = 'found'\n")]);
            let python = harness.import(&bundle).map(|_| digest(&bundle)).expect("imported");
            assert_eq!(output(&mut harness, python), "thread\nfound\n");
        } else {
            println!("SKIP python-script: there is no /usr/bin/python3");
        }
        let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xf3\0\x01\0\0\0".to_vec();
        elf.resize(256, 0);
        for (what, bytes) in [
            ("neither ELF nor script", b"hello".to_vec()),
            ("empty", Vec::new()),
            ("a script without its interpreter", b"#!/nowhere/interpreter\n".to_vec()),
            ("an ELF for another machine", elf),
        ] {
            let bundle = scripted(&harness, "", &[]);
            let manifest = canonical(&bundle);
            fs::write(bundle.join("bin/run"), &bytes).expect("the entry");
            let said = [file("plugin.json", false, &manifest), file("bin/run", true, &bytes)];
            let (begin, files) = described(content_digest(&said), said);
            harness.import_listed(begin, &files, &bundle).expect("imported");
            let refusal = harness.launch_stored(run_of(&harness, begin.bundle)).map(drop).expect_err(what);
            assert_eq!(refusal.code, RefusalCode::Entry, "{what}: {}", refusal.message);
        }
    }
}

#[test]
fn imports_are_one_at_a_time_and_in_order() {
    for as_ in As::possible() {
        let mut harness = start(as_);
        let bundle = harness.path("bundles/walled");
        let (begin, files) = listed(&bundle);
        let null = File::open("/dev/null").expect("/dev/null");
        for (what, step) in [("files", Import::Files(vec![files[0].clone()])), ("commit", Import::Commit)] {
            let descriptors: Vec<BorrowedFd<'_>> = if what == "files" { vec![null.as_fd()] } else { vec![] };
            let refusal = harness.step(step, &descriptors).expect_err(what);
            assert_eq!(refusal.code, RefusalCode::Policy, "{what}: {}", refusal.message);
        }
        harness.step(Import::Abort, &[]).expect("nothing to abort is no harm");
        harness.step(Import::Begin(begin), &[]).expect("begun");
        let refusal = harness.step(Import::Begin(begin), &[]).expect_err("a second");
        assert_eq!(refusal.code, RefusalCode::InUse, "{}", refusal.message);
        let forget = Request::Forget { bundle: begin.bundle };
        let plugvisor_sandbox::protocol::Reply::Refused(refusal) = harness.ask(&forget, &[]).0 else {
            panic!("removed")
        };
        assert_eq!(refusal.code, RefusalCode::InUse);
        harness.step(Import::Abort, &[]).expect("aborted");
        // Too few and too many descriptors, and no file at all.
        for (files, count) in [(files.clone(), 1), (vec![files[0].clone()], 2), (vec![], 0), (vec![], 1)] {
            harness.step(Import::Begin(begin), &[]).expect("begun");
            let refusal = harness.step(Import::Files(files), &vec![null.as_fd(); count]).expect_err("the wrong number");
            assert_eq!(refusal.code, RefusalCode::Policy, "{}", refusal.message);
        }
        // Without its manifest.
        let others: Vec<ImportFile> = files.iter().filter(|file| file.path != "plugin.json").cloned().collect();
        let said: Vec<BundleFile> = others
            .iter()
            .map(|file| BundleFile {
                path: file.path.clone(),
                executable: file.executable,
                size: file.size,
                sha256: Digest::from_bytes(file.sha256),
            })
            .collect();
        let bare = announce(*content_digest(&said).as_bytes(), &others);
        let refusal = harness.import_listed(bare, &others, &bundle).expect_err("no manifest");
        assert_eq!(refusal.code, RefusalCode::File, "{}", refusal.message);
        harness.import(&bundle).expect("and then it goes well");
    }
}

#[test]
fn an_import_that_takes_too_long_ends() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_store(as_, |options| options.import_time = Duration::from_secs(1));
        let (begin, _) = listed(&harness.path("bundles/walled"));
        let begun = Instant::now();
        harness.step(Import::Begin(begin), &[]).expect("begun");
        // Refused until the first one's time is over; every answer is an event of the launcher's loop.
        let deadline = Instant::now() + patience();
        let mut refused = 0;
        while let Err(refusal) = harness.step(Import::Begin(begin), &[]) {
            assert_eq!(refusal.code, RefusalCode::InUse, "{}", refusal.message);
            assert!(Instant::now() < deadline, "it never ended");
            refused += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        // Unless the machine stood still for as long.
        assert!(refused > 0 || begun.elapsed() >= Duration::from_secs(1));
        harness.step(Import::Abort, &[]).expect("aborted");
    }
}

#[test]
fn the_store_is_bounded_and_keeps_what_runs() {
    for as_ in As::possible() {
        let mut harness = Harness::start_with_store(as_, |options| options.store_bundles = 2);
        let of = |harness: &Harness, name: &str| harness.made(name, &Manner::of(&["pause"]));
        let import = |harness: &mut Harness, name: &str| harness.import(&harness.place_of(of(harness, name)));
        let first = of(&harness, "walled-1");
        let launch = |harness: &mut Harness, name: &str| {
            let mut request = harness.request(&["pause"]);
            request.plugin = name.to_owned();
            harness.try_launch(request)
        };
        let running = launch(&mut harness, "walled-1").expect("launched");
        let forget = |harness: &mut Harness, bundle| harness.ask(&Request::Forget { bundle }, &[]).0;
        let plugvisor_sandbox::protocol::Reply::Refused(refusal) = forget(&mut harness, first) else {
            panic!("removed")
        };
        assert_eq!(refusal.code, RefusalCode::InUse, "{}", refusal.message);
        // What does not run makes room, what runs does not.
        import(&mut harness, "walled-2").expect("a second");
        import(&mut harness, "walled-3").expect("the second goes");
        let second = of(&harness, "walled-2");
        assert_eq!(harness.find(second), None);
        assert!(harness.find(first).is_some());
        let _third = launch(&mut harness, "walled-3").expect("launched");
        let refusal = import(&mut harness, "walled-2").expect_err("full");
        assert_eq!(refusal.code, RefusalCode::Exhausted);
        assert!(refusal.message.contains("--store-bundles"), "{}", refusal.message);
        harness.ask(&Request::Kill { launch: running.launched.launch }, &[]);
        harness.exit_of(running.launched.launch);
        assert_eq!(forget(&mut harness, first), plugvisor_sandbox::protocol::Reply::Done);
        assert_eq!(harness.find(first), None);
        let plugvisor_sandbox::protocol::Reply::Refused(refusal) = forget(&mut harness, first) else { panic!("twice") };
        assert_eq!(refusal.code, RefusalCode::UnknownBundle);
    }
    let mut harness = Harness::start_with_store(As::possible()[0], |options| options.store_bytes = 1 << 18);
    // Without debug information it is not even a mebibyte.
    let refusal = harness.import(&harness.path("bundles/walled")).expect_err("larger than the store");
    assert_eq!(refusal.code, RefusalCode::Exhausted);
    assert!(refusal.message.contains("--store-bytes"), "{}", refusal.message);
}

#[test]
fn a_store_on_the_disk_outlives_its_launcher() {
    if !is_root() {
        println!("SKIP privileged-lane: a store on the disk is root's");
        return;
    }
    let mut harness = start(As::Root);
    let bundle = harness.made("walled", &Manner::of(&["pause"]));
    make_bundle(&harness.path("bundles"), "walled-2");
    let plugin = harness.attempt(|_| (), &["thread"]);
    assert_eq!(plugin[0].1, "ok");
    let request = harness.request(&["pause"]);
    let uid = harness.launch(request).launched.uid;
    let hex = Digest::from_bytes(bundle).to_string().trim_start_matches("sha256:").to_owned();
    settled(&harness, |found| found.contains_key(&format!("bundles/{hex}/list")));
    // What was under way, or was never finished, goes; what is complete stays.
    let (torn, files) = listed(&harness.path("bundles/walled-2"));
    harness.step(Import::Begin(torn), &[]).expect("begun");
    let first = File::open(harness.path("bundles/walled-2").join(&files[0].path)).expect("a file");
    harness.step(Import::Files(vec![files[0].clone()]), &[first.as_fd()]).expect("a part");
    let store = harness.path("store");
    harness.process.kill().expect("SIGKILL");
    harness.process.wait().expect("its end");
    let half = store.join("bundles").join("0".repeat(64));
    fs::create_dir_all(half.join("files")).expect("half a bundle");
    fs::write(half.join("files/plugin.json"), "{}").expect("half a bundle");
    harness.restart();
    assert!(harness.find(bundle).is_some(), "the complete one is there");
    assert_eq!(harness.find(torn.bundle), None);
    assert!(!half.exists(), "half a bundle is gone");
    assert_eq!(fs::read_dir(store.join("staging")).expect("staging").count(), 0);
    // Not imported again, and the plugin has its uid; another name gets another.
    let mut other = harness.request(&["pause"]);
    other.plugin = "walled-2".to_owned();
    let other = harness.launch(other).launched.uid;
    let request = harness.request(&["pause"]);
    let again = harness.launch_stored(request).expect("launched");
    assert_eq!(again.launched.uid, uid);
    assert_ne!(other, uid);
    // A uids file that cannot be read, and a store that others can write, are never begun anew.
    let stop = |harness: &mut Harness| {
        harness.process.kill().expect("SIGKILL");
        harness.process.wait().expect("its end");
    };
    stop(&mut harness);
    let uids = fs::read_to_string(store.join("uids")).expect("the uids");
    fs::write(store.join("uids"), "walled").expect("broken");
    harness.respawn();
    assert_eq!(harness.process.wait().expect("it refuses").code(), Some(78));
    fs::write(store.join("uids"), uids).expect("restored");
    fs::set_permissions(&store, fs::Permissions::from_mode(0o777)).expect("chmod");
    harness.respawn();
    assert_eq!(harness.process.wait().expect("it refuses").code(), Some(78));
    fs::set_permissions(&store, fs::Permissions::from_mode(0o700)).expect("chmod");
    fs::write(store.join("layout"), "plugvisor store 2\n").expect("another layout");
    harness.respawn();
    assert_eq!(harness.process.wait().expect("it refuses").code(), Some(78));
    fs::write(store.join("layout"), "plugvisor store 1\n").expect("restored");
    harness.restart();
    assert!(harness.find(bundle).is_some());
}

#[test]
fn two_launchers_do_not_share_a_store() {
    if !is_root() {
        println!("SKIP privileged-lane: a store on the disk is root's");
        return;
    }
    let first = start(As::Root);
    let store = first.path("store");
    let mut second = Harness::start_with_refusal(As::Root, |options| options.store = Some(store));
    assert_eq!(second.process.wait().expect("it refuses").code(), Some(78));
}

/// Copies of a bundle's files, opened in a mount that is attached nowhere any more and has them at the same path: what
/// anybody can do in a user namespace.
fn opened_elsewhere(bundle: &Path, files: &[ImportFile], scratch: &Path) -> Vec<File> {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    fs::create_dir(scratch).expect("a mount point");
    mount("tmpfs", scratch, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"size=64m").expect("a tmpfs");
    let same = scratch.join(bundle.strip_prefix("/").expect("absolute"));
    let copies = files.iter().map(|file| {
        let path = same.join(&file.path);
        fs::create_dir_all(path.parent().expect("a parent")).expect("its directory");
        fs::copy(bundle.join(&file.path), &path).expect("a copy");
        File::open(path).expect("the copy")
    });
    let copies: Vec<File> = copies.collect();
    unmount(scratch, UnmountFlags::DETACH).expect("detached");
    copies
}

#[test]
fn a_path_in_mounts_of_the_supervisors_own_gives_no_tier() {
    if !is_root() {
        println!("SKIP privileged-lane: mounting needs privileges in this test");
        return;
    }
    let mut harness = start(As::Root);
    let bundle = fs::canonicalize(harness.path("bundles/walled")).expect("the bundle");
    let (begin, files) = listed(&bundle);
    let forged = opened_elsewhere(&bundle, &files, &harness.path("elsewhere"));
    let shown =
        fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&forged[0]))).expect("a path");
    assert_eq!(shown, bundle.join(&files[0].path), "the kernel gives the trusted path for it");
    harness.step(Import::Begin(begin), &[]).expect("begun");
    let packet: Vec<BorrowedFd<'_>> = forged.iter().map(AsFd::as_fd).collect();
    harness.step(Import::Files(files.clone()), &packet).expect("copied");
    let stored = harness.step(Import::Commit, &[]).expect("committed").expect("what was committed");
    assert_eq!(stored.tier, Tier::Untrusted);
    // From where it really is, it has its tier.
    assert_eq!(harness.import(&bundle).expect("imported").tier, Tier::Verified);
}
