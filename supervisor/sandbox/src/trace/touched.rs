//! Which files and addresses a call names, and where in its arguments. Pure.

use super::seen::Access;

/// A thing that a call names behind a pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Touched {
    /// A path, from the directory behind a descriptor when it is relative (`AT_FDCWD` is the working directory).
    Path { access: Access, from: i32, at: u64 },
    /// The same, opened as the `struct open_how` says.
    Opened { from: i32, at: u64, how: u64 },
    /// A socket address of so many bytes.
    Address { bind: bool, at: u64, length: u64 },
}

/// What this call names.
pub(super) fn touched(number: i64, arguments: [u64; 6]) -> Vec<Touched> {
    let [a, b, c, d, ..] = arguments;
    let path = |access, from, at| Touched::Path { access, from: descriptor(from), at };
    match number {
        libc::SYS_openat => vec![path(opens(c), a, b)],
        libc::SYS_openat2 => vec![Touched::Opened { from: descriptor(a), at: b, how: c }],
        libc::SYS_execve => vec![path(Access::Execute, HERE, a)],
        libc::SYS_execveat => vec![path(Access::Execute, a, b)],
        libc::SYS_mkdirat | libc::SYS_mknodat | libc::SYS_unlinkat | libc::SYS_fchmodat | libc::SYS_fchownat => {
            vec![path(Access::Write, a, b)]
        }
        libc::SYS_renameat2 => vec![path(Access::Write, a, b), path(Access::Write, c, d)],
        libc::SYS_linkat => vec![path(Access::Write, c, d)],
        libc::SYS_symlinkat => vec![path(Access::Write, b, c)],
        libc::SYS_truncate => vec![path(Access::Write, HERE, a)],
        libc::SYS_connect => vec![Touched::Address { bind: false, at: b, length: c }],
        libc::SYS_bind => vec![Touched::Address { bind: true, at: b, length: c }],
        _ => old(number, arguments),
    }
}

/// `AT_FDCWD` as an argument.
const HERE: u64 = 0xFFFF_FFFF_FFFF_FF9C;

/// The kernel reads descriptors as 32 bits.
fn descriptor(argument: u64) -> i32 {
    let [a, b, c, d, ..] = argument.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

/// What a file is opened for.
pub(super) fn opens(flags: u64) -> Access {
    let of = |flags: i32| u64::from(flags.unsigned_abs());
    // O_TMPFILE has the bit of O_DIRECTORY too, which alone means nothing.
    let writes = of(libc::O_ACCMODE) | of(libc::O_CREAT) | of(libc::O_TRUNC) | of(libc::O_TMPFILE & !libc::O_DIRECTORY);
    // O_PATH opens nothing, whatever else stands beside it.
    if flags & writes != 0 && flags & of(libc::O_PATH) == 0 { Access::Write } else { Access::Read }
}

/// The calls that only older architectures have.
#[cfg(target_arch = "x86_64")]
fn old(number: i64, [a, b, ..]: [u64; 6]) -> Vec<Touched> {
    let path = |access, at| Touched::Path { access, from: libc::AT_FDCWD, at };
    match number {
        libc::SYS_open => vec![path(opens(b), a)],
        libc::SYS_creat
        | libc::SYS_mkdir
        | libc::SYS_rmdir
        | libc::SYS_unlink
        | libc::SYS_mknod
        | libc::SYS_chmod
        | libc::SYS_chown => {
            vec![path(Access::Write, a)]
        }
        libc::SYS_rename => vec![path(Access::Write, a), path(Access::Write, b)],
        libc::SYS_link | libc::SYS_symlink => vec![path(Access::Write, b)],
        _ => Vec::new(),
    }
}

/// The calls that only older architectures have.
#[cfg(not(target_arch = "x86_64"))]
fn old(_: i64, _: [u64; 6]) -> Vec<Touched> {
    Vec::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_opened_for_what_its_flags_say() {
        let of = |flags: i32| opens(u64::from(flags.unsigned_abs()));
        assert_eq!(of(libc::O_RDONLY | libc::O_CLOEXEC | libc::O_DIRECTORY), Access::Read);
        assert_eq!(of(libc::O_PATH | libc::O_RDWR), Access::Read);
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_CREAT, libc::O_TMPFILE, libc::O_TRUNC] {
            assert_eq!(of(flags), Access::Write, "{flags:o}");
        }
    }

    #[test]
    fn descriptors_have_32_bits() {
        assert_eq!(descriptor(HERE), libc::AT_FDCWD);
        assert_eq!(descriptor(0xFFFF_FF9C), libc::AT_FDCWD);
        assert_eq!(descriptor(7 | 1 << 40), 7);
    }
}
