//! Integers with a prefix (RFC 7541, section 5.1).

use super::HpackError;

/// Nothing in a header block is as large as this.
const MAX: usize = 1 << 28;

/// Reads an integer whose first byte has a prefix of `bits` bits, and moves `at` behind it.
pub(super) fn read(block: &[u8], at: &mut usize, bits: u32) -> Result<usize, HpackError> {
    let first = usize::from(*block.get(*at).ok_or(HpackError::Truncated)?);
    *at += 1;
    let full = (1 << bits) - 1;
    let mut value = first & full;
    if value < full {
        return Ok(value);
    }
    // Four continuation bytes reach 2²⁸, so this ends however long the padding with zeros is.
    for shift in [0, 7, 14, 21] {
        let byte = usize::from(*block.get(*at).ok_or(HpackError::Truncated)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if value > MAX {
            return Err(HpackError::Integer);
        }
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(HpackError::Integer)
}

/// Writes an integer behind the `flags` above its prefix.
pub(super) fn write(block: &mut Vec<u8>, flags: u8, bits: u32, value: usize) {
    let full = (1_usize << bits) - 1;
    if value < full {
        block.push(flags | low(value));
        return;
    }
    block.push(flags | low(full));
    let mut rest = value - full;
    while rest >= 0x80 {
        block.push(0x80 | low(rest & 0x7f));
        rest >>= 7;
    }
    block.push(low(rest));
}

fn low(value: usize) -> u8 {
    // Callers have cut the value to a byte.
    u8::try_from(value).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{HpackError, MAX, read, write};

    #[test]
    fn the_examples_of_the_rfc() {
        for (value, bits, bytes) in [(10, 5, &[0b01010][..]), (1337, 5, &[0b11111, 154, 10]), (42, 8, &[42])] {
            let mut block = Vec::new();
            write(&mut block, 0, bits, value);
            assert_eq!(block, bytes);
            assert_eq!(read(bytes, &mut 0, bits), Ok(value));
        }
    }

    #[test]
    fn without_bound_is_refused() {
        assert_eq!(read(&[0x1f, 0x80, 0x80, 0x80, 0x80, 0x80, 0], &mut 0, 5), Err(HpackError::Integer));
        assert_eq!(read(&[0x1f, 0xff, 0xff, 0xff, 0xff], &mut 0, 5), Err(HpackError::Integer));
        assert_eq!(read(&[0x1f, 0x80], &mut 0, 5), Err(HpackError::Truncated));
        assert_eq!(read(&[], &mut 0, 5), Err(HpackError::Truncated));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(value in 0..=MAX / 2, bits in 4_u32..=8) {
            let mut block = Vec::new();
            write(&mut block, 0, bits, value);
            let mut at = 0;
            prop_assert_eq!(read(&block, &mut at, bits), Ok(value));
            prop_assert_eq!(at, block.len());
        }
    }
}
