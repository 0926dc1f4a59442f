//! Between domain values and the well-known types of protobuf.

use std::time::{Duration, SystemTime};

use prost_types::{ListValue, Struct, Timestamp, Value as Wire, value::Kind};
use serde_json::{Map, Value};

/// A time; the epoch for one before it.
#[must_use]
pub fn timestamp(time: SystemTime) -> Timestamp {
    Timestamp::from(time)
}

/// A duration; the longest that protobuf has for a longer one.
#[must_use]
pub fn duration(duration: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(duration).ok()
}

/// JSON as protobuf's Struct. Numbers become doubles.
#[must_use]
pub fn to_struct(object: Map<String, Value>) -> Struct {
    Struct { fields: object.into_iter().map(|(key, value)| (key, to_value(value))).collect() }
}

fn to_value(value: Value) -> Wire {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(truth) => Kind::BoolValue(truth),
        Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Value::String(text) => Kind::StringValue(text),
        Value::Array(items) => Kind::ListValue(ListValue { values: items.into_iter().map(to_value).collect() }),
        Value::Object(object) => Kind::StructValue(to_struct(object)),
    };
    Wire { kind: Some(kind) }
}

/// Protobuf's Struct as JSON; `None` when it nests deeper than `depth` or has a number that JSON lacks.
#[must_use]
pub fn from_struct(object: Struct, depth: usize) -> Option<Map<String, Value>> {
    let depth = depth.checked_sub(1)?;
    object.fields.into_iter().map(|(key, value)| Some((key, from_value(value, depth)?))).collect()
}

fn from_value(value: Wire, depth: usize) -> Option<Value> {
    Some(match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(truth)) => truth.into(),
        Some(Kind::NumberValue(number)) => serde_json::Number::from_f64(number)?.into(),
        Some(Kind::StringValue(text)) => text.into(),
        Some(Kind::ListValue(list)) => {
            let depth = depth.checked_sub(1)?;
            list.values.into_iter().map(|item| from_value(item, depth)).collect::<Option<Vec<_>>>()?.into()
        }
        Some(Kind::StructValue(object)) => from_struct(object, depth)?.into(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_survives_the_wire_and_depth_is_bounded() {
        let Value::Object(object) = json!({"a": [1.5, null, {"b": "c"}], "d": true}) else { unreachable!() };
        assert_eq!(from_struct(to_struct(object.clone()), 8), Some(object.clone()));
        assert_eq!(from_struct(to_struct(object), 2), None);
    }
}
