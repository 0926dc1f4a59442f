//! A list of header fields: one allocation for all of their bytes, kept and used again for the next list.

/// One header field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field<'f> {
    /// The name, in lower case; pseudo-header fields begin with a colon.
    pub name: &'f [u8],
    /// The value.
    pub value: &'f [u8],
    /// Whether whoever sent it forbade to keep it in a compression table (RFC 7541, section 6.2.3).
    pub sensitive: bool,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    name: usize,
    value: usize,
    end: usize,
    sensitive: bool,
}

/// Header fields in their order.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    bytes: Vec<u8>,
    spans: Vec<Span>,
}

impl Fields {
    /// No fields.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: Vec::new(), spans: Vec::new() }
    }

    /// Forgets all fields and keeps the memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.spans.clear();
    }

    /// Adds a field at the end.
    pub fn push(&mut self, name: &[u8], value: &[u8]) {
        self.push_field(Field { name, value, sensitive: false });
    }

    /// Adds a field at the end.
    pub fn push_field(&mut self, field: Field<'_>) {
        let name = self.bytes.len();
        self.bytes.extend_from_slice(field.name);
        let value = self.bytes.len();
        self.bytes.extend_from_slice(field.value);
        self.spans.push(Span { name, value, end: self.bytes.len(), sensitive: field.sensitive });
    }

    /// All fields.
    pub fn iter(&self) -> impl Iterator<Item = Field<'_>> {
        self.spans.iter().map(|span| Field {
            name: &self.bytes[span.name..span.value],
            value: &self.bytes[span.value..span.end],
            sensitive: span.sensitive,
        })
    }

    /// The value of the first field of this name.
    #[must_use]
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.iter().find(|field| field.name == name).map(|field| field.value)
    }

    /// How many fields there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }
}

impl<'f> FromIterator<(&'f [u8], &'f [u8])> for Fields {
    fn from_iter<I: IntoIterator<Item = (&'f [u8], &'f [u8])>>(fields: I) -> Self {
        let mut list = Self::new();
        for (name, value) in fields {
            list.push(name, value);
        }
        list
    }
}
