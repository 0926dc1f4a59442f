//! The published schema: the checked-in file is the generated one, and it agrees with the reader.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{fs, path::Path};

use plugvisor_package::{Manifest, ManifestLimits, manifest_schema};
use proptest::prelude::*;
use serde_json::{Value, json};

fn validator() -> jsonschema::Validator {
    jsonschema::validator_for(&serde_json::from_str(&manifest_schema()).unwrap()).unwrap()
}

fn sample(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/samples").join(name);
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// `UPDATE_GOLDEN=1` writes the file anew.
#[test]
fn the_checked_in_schema_is_the_generated_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/plugin.schema.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, manifest_schema()).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap();
    assert!(checked_in == manifest_schema(), "UPDATE_GOLDEN=1 cargo test -p plugvisor-package writes {path:?} anew");
    let schema: Value = serde_json::from_str(&checked_in).unwrap();
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    jsonschema::meta::validate(&schema).unwrap();
}

#[test]
fn good_manifests_satisfy_the_schema() {
    let validator = validator();
    for name in ["least.json", "full.json"] {
        let errors: Vec<_> = validator.iter_errors(&sample(name)).map(|error| error.to_string()).collect();
        assert_eq!(errors, Vec::<String>::new(), "{name}");
    }
}

/// The schema sees what stands in one place; these need two, or the text below the JSON.
const BEYOND_A_SCHEMA: [&str; 4] =
    ["contradicting-sandbox.json", "duplicate-keys.json", "escaped-duplicate-key.json", "version-leading-zero.json"];

#[test]
fn broken_manifests_do_not() {
    let validator = validator();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut refused = 0;
    for entry in fs::read_dir(corpus).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Ok(document) = serde_json::from_slice::<Value>(&fs::read(&path).unwrap()) else { continue };
        if !name.ends_with(".json") || BEYOND_A_SCHEMA.contains(&name.as_str()) {
            continue;
        }
        assert!(!validator.is_valid(&document), "{name}");
        refused += 1;
    }
    assert!(refused > 20, "only {refused} were tried");
}

/// Replaces one value of the full sample, anywhere, by something simple.
fn mutated() -> impl Strategy<Value = Value> {
    let value = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3_i64..300_000).prop_map(Value::from),
        "[a-zA-Z0-9:./@^ _-]{0,10}".prop_map(Value::from),
        Just(json!([])),
        Just(json!({})),
        Just(json!(["a", "a"])),
        Just(json!(["a.B", "network:http-client"])),
        Just(json!({ "name": "a" })),
    ];
    (any::<prop::sample::Index>(), value).prop_map(|(index, value)| {
        let mut document = sample("full.json");
        let mut pointers = Vec::new();
        pointers_of(&document, "", &mut pointers);
        *document.pointer_mut(&pointers[index.index(pointers.len())]).unwrap() = value;
        document
    })
}

fn pointers_of(value: &Value, at: &str, list: &mut Vec<String>) {
    list.push(at.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| pointers_of(value, &format!("{at}/{key}"), list)),
        Value::Array(values) => {
            values.iter().enumerate().for_each(|(index, value)| pointers_of(value, &format!("{at}/{index}"), list));
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// An editor that holds an author to the schema never complains about what the reader would take.
    #[test]
    fn what_the_reader_takes_the_schema_takes(document in mutated()) {
        use std::cell::OnceCell;
        thread_local!(static VALIDATOR: OnceCell<jsonschema::Validator> = const { OnceCell::new() });
        if Manifest::parse(document.to_string().as_bytes(), &ManifestLimits::default()).is_ok() {
            let told = VALIDATOR.with(|cell| {
                cell.get_or_init(validator).iter_errors(&document).map(|error| error.to_string()).collect::<Vec<_>>()
            });
            prop_assert_eq!(told, Vec::<String>::new());
        }
    }
}
