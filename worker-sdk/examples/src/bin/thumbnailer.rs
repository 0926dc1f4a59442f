//! The plugin `thumbnailer`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use plugvisor_examples::{main_of, thumbnailer};
use plugvisor_worker::Options;

fn main() -> ExitCode {
    main_of::<thumbnailer::Thumbnailer>(thumbnailer::DESCRIPTOR_SET, Options::default())
}
