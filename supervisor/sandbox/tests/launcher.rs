//! Real launches through the real launcher, as root and as an ordinary user.
#![allow(missing_docs, reason = "tests")]

mod harness;

use harness::{As, Harness};

#[test]
fn says_what_it_sees() {
    for as_ in As::possible() {
        let mut harness = Harness::start(as_);
        let lines =
            harness.attempt(|_| (), &["env", "list", "/proc/self/fd", "list", "/dev", "cat", "/proc/self/status"]);
        for line in lines {
            println!("{as_:?} {line:?}");
        }
    }
}
