//! JSON as strangers write it: read once, within bounds, with nothing silently lost.
//!
//! RFC 8259 leaves duplicate keys and large numbers to the reader. Two readers that differ there would sign one document
//! and run another, so this module takes I-JSON only (RFC 7493): a key stands once, an integer fits a double exactly.
//! It does not know what the document means.

use std::{cell::RefCell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::{ManifestLimits, problem::Findings};

/// The largest integer that every JSON reader keeps exact: 2^53 - 1 (RFC 7493, section 2.2).
pub(crate) const MAX_INTEGER: u64 = (1 << 53) - 1;

/// A place in the document, as a chain of borrowed steps.
#[derive(Clone, Copy, Debug)]
pub(crate) enum At<'a> {
    Root,
    Key(&'a At<'a>, &'a str),
    Index(&'a At<'a>, usize),
}

impl fmt::Display for At<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
            Self::Key(parent, key) => {
                let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
                if key.is_empty() || key.len() > 64 || !key.bytes().all(plain) {
                    return write!(f, "{parent}[{}]", Excerpt(key));
                }
                match parent {
                    Self::Root => f.write_str(key),
                    Self::Key(..) | Self::Index(..) => write!(f, "{parent}.{key}"),
                }
            }
        }
    }
}

/// A stranger's text in a message: quoted, escaped, cut at 64 characters.
pub(crate) struct Excerpt<'a>(pub(crate) &'a str);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cut: String = self.0.chars().take(64).collect();
        let dots = if cut.len() < self.0.len() { "…" } else { "" };
        write!(f, "{cut:?}{dots}")
    }
}

/// Reads a document. `None` when it cannot be read to its end; the reason is among the findings.
pub(crate) fn read(bytes: &[u8], limits: &ManifestLimits, findings: &mut Findings) -> Option<Value> {
    if bytes.len() > limits.bytes {
        let message = format!("the document has {} bytes, the limit is {}", bytes.len(), limits.bytes);
        findings.add(At::Root, message, None);
        return None;
    }
    if bytes.starts_with(b"\xef\xbb\xbf") {
        let suggestion = "save it as UTF-8 without a byte order mark".to_owned();
        findings.add(At::Root, "the document begins with a byte order mark", Some(suggestion));
        return None;
    }
    let state = RefCell::new(State { limits, findings, values: 0 });
    let seed = Seed { at: At::Root, depth: 0, state: &state };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let read = seed.deserialize(&mut deserializer).and_then(|value| deserializer.end().map(|()| value));
    match read {
        Ok(value) => Some(value),
        Err(error) => {
            findings.add(At::Root, format!("the document cannot be read: {error}"), None);
            None
        }
    }
}

struct State<'a> {
    limits: &'a ManifestLimits,
    findings: &'a mut Findings,
    values: usize,
}

#[derive(Clone, Copy)]
struct Seed<'a, 'b> {
    at: At<'a>,
    depth: usize,
    state: &'a RefCell<State<'b>>,
}

impl Seed<'_, '_> {
    fn enter<E: Error>(&self) -> Result<(), E> {
        let mut state = self.state.borrow_mut();
        state.values += 1;
        if state.values > state.limits.values {
            return Err(E::custom(format_args!("it has more than {} values", state.limits.values)));
        }
        Ok(())
    }

    fn nest<E: Error>(&self) -> Result<(), E> {
        let most = self.state.borrow().limits.depth.min(100);
        if self.depth >= most {
            return Err(E::custom(format_args!("it nests deeper than {most} levels")));
        }
        Ok(())
    }

    fn find(&self, message: String, suggestion: Option<String>) {
        self.state.borrow_mut().findings.add(self.at, message, suggestion);
    }

    fn check_text(&self, what: &str, text: &str) {
        let most = self.state.borrow().limits.text;
        if text.len() > most {
            self.find(format!("the {what} has {} bytes, the limit is {most}", text.len()), None);
        }
    }

    fn check_items(&self, items: usize) {
        let most = self.state.borrow().limits.items;
        if items == most.saturating_add(1) {
            self.find(format!("more than {most} entries"), None);
        }
    }

    fn beyond(&self, number: &dyn fmt::Display) {
        let message = format!("{number} is beyond ±{MAX_INTEGER}, where JSON readers disagree");
        self.find(message, Some("write a smaller number, or a text".to_owned()));
    }

    fn integer(&self, magnitude: u64, number: Number) -> Value {
        if magnitude > MAX_INTEGER {
            self.beyond(&number);
        }
        Value::Number(number)
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_, '_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.enter()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_, '_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(self.integer(value, value.into()))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(self.integer(value.unsigned_abs(), value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        // From 1e21 on RFC 8785 writes an exponent; below, a whole number looks like any other integer.
        if value.fract() == 0.0 && (9_007_199_254_740_992.0..1e21).contains(&value.abs()) {
            self.beyond(&value);
        }
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("a number is not finite"))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        self.check_text("text", text);
        Ok(Value::String(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        self.nest()?;
        let mut values = Vec::new();
        loop {
            let at = At::Index(&self.at, values.len());
            let seed = Seed { at, depth: self.depth + 1, state: self.state };
            let Some(value) = list.next_element_seed(seed)? else { break };
            values.push(value);
            self.check_items(values.len());
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.nest()?;
        let mut values = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            let seed = Seed { at: At::Key(&self.at, &key), depth: self.depth + 1, state: self.state };
            seed.check_text("key", &key);
            let value = map.next_value_seed(seed)?;
            if values.contains_key(&key) {
                seed.find("the key stands more than once".to_owned(), Some("keep one of them".to_owned()));
                continue;
            }
            values.insert(key, value);
            self.check_items(values.len());
        }
        Ok(Value::Object(values))
    }
}
