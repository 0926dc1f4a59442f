//! Whether executing a file would give memory that can be both written and executed, read from the file's head. The kernel
//! makes that memory itself at the exec, before any rule on memory is asked: `PR_SET_MDWE` and rules on mmap and mprotect do
//! not see an executable stack made, nor the pages beyond a segment's bytes in the file (`vm_brk_flags`), which are writable
//! whatever the segment says; and a segment that is both is refused by MDWE alone (Linux 6.3), not by a filter of calls.
//!
//! A file is read as the kernel reads it (`load_elf_binary`), which believes neither the class nor the byte order that the
//! file states: by both layouts, in this machine's order. What the kernel would not load gets nothing. A program that
//! says nothing of its stack counts as one that asks for an executable one: on some machines and kernels it gets that, and
//! from the C library for a library of its own.

use serde::{Deserialize, Serialize};

const MAGIC: &[u8] = b"\x7fELF";
/// The longer of the two headers, in bytes.
const HEAD: usize = 64;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_GNU_STACK: u32 = 0x6474_e551;
const PF_X: u32 = 1;
const PF_W: u32 = 2;
/// The most that the kernel reads of program headers, in bytes.
const MOST_TABLE: usize = 64 << 10;

/// What the programs and libraries of a bundle ask for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum WritableCode {
    /// Nothing.
    None,
    /// The first of them that asks.
    Asked {
        /// Its path in the bundle.
        file: String,
        /// By what.
        by: Asking,
    },
}

/// What asks for memory that can be written and executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Asking {
    /// The stack (PT_GNU_STACK), or that nothing is said of it.
    Stack,
    /// A segment (PT_LOAD).
    Segment,
}

/// Where a layout has what is read: in the header, and in each program header.
struct Layout {
    offset: Field,
    entry_size: usize,
    entry_count: usize,
    entry: usize,
    flags: usize,
    file_size: Field,
    memory_size: Field,
}

enum Field {
    Four(usize),
    Eight(usize),
}

const LAYOUTS: [Layout; 2] = [
    Layout {
        offset: Field::Eight(32),
        entry_size: 54,
        entry_count: 56,
        entry: 56,
        flags: 4,
        file_size: Field::Eight(32),
        memory_size: Field::Eight(40),
    },
    Layout {
        offset: Field::Four(28),
        entry_size: 42,
        entry_count: 44,
        entry: 32,
        flags: 24,
        file_size: Field::Four(16),
        memory_size: Field::Four(20),
    },
];

/// What in this file asks for it, if anything does. `read` fills as much of the buffer as the file has at the offset, and
/// tells how much that is.
pub(super) fn asks<E>(mut read: impl FnMut(&mut [u8], u64) -> Result<usize, E>) -> Result<Option<Asking>, E> {
    // Short files are filled up with zeros, as the kernel does.
    let mut head = [0; HEAD];
    read(&mut head, 0)?;
    if !head.starts_with(MAGIC) || !matches!(short(&head, 16), Some(ET_EXEC | ET_DYN)) {
        return Ok(None);
    }
    for layout in &LAYOUTS {
        let Some((offset, size)) = layout.table(&head) else { continue };
        let mut table = vec![0; size];
        // The kernel loads nothing whose table is cut off.
        let asking = if read(&mut table, offset)? == size { layout.asks(&table) } else { None };
        if asking.is_some() {
            return Ok(asking);
        }
    }
    Ok(None)
}

impl Layout {
    /// Where the program headers are and how long, when the kernel would read them.
    fn table(&self, head: &[u8]) -> Option<(u64, usize)> {
        let size = self.entry * usize::from(short(head, self.entry_count)?);
        let fits = usize::from(short(head, self.entry_size)?) == self.entry && (1..=MOST_TABLE).contains(&size);
        let offset = self.offset.of(head)?;
        // The kernel takes it for a signed number.
        (fits && i64::try_from(offset).is_ok()).then_some((offset, size))
    }

