//! Memory files that are sealed against writing, which the kernel may refuse for a while.

use std::io;

/// How many copies are made before it is given up.
const COPIES: usize = 4;

/// What `copy` makes, which makes a memory file and seals it.
///
/// The kernel refuses the seal against writing (EBUSY, fcntl(2)) while somebody holds a page of the file, as its own upkeep
/// of memory does now and then for longer than it waits by itself. Another copy has other pages. Without this, a launcher
/// would for all its life take SANDBOX for something that the host cannot do, and a log be lost.
pub(crate) fn sealed<T>(mut copy: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    for _ in 1..COPIES {
        match copy() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            other => return other,
        }
    }
    copy()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_copy_is_made_anew_and_a_lasting_refusal_is_told() {
        let busy = || io::Error::from_raw_os_error(libc::EBUSY);
        let mut made = 0;
        let copy = sealed(|| {
            made += 1;
            if made < COPIES { Err(busy()) } else { Ok(made) }
        });
        assert_eq!(copy.expect("the last copy"), COPIES);
        let mut made = 0;
        let refused = sealed(|| {
            made += 1;
            Err::<(), _>(busy())
        });
        assert_eq!((refused.expect_err("no copy").raw_os_error(), made), (Some(libc::EBUSY), COPIES));
        let mut made = 0;
        let refused = sealed(|| {
            made += 1;
            Err::<(), _>(io::Error::from_raw_os_error(libc::EPERM))
        });
        assert_eq!((refused.expect_err("no copy").raw_os_error(), made), (Some(libc::EPERM), 1));
    }
}
