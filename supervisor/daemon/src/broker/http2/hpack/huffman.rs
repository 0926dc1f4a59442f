//! Huffman code for strings (RFC 7541, section 5.2 and appendix B), decoding only: what the broker sends is not
//! encoded, because its peers are on the same machine and bytes there cost less than bits.

use std::sync::LazyLock;

use super::HpackError;

/// The lengths of the codes of all bytes, and of the end of string. The code is canonical, so that lengths say all.
#[rustfmt::skip]
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28,
    28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6,
    12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15,
    5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20,
    22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24,
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22,
    23, 22, 22, 23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24,
    21, 21, 26, 26, 28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26,
    27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, 30,
];

const END: usize = 256;

/// What four bits lead to from a state: the next state, and a byte if one is complete.
#[derive(Clone, Copy, Debug)]
struct Step {
    next: u16,
    byte: Option<u8>,
    /// The end of string, or no code at all.
    wrong: bool,
}

#[derive(Debug)]
struct Machine {
    steps: Vec<[Step; 16]>,
    /// Whether a string may end here: after at most seven bits, all of them set.
    ends: Vec<bool>,
}

static MACHINE: LazyLock<Machine> = LazyLock::new(Machine::new);

#[derive(Clone, Copy, Debug)]
enum Branch {
    Missing,
    Node(usize),
    Leaf(usize),
}

impl Machine {
    fn new() -> Self {
        let mut tree = vec![[Branch::Missing; 2]];
        let mut symbols: Vec<usize> = (0..LENGTHS.len()).collect();
        symbols.sort_by_key(|symbol| (LENGTHS[*symbol], *symbol));
        let mut code: u32 = 0;
        let mut length = 0;
        for symbol in symbols {
            code <<= LENGTHS[symbol] - length;
            length = LENGTHS[symbol];
            let mut node = 0;
            for bit in (0..length).rev() {
                let branch = usize::from(code >> bit & 1 == 1);
                if bit == 0 {
                    tree[node][branch] = Branch::Leaf(symbol);
                } else if let Branch::Node(next) = tree[node][branch] {
                    node = next;
                } else {
                    tree.push([Branch::Missing; 2]);
                    let next = tree.len() - 1;
                    tree[node][branch] = Branch::Node(next);
                    node = next;
                }
            }
            code += 1;
        }
        let steps = (0..tree.len()).map(|node| std::array::from_fn(|bits| step(&tree, node, bits))).collect();
        let mut ends = vec![false; tree.len()];
        let mut node = 0;
        for _ in 0..8 {
            ends[node] = true;
            let Branch::Node(next) = tree[node][1] else { break };
            node = next;
        }
        Self { steps, ends }
    }
}

fn step(tree: &[[Branch; 2]], start: usize, bits: usize) -> Step {
    let mut node = start;
    let mut byte = None;
    for bit in (0..4).rev() {
        match tree[node][bits >> bit & 1] {
            Branch::Node(next) => node = next,
            Branch::Leaf(END) | Branch::Missing => return Step { next: 0, byte: None, wrong: true },
            Branch::Leaf(symbol) => {
                // The shortest code has five bits: four cannot complete two bytes.
                byte = u8::try_from(symbol).ok();
                node = 0;
            }
        }
    }
    Step { next: u16::try_from(node).unwrap_or_default(), byte, wrong: false }
}

/// Decodes `code` to the end of `out`. A string can grow to eight fifths of its code, no further.
pub(super) fn decode(code: &[u8], out: &mut Vec<u8>) -> Result<(), HpackError> {
    let machine = &*MACHINE;
    let mut state = 0;
    out.reserve(code.len() * 8 / 5 + 1);
    for byte in code {
        for nibble in [byte >> 4, byte & 15] {
            let step = machine.steps[state][usize::from(nibble)];
            if step.wrong {
                return Err(HpackError::Huffman);
            }
            if let Some(byte) = step.byte {
                out.push(byte);
            }
            state = usize::from(step.next);
        }
    }
    if machine.ends[state] { Ok(()) } else { Err(HpackError::Huffman) }
}

#[cfg(test)]
mod tests {
    use super::{HpackError, decode};

    fn decoded(code: &[u8]) -> Result<Vec<u8>, HpackError> {
        let mut out = Vec::new();
        decode(code, &mut out).map(|()| out)
    }

    #[test]
    fn the_examples_of_the_rfc() {
        for (code, text) in [
            (&[0xf1, 0xe3, 0xc2, 0xe5, 0xf2, 0x3a, 0x6b, 0xa0, 0xab, 0x90, 0xf4, 0xff][..], "www.example.com"),
            (&[0xa8, 0xeb, 0x10, 0x64, 0x9c, 0xbf], "no-cache"),
            (&[0x25, 0xa8, 0x49, 0xe9, 0x5b, 0xb8, 0xe8, 0xb4, 0xbf], "custom-value"),
            (&[0x64, 0x02], "302"),
            (&[], ""),
        ] {
            assert_eq!(decoded(code), Ok(text.as_bytes().to_vec()));
        }
    }

    #[test]
    fn the_end_of_string_and_long_padding_are_refused() {
        assert_eq!(decoded(&[0xff, 0xff, 0xff, 0xff]), Err(HpackError::Huffman));
        // A byte of ones behind a whole string: padding of eight bits.
        assert_eq!(decoded(&[0x64, 0x02, 0xff]), Err(HpackError::Huffman));
        // Padding with zeros.
        assert_eq!(decoded(&[0x00, 0x00]), Err(HpackError::Huffman));
    }
}
