//! From header blocks to fields.

use super::{
    super::fields::{Field, Fields},
    HpackError, huffman, integer,
    table::{self, Table},
};

/// What a field counts beyond its bytes in the size of a list (RFC 9113, section 6.5.2).
const OVERHEAD: usize = 32;

/// The decoding half of a connection.
#[derive(Debug)]
pub struct Decoder {
    table: Table,
    /// The largest table that was announced to the peer.
    announced: usize,
    name: Vec<u8>,
    value: Vec<u8>,
}

/// What came of a block that is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// All fields are there.
    Whole,
    /// The list is larger than the limit; only the fields up to it are there. The tables agree all the same.
    Oversized,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    Indexed,
    Plain,
    Never,
}

impl Decoder {
    /// A decoder whose peer was told that the table may have this size.
    #[must_use]
    pub const fn new(table_size: usize) -> Self {
        Self { table: Table::new(table_size), announced: table_size, name: Vec::new(), value: Vec::new() }
    }

    /// Decodes a whole block, adding to `fields` at most `limit` bytes as HTTP/2 counts a list.
    ///
    /// # Errors
    /// When the block is not HPACK; the connection is then of no more use.
    pub fn decode(&mut self, block: &[u8], limit: usize, fields: &mut Fields) -> Result<Decoded, HpackError> {
        let mut at = 0;
        let mut size = 0;
        let mut resizes = 0;
        while at < block.len() {
            let first = block[at];
            if first & 0x80 != 0 {
                let index = integer::read(block, &mut at, 7)?;
                let (name, value) = table::field(&self.table, index).ok_or(HpackError::Index)?;
                size += name.len() + value.len() + OVERHEAD;
                if size <= limit {
                    fields.push(name, value);
                }
                continue;
            }
            if first & 0xe0 == 0x20 {
                let wanted = integer::read(block, &mut at, 5)?;
                // Two are what a change up and down between two blocks needs (RFC 7541, section 4.2).
                resizes += 1;
                if size > 0 || resizes > 2 || wanted > self.announced {
                    return Err(HpackError::TableSize);
                }
                self.table.resize(wanted);
                continue;
            }
            let (kept, bits) = match first & 0xf0 {
                0x00 => (Kept::Plain, 4),
                0x10 => (Kept::Never, 4),
                _ => (Kept::Indexed, 6),
            };
            let index = integer::read(block, &mut at, bits)?;
            self.name.clear();
            if index == 0 {
                string(block, &mut at, &mut self.name)?;
            } else {
                let (name, _) = table::field(&self.table, index).ok_or(HpackError::Index)?;
                self.name.extend_from_slice(name);
            }
            self.value.clear();
            string(block, &mut at, &mut self.value)?;
            size += self.name.len() + self.value.len() + OVERHEAD;
            if size <= limit {
                fields.push_field(Field { name: &self.name, value: &self.value, sensitive: kept == Kept::Never });
            }
            if kept == Kept::Indexed {
                self.table.insert(&self.name, &self.value);
            }
        }
        Ok(if size <= limit { Decoded::Whole } else { Decoded::Oversized })
    }
}