    fn asks(&self, table: &[u8]) -> Option<Asking> {
        let headers = |kind: u32| table.chunks_exact(self.entry).filter(move |entry| word(entry, 0) == Some(kind));
        let flags = |entry: &[u8]| word(entry, self.flags).unwrap_or(PF_X | PF_W);
        // The last header that speaks of the stack counts.
        if headers(PT_GNU_STACK).next_back().is_none_or(|entry| flags(entry) & PF_X != 0) {
            return Some(Asking::Stack);
        }
        let writable_code = |entry: &[u8]| {
            let grows = self.memory_size.of(entry) > self.file_size.of(entry);
            flags(entry) & PF_X != 0 && (flags(entry) & PF_W != 0 || grows)
        };
        headers(PT_LOAD).any(writable_code).then_some(Asking::Segment)
    }
}

impl Field {
    fn of(&self, record: &[u8]) -> Option<u64> {
        match self {
            Self::Four(at) => word(record, *at).map(u64::from),
            Self::Eight(at) => bytes(record, *at).map(u64::from_ne_bytes),
        }
    }
}

fn bytes<const N: usize>(of: &[u8], at: usize) -> Option<[u8; N]> {
    of.get(at..)?.first_chunk().copied()
}

fn short(of: &[u8], at: usize) -> Option<u16> {
    bytes(of, at).map(u16::from_ne_bytes)
}

