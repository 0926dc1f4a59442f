//! The plugin `gallery`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use plugvisor_examples::{gallery, main_of};
use plugvisor_worker::Options;

fn main() -> ExitCode {
    main_of::<gallery::Gallery>(gallery::DESCRIPTOR_SET, Options::default())
}
