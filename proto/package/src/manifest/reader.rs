//! How JSON values become typed fields: every wrong type, word and key is found, not only the first.
//!
//! serde's derived readers stop at the first error; this small walk goes on. It also gives each field its class, so that
//! one table says what is read, what the schema publishes, what the documentation lists and what is inactive.
//! It does not know the manifest's fields.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde_json::{Map, Value};

use crate::{
    json::{At, Excerpt, MAX_INTEGER},
    problem::{Findings, did_you_mean},
};

/// What this version does with a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// It has its effect.
    Active,
    /// It is accepted and shown, and has no effect yet.
    Inactive,
    /// It is a security field without its mechanism: a plugin that sets it is not loaded.
    Refused,
    /// It only holds other fields.
    Group,
}

/// One field of an object.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    /// Its key.
    pub key: &'static str,
    /// What this version does with it.
    pub class: Class,
    /// Whether the object around it is wrong without it.
    pub required: bool,
    /// The lines of its description.
    pub doc: &'static [&'static str],
    /// What it holds.
    pub kind: Kind,
}

impl Field {
    /// Its description as one text.
    #[must_use]
    pub fn description(&self) -> String {
        join_doc(self.doc)
    }
}

pub(crate) fn join_doc(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

/// What a field holds.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `true` or `false`.
    Switch,
    /// A text: what it is, and its regular expression (ECMA 262), empty for any.
    Text(&'static str, &'static str),
    /// One of these words.
    Word(&'static [&'static str]),
    /// A whole number within these bounds.
    Whole(i64, i64),
    /// A list whose entries differ.
    List(&'static Kind),
    /// A list of texts that may repeat.
    Sequence,
    /// An object of environment variables.
    Variables,
    /// Any object.
    Json,
    /// An object with these fields.
    Object(&'static [Field]),
}

/// What is gathered while reading.
#[derive(Debug)]
pub(crate) struct Notes {
    pub(crate) findings: Findings,
    pub(crate) inactive: Vec<String>,
}

/// A type that a JSON value can be read into. `None` means that a finding was added.
pub(crate) trait Read: Sized {
    const KIND: Kind;

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self>;
}

fn wrong_type(expected: &str, value: &Value, at: At<'_>, notes: &mut Notes) {
    let found = match value {
        Value::Null => "null".to_owned(),
        Value::Bool(value) => format!("{value}"),
        Value::Number(number) => format!("the number {number}"),
        Value::String(text) => format!("the text {}", Excerpt(text)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    };
    let suggestion = match value {
        Value::Null if !matches!(at, At::Root) => Some("leave it out".to_owned()),
        Value::String(text) if expected == "true or false" && matches!(text.as_str(), "true" | "false") => {
            Some(format!("write {text} without quotes"))
        }
        Value::String(text) if expected.starts_with("a whole number") && text.parse::<u64>().is_ok() => {
            Some(format!("write {text} without quotes"))
        }
        Value::Number(number) if expected == "a text" => Some(format!("write \"{number}\"")),
        Value::String(text) if expected == "a list" => Some(format!("write [{}]", Excerpt(text))),
        _ => None,
    };
    notes.findings.add(at, format!("expected {expected}, found {found}"), suggestion);
}

pub(crate) fn text<'v>(value: &'v Value, at: At<'_>, notes: &mut Notes) -> Option<&'v str> {
    let text = value.as_str();
    if text.is_none() {
        wrong_type("a text", value, at, notes);
    }
    text
}

/// Reads a text with a grammar.
pub(crate) fn parsed<T: FromStr<Err: fmt::Display>>(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<T> {
    match text(value, at, notes)?.parse() {
        Ok(value) => Some(value),
        Err(error) => {
            notes.findings.add(at, error.to_string(), None);
            None
        }
    }
}

/// Reads one of a few words.
pub(crate) fn word<T: Copy>(known: &[(&'static str, T)], value: &Value, at: At<'_>, notes: &mut Notes) -> Option<T> {
    let text = text(value, at, notes)?;
    if let Some((_, value)) = known.iter().find(|(word, _)| *word == text) {
        return Some(*value);
    }
    // All of them and no guess: some of these words say how far a plugin is trusted and walled in.
    let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
    unknown_word(text, format!("one of {}", words.join(", ")), at, notes);
    None
}

/// Refuses a word, and says what is allowed in its place.
pub(crate) fn unknown_word(text: &str, allowed: String, at: At<'_>, notes: &mut Notes) {
    notes.findings.add(at, format!("{} is not known here", Excerpt(text)), Some(allowed));
}

/// The keys of an object, or `None` when it is something else.
pub(crate) fn object<'v>(value: &'v Value, at: At<'_>, notes: &mut Notes) -> Option<&'v Map<String, Value>> {
    let object = value.as_object();
    if object.is_none() {
        wrong_type("an object", value, at, notes);
    }
    object
}

/// Refuses keys that are not among the fields, and notes the inactive ones that are.
pub(crate) fn keys(object: &Map<String, Value>, fields: &[Field], at: At<'_>, notes: &mut Notes) {
    for (key, _) in sorted(object) {
        if fields.iter().all(|field| field.key != key) {
            let suggestion = did_you_mean(key, fields.iter().map(|field| field.key));
            notes.findings.add(At::Key(&at, key), "this key is not known", suggestion);
        }
    }
    for field in fields {
        if field.class == Class::Inactive && object.contains_key(field.key) {
            notes.inactive.push(At::Key(&at, field.key).to_string());
        }
        if field.required && !object.contains_key(field.key) {
            notes.findings.add(At::Key(&at, field.key), "this key is missing", None);
        }
    }
}

/// The map's own order depends on a feature of serde_json that any crate of the build may turn on.
fn sorted(object: &Map<String, Value>) -> BTreeMap<&String, &Value> {
    object.iter().collect()
}

/// Reads a field, if it is there.
pub(crate) fn member<T: Read>(object: &Map<String, Value>, key: &str, at: At<'_>, notes: &mut Notes) -> Option<T> {
    T::read(object.get(key)?, At::Key(&at, key), notes)
}

/// An object of the manifest: its struct, its table of fields and how it is read, from one description.
macro_rules! table {
    ($(#[doc = $about:literal])+ $name:ident {
        $($(#[doc = $doc:literal])+ $class:ident $field:ident: $type:ty = $key:literal $($required:ident)?;)+
    }) => {
        $(#[doc = $about])+
        #[derive(Debug, Default)]
        pub(crate) struct $name {
            $($(#[doc = $doc])+ pub(crate) $field: Option<$type>,)+
        }

        impl $name {
            pub(crate) const FIELDS: &'static [Field] = &[$(Field {
                key: $key,
                class: Class::$class,
                required: $crate::manifest::reader::table!(@ $($required)?),
                doc: &[$($doc),+],
                kind: <$type as Read>::KIND,
            }),+];
        }

        impl Read for $name {
            const KIND: Kind = Kind::Object(Self::FIELDS);

            fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
                let object = reader::object(value, at, notes)?;
                reader::keys(object, Self::FIELDS, at, notes);
                Some(Self { $($field: reader::member(object, $key, at, notes)),+ })
            }
        }
    };
    (@) => { false };
    (@ required) => { true };
}
pub(crate) use table;

impl Read for bool {
    const KIND: Kind = Kind::Switch;

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let read = value.as_bool();
        if read.is_none() {
            wrong_type("true or false", value, at, notes);
        }
        read
    }
}

/// 1e3 and 1000.0 are the whole number 1000 to JSON (RFC 8785 writes them so), hence to us.
fn whole(value: &Value) -> Option<i64> {
    #[allow(clippy::cast_possible_truncation, reason = "checked to be exact: below 2^53 and without a fraction")]
    let exact = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(exact))
}

impl Read for i32 {
    const KIND: Kind = Kind::Whole(i32::MIN as i64, i32::MAX as i64);

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let read = whole(value).and_then(|number| Self::try_from(number).ok());
        if read.is_none() {
            let expected = format!("a whole number from {} to {}", Self::MIN, Self::MAX);
            wrong_type(&expected, value, at, notes);
        }
        read
    }
}

impl Read for String {
    const KIND: Kind = Kind::Text("text", "");

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let text = text(value, at, notes)?;
        if text.contains('\0') {
            notes.findings.add(at, "the text holds a NUL character", None);
            return None;
        }
        Some(text.to_owned())
    }
}

/// A whole number from `MIN` to `MAX`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Whole<const MIN: u64, const MAX: u64>(pub(crate) u64);

/// An amount of memory in bytes, at least 1 MiB.
pub(crate) type Memory = Whole<MEBIBYTE, MAX_INTEGER>;

const MEBIBYTE: u64 = 1 << 20;

impl<const MIN: u64, const MAX: u64> Read for Whole<MIN, MAX> {
    const KIND: Kind = Kind::Whole(MIN.cast_signed(), MAX.cast_signed());

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        match whole(value).and_then(|number| u64::try_from(number).ok()) {
            Some(number) if (MIN..=MAX).contains(&number) => Some(Self(number)),
            // Memory written in mebibytes is the mistake that everyone makes once.
            Some(number @ 1..) if MIN == MEBIBYTE => {
                let message = format!("{number} bytes is less than 1 MiB; the unit is bytes");
                let suggestion = format!("for {number} MiB write {}", number << 20);
                notes.findings.add(at, message, Some(suggestion));
                None
            }
            Some(_) | None => {
                wrong_type(&format!("a whole number from {MIN} to {MAX}"), value, at, notes);
                None
            }
        }
    }
}

/// A list whose entries differ. Entries that could not be read are missing, so each has its place with it.
#[derive(Debug)]
pub(crate) struct List<T>(pub(crate) Vec<(usize, T)>);

impl<T> Default for List<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> List<T> {
    pub(crate) fn into_values(self) -> Vec<T> {
        self.0.into_iter().map(|(_, value)| value).collect()
    }
}

impl<T: Read> Read for List<T> {
    const KIND: Kind = Kind::List(&T::KIND);

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let Some(list) = value.as_array() else {
            wrong_type("a list", value, at, notes);
            return None;
        };
        let mut seen = BTreeMap::new();
        let mut read = Vec::new();
        for (index, value) in list.iter().enumerate() {
            let at = At::Index(&at, index);
            if let Some(first) = seen.get(&value.to_string()) {
                let message = format!("it repeats entry {first} of the list");
                notes.findings.add(at, message, Some("remove one of them".to_owned()));
                continue;
            }
            seen.insert(value.to_string(), index);
            read.extend(T::read(value, at, notes).map(|value| (index, value)));
        }
        Some(Self(read))
    }
}

/// A list whose entries may repeat, such as arguments.
#[derive(Debug, Default)]
pub(crate) struct Sequence(pub(crate) Vec<String>);

impl Read for Sequence {
    const KIND: Kind = Kind::Sequence;

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let Some(list) = value.as_array() else {
            wrong_type("a list", value, at, notes);
            return None;
        };
        let read =
            list.iter().enumerate().filter_map(|(index, value)| String::read(value, At::Index(&at, index), notes));
        Some(Self(read.collect()))
    }
}

impl Read for BTreeMap<String, String> {
    const KIND: Kind = Kind::Variables;

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        let object = object(value, at, notes)?;
        let mut read = Self::new();
        for (key, value) in sorted(object) {
            if let Some(value) = String::read(value, At::Key(&at, key), notes) {
                read.insert(key.clone(), value);
            }
        }
        Some(read)
    }
}

impl Read for Map<String, Value> {
    const KIND: Kind = Kind::Json;

    fn read(value: &Value, at: At<'_>, notes: &mut Notes) -> Option<Self> {
        object(value, at, notes).cloned()
    }
}
