//! The trace of a plugin: what it asks the kernel, and the least that it must be allowed for that.
//!
//! ```text
//! the program's calls ──▶ watch: answers each, reads what it names ──▶ seen
//!                          │                                            │
//!                          └─ book: the rules of the policy files ──────┴──▶ proposal
//! ```
//!
//! Who traces has started a launcher of its own for that (`Options::trace`), which hands over a listener of seccomp
//! notifications: every call of the program waits until [`watch`] has answered. What some capability or a weaker level would
//! allow is carried out, the rest fails as it would without a trace. Only the launcher's starter can ask for that; see ADR 16.
//!
//! A trace shows what happened, not what can happen, and a path that is behind a pointer is read a moment before the kernel
//! reads it: a plugin that means to can show another one here.

mod book;
mod names;
mod proposal;
mod rules_file;
mod seen;
mod touched;
mod watch;

pub use self::{
    book::{Book, Kind, Meaning, Verdict},
    proposal::{Denied, Outside, Proposal, Survival, propose},
    rules_file::rules_file,
    seen::{Access, FileUse, Place, Seen, SocketUse, Times},
    watch::watch,
};
