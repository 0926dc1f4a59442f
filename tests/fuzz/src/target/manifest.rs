//! Manifests: every one is accepted or told what is wrong, within bounds, and what is accepted has one canonical form.

use plugvisor_package::{Manifest, ManifestLimits};

pub(super) fn check(input: &[u8]) -> String {
    let limits = ManifestLimits::default();
    let manifest = match Manifest::parse(input, &limits) {
        Ok(manifest) => manifest,
        Err(problems) => {
            let all = problems.all();
            assert!(!all.is_empty(), "refused without a problem");
            assert!(all.len() <= limits.problems + 1, "{} problems", all.len());
            let mut shapes = Vec::new();
            for problem in all {
                assert!(!problem.message.is_empty(), "a problem without words at {:?}", problem.path);
                assert!(!problem.message.contains('\n'), "a problem of several lines: {problem}");
                let said = problem.to_string();
                assert!(said.len() <= 6 * limits.text, "a problem of {} bytes", said.len());
                // In the whole document, or at a place whose names are the manifest's own.
                assert!(!problem.path.chars().any(char::is_control), "a place like no other: {:?}", problem.path);
                shapes.push(said);
            }
            shapes.sort();
            shapes.dedup();
            return shapes.concat();
        }
    };
    let canonical = manifest.canonical();
    let again = Manifest::parse(&canonical, &limits).expect("the canonical form of a good manifest is one");
    assert_eq!(again.canonical(), canonical, "there are two canonical forms");
    assert_eq!(again.name, manifest.name);
    assert_eq!(again.version, manifest.version);
    assert_eq!(again.dependencies, manifest.dependencies);
    assert_eq!(again.module, manifest.module);
    assert_eq!(again.runtime.exec, manifest.runtime.exec);
    assert_eq!(again.security.capabilities, manifest.security.capabilities);
    assert_eq!(again.security.sandbox, manifest.security.sandbox);
    for path in [&manifest.runtime.exec, &manifest.runtime.descriptor_set] {
        assert!(!path.starts_with('/') && !path.split('/').any(|part| part == ".."), "{path:?} leaves the bundle");
    }
    format!("{:?} {:?} {:?}", manifest.inactive_fields(), manifest.unsupported(), manifest.not_checked())
}
