//! What the launcher keeps in memory while it waits. It decides nothing.

#![allow(unsafe_code, reason = "one system call, with its reasons")]

use std::{fs, io, ops::Range, ptr};

/// Lets go of the code that is mapped: what start-up alone needed (reading policies, trying the kernel's controls) stays
/// resident otherwise for as long as the launcher runs, which is as long as the host does. What is needed again the kernel
/// maps again from its page cache.
pub(crate) fn let_go_of_code() -> io::Result<()> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    maps.lines().filter_map(code).try_for_each(|code| {
        let start = ptr::with_exposed_provenance_mut(code.start);
        // SAFETY: the pages are code that this process has mapped from files, privately and never written: the next access
        // finds the same bytes in the file. The kernel checks the range.
        let result = unsafe { libc::madvise(start, code.len(), libc::MADV_DONTNEED) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    })
}

/// The addresses of a line in `/proc/PID/maps` (proc_pid_maps(5)) that shows code mapped from a file.
///
/// Pages that are not writable now may have been: relocations are written before their pages are made read-only, and would
/// be lost. Code is not relocated.
fn code(line: &str) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (addresses, mode) = (fields.next()?, fields.next()?);
    let path = fields.nth(3)?;
    if mode != "r-xp" || !path.starts_with('/') {
        return None;
    }
    let (start, end) = addresses.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use super::code;

    #[test]
    fn code_of_files_alone() {
        let line = "55e0a000-55e0c000 r-xp 00001000 fe:00 1234                       /usr/bin/plugvisor-launcher";
        assert_eq!(code(line), Some(0x55e0_a000..0x55e0_c000));
        for other in [
            "55e0c000-55e0d000 r--p 00003000 fe:00 1234                       /usr/bin/plugvisor-launcher",
            "55e0d000-55e0e000 rw-p 00004000 fe:00 1234                       /usr/bin/plugvisor-launcher",
            "7f0000000000-7f0000001000 r-xp 00000000 00:00 0                  [vdso]",
            "7f0000002000-7f0000003000 r-xp 00000000 00:00 0 ",
            "",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }
}
