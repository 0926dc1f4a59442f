//! Every input of the corpora, and a run of changed ones from a fixed seed: short, and long when `PLUGVISOR_FULL` is set.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use plugvisor_fuzz::{Session, Target, corpus};

/// Inputs that each target is tried on.
fn runs(target: Target) -> u64 {
    let full = std::env::var_os("PLUGVISOR_FULL").is_some();
    let (short, long) = match target {
        Target::Launcher => (20_000, 2_000_000),
        Target::Manifest | Target::Configuration => (8000, 100_000),
        Target::Request | Target::Link => (20_000, 1_000_000),
        Target::Http2 => (8000, 1_000_000),
        // Each makes and removes a directory.
        Target::Bundle => (600, 20_000),
    };
    if full { long } else { short }
}

fn try_out(target: Target) {
    let inputs = corpus(target).unwrap();
    assert!(inputs.len() >= 10, "the corpus of {} has {} inputs", target.name(), inputs.len());
    let mut session = Session::new(target, 20_261_123).unwrap();
    let before = session.run(0).unwrap().shapes;
    match session.run(runs(target)) {
        // A generator that finds no new way through its target has stopped doing its work.
        Ok(report) => assert!(report.shapes > before, "{report:?} from {before} shapes"),
        Err(finding) => panic!("{}\nby the input {:?}", finding.why, String::from_utf8_lossy(&finding.input)),
    }
}

#[test]
fn launcher() {
    try_out(Target::Launcher);
}

#[test]
fn manifest() {
    try_out(Target::Manifest);
}

#[test]
fn configuration() {
    try_out(Target::Configuration);
}

#[test]
fn request() {
    try_out(Target::Request);
}

#[test]
fn bundle() {
    try_out(Target::Bundle);
}

#[test]
fn http2() {
    try_out(Target::Http2);
}

#[test]
fn link() {
    try_out(Target::Link);
}

/// The same seed tries the same inputs: a finding can be found again.
#[test]
fn a_seed_is_a_whole_run() {
    let run = || Session::new(Target::Launcher, 5).unwrap().run(2000).unwrap();
    assert_eq!(run(), run());
}
