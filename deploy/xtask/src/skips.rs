//! Which tests may be skipped: a test that cannot run here prints `SKIP <name>: <why>`, and every name that is not in
//! the checked-in list is a failure. So a test cannot fall silent unnoticed.

use std::collections::{BTreeMap, BTreeSet};
use std::io::BufRead;

use anyhow::{Context, bail};

/// How a line begins by which a test tells what it measured.
pub(crate) const MEASURED: &str = "MEASURED ";

/// Reads the output of `cargo test -- --show-output`, passes on what people want to see, and returns the skips by name.
///
/// The sections that libtest prints after a test program's list, with what the passed tests printed, are not passed on but
/// for lines that begin with [`MEASURED`].
///
/// # Errors
/// When the output cannot be read.
pub(crate) fn collect(output: impl BufRead, mut show: impl FnMut(&str)) -> anyhow::Result<BTreeMap<String, String>> {
    let mut skips = BTreeMap::new();
    let mut in_successes = false;
    for line in output.split(b'\n') {
        let line = line.context("cannot read the tests' output")?;
        let line = String::from_utf8_lossy(&line);
        if let Some((name, why)) = line.trim_start().strip_prefix("SKIP ").and_then(|rest| rest.split_once(": ")) {
            skips.insert(name.trim().to_owned(), why.trim().to_owned());
        }
        match line.as_ref() {
            "successes:" => in_successes = true,
            "failures:" => in_successes = false,
            _ if line.starts_with("test result:") => in_successes = false,
            _ => {}
        }
        if !in_successes || line.starts_with(MEASURED) {
            show(&line);
        }
    }
    Ok(skips)
}

/// The names of a list: one per line, `#` begins a comment.
fn names(list: &str) -> BTreeSet<&str> {
    list.lines().filter_map(|line| line.split('#').next().map(str::trim)).filter(|name| !name.is_empty()).collect()
}

/// The names of a list that nothing was skipped under. Of a list for one place only, where everything ran, they are out
/// of date.
pub(crate) fn unused<'a>(skips: &BTreeMap<String, String>, expected: &'a str) -> Vec<&'a str> {
    names(expected).into_iter().filter(|name| !skips.contains_key(*name)).collect()
}

/// Holds the skips against the list, which is in the file `list`.
///
/// # Errors
/// Names each skip that the list does not have.
pub(crate) fn check(skips: &BTreeMap<String, String>, expected: &str, list: &str) -> anyhow::Result<()> {
    let expected = names(expected);
    let unexpected: Vec<String> = skips
        .iter()
        .filter(|(name, _)| !expected.contains(name.as_str()))
        .map(|(name, why)| format!("  {name}: {why}"))
        .collect();
    if unexpected.is_empty() {
        return Ok(());
    }
    bail!(
        "tests were skipped that {list} does not have:\n{}\n\
         give them what they ask for, or add their names there with the reason",
        unexpected.join("\n")
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\nrunning 2 tests\ntest a ... ok\ntest b ... ok\n\nsuccesses:\n\n---- a stdout ----\n\
        SKIP a: needs root\nsomething\nMEASURED much\n\n\nsuccesses:\n    a\n    b\n\ntest result: ok. 2 passed\n";

    #[test]
    fn skips_are_found_where_libtest_shows_them() {
        let mut shown = Vec::new();
        let skips = collect(OUTPUT.as_bytes(), |line| shown.push(line.to_owned())).unwrap();
        assert_eq!(skips, BTreeMap::from([("a".to_owned(), "needs root".to_owned())]));
        assert!(shown.iter().any(|line| line == "test a ... ok"), "{shown:?}");
        assert!(shown.iter().any(|line| line.starts_with("test result")), "{shown:?}");
        assert!(!shown.iter().any(|line| line.contains("SKIP") || line == "something"), "{shown:?}");
        assert!(shown.iter().any(|line| line == "MEASURED much"), "{shown:?}");
    }

    #[test]
    fn only_listed_skips_pass() {
        let skips = BTreeMap::from([("a".to_owned(), "needs root".to_owned())]);
        assert!(check(&skips, "# why\na # needs root\n", "list").is_ok());
        let error = check(&skips, "# a\nb\n", "list").unwrap_err().to_string();
        assert!(error.contains("a: needs root"), "{error}");
    }

    #[test]
    fn what_is_listed_and_ran_is_told() {
        let skips = BTreeMap::from([("a".to_owned(), "needs root".to_owned())]);
        assert_eq!(unused(&skips, "a # needs root\n# b\nc # needs more\n"), ["c"]);
    }
}
