//! The static table (RFC 7541, appendix A) and a dynamic one (section 2.3.2).

use std::collections::VecDeque;

/// What an entry counts beyond its bytes (section 4.1).
const OVERHEAD: usize = 32;

/// Names and values by index, from 1.
#[rustfmt::skip]
pub(super) const STATIC: [(&[u8], &[u8]); 61] = [
    (b":authority", b""), (b":method", b"GET"), (b":method", b"POST"), (b":path", b"/"), (b":path", b"/index.html"),
    (b":scheme", b"http"), (b":scheme", b"https"), (b":status", b"200"), (b":status", b"204"), (b":status", b"206"),
    (b":status", b"304"), (b":status", b"400"), (b":status", b"404"), (b":status", b"500"), (b"accept-charset", b""),
    (b"accept-encoding", b"gzip, deflate"), (b"accept-language", b""), (b"accept-ranges", b""), (b"accept", b""),
    (b"access-control-allow-origin", b""), (b"age", b""), (b"allow", b""), (b"authorization", b""),
    (b"cache-control", b""), (b"content-disposition", b""), (b"content-encoding", b""), (b"content-language", b""),
    (b"content-length", b""), (b"content-location", b""), (b"content-range", b""), (b"content-type", b""),
    (b"cookie", b""), (b"date", b""), (b"etag", b""), (b"expect", b""), (b"expires", b""), (b"from", b""),
    (b"host", b""), (b"if-match", b""), (b"if-modified-since", b""), (b"if-none-match", b""), (b"if-range", b""),
    (b"if-unmodified-since", b""), (b"last-modified", b""), (b"link", b""), (b"location", b""), (b"max-forwards", b""),
    (b"proxy-authenticate", b""), (b"proxy-authorization", b""), (b"range", b""), (b"referer", b""), (b"refresh", b""),
    (b"retry-after", b""), (b"server", b""), (b"set-cookie", b""), (b"strict-transport-security", b""),
    (b"transfer-encoding", b""), (b"user-agent", b""), (b"vary", b""), (b"via", b""), (b"www-authenticate", b""),
];

/// A field in a dynamic table.
#[derive(Clone, Debug)]
struct Entry {
    bytes: Box<[u8]>,
    name: usize,
}

/// The newest fields, as many as the size allows.
#[derive(Debug)]
pub(super) struct Table {
    entries: VecDeque<Entry>,
    size: usize,
    max: usize,
    /// How many entries there ever were.
    inserted: u64,
}

impl Table {
    pub(super) const fn new(max: usize) -> Self {
        Self { entries: VecDeque::new(), size: 0, max, inserted: 0 }
    }

    pub(super) fn resize(&mut self, max: usize) {
        self.max = max;
        self.evict(0);
    }

    pub(super) const fn max(&self) -> usize {
        self.max
    }

    pub(super) const fn inserted(&self) -> u64 {
        self.inserted
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether a field of so many bytes can stay at all.
    pub(super) const fn fits(&self, name: &[u8], value: &[u8]) -> bool {
        name.len() + value.len() + OVERHEAD <= self.max
    }

    /// Adds the newest; one that is larger than the table empties it (section 4.4).
    pub(super) fn insert(&mut self, name: &[u8], value: &[u8]) {
        let size = name.len() + value.len() + OVERHEAD;
        self.evict(size);
        self.inserted += 1;
        if size <= self.max {
            self.size += size;
            self.entries.push_front(Entry { bytes: [name, value].concat().into(), name: name.len() });
        }
    }

    fn evict(&mut self, wanted: usize) {
        while self.size + wanted > self.max {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= oldest.bytes.len() + OVERHEAD;
        }
    }

    /// The field with an index of the dynamic table alone, from 0, the newest first.
    pub(super) fn get(&self, index: usize) -> Option<(&[u8], &[u8])> {
        self.entries.get(index).map(|entry| entry.bytes.split_at(entry.name))
    }
}

/// The field with an index over both tables, from 1.
pub(super) fn field(dynamic: &Table, index: usize) -> Option<(&[u8], &[u8])> {
    match index {
        0 => None,
        _ if index <= STATIC.len() => Some(STATIC[index - 1]),
        _ => dynamic.get(index - STATIC.len() - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::{Table, field};

    #[test]
    fn the_oldest_leave_first() {
        let mut table = Table::new(100);
        table.insert(b"a", b"1");
        table.insert(b"b", b"2");
        assert_eq!(table.get(0), Some((&b"b"[..], &b"2"[..])));
        table.insert(b"c", b"3");
        assert_eq!((table.len(), table.get(1)), (2, Some((&b"b"[..], &b"2"[..]))));
        table.insert(b"large", &[0; 100]);
        assert_eq!(table.len(), 0);
        assert_eq!(field(&table, 61), Some((&b"www-authenticate"[..], &b""[..])));
        assert_eq!((field(&table, 0), field(&table, 62)), (None, None));
    }
}
