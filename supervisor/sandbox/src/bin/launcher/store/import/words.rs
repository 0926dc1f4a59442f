//! What is wrong with a file, in words.

use plugvisor_sandbox::protocol::{ImportFile, Refusal, RefusalCode};

use super::super::{copy::Wrong, stated};

/// What the child found wrong, in words.
pub(super) fn wrong(file: Option<&ImportFile>, why: &Wrong) -> Refusal {
    let name = file.map_or_else(|| "a file".to_owned(), |file| shown(&file.path));
    let errno = |errno: i32| std::io::Error::from_raw_os_error(errno);
    let (code, what) = match why {
        Wrong::Kind => (RefusalCode::File, "it is not a regular file that is open for reading".to_owned()),
        Wrong::Size => (
            RefusalCode::File,
            "it is not as large as was said: it changed since it was verified; load the plugin again when nothing \
             writes to it"
                .to_owned(),
        ),
        Wrong::Digest => (
            RefusalCode::DigestMismatch,
            "its bytes have another SHA-256 than was said: it changed since it was verified".to_owned(),
        ),
        Wrong::Read(number) => (RefusalCode::File, format!("reading it failed: {}", errno(*number))),
        Wrong::Write(number) => (
            if matches!(*number, libc::ENOSPC | libc::EDQUOT | libc::EFBIG) {
                RefusalCode::Exhausted
            } else {
                RefusalCode::Kernel
            },
            format!("writing its copy failed: {}; look at the space left where the store is", errno(*number)),
        ),
        Wrong::Manifest(problems) => (RefusalCode::File, format!("it is no manifest: {problems}")),
        Wrong::TooMuch => (
            RefusalCode::File,
            format!(
                "the arguments and variables of its runtime take more than {} bytes; put them into a file of the bundle",
                stated::MOST
            ),
        ),
        Wrong::Confine(number) => {
            (RefusalCode::Kernel, format!("the process that was to copy it could not be confined: {}", errno(*number)))
        }
    };
    Refusal { code, message: format!("{name} was not imported: {what}") }
}

/// A path from outside, for people: short, and without what could forge a line.
pub(super) fn shown(path: &str) -> String {
    format!("{:?}", path.chars().take(200).collect::<String>())
}
