//! Bytes become lines of bounded length. Nothing here knows whose they are.

/// Cuts a stream of bytes into lines of bounded length.
pub(super) struct Lines {
    partial: Vec<u8>,
    most: usize,
}

impl Lines {
    pub(super) fn new(most: usize) -> Self {
        Self { partial: Vec::new(), most }
    }

    pub(super) fn feed(&mut self, mut bytes: &[u8], keep: &mut impl FnMut(&[u8], bool)) {
        while let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
            self.take(&bytes[..end], keep);
            let line = std::mem::take(&mut self.partial);
            keep(line.strip_suffix(b"\r").unwrap_or(&line), false);
            bytes = &bytes[end + 1..];
        }
        self.take(bytes, keep);
    }

    fn take(&mut self, mut part: &[u8], keep: &mut impl FnMut(&[u8], bool)) {
        loop {
            let room = self.most - self.partial.len();
            if part.len() <= room {
                self.partial.extend_from_slice(part);
                return;
            }
            self.partial.extend_from_slice(&part[..room]);
            part = &part[room..];
            // A piece ends between characters, so that none is shown as two broken halves.
            let end = character_end(&self.partial);
            let rest = self.partial.split_off(end);
            keep(&std::mem::replace(&mut self.partial, rest), true);
        }
    }

    pub(super) fn finish(&mut self, keep: &mut impl FnMut(&[u8], bool)) {
        if !self.partial.is_empty() {
            keep(&std::mem::take(&mut self.partial), false);
        }
    }
}

/// Where the last whole UTF-8 character ends; the end of the bytes when they are no UTF-8 there.
fn character_end(bytes: &[u8]) -> usize {
    // A character has at most four bytes; the first of several is 11xxxxxx, the others are 10xxxxxx.
    let from = bytes.len().saturating_sub(4);
    let start = bytes[from..].iter().rposition(|byte| byte & 0b1100_0000 != 0b1000_0000).map(|at| from + at);
    let Some(start) = start.filter(|start| *start > 0) else { return bytes.len() };
    let length = match bytes[start] {
        0b1100_0000..=0b1101_1111 => 2,
        0b1110_0000..=0b1110_1111 => 3,
        0b1111_0000..=0b1111_0111 => 4,
        _ => 1,
    };
    if start + length > bytes.len() { start } else { bytes.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(most: usize, parts: &[&[u8]]) -> Vec<(String, bool)> {
        let mut found = Vec::new();
        let mut keep = |line: &[u8], continues| found.push((String::from_utf8_lossy(line).into_owned(), continues));
        let mut lines = Lines::new(most);
        for part in parts {
            lines.feed(part, &mut keep);
        }
        lines.finish(&mut keep);
        found
    }

    #[test]
    fn lines_end_where_they_end_and_long_ones_are_split() {
        let line = |text: &str| (text.to_owned(), false);
        let cut = |text: &str| (text.to_owned(), true);
        assert_eq!(lines(8, &[b"a\nb", b"c\r\n\nlast"]), [line("a"), line("bc"), line(""), line("last")]);
        assert_eq!(lines(4, &[b"12345", b"678\nnext\n"]), [cut("1234"), line("5678"), line("next")]);
        assert_eq!(lines(4, &[b"1234567890"]), [cut("1234"), cut("5678"), line("90")]);
        assert_eq!(lines(4, &["123ä5\n".as_bytes()]), [cut("123"), line("ä5")]);
        assert_eq!(lines(4, &[b"\xff\xbf\xbf\xbf\xbf\xbf\n"]).len(), 2, "what is no UTF-8 is split all the same");
        assert_eq!(lines(4, &[b"1234\n1234", b"\n"]), [line("1234"), line("1234")]);
        assert_eq!(lines(4, &[b"12", b"3456", b"78\n", b"\xff\n"]), [cut("1234"), line("5678"), line("\u{fffd}")]);
    }
}
