//! The inputs that are checked in.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::Target;

/// Every input of a target with its name, in the order of the names.
///
/// # Errors
/// When a directory or a file of the corpus cannot be read.
pub fn corpus(target: Target) -> io::Result<Vec<(String, Vec<u8>)>> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut directories = vec![here.join("corpus").join(target.name())];
    if target == Target::Manifest {
        // The broken ones that the package's own tests know the words for, and the good ones.
        let tests = here.join("../../proto/package/tests");
        directories.extend([tests.join("corpus"), tests.join("samples")]);
    }
    let mut inputs = Vec::new();
    for directory in directories {
        let mut paths: Vec<PathBuf> =
            fs::read_dir(&directory)?.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>()?;
        paths.sort();
        for path in paths {
            // Beside each broken manifest lies what is said about it.
            if target == Target::Manifest && path.extension().is_some_and(|extension| extension == "txt") {
                continue;
            }
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            inputs.push((name, fs::read(&path)?));
        }
    }
    inputs.extend(target.seeds().into_iter().enumerate().map(|(number, seed)| (format!("seed-{number}"), seed)));
    Ok(inputs)
}
