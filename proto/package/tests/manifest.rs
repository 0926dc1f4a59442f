//! Whole manifests: the good ones mean what they say, the broken ones are told everything that is wrong with them.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{fmt::Write, fs, path::Path, time::Duration};

use plugvisor_package::{
    Activation, Capability, Class, Field, Kind, Manifest, ManifestLimits, Problems, RuntimeKind, SocketMode, TrustTier,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn parse(text: &str) -> Result<Manifest, Problems> {
    Manifest::parse(text.as_bytes(), &ManifestLimits::default())
}

fn paths<T>(list: &[T], path: impl Fn(&T) -> &str) -> Vec<String> {
    list.iter().map(|item| path(item).to_owned()).collect()
}

#[test]
fn the_least_manifest_gets_the_documented_defaults() {
    let manifest = parse(include_str!("samples/least.json")).unwrap();
    assert_eq!(manifest.name.as_str(), "a");
    assert_eq!(manifest.runtime.exec, "bin/a");
    assert_eq!(manifest.runtime.descriptor_set, "descriptor.binpb");
    assert!(!manifest.runtime.descriptor_set_stated);
    assert_eq!(manifest.runtime.socket, SocketMode::Inherit);
    assert_eq!(manifest.runtime.kind, RuntimeKind::Service);
    assert_eq!(manifest.runtime.activation, Activation::Eager);
    assert_eq!(manifest.runtime.protocol, 1);
    assert!(manifest.security.sandbox.enabled);
    assert_eq!(manifest.security.trust_level, None);
    assert!(manifest.inactive_fields().is_empty());
    assert!(manifest.unsupported().is_empty());
    assert!(manifest.not_checked().is_empty());
}

#[test]
fn the_full_manifest_is_read_to_its_last_field() {
    let manifest = parse(include_str!("samples/full.json")).unwrap();
    assert_eq!(manifest.version.to_string(), "1.4.0-rc.1+build.7");
    assert_eq!(manifest.dependencies[1].name.as_str(), "gallery");
    assert!(manifest.dependencies[1].range.matches(&"1.3.0".parse().unwrap()));
    assert!(!manifest.dependencies[1].range.matches(&"1.9.0".parse().unwrap()));
    assert_eq!(manifest.security.trust_level, Some(TrustTier::Verified));
    let asked = [Capability::WriteTemp, Capability::InternalCalls, Capability::PublishEvents];
    assert_eq!(manifest.security.capabilities, asked);
    let limits = &manifest.security.sandbox.resource_limits;
    assert_eq!(limits.max_memory.unwrap().bytes(), 134_217_728);
    assert_eq!(limits.max_cpu_percent, Some(150));
    assert_eq!(limits.max_execution_time, Some(Duration::from_secs(5)));
    assert_eq!(manifest.monitoring.circuit_breaker.recovery_timeout, Some(Duration::from_secs(60)));
    assert!(manifest.events.lifecycle.on_error && !manifest.events.lifecycle.before_unload);
    assert_eq!(manifest.module.guards[1].dependencies, ["signed-in"]);
    assert_eq!(manifest.runtime.args, ["--quality", "80", "--quality", "80"]);
    assert_eq!(manifest.runtime.config.defaults["quality"], 80);

    assert_eq!(
        manifest.inactive_fields(),
        [
            "optimization.bundleOptimization.enabled",
            "optimization.bundleOptimization.treeShaking",
            "optimization.bundleOptimization.minification",
            "optimization.bundleOptimization.compression",
            "optimization.bundleOptimization.removeSourceMaps",
            "optimization.bundleOptimization.removeTestFiles",
            "optimization.caching.manifestCache",
            "optimization.caching.validationCache",
            "optimization.caching.securityCache",
            "optimization.caching.ttl",
            "events.lifecycle.onError",
            "monitoring.performance.enableMetrics",
            "monitoring.performance.enableTracing",
            "module.controllers",
            "module.imports",
            "runtime.idleStop",
            "runtime.config.schema",
            "runtime.activation",
        ]
    );
    assert_eq!(paths(&manifest.unsupported(), |field| &field.path), ["security.signature", "module.guards"]);
    assert_eq!(
        paths(&manifest.not_checked(), |field| &field.path),
        [
            "dependencies[0]",
            "dependencies[1]",
            "security.signature.keyId",
            "module.imports[0]",
            "module.imports[1]",
            "module.guards[0]",
        ]
    );
}

/// The sample is what the tests of the schema and of the documentation lean on, so it must leave nothing out.
#[test]
fn the_full_sample_sets_every_field() {
    fn missing(fields: &[Field], value: &Value, prefix: &str, list: &mut Vec<String>) {
        for field in fields {
            let path = format!("{prefix}{}", field.key);
            let Some(value) = value.get(field.key) else {
                list.push(path);
                continue;
            };
            match field.kind {
                Kind::Object(fields) => missing(fields, value, &format!("{path}."), list),
                Kind::List(Kind::Object(fields)) => {
                    for field in *fields {
                        let set = value.as_array().unwrap().iter().any(|entry| entry.get(field.key).is_some());
                        if !set {
                            list.push(format!("{path}[].{}", field.key));
                        }
                    }
                }
                _ => {}
            }
        }
    }
    let mut list = Vec::new();
    let sample = serde_json::from_str(include_str!("samples/full.json")).unwrap();
    missing(Manifest::FIELDS, &sample, "", &mut list);
    assert_eq!(list, Vec::<String>::new());
}

/// Every field that the table calls refused makes `unsupported` name it or the field around it, and every inactive one is
/// listed: no field is silently ignored.
#[test]
fn classes_agree_with_what_is_reported() {
    fn classes(fields: &[Field], prefix: &str, class: Class, list: &mut Vec<String>) {
        for field in fields {
            let path = format!("{prefix}{}", field.key);
            if field.class == class {
                list.push(path);
            } else if let Kind::Object(fields) = field.kind {
                classes(fields, &format!("{path}."), class, list);
            }
        }
    }
    let manifest = parse(include_str!("samples/full.json")).unwrap();
    let mut refused = Vec::new();
    classes(Manifest::FIELDS, "", Class::Refused, &mut refused);
    let reported = paths(&manifest.unsupported(), |field| &field.path);
    assert!(refused.iter().all(|path| reported.contains(path)), "{refused:?} in {reported:?}");
    assert_eq!(refused.len(), 2, "{refused:?}");
    let mut inactive = Vec::new();
    classes(Manifest::FIELDS, "", Class::Inactive, &mut inactive);
    assert!(inactive.iter().all(|path| manifest.inactive_fields().contains(path)), "{inactive:?}");
}

/// The examples are what authors copy: nothing in them is refused or does nothing.
#[test]
fn the_examples_are_good_manifests() {
    let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../worker-sdk/examples/bundles");
    let mut names = Vec::new();
    for entry in fs::read_dir(bundles).unwrap() {
        let bytes = fs::read(entry.unwrap().path().join(Manifest::FILE_NAME)).unwrap();
        let manifest = Manifest::parse(&bytes, &ManifestLimits::default()).unwrap();
        assert_eq!(manifest.unsupported(), [], "{}", manifest.name);
        assert_eq!(manifest.inactive_fields(), <[String; 0]>::default(), "{}", manifest.name);
        names.push(manifest.name.to_string());
    }
    names.sort();
    assert_eq!(names, ["gallery", "markdown", "thumbnailer"]);
}

/// Each broken manifest has its problems beside it. `UPDATE_GOLDEN=1` writes them anew; read the difference.
#[test]
fn broken_manifests_are_told_everything() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus");
    let mut names: Vec<_> = fs::read_dir(&corpus).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    names.sort();
    assert!(names.len() >= 25, "only {} broken manifests", names.len());
    for path in names {
        let bytes = fs::read(&path).unwrap();
        let problems = Manifest::parse(&bytes, &ManifestLimits::default()).expect_err(&path.display().to_string());
        let mut told = String::new();
        for problem in problems.all() {
            writeln!(told, "{problem}").unwrap();
        }
        let golden = path.with_extension("txt");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&golden, &told).unwrap();
        }
        assert_eq!(told, fs::read_to_string(&golden).unwrap_or_default(), "{}", path.display());
    }
}

