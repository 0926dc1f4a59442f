//! The calls that were used, as a data file in the form of `policy/sandbox.toml`.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{book::Book, seen::Seen};

/// The text of a policy that allows the calls that were seen and nothing else. Calls that fail whatever is granted are not in
/// it, since nothing would let them through.
#[must_use]
pub fn rules_file(seen: &Seen, book: &Book, plugin: &str) -> String {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let mut newest = 0;
    for (kind, times) in &seen.calls {
        if book.always_refused(*kind).is_none() {
            *counts.entry(book.name(*kind)).or_insert(0) += times.count;
            newest = newest.max(kind.number);
        }
    }
    let mut text = format!(
        "# The system calls that {plugin} was seen to make, in the form of supervisor/sandbox/policy/sandbox.toml. A trace shows what\n\
         # happened, not what can happen: a branch that was not taken may need more. The rules of process.toml hold here too.\n\
         newest = {newest}\n"
    );
    // Its own program's exec is the launcher's, and not among what was seen.
    let once = ["execve", "execveat"];
    let again = once.iter().any(|name| counts.contains_key(*name));
    text.push_str(if again { "once = []\n" } else { "" });
    text.push_str("rule = []\n");
    for (name, count) in &counts {
        let times = if *count == 1 { "once".to_owned() } else { format!("{count} times") };
        // Infallible: it is a string.
        let _ = write!(text, "\n[[allow]]\nreason = \"seen {times}\"\nsyscalls = [\"{name}\"]\n");
    }
    if again {
        for name in once.into_iter().filter(|name| !counts.contains_key(*name)) {
            let _ = write!(text, "\n[[allow]]\nreason = \"its own program is executed\"\nsyscalls = [\"{name}\"]\n");
        }
    } else {
        text.push_str("\n[[once]]\nreason = \"its own program is executed, and no other\"\nsyscalls = [\"execve\", \"execveat\"]\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        protocol::Level,
        rules::{AllowFile, File, PROCESS, syscalls},
        trace::Verdict,
    };

    #[test]
    fn what_is_written_allows_what_was_seen_and_nothing_else() {
        let book = Book::of_this_build().expect("the data files");
        for exec in [false, true] {
            let mut seen = Seen::default();
            let number = |name| syscalls::number(name).expect("a name").expect("a number");
            for name in ["read", "read", "openat", "mount"].into_iter().chain(exec.then_some("execve")) {
                seen.call(book.kind(number(name), [0; 6]), [0; 6]);
            }
            let text = rules_file(&seen, &book, "a");
            assert!(text.contains("reason = \"seen 2 times\"\nsyscalls = [\"read\"]"), "{text}");
            let denied: File = toml::from_str(PROCESS).expect("the data file");
            let listed: AllowFile = toml::from_str(&text).expect("TOML of this form");
            let own = Book::of(denied, listed).expect("rules");
            let says = |name| own.verdict(own.kind(number(name), [0; 6]), Level::Sandbox, &[]);
            assert_eq!(says("read"), Verdict::Allowed);
            assert_eq!(says("openat"), Verdict::Allowed);
            assert_eq!(says("write"), Verdict::Refused(libc::EPERM));
            assert_eq!(says("mount"), Verdict::Refused(libc::EPERM));
            assert_eq!(says("execve"), if exec { Verdict::Allowed } else { Verdict::Refused(libc::ENOSYS) });
        }
    }
}
