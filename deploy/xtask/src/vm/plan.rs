//! What is done in the guest: the host writes it down, the guest does it, in this order.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::payload::Built;

/// Everything, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Plan {
    pub(super) parts: Vec<Part>,
}

/// One of them, which fails or not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Part {
    /// For people, and for `--only`-like narrowing.
    pub(super) name: String,
    pub(super) work: Work,
}

/// What a part is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(super) enum Work {
    /// The guest is the world that it is meant to be.
    World,
    /// A test program, in a unit of its own with a delegated cgroup.
    Tests(Tests),
    /// The package under systemd.
    Package,
}

/// Which tests of a program are run, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Tests {
    /// Its path, the same on the host and in the guest.
    pub(super) program: String,
    pub(super) user: User,
    /// Only tests whose path holds one of these; all without any.
    pub(super) only: Vec<String>,
    /// Not those whose path holds one of these.
    pub(super) without: Vec<String>,
    /// Of its environment.
    pub(super) variables: Vec<(String, String)>,
}

/// Who runs a test program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum User {
    Root,
    /// One with a delegated cgroup and nothing else.
    Ordinary,
}

/// A test program, and who runs it in the quick plan and in the whole one. What root runs covers most of what an ordinary
/// user can do too: where it can, a test program starts launchers as root and as another user.
struct Program {
    name: &'static str,
    /// Only these of its tests; all without any.
    only: &'static [&'static str],
    quick: &'static [User],
    whole: &'static [User],
}

const NOBODY: &[User] = &[];
const ROOT: &[User] = &[User::Root];
const BOTH: &[User] = &[User::Root, User::Ordinary];

/// What cgroup v2, an older kernel and systemd can make different; the quick plan has what they do make different.
const PROGRAMS: [Program; 20] = [
    Program { name: "plugvisor-launcher", only: &[], quick: BOTH, whole: BOTH },
    Program { name: "limits", only: &[], quick: BOTH, whole: BOTH },
    Program { name: "control", only: &[], quick: BOTH, whole: BOTH },
    Program { name: "walls", only: &[], quick: ROOT, whole: BOTH },
    Program { name: "escape", only: &["every_attempt_ends"], quick: ROOT, whole: BOTH },
    Program { name: "spares", only: &[], quick: ROOT, whole: ROOT },
    Program { name: "serving", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "trace", only: &[], quick: NOBODY, whole: BOTH },
    // In the quick plan the escape suite's rows stand for it.
    Program { name: "directories", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "signals", only: &[], quick: ROOT, whole: BOTH },
    Program { name: "environment", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "levels", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "store", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "trust", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "hostile", only: &[], quick: NOBODY, whole: ROOT },
    Program { name: "siege", only: &[], quick: NOBODY, whole: ROOT },
    // Of machines, how they are refused: a guest of the guest would be emulated twice.
    Program { name: "machine", only: &[], quick: NOBODY, whole: ROOT },
    Program { name: "launcher", only: &[], quick: NOBODY, whole: BOTH },
    Program { name: "reattach", only: &[], quick: NOBODY, whole: BOTH },
    // Scenarios in which limits, deaths, what outlives them and what belongs to a name are met.
    Program {
        name: "scenarios",
        only: &["faults::", "grants::", "life::", "restart::", "outlives::"],
        quick: NOBODY,
        whole: BOTH,
    },
];

/// The rows of the escape suite that the quick plan has: what holds them, or how they are made, is another thing there.
/// Limits and ends by cgroup v2, places in its tree, and what an older kernel lacks (Landlock's rules for TCP and its scopes,
/// sealed memory files, PR_SET_MDWE), and of the directories of a name and of signals what the mounts and seccomp alone hold.
const QUICK_ROWS: (&str, &str) = ("PLUGVISOR_ESCAPE_ROW", "3h,9d,14,16,16c,31,32,38b,43,44,47,51,52,62");

/// Tests that the guest has no use for, each with the reason.
const WITHOUT: [(&str, &str); 3] = [
    ("life::nothing_leaks", "a count over many rounds, which takes too long here"),
    ("seccomp::tests::every_call_is_decided_as_by_another_compiler", "it asks no kernel, and computes for long"),
    ("seccomp::tests::the_allow_list_lets_through_what_it_says_and_nothing_else", "the same"),
];

/// The integration tests among the programs.
pub(super) fn integration_tests() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().map(|program| program.name).filter(|name| *name != UNIT_TESTS)
}

/// The program whose own tests are among them.
pub(super) const UNIT_TESTS: &str = "plugvisor-launcher";

impl Plan {
    /// The plan for what was built: the whole one, or the fixed part of it that is quick.
    ///
    /// # Errors
    /// When a test program is missing.
    pub(super) fn new(built: &Built, full: bool) -> anyhow::Result<Self> {
        let mut parts = vec![Part { name: "world".to_owned(), work: Work::World }];
        for Program { name, only, quick, whole } in &PROGRAMS {
            let path = built.tests.get(*name).with_context(|| format!("cargo built no test program {name}"))?;
            let path = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            let variables: &[(&str, &str)] = if *name == "escape" && !full { &[QUICK_ROWS] } else { &[] };
            for user in if full { *whole } else { *quick } {
                let who = match user {
                    User::Root => "root",
                    User::Ordinary => "an ordinary user",
                };
                parts.push(Part {
                    name: format!("{name} as {who}"),
                    work: Work::Tests(Tests {
                        program: path.to_owned(),
                        user: *user,
                        only: only.iter().map(ToString::to_string).collect(),
                        without: WITHOUT.iter().map(|(name, _)| (*name).to_owned()).collect(),
                        variables: variables.iter().map(|(name, rows)| (name.to_string(), rows.to_string())).collect(),
                    }),
                });
            }
        }
        parts.push(Part { name: "package".to_owned(), work: Work::Package });
        Ok(Self { parts })
    }

    /// The test programs that it runs, each once.
    pub(super) fn programs(&self) -> BTreeSet<&Path> {
        let programs = self.parts.iter().filter_map(|part| match &part.work {
            Work::Tests(tests) => Some(Path::new(&tests.program)),
            Work::World | Work::Package => None,
        });
        programs.collect()
    }

    /// Keeps the parts whose name holds one of these words; all when there is none.
    pub(super) fn retain(&mut self, words: &[String]) {
        if !words.is_empty() {
            self.parts.retain(|part| words.iter().any(|word| part.name.contains(word.as_str())));
        }
    }
}
