//! The pages about the manifest and the bundle say what the code does.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::{fmt::Write, fs, path::PathBuf};

use plugvisor_package::{BundleFile, Class, Digest, Field, Kind, Manifest, ManifestLimits, content_digest};

fn page(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "../../docs", name].iter().collect()
}

fn kind(kind: &Kind) -> String {
    match kind {
        Kind::Switch => "true or false".into(),
        Kind::Text(what, _) => (*what).into(),
        // All capabilities would make a very long line.
        Kind::Word(words) if words.len() > 9 => "capability".into(),
        Kind::Word(words) => words.iter().map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", "),
        Kind::Whole(least, most) if *least == i64::from(i32::MIN) && *most == i64::from(i32::MAX) => {
            "whole number".into()
        }
        Kind::Whole(least, most) if *most == (1 << 53) - 1 => format!("whole number from {least}"),
        Kind::Whole(least, most) => format!("{least} to {most}"),
        Kind::List(item) => format!("list: {}", self::kind(item)),
        Kind::Sequence => "list: text".into(),
        Kind::Variables => "object of texts".into(),
        Kind::Json | Kind::Object(_) => "object".into(),
    }
}

fn rows(fields: &[Field], prefix: &str, table: &mut String) {
    for field in fields {
        let path = format!("{prefix}{}", field.key);
        let star = if field.required { " *" } else { "" };
        let class = match field.class {
            Class::Active => "active",
            Class::Inactive => "inactive",
            Class::Refused => "refused",
            Class::Group => "",
        };
        let holds = match field.kind {
            Kind::Object(_) => String::new(),
            Kind::List(Kind::Object(_)) => "list".into(),
            other => kind(&other),
        };
        if field.class != Class::Group {
            writeln!(table, "| `{path}`{star} | {holds} | {class} | {} |", field.description()).unwrap();
        }
        match field.kind {
            Kind::Object(fields) => rows(fields, &format!("{path}."), table),
            Kind::List(Kind::Object(fields)) => rows(fields, &format!("{path}[]."), table),
            _ => {}
        }
    }
}

/// `UPDATE_GOLDEN=1` writes the table anew.
#[test]
fn the_manifest_page_lists_every_field_as_it_is() {
    let text = fs::read_to_string(page("manifest.md")).unwrap();
    let (begin, end) = ("<!-- fields -->\n", "<!-- end of fields -->");
    let (head, rest) = text.split_once(begin).unwrap();
    let (table, tail) = rest.split_once(end).unwrap();
    let mut expected = String::from("\n| field | holds | class | meaning |\n|---|---|---|---|\n");
    rows(Manifest::FIELDS, "", &mut expected);
    expected.push('\n');
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(page("manifest.md"), format!("{head}{begin}{expected}{end}{tail}")).unwrap();
        return;
    }
    assert!(table == expected, "UPDATE_GOLDEN=1 cargo test -p plugvisor-package --test docs writes the table anew");
    assert!(expected.lines().count() > 70, "fields are missing: {expected}");
}

#[test]
fn the_examples_on_the_manifest_page_are_valid() {
    let text = fs::read_to_string(page("manifest.md")).unwrap();
    let examples: Vec<&str> = text.split("```json\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert_eq!(examples.len(), 4);
    for example in examples {
        let manifest = Manifest::parse(example.as_bytes(), &ManifestLimits::default()).unwrap();
        assert_eq!(manifest.runtime.exec, format!("bin/{}", manifest.name));
    }
}

#[test]
fn the_limits_on_the_pages_are_the_defaults() {
    let text = fs::read_to_string(page("manifest.md")).unwrap();
    let ManifestLimits { bytes, depth, values, items, text: longest, problems: _ } = ManifestLimits::default();
    let (kilobytes, thousands) = (bytes / 1024, values / 1000);
    let line = format!(
        "{kilobytes} KiB, {depth} levels, {thousands},{} values, {items} entries a list, {} KiB a text",
        values % 1000,
        longest / 1024
    );
    assert!(text.contains(&line), "{line}");
}

#[test]
fn the_vectors_on_the_bundle_page_hold() {
    let text = fs::read_to_string(page("bundle.md")).unwrap();
    let file = |path: &str, executable: bool, bytes: &[u8]| BundleFile {
        path: path.into(),
        executable,
        size: bytes.len() as u64,
        sha256: Digest::of(bytes),
    };
    let script = file("bin/a", true, b"#!/bin/sh\nexit 0\n");
    let manifest = file("plugin.json", false, br#"{"name":"a","version":"1.0.0"}"#);
    for files in [
        vec![],
        vec![script, file("data/x", false, b"1"), manifest],
        vec![file("bin-b", false, b""), file("bin/a", true, b"abc"), file("plugin.json", false, b"{}")],
    ] {
        let digest = content_digest(&files).to_string();
        assert!(text.contains(&digest), "{digest} of {files:?}");
    }
}
