//! The demo's verdict: one line for each thing that was looked at from outside.

use std::fmt::Display;

/// Counts what held and what did not.
#[derive(Debug, Default)]
pub(crate) struct Checks {
    held: usize,
    failed: Vec<String>,
}

impl Checks {
    /// Records that `what` was looked at. `seen` is shown always, `expected` and `next` when it does not hold.
    pub(crate) fn check(&mut self, what: &str, holds: bool, seen: impl Display, expected: impl Display, next: &str) {
        if holds {
            self.held += 1;
            println!("ok     {what}: {seen}");
        } else {
            println!("FAILED {what}: expected {expected}, seen {seen}; next: {next}");
            self.failed.push(what.to_owned());
        }
    }

    /// Ends the demo.
    ///
    /// # Errors
    /// When something did not hold.
    pub(crate) fn verdict(self) -> anyhow::Result<()> {
        if self.failed.is_empty() {
            println!("\nevery step was seen from outside: {} checks held", self.held);
            return Ok(());
        }
        anyhow::bail!(
            "{} of {} checks failed: {}",
            self.failed.len(),
            self.failed.len() + self.held,
            self.failed.join(", ")
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failed_check_fails_the_demo() {
        let mut checks = Checks::default();
        checks.check("sky", true, "blue", "blue", "look up");
        assert!(Checks { held: checks.held, failed: vec![] }.verdict().is_ok());
        checks.check("grass", false, "blue", "green", "look down");
        assert_eq!(checks.verdict().unwrap_err().to_string(), "1 of 2 checks failed: grass");
    }
}