#[test]
fn limits_are_held_and_named() {
    let least = json!({ "name": "a", "version": "1.0.0" });
    let told = |document: &Value, limits: ManifestLimits| -> Vec<String> {
        let parsed = Manifest::parse(document.to_string().as_bytes(), &limits);
        parsed.expect_err("within limits").all().iter().map(ToString::to_string).collect()
    };
    let default = ManifestLimits::default;
    assert_eq!(told(&least, ManifestLimits { bytes: 10, ..default() }), ["the document has 30 bytes, the limit is 10"]);
    let with = |key: &str, value: Value| {
        let mut document = least.clone();
        document[key] = value;
        document
    };
    let listed = told(&with("dependencies", json!(["b", "c", "d"])), ManifestLimits { items: 2, ..default() });
    assert!(listed.contains(&"dependencies: more than 2 entries".to_owned()), "{listed:?}");
    let long = told(&with("description", json!("123456789012")), ManifestLimits { text: 11, ..default() });
    assert_eq!(long, ["description: the text has 12 bytes, the limit is 11"]);
    let deep =
        told(&with("runtime", json!({ "config": { "defaults": {} } })), ManifestLimits { depth: 3, ..default() });
    assert!(deep[0].contains("nests deeper than 3 levels"), "{deep:?}");
    let many = told(&least, ManifestLimits { values: 2, ..default() });
    assert!(many[0].contains("more than 2 values"), "{many:?}");
    let wrong = with("x1", json!({})).as_object().unwrap().clone();
    let wrong: serde_json::Map<String, Value> =
        wrong.into_iter().chain((2..9).map(|number| (format!("x{number}"), json!(1)))).collect();
    let cut = told(&Value::Object(wrong), ManifestLimits { problems: 3, ..default() });
    assert_eq!(cut.len(), 4);
    assert_eq!(cut[3], "5 more problems are not listed");
}

