//! Bytes on their way to a socket.
//!
//! Frames are written one after another into one buffer. A large piece of a body is not copied into it: it stays where
//! it was read to, and only its place is noted, until the next flush. What a flush leaves is copied, because the read
//! buffer is used again.

use std::{io::IoSlice, ops::Range};

/// Smaller pieces are copied: a slice of its own costs the kernel more.
const LARGE: usize = 2048;
/// Slices that one write takes (`UIO_MAXIOV` is 1024).
const SLICES: usize = 64;
/// A buffer that grew beyond this is given back when it is empty.
const KEEP: usize = 64 * 1024;

/// A piece of the read buffer, between two bytes of the own buffer.
#[derive(Clone, Debug)]
struct Cut {
    at: usize,
    piece: Range<usize>,
}

/// What waits to be written.
#[derive(Debug, Default)]
pub struct Outbox {
    bytes: Vec<u8>,
    /// Bytes at the beginning that are written already.
    sent: usize,
    cuts: Vec<Cut>,
    /// Bytes in `cuts`.
    away: usize,
}

impl Outbox {
    /// How many bytes wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len() - self.sent + self.away
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether all of it can be written without a read buffer.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.cuts.is_empty()
    }

    /// The buffer, to write a frame to its end.
    pub(super) const fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Adds a piece of `read`, which must be the buffer that the next flush is given.
    pub(super) fn piece(&mut self, read: &[u8], piece: Range<usize>) {
        if piece.len() < LARGE {
            self.bytes.extend_from_slice(&read[piece]);
        } else {
            self.away += piece.len();
            self.cuts.push(Cut { at: self.bytes.len(), piece });
        }
    }

    /// Writes as much as `write` takes, and keeps the rest without `read`.
    ///
    /// # Errors
    /// What `write` says; what it did not take stays.
    pub fn flush<E>(
        &mut self,
        read: &[u8],
        mut write: impl FnMut(&[IoSlice<'_>]) -> Result<usize, E>,
    ) -> Result<(), E> {
        let mut result = Ok(());
        while !self.is_empty() {
            let mut slices: [IoSlice<'_>; SLICES] = [IoSlice::new(&[]); SLICES];
            let (count, offered) = self.slices(read, &mut slices);
            match write(&slices[..count]) {
                Ok(taken) => {
                    self.advance(taken);
                    if taken < offered {
                        break;
                    }
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.keep(read);
        result
    }

    fn slices<'s>(&'s self, read: &'s [u8], slices: &mut [IoSlice<'s>; SLICES]) -> (usize, usize) {
        let mut count = 0;
        let mut offered = 0;
        let mut from = self.sent;
        let mut add = |bytes: &'s [u8]| {
            if !bytes.is_empty() && count < SLICES {
                slices[count] = IoSlice::new(bytes);
                count += 1;
                offered += bytes.len();
            }
        };
        // Two slices for each cut, and one behind them.
        for cut in self.cuts.iter().take(SLICES / 2) {
            add(&self.bytes[from..cut.at]);
            add(&read[cut.piece.clone()]);
            from = cut.at;
        }
        if self.cuts.len() < SLICES / 2 {
            add(&self.bytes[from..]);
        }
        (count, offered)
    }

    fn advance(&mut self, mut taken: usize) {
        let mut done = 0;
        for cut in &mut self.cuts {
            let before = (cut.at - self.sent).min(taken);
            self.sent += before;
            taken -= before;
            if self.sent < cut.at {
                break;
            }
            let inside = cut.piece.len().min(taken);
            cut.piece.start += inside;
            self.away -= inside;
            taken -= inside;
            if !cut.piece.is_empty() {
                break;
            }
            done += 1;
        }
        self.cuts.drain(..done);
        if self.cuts.is_empty() {
            self.sent += taken;
        }
    }

    /// Takes the pieces in, and gives memory back.
    fn keep(&mut self, read: &[u8]) {
        if self.is_empty() {
            self.bytes.clear();
            self.sent = 0;
            self.cuts.clear();
            if self.bytes.capacity() > KEEP {
                self.bytes = Vec::new();
            }
            return;
        }
        if self.cuts.is_empty() {
            // Shift only when most of it is written, so that each byte moves at most a few times.
            if self.sent > self.bytes.len() / 2 {
                self.bytes.drain(..self.sent);
                self.sent = 0;
            }
            return;
        }
        let mut whole = Vec::with_capacity(self.len());
        let mut from = self.sent;
        for cut in self.cuts.drain(..) {
            whole.extend_from_slice(&self.bytes[from..cut.at]);
            whole.extend_from_slice(&read[cut.piece]);
            from = cut.at;
        }
        whole.extend_from_slice(&self.bytes[from..]);
        self.bytes = whole;
        self.sent = 0;
        self.away = 0;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{LARGE, Outbox};

    proptest! {
        /// However pieces come and however much each write takes, the bytes arrive whole and in order.
        #[test]
        fn nothing_is_lost(
            rounds in prop::collection::vec(
                (prop::collection::vec((any::<bool>(), 0..2 * LARGE), 0..90), prop::collection::vec(0..20_000_usize, 0..4)),
                1..8),
        ) {
            let mut outbox = Outbox::default();
            let (mut expected, mut written) = (Vec::new(), Vec::new());
            let mut seed = 0_u8;
            for (parts, takes) in rounds {
                let mut read = Vec::new();
                for (own, size) in parts {
                    seed = seed.wrapping_add(1);
                    let part = vec![seed; size];
                    expected.extend_from_slice(&part);
                    if own {
                        outbox.buffer().extend_from_slice(&part);
                    } else {
                        let from = read.len();
                        read.extend_from_slice(&part);
                        // The whole buffer is not there yet, but its place in it is.
                        outbox.piece(&read, from..from + size);
                    }
                }
                let mut takes = takes.into_iter();
                let flushed = outbox.flush(&read, |slices| {
                    let mut room = takes.next().ok_or(())?;
                    let mut taken = 0;
                    for slice in slices {
                        let part = slice.len().min(room);
                        written.extend_from_slice(&slice[..part]);
                        room -= part;
                        taken += part;
                    }
                    Ok::<_, ()>(taken)
                });
                prop_assert!(flushed.is_ok() || !outbox.is_empty());
                prop_assert_eq!(written.len() + outbox.len(), expected.len());
            }
            while !outbox.is_empty() {
                outbox.flush(&[], |slices| {
                    let before = written.len();
                    slices.iter().for_each(|slice| written.extend_from_slice(slice));
                    Ok::<_, ()>(written.len() - before)
                }).unwrap();
            }
            prop_assert!(written == expected);
        }
    }
}
