//! `cargo xtask fuzz`: builds the driver of the fuzz targets and hands it the rest of the command line.

use std::{ffi::OsString, process::Command};

use crate::build::{Profile, cargo, target_directory};
use crate::steps::run;

/// The driver. It is built for development: overflows and failed assertions are what it looks for.
const DRIVER: &str = "plugvisor-fuzz";

/// Builds and runs the driver.
///
/// # Errors
/// When it cannot be built, or found something.
pub(crate) fn fuzz(arguments: &[OsString]) -> anyhow::Result<()> {
    run(cargo().args(["build", "--locked", "--workspace", "--all-features", "--bin", DRIVER]))?;
    let driver = target_directory()?.join(Profile::Dev.directory()).join(DRIVER);
    run(Command::new(driver).args(arguments))
}
