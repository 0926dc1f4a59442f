//! From fields to header blocks.
//!
//! Fields that come again in every call are kept in the dynamic table, found by a hash of the whole field; all others
//! are sent as they are, and never change the table. Strings are not Huffman-coded.

use super::{
    super::fields::Field,
    integer,
    table::{STATIC, Table},
};

/// The largest table that is used, whatever the peer allows.
const TABLE: usize = 4096;
/// Longer fields would push others out.
const LONGEST: usize = 256;

/// Where a field may be found in the dynamic table.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    hash: u64,
    /// `Table::inserted` just after it was added; 0: none.
    number: u64,
}

const PLACES: usize = 128;

/// The encoding half of a connection.
#[derive(Debug)]
pub struct Encoder {
    table: Table,
    places: Box<[Place; PLACES]>,
    /// The smallest size since the last block, and the size now, to tell the peer with the next one (section 4.2).
    resized: Option<(usize, usize)>,
}

impl Default for Encoder {
    fn default() -> Self {
        Self { table: Table::new(TABLE), places: Box::new([Place::default(); PLACES]), resized: None }
    }
}

impl Encoder {
    /// Obeys the peer's `SETTINGS_HEADER_TABLE_SIZE`.
    pub fn limit(&mut self, size: usize) {
        let size = size.min(TABLE);
        if size != self.table.max() {
            self.table.resize(size);
            let smallest = self.resized.map_or(size, |(smallest, _)| smallest.min(size));
            self.resized = Some((smallest, size));
        }
    }

    /// Begins a block.
    pub fn begin(&mut self, block: &mut Vec<u8>) {
        if let Some((smallest, size)) = self.resized.take() {
            if smallest < size {
                integer::write(block, 0x20, 5, smallest);
            }
            integer::write(block, 0x20, 5, size);
        }
    }

    /// Adds a field that will come again.
    pub fn stable(&mut self, block: &mut Vec<u8>, field: Field<'_>) {
        let Field { name, value, sensitive } = field;
        if sensitive || name.len() + value.len() > LONGEST || !self.table.fits(name, value) {
            return plain(block, field);
        }
        let hash = hash(name, value);
        // The low bits of a product are the poorest.
        let place = &mut self.places[usize::try_from(hash >> 57).unwrap_or_default() % PLACES];
        if place.hash == hash && place.number > 0 {
            let age = usize::try_from(self.table.inserted() - place.number).unwrap_or(usize::MAX);
            if age < self.table.len() && self.table.get(age) == Some((name, value)) {
                return integer::write(block, 0x80, 7, STATIC.len() + 1 + age);
            }
        }
        name_of(block, 0x40, 6, name);
        string(block, value);
        self.table.insert(name, value);
        *place = Place { hash, number: self.table.inserted() };
    }

    /// Adds a field that is the static table's own, by its index.
    pub fn known(block: &mut Vec<u8>, index: u8) {
        block.push(0x80 | index);
    }

    /// Adds a field that need not come again.
    pub fn once(block: &mut Vec<u8>, field: Field<'_>) {
        plain(block, field);
    }
}

fn plain(block: &mut Vec<u8>, field: Field<'_>) {
    name_of(block, if field.sensitive { 0x10 } else { 0 }, 4, field.name);
    string(block, field.value);
}

fn name_of(block: &mut Vec<u8>, flags: u8, bits: u32, name: &[u8]) {
    match static_name(name) {
        Some(index) => integer::write(block, flags, bits, index),
        None => {
            block.push(flags);
            string(block, name);
        }
    }
}

/// The names of the static table that calls have.
fn static_name(name: &[u8]) -> Option<usize> {
    match name {
        b":authority" => Some(1),
        b":path" => Some(4),
        b"content-type" => Some(31),
        b"user-agent" => Some(58),
        b"accept-encoding" => Some(16),
        b"date" => Some(33),
        _ => None,
    }
}

fn string(block: &mut Vec<u8>, bytes: &[u8]) {
    integer::write(block, 0, 7, bytes.len());
    block.extend_from_slice(bytes);
}

/// Only speed hangs on it: what is found is compared.
fn hash(name: &[u8], value: &[u8]) -> u64 {
    const FACTOR: u64 = 0x9E37_79B9_7F4A_7C15;
    let mut hash = (name.len() as u64) << 32 | value.len() as u64;
    for part in [name, value] {
        for chunk in part.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash = (hash.rotate_left(23) ^ u64::from_le_bytes(word)).wrapping_mul(FACTOR);
        }
    }
    hash
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{Decoded, Decoder},
        Encoder, Field,
    };
    use crate::broker::http2::fields::Fields;

    fn round(encoder: &mut Encoder, decoder: &mut Decoder, list: &[(Vec<u8>, Vec<u8>, u8)]) -> usize {
        let mut block = Vec::new();
        encoder.begin(&mut block);
        for (name, value, how) in list {
            let field = Field { name, value, sensitive: *how == 2 };
            if *how == 0 { encoder.stable(&mut block, field) } else { Encoder::once(&mut block, field) }
        }
        let mut fields = Fields::new();
        assert_eq!(decoder.decode(&block, 1 << 20, &mut fields), Ok(Decoded::Whole));
        let found: Vec<_> =
            fields.iter().map(|field| (field.name.to_vec(), field.value.to_vec(), field.sensitive)).collect();
        let sent: Vec<_> = list.iter().map(|(name, value, how)| (name.clone(), value.clone(), *how == 2)).collect();
        assert_eq!(found, sent);
        block.len()
    }

    #[test]
    fn what_comes_again_is_a_byte() {
        let (mut encoder, mut decoder) = (Encoder::default(), Decoder::new(4096));
        let list = [(b"user-agent".to_vec(), b"grpc-rust/1".to_vec(), 0), (b"te".to_vec(), b"trailers".to_vec(), 0)];
        assert!(round(&mut encoder, &mut decoder, &list) > 20);
        assert_eq!(round(&mut encoder, &mut decoder, &list), 2);
        encoder.limit(0);
        assert!(round(&mut encoder, &mut decoder, &list) > 20);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            lists in prop::collection::vec(prop::collection::vec(
                (prop::collection::vec(b'a'..=b'd', 1..4), prop::collection::vec(any::<u8>(), 0..300), 0..3_u8), 0..20),
            1..30),
            sizes in prop::collection::vec(0..5000_usize, 30),
        ) {
            let (mut encoder, mut decoder) = (Encoder::default(), Decoder::new(4096));
            for (list, size) in lists.iter().zip(sizes) {
                round(&mut encoder, &mut decoder, list);
                encoder.limit(size);
            }
        }
    }
}
