//! Whether this host can run an entry: what its first bytes say.
//!
//! This is courtesy to authors and operators, not a wall: the kernel decides at exec. It names the machine that a program
//! was built for, which the kernel's "Exec format error" does not.

use super::EntryKind;

/// What the head of a file says.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Runs(EntryKind),
    NotAProgram,
    WrongMachine { found: String },
}

/// An architecture as ELF headers name it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Machine {
    pub(crate) name: &'static str,
    number: u16,
}

/// This host, `e_machine` as in `elf.h`.
pub(crate) const HOST: Machine = if cfg!(target_arch = "x86_64") {
    Machine { name: "x86-64", number: 62 }
} else if cfg!(target_arch = "aarch64") {
    Machine { name: "AArch64", number: 183 }
} else {
    // Refuses every native program: nothing else is built or tested.
    Machine { name: "an unsupported machine", number: 0 }
};

/// Bytes of the head that are looked at: `e_ident`, `e_type` and `e_machine`.
pub(crate) const HEAD: usize = 20;

/// Judges the first [`HEAD`] bytes, or fewer when the file is shorter.
pub(crate) fn judge(head: &[u8], host: Machine) -> Verdict {
    if head.starts_with(b"#!") {
        return Verdict::Runs(EntryKind::Script);
    }
    let Some(head) = head.first_chunk::<HEAD>().filter(|head| head.starts_with(b"\x7fELF")) else {
        return Verdict::NotAProgram;
    };
    let class = head[4];
    let big_endian = head[5] == 2;
    let half = |at: usize| {
        let bytes = [head[at], head[at + 1]];
        if big_endian { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) }
    };
    // ET_EXEC and ET_DYN; an object file or a core dump is no program.
    if !matches!(half(16), 2 | 3) {
        return Verdict::NotAProgram;
    }
    let machine = half(18);
    if machine == host.number && class == 2 && !big_endian {
        return Verdict::Runs(EntryKind::Elf);
    }
    let name = match machine {
        3 => "x86".into(),
        8 => "MIPS".into(),
        20 => "PowerPC".into(),
        21 => "PowerPC64".into(),
        22 => "S390".into(),
        40 => "ARM".into(),
        62 => "x86-64".into(),
        183 => "AArch64".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}"),
    };
    let bits = if class == 2 { "64" } else { "32" };
    let order = if big_endian { ", big endian" } else { "" };
    Verdict::WrongMachine { found: format!("{name} ({bits} bits{order})") }
}

#[cfg(test)]
mod tests {
    use super::{Machine, Verdict, judge};
    use crate::EntryKind;

    const X86_64: Machine = Machine { name: "x86-64", number: 62 };

    fn elf(class: u8, data: u8, kind: u16, machine: u16) -> Vec<u8> {
        let half = |value: u16| if data == 2 { value.to_be_bytes() } else { value.to_le_bytes() };
        let mut head = vec![0x7f, b'E', b'L', b'F', class, data, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        head.extend(half(kind));
        head.extend(half(machine));
        head
    }

    #[test]
    fn heads_are_told_apart() {
        let wrong = |found: &str| Verdict::WrongMachine { found: found.into() };
        let table = [
            (elf(2, 1, 3, 62), Verdict::Runs(EntryKind::Elf)),
            (elf(2, 1, 2, 62), Verdict::Runs(EntryKind::Elf)),
            (b"#!/bin/sh\n".to_vec(), Verdict::Runs(EntryKind::Script)),
            (elf(2, 1, 3, 183), wrong("AArch64 (64 bits)")),
            (elf(1, 1, 2, 3), wrong("x86 (32 bits)")),
            (elf(1, 1, 2, 62), wrong("x86-64 (32 bits)")),
            (elf(2, 2, 2, 22), wrong("S390 (64 bits, big endian)")),
            (elf(2, 1, 2, 999), wrong("machine 999 (64 bits)")),
            (elf(2, 1, 1, 62), Verdict::NotAProgram),
            (elf(2, 1, 3, 62)[..19].to_vec(), Verdict::NotAProgram),
            (b"MZ\x90\0".to_vec(), Verdict::NotAProgram),
            (Vec::new(), Verdict::NotAProgram),
        ];
        for (head, verdict) in table {
            assert_eq!(judge(&head, X86_64), verdict, "{head:x?}");
        }
    }
}