fn string(block: &[u8], at: &mut usize, out: &mut Vec<u8>) -> Result<(), HpackError> {
    let encoded = block.get(*at).ok_or(HpackError::Truncated)? & 0x80 != 0;
    let length = integer::read(block, at, 7)?;
    let bytes = block.get(*at..).and_then(|rest| rest.get(..length)).ok_or(HpackError::Truncated)?;
    *at += length;
    if encoded {
        huffman::decode(bytes, out)
    } else {
        out.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Decoded, Decoder, Fields, HpackError};

    fn unhex(text: &str) -> Vec<u8> {
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap()).collect()
    }

    fn decode(decoder: &mut Decoder, block: &str) -> Vec<(String, String)> {
        let mut fields = Fields::new();
        assert_eq!(decoder.decode(&unhex(block), 1 << 16, &mut fields), Ok(Decoded::Whole));
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        fields.iter().map(|field| (text(field.name), text(field.value))).collect()
    }

    fn is(found: &[(String, String)], expected: &[(&str, &str)]) {
        let expected: Vec<_> = expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        assert_eq!(found, expected);
    }

    /// RFC 7541, appendices C.3 and C.4: the same requests without and with Huffman code.
    #[test]
    fn requests_of_the_rfc() {
        let plain = [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ];
        let huffman = [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ];
        for blocks in [plain, huffman] {
            let mut decoder = Decoder::new(4096);
            let common = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "www.example.com")];
            is(&decode(&mut decoder, blocks[0]), &common);
            is(&decode(&mut decoder, blocks[1]), &[&common[..], &[("cache-control", "no-cache")]].concat());
            is(
                &decode(&mut decoder, blocks[2]),
                &[
                    (":method", "GET"),
                    (":scheme", "https"),
                    (":path", "/index.html"),
                    (":authority", "www.example.com"),
                    ("custom-key", "custom-value"),
                ],
            );
        }
    }

    /// RFC 7541, appendix C.6: responses over a table of 256 bytes, with evictions.
    #[test]
    fn responses_of_the_rfc() {
        let mut decoder = Decoder::new(256);
        let (date, location) = ("Mon, 21 Oct 2013 20:13:21 GMT", "https://www.example.com");
        is(
            &decode(
                &mut decoder,
                "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad \
                 1718 63c7 8f0b 97c8 e9ae 82ae 43d3",
            ),
            &[(":status", "302"), ("cache-control", "private"), ("date", date), ("location", location)],
        );
        is(
            &decode(&mut decoder, "4883 640e ffc1 c0bf"),
            &[(":status", "307"), ("cache-control", "private"), ("date", date), ("location", location)],
        );
        is(
            &decode(
                &mut decoder,
                "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 \
                 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
            ),
            &[
                (":status", "200"),
                ("cache-control", "private"),
                ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
                ("location", location),
                ("content-encoding", "gzip"),
                ("set-cookie", "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"),
            ],
        );
    }

    #[test]
    fn a_bomb_stays_small() {
        let mut decoder = Decoder::new(4096);
        let mut block = vec![0x40, 1, b'a', 0x7f, 0xff - 0x7f + 0x21, 0x1e];
        // One field of about 4,000 bytes, then named ten thousand times.
        block.truncate(3);
        block.extend([0x7f, 0xa1, 0x1e]);
        block.extend(std::iter::repeat_n(b'x', 4000));
        block.extend(std::iter::repeat_n(0xbe, 10_000));
        let mut fields = Fields::new();
        assert_eq!(decoder.decode(&block, 32 * 1024, &mut fields), Ok(Decoded::Oversized));
        assert_eq!(fields.len(), 8);
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let wrong = |block: &[u8]| Decoder::new(4096).decode(block, 1 << 16, &mut Fields::new()).unwrap_err();
        assert_eq!(wrong(&[0x80]), HpackError::Index);
        assert_eq!(wrong(&[0xbe]), HpackError::Index);
        assert_eq!(wrong(&[0x40]), HpackError::Truncated);
        assert_eq!(wrong(&[0x40, 5, b'a']), HpackError::Truncated);
        assert_eq!(wrong(&[0x3f, 0xe2, 0x1f]), HpackError::TableSize);
        assert_eq!(wrong(&[0x82, 0x20]), HpackError::TableSize);
        assert_eq!(wrong(&[0x20, 0x20, 0x20]), HpackError::TableSize);
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..5)) {
            let mut decoder = Decoder::new(4096);
            for block in blocks {
                let mut fields = Fields::new();
                if decoder.decode(&block, 1000, &mut fields).is_err() {
                    break;
                }
                let size: usize = fields.iter().map(|field| field.name.len() + field.value.len() + 32).sum();
                prop_assert!(size <= 1000);
            }
        }
    }
}