fn word(of: &[u8], at: usize) -> Option<u32> {
    bytes(of, at).map(u32::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ_WRITE: u32 = 6;

    fn judged(file: &[u8]) -> Option<Asking> {
        let mut most = 0;
        let found = asks(|buffer, offset| {
            most = most.max(buffer.len());
            let from = usize::try_from(offset).unwrap_or(usize::MAX).min(file.len());
            let length = buffer.len().min(file.len() - from);
            buffer[..length].copy_from_slice(&file[from..from + length]);
            Ok::<_, ()>(length)
        });
        assert!(most <= MOST_TABLE, "{most} bytes were read at once");
        found.expect("nothing fails")
    }

    fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A file with these program headers, each a type and flags, at this offset.
    fn elf(wide: bool, offset: usize, headers: &[(u32, u32)]) -> Vec<u8> {
        let layout = &LAYOUTS[usize::from(!wide)];
        let mut file = vec![0; offset.max(HEAD) + headers.len() * layout.entry];
        put(&mut file, 0, MAGIC);
        put(&mut file, 4, &[if wide { 2 } else { 1 }, 1, 1]);
        put(&mut file, 16, &ET_DYN.to_ne_bytes());
        match layout.offset {
            Field::Eight(at) => put(&mut file, at, &(offset as u64).to_ne_bytes()),
            Field::Four(at) => put(&mut file, at, &u32::try_from(offset).expect("small").to_ne_bytes()),
        }
        put(&mut file, layout.entry_size, &u16::try_from(layout.entry).expect("small").to_ne_bytes());
        put(&mut file, layout.entry_count, &u16::try_from(headers.len()).expect("few").to_ne_bytes());
        for (index, (kind, flags)) in headers.iter().enumerate() {
            let at = offset + index * layout.entry;
            put(&mut file, at, &kind.to_ne_bytes());
            put(&mut file, at + layout.flags, &flags.to_ne_bytes());
        }
        file
    }

    #[test]
    fn the_last_word_on_the_stack_counts() {
        const LOAD: (u32, u32) = (1, 5);
        let (data, code) = ((PT_GNU_STACK, READ_WRITE), (PT_GNU_STACK, READ_WRITE | PF_X));
        let stack = Some(Asking::Stack);
        for wide in [true, false] {
            for (headers, asking) in [
                (&[LOAD, data][..], None),
                (&[LOAD, code], stack),
                (&[code, data], None),
                (&[data, code], stack),
                (&[(PT_GNU_STACK, 0)], None),
                // Nothing is said of it.
                (&[LOAD], stack),
            ] {
                // At the usual place, and far away.
                for offset in [HEAD, 300_000] {
                    assert_eq!(judged(&elf(wide, offset, headers)), asking, "{wide} {offset} {headers:?}");
                }
            }
            // The kernel does not look at the class or the byte order.
            let mut lying = elf(wide, HEAD, &[code]);
            put(&mut lying, 4, &[if wide { 1 } else { 2 }, 2]);
            assert_eq!(judged(&lying), stack);
        }
    }

    #[test]
    fn a_segment_of_code_has_nothing_writable() {
        const CODE: u32 = 5;
        for wide in [true, false] {
            let layout = &LAYOUTS[usize::from(!wide)];
            for (flags, in_file, in_memory, asking) in [
                (CODE, 4096_u32, 4096_u32, None),
                (CODE | PF_W, 4096, 4096, Some(Asking::Segment)),
                // What is beyond its bytes in the file the kernel makes writable.
                (CODE, 4096, 4097, Some(Asking::Segment)),
                (CODE, 0, u32::MAX, Some(Asking::Segment)),
                (READ_WRITE, 0, 4096, None),
                (READ_WRITE, 4096, 4096, None),
            ] {
                let mut file = elf(wide, HEAD, &[(PT_GNU_STACK, READ_WRITE), (PT_LOAD, 4), (PT_LOAD, flags)]);
                let header = HEAD + 2 * layout.entry;
                for (field, value) in [(&layout.file_size, in_file), (&layout.memory_size, in_memory)] {
                    match field {
                        Field::Four(at) => put(&mut file, header + at, &value.to_ne_bytes()),
                        Field::Eight(at) => put(&mut file, header + at, &u64::from(value).to_ne_bytes()),
                    }
                }
                assert_eq!(judged(&file), asking, "{wide} {flags} {in_file} {in_memory}");
            }
        }
    }

    #[test]
    fn what_the_kernel_does_not_load_asks_for_nothing() {
        let good = elf(true, HEAD, &[(PT_GNU_STACK, 7), (PT_GNU_STACK, 7)]);
        assert!(judged(&good).is_some());
        for length in 0..good.len() {
            assert_eq!(judged(&good[..length]), None, "{length} bytes of it");
        }
        let changed = |at: usize, bytes: &[u8]| {
            let mut file = good.clone();
            put(&mut file, at, bytes);
            file
        };
        for (what, file) in [
            ("no ELF", changed(0, b"#!")),
            ("an object", changed(16, &1_u16.to_ne_bytes())),
            ("a core", changed(16, &4_u16.to_ne_bytes())),
            ("no headers", changed(56, &0_u16.to_ne_bytes())),
            ("more headers than it has", changed(56, &3_u16.to_ne_bytes())),
            ("as many as can be said", changed(56, &u16::MAX.to_ne_bytes())),
            ("headers of another size", changed(54, &57_u16.to_ne_bytes())),
            ("headers behind its end", changed(32, &(1_u64 << 40).to_ne_bytes())),
            ("headers before its beginning", changed(32, &u64::MAX.to_ne_bytes())),
        ] {
            assert_eq!(judged(&file), None, "{what}");
        }
        // The most that the kernel reads.
        let most = MOST_TABLE / 56;
        let mut long = vec![(1, 5); most];
        long[most - 1] = (PT_GNU_STACK, 7);
        assert_eq!(judged(&elf(true, HEAD, &long)), Some(Asking::Stack));
        long.push((PT_GNU_STACK, 7));
        assert_eq!(judged(&elf(true, HEAD, &long)), None);
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        assert_eq!(asks(|_, _| Err("broken")), Err("broken"));
    }

    #[test]
    fn a_store_that_says_nothing_of_it_is_not_read() {
        #[derive(Deserialize)]
        struct Known {
            #[allow(dead_code, reason = "only that it must be there")]
            writable_code: WritableCode,
        }
        for good in [r#"{"writable_code":"none"}"#, r#"{"writable_code":{"asked":{"file":"bin/a","by":"segment"}}}"#] {
            serde_json::from_str::<Known>(good).expect(good);
        }
        for old in ["{}", r#"{"stacks":"data"}"#] {
            assert!(serde_json::from_str::<Known>(old).is_err(), "{old}");
        }
    }
}
