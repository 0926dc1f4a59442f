//! Configuration between the wire and the author's type: `google.protobuf.Struct`, JSON, `serde`.
//!
//! Knows the shapes and the names of keys; knows no plugin's configuration.

use prost_types::{ListValue, Struct, Value as WireValue, value::Kind};
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};

/// How deep a configuration may nest. Above it lies prost's own limit of 100 levels of messages.
const MOST_DEPTH: usize = 30;

/// A value that has no form on the other side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StructError {
    /// The whole must be an object.
    #[error("it is {0}, not an object")]
    NotAnObject(&'static str),
    /// Protobuf's Struct has finite double-precision numbers only.
    #[error("it holds a number that is not finite")]
    NotFinite,
    /// It nests too deeply.
    #[error("it nests deeper than {MOST_DEPTH} levels")]
    TooDeep,
    /// Serialisation failed.
    #[error("it cannot be serialised: {0}")]
    Serialise(#[from] serde_json::Error),
}

/// Reads a configuration into the author's type. The error names the key.
pub(crate) fn parse<C: DeserializeOwned>(config: Value) -> Result<C, String> {
    serde_path_to_error::deserialize(config).map_err(|error| {
        let path = error.path().to_string();
        match path.as_str() {
            // Missing and unknown keys of the outermost object: serde's message names the key itself.
            "." => error.inner().to_string(),
            _ => format!("{path}: {}", error.inner()),
        }
    })
}

pub(crate) fn from_struct(config: Struct) -> Result<Value, StructError> {
    object_from(config, MOST_DEPTH)
}

pub(crate) fn to_struct(value: Value) -> Result<Struct, StructError> {
    match value {
        Value::Object(map) => object_to(map, MOST_DEPTH),
        Value::Null => Err(StructError::NotAnObject("null")),
        Value::Bool(_) => Err(StructError::NotAnObject("a boolean")),
        Value::Number(_) => Err(StructError::NotAnObject("a number")),
        Value::String(_) => Err(StructError::NotAnObject("a string")),
        Value::Array(_) => Err(StructError::NotAnObject("a list")),
    }
}

fn object_from(object: Struct, depth: usize) -> Result<Value, StructError> {
    let fields = object.fields.into_iter().map(|(key, value)| Ok((key, value_from(value, depth)?)));
    fields.collect::<Result<Map<_, _>, _>>().map(Value::Object)
}

fn value_from(value: WireValue, depth: usize) -> Result<Value, StructError> {
    let depth = depth.checked_sub(1).ok_or(StructError::TooDeep)?;
    Ok(match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(value),
        Some(Kind::NumberValue(value)) => Value::Number(number_from(value)?),
        Some(Kind::StringValue(value)) => Value::String(value),
        Some(Kind::ListValue(list)) => {
            Value::Array(list.values.into_iter().map(|value| value_from(value, depth)).collect::<Result<_, _>>()?)
        }
        Some(Kind::StructValue(object)) => object_from(object, depth)?,
    })
}

/// Struct has doubles only, while an author's field is often an integer: a whole number that a double holds exactly
/// becomes an integer again. A field of type `f64` takes integers as well.
fn number_from(value: f64) -> Result<Number, StructError> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    if value.fract() == 0.0 && value.abs() <= EXACT {
        #[expect(clippy::cast_possible_truncation, reason = "whole and within 2^53")]
        let whole = value as i64;
        return Ok(Number::from(whole));
    }
    Number::from_f64(value).ok_or(StructError::NotFinite)
}

fn object_to(map: Map<String, Value>, depth: usize) -> Result<Struct, StructError> {
    let fields = map.into_iter().map(|(key, value)| Ok((key, value_to(value, depth)?)));
    Ok(Struct { fields: fields.collect::<Result<_, StructError>>()? })
}

fn value_to(value: Value, depth: usize) -> Result<WireValue, StructError> {
    let depth = depth.checked_sub(1).ok_or(StructError::TooDeep)?;
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(value),
        Value::Number(value) => Kind::NumberValue(value.as_f64().ok_or(StructError::NotFinite)?),
        Value::String(value) => Kind::StringValue(value),
        Value::Array(values) => Kind::ListValue(ListValue {
            values: values.into_iter().map(|value| value_to(value, depth)).collect::<Result<_, _>>()?,
        }),
        Value::Object(map) => Kind::StructValue(object_to(map, depth)?),
    };
    Ok(WireValue { kind: Some(kind) })
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;
    use serde_json::json;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        edge: u32,
        ratio: f64,
        #[serde(default)]
        inner: Vec<Inner>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    struct Inner {
        name: String,
    }

    fn over_the_wire(value: Value) -> Value {
        from_struct(to_struct(value).unwrap()).unwrap()
    }

    #[test]
    fn values_survive_the_wire_and_integers_stay_integers() {
        let value = json!({"edge": 256, "ratio": 2, "low": -0.5, "list": [null, true, "x", {"deep": {}}]});
        assert_eq!(over_the_wire(value.clone()), value);
        let sample: Sample = parse(over_the_wire(json!({"edge": 256, "ratio": 2}))).unwrap();
        assert_eq!(sample, Sample { edge: 256, ratio: 2.0, inner: vec![] });
    }

    #[test]
    fn an_error_names_the_key() {
        let error = |value| parse::<Sample>(over_the_wire(value)).unwrap_err();
        assert!(error(json!({"edge": -1, "ratio": 1})).starts_with("edge: "));
        assert!(error(json!({"edge": 1.5, "ratio": 1})).starts_with("edge: "));
        assert!(error(json!({"edge": 1})).contains("`ratio`"));
        assert!(error(json!({"edge": 1, "ratio": 1, "colour": 3})).contains("colour"));
        assert!(error(json!({"edge": 1, "ratio": 1, "inner": [{"name": 3}]})).starts_with("inner[0].name: "));
    }

    #[test]
    fn shapes_that_the_wire_lacks_are_refused() {
        assert!(matches!(to_struct(json!([1])), Err(StructError::NotAnObject("a list"))));
        let mut deep = json!({});
        for _ in 0..MOST_DEPTH {
            deep = json!({"in": deep});
        }
        to_struct(deep.clone()).unwrap();
        assert!(matches!(to_struct(json!({"in": deep})), Err(StructError::TooDeep)));
        let infinite = WireValue { kind: Some(Kind::NumberValue(f64::INFINITY)) };
        let infinite = Struct { fields: [("x".to_owned(), infinite)].into() };
        assert!(matches!(from_struct(infinite), Err(StructError::NotFinite)));
    }
}
