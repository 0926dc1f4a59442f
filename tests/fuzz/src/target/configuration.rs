//! Configurations: every text is accepted or told what is wrong and in which line, and means the same each time.

use std::path::Path;

use plugvisor_daemon::config::{Config, ConfigError, Surroundings};

pub(super) fn check(input: &[u8]) -> String {
    // A file that is not UTF-8 is refused as it is read.
    let text = String::from_utf8_lossy(input);
    let surroundings = Surroundings { uid: 1000, ..Surroundings::default() };
    let path = Path::new("/etc/plugvisor/plugvisor.toml");
    match Config::parse(&text, path, &surroundings) {
        Ok(config) => {
            let again = Config::parse(&text, path, &surroundings).expect("what is accepted once is accepted twice");
            assert_eq!(again, config);
            assert!(config.supervisor.metrics_address.ip().is_loopback(), "{}", config.supervisor.metrics_address);
            assert!(config.supervisor.runtime_directory.is_absolute());
            assert!(config.directories.iter().all(|directory| directory.path.is_absolute()));
            // Which settings are set, and not to what.
            let said = format!("{config:?}");
            said.split(", ").map(|field| if field.ends_with("None") { "-" } else { "+" }).collect()
        }
        Err(ConfigError::Invalid { path: named, problems }) => {
            assert_eq!(named, path);
            assert!(!problems.is_empty(), "refused without a problem");
            let lines = text.lines().count().max(1) + 1;
            let mut shapes = Vec::new();
            for problem in &problems {
                assert!((1..=lines).contains(&problem.line), "line {} of {lines}", problem.line);
                assert!(!problem.message.is_empty(), "a problem without words: {problem:?}");
                shapes.push(problem.message.clone());
            }
            assert!(problems.is_sorted_by_key(|problem| problem.line), "problems out of order");
            shapes.sort();
            shapes.dedup();
            shapes.concat()
        }
        Err(other) => panic!("a text that was read cannot be {other}"),
    }
}
