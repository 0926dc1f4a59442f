//! What is done in the guest: the host writes it down, the guest does it, in this order.

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
    Tests {
        /// Its path, the same on the host and in the guest.
        program: String,
        user: User,
        /// Only tests whose path holds one of these; all without any.
        only: Vec<String>,
        /// Not those whose path holds one of these.
        without: Vec<String>,
    },
    /// The package under systemd.
    Package,
}

/// Who runs a test program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum User {
    Root,
    /// One with a delegated cgroup and nothing else.
    Ordinary,
}

/// The launcher's tests: all of what cgroup v2 and an older kernel can make different; without `full` only those of what
/// cgroup v2 does otherwise.
const LAUNCHER: [&str; 6] = ["plugvisor-launcher", "control", "launcher", "walls", "reattach", "spares"];
const FEWER: [&str; 2] = ["plugvisor-launcher", "control"];

/// Scenarios in which limits, deaths and what outlives them are met.
const SCENARIOS: [&str; 4] = ["faults::", "life::", "restart::", "outlives::"];

/// Tests that the guest has no use for, each with the reason.
const WITHOUT: [(&str, &str); 1] = [("life::nothing_leaks", "a count over many rounds, which takes too long here")];

impl Plan {
    /// The plan for what was built: the long one, or the fixed part of it.
    ///
    /// # Errors
    /// When a test program is missing.
    pub(super) fn new(built: &Built, full: bool) -> anyhow::Result<Self> {
        let mut parts = vec![Part { name: "world".to_owned(), work: Work::World }];
        let mut tests = |program: &str, only: &[&str]| -> anyhow::Result<()> {
            let path = built.tests.get(program).with_context(|| format!("cargo built no test program {program}"))?;
            let path = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            for (user, suffix) in [(User::Root, "root"), (User::Ordinary, "an ordinary user")] {
                parts.push(Part {
                    name: format!("{program} as {suffix}"),
                    work: Work::Tests {
                        program: path.to_owned(),
                        user,
                        only: only.iter().map(ToString::to_string).collect(),
                        without: WITHOUT.iter().map(|(name, _)| (*name).to_owned()).collect(),
                    },
                });
            }
            Ok(())
        };
        let launcher: &[&str] = if full { &LAUNCHER } else { &FEWER };
        for program in launcher {
            tests(program, &[])?;
        }
        if full {
            tests("scenarios", &SCENARIOS)?;
        }
        parts.push(Part { name: "package".to_owned(), work: Work::Package });
        Ok(Self { parts })
    }

    /// Keeps the parts whose name holds one of these words; all when there is none.
    pub(super) fn retain(&mut self, words: &[String]) {
        if !words.is_empty() {
            self.parts.retain(|part| words.iter().any(|word| part.name.contains(word.as_str())));
        }
    }
}
