//! Changes to inputs, drawn from a seeded generator. The same seed gives the same changes on every machine.

/// SplitMix64 (Steele, Lea, Flood 2014): enough to choose changes, and its whole state is the seed.
#[derive(Clone, Debug)]
pub(crate) struct Chance(u64);

impl Chance {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`; 0 when there is none.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % (end.max(1) as u64)).unwrap_or_default()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, from: &'a [Box<T>]) -> Option<&'a T> {
        from.get(self.below(from.len())).map(Box::as_ref)
    }
}

/// Bytes at the edges of what numbers can be.
const EDGES: [&[u8]; 12] = [
    &[0],
    &[0x7f],
    &[0x80],
    &[0xff],
    &[0xff, 0xff, 0xff, 0xff, 0x0f],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    &[0; 8],
    b"-1",
    b"18446744073709551616",
    b"1e999",
    b"\xef\xbb\xbf",
    b"\\ud800",
];

/// Changes `input` a few times. `words` are what inputs of this kind are made of, `other` is another input.
pub(crate) fn change(chance: &mut Chance, input: &mut Vec<u8>, words: &[Box<[u8]>], other: &[u8], longest: usize) {
    for _ in 0..=chance.below(6) {
        let at = chance.below(input.len() + 1);
        let length = chance.below(32.min(input.len() - at) + 1);
        match chance.below(10) {
            0 if !input.is_empty() => {
                let at = chance.below(input.len());
                input[at] ^= 1 << chance.below(8);
            }
            1 if !input.is_empty() => {
                let at = chance.below(input.len());
                input[at] = chance.byte();
            }
            2 => drop(input.drain(at..at + length)),
            3 => {
                let copy = input[at..at + length].to_vec();
                insert(input, at, &copy.repeat(1 + chance.below(40)));
            }
            4 => insert(input, at, EDGES[chance.below(EDGES.len())]),
            5 => input.truncate(at),
            6 => {
                // The other's end behind our beginning.
                input.truncate(at);
                input.extend_from_slice(&other[chance.below(other.len() + 1)..]);
            }
            7 => {
                let from = chance.below(other.len() + 1);
                let most = 64.min(other.len() - from);
                let piece = other[from..from + chance.below(most + 1)].to_vec();
                insert(input, at, &piece);
            }
            8 => {
                if let Some(word) = chance.pick(words) {
                    input.splice(at..at + length, word.iter().copied());
                }
            }
            _ => {
                if let Some(word) = chance.pick(words) {
                    insert(input, at, word);
                }
            }
        }
    }
    input.truncate(longest);
}

fn insert(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    input.splice(at..at, piece.iter().copied());
}

/// The words that the inputs are made of: what stands between bytes that are neither letters nor digits, and what
/// stands in quotes.
pub(crate) fn words(inputs: &[Vec<u8>]) -> Vec<Box<[u8]>> {
    const MOST: usize = 2000;
    let mut words = std::collections::BTreeSet::new();
    for input in inputs {
        let pieces = input.split(|byte| !byte.is_ascii_alphanumeric()).chain(input.split(|byte| *byte == b'"'));
        words.extend(pieces.filter(|piece| (1..=40).contains(&piece.len())).map(Box::from));
        words.extend(input.iter().filter(|byte| byte.is_ascii_punctuation()).map(|byte| Box::from([*byte])));
    }
    words.into_iter().take(MOST).collect()
}
