//! Reads one table key by key.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use plugvisor_package::nearest;
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, Error as _, Visitor, value::Error as NoValue},
    forward_to_deserialize_any,
};
use toml::{
    Spanned,
    de::{DeTable, DeValue, ValueDeserializer},
};

use super::Problems;

/// A table of a file: a struct of optional fields.
pub trait Table: DeserializeOwned + Default {
    /// What a key takes, in words and with an example, such as `a number of bytes, such as 67108864`; empty for a key whose
    /// value is read by itself.
    fn takes(key: &str) -> &'static str;
}

/// A table that was read: its value and where each key stands.
#[derive(Debug)]
pub struct Section<T> {
    /// Every key that could be read.
    pub value: T,
    /// The table's name, such as `plugin.gallery.limits`.
    pub path: String,
    spans: BTreeMap<String, Range<usize>>,
    /// Keys that are written and could not be read.
    wrong: BTreeSet<String>,
    whole: Range<usize>,
    is_table: bool,
}

impl<T> Section<T> {
    /// Where the key's value stands, or the table when the key is absent.
    #[must_use]
    pub fn at(&self, key: &str) -> &Range<usize> {
        self.spans.get(key).unwrap_or(&self.whole)
    }

    /// The key's full name.
    #[must_use]
    pub fn key(&self, key: &str) -> String {
        join(&self.path, key)
    }

    /// Whether nobody wrote the key. One that was written wrongly is a problem already.
    #[must_use]
    pub fn lacks(&self, key: &str) -> bool {
        self.is_table && !self.spans.contains_key(key) && !self.wrong.contains(key)
    }
}

/// The full name of a key in a table of this name.
#[must_use]
pub fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Reads a table into `T`; keys that are unknown or have the wrong type become problems.
pub fn section<T: Table>(path: &str, value: Spanned<DeValue<'_>>, problems: &mut Problems<'_>) -> Section<T> {
    let whole = value.span();
    let mut read = Section {
        value: T::default(),
        path: path.to_owned(),
        spans: BTreeMap::new(),
        wrong: BTreeSet::new(),
        whole: whole.clone(),
        is_table: matches!(value.get_ref(), DeValue::Table(_)),
    };
    let Some(table) = into_table(path, value, problems) else { return read };
    let known = field_names::<T>();
    let mut good = DeTable::new();
    for (key, value) in table {
        let name = key.get_ref().to_string();
        if !known.contains(&name.as_str()) {
            let nearest = nearest(&name, known.iter().copied()).map(str::to_owned);
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
                read.spans.insert(name, span);
            }
            Err(error) => {
                let message = format!("is {}; it takes {}", found(value.get_ref()), T::takes(&name));
                problems.add(&error.span().unwrap_or(span), join(path, &name), message);
                read.wrong.insert(name);
            }
        }
    }
    match T::deserialize(ValueDeserializer::from(Spanned::new(whole.clone(), DeValue::Table(good)))) {
        Ok(value) => read.value = value,
        Err(error) => problems.add(&whole, path, error.message()),
    }
    read
}

/// The value as a table, or a problem.
pub fn into_table<'i>(path: &str, value: Spanned<DeValue<'i>>, problems: &mut Problems<'_>) -> Option<DeTable<'i>> {
    let span = value.span();
    match value.into_inner() {
        DeValue::Table(table) => Some(table),
        other => {
            problems.add(&span, path, format!("must be a table, not {}", found(&other)));
            None
        }
    }
}

/// A value in words. Of a list or a table, what in it is no text, since most of them take texts.
fn found(value: &DeValue<'_>) -> String {
    let text = |value: &DeValue<'_>| matches!(value, DeValue::String(_));
    match value {
        DeValue::String(text) => {
            let shown: String = text.chars().take(64).collect();
            format!("the text {shown:?}")
        }
        DeValue::Integer(number) => format!("the number {number}"),
        DeValue::Float(number) => format!("the number {number}"),
        DeValue::Boolean(truth) => truth.to_string(),
        DeValue::Datetime(time) => format!("the time {time}"),
        DeValue::Array(items) => match items.iter().find(|item| !text(item.get_ref())) {
            Some(other) => format!("a list with {} in it", found(other.get_ref())),
            None => "a list".to_owned(),
        },
        DeValue::Table(table) => match table.iter().find(|(_, value)| !text(value.get_ref())) {
            Some((key, other)) => format!("a table in which {} is {}", key.get_ref(), found(other.get_ref())),
            None => "a table".to_owned(),
        },
    }
}

/// The names of a struct's fields, as serde sees them: one list, which cannot drift from the struct.
#[must_use]
pub fn field_names<T: DeserializeOwned>() -> &'static [&'static str] {
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

/// The keys of which [`Table::takes`] says nothing, without those of `tables`, which are read by themselves. A file's own
/// test wants none.
#[must_use]
pub fn silent_keys<T: Table>(tables: &[&str]) -> Vec<&'static str> {
    let names = field_names::<T>().iter().copied();
    names.filter(|name| T::takes(name).is_empty() && !tables.contains(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default, Deserialize)]
    #[serde(default, deny_unknown_fields)]
    struct Door {
        port: Option<u16>,
        open: Option<bool>,
        names: Option<Vec<String>>,
    }

    impl Table for Door {
        fn takes(key: &str) -> &'static str {
            match key {
                "port" => "a number from 1 to 65535",
                "open" => "true or false",
                "names" => "a list of texts",
                _ => "",
            }
        }
    }

    fn read(text: &str) -> (Section<Door>, Vec<String>) {
        let document = DeTable::parse(text).expect("it is TOML");
        let (span, table) = (document.span(), document.into_inner());
        let mut problems = Problems::new(text);
        let door = section("door", Spanned::new(span, DeValue::Table(table)), &mut problems);
        (door, problems.into_sorted().iter().map(ToString::to_string).collect())
    }

    #[test]
    fn what_a_key_takes_is_said_in_words_and_once() {
        for (text, expected) in [
            ("port = \"8080\"", "line 1: door.port: is the text \"8080\"; it takes a number from 1 to 65535"),
            ("port = 99999", "line 1: door.port: is the number 99999; it takes a number from 1 to 65535"),
            ("port = -1", "line 1: door.port: is the number -1; it takes a number from 1 to 65535"),
            ("open = 1.5", "line 1: door.open: is the number 1.5; it takes true or false"),
            ("names = \"a\"", "line 1: door.names: is the text \"a\"; it takes a list of texts"),
            ("names = [\"a\", 5]", "line 1: door.names: is a list with the number 5 in it; it takes a list of texts"),
            ("names = {}", "line 1: door.names: is a table; it takes a list of texts"),
            ("port = 2027-01-31", "line 1: door.port: is the time 2027-01-31; it takes a number from 1 to 65535"),
            ("opne = true", "line 1: door.opne: unknown key; did you mean \"open\"?"),
        ] {
            assert_eq!(read(text).1, [expected], "{text}");
        }
    }

    #[test]
    fn a_key_that_is_wrong_is_not_missing_and_hides_no_other() {
        let (door, problems) = read("port = \"8080\"\nopen = true\n");
        assert!(problems.len() == 1 && door.value.open == Some(true) && door.value.port.is_none());
        assert!(!door.lacks("port") && !door.lacks("open") && door.lacks("names"));
    }
}
