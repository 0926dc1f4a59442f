//! `cargo xtask fuzz`: many inputs against one target, or one input again.
#![forbid(unsafe_code)]

use std::{fs, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use plugvisor_fuzz::{Session, Target};

/// Tries inputs until one breaks a property of the target.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask fuzz", max_term_width = 110)]
struct Arguments {
    /// What to try; all of them, one after another, when none is named.
    #[arg(value_enum)]
    target: Vec<Target>,
    /// How many inputs to try on each.
    #[arg(long, default_value_t = 100_000)]
    runs: u64,
    /// Where the generator begins; the same seed tries the same inputs.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Tries this file alone, such as one that an earlier run has left.
    #[arg(long, value_name = "FILE", requires = "target")]
    input: Option<PathBuf>,
}

fn main() -> anyhow::Result<ExitCode> {
    let Arguments { target, runs, seed, input } = Arguments::parse();
    let targets = if target.is_empty() { Target::ALL.to_vec() } else { target };
    if let Some(path) = input {
        let input = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        for target in targets {
            println!("{}: {:?}", target.name(), target.check(&input));
        }
        return Ok(ExitCode::SUCCESS);
    }
    for target in targets {
        let mut session = Session::new(target, seed).context("cannot read the corpus")?;
        match session.run(runs) {
            Ok(report) => {
                println!("{}: {} inputs, {} shapes, nothing found", target.name(), report.runs, report.shapes);
            }
            Err(finding) => {
                let file = PathBuf::from(format!("fuzz-{}-{seed}.input", target.name()));
                fs::write(&file, &finding.input).with_context(|| format!("cannot write {}", file.display()))?;
                eprintln!("{}: {}", target.name(), finding.why);
                eprintln!(
                    "the input is in {0}; `cargo xtask fuzz {1} --input {0}` tries it again; when it is mended, it goes \
                     to tests/fuzz/corpus/{1}",
                    file.display(),
                    target.name()
                );
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}
