//! What every command prints and how it ends, as files: the real program against a supervisor that only answers.
//!
//! `PLUGVISOR_BLESS=1 cargo test -p plugvisor-cli` writes the files anew; read the difference before committing it.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

mod fake;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use fake::Fake;

/// Runs the program with a supervisor and returns its exit code and both outputs as one text.
fn run(fake: &Fake, arguments: &[&str], input: &str) -> String {
    let admin = fake.directory().join("admin.sock");
    run_with(&admin, arguments, input).replace(fake.directory().to_str().unwrap(), "$DIRECTORY")
}

fn run_with(admin: &Path, arguments: &[&str], input: &str) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_plugvisor"))
        .args(arguments)
        .env_clear()
        .env("PLUGVISOR_ADMIN", admin)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    for text in [&stdout, &stderr] {
        let control = text.chars().find(|c| (c.is_control() && *c != '\n') || *c == '\u{202e}');
        assert_eq!(control, None, "a plugin's text controls the terminal: {text:?}");
    }
    let code = output.status.code().unwrap();
    format!("$ plugvisor {}\n{stdout}--- stderr\n{stderr}--- exit {code}\n", arguments.join(" "))
}

/// Holds the outputs of some commands against one file.
fn hold(name: &str, actual: &str) {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("PLUGVISOR_BLESS").is_some() {
        std::fs::write(&file, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(expected == actual, "{name} differs\n--- expected\n{expected}\n--- actual\n{actual}");
}

fn hold_commands(name: &str, commands: &[&[&str]]) {
    let fake = Fake::start();
    hold(name, &commands.iter().map(|arguments| run(&fake, arguments, "")).collect::<Vec<_>>().join("\n"));
}

#[test]
fn status() {
    hold_commands("status.txt", &[&["status"], &["status", "-o", "wide"], &["status", "-o", "name"]]);
}

#[test]
fn status_as_json_has_every_field() {
    let fake = Fake::start();
    let text = run(&fake, &["status", "-o", "json"], "");
    let json = text.split_once('\n').unwrap().1.split_once("--- stderr").unwrap().0;
    let status: serde_json::Value = serde_json::from_str(json).unwrap();
    assert_eq!(status["supervisor"]["resident_bytes"], 12_900_000, "64-bit numbers are numbers");
    assert_eq!(status["plugins"][0]["state"], "PLUGIN_STATE_FAILED");
    assert_eq!(status["plugins"][0]["last_error"], format!("exited SIGKILL {}", fake::HOSTILE), "nothing is lost");
    assert_eq!(status["plugins"][1]["restarts"], 0, "fields with default values are there");
    assert!(text.ends_with("--- exit 3\n"), "a failed plugin is \"degraded\": {text}");
}

#[test]
fn describe() {
    hold_commands("describe.txt", &[&["describe", "markdown"], &["describe", "thumbnailr"]]);
}

#[test]
fn what_cannot_be_traced() {
    let fake = Fake::start();
    let broken = fake.directory().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("plugin.json"), "{ \"name\": 5 }").unwrap();
    let broken = broken.to_str().unwrap();
    let commands = [
        &["plugin", "trace", "/nowhere/at-all"][..],
        &["plugin", "trace", broken],
        &["plugin", "trace", broken, "--for", "5"],
    ];
    let texts =
        commands.map(|arguments| run(&fake, arguments, "").replace(fake.directory().to_str().unwrap(), "$DIRECTORY"));
    hold("trace-errors.txt", &texts.join("\n"));
}

#[test]
fn events() {
    hold_commands(
        "events.txt",
        &[
            &["events"],
            &["events", "--type", "breaker.", "-o", "jsonl"],
            &["events", "--plugin", "nobody", "-o", "json"],
            &["events", "--follow", "-o", "json"],
        ],
    );
}

#[test]
fn logs() {
    hold_commands("logs.txt", &[&["logs"], &["logs", "markdown"], &["logs", "-o", "jsonl"]]);
}

#[test]
fn log_filters_reach_the_supervisor() {
    let fake = Fake::start();
    let arguments = [
        &["logs", "markdown", "-n", "5", "--since", "2026-11-23T05:30:00Z", "--until", "2026-11-23T06:00:00Z"][..],
        &["--stream", "stderr", "--grep", "a.b", "--generation", "7", "-o", "name"],
    ];
    let text = run(&fake, &arguments.concat(), "");
    for part in ["tail: 5", "seconds: 1795411800", "seconds: 1795413600", "Stderr", "\"a.b\"", "generation: 7"] {
        assert!(text.contains(part), "no {part}: {text}");
    }
    let wrong = run(&fake, &["logs", "--since", "yesterday"], "");
    assert!(wrong.contains("how long ago") && wrong.ends_with("--- exit 2\n"), "{wrong}");
}

#[test]
fn explain() {
    let explain = ["explain", "call", "gallery", "acme.v1.A/Get"];
    hold_commands(
        "explain.txt",
        &[
            &explain,
            &[&explain[..], &["--token", "blue"]].concat(),
            &[&explain[..], &["-o", "jsonl"]].concat(),
            &["explain", "call", "nobody", "acme.v1.A/Get"],
        ],
    );
}

#[test]
fn doctor() {
    hold_commands("doctor.txt", &[&["doctor"], &["doctor", "-o", "name"]]);
}

#[test]
fn config_show() {
    hold_commands("config.txt", &[&["config", "show"], &["config", "show", "--origin"]]);
}

#[test]
fn completions_know_every_command() {
    for shell in ["bash", "zsh", "fish"] {
        let text = run_with(Path::new("/nowhere"), &["completion", shell], "").replace('\t', " ");
        for word in ["breaker", "doctor", "explain", "--since"] {
            assert!(text.contains(word), "{shell} does not know {word}");
        }
    }
}

#[test]
fn breaker() {
    hold_commands(
        "breaker.txt",
        &[
            &["breaker", "list"],
            &["breaker", "list", "-o", "jsonl"],
            &["breaker", "reset", "markdown"],
            &["breaker", "reset", "thumbnailer"],
            &["breaker", "reset"],
            &["breaker", "reset", "nobody"],
        ],
    );
}

#[test]
fn life() {
    hold_commands(
        "life.txt",
        &[
            &["load", "thumbnailer"],
            &["load", "markdown"],
            &["load", "/nowhere/at/all"],
            &["load", "hangs", "--timeout", "3s"],
            &["unload", "thumbnailer"],
            &["unload", "thumbnailer", "--cascade"],
            &["unload", "markdown"],
            &["restart", "thumbnailer"],
            &["restart", "thumbnailer", "-o", "name"],
        ],
    );
}

#[test]
fn call() {
    const EVENTS: &str = "plugvisor.host.v1.Events/Publish";
    hold_commands(
        "call.txt",
        &[
            &["call", EVENTS, "--json", r#"{"type":"counted","data":{"a":1,"b":[2]}}"#],
            &["call", EVENTS, "--token", "blue", "-o", "jsonl", "--json", r#"{"type":"counted"}"#],
            &["call", EVENTS, "--json", r#"{"type":"refused"}"#],
            &["call", EVENTS, "--json", r#"{"type":"hostile"}"#],
            &["call", EVENTS, "--json", r#"{"type":"hangs"}"#, "--timeout", "3s"],
            &["call", EVENTS, "--json", r#"{"typ":"counted"}"#],
            &["call", EVENTS, "--json", r#"{"type""#],
            &["call", EVENTS, "--json", "{}{}"],
            &["call", EVENTS, "--json", "@/nowhere/at/all"],
            &["call", "plugvisor.host.v1.Events/Publsh"],
            &["call", "no.such.Service/Method"],
            &["call", "acme.v1.Bare/Method"],
            &["call", "acme.v1.Broken/Method"],
            &["call", "Publish"],
        ],
    );
}

#[test]
fn call_reads_standard_input() {
    let fake = Fake::start();
    let text = run(
        &fake,
        &["call", "plugvisor.host.v1.Events/Publish", "--json", "-", "-o", "jsonl"],
        r#"{"type":"counted","data":{"a":1}}"#,
    );
    assert!(text.contains("\n{\"sequence\":1001}\n") && text.ends_with("--- exit 0\n"), "{text}");
}

/// A bundle of a manifest and a script that stands in for a program.
fn bundle(manifest: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("plugin.json"), manifest).unwrap();
    std::fs::create_dir(directory.path().join("bin")).unwrap();
    let program = directory.path().join("bin/hello");
    std::fs::write(&program, "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

#[test]
fn validate() {
    let good = r#"{ "name": "hello", "version": "1.2.3", "dependencies": ["other@^1"],
        "optimization": { "caching": { "ttl": 5 } }, "monitoring": { "performance": { "maxStartupTime": 5000 } } }"#;
    let bad =
        r#"{ "name": "Hello World", "verison": "1.2.3", "security": { "capabilities": ["network:htp-client"] } }"#;
    let vain = r#"{ "name": "hello", "version": "1.2.3", "runtime": { "network": { "egress": ["example.org:443"] } },
        "security": { "sandbox": { "resourceLimits": { "maxNetworkBandwidth": 1000 } } } }"#;
    let portless = r#"{ "name": "hello", "version": "1.2.3",
        "security": { "capabilities": ["network:tcp-server"], "sandbox": { "isolationLevel": "none",
        "resourceLimits": { "maxNetworkBandwidth": 1000 } } } }"#;
    let unasked = r#"{ "name": "hello", "version": "1.2.3", "runtime": { "network": { "listen": [8080] } },
        "security": { "trustLevel": "trusted" } }"#;
    let mute = unasked.replace("trusted", "verified");
    let nobody = Path::new("/nowhere/admin.sock");
    let validate = |path: &Path, more: &[&str]| {
        let arguments = [&["plugin", "validate", path.to_str().unwrap()], more].concat();
        run_with(nobody, &arguments, "")
    };
    let directories = [good, bad, good, vain, portless, unasked, &mute].map(bundle);
    let [valid, wrong, no_program, vain, portless, unasked, mute] = directories.each_ref().map(tempfile::TempDir::path);
    std::fs::remove_file(no_program.join("bin/hello")).unwrap();
    let mut text = [
        validate(valid, &[]),
        validate(&valid.join("plugin.json"), &["-o", "jsonl"]),
        validate(wrong, &[]),
        validate(no_program, &[]),
        validate(vain, &[]),
        validate(portless, &[]),
        validate(unasked, &[]),
        validate(mute, &[]),
        validate(Path::new("/nowhere/at/all"), &[]),
    ]
    .join("\n");
    for (name, path) in [
        ("$VALID", valid),
        ("$WRONG", wrong),
        ("$NO_PROGRAM", no_program),
        ("$VAIN", vain),
        ("$PORTLESS", portless),
        ("$UNASKED", unasked),
        ("$MUTE", mute),
    ] {
        text = text.replace(path.to_str().unwrap(), name);
    }
    hold("validate.txt", &text);
}

#[test]
fn no_supervisor() {
    let directory = tempfile::tempdir().unwrap();
    let absent = directory.path().join("admin.sock");
    let left_behind = directory.path().join("left.sock");
    drop(std::os::unix::net::UnixListener::bind(&left_behind).unwrap());
    let too_long = directory.path().join("x".repeat(120));
    let texts = [absent, left_behind, too_long].map(|socket| run_with(&socket, &["status"], ""));
    hold("no_supervisor.txt", &texts.join("\n").replace(directory.path().to_str().unwrap(), "$DIRECTORY"));
}

#[test]
fn usage() {
    hold_commands(
        "usage.txt",
        &[
            &["--help"],
            &["status", "--help"],
            &["doctor", "--help"],
            &["statsu"],
            &["call"],
            &["status", "--timeout", "10"],
            &["approve", "bundle", "--key", "k", "--tier", "trusted"],
        ],
    );
}

/// `plugvisor events | head -1` is no failure.
#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let fake = Fake::start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_plugvisor"))
        .args(["status", "--socket"])
        .arg(fake.directory().join("admin.sock"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    assert!(output.status.success(), "{:?}", output.status);
}
