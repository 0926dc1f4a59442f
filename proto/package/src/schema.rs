//! The JSON Schema of the manifest, written from the same table of fields that the reader reads by.
//!
//! A schema cannot say everything: what refers to something else (a guard's source, names of services, duplicate keys) is
//! judged by the reader alone. What the schema refuses, the reader refuses too; tests hold that.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings, json_schema};
use serde_json::{Map, Value, json};

use crate::{Class, Field, Kind, Manifest, ManifestLimits};

impl JsonSchema for Manifest {
    fn schema_name() -> Cow<'static, str> {
        "PluginManifest".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let mut schema = Schema::try_from(of(&Kind::Object(Self::FIELDS))).expect("an object's schema is an object");
        // Editors are told where the schema is by this key in the document itself; a manifest has no room for it, since
        // unknown keys are refused. They take it from their settings.
        schema.insert("description".into(), json!("The manifest of a Plugvisor plugin, plugin.json."));
        schema
    }
}

/// The schema as it is published, with a line feed at its end.
#[must_use]
pub fn manifest_schema() -> String {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Manifest>();
    schema.insert("title".into(), json!("plugin.json"));
    let sorted: std::collections::BTreeMap<_, _> = schema.as_object().into_iter().flatten().collect();
    let mut text = serde_json::to_string_pretty(&sorted).expect("a schema can be written as JSON");
    text.push('\n');
    text
}

fn of(kind: &Kind) -> Value {
    let items = ManifestLimits::default().items;
    match kind {
        Kind::Switch => json!({ "type": "boolean" }),
        Kind::Text(_, "") => json!({ "type": "string" }),
        Kind::Text(_, pattern) => json!({ "type": "string", "pattern": pattern }),
        Kind::Word(words) => json!({ "type": "string", "enum": words }),
        Kind::Whole(least, most) => json!({ "type": "integer", "minimum": least, "maximum": most }),
        Kind::List(kind) => json!({ "type": "array", "items": of(kind), "uniqueItems": true, "maxItems": items }),
        Kind::Sequence => json!({ "type": "array", "items": { "type": "string" }, "maxItems": items }),
        Kind::Variables => json!({
            "type": "object",
            "propertyNames": { "pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "not": { "pattern": "^(PLUGVISOR|LISTEN|LD)_" } },
            "additionalProperties": { "type": "string" },
            "maxProperties": items,
        }),
        Kind::Json => json!({ "type": "object", "maxProperties": items }),
        Kind::Object(fields) => object(fields),
    }
}

fn object(fields: &[Field]) -> Value {
    let properties: Map<String, Value> = fields.iter().map(|field| (field.key.to_owned(), property(field))).collect();
    let required: Vec<&str> = fields.iter().filter(|field| field.required).map(|field| field.key).collect();
    let mut schema = json_schema!({ "type": "object", "properties": properties, "additionalProperties": false });
    if !required.is_empty() {
        schema.insert("required".into(), json!(required));
    }
    schema.to_value()
}

fn property(field: &Field) -> Value {
    let mut schema = of(&field.kind);
    let class = match field.class {
        Class::Active | Class::Group => "",
        Class::Inactive => " Inactive in this version: accepted, without effect.",
        Class::Refused => " Not implemented in this version: a plugin that sets it is not loaded.",
    };
    schema["description"] = format!("{}{class}", field.description()).into();
    schema
}
