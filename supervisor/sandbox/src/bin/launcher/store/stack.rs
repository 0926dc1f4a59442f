//! Whether the kernel would give a program an executable stack, read from the head of its file. It then is writable and
//! executable memory that was there before any rule on memory: neither `PR_SET_MDWE` nor a rule on mmap sees it made.
//!
//! A file is read as the kernel reads it (`load_elf_binary`), which believes neither the class nor the byte order that the
//! file states: by both layouts, in this machine's order. What the kernel would not load has no stack. A program that says
//! nothing of its stack counts as one that asks for an executable one: on some machines and kernels it gets that, and from
//! the C library for a library of its own.

use serde::{Deserialize, Serialize};

const MAGIC: &[u8] = b"\x7fELF";
/// The longer of the two headers, in bytes.
const HEAD: usize = 64;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_GNU_STACK: u32 = 0x6474_e551;
const PF_X: u32 = 1;
/// The most that the kernel reads of program headers, in bytes.
const MOST_TABLE: usize = 64 << 10;

/// What the programs and libraries of a bundle ask of their stack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stacks {
    /// That it is data.
    Data,
    /// This file, the first of them, that it can be executed.
    Executable(String),
}

/// Where a layout has what is read: in the header, and in each program header.
struct Layout {
    offset: Field,
    entry_size: usize,
    entry_count: usize,
    entry: usize,
    flags: usize,
}

enum Field {
    Four(usize),
    Eight(usize),
}

const LAYOUTS: [Layout; 2] = [
    Layout { offset: Field::Eight(32), entry_size: 54, entry_count: 56, entry: 56, flags: 4 },
    Layout { offset: Field::Four(28), entry_size: 42, entry_count: 44, entry: 32, flags: 24 },
];

/// Whether this file would get an executable stack. `read` fills as much of the buffer as the file has at the offset, and
/// tells how much that is.
pub(super) fn is_executable<E>(mut read: impl FnMut(&mut [u8], u64) -> Result<usize, E>) -> Result<bool, E> {
    // Short files are filled up with zeros, as the kernel does.
    let mut head = [0; HEAD];
    read(&mut head, 0)?;
    if !head.starts_with(MAGIC) || !matches!(short(&head, 16), Some(ET_EXEC | ET_DYN)) {
        return Ok(false);
    }
    for layout in &LAYOUTS {
        let Some((offset, size)) = layout.table(&head) else { continue };
        let mut table = vec![0; size];
        // The kernel loads nothing whose table is cut off.
        if read(&mut table, offset)? == size && layout.asks(&table) {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Layout {
    /// Where the program headers are and how long, when the kernel would read them.
    fn table(&self, head: &[u8]) -> Option<(u64, usize)> {
        let size = self.entry * usize::from(short(head, self.entry_count)?);
        let fits = usize::from(short(head, self.entry_size)?) == self.entry && (1..=MOST_TABLE).contains(&size);
        let offset = match self.offset {
            Field::Four(at) => word(head, at)?.into(),
            Field::Eight(at) => u64::from_ne_bytes(bytes(head, at)?),
        };
        // The kernel takes it for a signed number.
        (fits && i64::try_from(offset).is_ok()).then_some((offset, size))
    }

    /// The last header that speaks of the stack counts.
    fn asks(&self, table: &[u8]) -> bool {
        let mut stacks = table.chunks_exact(self.entry).filter(|entry| word(entry, 0) == Some(PT_GNU_STACK));
        stacks.next_back().and_then(|entry| word(entry, self.flags)).is_none_or(|flags| flags & PF_X != 0)
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

    fn judged(file: &[u8]) -> bool {
        let mut most = 0;
        let found = is_executable(|buffer, offset| {
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
        for wide in [true, false] {
            for (headers, executable) in [
                (&[LOAD, data][..], false),
                (&[LOAD, code], true),
                (&[code, data], false),
                (&[data, code], true),
                (&[(PT_GNU_STACK, 0)], false),
                // Nothing is said of it.
                (&[LOAD], true),
            ] {
                // At the usual place, and far away.
                for offset in [HEAD, 300_000] {
                    assert_eq!(judged(&elf(wide, offset, headers)), executable, "{wide} {offset} {headers:?}");
                }
            }
            // The kernel does not look at the class or the byte order.
            let mut lying = elf(wide, HEAD, &[code]);
            put(&mut lying, 4, &[if wide { 1 } else { 2 }, 2]);
            assert!(judged(&lying));
        }
    }

    #[test]
    fn what_the_kernel_does_not_load_has_no_stack() {
        let good = elf(true, HEAD, &[(PT_GNU_STACK, 7), (PT_GNU_STACK, 7)]);
        assert!(judged(&good));
        for length in 0..good.len() {
            assert!(!judged(&good[..length]), "{length} bytes of it");
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
            assert!(!judged(&file), "{what}");
        }
        // The most that the kernel reads.
        let most = MOST_TABLE / 56;
        let mut long = vec![(1, 5); most];
        long[most - 1] = (PT_GNU_STACK, 7);
        assert!(judged(&elf(true, HEAD, &long)));
        long.push((PT_GNU_STACK, 7));
        assert!(!judged(&elf(true, HEAD, &long)));
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        assert_eq!(is_executable(|_, _| Err("broken")), Err("broken"));
    }

    #[test]
    fn a_store_that_says_nothing_of_stacks_is_not_read() {
        #[derive(Deserialize)]
        struct Known {
            #[allow(dead_code, reason = "only that it must be there")]
            stacks: Stacks,
        }
        for good in [r#"{"stacks":"data"}"#, r#"{"stacks":{"executable":"bin/a"}}"#] {
            serde_json::from_str::<Known>(good).expect(good);
        }
        assert!(serde_json::from_str::<Known>("{}").is_err());
    }
}
