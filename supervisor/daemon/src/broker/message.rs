//! Follows gRPC's message boundaries in a stream of bytes that it neither keeps nor copies.
//!
//! The framing is that of "gRPC over HTTP/2": a flag byte, a four-byte big-endian length, the message. Messages
//! themselves are not looked at.

const PREFIX: usize = 5;

/// One direction of one call.
#[derive(Debug)]
pub(super) struct Messages {
    limit: u32,
    prefix: [u8; PREFIX],
    filled: usize,
    left: u32,
}

/// What is wrong with the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Breach {
    /// A message announces more bytes than allowed.
    TooLarge {
        /// The announced size.
        size: u32,
    },
    /// A message's first byte is neither 0 nor 1.
    Flag(u8),
}

impl Messages {
    pub(super) const fn new(limit: u32) -> Self {
        Self { limit, prefix: [0; PREFIX], filled: 0, left: 0 }
    }

    /// Follows `chunk`. On a breach, also returns how many bytes of it come before the message at fault.
    pub(super) fn follow(&mut self, chunk: &[u8]) -> Result<(), (usize, Breach)> {
        let mut rest = chunk;
        loop {
            if self.left > 0 {
                // A chunk is shorter than 4 GiB: h2 frames have 24-bit lengths.
                let skip = rest.len().min(self.left as usize);
                rest = &rest[skip..];
                self.left -= u32::try_from(skip).unwrap_or(self.left);
            }
            if rest.is_empty() {
                return Ok(());
            }
            let begun = self.filled;
            let good = chunk.len() - rest.len();
            let take = rest.len().min(PREFIX - begun);
            self.prefix[begun..begun + take].copy_from_slice(&rest[..take]);
            self.filled += take;
            rest = &rest[take..];
            if self.prefix[0] > 1 {
                return Err((good, Breach::Flag(self.prefix[0])));
            }
            if self.filled == PREFIX {
                let [_, a, b, c, d] = self.prefix;
                let size = u32::from_be_bytes([a, b, c, d]);
                if size > self.limit {
                    return Err((good, Breach::TooLarge { size }));
                }
                self.left = size;
                self.filled = 0;
            }
        }
    }

    /// Whether the bytes so far end with a whole message.
    pub(super) const fn at_boundary(&self) -> bool {
        self.filled == 0 && self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Breach, Messages};

    fn message(size: usize) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend(u32::try_from(size).unwrap().to_be_bytes());
        bytes.extend(std::iter::repeat_n(0xff, size));
        bytes
    }

    #[test]
    fn a_message_over_the_limit_is_found_by_its_prefix() {
        let mut messages = Messages::new(10);
        let mut bytes = message(10);
        bytes.extend(message(11));
        assert_eq!(messages.follow(&bytes[..19]), Ok(()));
        assert!(!messages.at_boundary());
        assert_eq!(messages.follow(&bytes[19..]), Err((0, Breach::TooLarge { size: 11 })));
    }

    #[test]
    fn a_wrong_flag_is_found_at_its_first_byte() {
        let mut bytes = message(3);
        bytes.push(b'H');
        assert_eq!(Messages::new(10).follow(&bytes), Err((8, Breach::Flag(b'H'))));
    }

    proptest! {
        /// However the bytes are cut, boundaries are found where they are and the message at fault is the first one.
        #[test]
        fn cuts_do_not_matter(sizes in prop::collection::vec(0usize..40, 0..12), cuts in prop::collection::vec(1usize..30, 1..40)) {
            const LIMIT: u32 = 30;
            let bytes: Vec<u8> = sizes.iter().flat_map(|size| message(*size)).collect();
            let first_bad = sizes.iter().position(|size| *size > LIMIT as usize);
            let mut messages = Messages::new(LIMIT);
            let mut at = 0;
            let mut cut = cuts.iter().cycle();
            let mut breach = None;
            while at < bytes.len() && breach.is_none() {
                let end = (at + cut.next().unwrap()).min(bytes.len());
                if let Err((good, why)) = messages.follow(&bytes[at..end]) {
                    breach = Some((at + good, why));
                }
                at = end;
            }
            match first_bad {
                None => {
                    prop_assert_eq!(breach, None);
                    prop_assert!(messages.at_boundary());
                }
                Some(index) => {
                    let start: usize = sizes[..index].iter().map(|size| size + 5).sum();
                    let (good, why) = breach.unwrap();
                    prop_assert!(good >= start && good < start + 5);
                    prop_assert_eq!(why, Breach::TooLarge { size: u32::try_from(sizes[index]).unwrap() });
                }
            }
        }
    }
}
