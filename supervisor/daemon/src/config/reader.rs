//! Reads one table key by key, so that one bad key hides no other.

use std::{collections::BTreeMap, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, Visitor, value::Error as NoValue},
    forward_to_deserialize_any,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue, ValueDeserializer},
};

use super::problem::{Problems, nearest};

/// A table that was read: its value and where each key stands.
pub(super) struct Section<T> {
    pub(super) value: T,
    /// The table's name, such as `plugin.gallery.limits`.
    pub(super) path: String,
    spans: BTreeMap<String, Range<usize>>,
    whole: Range<usize>,
}

impl<T> Section<T> {
    /// Where the key's value stands, or the table when the key is absent.
    pub(super) fn at(&self, key: &str) -> &Range<usize> {
        self.spans.get(key).unwrap_or(&self.whole)
    }

    /// The key's full name.
    pub(super) fn key(&self, key: &str) -> String {
        join(&self.path, key)
    }
}

pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Reads a table into `T`, a struct of optional fields; keys that are unknown or have the wrong type become problems.
pub(super) fn section<T: DeserializeOwned + Default>(
    path: &str,
    value: Spanned<DeValue<'_>>,
    problems: &mut Problems<'_>,
) -> Section<T> {
    let whole = value.span();
    let empty = |whole| Section { value: T::default(), path: path.to_owned(), spans: BTreeMap::new(), whole };
    let Some(table) = into_table(path, value, problems) else { return empty(whole) };
    let known = field_names::<T>();
    let mut good = DeTable::new();
    let mut spans = BTreeMap::new();
    for (key, value) in table {
        let name = key.get_ref().to_string();
        if !known.contains(&name.as_str()) {
            let nearest = nearest(&name, known.iter().copied());
            let hint = if nearest.is_none() { format!("; known are {}", known.join(", ")) } else { String::new() };
            problems.suggest(&key.span(), join(path, &name), format!("unknown key{hint}"), nearest);
            continue;
        }
        let span = value.span();
        let mut alone = DeTable::new();
        alone.insert(key.clone(), value.clone());
        match T::deserialize(ValueDeserializer::from(Spanned::new(span.clone(), DeValue::Table(alone)))) {
            Ok(_) => {
                good.insert(key, value);
                spans.insert(name, span);
            }
            Err(error) => problems.add(&error.span().unwrap_or(span), join(path, &name), error.message()),
        }
    }
    match T::deserialize(ValueDeserializer::from(Spanned::new(whole.clone(), DeValue::Table(good)))) {
        Ok(value) => Section { value, path: path.to_owned(), spans, whole },
        Err(error) => {
            problems.add(&whole, path, error.message());
            empty(whole)
        }
    }
}

/// The value as a table, or a problem.
pub(super) fn into_table<'i>(
    path: &str,
    value: Spanned<DeValue<'i>>,
    problems: &mut Problems<'_>,
) -> Option<DeTable<'i>> {
    let span = value.span();
    match value.into_inner() {
        DeValue::Table(table) => Some(table),
        other => {
            problems.add(&span, path, format!("must be a table, not {}", other.type_str()));
            None
        }
    }
}

/// The names of a struct's fields, as serde sees them: one list, which cannot drift from the struct.
fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
    struct Probe<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Probe<'_> {
        type Error = NoValue;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, NoValue> {
            Err(NoValue::custom("only a struct has field names"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            _: V,
        ) -> Result<V::Value, NoValue> {
            *self.0 = fields;
            Err(NoValue::custom("the names are enough"))
        }

        forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    let _ = <T as Deserialize>::deserialize(Probe(&mut names));
    names
}