#[test]
fn hostile_depth_is_an_error_and_not_a_crash() {
    for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
        let text = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
        let limits = ManifestLimits { bytes: usize::MAX, depth: usize::MAX, ..ManifestLimits::default() };
        let problems = Manifest::parse(text.as_bytes(), &limits).expect_err("too deep");
        assert!(problems.to_string().contains("deeper than 100 levels"), "{problems}");
    }
}

#[test]
fn the_canonical_form_leaves_out_what_stands_on_it() {
    let canonical = |document: Value| String::from_utf8(parse(&document.to_string()).unwrap().canonical()).unwrap();
    let hash = "0".repeat(64);
    let bare = canonical(json!({ "version": "1.0.0", "name": "a" }));
    assert_eq!(bare, r#"{"name":"a","version":"1.0.0"}"#);
    let checksum = json!({ "algorithm": "sha256", "hash": hash });
    assert_eq!(canonical(json!({ "name": "a", "version": "1.0.0", "security": { "checksum": checksum } })), bare);
    let security = json!({ "checksum": checksum, "trustLevel": "verified",
        "signature": { "algorithm": "RS256", "keyId": "k", "signature": "s" } });
    assert_eq!(
        canonical(json!({ "name": "a", "version": "1.0.0", "loadOrder": 1.0, "security": security })),
        r#"{"loadOrder":1,"name":"a","security":{"trustLevel":"verified"},"version":"1.0.0"}"#
    );
}

fn arbitrary_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            proptest::collection::btree_map("[a-zA-Z.\\[\\]\"]{0,8}", inner, 0..6)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// The full sample with a few of its values replaced, so that the reader gets past the first levels.
fn mutated() -> impl Strategy<Value = Value> {
    let replaced = proptest::collection::vec((any::<prop::sample::Index>(), arbitrary_json()), 1..6);
    replaced.prop_map(|list| {
        let mut document: Value = serde_json::from_str(include_str!("samples/full.json")).unwrap();
        for (index, value) in list {
            let mut pointers = Vec::new();
            pointers_of(&document, "", &mut pointers);
            *document.pointer_mut(&pointers[index.index(pointers.len())]).unwrap() = value;
        }
        document
    })
}

fn pointers_of(value: &Value, at: &str, list: &mut Vec<String>) {
    list.push(at.to_owned());
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                pointers_of(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), list);
            }
        }
        Value::Array(values) => {
            for (index, value) in values.iter().enumerate() {
                pointers_of(value, &format!("{at}/{index}"), list);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_judged_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(Manifest::parse(&bytes, &ManifestLimits::default()).is_err());
    }

    #[test]
    fn arbitrary_json_is_judged_without_panic(document in arbitrary_json()) {
        prop_assert!(Manifest::parse(document.to_string().as_bytes(), &ManifestLimits::default()).is_err());
    }

    /// Whatever is accepted survives its own canonical form; whatever is not has problems, each with a message.
    #[test]
    fn mutations_are_accepted_whole_or_refused_with_reasons(document in mutated()) {
        let limits = ManifestLimits::default();
        match Manifest::parse(document.to_string().as_bytes(), &limits) {
            Ok(manifest) => {
                let again = Manifest::parse(&manifest.canonical(), &limits).unwrap();
                prop_assert_eq!(again.canonical(), manifest.canonical());
                // The signature is not in the canonical form; free JSON in the configuration may write 0.0 as 0 there.
                prop_assert_eq!(&again.module, &manifest.module);
                prop_assert_eq!(&again.security.sandbox, &manifest.security.sandbox);
                prop_assert_eq!(again.inactive_fields(), manifest.inactive_fields());
            }
            Err(problems) => {
                prop_assert!(!problems.all().is_empty() && problems.all().len() <= limits.problems + 1);
                prop_assert!(problems.all().iter().all(|problem| !problem.message.is_empty()));
            }
        }
    }
}
